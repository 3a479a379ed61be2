"""Networks of one architecture as one batched product are the networks one after another."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesguard.sampling.batched_calls import BatchedCalls, Unbatchable
from bayesguard.sampling.members import MemberBatch, TrainedBatch, check_batchable, only_calls_children


class Residual(nn.Module):
    """Code of one's own: a skip connection, a raw parameter, shapes, functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 4)
        self.norm = nn.LayerNorm(6)
        self.gate = nn.Parameter(torch.randn(6))
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 6
        hidden = x + F.gelu(self.inner(self.norm(x))) * self.gate
        hidden = 2.0 * hidden - x / (1 + torch.exp(self.scale))
        assert hidden.dim() == x.dim()
        assert hidden.shape == x.shape
        assert len(hidden) == hidden.size(0) == len(x)
        return self.outer(torch.tanh(hidden))


def _dense() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3)
    )


def _structured() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 4), nn.Unflatten(1, (2, 2))
    )


def _tokens() -> nn.Module:
    return nn.Sequential(nn.Unflatten(-1, (3, 2)), nn.Linear(2, 5), nn.ELU(), nn.Flatten(), nn.Linear(15, 3))


def _tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Linear(6, 2))
    network[2].weight = network[0].weight
    return network


MAKE: list[Callable[[], nn.Module]] = [_dense, _structured, _tokens, _tied, Residual]


def _networks(make: Callable[[], nn.Module], count: int = 3) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.set_rng_state(torch.Generator().manual_seed(1).get_state())
        return [make().double().eval() for _ in range(count)]


def _inputs(rows: int) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def _loop(networks: list[nn.Module], x: Tensor) -> Tensor:
    return torch.stack([network(x) for network in networks])


@pytest.mark.parametrize("make", MAKE)
@torch.no_grad()
def test_the_batched_product_is_the_loop(make: Callable[[], nn.Module]) -> None:
    networks = _networks(make)
    batch = MemberBatch(networks)
    want = [_loop(networks, _inputs(rows)) for rows in (1, 2, 40, 3)]
    batch.adopt()
    # More than once: from the second pass on what was recorded is played where that is allowed.
    for rows, outputs in zip((1, 2, 40, 3), want, strict=True):
        assert torch.allclose(batch(_inputs(rows)), outputs, rtol=0, atol=1e-12)
        assert torch.allclose(_loop(networks, _inputs(rows)), outputs, rtol=0, atol=1e-12)
    assert batch.is_current()


@torch.no_grad()
def test_swapped_members_would_be_seen() -> None:
    networks = _networks(_dense)
    swapped = MemberBatch([networks[1], networks[0], networks[2]])(_inputs(4))
    assert (swapped - _loop(networks, _inputs(4))).abs().max() > 1e-3


@pytest.mark.parametrize("make", MAKE)
def test_gradients_are_those_of_each_member(make: Callable[[], nn.Module]) -> None:
    networks = _networks(make)
    stacked = {
        name: torch.stack([dict(network.named_parameters())[name].detach() for network in networks]).requires_grad_()
        for name, _ in networks[0].named_parameters()
    }
    by_id = {id(tensor): stacked[name] for name, tensor in networks[0].named_parameters()}
    BatchedCalls(by_id, 3).run(networks[0], _inputs(7)).square().sum().backward()
    for index, network in enumerate(networks):
        network(_inputs(7)).square().sum().backward()
        for name, parameter in network.named_parameters():
            gradient = stacked[name].grad
            assert gradient is not None
            assert parameter.grad is not None
            assert torch.allclose(gradient[index], parameter.grad, rtol=0, atol=1e-10)


