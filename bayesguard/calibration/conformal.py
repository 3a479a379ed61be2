"""Conformal prediction: sets and intervals that hold the answer with a stated probability, whatever the model."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from bayesguard.calibration.base import class_columns, class_labels
from bayesguard.calibration.clusters import NULL, cluster_classes, clustering_rows, warn_all_rare
from bayesguard.calibration.scores import ClassScore, check_class_score, class_scores, label_scores
from bayesguard.calibration.split import SplitConformal
from bayesguard.checks import check_count, check_finite, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import (
    BernoulliPredictive,
    CategoricalPredictive,
    CountPredictive,
    Predictive,
    SamplePredictive,
)
from bayesguard.predictive.guaranteed import RowValues
from bayesguard.predictive.numerics import BUDGET, CACHED, as_given, in_slices, wide

By = Literal["all", "class", "group", "cluster"]
_MOST_MOVES = 1000  # of an end, in doubling steps: from the smallest to the largest
IntervalScore = Literal["absolute", "normalised", "cdf"]


class Conformal(SplitConformal):
    """Sets of classes that hold the answer with probability `1 - alpha` at least, for exchangeable examples.

    Args:
        score: "lac" (the smallest sets on average), "aps" (sets that adapt to hard examples), "raps" (the same without
            long tails), "saps" (from ranks and the largest probability); see `bayesguard.calibration.scores`.
        alpha: Mis-coverage that is meant where none is said.
        by: What the guarantee holds for: "all" examples together; each "class" (Sadinle et al., 2019); each "group" that
            `fit` and the call are given (Mondrian); each "cluster" of classes whose scores are alike, for many classes with
            few examples each (Ding et al., 2023): see `bayesguard.calibration.clusters`. Part of the held-out examples
            tells the clusters, the others give their bounds; a class too rare for a cluster gets the bound of all.
        randomised: For all but "lac": leave out a random share of an answer's own mass, so that coverage is exact. The
            share is a function of the example's probabilities and the seed. False: coverage is above.
        penalty: Of "raps" and "saps", for each rank.
        free_ranks: Ranks without a penalty, of "raps".
        seed: See `randomised`; also of the clusters.

    Attributes:
        clusters: By cluster, the cluster of each class, int64 `[K]`; -1 for rare ones.

    A set always holds the most probable class. For one class of several, or yes and no (K = 2).

    Raises:
        BadInput: An unknown score, or targets that are no classes.
        BadType: Predictives of numbers (use `ConformalInterval`).

    Examples:
        >>> probs = torch.rand(500, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
        >>> labels = probs.multinomial(1, generator=torch.Generator().manual_seed(1)).squeeze(-1)
        >>> pred = Predictive.from_probs(probs)
        >>> sets = Conformal("lac", alpha=0.2).fit(pred[:250], labels[:250])(pred[250:]).prediction_set()
        >>> sets.shape, bool(sets.any(-1).all())
        (torch.Size([250, 5]), True)
    """

    sized_by_fit = (*SplitConformal.sized_by_fit, "clusters")
    settings = ("score", "by", "randomised", "penalty", "free_ranks", "seed")
    _slack = 1e-12  # rounding of sums that are equal in exact arithmetic must not decide
    clusters: Tensor

    def __init__(
        self,
        score: ClassScore = "aps",
        alpha: float = 0.1,
        *,
        by: By = "all",
        randomised: bool = True,
        penalty: float = 0.01,
        free_ranks: int = 5,
        seed: int = 0,
    ) -> None:
        if by not in get_args(By):
            raise BadInput(f"by must be one of {', '.join(map(repr, get_args(By)))}, got {by!r}")
        if not penalty >= 0:
            raise BadInput(f"penalty must be 0 or more, got {penalty}")
        super().__init__(alpha, by_group=by == "group")
        self.score, self.by, self.randomised = check_class_score(score), by, randomised
        self.penalty, self.free_ranks = float(penalty), check_count(free_ranks, "free_ranks", minimum=0)
        self.seed = check_count(seed, "seed", minimum=0)
        self.register_buffer("clusters", torch.empty(0, dtype=torch.long))

    def _probs(self, pred: Predictive) -> Tensor:
        return class_columns(pred, self, "; for numbers use ConformalInterval")

    def _all_scores(self, probs: Tensor) -> Tensor:
        return class_scores(probs, self.score, penalty=self.penalty, free_ranks=self.free_ranks, seed=self._share_seed)

    def _label_scores(self, probs: Tensor, labels: Tensor) -> Tensor:
        return label_scores(
            probs, labels, self.score, penalty=self.penalty, free_ranks=self.free_ranks, seed=self._share_seed
        )

    @property
    def _share_seed(self) -> int | None:
        return self.seed if self.randomised else None

    def _score(self, pred: Predictive, targets: Tensor) -> Tensor:
        probs = self._probs(pred[:1])
        labels = class_labels(pred, targets)
        if pred.num_samples > 1:  # what is found of a mixture is kept, and asked for again
            return self._label_scores(self._probs(pred), labels)
        cost = probs.shape[1] * BUDGET // CACHED
        return in_slices(lambda rows: self._label_scores(self._probs(pred[rows]), labels[rows]), len(pred), cost)

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        if self.by != "cluster":
            super()._fit(pred, targets)
            return
        scores, num_classes = self._score(pred, targets), self._probs(pred[:1]).shape[1]
        spent = clustering_rows(len(scores), num_classes, self.seed).to(scores.device)
        kept = (~spent).nonzero().squeeze(-1)
        if not len(kept):
            raise BadInput(
                f"pred has {len(spent)} examples, too few to tell the clusters of {num_classes} classes and to give bounds; "
                'add some, or use by="all"'
            )
        labels = targets.long()
        self.clusters = cluster_classes(scores[spent], labels[spent], num_classes, self.alpha, self.seed)
        if not bool((self.clusters != NULL).any()):
            warn_all_rare(int(spent.sum()), num_classes, self.alpha)
        groups, weights = self._pending
        if weights is not None:
            self._pending = groups, as_given(weights, "weights")[(~spent).to(as_given(weights, "weights").device)]
        super()._fit(pred[kept], targets[kept])
        self.diagnostics |= {
            "num_clustering_examples": int(spent.sum()),
            "num_clusters": int(self.clusters.max()) + 1,
            "num_rare_classes": int((self.clusters == NULL).sum()),
        }

    def _strata(self, pred: Predictive, targets: Tensor, groups: object) -> Tensor:
        if self.by == "cluster":
            return self.clusters[targets.long()]
        return targets.long() if self.by == "class" else super()._strata(pred, targets, groups)

    def _answer(self, pred: Predictive, alpha: float, rows: RowValues) -> Tensor:
        probs = self._probs(pred)
        scores = self._all_scores(probs)
        if self.by in ("class", "cluster"):
            bounds = self._class_bounds(alpha, rows, scores)
        else:
            bounds = self.bounds(alpha, rows, len(scores)).unsqueeze(-1)
        members = scores <= bounds + self._slack
        return members.scatter(-1, probs.argmax(-1, keepdim=True), True)

    def _class_bounds(self, alpha: float, rows: RowValues, scores: Tensor) -> Tensor:
        of_class = self.clusters if self.by == "cluster" else torch.arange(scores.shape[1])
        found: dict[int, Tensor] = {}
        for stratum in of_class.unique().tolist():
            held, weights = self._stratum(stratum)
            where = f" of {self.by} {stratum}"
            found[stratum] = self._bounds_of(held, weights, alpha, rows.get("weights"), len(scores), where)
        return torch.stack([found[stratum] for stratum in of_class.tolist()], dim=-1)

    def _stratum(self, stratum: int) -> tuple[Tensor, Tensor]:
        if self.by == "cluster" and stratum == NULL:
            order = self.scores.argsort()
            return self.scores[order], self.weights[order]
        return super()._stratum(stratum)


class ConformalInterval(SplitConformal):
    """Intervals that hold a real answer with probability `1 - alpha` at least, for exchangeable examples.

    Args:
        score: "absolute": the distance from the mean, the same width everywhere (Lei et al., 2018). "normalised": in
            standard deviations of the predictive (Papadopoulos et al., 2008; Lei et al., 2018, section 5.2). "cdf": how
            far the answer's probability integral is from one half (Chernozhukov, Wüthrich, Zhu, 2021, PNAS): the
            interval keeps the predictive's shape.
        alpha: Mis-coverage that is meant where none is said.
        by_group: Whether the guarantee holds for each group; see `SplitConformal`.

    Several targets an example are covered each by itself, by one bound.

    Examples:
        >>> pred = Predictive.from_normal(torch.zeros(99), 0.1)
        >>> y = torch.randn(99, generator=torch.Generator().manual_seed(0))
        >>> lower, upper = ConformalInterval("normalised").fit(pred, y)(pred).interval()
        >>> bool(((lower <= y) & (y <= upper)).float().mean() > 0.89)
        True
    """

    settings = ("score", "by_group")

    def __init__(self, score: IntervalScore = "normalised", alpha: float = 0.1, *, by_group: bool = False) -> None:
        if score not in get_args(IntervalScore):
            raise BadInput(f"score must be one of {', '.join(map(repr, get_args(IntervalScore)))}, got {score!r}")
        super().__init__(alpha, by_group=by_group)
        self.score = score

    def _score(self, pred: Predictive, targets: Tensor) -> Tensor:
        targets = real_targets(pred, targets)
        if self.score == "cdf":
            return (wide(_in_float64(pred).cdf(targets)) - 0.5).abs()
        centre, width = self._shape(pred)
        return (targets - centre).abs() / width

    def _shape(self, pred: Predictive) -> tuple[Tensor, Tensor]:
        centre = wide(pred.mean)
        if self.score == "absolute":
            return centre, torch.ones_like(centre)
        width = wide(pred.variance).sqrt()
        if not bool((width > 0).all() & width.isfinite().all()):
            raise BadInput(
                'a standard deviation is zero or infinite, and cannot be a unit; use score="absolute" or "cdf"'
            )
        return centre, width

    def _answer(self, pred: Predictive, alpha: float, rows: RowValues) -> tuple[Tensor, Tensor]:
        bounds = self.bounds(alpha, rows, len(pred)).reshape(-1, *[1] * (len(pred.batch_shape) - 1))
        if self.score == "cdf":
            return rounded_outwards(pred, *_ends_of_share(pred, bounds.clamp_max(0.5).expand(pred.batch_shape)))
        centre, width = self._shape(pred)
        return rounded_outwards(pred, centre - bounds * width, centre + bounds * width)


class ConformalQuantile(SplitConformal):
    """The predictive's own interval, widened or narrowed by one amount until it covers (CQR).

    For this `alpha` only, because the quantiles that are widened depend on it.

    References:
        Romano, Patterson, Candès, 2019, NeurIPS, theorem 1.

    Examples:
        >>> pred = Predictive.from_normal(torch.zeros(99), 0.1)
        >>> y = torch.randn(99, generator=torch.Generator().manual_seed(0))
        >>> lower, upper = ConformalQuantile(alpha=0.2).fit(pred, y)(pred).interval()
        >>> bool(((lower <= y) & (y <= upper)).float().mean() >= 0.8)
        True
    """

    settings = ("alpha", "by_group")

    def _ends(self, pred: Predictive) -> tuple[Tensor, Tensor]:
        lower, upper = pred.icdf(self.alpha / 2), pred.icdf(1 - self.alpha / 2)  # type: ignore[arg-type]
        return wide(lower), wide(upper)

    def _score(self, pred: Predictive, targets: Tensor) -> Tensor:
        targets = real_targets(pred, targets)
        lower, upper = self._ends(pred)
        return torch.maximum(lower - targets, targets - upper)

    def _answer(self, pred: Predictive, alpha: float, rows: RowValues) -> tuple[Tensor, Tensor]:
        if alpha != self.alpha:
            raise BadInput(f"this ConformalQuantile was fitted for alpha={self.alpha}, not {alpha}; fit another one")
        lower, upper = self._ends(pred)
        bounds = self.bounds(alpha, rows, len(pred)).reshape(-1, *[1] * (len(pred.batch_shape) - 1))
        # Narrowed by more than its width, an interval is empty; its middle stands for it.
        middle = (lower + upper) / 2
        return rounded_outwards(pred, torch.minimum(lower - bounds, middle), torch.maximum(upper + bounds, middle))


def real_targets(pred: Predictive, targets: Tensor) -> Tensor:
    """Return targets of a predictive of numbers in float64, or raise BadInput or BadType."""
    if not hasattr(pred, "icdf") or isinstance(pred, (CategoricalPredictive, BernoulliPredictive)):
        raise BadType(
            f"intervals are for predictives of numbers, got a {type(pred).__name__}; use Conformal for classes"
        )
    check_shape(targets, pred.batch_shape, "targets")
    targets = wide(targets)
    check_finite(targets, "targets")
    return targets


def _in_float64(pred: Predictive) -> Predictive:
    return pred if pred.device.type == "mps" else pred.to(torch.float64)


def _ends_of_share(pred: Predictive, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return ends of `|F(y) - 1/2| <= share`, in float64: they hold all such y, also where cdf and quantile are rounded."""
    exact = _in_float64(pred)
    if isinstance(exact, SamplePredictive):
        # All answers between two samples have the cdf of the lower one; its quantile gives 1e-12 of a level away.
        below, above = (0.5 - share - 1e-11).clamp_min(0), (0.5 + share + 1e-11).clamp_max(1)
        lower, upper = wide(exact.icdf(below)), wide(exact.icdf(above))
        return lower.masked_fill(below == 0, -torch.inf), upper.masked_fill(above == 1, torch.inf)
    lower, upper = wide(exact.icdf(0.5 - share)), wide(exact.icdf((0.5 + share).clamp_max(1)))
    step = rounding_slack(lower, upper).clamp_min(1e-30)
    return _moved_out(exact, lower, share, -step), _moved_out(exact, upper, share, step)


def _moved_out(pred: Predictive, end: Tensor, share: Tensor, step: Tensor) -> Tensor:
    """Move ends on until they are beyond all answers whose cdf is as near to one half, to the last digit, as `share`."""
    counts = isinstance(pred, CountPredictive)
    step = step.sign() if counts else step
    for _ in range(_MOST_MOVES):
        place = (end + step).clamp_min(0) if counts else end
        inside = end.isfinite() & ((wide(pred.cdf(place)) - 0.5).abs() <= share + 1e-15)
        inside &= ~(counts & (place == end))
        if not bool(inside.any()):
            return end
        end, step = torch.where(inside, end + step, end), step if counts else 2 * step
    return torch.where(inside, step.sign() * torch.inf, end)


def rounding_slack(lower: Tensor, upper: Tensor) -> Tensor:
    """Return by how much rounding may have moved the ends: an answer whose score is the bound must not fall out by it."""
    size = lower.abs().nan_to_num(posinf=0.0) + upper.abs().nan_to_num(posinf=0.0)
    return 8 * torch.finfo(lower.dtype).eps * size


def rounded_outwards(pred: Predictive, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return ends in the predictive's dtype, rounded outwards."""
    slack = rounding_slack(lower, upper)
    if pred.dtype == lower.dtype:
        return lower - slack, upper + slack
    # The dtype's own number within rounding of an end is that end.
    down, up = lower.to(pred.dtype), upper.to(pred.dtype)
    return (
        torch.where(wide(down) > lower + slack, down.nextafter(torch.full_like(down, -torch.inf)), down),
        torch.where(wide(up) < upper - slack, up.nextafter(torch.full_like(up, torch.inf)), up),
    )
