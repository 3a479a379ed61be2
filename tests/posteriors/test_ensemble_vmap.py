"""Members without a batched form are computed at once under `vmap`: the loop's outputs, or the loop."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.posteriors import ensemble_prediction
from bayesguard.sampling.batched_calls import Unbatchable
from bayesguard.sampling.choice import Choice
from bayesguard.sampling.members import MemberBatch, check_batchable
from bayesguard.sampling.vmapped import VmappedMembers
from tests.networks import mlp

X = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Mixes(nn.Linear):
    """Takes the mean over the examples."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = super().forward(input)
        return hidden - hidden.mean(0)


class Quadratic(nn.Module):
    """Uses a parameter and a buffer in calls of its own."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))
        self.register_buffer("shift", torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,kij,nj->nk", x, self.weight, x).sort(-1).values + self.shift


class Tied(nn.Module):
    """Multiplies with one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(F.softshrink(self.one(x))).cumsum(-1)


class Branches(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        hidden = super().forward(input).cumsum(-1)
        return hidden if hidden.sum() > 0 else -hidden


class Counts(nn.Linear):
    passes = 0

    def forward(self, input: Tensor) -> Tensor:
        self.passes += 1
        return super().forward(input).cumsum(-1)


class CountsInABuffer(nn.Linear):
    passes: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.passes = self.passes + 1
        return super().forward(input)


class Overwrites(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp_(0)).cumsum(-1)


MAPPABLE: dict[str, Callable[[], nn.Module]] = {
    "mean over examples": lambda: Mixes(8, 3),
    "einsum": Quadratic,
    "tied": Tied,
    "cumsum": lambda: nn.Sequential(mlp(), Cumulates()),
}


class Cumulates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whatever is not the loop win wherever it is a candidate."""

    def fastest(candidates: dict[str, Any], device: torch.device) -> Choice:
        return Choice("", {name: float(name == "loop") for name in candidates})

    monkeypatch.setattr(ensemble_prediction, "fastest", fastest)


def ensemble_of(make: Callable[[], nn.Module], count: int = 3) -> bg.DeepEnsemble:
    ensemble = bg.DeepEnsemble([make() for _ in range(count)]).double()
    ensemble(X)
    return ensemble


def loop(ensemble: bg.DeepEnsemble, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([member.network(x.clone()) for member in ensemble.members])


@pytest.mark.parametrize("name", MAPPABLE)
def test_vmap_is_the_loop(name: str) -> None:
    networks = [MAPPABLE[name]().double().eval() for _ in range(2)]
    with pytest.raises(Unbatchable), torch.no_grad():
        check_batchable(networks, X)
    ensemble = ensemble_of(MAPPABLE[name])
    assert "3 members at once under vmap (measured: vmap 0 ms" in ensemble.strategy
    for rows in (1, 5, 7):
        for _ in range(2):
            want = loop(ensemble, X[:rows])
            assert torch.allclose(ensemble.draw_outputs(X[:rows]), want, rtol=0, atol=1e-10)
            assert torch.allclose(ensemble(X[:rows]).probs, want.softmax(-1).mean(0), rtol=0, atol=1e-10)
    assert "  cost: 3 members take the time of 0 plain passes" in ensemble.explain()


def test_vmap_is_not_tried_where_there_is_a_batched_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemberBatch, "vmapped", lambda *_: pytest.fail("vmap was tried"))
    assert "batched product" in ensemble_of(mlp).strategy


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Branches(8, 3), "vmap: .*data-dependent control flow"),
        (lambda: Overwrites(8, 3), "vmap: the network changes its input in place"),
    ],
)
def test_what_vmap_cannot_take_is_asked_one_after_another(make: Callable[[], nn.Module], why: str) -> None:
    ensemble = bg.DeepEnsemble([make() for _ in range(3)]).double()
    ensemble(X.clone())
    assert ensemble.strategy.startswith("3 members one after another (batched: there is no batched form of ")
    assert re.search(why, ensemble.explain())
    assert torch.allclose(ensemble.draw_outputs(X.clone()), loop(ensemble, X), rtol=0, atol=1e-10)


def test_why_members_are_not_stacked_is_said_once() -> None:
    ensemble = bg.DeepEnsemble([mlp().double() for _ in range(2)], copy=False)
    ensemble.network.eval()
    for member in ensemble.members:
        member.network.eval()
    ensemble(X)
    assert ensemble.strategy.count("copy=False") == 1


@pytest.mark.parametrize("make", [Counts, CountsInABuffer])
def test_a_network_that_changes_itself_is_refused(make: Callable[..., nn.Module]) -> None:
    networks = [make(8, 3).double().eval() for _ in range(2)]
    named = [{**dict(network.named_parameters()), **dict(network.named_buffers())} for network in networks]
    stacked = {name: torch.stack([own[name].detach() for own in named]) for name in named[0]}
    with torch.no_grad(), pytest.raises(Unbatchable, match="changes its attributes or replaces a buffer"):
        VmappedMembers(networks[0], stacked)(X)


def test_large_members_are_not_stacked_for_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble_prediction, "_MAX_VMAPPED", 3 * 27 - 1)
    assert "vmap: members are too large" in ensemble_of(lambda: Mixes(8, 3)).explain()
    monkeypatch.setattr(ensemble_prediction, "_MAX_VMAPPED", 3 * 27)
    assert "at once under vmap" in ensemble_of(lambda: Mixes(8, 3)).strategy


def test_vmap_follows_its_members() -> None:
    """Changes in place, training, loading, replacing and casting after the first prediction reach the next."""
    ensemble = ensemble_of(lambda: nn.Sequential(mlp(), Cumulates()))
    before = ensemble.draw_outputs(X)

    def follows() -> bool:
        x = X.to(next(ensemble.parameters()).dtype)
        now = ensemble.draw_outputs(x)
        changed = not torch.equal(now.double(), before)
        return changed and torch.allclose(now, loop(ensemble, x), rtol=0, atol=1e-6) and "vmap" in ensemble.strategy

    assert not follows()  # nothing has changed yet
    linear: Any = ensemble.members[1].network.get_submodule("0.0")
    linear.weight.data.mul_(3)
    assert follows()
    with torch.no_grad():
        linear.bias += 1
    assert follows()
    ensemble.members[2].network.load_state_dict(nn.Sequential(mlp(), Cumulates()).double().state_dict())
    assert follows()
    ensemble.fit((X, torch.randint(0, 3, (7,))), epochs=1)
    assert follows()
    linear.weight = nn.Parameter(torch.randn_like(linear.weight))
    assert follows()
    ensemble.float()
    assert follows()


def test_a_buffer_changed_in_place_is_followed() -> None:
    ensemble = ensemble_of(Quadratic)
    ensemble.members[0].network.get_buffer("shift").add_(5)
    assert torch.allclose(ensemble.draw_outputs(X), loop(ensemble, X), rtol=0, atol=1e-10)
