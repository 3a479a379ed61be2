"""Draws that depend on one another: which belong together, and the error of a mean over groups of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesguard.predictive.numerics import wide

Groups = Tensor | None  # int64 [S] on the CPU, 0..G-1; None where every draw is a group of its own


def blocks(count: int, size: int) -> Groups:
    """Return the groups of `count` draws in consecutive blocks of `size`."""
    return None if size == 1 else torch.arange(count) // size


def numbered(groups: Tensor) -> Groups:
    """Return group labels as 0..G-1, or None where no two draws share one."""
    labels, numbers = torch.unique(groups.cpu(), return_inverse=True)
    return None if len(labels) == len(numbers) else numbers


def joined(groups: Sequence[Groups], counts: Sequence[int]) -> Groups:
    """Return the groups of all draws of several predictives with these numbers of draws; none is in two of them."""
    if all(part is None for part in groups):
        return None
    parts, start = [], 0
    for part, count in zip(groups, counts, strict=True):
        part = torch.arange(count) if part is None else part
        parts.append(part + start)
        start += int(part.max()) + 1 if count else 0
    return torch.cat(parts)


def variance_between(values: Tensor, weights: Tensor, groups: Groups) -> Tensor:
    """Return the weighted (biased) variance of the groups' means of float64 values `[S, ...]`."""
    share = _column(weights, values)
    mean = (share * values).sum(0)
    if groups is not None:
        weights = group_weights(weights, groups)
        sums = values.new_zeros(len(weights), *values.shape[1:])
        sums.index_add_(0, _placed(groups, values), share * values)
        share = _column(weights, values)
        values = sums / share.clamp_min(torch.finfo(share.dtype).tiny)
    return (share * (values - mean).square()).sum(0)


def group_weights(weights: Tensor, groups: Groups) -> Tensor:
    """Return the total weight of every group, `[G]`."""
    if groups is None:
        return weights
    totals = weights.new_zeros(int(groups.max()) + 1)
    return totals.index_add_(0, _placed(groups, weights), weights)


def error_factor(weights: Tensor, groups: Groups) -> float:
    """Return what turns the variance between groups into the squared error of the mean; infinite for one group.

    A group's mean has variance t sum_s w_s^2 / w_g^2 (sums over its draws, t unknown), and groups are independent. The
    mean over all then has variance t C, and the variance between groups is expected to be t (D - C), with
    C = sum_s w_s^2 and D = sum_s w_s^2 / w_g: the factor is C / (D - C), 1 / (G - 1) for G equal groups.
    """
    weights = wide(weights.cpu())
    square = weights.square()
    totals = group_weights(weights, groups)
    own = totals if groups is None else totals[groups]
    spent = float(square.sum())
    spread = float((square / own.clamp_min(torch.finfo(own.dtype).tiny)).sum())
    return spent / (spread - spent) if spread - spent > 1e-12 * spread else float("inf")


def _placed(groups: Tensor, like: Tensor) -> Tensor:
    # The host waits for a device with a copy to it, unless told not to; it does not write to these numbers again.
    return groups.to(like.device, non_blocking=True)


def _column(weights: Tensor, values: Tensor) -> Tensor:
    return weights.reshape(-1, *[1] * (values.dim() - 1))
