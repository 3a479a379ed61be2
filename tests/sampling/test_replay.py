"""What replay computes once, and how it notices that it must not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesguard.sampling import Forward, Sampler
from tests.networks import Recurrent, mlp


def outputs(network: nn.Module, x: Tensor, strategy: Any, num_samples: int = 12) -> Tensor:
    with torch.no_grad():
        forward = Forward(network.eval(), (x,), {})
        return torch.cat(list(Sampler(strategy=strategy).chunks(forward, num_samples=num_samples, seed=1)))


def layers_computed(function: Callable[[], Any], kernel: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The recurrent kernel's calls that really run."""
    seen: list[int] = []
    plain = getattr(torch, kernel)

    def counted(*args: Any) -> Any:
        seen.append(len(seen))
        return plain(*args)

    from bayesguard.sampling import intercept

    handler = intercept.HANDLERS[plain]
    monkeypatch.setitem(intercept.HANDLERS, plain, lambda mode, func, *args: handler(mode, counted, *args))
    function()
    return seen


def test_the_first_recurrent_layer_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = Recurrent(layers=2), torch.randn(3, 5, 4)
    sampler = Sampler(strategy="replay")
    forward = Forward(network.eval(), (x,), {})
    with torch.no_grad():
        list(sampler.chunks(forward, num_samples=2, seed=1))
        seen = layers_computed(lambda: list(sampler.chunks(forward, num_samples=12, seed=1)), "lstm", monkeypatch)
    # Once the layer before the dropout, and twelve times the one behind it.
    assert len(seen) == 13


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_stack_that_starts_from_the_tape_is_exact(kind: Any) -> None:
    torch.manual_seed(0)
    network, x = Recurrent(kind).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    assert torch.equal(outputs(network, x, "replay"), outputs(network, x, "loop"))


class LooksAtNumbers(nn.Module):
    """Reads numbers of the prefix, branches on them, and calls a list of layers as long as they say."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.head = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        scale = hidden.abs().mean().item()
        if hidden.sum() > 0:
            hidden = -hidden
        for _ in range(int(hidden.argmax().item()) % 3 + 1):
            hidden = hidden / max(scale, 1e-6)
        return self.head(self.drop(hidden))


class DrawsFirst(nn.Module):
    """Makes its random call before anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.net = nn.Dropout(0.5), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(x))


class ChangesAfterwards(nn.Module):
    """Changes in place, behind the dropout, what was computed before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.head = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        dropped = self.drop(hidden)
        hidden.mul_(2)
        return self.head(dropped + hidden)


class CallsVary(nn.Module):
    """Makes another number of calls before its dropout in every pass: a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.passes = nn.Linear(8, 8), nn.Dropout(0.5), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        for _ in range(self.passes % 3):
            x = x + 0
        return self.drop(self.first(x))


@pytest.mark.parametrize("make", [LooksAtNumbers, DrawsFirst, ChangesAfterwards, CallsVary])
@pytest.mark.parametrize("strategy", ["replay", "compact", "auto"])
def test_habits_that_could_mislead_a_replay(make: Callable[[], nn.Module], strategy: Any) -> None:
    torch.manual_seed(0)
    network, x = make().double(), torch.randn(5, 8, dtype=torch.float64)
    want = outputs(network, x, "loop")
    got = outputs(network, x, strategy)
    assert want.std(dim=0).max() > 1e-3
    assert (got - want).abs().max() < 1e-10


def test_a_change_between_predictions_is_seen() -> None:
    network, x = mlp(nn.Dropout(0.5)).eval(), torch.randn(5, 8)
    sampler = Sampler(strategy="compact")
    forward = Forward(network, (x,), {})
    with torch.no_grad():
        list(sampler.chunks(forward, num_samples=12, seed=1))
        network[0].weight.mul_(2)  # type: ignore[operator]
        network[-1].weight.mul_(3)  # type: ignore[operator]
        x.add_(1)
        got = torch.cat(list(sampler.chunks(forward, num_samples=12, seed=1)))
    assert torch.allclose(got, outputs(network, x, "loop"), atol=1e-5)
