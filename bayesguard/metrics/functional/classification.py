"""Scores of class probabilities: accuracy, negative log-likelihood, Brier score and its parts."""

from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, bad_row, check_finite, check_labels
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.functional.binned import BinnedSums, check_settings
from bayesguard.metrics.functional.inputs import (
    answered,
    cached_slices,
    classified,
    element_weights,
    sum_slack,
    weighted_mean,
)
from bayesguard.predictive import Predictive


def accuracy(probs: object, targets: object, *, weights: object = None) -> Tensor:
    """Return the share of rows whose most probable class (the first of equals) is the target.

    Args:
        probs: `[N, ..., K]`, rows that sum to 1.
        targets: Class labels `[N, ...]`.
        weights: How often each row counts, `[N]`; once if None.

    Returns:
        0-d float64 on the device of `probs`.

    Raises:
        BadInput: No rows, rows that are no distribution, labels out of range or of another shape.

    Examples:
        >>> accuracy([[0.9, 0.1], [0.4, 0.6]], [0, 0]).item()
        0.5
    """
    right = answered(probs, targets)[1]
    return weighted_mean(right, element_weights(weights, targets, len(right), right.device))


def negative_log_likelihood(log_probs: object, targets: object, *, weights: object = None) -> Tensor:
    """Return the mean of `-log p(target)` in nats; infinite where a target had probability 0, never clipped.

    Args:
        log_probs: Log-probabilities `[N, ..., K]`, as a categorical `pred.logits` has them, or
            `logits.log_softmax(-1)`; or a Predictive of any kind that has `log_prob`, for real targets and counts too
            (the mean over the elements of each example).
        targets: Class labels `[N, ...]`, or what the Predictive predicts.
        weights: How often each row counts, `[N]`; once if None.

    Raises:
        BadInput: No rows, NaN, rows whose probabilities do not sum to 1 (raw logits), labels out of range.

    Examples:
        >>> round(negative_log_likelihood(torch.tensor([[0.5, 0.5]]).log(), [1]).item(), 4)
        0.6931
    """
    if isinstance(log_probs, Predictive):
        if log_probs.batch_shape.numel() == 0:
            raise BadInput("the predictive has no rows; a metric needs at least one")
        losses = -log_probs.log_prob(as_tensor(targets, "targets")).double().flatten()
    else:
        losses = _losses(as_tensor(log_probs, "log_probs"), as_tensor(targets, "targets"))
    return weighted_mean(losses, element_weights(weights, targets, len(losses), losses.device))


def _losses(values: Tensor, targets: Tensor) -> Tensor:
    if not values.is_floating_point():
        raise BadType(f"log_probs must be floating point, got {values.dtype}")
    if values.dim() < 2 or values.numel() == 0:
        raise BadInput(f"log_probs has shape {tuple(values.shape)}; at least one row of [N, K] is needed")
    _check_log_rows(values.detach())
    labels = check_labels(targets.to(values.device), values.shape[:-1], values.shape[-1])
    return -values.gather(-1, labels.unsqueeze(-1)).double().flatten()


def _check_log_rows(values: Tensor) -> None:
    """Raise BadInput unless the probabilities of every row sum to 1."""
    # Rounding a logarithm moves the probability by the size of that logarithm: half precision needs more room.
    slack = max(sum_slack(values), 4 * torch.finfo(values.dtype).eps)
    rows = values.flatten(0, -2)
    kind = torch.promote_types(values.dtype, torch.float32)
    quick = torch.cat([rows[part].to(kind).exp().sum(-1) for part in cached_slices(rows, copies=2)])
    if bool(((quick - 1).abs() <= slack / 2).all()):  # which neither NaN nor infinity is
        return
    check_finite(values, "log_probs", allow_negative_infinity=True)
    sums = values.double().logsumexp(-1)
    bad = sums.abs() > slack
    if bad.any():
        raise BadInput(
            f"log_probs has probabilities that sum to {sums[bad][0].exp().item():g} in row {bad_row(bad)}; "
            "pass logits through log_softmax(-1) first"
        )


def brier_score(probs: object, targets: object, *, weights: object = None) -> Tensor:
    """Return the mean squared distance of probabilities from the one-hot target, summed over classes: 0 to 2.

    For two classes it is twice the score of the probability of one of them, which others call the Brier score.

    Args:
        probs: `[N, ..., K]`.
        targets: Class labels `[N, ...]`.
        weights: How often each row counts, `[N]`; once if None.

    References:
        G. Brier (1950). Verification of forecasts expressed in terms of probability. Monthly Weather Review.

    Examples:
        >>> round(brier_score([[0.8, 0.2]], [0]).item(), 4)
        0.08
    """
    scores = brier_scores(*classified(probs, targets))
    return weighted_mean(scores, element_weights(weights, targets, len(scores), scores.device))


def brier_scores(probs: Tensor, labels: Tensor) -> Tensor:
    """Return the Brier score of every row `[M]`, float64, of checked input."""
    scores = []
    for rows in cached_slices(probs, copies=8):
        misses = probs[rows].double()
        misses = misses.scatter_add(-1, labels[rows].unsqueeze(-1), misses.new_full((), -1.0).expand(len(misses), 1))
        scores.append(misses.square().sum(-1))
    return torch.cat(scores)


class BrierDecomposition(NamedTuple):
    """`brier = reliability - resolution + uncertainty + within_bin`, exactly; 0-d float64.

    Attributes:
        reliability: How far the mean forecast of a bin lies from what came true there (lower is better).
        resolution: How far bins differ from the base rate (higher is better).
        uncertainty: The score of the base rate itself.
        within_bin: What binning hides: variance of forecasts within bins less twice their covariance with outcomes.
    """

    reliability: Tensor
    resolution: Tensor
    uncertainty: Tensor
    within_bin: Tensor


def brier_decomposition(
    probs: object, targets: object, *, num_bins: int = 15, weights: object = None
) -> BrierDecomposition:
    """Return Murphy's parts of the Brier score, each class by itself over equal-width bins, summed over classes.

    References:
        A. Murphy (1973). A new vector partition of the probability score. Journal of Applied Meteorology.
        D. Stephenson et al. (2008). Two extra components in the Brier score decomposition. Weather and Forecasting.

    Examples:
        >>> parts = brier_decomposition([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7]], [0, 1, 1])
        >>> round(float(parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin), 6)
        0.513333
    """
    check_settings(num_bins, "width", "l1", False)
    values, labels = classified(probs, targets)
    per_row = element_weights(weights, targets, len(labels), labels.device)
    sums = BinnedSums.of_classes(values, labels, num_bins, per_row)
    count = sums.count.double()
    rows = count.sum(-1, keepdim=True)
    filled = count.where(count > 0, 1.0)
    score, rate, base = sums.score / filled, sums.hits / filled, sums.hits.sum(-1, keepdim=True) / rows
    share = count / rows
    variance = sums.score_squared - sums.score * score
    covariance = sums.score_hits - sums.score * rate
    return BrierDecomposition(
        reliability=(share * (score - rate).square()).sum(),
        resolution=(share * (rate - base).square()).sum(),
        uncertainty=(base * (1 - base)).sum(),
        within_bin=((variance - 2 * covariance) / rows).sum(),
    )
