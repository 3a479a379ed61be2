"""Conformal Bayes: prediction sets with a guarantee from posterior draws, without refits and without rows set aside.

E. Fong, C. C. Holmes (2021). Conformal Bayesian computation. NeurIPS.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bayesguard.calibration.conformal import rounded_outwards
from bayesguard.calibration.ranks import conformal_rank, warn_too_few
from bayesguard.checks import bad_row, check_finite, check_labels, check_level, check_shape
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, ContinuousPredictive, Predictive
from bayesguard.predictive.components import component_log_prob
from bayesguard.predictive.guaranteed import RowValues, guaranteed
from bayesguard.predictive.numerics import as_given, slices

if TYPE_CHECKING:
    from bayesguard.predictor import Predictor

_LEAST_EFFECTIVE, _FEW_EFFECTIVE = 10.0, 50.0
_POINTS_PER_DEVIATION, _LEAST_POINTS, _MOST_POINTS = 16, 100, 1000
_SLACK = 1e-10  # rounding of log densities that are equal in exact arithmetic must not decide
_UNDERFLOWN = 1e-290  # sums of products below it have lost terms


class ConformalBayes:
    """Sets and intervals of full conformal prediction whose score is the posterior predictive density.

    For a new input each possible answer is added to the n training rows in turn, and the answer is left out where its
    posterior predictive density given all `n + 1` rows is lower than that of all but alpha of them. Nothing is fitted
    again: under the added row draw s of the posterior has a weight in proportion to its likelihood of that row, and
    densities are the draws' means under these weights ("add-one-in" importance sampling).

    With the exact posterior predictive the score treats all `n + 1` rows alike, and coverage is `1 - alpha` at least for
    exchangeable rows, whether or not prior and likelihood are right; these decide how small sets are. What is computed
    comes near that in so far as draws are from the posterior given these very rows and their weights are even. A variational
    posterior had the training rows by its approximation, and gets the added row by its likelihood: with independent
    Gaussians for 20 correlated weights and 40 rows coverage was 0.73 instead of 0.80 (0.80 with exact draws; 0.81 for both
    with 5 weights), and no weight tells. What was fitted to the rows and is the same in all draws (features below a Bayesian
    last layer, a noise that was learned) breaks the symmetry as far as one more row would have changed it. For the same
    reason dropout is refused: its masks know nothing of the rows.

    Args:
        predictor: `NUTS`, `HMC`, `Variational` or `PyroPredictor`, fitted, without calibrators.
        data: The rows that it was fitted to, inputs and targets, as in `Predictor.predict_with_targets`.
        alpha: Mis-coverage that is meant where none is said.
        grid: For numbers, the possible answers `[G]` that are tried, ascending, in the target's unit. None for a grid
            from two standard deviations below the smallest target to two above the largest, with 16 points for each
            standard deviation of the typical predictive (between 100 and 1000 points).
        num_samples: Draws; None for the predictor's own number. A thousand are not too many.
        batch_size: Rows a batch of predictions.

    Attributes:
        candidates: The possible answers, `[G]`: the grid in float64, or the classes 0, ..., K - 1.
        log_likelihood: Of each training row under each draw, in nats, float64 `[S, n]`.

    An interval reaches from the last point of the grid below the set to the first one above, so that it holds all of a set
    without gaps; where a set reaches the grid's end it is infinite, with a warning. A set of classes always holds the most
    probable one.

    Raises:
        BadInput: A posterior that is a point; calibrators; several targets an example; a grid that is not ascending; a row
            that no draw allows.
        BadType: A predictor whose draws are not from a posterior over what was fitted (`Deterministic`, `DeepEnsemble`,
            `MCDropout`); counts.

    References:
        Fong and Holmes, 2021, eqs. 3 and 4, algorithm 1.

    Examples:
        >>> import bayesguard as bg, pyro, pyro.distributions as dist
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("obs", dist.Normal(slope * x, 1.0), obs=y)
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.linspace(-1, 1, 40)
        >>> y = 3 * x + 2 * torch.rand(40, generator=generator) - 1  # not the noise of the model
        >>> exact = (x @ y) / (x @ x) + torch.randn(300, generator=generator) / (x @ x).sqrt()
        >>> predictor = bg.PyroPredictor(model, {"slope": exact}, num_samples=300)
        >>> lower, upper = ConformalBayes(predictor, (x, y))(torch.tensor([0.0, 0.5])).interval()
        >>> bool((upper - lower < 2.2).all())  # the model's own intervals are wider than 3.2
        True
    """

    def __init__(
        self,
        predictor: Predictor,
        data: Any,
        *,
        alpha: float = 0.1,
        grid: object = None,
        num_samples: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        _check_draws(predictor)
        self.predictor, self.alpha = predictor, check_level(alpha, "alpha")
        self.num_samples, self.batch_size = num_samples, batch_size
        pred, targets = predictor.predict_with_targets(
            data, num_samples=num_samples, batch_size=batch_size, keep_draws=True
        )
        values = _checked_targets(pred, targets)
        self.candidates = _candidates(pred, values, grid)
        logs = component_log_prob(pred.component, values.reshape(pred.batch_shape)).double()
        self.log_likelihood = logs.reshape(len(logs), -1)
        if bool((self.log_likelihood == self.log_likelihood[0]).all()):
            raise BadInput(
                f"the {len(logs)} draws are all the same function, which no row can weight; take more draws (num_samples=)"
            )
        impossible = ~self.log_likelihood.amax(0).isfinite()
        if bool(impossible.any()):
            row = int(impossible.nonzero()[0])
            raise BadInput(f"targets has a value in row {row} that no draw allows (its log density is not finite)")

    def __call__(self, data: Any) -> Predictive:
        """Return the predictives of new inputs, with sets or intervals that are guaranteed.

        The values `rows["effective_draws"]` `[N, G]` of the result say how many equal draws each candidate's weights are
        worth (Kish, 1965).

        Args:
            data: As for `Predictor.predict`.

        Warns:
            CalibrationWarning: From `prediction_set` or `interval`: weights worth fewer than 50 draws where they may
                decide; a set that reaches the end of the grid; too few rows for alpha.

        Raises:
            BadInput: From `prediction_set` or `interval`: an answer is in the set by weights worth fewer than 10 draws.
        """
        pred = self.predictor.predict(data, num_samples=self.num_samples, batch_size=self.batch_size, keep_draws=True)
        cost = len(self.candidates) * 3 * sum(self.log_likelihood.shape)
        parts = [self._compared(pred[rows]) for rows in slices(len(pred), cost)]
        compared = _Compared(*map(torch.cat, zip(*parts, strict=True)))
        return guaranteed(pred, self._answer, self.alpha, compared._asdict())

    def p_values(self, data: Any) -> Tensor:
        """Return the conformal p-value of each candidate answer, float64 `[N, G]`; sets hold those above alpha.

        Args:
            data: As for `Predictor.predict`.

        Warns and raises:
            As the sets at `alpha` do where weights are worth too few draws.
        """
        rows: RowValues = self(data).rows
        self._members(self.alpha, rows)
        return (rows["stranger"].double() + 1) / (self.log_likelihood.shape[1] + 1)

    def _compared(self, pred: Predictive) -> _Compared:
        """Compare every candidate for some new rows with the training rows."""
        values = self.candidates.reshape(-1, *[1] * (len(pred.batch_shape) + 1))
        logs = component_log_prob(pred.component, values).double()
        if isinstance(pred, ContinuousPredictive) and not bool((inside := pred.support.check(values)).all()):
            logs = torch.where(inside, logs, -torch.inf)
        shape = len(pred), len(self.candidates)
        logs = logs.reshape(shape[1], pred.num_samples, shape[0]).permute(1, 2, 0).flatten(1)
        return _Compared(*(value.reshape(shape) for value in compare(self.log_likelihood, logs, pred.weights)))

    def _members(self, alpha: float, rows: RowValues) -> Tensor:
        """Return which candidates are in the sets, bool `[N, G]`."""
        least = self._least(alpha)
        members = rows["stranger"] >= least
        if least:
            _check_worth(members, rows["at_best"] >= least, rows["effective_draws"])
        else:
            warn_too_few(self.log_likelihood.shape[1], alpha)
        return members

    def _least(self, alpha: float) -> int:
        """How many training rows must not be above a candidate in density."""
        count = self.log_likelihood.shape[1]
        return count + 1 - conformal_rank(count, alpha)

    def _answer(self, pred: Predictive, alpha: float, rows: RowValues) -> Any:
        members = self._members(alpha, rows)
        if isinstance(pred, (CategoricalPredictive, BernoulliPredictive)):
            return members.scatter(-1, _most_probable(pred), True)
        empty = ~members.any(-1, keepdim=True)  # its least strange answer stands for it
        members |= empty & (rows["stranger"] == rows["stranger"].amax(-1, keepdim=True))
        lower, upper = self._ends(members.cpu(), warn=self._least(alpha) > 0)
        return rounded_outwards(pred, *(end.reshape(pred.batch_shape).to(pred.device) for end in (lower, upper)))

    def _ends(self, members: Tensor, *, warn: bool) -> tuple[Tensor, Tensor]:
        last = len(self.candidates) - 1
        infinity = self.candidates.new_tensor([torch.inf])
        padded = torch.cat([-infinity, self.candidates, infinity])
        lower = padded[members.int().argmax(-1)]
        upper = padded[last - members.flip(-1).int().argmax(-1) + 2]
        reached = int((lower.isinf() | upper.isinf()).sum())
        if warn and reached:
            warnings.warn(
                f"the sets of {reached} of {len(lower)} rows reach an end of the grid, {float(self.candidates[0]):.4g} to "
                f"{float(self.candidates[-1]):.4g}, and their intervals are infinite there; pass a wider grid=",
                CalibrationWarning,
                stacklevel=5,
            )
        return lower, upper

    def __repr__(self) -> str:
        draws, count = self.log_likelihood.shape
        return f"ConformalBayes({draws} draws, {count} rows, {len(self.candidates)} candidates, alpha={self.alpha})"


class _Compared(NamedTuple):
    """Of every candidate: training rows not above it in density, the same under its best draw, and what weights are worth."""

    stranger: Tensor
    at_best: Tensor
    effective_draws: Tensor


def compare(log_likelihood: Tensor, candidate: Tensor, draw_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare candidates with training rows, each by its density under the draws as weighted by the candidate.

    Args:
        log_likelihood: Of the training rows, float64 `[S, n]`.
        candidate: Log-likelihoods of C candidates, float64 `[S, C]`.
        draw_weights: Weights of the draws before a row is added `[S]`.

    Returns:
        How many rows have no higher density than each candidate `[C]`; how many have none higher than the candidate under
        its best draw `[C]`; Kish's effective number of draws `[C]`.
    """
    prior = draw_weights.to(candidate).unsqueeze(-1)
    best = candidate.amax(0)
    unit = torch.where(best > -torch.inf, best, 0.0)
    relative = (candidate - unit).exp_()
    weights = relative * prior
    # A candidate that no draw allows weights them equally, and has no density whatever the weights are.
    total = weights.sum(0)
    weights = weights.div_(total) if bool((total > 0).all()) else torch.where(total > 0, weights / total, prior)
    own = (weights * relative).sum(0).log() + unit + _SLACK
    top = log_likelihood.amax(0)
    density = (log_likelihood - top).exp_().T @ weights
    scores = density.log() + top.unsqueeze(-1)
    lost = (density < _UNDERFLOWN).nonzero()
    for some in slices(len(lost), 3 * len(weights)):
        row, column = lost[some].unbind(-1)
        log_weights = prior.log() + candidate[:, column]
        scores[row, column] = (log_likelihood[:, row] + log_weights).logsumexp(0) - log_weights.logsumexp(0)
    return (scores <= own).sum(0), (scores <= best + _SLACK).sum(0), weights.square().sum(0).reciprocal()


