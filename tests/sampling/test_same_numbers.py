"""Whether tensors hold the same numbers is told by the numbers, whatever changed them and whatever torch counted."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bayesguard.sampling.same_numbers import copies, same_numbers


def step(weight: Tensor) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.Adam([weight], lr=0.1, fused=True).step()


# How a weight is changed, and whether torch's count of its changes goes up.
CHANGES: dict[str, tuple[Callable[[Tensor], object], bool]] = {
    "in place": (lambda weight: torch.no_grad()(weight.mul_)(2), True),
    "data": (lambda weight: weight.data.mul_(2), False),
    "data of one": (lambda weight: weight.data[1, 2].add_(1), False),
    "NumPy": (lambda weight: weight.detach().numpy().fill(3), False),
    "transposed": (lambda weight: setattr(weight, "data", weight.data.t().contiguous()), False),
    "fused step": (step, False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_changes_are_seen(change: str, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(3, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)))
    tensors = [torch.zeros(0), weight, torch.zeros(())]
    kept, version = copies(tensors), weight._version
    assert same_numbers(kept, tensors)
    CHANGES[change][0](weight)
    assert not same_numbers(kept, tensors)
    assert (weight._version > version) == CHANGES[change][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex128, torch.int64, torch.bool])
def test_numbers_of_any_kind(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
    kept = copies([tensor])
    assert same_numbers(kept, [tensor])
    assert not same_numbers(kept, [tensor.flip(0)])
    assert not same_numbers(kept, [])
    assert not same_numbers(kept, [tensor.reshape(1, 3)])
    assert not same_numbers(kept, [torch.zeros(3, dtype=torch.float32)])


def test_nan_is_the_same_as_itself_and_zeros_have_a_sign() -> None:
    nan = torch.tensor([float("nan")])
    assert same_numbers(copies([nan]), [nan])
    assert not same_numbers([torch.zeros(1)], [-torch.zeros(1)])
