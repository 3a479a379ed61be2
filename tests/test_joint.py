"""Members trained in one vectorised pass are the members trained one after another."""

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesguard import likelihoods
from bayesguard.data import Batch
from bayesguard.errors import BadInput
from bayesguard.joint import (
    StackedMembers,
    can_train_jointly,
    clip_member_gradients,
    fit_jointly,
    member_loss,
    try_jointly,
)
from bayesguard.posteriors import Deterministic
from bayesguard.sampling import batched_calls
from bayesguard.training import fit

_SOURCE = torch.Generator().manual_seed(0)
INPUTS = torch.randn(24, 3, dtype=torch.float64, generator=_SOURCE)
TARGETS = torch.randn(24, 2, dtype=torch.float64, generator=_SOURCE)
DATA = (INPUTS, TARGETS)
BATCH = Batch((INPUTS,), {}, TARGETS)


class _Member(nn.Module):
    """What an ensemble has M of: a network and its objective."""

    def __init__(self, *layers: nn.Module, noise: bool = False) -> None:
        super().__init__()
        self.network = nn.Sequential(*layers)
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.noise = noise

    def loss(self, inputs: Any, targets: Tensor, *, num_data: int) -> Tensor:
        residual = (self.network(inputs) - targets) * torch.exp(-self.log_scale)
        prior = sum((parameter.square().sum() for parameter in self.parameters()), torch.zeros(()))
        return residual.square().mean() + self.log_scale + prior / num_data


