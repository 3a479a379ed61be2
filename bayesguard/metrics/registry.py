"""The metrics that `evaluate` knows: what each keeps of the examples, its value, and its values under resampling."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, check_finite, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.functional.binned import BinnedSums, Norm, bin_index
from bayesguard.metrics.functional.classification import brier_scores
from bayesguard.metrics.functional.crps import crps_of
from bayesguard.metrics.functional.decomposition import weighted_corp_brier
from bayesguard.metrics.functional.inputs import answered, classified, group_sums, yes_or_no
from bayesguard.metrics.functional.multivariate import (
    energy_scores,
    spread_and_error,
    weighted_ence,
    weighted_interval_scores,
)
from bayesguard.metrics.functional.regression import LEVELS, at_or_below, interval_scores, pit
from bayesguard.metrics.functional.selective import weighted_augrc, weighted_aurc, weighted_excess_aurc, weighted_roc
from bayesguard.metrics.functional.sets import covered_labels
from bayesguard.metrics.functional.smooth import weighted_smooth_error
from bayesguard.metrics.scores import NUM_BINS, Binned, Levels, Mean, Pairs
from bayesguard.metrics.scores import Scores as Scores
from bayesguard.predictive import (
    BernoulliPredictive,
    CategoricalPredictive,
    ContinuousPredictive,
    CountPredictive,
    Predictive,
    RecalibratedPredictive,
    SamplePredictive,
)

Kind = Literal["categorical", "binary", "continuous", "count", "samples"]
_KINDS: tuple[tuple[type[Predictive], Kind], ...] = (
    (CategoricalPredictive, "categorical"),
    (BernoulliPredictive, "binary"),
    (ContinuousPredictive, "continuous"),
    (RecalibratedPredictive, "continuous"),
    (CountPredictive, "count"),
    (SamplePredictive, "samples"),
)
_REAL: tuple[Kind, ...] = ("continuous", "count", "samples")
_CLASSES: tuple[Kind, ...] = ("categorical", "binary")

# Class probabilities [N, ..., K], or P(y = 1) [N], may stand for their predictive: nothing is lost on the way.
Pred = Predictive | Tensor


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
        from_probs: Whether class probabilities alone are enough for it.
    """

    name: str
    label: str
    direction: Literal["lower", "higher", "none"]
    kinds: tuple[Kind, ...]
    keep: Callable[[Any, Tensor], Scores]
    bounds: tuple[float, float] = (0.0, float("inf"))
    default: bool = True
    from_probs: bool = True

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
    if kind != "continuous" and "nll" in fitting:  # probabilities are 1 at most, densities are not
        fitting["nll"] = replace(fitting["nll"], bounds=(0.0, math.inf))
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
    shape = (len(targets), -1, 1)
    index = bin_index(scores, NUM_BINS, "width")
    return Binned((scores.double() - outcomes).reshape(shape), index.reshape(shape).to(torch.uint8))


def _classwise(predictive: Pred, targets: Tensor) -> Scores:
    values, labels = classified(class_probs(predictive), targets)
    index = bin_index(values.flatten(), NUM_BINS, "width")
    hits = labels.unsqueeze(-1) == torch.arange(values.shape[1], device=values.device)
    shape = (len(targets), -1, values.shape[1])
    return Binned((values.double() - hits.double()).reshape(shape), index.reshape(shape).to(torch.uint8))


def _elementwise(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Pred, Tensor], Scores]:
    """Of what the calibration error bins."""

    def scores(predictive: Pred, targets: Tensor) -> Scores:
        first, second = binned(predictive, targets)
        shape = (len(targets), -1)
        return Pairs(first.reshape(shape), second.reshape(shape), function)

    return scores


def _binned_error(norm: Norm, debiased: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def errors(scores: Tensor, outcomes: Tensor, weights: Tensor) -> Tensor:
        cells = 2 * NUM_BINS
        index = bin_index(scores, NUM_BINS, "width") + NUM_BINS * outcomes.long()
        index = (index + torch.arange(len(weights), device=index.device).unsqueeze(-1) * cells).flatten()
        weights = weights.double()
        counts, totals = (
            group_sums(index, (weights * values).flatten(), len(weights) * cells).reshape(-1, 2, NUM_BINS)
            for values in (torch.ones_like(outcomes), scores.double())
        )
        # The weights are counts: every copy of a row is one of weight 1, whose square is 1.
        sums = BinnedSums(counts.round().long(), torch.stack([counts, totals, torch.zeros_like(totals)] * 2))
        values = sums.errors(norm, debiased=debiased)
        values = values.clamp_min(0).sqrt() if norm == "l2" else values
        return values.masked_fill(weights.sum(-1) == 0, torch.nan)

    return errors


def _miscalibration(scores: Tensor, outcomes: Tensor, weights: Tensor) -> Tensor:
    return weighted_corp_brier(scores, outcomes, weights).miscalibration


def _discrimination(scores: Tensor, outcomes: Tensor, weights: Tensor) -> Tensor:
    return weighted_corp_brier(scores, outcomes, weights).discrimination


def _ranked(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Pred, Tensor], Scores]:
    def scores(predictive: Pred, targets: Tensor) -> Scores:
        confidence, right = top(predictive, targets)
        return Pairs(confidence.double(), 1 - right, function)

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