def _check_draws(predictor: Predictor) -> None:
    """Refuse a predictor whose draws cannot be weighted by the likelihood of one more row."""
    if not predictor.is_reweightable:
        raise BadType(
            f"the functions of a {type(predictor).__name__} are not draws from a posterior that one more row could weight "
            "(members and masks differ in what was not fitted); use cross_conformal, jackknife_plus_after_bootstrap for an "
            "ensemble of bootstrap samples, or Conformal and ConformalInterval with held-out rows"
        )
    if predictor.is_exact:
        raise BadInput("this posterior is a point, which no row can weight; use one of several functions")
    if len(predictor.calibrators):
        raise BadInput(
            "the predictor has calibrators, and calibrated densities are not the likelihood of its posterior; call "
            "predictor.forget_calibration()"
        )


def _checked_targets(pred: Predictive, targets: Tensor) -> Tensor:
    """Return one target an example `[n]`: labels, or numbers in float64."""
    if not isinstance(pred, (CategoricalPredictive, BernoulliPredictive, ContinuousPredictive)):
        raise BadType(
            f"possible answers are tried one by one, for classes and real numbers; a {type(pred).__name__} has others. Use "
            "ConformalInterval with held-out rows"
        )
    if pred.batch_shape.numel() != len(pred):
        raise BadInput(
            f"targets of shape {tuple(pred.batch_shape)} are several an example, and their joint answers too many to try; use "
            "a predictor for each"
        )
    check_shape(targets, pred.batch_shape, "targets")
    targets = targets.reshape(-1)
    if isinstance(pred, CategoricalPredictive):
        return check_labels(targets, targets.shape, pred.num_classes)
    if isinstance(pred, BernoulliPredictive):
        bad = (targets != 0) & (targets != 1)
        if bool(bad.any()):
            raise BadInput(
                f"targets has a value other than 0 and 1 in row {bad_row(bad)}; yes or no is 1 or 0, or bool"
            )
        return targets.to(pred.dtype)
    check_finite(targets, "targets")
    return targets.double()


