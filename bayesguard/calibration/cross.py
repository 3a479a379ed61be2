"""Conformal prediction without rows set aside: CV+, jackknife+ and jackknife+ after the bootstrap.

R. F. Barber, E. J. Candès, A. Ramdas, R. J. Tibshirani (2021). Predictive inference with the jackknife+. Annals of
Statistics 49. Y. Romano, M. Sesia, E. J. Candès (2020). Classification with valid and adaptive coverage. NeurIPS.
B. Kim, C. Xu, R. F. Barber (2020). Predictive inference is free with the jackknife+-after-bootstrap. NeurIPS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayesguard.calibration.conformal import Conformal, ConformalInterval, rounded_outwards
from bayesguard.calibration.cross_fit import random_folds
from bayesguard.calibration.left_out import LeftOut, left_out_ends
from bayesguard.calibration.ranks import conformal_rank, warn_too_few
from bayesguard.checks import check_finite, check_labels, check_level, check_shape
from bayesguard.data import map_leaves
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.bernoulli import check_answers
from bayesguard.predictive.combine import mixture
from bayesguard.predictive.guaranteed import RowValues, guaranteed
from bayesguard.predictive.numerics import as_given, wide
from bayesguard.sampling import derive_seed, seeded_default_generators

if TYPE_CHECKING:
    from bayesguard.posteriors.ensemble import DeepEnsemble
    from bayesguard.predictor import Predictor

CrossScore = Literal["lac", "aps", "raps", "saps", "absolute", "normalised"]
_OF_NUMBERS = ("absolute", "normalised")


class CrossConformal:
    """Prediction sets and intervals from predictors that each saw a part of the training rows; no row is set aside.

    Every row is scored by the predictors that did not see it. An answer to a new input is left out where those same
    predictors find it stranger than their row, for all but alpha of the rows. The result of a call is the equal mixture
    of all predictors, with sets or intervals for every alpha.

    The guarantee, for exchangeable rows and a training that treats all rows alike, is coverage of `1 - 2 alpha`
    (jackknife+; CV+ less `sqrt(2 / n)`; after the bootstrap for a random number of members): half of the promise is lost in
    the proof for what hardly occurs, and coverage is near `1 - alpha` nearly always. Where rows can be spared, `Conformal`
    and `ConformalInterval` promise `1 - alpha`.

    Made by `cross_conformal` and `jackknife_plus_after_bootstrap`, or from predictors of your own.

    Args:
        predictors: M fitted predictors, fitted in the same way.
        data: Inputs and targets of the n rows, a pair of arrays.
        seen: Which rows each predictor was fitted to, bool `[M, n]`; for folds `[n]` of K predictors
            `folds != torch.arange(K)[:, None]`.
        score: For classes as in `Conformal`, None for "aps"; for numbers "absolute" or "normalised" as in
            `ConformalInterval`, None for "absolute".
        alpha: Mis-coverage that is meant where none is said.
        batch_size: Rows a batch of predictions.
        seed: Of the random share of "aps", "raps" and "saps".

    Attributes:
        scores: Of each row by the predictors that did not see it, float64 `[n]`, for numbers `[n, D]`, each of D outputs by
            itself; infinite for a row that all saw.

    Raises:
        BadInput: Shapes that do not fit, an unknown score, or no row that any predictor did not see.
        BadType: Predictives of neither one class an example nor numbers.

    References:
        Barber et al., 2021, eqs. 5 and 11; Romano et al., 2020, eq. 11; Kim et al., 2020, algorithm 1.
    """

    def __init__(
        self,
        predictors: Sequence[Predictor],
        data: tuple[Any, Any],
        seen: object,
        *,
        score: CrossScore | None = None,
        alpha: float = 0.1,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        inputs, targets = data
        self.predictors, self.alpha, self.batch_size = list(predictors), check_level(alpha, "alpha"), batch_size
        self._plan = LeftOut.of(as_given(seen, "seen").cpu())
        y = as_given(targets, "targets").cpu()
        check_shape(self._plan.unseen, (len(self.predictors), len(y)), "seen")
        running: _Running | None = None
        for index, predictor in enumerate(self.predictors):
            rows = self._plan.unseen[index].nonzero().squeeze(-1)
            if len(rows):
                pred = predictor.predict((_rows(inputs, rows), targets[rows]), batch_size=batch_size)
                if running is None:
                    self._rule, self._outputs = _rule_for(pred, score, self.alpha, seed), pred.batch_shape[1:]
                    self._yes_or_no = isinstance(pred, BernoulliPredictive)
                    running = _Running(len(y), _values_of(pred, self._rule))
                running.add(rows, _values_of(pred, self._rule))
        assert running is not None  # or the plan would have been refused
        self.scores = self._held_out_scores(running, y)
        self.scores[self._plan.never_left_out] = torch.inf

    def _held_out_scores(self, running: _Running, targets: Tensor) -> Tensor:
        if isinstance(self._rule, Conformal):
            if self._yes_or_no:
                labels = check_answers(targets, targets.shape[:1], "targets")
            else:
                labels = check_labels(targets, targets.shape[:1], running.mean.shape[1])
            return self._rule._label_scores(running.mean, labels)
        y = targets.double()
        check_shape(y, (len(y), *self._outputs), "targets")
        check_finite(y, "targets")
        widths = running.variance.sqrt() if self._rule.score == "normalised" else torch.ones_like(running.mean)
        return (y.reshape(running.mean.shape) - running.mean).abs() / widths

    def __call__(self, data: Any) -> Predictive:
        """Return the mixture of all predictors for new inputs, with sets or intervals that are guaranteed.

        Args:
            data: As for `Predictor.predict`.
        """
        preds = [predictor.predict(data, batch_size=self.batch_size) for predictor in self.predictors]
        values = [_values_of(pred, self._rule) for pred in preds]
        if isinstance(self._rule, Conformal):
            rows = {"stranger": self._rows_less_strange(torch.stack([value.mean for value in values]))}
        else:
            rows = {name: torch.stack([getattr(value, name) for value in values], -1) for name in ("mean", "variance")}
        return guaranteed(mixture(preds), self._answer, self.alpha, rows)

    def _rows_less_strange(self, probs: Tensor) -> Tensor:
        """How many training rows are less strange than each class would be, `[N, K]`."""
        assert isinstance(self._rule, Conformal)
        found = torch.zeros(probs.shape[1:], dtype=torch.long)
        for index, share in enumerate(self._plan.shares):
            held = self.scores[self._plan.which == index].sort().values
            scores = self._rule._all_scores(torch.tensordot(share, probs, dims=1))
            found += torch.searchsorted(held, scores - self._rule._slack)
        return found

    def _answer(self, pred: Predictive, alpha: float, rows: RowValues) -> Any:
        if isinstance(self._rule, ConformalInterval):
            ends = [
                left_out_ends(mean, variance, scores, self._plan, alpha, widths=self._rule.score == "normalised")
                for mean, variance, scores in zip(
                    rows["mean"].cpu().unbind(1), rows["variance"].cpu().unbind(1), self.scores.unbind(1), strict=True
                )
            ]
            lower, upper = (
                torch.stack(end, -1).reshape(pred.batch_shape).to(pred.device) for end in zip(*ends, strict=True)
            )
            return rounded_outwards(pred, lower, upper)
        rank = conformal_rank(len(self.scores), alpha)
        if rank > len(self.scores):
            warn_too_few(len(self.scores), alpha)
        best = self._rule._probs(pred).argmax(-1, keepdim=True)
        return (rows["stranger"].to(best.device) < rank).scatter(-1, best, True)

    def __repr__(self) -> str:
        kind = f"score={self._rule.score!r}, alpha={self.alpha}"
        return f"CrossConformal({len(self.predictors)} predictors, {len(self.scores)} rows, {kind})"


def cross_conformal(
    factory: Callable[[int], Predictor],
    data: tuple[Any, Any],
    num_folds: int = 10,
    *,
    score: CrossScore | None = None,
    alpha: float = 0.1,
    seed: int = 0,
    **settings: Any,
) -> CrossConformal:
    """Fit a predictor to all but each of K random folds, and return the sets or intervals of CV+.

    With as many folds as rows it is jackknife+. What is promised: see `CrossConformal`.

    Args:
        factory: `seed -> predictor`, not fitted.
        data: Inputs and targets, a pair of arrays.
        num_folds: K.
        score: See `CrossConformal`.
        alpha: Mis-coverage that is meant where none is said.
        seed: Of the folds, and of what the factory draws.
        settings: For `Predictor.fit`, as `epochs`.

    Raises:
        BadInput: More folds than rows, or fewer than two.

    Examples:
        >>> import bayesguard as bg
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> factory = lambda seed: bg.Deterministic(torch.nn.Linear(1, 1), bg.likelihoods.Gaussian())
        >>> cross = cross_conformal(factory, (x, 3 * x), num_folds=4, epochs=2)
        >>> lower, upper = cross(x[:3]).interval(alpha=0.2)
        >>> lower.shape, cross
        (torch.Size([3, 1]), CrossConformal(4 predictors, 40 rows, score='absolute', alpha=0.1))
    """
    inputs, targets = data
    count = len(targets)
    folds = random_folds(count, num_folds, seed)
    predictors = []
    for fold in range(num_folds):
        own = derive_seed(seed, "fold", fold) % 2**31
        with seeded_default_generators(torch.device("cpu"), own):
            predictor = factory(own)
        rows = (folds != fold).nonzero().squeeze(-1)
        predictor.fit((_rows(inputs, rows), _rows(targets, rows)), **settings)
        predictors.append(predictor)
    seen = folds != torch.arange(num_folds).unsqueeze(-1)
    batch_size = settings.get("batch_size")
    return CrossConformal(predictors, data, seen, score=score, alpha=alpha, batch_size=batch_size, seed=seed)


def jackknife_plus_after_bootstrap(
    ensemble: DeepEnsemble,
    data: tuple[Any, Any],
    *,
    score: CrossScore | None = None,
    alpha: float = 0.1,
    batch_size: int | None = None,
) -> CrossConformal:
    """Return sets or intervals from an ensemble that was fitted to bootstrap samples, at no further fit.

    A row is scored by the members whose sample it is not in; of M members those are 37 % on average. A row that all
    saw counts as the strangest, with a warning. What is promised: see `CrossConformal`.

    Args:
        ensemble: Made with `bootstrap=True`, and fitted to `data`.
        data: The very arrays that it was fitted to, in the same order.
        score: See `CrossConformal`.
        alpha: Mis-coverage that is meant where none is said.
        batch_size: Rows a batch of predictions.

    Raises:
        BadInput: Members that saw all rows.

    References:
        Kim et al., 2020, algorithm 1 and theorem 1.

    Examples:
        >>> import bayesguard as bg
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> network = lambda seed: torch.nn.Linear(1, 1)
        >>> ensemble = bg.DeepEnsemble(network, bg.likelihoods.Gaussian(), num_members=20, bootstrap=True)
        >>> _ = ensemble.fit((x, x), epochs=1)
        >>> lower, upper = jackknife_plus_after_bootstrap(ensemble, (x, x))(x[:3]).interval()
        >>> lower.shape
        torch.Size([3, 1])
    """
    if not ensemble.bootstrap:
        raise BadInput("every member of this ensemble saw every row; make it with DeepEnsemble(..., bootstrap=True)")
    places = torch.arange(len(data[1]))
    seen = torch.zeros(len(ensemble.members), len(places), dtype=torch.bool)
    for index in range(len(seen)):
        seen[index, ensemble.member_data((places, places), index)[1]] = True
    return CrossConformal(ensemble.members, data, seen, score=score, alpha=alpha, batch_size=batch_size)


class _Values(NamedTuple):
    """What a score needs of predictions: probabilities `[N, K]`, or means and variances `[N, D]`."""

    mean: Tensor
    variance: Tensor


class _Running:
    """Values of each row's mixture, by one predictor after another (Welford, 1962)."""

    def __init__(self, count: int, like: _Values) -> None:
        self.mean = like.mean.new_zeros(count, *like.mean.shape[1:])
        self._within, self._between = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        self._count = self.mean.new_zeros(count, *[1] * (self.mean.dim() - 1))

    def add(self, rows: Tensor, values: _Values) -> None:
        self._count[rows] += 1
        step = values.mean - self.mean[rows]
        self.mean[rows] += step / self._count[rows]
        self._between[rows] += step * (values.mean - self.mean[rows])
        self._within[rows] += values.variance

    @property
    def variance(self) -> Tensor:
        return (self._within + self._between) / self._count


