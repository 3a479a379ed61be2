"""Roots of many monotone functions at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from bayesguard.errors import BadInput

Function = Callable[[Tensor], Tensor]
_MOST_STEPS = 200


def bracket(function: Function, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Widen `[lower, upper]`, doubling it, until an increasing function is <= 0 at one end and >= 0 at the other."""
    step = upper - lower
    for _ in range(1100):  # as many doublings as lead from 1 to the largest float64
        low, high = function(lower) > 0, function(upper) < 0
        if not (low.any() or high.any()):
            return lower, upper
        lower, upper = torch.where(low, lower - step, lower), torch.where(high, upper + step, upper)
        step = torch.where(low | high, 2 * step, step)
    raise BadInput("a quantile could not be bracketed; are the parameters of the predictive finite?")


def find_root(function: Function, lower: Tensor, upper: Tensor) -> Tensor:
    """Return roots of an increasing function, elementwise, in brackets where it changes sign.

    Chandrupatla's method: inverse quadratic interpolation where it can be trusted, otherwise bisection, so it
    never takes many more steps than bisection and usually about ten.

    Args:
        function: Elementwise and increasing.
        lower: Points where it is <= 0.
        upper: Points where it is >= 0.

    Returns:
        The roots, to a relative accuracy of 1e-14 of the larger of root and bracket's rounding.

    References:
        Chandrupatla, 1997, Advances in Engineering Software 28; Scherer, 2013, Computational Physics, section 6.1.7.
    """
    a, b = upper, lower
    fa, fb = function(a), function(b)
    share = torch.full_like(a, 0.5)
    for _ in range(_MOST_STEPS):
        x = a + share * (b - a)
        fx = function(x)
        same = (fx < 0) == (fa < 0)
        c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
        b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
        a, fa = x, fx
        best = torch.where(fa.abs() < fb.abs(), a, b)
        width = (b - a).abs()
        limit = 1e-14 * best.abs() / width.clamp_min(torch.finfo(width.dtype).tiny)
        done = (limit > 0.5) | (fa == 0) | (fb == 0) | (width == 0)
        if done.all():
            break
        share = torch.where(_trusted(a, b, c, fa, fb, fc), _interpolated(a, b, c, fa, fb, fc), 0.5)
        share = torch.minimum(torch.maximum(share, limit), 1 - limit).clamp(0, 1)
        share = torch.where(done, 0.0, share)
    return torch.where(fa.abs() <= fb.abs(), a, b)


def _trusted(a: Tensor, b: Tensor, c: Tensor, fa: Tensor, fb: Tensor, fc: Tensor) -> Tensor:
    xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
    return (phi.square() < xi) & ((1 - phi).square() < 1 - xi)


def _interpolated(a: Tensor, b: Tensor, c: Tensor, fa: Tensor, fb: Tensor, fc: Tensor) -> Tensor:
    return fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
