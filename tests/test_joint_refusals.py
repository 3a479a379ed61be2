"""Members, and optimizers, with which one vectorised pass would silently train something else."""

import random
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayesguard.data import Batch
from bayesguard.errors import BadInput
from bayesguard.joint import StackedMembers, can_train_jointly, fit_jointly, member_loss, try_jointly
from bayesguard.posteriors import Deterministic
from bayesguard.training import fit

INPUTS = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3
DATA = (INPUTS, LABELS)
BATCH = Batch((INPUTS,), {}, LABELS)


def member(*layers: nn.Module) -> Any:
    return Deterministic(nn.Sequential(*layers), copy=False).double()


def plain() -> Any:
    return member(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


def members(make: Callable[[], nn.Module], count: int = 3) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [make() for _ in range(count)]


def difference_from_one_after_another(together: list[nn.Module], **settings: Any) -> float:
    """Train copies one after another and the members together; return the largest difference of a number."""
    apart = deepcopy(together)
    fit_jointly(together, DATA, epochs=2, batch_size=8, **settings)
    for own in apart:
        fit(own, partial(member_loss, own), DATA, epochs=2, batch_size=8, **settings)
    pairs = [
        pair for a, b in zip(together, apart, strict=True) for pair in zip(a.parameters(), b.parameters(), strict=True)
    ]
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


def in_order(names: str) -> nn.Module:
    parts: dict[str, nn.Module] = {"linear": nn.Linear(3, 3), "tanh": nn.Tanh()}
    return member(nn.Sequential(OrderedDict((name, parts[name]) for name in names.split())))


def tied_at(place: int) -> nn.Module:
    """Three layers, of which the last shares a weight with the first or with the second."""
    layers = [nn.Linear(3, 3) for _ in range(3)]
    layers[2].weight = layers[place].weight
    return member(*layers)


def used_twice(place: int) -> nn.Module:
    """Three calls of two layers."""
    layers = [nn.Linear(3, 3), nn.Linear(3, 3)]
    return member(*layers, layers[place])


def holding(value: Any) -> nn.Module:
    own = plain()
    own.network.held = value
    return own


class InSlots:
    __slots__ = ("__dict__", "rate")

    def __init__(self, rate: float) -> None:
        self.rate = rate


class Named(dict[str, int]):
    def __init__(self, name: str) -> None:
        super().__init__(a=1)
        self.name = name


def ignored(module: nn.Module, of_inputs: Any, of_outputs: Any) -> None:
    """A hook."""


def hooked() -> list[nn.Module]:
    """Two of one network with a hook: hooks are known by their number, and only copies have the same."""
    own = plain()
    own.network[0].register_full_backward_hook(ignored)
    return [own, deepcopy(own)]


def with_hook(register: Callable[[Any], object]) -> list[nn.Module]:
    made: list[Any] = members(plain, 2)
    for own in made:
        register(own.network[0])
    return made


REFUSED: list[tuple[list[nn.Module], str]] = [
    ([in_order("linear tanh"), in_order("tanh linear")], "hold their modules in another order"),
    ([tied_at(0), tied_at(1)], "a parameter is used at other places"),
    ([used_twice(0), used_twice(1)], "a parameter is used at other places"),
    ([holding({"a": 1, "b": 2}), holding({"b": 2, "a": 1})], "attribute network.held differs"),
    ([holding(random.Random(0)), holding(random.Random(1))], "attribute network.held differs"),
    ([holding(InSlots(0.1)), holding(InSlots(0.2))], "attribute network.held differs"),
    ([holding(Named("a")), holding(Named("b"))], "attribute network.held differs"),
    ([holding(np.zeros(2)), holding(np.ones(2))], "attribute network.held differs"),
    (with_hook(lambda layer: layer.weight.register_hook(lambda gradient: 0 * gradient)), "weight has hooks"),
    (with_hook(lambda layer: layer.weight.register_post_accumulate_grad_hook(print)), "weight has hooks"),
    (hooked(), "network.0 has backward hooks"),
]


@pytest.mark.parametrize(("modules", "reason"), REFUSED)
def test_members_that_differ_in_more_than_numbers(modules: list[nn.Module], reason: str) -> None:
    able, why = can_train_jointly(modules, BATCH)
    assert not able
    assert reason in why
    with pytest.raises(BadInput, match=f"{reason}.*one after another"):
        StackedMembers(modules)


@pytest.mark.parametrize("value", [{"a": [1, 2.0]}, InSlots, np.ones(2), (1, "a", None), {1, 2}])
@pytest.mark.parametrize("tied", [tied_at, used_twice])
def test_members_that_differ_in_numbers_alone(value: Any, tied: Callable[[int], nn.Module]) -> None:
    together: list[Any] = members(lambda: tied(0))
    for own in together:
        own.network.held = deepcopy(value)
    assert can_train_jointly(together) == (True, "")


def test_a_layer_that_is_used_twice_is_batched() -> None:
    together = members(lambda: used_twice(0))
    assert try_jointly(together, BATCH) == ("", True)
    assert difference_from_one_after_another(together) < 1e-12


def test_a_list_that_a_pass_changes_is_seen() -> None:
    class Growing(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.passes: list[int] = []

        def forward(self, input: Tensor) -> Tensor:
            self.passes.append(1)
            return super().forward(input) * len(self.passes)

    able, reason = can_train_jointly(members(lambda: member(Growing())), BATCH)
    assert not able
    assert reason.endswith("attribute network.0.passes differs")


def decayed_matrices(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Weight decay for matrices alone, told by their axes: a bias of all members is a matrix, too."""
    matrices, others = ([p for p in parameters if (p.dim() > 1) is many] for many in (True, False))
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}], lr=0.1
    )


class Clipping(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        value = closure()
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.01)
        return super().step(lambda: value)


def with_step_hook(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    made = torch.optim.SGD(parameters, lr=0.1)
    made.register_step_pre_hook(lambda *_: None)
    return made


def of_vectors(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in parameters if p.dim() == 1], lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (decayed_matrices, "treats parameters by their shape"),
        (partial(Clipping, lr=0.1), "Clipping may mix"),
        (with_step_hook, "SGD may mix"),
        (of_vectors, "cannot be made for stacked parameters"),
    ],
)
def test_optimizers_that_would_treat_stacked_parameters_otherwise(optimizer: Any, reason: str) -> None:
    together = members(plain)
    able, why = can_train_jointly(together, BATCH, optimizer=optimizer)
    assert not able
    assert reason in why
    with pytest.raises(BadInput, match=reason):
        fit_jointly(together, DATA, epochs=1, optimizer=optimizer)


def test_groups_by_place_are_fine() -> None:
    """What an optimizer tells apart by the order of parameters is told apart among stacked ones, too."""

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": parameters[:1], "lr": torch.tensor(0.2)}, {"params": parameters[1:], "weight_decay": 0.1}]
        return torch.optim.SGD(groups, lr=0.05)

    together = members(plain)
    assert can_train_jointly(together, BATCH, optimizer=optimizer) == (True, "")
    assert difference_from_one_after_another(together, optimizer=optimizer) < 1e-12


def test_the_comparison_would_see_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesguard.joint._why_not_elementwise", lambda *_: "")
    assert difference_from_one_after_another(members(plain), optimizer=decayed_matrices) > 1e-3
    monkeypatch.setattr("bayesguard.joint.why_not_alike", lambda _: "")
    assert difference_from_one_after_another([tied_at(0), tied_at(1)]) > 1e-4
