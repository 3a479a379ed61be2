"""The metrics that `evaluate` knows: what each keeps of the examples, its value, and its values under resampling."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, check_finite, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.functional.binned import bin_index
from bayesguard.metrics.functional.classification import brier_scores
from bayesguard.metrics.functional.crps import crps_of
from bayesguard.metrics.functional.inputs import answered, classified, group_sums, yes_or_no
from bayesguard.metrics.functional.regression import LEVELS, at_or_below, pit
from bayesguard.metrics.functional.selective import weighted_aurc, weighted_roc
from bayesguard.predictive import (
    BernoulliPredictive,
    CategoricalPredictive,
    ContinuousPredictive,
    CountPredictive,
    Predictive,
    RecalibratedPredictive,
    SamplePredictive,
)
from bayesguard.predictive.numerics import BUDGET, CACHED, slices

Kind = Literal["categorical", "binary", "continuous", "count", "samples"]
_KINDS: tuple[tuple[type[Predictive], Kind], ...] = (
    (CategoricalPredictive, "categorical"),
    (BernoulliPredictive, "binary"),
    (ContinuousPredictive, "continuous"),
    (RecalibratedPredictive, "continuous"),
    (CountPredictive, "count"),
    (SamplePredictive, "samples"),
)
_NUM_BINS = 15
_REAL: tuple[Kind, ...] = ("continuous", "count", "samples")
_CLASSES: tuple[Kind, ...] = ("categorical", "binary")

# Class probabilities [N, ..., K], or P(y = 1) [N], may stand for their predictive: nothing is lost on the way.
Pred = Predictive | Tensor


class Scores(ABC):
    """What a metric keeps of N examples, float64, so that they can be weighted anew."""

    @abstractmethod
    def resample(self, weights: Tensor) -> Tensor:
        """Return the metric for each row of example weights `[R, N]` (counts), float64 `[R]`.

        NaN where the metric has no value: no weight at all, or nothing but right answers to rank.
        """

    @property
    @abstractmethod
    def rows(self) -> Tensor:
        """A tensor that is kept, `[N, ...]`: it tells N and the device."""

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.rows)

    def value(self) -> float:
        """Return the metric of the examples as they are."""
        return self.resample(self.rows.new_ones(1, self.num_examples, dtype=torch.float64)).item()


@dataclass
class Mean(Scores):
    """A mean of per-example values `[N]`, or `root` of it."""

    values: Tensor
    root: bool = False

    @property
    def rows(self) -> Tensor:
        return self.values

    def resample(self, weights: Tensor) -> Tensor:
        weights = weights.to(self.values)
        # An example without weight adds nothing, even where its value is infinite.
        finite = self.values.isfinite()
        total = weights @ self.values.where(finite, 0.0)
        if not bool(finite.all()):
            total = total.masked_fill((weights[:, ~finite] > 0).any(-1), torch.inf)
        mean = total / weights.sum(-1)
        return mean.sqrt() if self.root else mean


@dataclass
class Binned(Scores):
    """A calibration error (l1): gaps `score - outcome` `[N, L]` and their bins; columns pooled, or averaged."""

    gaps: Tensor
    index: Tensor
    by_column: bool = False

    @property
    def rows(self) -> Tensor:
        return self.gaps

    def resample(self, weights: Tensor) -> Tensor:
        weights = weights.to(self.gaps)
        count, columns = self.gaps.shape
        step = max(1, BUDGET // (count * _NUM_BINS)) if self.by_column else columns
        total = weights.new_zeros(len(weights))
        for start in range(0, columns, step):
            several = slice(start, start + step)
            # The share of a bin times its gap is its summed gap over all weight: no counts are needed.
            parts = [
                weights[:, rows] @ self._by_row(several, rows) for rows in slices(count, _NUM_BINS * BUDGET // CACHED)
            ]
            total += torch.stack(parts).sum(0).abs().sum(-1)
        return total / (weights.sum(-1) * columns)

    def _by_row(self, columns: slice, examples: slice = slice(None)) -> Tensor:
        """Return the gaps of every example summed by bin, `[n, B]`, or `[n, columns * B]`."""
        gaps, index = self.gaps[examples, columns], self.index[examples, columns]
        rows, width = gaps.shape
        bins = _NUM_BINS
        if self.by_column:
            index = index + torch.arange(width, device=gaps.device) * bins
            bins *= width
        key = index + torch.arange(rows, device=gaps.device).unsqueeze(-1) * bins
        return group_sums(key.flatten(), gaps.flatten(), rows * bins).reshape(rows, bins)


@dataclass
class Ranked(Scores):
    """A metric of the order of confidences `[N, L]` with losses `[N, L]`."""

    confidence: Tensor
    losses: Tensor
    function: Callable[[Tensor, Tensor, Tensor], Tensor]

    @property
    def rows(self) -> Tensor:
        return self.confidence

    def resample(self, weights: Tensor) -> Tensor:
        width = self.confidence.shape[1]
        confidence, losses = self.confidence.flatten(), self.losses.flatten()
        parts = [
            self.function(confidence, losses, part.to(losses).repeat_interleave(width, dim=1))
            for part in weights.split(max(1, BUDGET // len(losses)))
        ]
        return torch.cat(parts)


@dataclass
class Levels(Scores):
    """Quantile calibration: for each example and level the share of its targets at or below the quantile `[N, L]`."""

    below: Tensor
    levels: Tensor

    @property
    def rows(self) -> Tensor:
        return self.below

    def resample(self, weights: Tensor) -> Tensor:
        weights = weights.to(self.below)
        return (weights @ self.below / weights.sum(-1, keepdim=True) - self.levels).abs().mean(-1)


@dataclass(frozen=True)
class MetricSpec:
    """A metric that `evaluate` can compute.

    Attributes:
        name: What users type.
        label: What tables and figures show, with the unit.
        direction: Which way is better; "none" where more is neither better nor worse.
        kinds: The predictives that it is for.
        keep: What `scores` calls with input that was checked.
        bounds: Smallest and largest value there can be.
        default: Whether `evaluate` computes it unless told otherwise.
    """

    name: str
    label: str
    direction: Literal["lower", "higher", "none"]
    kinds: tuple[Kind, ...]
    keep: Callable[[Any, Tensor], Scores]
    bounds: tuple[float, float] = (0.0, float("inf"))
    default: bool = True

    def scores(self, predictive: Pred, targets: Tensor) -> Scores:
        """Return what is needed of predictions and their targets `[N, ...]`.

        Raises:
            BadType: Predictions of a kind that the metric is not for.
            BadInput: No examples, targets of another shape, NaN or infinity in targets, labels out of range.
        """
        kind = kind_of(predictive)
        if kind not in self.kinds:
            raise BadType(f"{self.name} is for {', '.join(self.kinds)} predictions, got {kind}")
        if isinstance(predictive, Predictive):
            shape = predictive.batch_shape
        else:
            shape = predictive.shape[:-1] if kind == "categorical" else predictive.shape
        if shape.numel() == 0:
            raise BadInput("the predictions have no examples; a metric needs at least one")
        targets = as_tensor(targets, "targets").to(predictive.device)
        check_shape(targets, shape, "targets")
        check_finite(targets, "targets")
        return self.keep(predictive, targets)


def kind_of(predictive: Pred) -> Kind:
    """Return what kind of target predictions are of."""
    if isinstance(predictive, Tensor):
        return "binary" if predictive.dim() == 1 else "categorical"
    for cls, kind in _KINDS:
        if isinstance(predictive, cls):
            return kind
    raise BadType(f"there are no metrics for a {type(predictive).__name__}")


def specs_for(predictive: Predictive, names: list[str] | None = None) -> list[MetricSpec]:
    """Return the metrics for a predictive: those named, or its kind's defaults.

    Raises:
        BadInput: An unknown name, or a metric of other predictives; the message lists what there is.
    """
    kind = kind_of(predictive)
    fitting = {name: spec for name, spec in EVALUATION_METRICS.items() if kind in spec.kinds}
    if names is None:
        return [spec for spec in fitting.values() if spec.default]
    unknown = [name for name in names if name not in fitting]
    if unknown or not names:
        raise BadInput(
            f"metrics has {', '.join(map(repr, unknown)) or 'no name'}; "
            f"for {kind} predictions there are {', '.join(fitting)}"
        )
    return [fitting[name] for name in names]


def _rows(values: Tensor) -> Tensor:
    """Average the elements of each example: `[N, ...]` -> `[N]`."""
    return values.double().reshape(len(values), -1).mean(-1)


def class_probs(predictive: Pred) -> Tensor:
    """Return `[N, ..., K]` of several classes, `[N, ...]` of yes or no."""
    return predictive if isinstance(predictive, Tensor) else predictive.probs


def top(predictive: Pred, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return confidence and rightness `[N, L]` of the more probable answer."""
    probs = class_probs(predictive)
    if kind_of(predictive) == "binary":
        scores, outcomes = yes_or_no(probs, targets)
        confidence = torch.maximum(scores, 1 - scores)
        right = ((scores > 0.5) == (outcomes == 1)).double()
    else:
        confidence, right = answered(probs, targets)
    return confidence.reshape(len(probs), -1), right.reshape(len(probs), -1)


