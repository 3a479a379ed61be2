"""What changes in a network after its first predictions, beside its numbers, is in the next one."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.posteriors.weight_outputs import head_of
from bayesguard.sampling import Forward, derive_seed
from tests.chosen_ways import choose_way
from tests.posteriors.test_inputs_written_over import X, made, under


def _square() -> nn.Module:
    return nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.Tanh(), c=nn.Linear(4, 4), d=nn.Linear(4, 3)))


class Shifted(nn.Linear):
    """Adds a buffer that it may have."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, input: Tensor) -> Tensor:
        scaled = super().forward(input) * self.get_buffer("scale")
        return scaled + self.get_buffer("shift") if "shift" in self._buffers else scaled


def _reordered(network: Any) -> None:
    """The same layers under the same names: `nn.Sequential` runs them in the order in which it got them."""
    for name in ("a", "b", "d"):
        network.add_module(name, network._modules.pop(name))


def _shifted(network: Any) -> None:
    network.register_buffer("shift", torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("places", [[0, 1, 2], [2]])
@pytest.mark.parametrize(("make", "change"), [(_square, _reordered), (Shifted, _shifted)])
def test_members_of_a_batched_product(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], change: Callable[[Any], None], places: list[int]
) -> None:
    choose_way(monkeypatch, "batched")
    ensemble = bg.DeepEnsemble([made(make, seed) for seed in range(3)])
    ensemble(X)
    assert "batched product" in ensemble.strategy
    before = ensemble.draw_outputs(X)
    for place in places:
        change(ensemble.members[place].network)
    want = torch.stack([under(member.network, X) for member in ensemble.members])
    assert not torch.allclose(want[places], before[places], rtol=0, atol=0.05)
    for _ in range(2):
        assert torch.allclose(ensemble.draw_outputs(X), want, rtol=0, atol=1e-10)
        assert torch.allclose(ensemble(X).probs, want.softmax(-1).mean(0), rtol=0, atol=1e-10)


def test_a_member_that_becomes_random(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way(monkeypatch, "batched")
    ensemble = bg.DeepEnsemble([made(lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), s) for s in range(2)])
    ensemble(X)
    assert "batched product" in ensemble.strategy
    # The very network that is part of the product.
    ensemble.network._modules["1"] = bg.MCDropout(ensemble.members[1].network, copy=False)
    outputs = [
        member.draw_outputs(X, seed=derive_seed(5, "member", index)) for index, member in enumerate(ensemble.members)
    ]
    assert [*map(len, outputs)] == [1, 32]
    assert torch.equal(ensemble.draw_outputs(X, seed=5), torch.cat(outputs))
    want = torch.stack([own.softmax(-1).mean(0) for own in outputs]).mean(0)
    assert torch.allclose(ensemble(X, seed=5).probs, want, rtol=0, atol=1e-10)


class Noisy(nn.Module):
    """Random in eval mode, which nothing but two passes shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.dropout(self.layer(x).mean((2, 3)), 0.5, True)


@pytest.mark.parametrize("way", ["loop", "channels last"])
@pytest.mark.filterwarnings("ignore:the network is random in eval mode")
def test_a_member_whose_new_network_is_random_by_itself(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    choose_way(monkeypatch, way)
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)

    def plain() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 3, 2), nn.AvgPool2d(3), nn.Flatten())

    ensemble = bg.DeepEnsemble([made(plain, seed) for seed in range(2)])
    assert torch.allclose(ensemble.draw_outputs(x)[1], under(ensemble.members[1].network, x), rtol=0, atol=1e-10)
    assert ("channels last in memory" in ensemble.strategy) == (way == "channels last")
    ensemble.network._modules["1"] = bg.Deterministic(made(Noisy))
    state = torch.get_rng_state()
    first, again, other = (ensemble.draw_outputs(x, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def _doubled_input(module: nn.Module, args: Any) -> Any:
    return (2 * args[0],)


def _looked_at(module: nn.Module, args: Any, outputs: Tensor) -> Tensor:
    return outputs if float(outputs.sum()) > 0 else -outputs


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook before the last layer": lambda network: network[-1].register_forward_pre_hook(_doubled_input),
    "a hook that reads numbers": lambda network: network[-1].register_forward_hook(_looked_at),
    "one more layer": lambda network: network.append(nn.Tanh().eval()),
}


@pytest.mark.parametrize("way", ["mirrored pairs", "vectorised", "shared features", "loop"])
@pytest.mark.parametrize("change", CHANGES)
def test_draws_of_weights(monkeypatch: pytest.MonkeyPatch, change: str, way: str) -> None:
    choose_way(monkeypatch, way)
    subset = "last_layer" if way == "shared features" else "all"
    network = made(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    predictor = bg.Variational(network, init_scale=0.3, subset_of_weights=subset)
    predictor(X, num_samples=11)
    assert predictor.strategy.startswith(way)
    before = predictor.draw_outputs(X, num_samples=11)
    CHANGES[change](predictor.network)
    weights = predictor.weight_draws(11)
    want = torch.stack(
        [under(predictor.network, X, {n: own[draw] for n, own in weights.items()}) for draw in range(11)]
    )
    assert not torch.allclose(want, before, rtol=0, atol=0.05)
    for _ in range(2):
        assert torch.allclose(predictor.draw_outputs(X, num_samples=11), want, rtol=0, atol=1e-10)


def test_an_error_of_the_network_is_its_own_and_costs_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way(monkeypatch, "vectorised")
    predictor = bg.Variational(made(lambda: nn.Embedding(5, 3)), init_scale=0.3)
    x = torch.tensor([[0], [1]])
    predictor.draw_outputs(x)
    with pytest.raises(IndexError):
        predictor.draw_outputs(x + 7)
    predictor.draw_outputs(x)
    assert predictor.strategy.startswith("vectorised")


def test_a_way_that_fails_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way(monkeypatch, "vectorised")
    predictor = bg.Variational(made(lambda: nn.Sequential(nn.Linear(4, 3))), init_scale=0.3)
    predictor.draw_outputs(X)
    predictor.network.get_submodule("0").register_forward_hook(_looked_at)
    predictor.draw_outputs(X)
    assert predictor.strategy.startswith("loop (vectorised: ")
    monkeypatch.setattr(torch, "vmap", None)
    predictor.draw_outputs(X)


def test_chains_of_a_last_layer_with_a_hook_go_through_it_once() -> None:
    network: Any = made(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))
    predictor = bg.HMC(network, subset_of_weights="last_layer")
    own: Any = predictor.network
    assert head_of(Forward(own, (X,), {}), predictor.weights) is not None
    own[-1].register_forward_pre_hook(_doubled_input)
    assert head_of(Forward(own, (X,), {}), predictor.weights) is None
