"""Whether two ways of computing the same thing agree: to the rounding of sums in another order."""

import torch
from torch import Tensor

# Two kernels for one matrix product differ by a few roundings of its sum. Half precision, whose sums are of float32,
# rounds what each layer gives; a thousand of its roundings would hide any fault.
_ROUNDINGS = 2.0**10
_ROUNDINGS_OF_HALF = 2.0**4


def rounding_of(dtype: torch.dtype) -> float:
    """Return the relative difference that another order of summing may make."""
    half = torch.finfo(dtype).bits < 32
    return (_ROUNDINGS_OF_HALF if half else _ROUNDINGS) * torch.finfo(dtype).eps


def difference(got: Tensor, want: Tensor) -> str:
    """Say how `got` differs from what the plain loop gives, by more than rounding; empty where it does not."""
    if got.shape != want.shape:
        return f"it gives outputs of shape {tuple(got.shape)} where the loop gives {tuple(want.shape)}"
    if got.dtype != want.dtype:
        return f"it gives outputs of {got.dtype} where the loop gives {want.dtype}"
    scale = want.abs().amax().float().nan_to_num(posinf=1.0).item()
    if not torch.allclose(got, want, rtol=0, atol=rounding_of(want.dtype) * scale, equal_nan=True):
        return "its outputs differ from the plain loop's"
    return ""


def first_line(error: Exception) -> str:
    """Return the first line of what an error says; empty where it says nothing."""
    return str(error).strip().partition("\n")[0]
