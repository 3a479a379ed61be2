"""Calibration by groups of examples, which may overlap, and of the worst of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, check_count, check_level, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.bootstrap import basic_interval
from bayesguard.metrics.functional.binned import BinnedSums, bin_index
from bayesguard.metrics.functional.inputs import answered
from bayesguard.metrics.state import resampled
from bayesguard.sampling import stream


class GroupCalibration(NamedTuple):
    """How far groups are from calibration; float64 `[G]`, NaN for a group without rows, unless said otherwise.

    Attributes:
        group: Label of each group, or its column, int64.
        rows: How many it has, int64.
        accuracy: Share of rows whose most probable class is right.
        confidence: Mean probability of the most probable class.
        gap: `accuracy - confidence`; below zero, the group is told more than is true.
        lower, upper: Intervals of the gaps, which hold for all groups at once.
        error: Debiased calibration error over bins, "l2"; see `expected_calibration_error`.
        error_lower, error_upper: Its intervals, each for one group by itself.
        worst: Place of the group with the largest `|gap|` among those with rows, 0-d int64.
        worst_gap: The largest `|gap|` of any group, 0-d.
        worst_lower, worst_upper: Its interval, for the group that is truly the worst, whichever that is, 0-d.
    """

    group: Tensor
    rows: Tensor
    accuracy: Tensor
    confidence: Tensor
    gap: Tensor
    lower: Tensor
    upper: Tensor
    error: Tensor
    error_lower: Tensor
    error_upper: Tensor
    worst: Tensor
    worst_gap: Tensor
    worst_lower: Tensor
    worst_upper: Tensor


def group_calibration(
    probs: object,
    targets: object,
    groups: object,
    *,
    num_bins: int = 15,
    confidence_level: float = 0.95,
    num_resamples: int = 200,
    seed: int = 0,
) -> GroupCalibration:
    """Return the calibration of each group, and of the worst with the multiplicity of looking at all accounted for.

    The gap of accuracy and mean confidence has Clopper and Pearson's interval at level `1 - alpha / G`, less the mean
    confidence. Given the inputs, rows are right independently, each with a chance of its own, and G intervals hold at once
    with probability `1 - alpha` at least, however groups overlap (Bonferroni; Hoeffding, 1956, for chances that differ).
    So the largest absolute gap lies between the largest lower and the largest upper bound of absolute gaps.

    The calibration error tells a group that is too sure here and not sure enough there, whose gap is zero. Its interval is
    a bootstrap of the rows, for one group at a time, and approximate.

    Args:
        probs: `[N, K]`, rows that sum to 1; for yes or no, stack `[1 - p, p]`.
        targets: Class labels `[N]`.
        groups: Bool `[N, G]`, a column for each group, or one label for each row, integers `[N]`.
        num_bins: Bins of equal width of the calibration error.
        confidence_level: 1 - alpha.
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        BadInput: No rows, rows that are no distribution, groups of another shape, or no group with rows.
        BadType: Groups that are neither bool nor integers.

    References:
        Clopper, Pearson, 1934, Biometrika 26; Hoeffding, 1956, Annals of Mathematical Statistics 27, theorem 5.

    Examples:
        >>> probs = torch.tensor([0.8, 0.2]).repeat(200, 1)
        >>> labels, group = torch.arange(200) % 5 // 4, torch.arange(200) % 2
        >>> labels[group == 1] = torch.arange(100) % 2  # half right, where 80 % are promised
        >>> found = group_calibration(probs, labels, group)
        >>> found.worst.item(), [round(abs(value), 2) for value in found.gap.tolist()]
        (1, [0.0, 0.3])
        >>> found.worst_lower.item() > 0.15
        True
    """
    check_count(num_bins, "num_bins")
    check_count(num_resamples, "num_resamples")
    check_level(confidence_level, "confidence_level")
    values = as_tensor(probs, "probs")
    if values.dim() != 2:
        raise BadInput(f"probs has shape {tuple(values.shape)}, but [N, K] is needed")
    confidence, right = answered(values, targets)
    confidence = confidence.double()
    names, members = _columns(groups, len(right), right.device)
    if not bool(members.any()):
        raise BadInput("groups has no row in any group")
    index = bin_index(confidence, num_bins, "width")
    errors = [
        _error(index[rows], confidence[rows], right[rows], num_bins, confidence_level, num_resamples, seed)
        for rows in members.T
    ]
    error, error_lower, error_upper = torch.tensor(errors, dtype=torch.float64, device=right.device).T
    found = gaps(confidence, right, members, 1 - confidence_level)
    return GroupCalibration(
        group=names, error=error, error_lower=error_lower, error_upper=error_upper, **found._asdict()
    )


class Gaps(NamedTuple):
    """What `GroupCalibration` says about gaps."""

    rows: Tensor
    accuracy: Tensor
    confidence: Tensor
    gap: Tensor
    lower: Tensor
    upper: Tensor
    worst: Tensor
    worst_gap: Tensor
    worst_lower: Tensor
    worst_upper: Tensor


def gaps(confidence: Tensor, right: Tensor, members: Tensor, alpha: float) -> Gaps:
    """Return the gaps of groups `[N, G]`, with intervals that hold at once but for a probability of `alpha`."""
    count, belongs = members.sum(0), members.double()
    filled = count > 0
    hits, mean = right @ belongs, confidence @ belongs / count
    low, high = _clopper_pearson(hits, count, alpha / int(filled.sum()))
    gap, lower, upper = hits / count - mean, low - mean, high - mean
    worst = gap.abs().masked_fill(~filled, -1).argmax()
    least = torch.maximum(lower, -upper).clamp_min(0)[filled].max()
    most = torch.maximum(upper, -lower)[filled].max()
    return Gaps(count, hits / count, mean, gap, lower, upper, worst, gap.abs()[worst], least, most)


def _columns(groups: object, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the groups' labels `[G]` and bool `[N, G]`."""
    values = as_tensor(groups, "groups").to(device)
    if values.dtype == torch.bool:
        check_shape(values, (count, values.shape[-1] if values.dim() == 2 else 1), "groups")
        return torch.arange(values.shape[1], device=device), values
    if values.is_floating_point() or values.is_complex():
        raise BadType(f"groups must be bool [N, G] or integer labels [N], got {values.dtype}")
    check_shape(values, (count,), "groups")
    names = values.long().unique()
    return names, values.long().unsqueeze(-1) == names