def _candidates(pred: Predictive, targets: Tensor, grid: object) -> Tensor:
    if not isinstance(pred, ContinuousPredictive):
        if grid is not None:
            raise BadInput("grid= is for numbers; of classes all are tried. Leave it out")
        if isinstance(pred, CategoricalPredictive):
            return torch.arange(pred.num_classes)
        return torch.arange(2, dtype=pred.dtype)
    if grid is not None:
        values = as_given(grid, "grid").cpu().double()
        if values.dim() != 1 or len(values) < 2 or not bool((values.diff() > 0).all() & values.isfinite().all()):
            raise BadInput(
                f"grid must be two or more finite numbers in ascending order, got shape {tuple(values.shape)}"
            )
        return values
    margin = 2 * float(targets.std()) if len(targets) > 1 else 0.0
    low, high = float(targets.min()) - margin, float(targets.max()) + margin
    if not low < high:
        raise BadInput("all targets are the same, which says nothing of a grid of possible answers; pass grid=")
    deviation = float(pred.variance.double().sqrt().median())
    points = _POINTS_PER_DEVIATION * (high - low) / deviation if deviation > 0 else _MOST_POINTS
    count = int(min(max(points, _LEAST_POINTS), _MOST_POINTS))
    return torch.linspace(low, high, count, dtype=torch.float64)


