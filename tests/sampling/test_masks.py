"""Masks are multiplied slice by slice, and unpacked draw by draw where they are large: to the same bits."""

import pytest
import torch
from torch import Tensor

from bayesguard.sampling import masks
from bayesguard.sampling.masks import BatchAxis, Masks


def dropped_out(values: Tensor, *, per_example: bool = True, rate: float = 0.5, draw: int = 3) -> Tensor:
    made = Masks(0, [draw], [BatchAxis(0, 1, values.dim())], per_example=per_example)
    return made.multiply(values, rate, values.shape)


def kept(values: Tensor, rate: float = 0.5, draw: int = 3) -> Tensor:
    made = Masks(0, [draw], [BatchAxis(0, 1, values.dim())], per_example=True)
    return made.keep(values.shape, rate, values.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 300), (1, 2100), (5, 3, 400), (2100,)])
def test_slices_change_no_bit(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype).reshape(shape)
    want = values * kept(values) / 0.5
    for size in (1, 350, 1 << 17):
        monkeypatch.setattr(masks, "_SLICE", size)
        with torch.no_grad():
            assert torch.equal(dropped_out(values), want)
    values.requires_grad_()
    result = dropped_out(values)
    assert torch.equal(result.detach(), want)
    (gradient,) = torch.autograd.grad(result.sum(), values)
    assert torch.equal(gradient, kept(values).to(dtype) / 0.5)


def test_no_rows_and_other_orders_of_memory() -> None:
    with torch.no_grad():
        assert dropped_out(torch.ones(0, 2000)).shape == (0, 2000)
        values = torch.arange(6.0 * 500).reshape(500, 6).T
        assert torch.equal(dropped_out(values), values * kept(values) / 0.5)


def test_large_masks_are_unpacked_draw_by_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(1.0, 1 + 8 * 1000).reshape(8, 1000)
    at_once = [dropped_out(values, per_example=False, rate=0.3, draw=draw) for draw in range(9)]
    monkeypatch.setattr(masks, "_SMALL", 10)
    one_by_one = [dropped_out(values, per_example=False, rate=0.3, draw=draw) for draw in range(9)]
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))
    assert not torch.equal(at_once[0], at_once[1])
