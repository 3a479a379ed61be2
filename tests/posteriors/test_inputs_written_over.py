"""Networks that write over their inputs: every draw and member starts from what was given, which stays as it is."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from tests.chosen_ways import choose_way

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 0, 1])


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.outer(torch.tanh(self.inner(x)))
        return outputs


class Doubles(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2).add_(1))


class Doubles2(Layers):
    """Behind torch's count of changes."""

    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(2)
        return super().forward(x)


class Doubles3(Layers):
    """Large inputs alone, which those of the first call are not."""

    def forward(self, x: Tensor) -> Tensor:
        x[x.abs() > 100] *= 2
        return super().forward(x)


class Clears(Layers):
    """After it has read them."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        x.zero_()
        return outputs


def _rectified() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))


MAKE: list[Callable[[], nn.Module]] = [Doubles, Doubles2, Doubles3, Clears, _rectified]


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double().eval()


def under(network: nn.Module, x: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """The outputs of a copy, on a copy of the inputs."""
    copied = deepcopy(network)
    with torch.no_grad():
        for name, value in (weights or {}).items():
            copied.get_parameter(name).copy_(value)
        outputs: Tensor = copied(x.clone())
    return outputs


def check(predictor: bg.Predictor, want: Callable[[Tensor], Tensor]) -> None:
    for x in (X, 200 * X, X[:1]):
        given, outputs = x.clone(), want(x)
        for _ in range(2):
            got = predictor.draw_outputs(given, num_samples=len(outputs))
            assert torch.allclose(got, outputs, rtol=0, atol=1e-10)
            probs = predictor(given, num_samples=len(outputs)).probs
            assert torch.allclose(probs, outputs.softmax(-1).mean(0), rtol=0, atol=1e-10)
            assert torch.equal(given, x)


@pytest.mark.parametrize("make", MAKE)
def test_one_network(make: Callable[[], nn.Module]) -> None:
    predictor = bg.Deterministic(made(make))
    check(predictor, lambda x: under(predictor.network, x).unsqueeze(0))


@pytest.mark.parametrize("way", ["loop", "batched", "vmap"])
@pytest.mark.parametrize("make", MAKE)
def test_members(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], way: str) -> None:
    choose_way(monkeypatch, way)
    ensemble = bg.DeepEnsemble([made(make, seed) for seed in range(3)])
    check(ensemble, lambda x: torch.stack([under(member.network, x) for member in ensemble.members]))


@pytest.mark.parametrize("way", ["loop", "mirrored pairs", "vectorised", "shared features"])
@pytest.mark.parametrize("make", MAKE)
def test_draws_of_weights(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], way: str) -> None:
    choose_way(monkeypatch, way)
    subset = "last_layer" if way == "shared features" else "all"
    predictor = bg.Variational(made(make), init_scale=0.3, subset_of_weights=subset)
    weights = predictor.weight_draws(11)
    each = [{name: own[draw] for name, own in weights.items()} for draw in range(11)]
    check(predictor, lambda x: torch.stack([under(predictor.network, x, own) for own in each]))


def test_pairs_are_still_mirrored_where_inputs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way(monkeypatch, "mirrored pairs")
    predictor = bg.Variational(made(Layers), init_scale=0.3)
    predictor(X)
    assert predictor.strategy.startswith("mirrored pairs")


@pytest.mark.parametrize("make", MAKE)
def test_the_loss_of_members_on_one_batch(make: Callable[[], nn.Module]) -> None:
    ensemble, given = bg.DeepEnsemble([made(make, seed) for seed in range(3)]), X.clone()
    loss = ensemble.loss(given, TARGETS, num_data=5)
    logits = [under(member.network, X) for member in ensemble.members]
    want = sum(float(nn.functional.cross_entropy(own, TARGETS)) for own in logits)
    assert abs(loss.item() - want) < 1e-10


@pytest.mark.parametrize("make", MAKE)
def test_the_potential_of_chains_is_the_same_at_every_step(make: Callable[[], nn.Module]) -> None:
    from bayesguard.posteriors.mcmc import _PotentialOf

    predictor, given = bg.HMC(made(make)), X.clone()
    potential = _PotentialOf(predictor, ((given,), {}), TARGETS)
    flat = predictor.weights.flatten().detach()
    first, second = potential(flat), potential(flat)
    assert torch.equal(first, second)
    assert torch.equal(given, X)