class _Counter(nn.Module):
    """Replaces its buffer instead of changing it in place."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.total = self.total + inputs.detach().square().sum()
        return inputs


def _members(make: Callable[[], nn.Module], count: int = 3) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.set_rng_state(torch.Generator().manual_seed(1).get_state())
        return [make().double().eval() for _ in range(count)]


def _plain() -> _Member:
    return _Member(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def _normalised() -> nn.Module:
    return _Member(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def _counting() -> nn.Module:
    return _Member(nn.Linear(3, 5), _Counter(), nn.Linear(5, 2))


def _tied() -> nn.Module:
    member = _Member(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 2))
    member.network[2].weight = member.network[0].weight
    return member


def _frozen() -> nn.Module:
    member = _plain()
    member.network[0].requires_grad_(False)
    return member


def _one_after_another(members: list[nn.Module], **settings: Any) -> None:
    for member in members:
        fit(member, functools.partial(member_loss, member), DATA, **settings)


def _largest_difference(a: list[nn.Module], b: list[nn.Module]) -> float:
    pairs = zip(a, b, strict=True)
    return max(
        float((x.double() - y.double()).abs().max())
        for one, other in pairs
        for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": functools.partial(torch.optim.Adam, lr=0.02),
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("make", [_plain, _normalised, _counting, _tied, _frozen])
def test_joint_training_is_training_one_after_another(
    make: Callable[[], nn.Module], optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    together, apart = _members(make), _members(make)
    assert can_train_jointly(together, BATCH, optimizer=optimizer) == (True, "")
    settings: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 7,
        "seed": 4,
        "optimizer": optimizer,
        "gradient_clip": 0.7,
    }
    start = deepcopy(apart)
    fit_jointly(together, DATA, **settings)
    _one_after_another(apart, **settings)
    assert _largest_difference(together, apart) < 1e-12
    assert _largest_difference(together, start) > 1e-3


def test_clipping_all_members_as_one_would_be_seen() -> None:
    together, apart = _members(_plain), _members(_plain)
    stacked = StackedMembers(together)
    settings: dict[str, Any] = {"epochs": 3, "optimizer": OPTIMIZERS["sgd"], "gradient_clip": 0.7}
    fit(stacked, stacked.loss, DATA, **settings)
    stacked.write_back()
    _one_after_another(apart, **settings)
    assert _largest_difference(together, apart) > 1e-3


def test_gradients_are_clipped_as_torch_clips_each_member() -> None:
    members = _members(_plain)
    stacked = StackedMembers(members)
    stacked.loss(BATCH, 24).sum().backward()
    norms = clip_member_gradients(list(stacked.parameters()), 0.7)
    for index, member in enumerate(members):
        member_loss(member, BATCH, 24).backward()
        expected = nn.utils.clip_grad_norm_(member.parameters(), 0.7)
        assert norms[index] == pytest.approx(expected.item(), rel=1e-12)
    for joint, *own in zip(stacked.parameters(), *(member.parameters() for member in members), strict=True):
        assert torch.allclose(joint.grad, torch.stack([p.grad for p in own]), rtol=1e-12)


def test_b8_every_member_draws_masks_of_its_own() -> None:
    first = _members(lambda: _Member(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 2)), 1)[0]
    stacked = StackedMembers([first, deepcopy(first)])
    with torch.random.fork_rng():
        torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
        random, steady = stacked.train().loss(BATCH, 24), stacked.eval().loss(BATCH, 24)
    # Members with the same numbers: only their masks can tell them apart.
    assert random[0] != random[1]
    assert steady[0] == steady[1]


def test_b1_b4_live_modules_are_only_read_until_they_are_written() -> None:
    members = _members(_normalised)
    before, ids = deepcopy(members), [id(tensor) for member in members for tensor in member.parameters()]
    stacked = StackedMembers(members)
    fit(stacked, stacked.loss, DATA, epochs=2)
    assert _largest_difference(members, before) == 0.0
    assert not any(part.training for member in members for part in member.modules())
    stacked.write_back()
    assert _largest_difference(members, before) > 1e-4
    assert ids == [id(tensor) for member in members for tensor in member.parameters()]
    assert all(parameter.is_leaf and parameter.grad is None for m in members for parameter in m.parameters())


def test_b9_batch_statistics_reach_the_members() -> None:
    members = _members(_normalised)
    fit_jointly(members, DATA, epochs=2, batch_size=8)
    for member in members:
        assert int(member.state_dict()["network.1.num_batches_tracked"]) == 6


def _with_rate(rate: float) -> nn.Module:
    return _Member(nn.Linear(3, 5), nn.Dropout(rate), nn.Linear(5, 2))


def _with_activation(activation: Callable[[Tensor], Tensor]) -> nn.Module:
    member = _plain()
    member.activation = activation  # type: ignore[assignment]
    return member


def _sharing() -> list[nn.Module]:
    first, second = _members(_plain, 2)
    second.network[0] = first.network[0]  # type: ignore[index, operator]
    return [first, second]


B10_CASES: list[tuple[list[nn.Module], str]] = [
    ([_plain().double(), _counting().double()], "different classes"),
    ([_Member(nn.Linear(3, 2)), _Member(nn.Linear(3, 2, bias=False))], r"parameter network.0.bias"),
    ([_Member(nn.Linear(3, 2)), _Member(nn.Linear(3, 4))], r"network.0.bias differs in shape"),
    ([_plain(), _frozen()], "requires_grad"),
    ([_plain(), _plain().eval()], "attribute training differs"),
    ([_with_rate(0.1), _with_rate(0.2)], r"attribute network.1.p differs"),
    ([_with_activation(torch.relu), _with_activation(torch.tanh)], "attribute activation differs"),
    (_sharing(), "share parameters"),
    ([nn.LSTM(3, 2), nn.LSTM(3, 2)], "no rule for LSTM"),
    ([], "there are none"),
]


@pytest.mark.parametrize(("modules", "reason"), B10_CASES)
def test_b10_members_that_differ_are_not_stacked(modules: list[nn.Module], reason: str) -> None:
    able, why = can_train_jointly(modules)
    assert not able
    with pytest.raises(BadInput, match=f"{reason}.*one after another"):
        StackedMembers(modules)
    assert why


class _Branching(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.sum() > 0 else -inputs


def test_b10_operations_that_cannot_be_vectorised_show_in_a_trial() -> None:
    members = _members(lambda: _Member(nn.Linear(3, 5), _Branching(), nn.Linear(5, 2)))
    before, state = deepcopy(members), torch.get_rng_state()
    assert can_train_jointly(members) == (True, "")
    able, reason = can_train_jointly(members, BATCH)
    assert not able
    assert "vectorised pass fails with RuntimeError" in reason
    assert _largest_difference(members, before) == 0.0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_leaves_no_trace() -> None:
    members = _members(_normalised)
    before, state = deepcopy(members), torch.get_rng_state()
    assert can_train_jointly(members, BATCH) == (True, "")
    assert _largest_difference(members, before) == 0.0
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(member.training for member in members)


def test_optimizers_that_look_at_whole_tensors_are_refused() -> None:
    members = _members(_plain)
    able, reason = can_train_jointly(members, optimizer=torch.optim.LBFGS)
    assert (able, reason) == (False, "LBFGS may mix what is stacked")
    ready = torch.optim.SGD(members[0].parameters(), lr=0.1)
    assert not can_train_jointly(members, optimizer=ready)[0]
    with pytest.raises(BadInput, match="LBFGS"):
        fit_jointly(members, DATA, epochs=1, optimizer=torch.optim.LBFGS)


def test_early_stopping_follows_the_mean_over_the_members() -> None:
    members = _members(_normalised)
    scores = iter([4.0, 2.0, 9.0, 1.0, 0.0, 8.0, 3.0, 3.0, 5.0] + [9.0] * 9)
    modes = []

    def validation_loss(member: nn.Module, data: Any) -> float:
        modes.append(any(part.training for part in member.modules()))
        return next(scores)

    history = fit_jointly(
        [member.train() for member in members],
        DATA,
        epochs=9,
        validation=DATA,
        validation_loss=validation_loss,
        patience=2,
    )
    assert [epoch.validation_nll for epoch in history.epochs] == [5.0, 3.0, 11 / 3, 9.0]
    assert history.stopped_early
    assert not any(modes)
    assert all(member.training for member in members)


def test_the_history_has_the_mean_and_a_bad_member_is_shown() -> None:
    members = _members(_plain)
    expected = sum(member_loss(member, BATCH, 24).item() for member in members) / 3
    history = fit_jointly(members, [DATA], epochs=1)
    assert history.epochs[0].train_loss == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():
        members[1].log_scale.fill_(torch.nan)  # type: ignore[operator]
    with pytest.raises(BadInput, match=r"the loss is \[\d+\.\d+, nan, \d+\.\d+\] in epoch 1, batch 0"):
        fit_jointly(members, [DATA], epochs=1)


def test_a_resumed_joint_training_is_never_stopped(tmp_path: Any) -> None:
    make = functools.partial(_Member, nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 2))
    whole, resumed = _members(lambda: deepcopy(make())), _members(lambda: deepcopy(make()))
    path = tmp_path / "checkpoint"
    expected = fit_jointly(whole, DATA, epochs=4, batch_size=8)
    fit_jointly(deepcopy(resumed), DATA, epochs=2, batch_size=8, checkpoint=path)
    assert fit_jointly(resumed, DATA, epochs=4, batch_size=8, checkpoint=path) == expected
    assert _largest_difference(whole, resumed) == 0.0


def _predictors(*layers: Callable[[], nn.Module], likelihood: Any = None) -> list[nn.Module]:
    return _members(lambda: Deterministic(nn.Sequential(*(make() for make in layers)), likelihood))


PREDICTORS: dict[str, tuple[Callable[[], list[nn.Module]], Tensor]] = {
    "classes": (
        lambda: _predictors(lambda: nn.Linear(3, 5), nn.Tanh, lambda: nn.Linear(5, 4)),
        torch.arange(24) % 4,
    ),
    "noise": (
        lambda: _predictors(
            lambda: nn.Linear(3, 300),
            nn.ReLU,
            lambda: nn.Linear(300, 2),
            likelihood=likelihoods.HeteroscedasticGaussian(),
        ),
        TARGETS[:, 0],
    ),
    "labels": (
        lambda: _predictors(lambda: nn.LayerNorm(3), lambda: nn.Linear(3, 2), likelihood=likelihoods.Bernoulli()),
        (TARGETS > 0).long(),
    ),
}


@pytest.mark.parametrize(("make", "targets"), PREDICTORS.values(), ids=PREDICTORS)
@pytest.mark.parametrize("optimizer", [None, OPTIMIZERS["sgd"]])
def test_a_batched_product_trains_what_one_after_another_trains(
    make: Callable[[], list[nn.Module]], targets: Tensor, optimizer: Any
) -> None:
    together, apart = make(), make()
    data = (INPUTS, targets)
    assert try_jointly(together, Batch((INPUTS,), {}, targets)) == ("", True)
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 7, "seed": 4, "optimizer": optimizer}
    history = fit_jointly(together, data, **settings)
    losses = []
    for member in apart:
        losses.append(fit(member, functools.partial(member_loss, member), data, **settings).epochs[-1].train_loss)
    assert _largest_difference(together, apart) < 1e-10
    assert history.epochs[-1].train_loss == pytest.approx(sum(losses) / 3, rel=1e-10)


IMAGES = torch.randn(24, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
CONVOLUTIONAL: dict[str, list[Callable[[], nn.Module]]] = {
    "pooled": [
        *(lambda: nn.Conv2d(2, 6, 3, padding=1), nn.ReLU, lambda: nn.MaxPool2d(2), lambda: nn.Conv2d(6, 4, 3)),
        *(nn.Tanh, nn.Flatten, lambda: nn.Linear(16, 5), nn.ReLU, lambda: nn.Linear(5, 4)),
    ],
    "strides, groups and no bias": [
        *(lambda: nn.Conv2d(2, 6, 3, stride=2, bias=False), lambda: nn.Conv2d(6, 4, 2, dilation=2, groups=2)),
        *(lambda: nn.AvgPool2d(2), nn.Flatten, lambda: nn.Linear(4, 4)),
    ],
    "pooled first": [
        *(lambda: nn.MaxPool2d(2, ceil_mode=True), lambda: nn.Conv2d(2, 3, 5, padding="same")),
        *(lambda: nn.Flatten(2), nn.Flatten, lambda: nn.Linear(75, 4)),
    ],
}


@pytest.mark.parametrize("layers", CONVOLUTIONAL.values(), ids=CONVOLUTIONAL)
def test_batched_convolutions_train_what_one_after_another_trains(layers: list[Callable[[], nn.Module]]) -> None:
    together, apart = _predictors(*layers), _predictors(*layers)
    data = (IMAGES, torch.arange(24) % 4)
    assert try_jointly(together, Batch((IMAGES,), {}, data[1])) == ("", True)
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 7, "seed": 4}
    fit_jointly(together, data, **settings)
    for member in apart:
        fit(member, functools.partial(member_loss, member), data, **settings)
    assert _largest_difference(together, apart) < 1e-10
    # What a member becomes does not hang on who trains beside it.
    pair = _predictors(*layers)[1:]
    fit_jointly(pair, data, **settings)
    assert _largest_difference(pair, together[1:]) < 1e-10


def test_members_in_another_order_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    members = _predictors(*CONVOLUTIONAL["pooled"])
    right = batched_calls._as_members
    monkeypatch.setattr(batched_calls, "_as_members", lambda images, count: right(images, count).roll(1, 0))
    trial = try_jointly(members, Batch((IMAGES,), {}, torch.arange(24) % 4))
    assert trial == ("", False)


@pytest.mark.parametrize(
    "layers",
    [
        [lambda: nn.Conv2d(2, 4, 3, groups=2), nn.Flatten, lambda: nn.Linear(196, 4)],
        [lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Flatten, lambda: nn.Linear(324, 4)],
    ],
    ids=["groups of shared inputs", "circular"],
)
def test_convolutions_without_a_batched_form_are_vectorised(layers: list[Callable[[], nn.Module]]) -> None:
    assert try_jointly(_predictors(*layers), Batch((IMAGES,), {}, torch.arange(24) % 4)) == ("", False)


def test_batched_losses_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    members = PREDICTORS["classes"][0]()
    batch = Batch((INPUTS,), {}, PREDICTORS["classes"][1])
    want = torch.stack([member_loss(member, batch, 24) for member in members])
    right = StackedMembers._batched
    monkeypatch.setattr(StackedMembers, "_batched", lambda *args: right(*args).roll(1))
    stacked = StackedMembers(members)
    assert torch.allclose(stacked.loss(batch, 24), want, rtol=1e-12)
    assert stacked.why_not_batched == "the batched losses differ from those of the members one by one"


VMAPPED: dict[str, list[nn.Module]] = {
    "objective": _members(_plain),
    "buffers": _predictors(lambda: nn.Linear(3, 5), lambda: nn.BatchNorm1d(5), lambda: nn.Linear(5, 4)),
    "something to learn": _predictors(lambda: nn.Linear(3, 2), likelihood=likelihoods.Gaussian()),
    "loss is its own": _predictors(lambda: nn.Linear(3, 2), likelihood=likelihoods.HeteroscedasticGaussian(0.5)),
}


@pytest.mark.parametrize(("reason", "members"), VMAPPED.items(), ids=VMAPPED)
def test_what_has_no_batched_form_is_vectorised(reason: str, members: list[nn.Module]) -> None:
    assert reason in StackedMembers(members).why_not_batched


def test_batched_members_draw_masks_of_their_own_and_resume(tmp_path: Any) -> None:
    layers: list[Callable[[], nn.Module]] = [lambda: nn.Linear(3, 9), lambda: nn.Dropout(0.5), lambda: nn.Linear(9, 4)]
    whole, resumed = _predictors(*layers), _predictors(*layers)
    data = (INPUTS, torch.arange(24) % 4)
    assert try_jointly(whole, Batch((INPUTS,), {}, data[1])).is_batched
    expected = fit_jointly(whole, data, epochs=4, batch_size=8)
    fit_jointly(deepcopy(resumed), data, epochs=2, batch_size=8, checkpoint=tmp_path / "file")
    assert fit_jointly(resumed, data, epochs=4, batch_size=8, checkpoint=tmp_path / "file") == expected
    assert _largest_difference(whole, resumed) == 0.0
    one = _predictors(*layers)[0]
    stacked = StackedMembers([one, deepcopy(one)]).train()
    with torch.random.fork_rng():
        first, second = stacked.loss(Batch((INPUTS,), {}, data[1]), 24)
    assert stacked.why_not_batched == ""
    assert first != second