def test_a_wide_first_layer_is_one_product_over_all_members() -> None:
    networks = _networks(lambda: nn.Linear(300, 5))
    x = torch.randn(9, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = MemberBatch(networks)
    assert torch.allclose(batch(x), _loop(networks, x), rtol=0, atol=1e-12)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda layer: layer.weight.mul_(2),  # type: ignore[operator]
    "through data": lambda layer: layer.weight.data.mul_(2),  # type: ignore[operator]
    "numpy": lambda layer: layer.weight.detach().numpy().__imul__(2),  # type: ignore[operator]
    "load": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_numbers_that_change_are_followed(change: Callable[[nn.Module], object]) -> None:
    networks = _networks(_dense)
    batch = MemberBatch(networks)
    batch.adopt()
    before = batch(_inputs(4))
    change(networks[1].get_submodule("3"))
    after = batch(_inputs(4))
    assert batch.is_current()
    assert torch.allclose(after, _loop(networks, _inputs(4)), rtol=0, atol=1e-12)
    assert (after[1] - before[1]).abs().max() > 1e-3
    assert torch.equal(after[0], before[0])


REPLACEMENTS: dict[str, Callable[[nn.Module], object]] = {
    "data": lambda network: setattr(network[0].weight, "data", network[0].weight.data.clone()),  # type: ignore[index]
    "parameter": lambda network: setattr(network[0], "weight", nn.Parameter(network[0].weight.clone())),  # type: ignore[index]
    "dtype": lambda network: network.float(),
    "module": lambda network: setattr(network, "1", nn.Tanh()),
    "setting": lambda network: setattr(network[4], "inplace", True),  # type: ignore[index]
    "forward": lambda network: setattr(network[1], "forward", torch.tanh),  # type: ignore[index]
    "hook": lambda network: network[1].register_forward_hook(lambda *_: None),  # type: ignore[index]
    "mode": lambda network: network.train(),
    "buffer": lambda network: network[1].register_buffer("new", torch.ones(2)),  # type: ignore[index]
    "child": lambda network: network[1].add_module("new", nn.ReLU()),  # type: ignore[index]
    "assign": lambda network: network.load_state_dict(
        {k: v.clone() for k, v in network.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
@torch.no_grad()
def test_what_is_replaced_in_any_member_is_seen(replace: Callable[[nn.Module], object]) -> None:
    networks = _networks(_dense)
    batch = MemberBatch(networks)
    batch.adopt()
    assert batch.is_current()
    replace(networks[2])
    assert not batch.is_current()


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = _dense(), nn.Sequential(nn.Tanh(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        return self.after(hidden)


class Other(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(-self.before(x))


class Choosing(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x)) if x.sum() > 0 else self.before(x)[:, :2]


class Attribute(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x.T))


class Property(Chain):
    @property
    def other(self) -> nn.Module:
        return self.after if torch.is_grad_enabled() else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.before(x))


class Wrapped(Chain):
    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


def test_only_code_that_cannot_branch_counts_as_a_chain_of_children() -> None:
    assert only_calls_children(Chain())
    for kind in (Other, Choosing, Attribute, Property, Wrapped):
        assert not only_calls_children(kind()), kind
    patched = Chain()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert not only_calls_children(patched)
    named = Attribute()
    named.T = nn.Identity()  # x.T is still the tensor's
    assert not only_calls_children(named)


@torch.no_grad()
def test_a_chain_of_children_is_run_without_its_code_until_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = _networks(Chain)
    batch = MemberBatch(networks)
    batch.adopt()
    for rows in (4, 1, 7):
        assert torch.allclose(batch(_inputs(rows)), _loop(networks, _inputs(rows)), rtol=0, atol=1e-12)
    assert batch._steps is not None
    assert batch.is_current()
    monkeypatch.setattr(Chain, "forward", Other.forward)
    assert not batch.is_current()


@torch.no_grad()
def test_code_of_ones_own_is_run_anew() -> None:
    networks = _networks(Other)
    batch = MemberBatch(networks)
    for rows in (4, 1):
        assert torch.allclose(batch(_inputs(rows)), _loop(networks, _inputs(rows)), rtol=0, atol=1e-12)
    assert batch._steps is None


def _trained(networks: list[nn.Module]) -> tuple[TrainedBatch, dict[str, Tensor]]:
    own = [dict(network.named_parameters()) for network in networks]
    stacked = {name: torch.stack([each[name].detach() for each in own]).requires_grad_() for name in own[0]}
    by_id = {id(parameter): stacked[name] for name, parameter in own[0].items()}
    return TrainedBatch(networks[0], by_id, len(networks)), stacked


@pytest.mark.parametrize(
    ("make", "recorded"), [(Chain, True), (_tied, True), (_tokens, False), (Other, False), (_structured, False)]
)
def test_steps_without_the_networks_code_are_the_members_steps(make: Callable[[], nn.Module], recorded: bool) -> None:
    networks = _networks(make)
    batch, stacked = _trained(networks)
    for rows in (5, 5, 3):
        batch(_inputs(rows)).square().sum().backward()
        for index, network in enumerate(networks):
            network.zero_grad()
            network(_inputs(rows)).square().sum().backward()
            for name, parameter in network.named_parameters():
                found = stacked[name]
                assert found.grad is not None
                assert parameter.grad is not None
                assert torch.allclose(found.grad[index], parameter.grad, rtol=0, atol=1e-9)
        with torch.no_grad():
            for tensor in stacked.values():
                assert tensor.grad is not None
                tensor.sub_(0.01 * tensor.grad)
                tensor.grad = None
            for network in networks:
                for parameter in network.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(0.01 * parameter.grad)
    assert bool(batch._recorded) is recorded


def test_dropout_is_never_recorded_and_each_mode_is_a_kind_of_its_own() -> None:
    networks = _networks(_dense)
    batch, _ = _trained(networks)
    steady = batch(_inputs(4))
    assert len(batch._recorded) == 1
    networks[0].train()
    first, second = batch(_inputs(4)), batch(_inputs(4))
    assert not torch.equal(first, second)
    assert len(batch._recorded) == 1
    networks[0].eval()
    assert torch.equal(batch(_inputs(4)), steady)


def test_hooks_of_all_modules_are_called_in_every_pass() -> None:
    batch, _ = _trained(_networks(Chain))
    batch(_inputs(4))
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        batch(_inputs(4))
    finally:
        handle.remove()
    assert seen


class Branches(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        hidden = super().forward(input)
        return hidden if hidden.sum() > 0 else -hidden


class Mixes(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        hidden = super().forward(input)
        return hidden - hidden.mean(0)


class Broadcasts(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flatten(0) + input.reshape(-1)


class Fixed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input


UNBATCHABLE: list[Callable[[], nn.Module]] = [
    lambda: Branches(6, 6),
    lambda: Mixes(6, 6),
    lambda: Broadcasts(6, 6),
    lambda: Fixed(6, 6),
    lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)),
    lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)),
    lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5).train()),
]


@pytest.mark.parametrize("make", UNBATCHABLE)
@torch.no_grad()
def test_what_has_no_batched_form_is_refused(make: Callable[[], nn.Module]) -> None:
    networks = [make().double() for _ in range(2)]
    for network in networks:
        for part in network.modules():
            part.training = isinstance(part, nn.Dropout)
    x = _inputs(4)
    before = x.clone()
    with pytest.raises(Unbatchable):
        check_batchable(networks, x)
    assert torch.equal(x, before)


def test_attributes_that_may_change_unseen_are_refused() -> None:
    networks = _networks(_dense)
    networks[0].scales = [1.0]  # type: ignore[assignment]
    with pytest.raises(Unbatchable, match="attribute scales of Sequential may change unseen"):
        MemberBatch(networks)


def test_every_member_draws_masks_of_its_own() -> None:
    """In training, also where dropout comes before the first layer; the rate of kept units is that of the layer."""
    network = nn.Sequential(nn.Dropout(0.25), nn.Linear(6, 6, bias=False)).train()
    weights = torch.eye(6).expand(2, 6, 6).clone()
    mode = BatchedCalls({id(network[1].weight): weights}, 2, random=True)
    with torch.random.fork_rng():
        torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
        outputs = mode.run(network, torch.ones(2000, 6))
    assert not torch.equal(outputs[0], outputs[1])
    kept = (outputs != 0).double().mean().item()
    error = (0.25 * 0.75 / outputs.numel()) ** 0.5
    assert abs(kept - 0.75) < 5 * error
    assert abs(kept - 0.5) > 5 * error


def test_parameters_in_another_order_of_memory_stay_in_it() -> None:
    networks = _networks(_dense)
    layer = networks[0].get_submodule("3")
    layer.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.float64).t())
    with pytest.raises(Unbatchable, match="not contiguous"):
        MemberBatch(networks)
