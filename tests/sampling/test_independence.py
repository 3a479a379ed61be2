"""Draws share a batch, or are made in parts of it, only where an example's outputs are its own for any numbers beside it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput
from bayesguard.sampling import Forward, Sampler, planning
from bayesguard.sampling.independence import mixing_of
from tests.networks import Attention, Recurrent, Residual, Transformer, mlp


class Gated(nn.Module):
    """Takes one of two ways for the whole batch; nothing is read on the host."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.drop, self.after = nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 3)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.before(x).relu())
        return torch.where(self.gate(h), self.after(h), -self.after(h))


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "a sum above a bound": lambda h: h.sum() > 60,
    "a sum below a bound": lambda h: h.sum() < 60,
    "a largest number": lambda h: h.amax() > 1e3,
    "a number of rows alone": lambda h: (h.mean(1) > 0.5).sum() > 2,
}
SEPARATE: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "gated by its own sum": (lambda: Gated(lambda h: h.sum(1, keepdim=True) > 1), (torch.randn(5, 4),)),
    "mlp": (lambda: mlp(nn.Dropout(0.5)), (torch.randn(5, 8),)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), (torch.randn(5, 4),)),
    "residual": (Residual, (torch.randn(5, 1, 8, 8),)),
    "transformer": (Transformer, (torch.randint(0, 11, (5, 7)),)),
    "attention": (Attention, (torch.randn(5, 6, 8),)),
    "lstm": (Recurrent, (torch.randn(5, 7, 4),)),
    "lstm packed": (lambda: Recurrent(packed=True), (torch.randn(3, 7, 4), torch.tensor([7, 5, 2]))),
    "a single row": (lambda: mlp(nn.Dropout(0.5)), (torch.randn(1, 8),)),
}


@pytest.mark.parametrize("gate", MIXING)
def test_a_gate_over_the_batch_is_seen_whichever_way_it_goes(gate: str) -> None:
    network = Gated(MIXING[gate]).eval()
    for x in (torch.randn(6, 4), 100 * torch.randn(6, 4), torch.zeros(1, 4)):
        assert mixing_of(Forward.__call__, Forward(network, (x,), {})).endswith("(the network mixes examples)")


@pytest.mark.parametrize("name", SEPARATE)
@torch.no_grad()
def test_examples_of_their_own_are_left_alone(name: str) -> None:
    make, inputs = SEPARATE[name]
    assert mixing_of(Forward.__call__, Forward(make().eval(), inputs, {})) == ""
    kept = [tensor.clone() for tensor in inputs]
    assert all(map(torch.equal, kept, inputs))


def test_a_network_that_refuses_such_numbers_says_nothing() -> None:
    class Strict(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if not input.isfinite().all():
                raise ValueError("numbers must be finite")
            return super().forward(input)

    assert mixing_of(Forward.__call__, Forward(Strict(4, 3), (torch.randn(6, 4),), {})) == ""


@pytest.mark.parametrize("strategy", ["fold", "fold_tail"])
def test_draws_that_share_a_batch_are_refused(strategy: Any) -> None:
    torch.manual_seed(0)
    x = 100 + torch.randn(6, 4)  # all draws go the same way
    for gate, refused in ((lambda h: h.sum() > 60, True), (lambda h: h.sum(1, keepdim=True) > 60, False)):
        predictor = bg.MCDropout(Gated(gate), strategy=strategy)
        if refused:
            with pytest.raises(BadInput, match="mixes examples"):
                predictor(x)
        else:
            predictor(x)


def test_the_automatic_choice_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be the loop's on the data of the first prediction, and others on that of the next."""
    torch.manual_seed(0)
    seconds = {"replay": 1.0, "compact": 1.0, "vmap": 1.0, "fold_tail": 1e-3, "fold": 1e-3}
    monkeypatch.setattr(planning, "_seconds", lambda draws, name, numbers: seconds[name])
    monkeypatch.setattr(planning, "_sharing_may_pay", lambda *arguments: True)
    for mixes in (True, False):
        network = Gated((lambda h: h.sum() > 60) if mixes else (lambda h: h.sum(1, keepdim=True) > 60)).eval()
        auto = Sampler()
        for x in (100 + torch.randn(2, 4), 2 * torch.randn(2, 4)):
            forward = Forward(network, (x,), {})
            got = torch.cat(list(auto.chunks(forward, num_samples=16, seed=1)))
            want = torch.cat(list(Sampler(strategy="loop").chunks(forward, num_samples=16, seed=1)))
            assert torch.allclose(got, want, atol=1e-5)
        assert auto.last_plan is not None
        assert auto.last_plan.strategy.startswith("fold") != mixes


class Added(nn.Module):
    """Adds one tensor for all examples, as long as there are rows in a trial."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.drop, self.after = nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        outputs: Tensor = self.after(self.drop(self.before(x + positions))).mean(1)
        return outputs


@pytest.mark.parametrize("length", [4, 5])
def test_an_input_for_all_examples_is_not_taken_for_theirs(length: int) -> None:
    inputs = (torch.randn(16, length, 8), torch.randn(length, 8))
    assert mixing_of(Forward.__call__, Forward(Added().eval(), inputs, {})) == ""
    bg.MCDropout(Added(), strategy="fold")(*inputs)


def test_a_network_that_cannot_be_copied_is_not_taken_for_separate() -> None:
    network = Gated(MIXING["a sum above a bound"]).eval()
    network.register_module("lock", Locked().eval())
    predictor = bg.MCDropout(network, copy=False, strategy="fold")
    with pytest.raises(BadInput, match="cannot be copied"):
        predictor(100 + torch.randn(6, 4))


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
