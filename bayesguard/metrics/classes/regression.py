"""Metrics of numbers, counts and samples."""

from typing import Any

import torch
from torch import Tensor

from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.metrics.classes.base import AtLevel, Average, KeptRows, PredictiveMetric, Registered, check_any
from bayesguard.metrics.functional.inputs import element_weights
from bayesguard.metrics.functional.multivariate import spread_and_error, variogram_score, weighted_ence
from bayesguard.metrics.functional.regression import (
    LEVELS,
    at_or_below,
    interval_coverage,
    interval_scores,
    interval_width,
    pit,
)
from bayesguard.metrics.registry import Pred


class RootMeanSquaredError(Registered):
    """Root mean squared error of the predictive mean, in the target's unit."""

    name = "rmse"
    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the root of the mean square, float64."""
        return super().compute().sqrt()


class ContinuousRankedProbabilityScore(Registered):
    """Mean CRPS in the target's unit."""

    name = "crps"
    higher_is_better = False


class WeightedIntervalScore(Registered):
    """Mean weighted interval score of the quantiles .05 to .95, in the target's unit."""

    name = "wis"
    higher_is_better = False


class EnergyScore(Registered):
    """Mean fair energy score of samples of vectors, in the target's unit."""

    name = "energy_score"
    higher_is_better = False


class VariogramScore(Average):
    """Mean variogram score of order p of samples of vectors; see `functional.variogram_score`."""

    higher_is_better = False

    def __init__(self, p: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < p < float("inf"):
            raise BadInput(f"p must be positive and finite, got {p}")
        self.p = float(p)
        self._keep_apart(self.p)

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        if isinstance(pred, Tensor):
            self._refuse(pred)
        score = variogram_score(pred, targets, p=self.p, weights=weights)
        self._average(score.expand(len(targets)), weights)


class _Interval(AtLevel):
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


class IntervalScore(_Interval):
    """Mean score of the central intervals of mis-coverage `alpha`: width and misses, in the target's unit."""

    higher_is_better = False

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        scores = interval_scores(*self._interval(pred), targets, self.alpha)
        self._average(scores.reshape(targets.shape), weights)


class ExpectedNormalisedCalibrationError(KeptRows):
    """Mean over bins of `|RMV - RMSE| / RMV` (ENCE); bins are cut by rank, so that all rows are kept.

    Argument as for `functional.expected_normalised_calibration_error`.
    """

    higher_is_better = False

    def __init__(self, num_bins: int = 15, **options: Any) -> None:
        super().__init__(**options)
        self.num_bins = check_count(num_bins, "num_bins")

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        if isinstance(pred, Tensor):
            self._refuse(pred)
        self._keep(*spread_and_error(pred.mean, pred.variance.sqrt(), targets), targets, weights)

    def compute(self) -> Tensor:
        """Return the error, float64."""
        sigma, squares, weights = self._kept()
        return weighted_ence(sigma, squares, weights.unsqueeze(0), self.num_bins)[0]


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
        check_any(self, bool(self.count))
        levels = torch.tensor(LEVELS, dtype=torch.float64, device=self.below.device)
        return (self.below / self.count - levels).abs().mean()
