"""The metrics as torchmetrics classes: updated batch by batch, merged over processes, float64 inside."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torchmetrics import Metric

from bayesguard.checks import as_tensor, check_count, check_level
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.functional.binned import (
    BinnedSums,
    Binning,
    Norm,
    bin_index,
    check_settings,
)
from bayesguard.metrics.functional.inputs import classified, element_weights, paired, weighted_mean
from bayesguard.metrics.functional.regression import LEVELS, at_or_below, interval_coverage, interval_width, pit
from bayesguard.metrics.functional.selective import area_under_risk_coverage, area_under_roc
from bayesguard.metrics.registry import EVALUATION_METRICS, Pred, binned, class_probs, kind_of, top
from bayesguard.metrics.state import GRID, CalibrationState
from bayesguard.predictive import Predictive


class PredictiveMetric(Metric):
    """Base: `update(pred, targets, weights=None)` takes a Predictive, or class probabilities `[N, K]` (or P(y = 1)).

    Weights `[N]` say how much each row counts.
    """

    full_state_update = False
    is_differentiable = False

    def update(self, pred: object, targets: object, weights: object = None) -> None:
        """Add a batch of predictions and their targets, each row once or as often as `weights` `[N]` say."""
        # An array stays an array: a detour over log-probabilities would move scores off the edges of their bins.
        pred = pred if isinstance(pred, Predictive) else as_tensor(pred, "pred")
        truth = as_tensor(targets, "targets").to(pred.device)
        per_row = None if weights is None else element_weights(weights, truth, len(truth), truth.device)
        self.add(pred, truth, per_row)

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        """Add a batch; weights are float64 `[N]`."""
        raise NotImplementedError

    def _add_sums(self, *names: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> None:
        for name in names:
            # On the CPU whatever the default device is; `metric.to(device)` moves it.
            self.add_state(name, torch.zeros(shape, dtype=dtype, device="cpu"), dist_reduce_fx="sum")

    def _add_lists(self, *names: str) -> None:
        for name in names:
            self.add_state(name, [], dist_reduce_fx="cat")

    def _refuse(self, pred: Pred) -> NoReturn:
        raise BadType(f"{type(self).__name__} is not for {kind_of(pred)} predictions")


class _Average(PredictiveMetric):
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._add_sums("total", "count")

    def _average(self, values: Tensor, weights: Tensor | None) -> None:
        """Add values `[N, ...]` of rows of these weights."""
        flat = values.double().flatten()
        mass = element_weights(weights, values, len(flat), flat.device)
        count = len(flat) if mass is None else mass.sum()
        self.total += (weighted_mean(flat, mass) * count).to(self.total.device)
        self.count += count

    def compute(self) -> Tensor:
        """Return the mean, float64."""
        _check_any(self, bool(self.count))
        return self.total / self.count


class _Registered(_Average):
    """A mean over examples of what the registry's metric of this name keeps of each."""

    name: str

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        self._average(EVALUATION_METRICS[self.name].scores(pred, targets).rows, weights)


class Accuracy(_Registered):
    """Share of right answers.

    Examples:
        >>> metric = Accuracy()
        >>> metric.update([[0.9, 0.1], [0.4, 0.6]], [0, 0])
        >>> metric.compute().item()
        0.5
    """

    name = "accuracy"
    higher_is_better = True


class NegativeLogLikelihood(_Registered):
    """Mean negative log-likelihood in nats (of each element, where examples have several targets)."""

    name = "nll"
    higher_is_better = False


class BrierScore(_Registered):
    """Brier score, summed over classes (for yes or no, over both): 0 to 2."""

    name = "brier"
    higher_is_better = False


class ContinuousRankedProbabilityScore(_Registered):
    """Mean CRPS in the target's unit."""

    name = "crps"
    higher_is_better = False


class RootMeanSquaredError(_Registered):
    """Root mean squared error of the predictive mean, in the target's unit."""

    name = "rmse"
    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the root of the mean square, float64."""
        return super().compute().sqrt()


class _Interval(_Average):
    def __init__(self, alpha: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = check_level(alpha, "alpha")

    def _interval(self, pred: Pred) -> tuple[Tensor, Tensor]:
        if isinstance(pred, Tensor) or not hasattr(pred, "interval"):
            self._refuse(pred)
        lower, upper = pred.interval(self.alpha)
        return lower, upper


class IntervalCoverage(_Interval):
    """Share of targets in their central intervals of mis-coverage `alpha`."""

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        share = interval_coverage(*self._interval(pred), targets, weights=weights)
        self._average(share.expand(targets.shape), weights)


class IntervalWidth(_Interval):
    """Mean width of the central intervals of mis-coverage `alpha`, in the target's unit."""

    higher_is_better = False

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        self._average(interval_width(*self._interval(pred), weights=weights).expand(targets.shape), weights)