def _most_probable(pred: CategoricalPredictive | BernoulliPredictive) -> Tensor:
    if isinstance(pred, CategoricalPredictive):
        return pred.probs.argmax(-1, keepdim=True)
    return (pred.probs.reshape(-1, 1) > 0.5).long()


def _check_worth(members: Tensor, possible: Tensor, effective: Tensor) -> None:
    """Refuse answers that are in a set by a few draws, and warn where a few draws may decide."""
    bad = (members & (effective < _LEAST_EFFECTIVE)).any(-1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise BadInput(
            f"in {int(bad.sum())} of {len(bad)} rows, the first of them {row}, an answer is in the set by weights that are "
            f"worth {float(effective[row][members[row]].min()):.1f} draws, too few for a density ({_LEAST_EFFECTIVE:.0f} are "
            "needed): one row more changes this posterior too much. Take more draws (num_samples=), or use cross_conformal"
        )
    few = ((members | possible) & (effective < _FEW_EFFECTIVE)).any(-1)
    if bool(few.any()):
        deciding = effective[members | possible]
        warnings.warn(
            f"in {int(few.sum())} of {len(few)} rows weights worth fewer than {_FEW_EFFECTIVE:.0f} draws may decide on an "
            f"answer (least {float(deciding.min()):.1f}, median {float(deciding.median()):.0f}), and the guarantee is only as "
            "good as these; take more draws (num_samples=)",
            CalibrationWarning,
            stacklevel=6,
        )