def _interval_score(predictive: Predictive, targets: Tensor) -> Scores:
    lower, upper = predictive.interval(0.1)
    return Mean(_rows(interval_scores(lower, upper, targets, 0.1).reshape(targets.shape)))


def _wis(predictive: Predictive, targets: Tensor) -> Scores:
    return Mean(_rows(weighted_interval_scores(predictive, targets).reshape(targets.shape)))


def _ence(predictive: Predictive, targets: Tensor) -> Scores:
    sigma, squares = spread_and_error(predictive.mean, predictive.variance.sqrt(), targets)
    shape = (len(targets), -1)
    return Pairs(sigma.reshape(shape), squares.reshape(shape), weighted_ence)


def _energy(predictive: Predictive, targets: Tensor) -> Scores:
    return Mean(energy_scores(predictive, targets))


def sets_of(predictive: Pred, alpha: float = 0.1) -> Tensor:
    """Return the prediction sets of a mis-coverage, bool `[N, ..., K]`."""
    given = predictive if isinstance(predictive, Predictive) else Predictive.from_probs(predictive)
    return given.prediction_set(alpha)


def labels_of(predictive: Pred, targets: Tensor) -> Tensor:
    """Return targets as class labels; those of yes or no may be bool or floating point, as for every metric."""
    if kind_of(predictive) != "binary":
        return targets
    return yes_or_no(class_probs(predictive), targets)[1].long().reshape(targets.shape)


def _set_coverage(predictive: Pred, targets: Tensor) -> Scores:
    covered = covered_labels(sets_of(predictive), labels_of(predictive, targets))[1]
    return Mean(_rows(covered.reshape(targets.shape)))


def _set_size(predictive: Pred, targets: Tensor) -> Scores:
    return Mean(_rows(sets_of(predictive).sum(-1)))


_ANY_REAL = (-float("inf"), float("inf"))
EVALUATION_METRICS: dict[str, MetricSpec] = {
    spec.name: spec
    for spec in (
        MetricSpec("accuracy", "accuracy", "higher", _CLASSES, _accuracy, (0.0, 1.0)),
        MetricSpec("nll", "NLL (nats)", "lower", (*_CLASSES, "continuous", "count"), _nll, _ANY_REAL, from_probs=False),
        MetricSpec("brier", "Brier", "lower", _CLASSES, _brier, (0.0, 2.0)),
        MetricSpec("ece", "ECE", "lower", _CLASSES, _ece, (0.0, 1.0)),
        MetricSpec("classwise_ece", "class-wise ECE", "lower", ("categorical",), _classwise, (0.0, 1.0), False),
        MetricSpec("aurc", "AURC", "lower", _CLASSES, _ranked(weighted_aurc), (0.0, 1.0), False),
        MetricSpec("error_auroc", "AUROC of errors", "higher", _CLASSES, _ranked(_error_roc), (0.0, 1.0), False),
        MetricSpec("e_aurc", "E-AURC", "lower", _CLASSES, _ranked(weighted_excess_aurc), (0.0, 1.0), False),
        MetricSpec("augrc", "AUGRC", "lower", _CLASSES, _ranked(weighted_augrc), (0.0, 0.5), False),
        MetricSpec(
            "smooth_ece", "SmoothECE", "lower", _CLASSES, _elementwise(weighted_smooth_error), (0.0, 1.0), False
        ),
        MetricSpec(
            "debiased_ece",
            "debiased ECE (l2)",
            "lower",
            _CLASSES,
            _elementwise(_binned_error("l2", True)),
            (0.0, 1.0),
            False,
        ),
        MetricSpec(
            "mce",
            "maximum calibration error",
            "lower",
            _CLASSES,
            _elementwise(_binned_error("max", False)),
            (0.0, 1.0),
            False,
        ),
        MetricSpec(
            "brier_miscalibration",
            "miscalibration of Brier, P(yes) (CORP)",
            "lower",
            ("binary",),
            _elementwise(_miscalibration),
            (0.0, 1.0),
            False,
        ),
        MetricSpec(
            "brier_discrimination",
            "discrimination of Brier, P(yes) (CORP)",
            "higher",
            ("binary",),
            _elementwise(_discrimination),
            (0.0, 0.25),
            False,
        ),
        MetricSpec(
            "set_coverage_90",
            "coverage of 90 % sets",
            "none",
            _CLASSES,
            _set_coverage,
            (0.0, 1.0),
            False,
            from_probs=False,
        ),
        MetricSpec(
            "set_size_90", "classes in 90 % sets", "lower", _CLASSES, _set_size, default=False, from_probs=False
        ),
        MetricSpec("rmse", "RMSE", "lower", _REAL, _rmse),
        MetricSpec("crps", "CRPS", "lower", _REAL, _crps),
        MetricSpec("coverage_90", "coverage of 90 % intervals", "none", _REAL, _coverage, (0.0, 1.0)),
        MetricSpec("width_90", "width of 90 % intervals", "lower", _REAL, _width),
        MetricSpec("quantile_error", "quantile calibration error", "lower", _REAL, _quantiles, (0.0, 1.0)),
        MetricSpec("interval_score_90", "score of 90 % intervals", "lower", _REAL, _interval_score, default=False),
        MetricSpec("wis", "weighted interval score", "lower", _REAL, _wis, default=False),
        MetricSpec("ence", "ENCE", "lower", _REAL, _ence, default=False),
        MetricSpec("energy_score", "energy score", "lower", ("samples",), _energy, _ANY_REAL, False),
    )
}
