"""Random networks, changed at random between calls: every form of a prediction is the plain loop's, in float64.

The plain loop copies each network, so that nothing that is remembered of it can be in the way.
"""

import random
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesguard as bg
from tests.chosen_ways import choose_way

WIDTH = 6
SEEDS = range(7)
CALLS = 5


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factor = nn.Linear(WIDTH, WIDTH), 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * F.relu(self.inner(x), inplace=True)


class Scaled(nn.Module):
    """A parameter and a buffer in arithmetic of its own."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(1 - x * self.scale) / 2 + self.shift


class Looks(nn.Linear):
    """Branches on the values of its parameters."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = super().forward(input)
        return hidden if self.bias[0] > 0 else -hidden


class Counted(nn.Linear):
    """Depends on the length of a list."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.factors = [1.5]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * len(self.factors)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([x, x.flip(-1), x.square()], 1)
        outputs: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return outputs.mean(1)


class Recurs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(1, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.cell(x.unsqueeze(-1))[0][:, -1]
        return outputs


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.convolution(x.unflatten(-1, (1, 2, 3))), 2).flatten(1).repeat(1, 3)[:, :WIDTH]


class Looked(nn.Module):
    """Takes rows of a table by the signs of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, WIDTH, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table((x[:, 0] > 0).long())