def _clopper_pearson(hits: Tensor, count: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the exact interval of a binomial share at level `1 - alpha`; NaN where nothing was counted."""
    from scipy.special import betaincinv

    k, n = hits.cpu().numpy(), count.double().cpu().numpy()
    low = betaincinv(k.clip(0.5), n - k + 1, alpha / 2)
    high = betaincinv(k + 1, (n - k).clip(0.5), 1 - alpha / 2)
    lower, upper = torch.from_numpy(low).to(hits), torch.from_numpy(high).to(hits)
    lower, upper = lower.masked_fill(hits < 0.5, 0.0), upper.masked_fill(count - hits < 0.5, 1.0)
    return lower.masked_fill(count == 0, torch.nan), upper.masked_fill(count == 0, torch.nan)


def _error(
    index: Tensor, confidence: Tensor, right: Tensor, num_bins: int, level: float, num_resamples: int, seed: int
) -> tuple[float, float, float]:
    """The debiased calibration error of one group, and its bootstrap interval."""
    if not len(right):
        return torch.nan, torch.nan, torch.nan
    sums = BinnedSums.of(confidence, right, index, num_bins)
    found = float(sums.error("l2", debiased=True))
    drawn = resampled(sums, num_resamples, stream("cpu", seed, "bootstrap of sums")).errors("l2", debiased=True)
    return found, *basic_interval(found, drawn.clamp_min(0).sqrt(), level, (0.0, 1.0))