def binned(predictive: Pred, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the calibration error bins, flat: P(y = 1) and y of yes or no, else top confidence and rightness."""
    if kind_of(predictive) == "binary":
        return yes_or_no(class_probs(predictive), targets)
    return answered(class_probs(predictive), targets)


def _accuracy(predictive: Pred, targets: Tensor) -> Scores:
    return Mean(_rows(top(predictive, targets)[1]))


def _nll(predictive: Pred, targets: Tensor) -> Scores:
    if isinstance(predictive, Predictive):
        return Mean(_rows(-predictive.log_prob(targets)))
    if kind_of(predictive) == "binary":
        scores, outcomes = yes_or_no(predictive, targets)
        return Mean(-torch.where(outcomes == 1, scores.double(), 1 - scores.double()).log())
    probs, labels = classified(predictive, targets)
    return Mean(_rows(-probs.gather(-1, labels.unsqueeze(-1)).double().log().reshape(targets.shape)))


def _brier(predictive: Pred, targets: Tensor) -> Scores:
    if kind_of(predictive) == "binary":
        scores, outcomes = yes_or_no(class_probs(predictive), targets)
        # Both answers count, as for two classes.
        return Mean(_rows((2 * (scores.double() - outcomes).square()).reshape(targets.shape)))
    return Mean(_rows(brier_scores(*classified(class_probs(predictive), targets)).reshape(targets.shape)))


def _ece(predictive: Pred, targets: Tensor) -> Scores:
    scores, outcomes = binned(predictive, targets)
    shape = (len(targets), -1)
    index = bin_index(scores, _NUM_BINS, "width")
    return Binned((scores.double() - outcomes).reshape(shape), index.reshape(shape))


def _classwise(predictive: Pred, targets: Tensor) -> Scores:
    values, labels = classified(class_probs(predictive), targets)
    if len(values) != len(targets):
        raise BadInput("classwise_ece is for one target an example; dense predictions have many")
    index = bin_index(values.flatten(), _NUM_BINS, "width").reshape(values.shape)
    hits = labels.unsqueeze(-1) == torch.arange(values.shape[1], device=values.device)
    return Binned(values.double() - hits.double(), index, by_column=True)


def _ranked(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Pred, Tensor], Scores]:
    def scores(predictive: Pred, targets: Tensor) -> Scores:
        confidence, right = top(predictive, targets)
        return Ranked(confidence.double(), 1 - right, function)

    return scores


def _error_roc(confidence: Tensor, losses: Tensor, weights: Tensor) -> Tensor:
    return weighted_roc(-confidence, losses, weights)


def _rmse(predictive: Predictive, targets: Tensor) -> Scores:
    return Mean(_rows((predictive.mean.double() - targets.double()).square()), root=True)


def _crps(predictive: Predictive, targets: Tensor) -> Scores:
    return Mean(_rows(crps_of(predictive, targets)))


def _coverage(predictive: Predictive, targets: Tensor) -> Scores:
    lower, upper = predictive.interval(0.1)
    return Mean(_rows((lower <= targets) & (targets <= upper)))


def _width(predictive: Predictive, targets: Tensor) -> Scores:
    lower, upper = predictive.interval(0.1)
    return Mean(_rows(upper.double() - lower.double()))


def _quantiles(predictive: Predictive, targets: Tensor) -> Scores:
    values = pit(predictive, targets)
    levels = torch.tensor(LEVELS, dtype=torch.float64, device=values.device)
    return Levels(at_or_below(values).reshape(len(values), -1, len(LEVELS)).mean(1), levels)


_ANY_REAL = (-float("inf"), float("inf"))
EVALUATION_METRICS: dict[str, MetricSpec] = {
    spec.name: spec
    for spec in (
        MetricSpec("accuracy", "accuracy", "higher", _CLASSES, _accuracy, (0.0, 1.0)),
        MetricSpec("nll", "NLL (nats)", "lower", (*_CLASSES, "continuous", "count"), _nll, _ANY_REAL),
        MetricSpec("brier", "Brier", "lower", _CLASSES, _brier, (0.0, 2.0)),
        MetricSpec("ece", "ECE", "lower", _CLASSES, _ece, (0.0, 1.0)),
        MetricSpec("classwise_ece", "class-wise ECE", "lower", ("categorical",), _classwise, (0.0, 1.0), False),
        MetricSpec("aurc", "AURC", "lower", _CLASSES, _ranked(weighted_aurc), (0.0, 1.0), False),
        MetricSpec("error_auroc", "AUROC of errors", "higher", _CLASSES, _ranked(_error_roc), (0.0, 1.0), False),
        MetricSpec("rmse", "RMSE", "lower", _REAL, _rmse),
        MetricSpec("crps", "CRPS", "lower", _REAL, _crps),
        MetricSpec("coverage_90", "coverage of 90 % intervals", "none", _REAL, _coverage, (0.0, 1.0)),
        MetricSpec("width_90", "width of 90 % intervals", "lower", _REAL, _width),
        MetricSpec("quantile_error", "quantile calibration error", "lower", _REAL, _quantiles, (0.0, 1.0)),
    )
}