def normed(weight: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return weight(nn.Linear(WIDTH, WIDTH))


def tied() -> nn.Module:
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def used_twice() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(layer, nn.ReLU(inplace=True), layer)


# Most networks are of common layers, which have a batched form.
COMMON: list[Callable[[], nn.Module]] = [
    partial(nn.Linear, WIDTH, WIDTH),
    partial(nn.Linear, WIDTH, WIDTH, bias=False),
    partial(nn.LayerNorm, WIDTH),
    partial(nn.ReLU, inplace=True),
    nn.Tanh,
    Residual,
    Scaled,
    tied,
    used_twice,
]
OTHERS: list[Callable[[], nn.Module]] = [
    partial(nn.BatchNorm1d, WIDTH),
    partial(nn.GroupNorm, 2, WIDTH),
    partial(normed, nn.utils.parametrizations.weight_norm),
    partial(Looks, WIDTH, WIDTH),
    partial(Counted, WIDTH, WIDTH),
    Attends,
    Recurs,
    Convolves,
    Looked,
]


def random_network(choose: random.Random) -> list[Callable[[], nn.Module]]:
    blocks = [choose.choice(COMMON) for _ in range(choose.randint(1, 4))]
    if choose.random() < 0.5:
        blocks.insert(choose.randint(0, len(blocks)), choose.choice(OTHERS))
    return [*blocks, partial(nn.Linear, WIDTH, 3)]


def made(blocks: list[Callable[[], nn.Module]]) -> nn.Module:
    network = nn.Sequential(*(block() for block in blocks)).double().eval()
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return network


# Changes of a network between two calls.


def some(choose: random.Random, network: nn.Module) -> nn.Parameter:
    return choose.choice([*network.parameters()])


def transposed(parameter: Tensor) -> None:
    """Let a square matrix lie in memory the other way round, with the same address and other numbers."""
    if parameter.dim() == 2 and parameter.shape[0] == parameter.shape[1]:
        parameter.data = parameter.data.t()


def stepped(choose: random.Random, network: nn.Module) -> None:
    own = [p for p in network.parameters() if p.requires_grad]
    for parameter in own:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(own, lr=0.1, fused=choose.random() < 0.5 and all(p.is_contiguous() for p in own)).step()
    network.zero_grad()


def replaced(choose: random.Random, network: nn.Module) -> None:
    owner = choose.choice([part for part in network.modules() if part._parameters])
    name = choose.choice([name for name, own in owner._parameters.items() if own is not None])
    setattr(owner, name, nn.Parameter(owner._parameters[name].detach() * 1.2))  # type: ignore[union-attr]


def attribute(choose: random.Random, network: nn.Module) -> None:
    for part in network.modules():
        if isinstance(part, Residual):
            part.factor += 0.25
        if isinstance(part, Counted):
            part.factors.append(1.0)
        if isinstance(part, nn.LayerNorm):
            part.eps *= 100


def doubled(module: nn.Module, inputs: Any, outputs: Tensor) -> Tensor:
    return 2 * outputs


def hooked(choose: random.Random, network: nn.Module) -> None:
    choose.choice([*network.children()]).register_forward_hook(doubled)


def buffers(choose: random.Random, network: nn.Module) -> None:
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.data.add_(0.25)


def loaded(choose: random.Random, network: nn.Module) -> None:
    state = {name: 0.9 * own if own.is_floating_point() else own for name, own in network.state_dict().items()}
    network.load_state_dict(state, assign=choose.random() < 0.3)


Change = Callable[[random.Random, nn.Module], object]
CHANGES: list[Change] = [
    lambda choose, network: some(choose, network).data.mul_(1.3),
    lambda choose, network: some(choose, network).detach().numpy().__imul__(0.8),
    lambda choose, network: setattr(p := some(choose, network), "data", p.data * 1.1),
    lambda choose, network: transposed(some(choose, network)),
    lambda choose, network: some(choose, network).requires_grad_(False),
    stepped,
    replaced,
    attribute,
    buffers,
    loaded,
]


# Predictions beside the plain loop.


def inputs(choose: random.Random) -> Tensor:
    return torch.randn(choose.choice([1, 2, 3, 5, 6]), WIDTH, dtype=torch.float64)


def at(network: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The outputs of a copy with other weights; the padding row of a table is never random."""
    copied = deepcopy(network)
    with torch.no_grad():
        for name, value in weights.items():
            copied.get_parameter(name).copy_(value)
        for part, own in zip(copied.modules(), network.modules(), strict=True):
            if isinstance(part, nn.Embedding) and isinstance(own, nn.Embedding):
                part.weight[0] = own.weight[0]
        outputs: Tensor = copied(x.clone())
    return outputs


def difference(predictor: bg.Predictor, x: Tensor, want: Tensor) -> float:
    """The largest difference of a prediction's outputs; it leaves numbers, modes and random numbers alone."""
    state, before = torch.get_rng_state(), deepcopy(predictor.state_dict())
    given = x.clone()
    got = predictor.draw_outputs(x, num_samples=len(want))
    assert got.shape == want.shape
    assert torch.equal(
        predictor(x, num_samples=len(want)).num_samples * torch.ones(1), torch.tensor([float(len(want))])
    )
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in predictor.network.modules())
    after = predictor.state_dict()
    assert all(torch.equal(after[name], own) for name, own in before.items())
    return float((got - want).abs().max())


def new_member(blocks: list[Callable[[], nn.Module]]) -> bg.Deterministic:
    return bg.Deterministic(made(blocks))


def ensemble_difference(seed: int) -> tuple[float, str]:
    """The largest difference of an ensemble from the loop over calls with changes between them, and its first way."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    blocks = random_network(choose)
    ensemble = bg.DeepEnsemble([made(blocks) for _ in range(3)])
    members: Any = ensemble.network
    of_ensembles: list[Callable[[], object]] = [
        lambda: members.append(new_member(blocks)),
        lambda: members.__setitem__(1, new_member(blocks)),
        lambda: members[0].network.__setitem__(-1, nn.Linear(WIDTH, 3).double().eval()),
        lambda: hooked(choose, members[-1].network),
        lambda: None,
    ]
    largest, first, x = 0.0, "", inputs(choose)
    for call in range(CALLS):
        for again in range(2):
            want = torch.stack([at(member.network, {}, x) for member in ensemble.members])
            largest = max(largest, difference(ensemble, x, want))
            x = x if again else torch.randn_like(x)
        first = first or ensemble.strategy
        if call == CALLS - 2:
            choose.choice(of_ensembles)()
        else:
            choose.choice(CHANGES)(choose, choose.choice(ensemble.members).network)
        x = inputs(choose) if choose.random() < 0.3 else x
        if choose.random() < 0.1:
            ensemble = deepcopy(ensemble)
            members = ensemble.network
    return largest, first


@pytest.mark.parametrize("way", ["batched", "vmap", "loop"])
def test_ensembles_are_the_loop_over_their_members(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way(monkeypatch, way)
    found = [ensemble_difference(seed) for seed in SEEDS]
    assert max(largest for largest, _ in found) < 1e-10
    words = {"batched": "as one batched product", "vmap": "at once under vmap", "loop": "one after another"}
    assert sum(words[way] in first for _, first in found) >= 2


def variational_difference(seed: int) -> tuple[float, str]:
    """The same of a posterior over the weights of such a network, from the passes under each draw's weights."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    subset: Any = choose.choice(["all", "last_layer", "last_layer", lambda name, p: p.dim() > 1])
    network = made(random_network(choose))
    predictor = bg.Variational(network, subset_of_weights=subset, init_scale=0.3, antithetic=choose.random() < 0.8)
    largest, first, x = 0.0, "", inputs(choose)
    spread: list[Change] = [
        lambda choose, network: predictor.guide.get_parameter("log_scale").data.add_(0.1),
        lambda choose, network: stepped(choose, predictor.guide),
        hooked,
    ]
    for _ in range(CALLS):
        draws = choose.choice([3, 4, 11])
        weights = predictor.weight_draws(draws)
        each = [{name: own[draw] for name, own in weights.items()} for draw in range(draws)]
        want = torch.stack([at(predictor.network, own, x) for own in each])
        largest = max(largest, difference(predictor, x, want))
        first = first or predictor.strategy
        choose.choice(CHANGES + spread)(choose, predictor.network)
        x = inputs(choose) if choose.random() < 0.3 else torch.randn_like(x)
    return largest, first


@pytest.mark.parametrize("way", ["mirrored pairs", "vectorised", "shared features", "loop"])
def test_draws_of_weights_are_the_passes_under_them(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way(monkeypatch, way)
    found = [variational_difference(seed) for seed in SEEDS]
    assert max(largest for largest, _ in found) < 1e-10
    assert sum(first.startswith(way) for _, first in found) >= 2


def test_members_that_are_not_watched_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way(monkeypatch, "batched")
    monkeypatch.setattr("bayesguard.sampling.members.MemberBatch.is_current", lambda batch: True)
    assert max(ensemble_difference(seed)[0] for seed in SEEDS) > 1e-3


def test_draws_that_are_kept_for_ever_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way(monkeypatch, "loop")
    monkeypatch.setattr("bayesguard.posteriors.weight_outputs.same_numbers", lambda kept, tensors: True)
    assert max(variational_difference(seed)[0] for seed in SEEDS) > 1e-3
