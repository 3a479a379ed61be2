"""Every torchmetrics class with the function that it has to agree with, and the inputs of both."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from bayesguard import metrics
from bayesguard.metrics import functional as M
from bayesguard.predictive import Predictive

N = 120
Case = tuple[Callable[[], Metric], Callable[[Any, Tensor], Tensor], str]


def categorical() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(N, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    return probs, torch.randint(4, (N,), generator=generator)


def real() -> tuple[Predictive, Tensor]:
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return Predictive.from_normal(loc, loc.abs() + 0.5), loc + torch.randn(loc.shape, generator=generator)


def vectors() -> tuple[Predictive, Tensor]:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(6, N, 2, generator=generator, dtype=torch.float64)
    return Predictive.from_samples(samples), torch.randn(N, 2, generator=generator, dtype=torch.float64)


def sets(probs: Tensor, alpha: float) -> Tensor:
    return Predictive.from_probs(probs).prediction_set(alpha)


def sides(scores: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    return scores[~outside], scores[outside]


def top(probs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return probs.max(-1).values, (probs.argmax(-1) != y).double()


CASES: dict[str, Case] = {
    "accuracy": (metrics.Accuracy, M.accuracy, "classes"),
    "nll": (metrics.NegativeLogLikelihood, lambda p, y: M.negative_log_likelihood(p.log(), y), "classes"),
    "brier": (metrics.BrierScore, M.brier_score, "classes"),
    "ece": (metrics.ExpectedCalibrationError, M.expected_calibration_error, "classes"),
    "ece l2": (
        lambda: metrics.ExpectedCalibrationError(norm="l2", debiased=True),
        lambda p, y: M.expected_calibration_error(p, y, norm="l2", debiased=True),
        "classes",
    ),
    "ece mass": (
        lambda: metrics.ExpectedCalibrationError(10, binning="mass"),
        lambda p, y: M.expected_calibration_error(p, y, num_bins=10, binning="mass"),
        "classes",
    ),
    "classwise": (lambda: metrics.ClasswiseCalibrationError(4), M.classwise_calibration_error, "classes"),
    "aurc": (metrics.AreaUnderRiskCoverage, lambda p, y: M.area_under_risk_coverage(*top(p, y)), "classes"),
    "error auroc": (metrics.ErrorAUROC, M.error_auroc, "classes"),
    "ood auroc": (metrics.OODAUROC, M.area_under_roc, "scores"),
    "rmse": (metrics.RootMeanSquaredError, lambda p, y: M.root_mean_squared_error(p.mean, y), "real"),
    "crps": (metrics.ContinuousRankedProbabilityScore, M.continuous_ranked_probability_score, "real"),
    "real nll": (metrics.NegativeLogLikelihood, M.negative_log_likelihood, "real"),
    "coverage": (
        lambda: metrics.IntervalCoverage(0.2),
        lambda p, y: M.interval_coverage(p.interval(0.2)[0], p.interval(0.2)[1], y),
        "real",
    ),
    "width": (metrics.IntervalWidth, lambda p, y: M.interval_width(*p.interval(0.1)), "real"),
    "quantiles": (
        metrics.QuantileCalibrationError,
        lambda p, y: M.quantile_calibration_error(M.pit(p, y)),
        "real",
    ),
    "e-aurc": (
        metrics.ExcessAreaUnderRiskCoverage,
        lambda p, y: M.excess_area_under_risk_coverage(*top(p, y)),
        "classes",
    ),
    "augrc": (
        metrics.AreaUnderGeneralisedRiskCoverage,
        lambda p, y: M.area_under_generalised_risk_coverage(*top(p, y)),
        "classes",
    ),
    "smooth": (metrics.SmoothCalibrationError, M.smooth_calibration_error, "classes"),
    "at": (
        lambda: metrics.CalibrationErrorAt(0.6),
        lambda p, y: M.calibration_error_at(p, y, 0.6).error,
        "classes",
    ),
    "set coverage": (
        lambda: metrics.SetCoverage(0.3),
        lambda p, y: M.set_coverage(sets(p, 0.3), y),
        "classes",
    ),
    "set size": (lambda: metrics.SetSize(0.3), lambda p, y: M.set_size(sets(p, 0.3)), "classes"),
    "miscalibration": (
        metrics.BrierMiscalibration,
        lambda p, y: M.corp_brier_decomposition(p, y).miscalibration,
        "binary",
    ),
    "discrimination": (
        metrics.BrierDiscrimination,
        lambda p, y: M.corp_brier_decomposition(p, y).discrimination,
        "binary",
    ),
    "binary at": (
        lambda: metrics.CalibrationErrorAt(0.3),
        lambda p, y: M.binary_calibration_error_at(p, y, 0.3).error,
        "binary",
    ),
    "binary smooth": (metrics.SmoothCalibrationError, M.binary_smooth_calibration_error, "binary"),
    "ood precision": (
        lambda: metrics.OODAveragePrecision("out"),
        lambda p, y: M.area_under_precision_recall(*sides(p, y), positive="out"),
        "scores",
    ),
    "ood false positives": (
        lambda: metrics.OODFalsePositiveRate("in", 0.8),
        lambda p, y: M.false_positive_rate_at(*sides(p, y), 0.8, positive="in"),
        "scores",
    ),
    "interval score": (
        lambda: metrics.IntervalScore(0.2),
        lambda p, y: M.interval_score(p.interval(0.2)[0], p.interval(0.2)[1], y, 0.2),
        "real",
    ),
    "wis": (metrics.WeightedIntervalScore, M.weighted_interval_score, "real"),
    "ence": (
        lambda: metrics.ExpectedNormalisedCalibrationError(5),
        lambda p, y: M.expected_normalised_calibration_error(p.mean, p.stddev, y, num_bins=5),
        "real",
    ),
    "energy": (metrics.EnergyScore, M.energy_score, "vectors"),
    "variogram": (lambda: metrics.VariogramScore(1.0), lambda p, y: M.variogram_score(p, y, p=1.0), "vectors"),
}


def inputs(kind: str) -> tuple[Any, Tensor]:
    if kind == "real":
        return real()
    if kind == "vectors":
        return vectors()
    probs, y = categorical()
    if kind == "binary":
        return probs[:, 0], (y == 0).long()
    return (probs, y) if kind == "classes" else (probs[:, 0], y == 0)


WEIGHTED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "accuracy": lambda p, y, w: M.accuracy(p, y, weights=w),
    "nll": lambda p, y, w: M.negative_log_likelihood(p.log(), y, weights=w),
    "brier": lambda p, y, w: M.brier_score(p, y, weights=w),
    "ece": lambda p, y, w: M.expected_calibration_error(p, y, weights=w),
    "ece l2": lambda p, y, w: M.expected_calibration_error(p, y, norm="l2", debiased=True, weights=w),
    "ece mass": lambda p, y, w: M.expected_calibration_error(p, y, num_bins=10, binning="mass", weights=w),
    "classwise": lambda p, y, w: M.classwise_calibration_error(p, y, weights=w),
    "aurc": lambda p, y, w: M.area_under_risk_coverage(*top(p, y), weights=w),
    "error auroc": lambda p, y, w: M.error_auroc(p, y, weights=w),
    "ood auroc": lambda p, y, w: M.area_under_roc(p, y, weights=w),
    "rmse": lambda p, y, w: M.root_mean_squared_error(p.mean, y, weights=w),
    "crps": lambda p, y, w: M.continuous_ranked_probability_score(p, y, weights=w),
    "real nll": lambda p, y, w: (w @ -p.log_prob(y).mean(-1)) / w.sum(),
    "coverage": lambda p, y, w: M.interval_coverage(p.interval(0.2)[0], p.interval(0.2)[1], y, weights=w),
    "width": lambda p, y, w: M.interval_width(p.interval(0.1)[0], p.interval(0.1)[1], weights=w),
    "quantiles": lambda p, y, w: M.quantile_calibration_error(M.pit(p, y), weights=w),
    "e-aurc": lambda p, y, w: M.excess_area_under_risk_coverage(*top(p, y), weights=w),
    "augrc": lambda p, y, w: M.area_under_generalised_risk_coverage(*top(p, y), weights=w),
    "smooth": lambda p, y, w: M.smooth_calibration_error(p, y, weights=w),
    "at": lambda p, y, w: M.calibration_error_at(p, y, 0.6, weights=w).error,
    "set coverage": lambda p, y, w: M.set_coverage(sets(p, 0.3), y, weights=w),
    "set size": lambda p, y, w: M.set_size(sets(p, 0.3), weights=w),
    "miscalibration": lambda p, y, w: M.corp_brier_decomposition(p, y, weights=w).miscalibration,
    "discrimination": lambda p, y, w: M.corp_brier_decomposition(p, y, weights=w).discrimination,
    "binary at": lambda p, y, w: M.binary_calibration_error_at(p, y, 0.3, weights=w).error,
    "binary smooth": lambda p, y, w: M.binary_smooth_calibration_error(p, y, weights=w),
    "ood precision": lambda p, y, w: M.area_under_precision_recall(*sides(p, y), positive="out", weights=(w[~y], w[y])),
    "ood false positives": lambda p, y, w: M.false_positive_rate_at(
        *sides(p, y), 0.8, positive="in", weights=(w[~y], w[y])
    ),
    "interval score": lambda p, y, w: M.interval_score(p.interval(0.2)[0], p.interval(0.2)[1], y, 0.2, weights=w),
    "wis": lambda p, y, w: M.weighted_interval_score(p, y, weights=w),
    "ence": lambda p, y, w: M.expected_normalised_calibration_error(p.mean, p.stddev, y, num_bins=5, weights=w),
    "energy": lambda p, y, w: M.energy_score(p, y, weights=w),
    "variogram": lambda p, y, w: M.variogram_score(p, y, p=1.0, weights=w),
}

# The class of every metric of the registry, made with what the registry's name says.
REGISTERED: dict[str, Callable[[], Metric]] = {
    "accuracy": metrics.Accuracy,
    "nll": metrics.NegativeLogLikelihood,
    "brier": metrics.BrierScore,
    "ece": metrics.ExpectedCalibrationError,
    "classwise_ece": lambda: metrics.ClasswiseCalibrationError(4),
    "aurc": metrics.AreaUnderRiskCoverage,
    "error_auroc": metrics.ErrorAUROC,
    "e_aurc": metrics.ExcessAreaUnderRiskCoverage,
    "augrc": metrics.AreaUnderGeneralisedRiskCoverage,
    "smooth_ece": metrics.SmoothCalibrationError,
    "debiased_ece": lambda: metrics.ExpectedCalibrationError(norm="l2", debiased=True),
    "mce": lambda: metrics.ExpectedCalibrationError(norm="max"),
    "brier_miscalibration": metrics.BrierMiscalibration,
    "brier_discrimination": metrics.BrierDiscrimination,
    "set_coverage_90": metrics.SetCoverage,
    "set_size_90": metrics.SetSize,
    "rmse": metrics.RootMeanSquaredError,
    "crps": metrics.ContinuousRankedProbabilityScore,
    "coverage_90": metrics.IntervalCoverage,
    "width_90": metrics.IntervalWidth,
    "quantile_error": metrics.QuantileCalibrationError,
    "interval_score_90": metrics.IntervalScore,
    "wis": metrics.WeightedIntervalScore,
    "ence": metrics.ExpectedNormalisedCalibrationError,
    "energy_score": metrics.EnergyScore,
}
