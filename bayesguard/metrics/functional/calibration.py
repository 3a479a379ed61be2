"""Calibration errors: how far confidence is from what comes true, by bins of equal width or equal mass."""

from functools import reduce
from operator import add

import torch
from torch import Tensor

from bayesguard.checks import check_level
from bayesguard.metrics.functional.binned import (
    BinnedSums,
    Binning,
    Norm,
    ReliabilityBins,
    bin_index,
    check_settings,
    reliability_of,
)
from bayesguard.metrics.functional.inputs import answered, classified, element_weights, yes_or_no
from bayesguard.predictive.numerics import BUDGET, CACHED, slices


def expected_calibration_error(
    probs: object,
    targets: object,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    norm: Norm = "l1",
    debiased: bool = False,
    weights: object = None,
) -> Tensor:
    """Return the calibration error of the most probable class, 0 to 1.

    The share-weighted mean gap between the mean confidence of a bin and its accuracy. Bin b is ((b-1)/B, b/B], and
    confidence 0 belongs to the first. Estimates from few rows are biased upwards: a perfectly calibrated classifier of
    ten classes has a mean error of about 0.085 on 200 rows and 0.038 on 1,000.

    Args:
        probs: `[N, ..., K]`, rows that sum to 1. For P(y = 1) see `binary_calibration_error`.
        targets: Class labels `[N, ...]`.
        num_bins: Bins B.
        binning: "width", or "mass": cut by rank, where equal confidences are never split.
        norm: "l1", "l2" (root mean square of the gaps) or "max" (the largest).
        debiased: With "l2", subtract each bin's sampling variance v = a(1-a)/(n-1) from its squared gap; with "l1",
            what noise of that variance would add to its gap once more, so that part of the bias stays. A bin of one
            score counts 0.
        weights: How often each row counts, `[N]`; once if None. Their scale does not matter: n above is the effective
            sample size of the bin.

    Returns:
        0-d float64 on the device of `probs`.

    Raises:
        BadInput: No rows, rows that are no distribution, labels out of range, settings without meaning.

    References:
        C. Guo, G. Pleiss, Y. Sun, K. Weinberger (2017). On calibration of modern neural networks. ICML, eq. 3.
        J. Bröcker (2012). Estimating reliability and resolution of probability forecasts. Climate Dynamics (debiasing).
        A. Kumar, P. Liang, T. Ma (2019). Verified uncertainty calibration. NeurIPS, section 4 and the code of the
        paper (debiasing "l1", there by simulation).

    Examples:
        >>> round(expected_calibration_error([[0.9, 0.1], [0.8, 0.2]], [0, 1]).item(), 4)
        0.45
    """
    check_settings(num_bins, binning, norm, debiased)
    confidence, right = answered(probs, targets)
    per_row = element_weights(weights, targets, len(right), right.device)
    return _sums(confidence, right, num_bins, binning, per_row).error(norm, debiased=debiased)


def classwise_calibration_error(
    probs: object,
    targets: object,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    norm: Norm = "l1",
    debiased: bool = False,
    weights: object = None,
) -> Tensor:
    """Return the binary calibration error of each class's probability, averaged over the K classes, 0 to 1.

    "l1" is the mean over classes, "l2" their root mean square, "max" the largest; arguments as for
    `expected_calibration_error`. A class that no row has counts like the others.

    References:
        M. Kull et al. (2019). Beyond temperature scaling: obtaining well-calibrated multi-class probabilities with
        Dirichlet calibration. NeurIPS, section 2.
        A. Kumar, P. Liang, T. Ma (2019). Verified uncertainty calibration. NeurIPS, definition 2.4 ("l2").

    Examples:
        >>> round(classwise_calibration_error([[0.9, 0.1], [0.8, 0.2]], [0, 1]).item(), 4)
        0.45
    """
    check_settings(num_bins, binning, norm, debiased)
    values, labels = classified(probs, targets)
    per_row = element_weights(weights, targets, len(labels), labels.device)
    if binning == "width":
        return BinnedSums.of_classes(values, labels, num_bins, per_row).error(norm, debiased=debiased)
    classes = [_sums(values[:, k], labels == k, num_bins, binning, per_row) for k in range(values.shape[-1])]
    stacked = BinnedSums(torch.stack([c.rows for c in classes]), torch.stack([c.sums for c in classes], 1))
    return stacked.error(norm, debiased=debiased)


def binary_calibration_error(
    probs: object,
    targets: object,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    norm: Norm = "l1",
    debiased: bool = False,
    weights: object = None,
) -> Tensor:
    """Return the calibration error of P(y = 1), not of the top label, 0 to 1.

    Args:
        probs: Probability of yes, any shape.
        targets: 0/1 of exactly that shape.
        num_bins, binning, norm, debiased, weights: As for `expected_calibration_error`.

    Examples:
        >>> round(binary_calibration_error([0.9, 0.8], [1, 0]).item(), 4)
        0.45
    """
    check_settings(num_bins, binning, norm, debiased)
    scores, outcomes = yes_or_no(probs, targets)
    per_row = element_weights(weights, targets, len(scores), scores.device)
    return _sums(scores, outcomes, num_bins, binning, per_row).error(norm, debiased=debiased)


def reliability_bins(
    probs: object,
    targets: object,
    *,
    num_bins: int = 15,
    binning: Binning = "width",
    confidence_level: float = 0.95,
    weights: object = None,
) -> ReliabilityBins:
    """Return the bins of a reliability diagram of the most probable class, with intervals of their accuracies.

    Examples:
        >>> bins = reliability_bins([[0.9, 0.1], [0.8, 0.2]], [0, 1], num_bins=5)
        >>> bins.count.tolist(), bins.num_filled
        ([0.0, 0.0, 0.0, 1.0, 1.0], 2)
    """
    check_settings(num_bins, binning, "l1", False)
    check_level(confidence_level, "confidence_level")
    confidence, right = answered(probs, targets)
    per_row = element_weights(weights, targets, len(right), right.device)
    return bins_of(confidence, right, num_bins, binning, confidence_level, per_row)


def bins_of(
    scores: Tensor,
    outcomes: Tensor,
    num_bins: int,
    binning: Binning,
    confidence_level: float,
    weights: Tensor | None = None,
) -> ReliabilityBins:
    """Return the reliability bins of any scores in [0, 1] and their 0/1 outcomes `[M]`."""
    if binning == "width":
        # In parts, since the bins of millions of scores are more than the scores.
        parts = slices(len(scores), BUDGET // CACHED)
        sums = reduce(add, (_sums(scores[p], outcomes[p], num_bins, "width", _of(weights, p)) for p in parts))
        edges = torch.arange(num_bins + 1, dtype=torch.float64, device=scores.device) / num_bins
        return reliability_of(sums, edges[:-1], edges[1:], confidence_level)
    index = bin_index(scores, num_bins, binning, weights)
    sums = BinnedSums.of(scores, outcomes, index, num_bins, weights)
    empty = torch.full_like(sums.count, torch.nan)
    lower = empty.scatter_reduce(0, index, scores.double(), "amin", include_self=False)
    upper = empty.scatter_reduce(0, index, scores.double(), "amax", include_self=False)
    return reliability_of(sums, lower, upper, confidence_level)


def _of(weights: Tensor | None, part: slice) -> Tensor | None:
    return None if weights is None else weights[part]


def _sums(scores: Tensor, outcomes: Tensor, num_bins: int, binning: Binning, weights: Tensor | None) -> BinnedSums:
    return BinnedSums.of(scores, outcomes, bin_index(scores, num_bins, binning, weights), num_bins, weights)
