"""Layers on the inputs, for two mirrored samples at once: the loop's outputs, and only where that is so."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bayesguard as bg
from bayesguard.sampling import Forward


class Views(nn.Module):
    """Two branches on views of one input, one of which writes over what its layer gave; one layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(12, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        hidden = F.relu_(self.left(flat)) + self.right(flat[:, :6]).sin_() * self.right(flat[:, :6])
        return self.head(hidden)


class RandomShift(nn.Module):
    """A bias that is computed from random weights, and inputs that were."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(5, 12)), nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x.flatten(1), self.weight, self.shift.exp()))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(80, 3)
    )


def predictor_of(make: Callable[[], nn.Module], **settings: Any) -> bg.Variational:
    torch.manual_seed(0)
    return bg.Variational(make().double(), init_scale=0.3, **settings)


X = torch.randn(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def both(predictor: bg.Variational, draws: int) -> tuple[Tensor, Tensor]:
    flats = predictor._flats(0, range(draws))
    forward = Forward(predictor.network, (X,), {})
    return tuple(predictor._outputs._way(way, forward)(flats) for way in ("mirrored pairs", "loop"))  # type: ignore[return-value]


@pytest.mark.parametrize("make", [Views, mlp, convolution])
@pytest.mark.parametrize("draws", [2, 7, 8])
@pytest.mark.parametrize("subset", ["all", "weights"])
def test_outputs_are_those_of_the_loop(make: Callable[[], nn.Module], draws: int, subset: str) -> None:
    chosen: Any = "all" if subset == "all" else lambda name, parameter: "weight" in name
    predictor = predictor_of(make, subset_of_weights=chosen)
    got, want = both(predictor, draws)
    assert torch.allclose(got, want, atol=1e-12)
    # The twin: pairs that are none. Every second draw is then that of the first's mirror image.
    independent = predictor_of(make, subset_of_weights=chosen, antithetic=False)
    got, want = both(independent, draws)
    assert torch.allclose(got[::2], want[::2], atol=1e-12)
    assert not torch.allclose(got[1::2], want[1::2], atol=1e-3)


@pytest.mark.parametrize("family", ["normal", "low_rank", "full", "radial", "matrix_normal"])
def test_chunks_share_the_mean_and_keep_their_pairs(family: str) -> None:
    predictor = predictor_of(mlp, guide=family)
    forward = Forward(predictor.network, (X,), {})
    flats = predictor._flats(0, range(8))
    run = predictor._outputs._way("mirrored pairs", forward)
    pieces = torch.cat([run(flats[:4]), run(flats[4:7])])
    assert torch.allclose(pieces, predictor._outputs._way("loop", forward)(flats[:7]), atol=1e-12)


def test_only_layers_on_the_inputs_count() -> None:
    predictor = predictor_of(RandomShift)
    with pytest.raises(bg.errors.UnsupportedNetwork, match="takes the inputs themselves"):
        both(predictor, 4)
    outputs = predictor.draw_outputs(X, num_samples=4)
    loop = predictor._outputs._way("loop", Forward(predictor.network, (X,), {}))
    assert torch.allclose(outputs, loop(predictor._flats(0, range(4))), atol=1e-12)


def test_inputs_that_change_are_seen() -> None:
    """Draws of a pair would start from other inputs where a network writes over them."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.body(x.mul_(1.5))
            return outputs

    predictor = predictor_of(Growing)
    run = predictor._outputs._way("mirrored pairs", Forward(predictor.network, (X,), {}))
    before = X.clone()
    with pytest.raises(bg.errors.UnsupportedNetwork, match="writes over its inputs"):
        run(predictor._flats(0, range(4)))
    assert torch.equal(X, before)


class Products(TorchFunctionMode):
    """Counts the products of layers, by the size of their inputs, as they come out of other modes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self.counts[args[0].shape[1]] += 1
        return func(*args, **(kwargs or {}))


def test_products_that_are_left() -> None:
    predictor = predictor_of(mlp)
    flats, forward = predictor._flats(0, range(8)), Forward(predictor.network, (X,), {})
    for way, want in (("loop", 8), ("mirrored pairs", 5)):
        with Products() as products:
            predictor._outputs._way(way, forward)(flats)
        assert products.counts == {12: want, 8: 8}


@pytest.mark.parametrize(("settings", "want"), [({}, True), ({"antithetic": False}, False), ({"guide": "flow"}, False)])
def test_who_uses_it(settings: dict[str, Any], want: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = predictor_of(mlp, **settings)
    offered: list[list[str]] = []
    real = predictor._outputs._candidates

    def candidates(*args: Any) -> list[str]:
        offered.append(real(*args))
        return offered[-1]

    monkeypatch.setattr(predictor._outputs, "_candidates", candidates)
    predictor.draw_outputs(X, num_samples=4)
    assert ["mirrored pairs" in ways for ways in offered] == [want]
    predictor._outputs._plans.clear()
    predictor.draw_outputs(X, num_samples=1)
    # Draws that start in the middle of a pair.
    list(predictor.output_chunks(X, num_samples=4, seed=0, first_draw=1))
    assert "mirrored pairs" not in offered[-1]
