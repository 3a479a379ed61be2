"""A compiled graph gives the plain draws, follows what changes, and is left where it cannot."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesguard.sampling import Forward, Sampler
from tests.networks import Attention, Recurrent, Residual, Transformer, mlp


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run recorded graphs as they are: no test has to wait for a compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


def outputs(network: nn.Module, x: Tensor, sampler: Sampler, num_samples: int = 40) -> Tensor:
    with torch.no_grad():
        return torch.cat(list(sampler.chunks(Forward(network.eval(), (x,), {}), num_samples=num_samples, seed=1)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: mlp(nn.Dropout(0.5)).double(), lambda: torch.randn(6, 8).double()),
    "residual": (lambda: Residual().double(), lambda: torch.randn(6, 1, 8, 8).double()),
    "transformer": (lambda: Transformer().double(), lambda: torch.randint(0, 11, (6, 5))),
    "attention": (lambda: Attention().double(), lambda: torch.randn(6, 5, 8).double()),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("per_example", [False, True])
def test_a_compiled_graph_is_exact(name: str, per_example: bool) -> None:
    torch.manual_seed(0)
    network, x = NETWORKS[name][0](), NETWORKS[name][1]()
    want = outputs(network, x, Sampler(strategy="loop", per_example=per_example))
    sampler = Sampler(compile=True, per_example=per_example)
    assert (outputs(network, x, sampler) - want).abs().max() < 1e-10
    assert sampler.last_plan is not None
    assert sampler.last_plan.strategy == "compiled"


def changed_weight(network: Any) -> None:
    with torch.no_grad():
        network[0].weight.mul_(2)


def replaced_weight(network: Any) -> None:
    network[0].weight = nn.Parameter(network[0].weight.detach() * 3)


def changed_rate(network: Any) -> None:
    network[2].p = 0.25


@pytest.mark.parametrize("change", [changed_weight, replaced_weight, changed_rate])
def test_a_compiled_graph_follows_what_changes(change: Callable[[Any], None]) -> None:
    network, x = mlp(nn.Dropout(0.5)), torch.randn(6, 8)
    sampler = Sampler(compile=True)
    before = outputs(network, x, sampler)
    change(network)
    got = outputs(network, x, sampler)
    assert (got - before).abs().max() > 1e-3
    assert torch.allclose(got, outputs(network, x, Sampler(strategy="loop")), atol=1e-5)


class LooksAtNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(-x if x.sum() > 0 else x))


def test_control_flow_that_follows_the_numbers_is_not_compiled_away() -> None:
    network, x = LooksAtNumbers(), torch.rand(6, 8)
    sampler = Sampler(compile=True)
    for signed in (x, -x):
        assert torch.allclose(
            outputs(network, signed, sampler), outputs(network, signed, Sampler(strategy="loop")), atol=1e-6
        )
    assert sampler.last_plan is not None
    assert sampler.last_plan.strategy != "compiled"
    assert "compiled: " in sampler.last_plan.reason


def test_what_cannot_be_batched_is_drawn_otherwise() -> None:
    network, x = Recurrent(), torch.randn(6, 5, 4)
    sampler = Sampler(compile=True)
    assert torch.allclose(outputs(network, x, sampler), outputs(network, x, Sampler(strategy="loop")), atol=1e-5)
    assert sampler.last_plan is not None
    assert sampler.last_plan.strategy != "compiled"