def _rule_for(pred: Predictive, score: CrossScore | None, alpha: float, seed: int) -> Conformal | ConformalInterval:
    if isinstance(pred, (CategoricalPredictive, BernoulliPredictive)):
        if score in _OF_NUMBERS:
            raise BadInput(f"score {score!r} is for numbers; for classes use 'lac', 'aps', 'raps' or 'saps'")
        return Conformal(score or "aps", alpha, seed=seed)  # type: ignore[arg-type]
    if score is not None and score not in _OF_NUMBERS:
        raise BadInput(f"score for numbers must be 'absolute' or 'normalised', got {score!r}")
    return ConformalInterval(score or "absolute", alpha)  # type: ignore[arg-type]


def _values_of(pred: Predictive, rule: Conformal | ConformalInterval) -> _Values:
    if isinstance(rule, Conformal):
        probs = wide(rule._probs(pred)).cpu()
        return _Values(probs, torch.zeros_like(probs))
    if not hasattr(pred, "icdf"):
        raise BadType(f"a {type(pred).__name__} has neither sets nor intervals")
    centre, width = (value.cpu().reshape(len(pred), -1) for value in rule._shape(pred))
    return _Values(centre, width.square())


def _rows(tree: Any, rows: Tensor) -> Any:
    return map_leaves(tree, lambda leaf: leaf[rows.to(leaf.device)] if isinstance(leaf, Tensor) else leaf[rows.numpy()])
