"""A few numbers as Python's floats: one torch operation takes as long as ten or twenty of theirs."""

from array import array
from collections.abc import Iterable
from math import exp, isfinite, log
from operator import mul, truediv

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Up to about here floats were measured to be faster, for a prediction of five or ten members.
_FEW = 100
# Below this the logarithm of a float64 probability loses digits.
UNDERFLOW = 1e-290


def are_few(tensor: Tensor) -> bool:
    """Whether these are a few numbers in the host's memory, and nobody differentiates, maps, traces or watches them."""
    return (
        0 < tensor.numel() <= _FEW
        and type(tensor) is Tensor
        and tensor.is_cpu
        and not tensor.requires_grad
        and forward_ad._current_level < 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def pooled_of_few(log_probs: Tensor, weights: Tensor | None) -> list[float] | None:
    """Return the log-probabilities `[N ... K]` of the mixture of a few draws `[S, N, ..., K]`, flat and in order.

    Args:
        log_probs: In any precision; the sums are of float64.
        weights: Of the draws, `[S]`; None for equal ones.

    Returns:
        None where that takes more care: a probability is too small, or not a number.
    """
    draws = (log_probs if log_probs.dim() == 3 else log_probs.flatten(1, -2)).tolist()
    shares = [1 / len(draws)] * len(draws) if weights is None else weights.tolist()
    pooled: list[float] = []
    try:
        for row in zip(*draws, strict=True):
            probs = [list(map(exp, draw)) for draw in row]
            # Rows are normalised here: their sums may be off by float32 rounding.
            scales = list(map(truediv, shares, map(sum, probs)))
            pooled += [sum(map(mul, scales, column)) for column in zip(*probs, strict=True)]
    except (OverflowError, ZeroDivisionError):  # Logarithms of rows that are far from normalised.
        return None
    # Where one is NaN the smallest may be any of them, but the sum is NaN.
    return list(map(log, pooled)) if min(pooled) >= UNDERFLOW and isfinite(sum(pooled)) else None


def tensor_of(values: Iterable[float], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return numbers as a tensor of float32 or float64; by way of NumPy, or of `torch.tensor`, it takes twice as long."""
    return torch.frombuffer(array("f" if dtype == torch.float32 else "d", values), dtype=dtype).view(shape)
