"""The exponential integral E1, scaled so that it neither overflows nor underflows."""

from typing import Any

import torch
from torch import Tensor

_EULER = 0.5772156649015329
_TERMS, _DEPTH = 24, 60  # float64 accuracy on both sides of 1.5


class _ScaledE1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.double()
        value = torch.where(wide < 1.5, _series(wide.clamp_max(1.5)), _fraction(wide.clamp_min(1.5))).to(x.dtype)
        ctx.save_for_backward(x, value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, value = ctx.saved_tensors
        return gradient * (value - 1 / x)


def scaled_exponential_integral(x: Tensor) -> Tensor:
    """Return exp(x) E1(x) for positive x, differentiable once.

    References:
        Abramowitz, Stegun, 1964, equations 5.1.11 (series) and 5.1.22 (continued fraction).

    Examples:
        >>> scaled_exponential_integral(torch.tensor([1.0]))
        tensor([0.5963])
    """
    value: Tensor = _ScaledE1.apply(x)  # type: ignore[no-untyped-call]
    return value


def _series(x: Tensor) -> Tensor:
    total, term = -_EULER - x.log(), torch.ones_like(x)
    for k in range(1, _TERMS):
        term = -term * x / k
        total = total - term / k
    return x.exp() * total


def _fraction(x: Tensor) -> Tensor:
    # 1 / (x + 1 - 1 / (x + 3 - 4 / (x + 5 - ...))), from the far end.
    tail = x + 2 * _DEPTH + 1
    for k in range(_DEPTH, 0, -1):
        tail = x + 2 * k - 1 - k * k / tail
    return 1 / tail