class _Binned(PredictiveMetric):
    """Holds the tensors of a `BinnedSums`."""

    rows: Tensor
    sums: Tensor

    def _hold(self, *shape: int) -> None:
        empty = BinnedSums.empty(*shape)
        self._add_sums("rows", shape=empty.rows.shape, dtype=torch.int64)
        self._add_sums("sums", shape=empty.sums.shape)

    def _held(self) -> BinnedSums:
        _check_any(self, bool(self.rows.any()))
        return BinnedSums(self.rows, self.sums)

    def _merge(self, sums: BinnedSums) -> None:
        self.rows += sums.rows.to(self.rows.device)
        self.sums += sums.sums.to(self.sums.device)


class ExpectedCalibrationError(_Binned):
    """Calibration error of the most probable class; of P(y = 1) for yes-or-no predictions.

    Arguments as for `functional.expected_calibration_error`. Equal-width bins keep 14 numbers a bin, and are exact.
    Equal mass needs all confidences, and keeps them; with `exact=False` it keeps 14 numbers for each of 4096 cells
    instead, and cuts to within one cell (see `CalibrationState`).

    Examples:
        >>> metric = ExpectedCalibrationError()
        >>> metric.update([[0.9, 0.1]], [0])
        >>> metric.update([[0.8, 0.2]], [1])
        >>> round(metric.compute().item(), 4)
        0.45
        >>> metric.state.bootstrap(1000).shape
        torch.Size([1000])
    """

    higher_is_better = False
    scores: list[Tensor]
    outcomes: list[Tensor]
    weights: list[Tensor]

    def __init__(
        self,
        num_bins: int = 15,
        binning: Binning = "width",
        norm: Norm = "l1",
        debiased: bool = False,
        exact: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_settings(num_bins, binning, norm, debiased)
        self.num_bins, self.binning, self.norm, self.debiased = num_bins, binning, norm, debiased
        self.keeps_rows = exact and binning == "mass"
        if self.keeps_rows:
            self._add_lists("scores", "outcomes", "weights")
        else:
            self._hold(num_bins if binning == "width" else GRID)

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        scores, outcomes = binned(pred, targets)
        mass = element_weights(weights, targets, len(scores), scores.device)
        if self.keeps_rows:
            self.scores.append(scores.double())
            self.outcomes.append(outcomes)
            self.weights.append(torch.ones_like(outcomes) if mass is None else mass)
        else:
            batch = CalibrationState(self.num_bins, self.binning)
            batch.add(scores, outcomes, mass)
            self._merge(batch.sums)

    @property
    def state(self) -> CalibrationState:
        """The sums so far, of this process: for intervals, a null, reliability bins and the effective sample size."""
        if self.keeps_rows:
            raise BadInput("ExpectedCalibrationError(binning='mass') keeps rows, not sums; make it with exact=False")
        state = CalibrationState(self.num_bins, self.binning)
        state.sums = self._held()
        return state

    def compute(self) -> Tensor:
        """Return the error, float64."""
        if not self.keeps_rows:
            return self.state.error(self.norm, debiased=self.debiased)
        scores, outcomes, weights = (_whole(self, parts) for parts in (self.scores, self.outcomes, self.weights))
        index = bin_index(scores, self.num_bins, "mass", weights)
        return BinnedSums.of(scores, outcomes, index, self.num_bins, weights).error(self.norm, debiased=self.debiased)


class ClasswiseCalibrationError(_Binned):
    """Mean over classes of the binary calibration error of each class's probability, over equal-width bins.

    Arguments as for `functional.classwise_calibration_error`, and the number of classes. Keeps 14 K B numbers.
    """

    higher_is_better = False

    def __init__(
        self, num_classes: int, num_bins: int = 15, norm: Norm = "l1", debiased: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        check_settings(num_bins, "width", norm, debiased)
        self.num_classes = check_count(num_classes, "num_classes", minimum=2)
        self.num_bins, self.norm, self.debiased = num_bins, norm, debiased
        self._hold(num_classes, num_bins)

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        if kind_of(pred) != "categorical":
            self._refuse(pred)
        values, labels = classified(class_probs(pred), targets)
        mass = element_weights(weights, targets, len(labels), labels.device)
        if values.shape[-1] != self.num_classes:
            raise BadInput(f"pred has {values.shape[-1]} classes, but the metric was made for {self.num_classes}")
        self._merge(BinnedSums.of_classes(values, labels, self.num_bins, mass))

    def compute(self) -> Tensor:
        """Return the error, float64."""
        return self._held().error(self.norm, debiased=self.debiased)


class _Ranking(PredictiveMetric):
    """Keeps the confidence of every answer, whether it was wrong, and its weight."""

    confidence: list[Tensor]
    errors: list[Tensor]
    weights: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._add_lists("confidence", "errors", "weights")

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        if kind_of(pred) not in ("categorical", "binary"):
            self._refuse(pred)
        confidence, right = (values.flatten() for values in top(pred, targets))
        mass = element_weights(weights, targets, len(right), right.device)
        self.confidence.append(confidence.double())
        self.errors.append(1 - right)
        self.weights.append(torch.ones_like(right) if mass is None else mass)

    def _kept(self) -> tuple[Tensor, Tensor, Tensor]:
        return _whole(self, self.confidence), _whole(self, self.errors), _whole(self, self.weights)


class AreaUnderRiskCoverage(_Ranking):
    """Mean error rate over all shares of rows kept, the surest first. Weights are counts of rows."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the area, float64."""
        confidence, errors, weights = self._kept()
        return area_under_risk_coverage(confidence, errors, weights=weights)


class ErrorAUROC(_Ranking):
    """Probability that a wrong answer is less confident than a right one; needs both kinds of answers."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the area, float64."""
        confidence, errors, weights = self._kept()
        return area_under_roc(-confidence, errors, weights=weights)


class OODAUROC(PredictiveMetric):
    """How well scores tell out-of-distribution rows (larger) from in-distribution ones; ties count half.

    `update(scores, outside)` takes scores `[N]`, or a Predictive, whose score is its total uncertainty, and whether
    each row is out of distribution.

    Examples:
        >>> metric = OODAUROC()
        >>> metric.update(torch.tensor([0.1, 0.9]), torch.tensor([False, True]))
        >>> metric.compute().item()
        1.0
    """

    higher_is_better = True
    scores: list[Tensor]
    outside: list[Tensor]
    weights: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._add_lists("scores", "outside", "weights")

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        score = pred if isinstance(pred, Tensor) else pred.uncertainty().total
        scores, outside = paired(score, targets, "pred", "targets")
        self.scores.append(scores)
        self.outside.append(outside)
        mass = element_weights(weights, targets, len(scores), scores.device)
        self.weights.append(torch.ones_like(scores) if mass is None else mass)

    def compute(self) -> Tensor:
        """Return the area, float64."""
        scores, outside, weights = (_whole(self, parts) for parts in (self.scores, self.outside, self.weights))
        return area_under_roc(scores, outside, weights=weights)


class QuantileCalibrationError(PredictiveMetric):
    """Mean over levels .05 to .95 of |share of targets at or below the quantile - level|."""

    higher_is_better = False
    below: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._add_sums("below", shape=(len(LEVELS),))
        self._add_sums("count")

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        if isinstance(pred, Tensor):
            self._refuse(pred)
        values = pit(pred, targets).flatten()
        mass = element_weights(weights, targets, len(values), values.device)
        mass = torch.ones_like(values) if mass is None else mass
        self.below += (mass @ at_or_below(values)).to(self.below.device)
        self.count += mass.sum().to(self.count.device)

    def compute(self) -> Tensor:
        """Return the error, float64."""
        _check_any(self, bool(self.count))
        levels = torch.tensor(LEVELS, dtype=torch.float64, device=self.below.device)
        return (self.below / self.count - levels).abs().mean()


def _check_any(metric: Metric, some: bool) -> None:
    if not some:
        raise BadInput(f"{type(metric).__name__} has seen no rows; call update(pred, targets) before compute()")


def _whole(metric: Metric, parts: list[Tensor] | Tensor) -> Tensor:
    # torchmetrics hands a list before processes are merged, and a tensor after.
    _check_any(metric, len(parts) > 0)
    return parts if isinstance(parts, Tensor) else torch.cat(parts)
