"""What every predictive needs from arithmetic: float64 where the device has it, and bounded intermediates."""

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bayesguard.checks import as_tensor

# Elements of one float64 intermediate: 4 million are 32 MB, large enough that the Python loop costs nothing.
BUDGET = 1 << 22
# Elements of a slice that several reductions read in turn on a CPU: 1 MB of float32, which stays in its cache.
CACHED = 1 << 18

# Just below the 32 MiB up to which glibc lets its thresholds follow what is freed.
_LARGEST_KEPT = (1 << 25) - (1 << 14)


def wide(value: Tensor) -> Tensor:
    """Return `value` in float64, the precision of every sum here (float32 on MPS, which has nothing wider)."""
    return value.float() if value.device.type == "mps" else value.double()


def as_floating(value: object, name: str) -> Tensor:
    """Return `value` as a tensor of float32 at least: half precision is for networks, not for probabilities."""
    tensor = as_given(value, name)
    if not isinstance(value, (Tensor, np.ndarray)):
        tensor = tensor.to(torch.get_default_dtype())
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def as_given(value: object, name: str) -> Tensor:
    """Return `value` as a tensor, Python numbers in float64: a level of 0.1 in float32 is another level."""
    if isinstance(value, (int, float, list, tuple)):
        # Not torch.as_tensor, which would round to float32 and put it on whatever device is the default.
        try:
            array = np.asarray(value)
        except ValueError:  # Rows of unequal length, which as_tensor has words for.
            return as_tensor(value, name)
        return torch.from_numpy(array) if array.dtype.kind in "biuf" else as_tensor(value, name)
    return as_tensor(value, name)


def unfilled(like: Tensor) -> Tensor:
    """Return a contiguous tensor of the shape, dtype and device of `like`, whose values are whatever lay there.

    On a CPU it is NumPy's memory, which asks the system for huge pages: fetching small ones takes longer than filling them.
    """
    if like.device.type != "cpu":
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.from_numpy(np.empty(like.shape, np.float32 if like.dtype == torch.float32 else np.float64))


@cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MiB that one step frees for the next, as in any process that freed 32 MiB before.

    glibc gives large blocks back to the system until it has seen one of their size freed. Fetching them anew, zeroed
    page by page, was a third of the time of a step of ten LeNets, and of randomised APS sets in slices. The block made here
    is not touched: it costs nothing.
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8, device="cpu")


def slices(total: int, cost: int) -> Iterator[slice]:
    """Cut `total` rows of `cost` elements each into slices of at most BUDGET elements (one row at least)."""
    step = max(1, BUDGET // max(cost, 1))
    if total > step:
        keep_freed_memory()
    for start in range(0, max(total, 1), step):  # no rows make one empty slice, so that shapes and dtypes survive
        yield slice(start, min(start + step, total))


def in_slices(compute: Callable[[slice], Tensor], total: int, cost: int) -> Tensor:
    """Concatenate `compute(rows)` over the slices of `total` rows."""
    return torch.cat([compute(rows) for rows in slices(total, cost)])
