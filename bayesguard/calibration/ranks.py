"""The rank that makes a quantile of n scores a guarantee for the next one, with and without weights."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import torch
from torch import Tensor

from bayesguard.checks import check_finite, check_level
from bayesguard.errors import BadInput, CalibrationWarning


def conformal_rank(count: int, alpha: float) -> int:
    """Return k such that the k-th smallest of `count` scores is the bound: the smallest with k >= (n + 1)(1 - alpha).

    Computed in exact arithmetic on the decimal that was typed: in floats, 0.3 of 10 rounds to the wrong side. It is
    `count + 1` where there are too few scores for any bound.

    Examples:
        >>> conformal_rank(19, 0.1), conformal_rank(9, 0.7), conformal_rank(8, 0.1)
        (18, 3, 9)
    """
    return count + 1 - math.floor(Fraction(repr(check_level(alpha, "alpha"))) * (count + 1))


def enough_for(alpha: float) -> int:
    """Return how many scores the first finite bound at `alpha` needs."""
    return math.ceil(1 / Fraction(repr(check_level(alpha, "alpha")))) - 1


def conformal_quantile(scores: Tensor, alpha: float) -> float:
    """Return the bound that the next score, exchangeable with these, does not exceed with probability `1 - alpha`.

    Infinity, with a warning, where there are too few scores.

    Args:
        scores: `[n]`, finite or infinite.
        alpha: Mis-coverage.

    References:
        Vovk, Gammerman, Shafer, 2005, Algorithmic learning in a random world; Papadopoulos et al., 2002, ECML.

    Examples:
        >>> conformal_quantile(torch.arange(1.0, 20.0), alpha=0.1)
        18.0
    """
    check_scores(scores)
    rank = conformal_rank(len(scores), alpha)
    if rank > len(scores):
        warn_too_few(len(scores), alpha)
        return math.inf
    return float(scores.kthvalue(rank).values)


def weighted_bounds(scores: Tensor, weights: Tensor, own: Tensor, alpha: float) -> Tensor:
    """Return a bound for each new example under weights: the quantile in which its own weight stands at infinity.

    Args:
        scores: `[n]`, in ascending order.
        weights: Of the scores, `[n]`, not negative: how much likelier each example is under the new distribution.
        own: Weights of the new examples `[N]`.
        alpha: Mis-coverage.

    References:
        Tibshirani, Foygel Barber, Candès, Ramdas, 2019, NeurIPS, corollary 1.
    """
    mass = weights.cumsum(0)
    needed = (1 - check_level(alpha, "alpha")) * (mass[-1] + own)
    # Rounding of the sum must not move a bound that is met exactly.
    place = torch.searchsorted(mass, needed * (1 - 1e-12))
    bounds = torch.cat([scores, scores.new_full((1,), torch.inf)])[place]
    lost = int((place == len(scores)).sum())
    if lost:
        warnings.warn(
            f"{lost} of {len(own)} new examples weigh more than alpha={alpha} of all weight, and nothing can be left out "
            "for them: more held-out data like them are needed",
            CalibrationWarning,
            stacklevel=4,
        )
    return bounds


def check_scores(scores: Tensor) -> None:
    """Raise BadInput unless there are scores, none of them NaN."""
    if scores.dim() != 1 or not len(scores):
        raise BadInput(f"scores must be [n] with at least one, got shape {tuple(scores.shape)}")
    check_finite(scores.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0), "scores")


def warn_too_few(count: int, alpha: float, where: str = "") -> None:
    """Warn that nothing can be left out."""
    warnings.warn(
        f"{count} held-out examples{where} are too few for alpha={alpha}: {enough_for(alpha)} are needed before anything "
        "can be left out, and sets hold everything",
        CalibrationWarning,
        stacklevel=5,
    )
