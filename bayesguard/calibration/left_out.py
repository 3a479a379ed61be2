"""What cross-conformal predictors share: which fits speak for a row that they did not see, and the ends of intervals.

R. F. Barber, E. J. Candès, A. Ramdas, R. J. Tibshirani (2021). Predictive inference with the jackknife+. Annals of
Statistics 49. B. Kim, C. Xu, R. F. Barber (2020). Predictive inference is free with the jackknife+-after-bootstrap. NeurIPS.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.calibration.ranks import conformal_rank, warn_too_few
from bayesguard.checks import check_finite, check_level, check_shape
from bayesguard.errors import BadInput, CalibrationWarning
from bayesguard.predictive.numerics import as_given, slices


def cross_interval(
    predictions: object, targets: object, seen: object, new: object, alpha: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Return CV+ and jackknife+ intervals from point predictions alone, in the target's unit.

    Each of M fits saw some of n rows. What is said of row i without it is the mean of the fits that did not see it; its
    residual `R_i` is the distance of the target from that. With `m_i(x)` the same fits' mean at a new input, the ends are
    the `floor(alpha (n + 1))`-th smallest of `m_i(x) - R_i` and the `ceil((1 - alpha)(n + 1))`-th of `m_i(x) + R_i`.
    One fit a fold gives CV+, one a row jackknife+, one a bootstrap sample jackknife+ after the bootstrap.

    For exchangeable rows coverage is at least `1 - 2 alpha` for jackknife+, with CV+ less `sqrt(2 / n)`; nearly always it
    is near `1 - alpha`.

    Args:
        predictions: Of each fit for each row `[M, n]`; what it says of rows that it saw is not used.
        targets: Of the rows `[n]`.
        seen: Which rows each fit saw, bool `[M, n]`.
        new: Predictions of each fit for N new inputs `[M, N]`.
        alpha: Mis-coverage.

    Returns:
        Lower and upper ends, float64 `[N]`.

    Raises:
        BadInput: Shapes that do not fit, values that are not finite, or no row that any fit did not see.

    References:
        Barber et al., 2021, eqs. 5 and 11, theorems 1 and 4; Kim et al., 2020, algorithm 1.

    Examples:
        >>> y = torch.arange(20.0)
        >>> without = (y.sum() - y) / 19  # the mean of the other rows, as the fit that did not see a row
        >>> lower, upper = cross_interval(without[:, None].expand(20, 20), y, ~torch.eye(20).bool(), without[:, None])
        >>> lower, upper
        (tensor([0.], dtype=torch.float64), tensor([19.], dtype=torch.float64))
    """
    given, y, at_new = (as_given(each, "values").double() for each in (predictions, targets, new))
    plan = LeftOut.of(as_given(seen, "seen"))
    check_shape(given, plan.unseen.shape, "predictions")
    check_shape(y, given.shape[1:], "targets")
    if at_new.dim() != 2 or len(at_new) != len(given):
        raise BadInput(f"new has shape {tuple(at_new.shape)}, but [M, N] with M = {len(given)} fits is needed")
    held = torch.where(plan.unseen, given, 0.0)
    for name, value in (("predictions", held), ("targets", y), ("new", at_new)):
        check_finite(value, name)
    held = (held * plan.shares[plan.which].T).sum(0)
    residuals = (y - held).abs().masked_fill(plan.never_left_out, torch.inf)
    return left_out_ends(
        at_new.T, torch.zeros_like(at_new.T), residuals, plan, check_level(alpha, "alpha"), widths=False
    )


class LeftOut(NamedTuple):
    """Which fits speak for which row: their shares in the `L` different mixtures, and the mixture of each row."""

    unseen: Tensor  # bool [M, n]
    shares: Tensor  # float64 [L, M]
    which: Tensor  # [n]
    never_left_out: Tensor  # bool [n]

    @classmethod
    def of(cls, seen: Tensor) -> LeftOut:
        if seen.dim() != 2 or seen.dtype != torch.bool:
            raise BadInput(f"seen must be bool [M, n], got {seen.dtype} of shape {tuple(seen.shape)}")
        unseen = ~seen
        never = ~unseen.any(0)
        lost = int(never.sum())
        if lost == seen.shape[1]:
            raise BadInput("every predictor saw every row, and no row can be scored by one that did not see it")
        if lost:
            warnings.warn(
                f"{lost} of {len(never)} rows were seen by all {len(seen)} predictors; they count as the strangest, and sets "
                "are larger for it: more members are needed",
                CalibrationWarning,
                stacklevel=4,
            )
        patterns, which = unseen.T.unique(dim=0, return_inverse=True)
        weights = torch.where(patterns.any(1, keepdim=True), patterns, True).double()
        return cls(unseen, weights / weights.sum(1, keepdim=True), which, never)


def left_out_ends(
    mean: Tensor, variance: Tensor, scores: Tensor, plan: LeftOut, alpha: float, *, widths: bool
) -> tuple[Tensor, Tensor]:
    """Return the ends `[N]` from the fits' means and variances `[N, M]` at new inputs, and the rows' scores `[n]`.

    Args:
        mean: Of each fit.
        variance: Of each fit; used with `widths` only.
        scores: Distances, or with `widths` distances in standard deviations of the row's mixture.
        plan: Which fits speak for which row.
        alpha: Mis-coverage.
        widths: Whether scores are in standard deviations.
    """
    count = len(scores)
    rank = conformal_rank(count, alpha)
    if rank > count:
        warn_too_few(count, alpha)
        end = mean.new_full((len(mean),), torch.inf)
        return -end, end
    lower, upper = [], []
    for rows in slices(len(mean), count * (4 + 2 * widths * mean.shape[1])):
        centre = mean[rows] @ plan.shares.T
        unit = torch.ones_like(centre)
        if widths:
            apart = mean[rows].unsqueeze(1) - centre.unsqueeze(-1)
            unit = ((variance[rows].unsqueeze(1) + apart.square()) * plan.shares).sum(-1).sqrt()
        centre, reach = centre[:, plan.which], unit[:, plan.which] * scores
        lower.append((centre - reach).kthvalue(count + 1 - rank, dim=1).values)
        upper.append((centre + reach).kthvalue(rank, dim=1).values)
    low, high = torch.cat(lower), torch.cat(upper)
    # With alpha above one half the ends may cross; their middle stands for an empty interval.
    middle = (low + high) / 2
    crossed = low > high
    return torch.where(crossed, middle, low), torch.where(crossed, middle, high)
