"""Leaving dropped channels out of the products changes nothing but rounding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesguard.sampling import Forward, Sampler
from bayesguard.sampling.compaction import _OF_ANY_DTYPE, Deferred, Kept, Product


def dense(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 30), *between, nn.Dropout(0.4), nn.Linear(30, 3)
    )


class Convolutions(nn.Module):
    """Channel dropout between convolutions, pools, a flattening, and a dense end."""

    def __init__(self, pool: Callable[[Tensor], Tensor], padding_mode: Any = "zeros") -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1, padding_mode=padding_mode)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.pool, self.drop = pool, nn.Dropout2d(0.5)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.pool(F.relu(self.drop(self.first(x))))
        hidden = self.drop(F.relu(self.second(hidden)))
        hidden = self.drop(self.grouped(hidden))
        return self.head(hidden.flatten(1))


class Habits(nn.Module):
    """Everything that a deferred tensor may meet: looks, branches, in-place changes, joins, slices, views."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(6, 20), nn.Linear(20, 20), nn.Dropout(0.5)
        self.head = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.first(x))
        pending = self.second(hidden)
        extra = pending * 0.5 if bool(hidden[:, 0].abs().sum() > 0) else pending
        F.relu(pending, inplace=True)
        hidden += 1
        hidden[:, 3] = 0
        pending.view(-1)[0] = 2
        shape = pending.size(0), pending.shape[1], pending.dim(), len(pending)
        assert shape == (x.shape[0], 20, 2, x.shape[0])
        joined = torch.cat([hidden, F.relu(pending)], dim=-1)
        return self.head(joined) + extra[:, :3] + F.softmax(self.drop(pending), -1)[:, :3]


class Doubling(torch.autograd.Function):
    """A function of the user's own, which a function mode does not see."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input * 2

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return grad[0] * 2


double: Callable[[Tensor], Tensor] = Doubling.apply


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.head = nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.head(double(self.drop(self.first(x))))
        return self.drop(double(hidden))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: dense(nn.ReLU()), (7, 6)),
    "relu in place": (lambda: dense(nn.ReLU(inplace=True)), (7, 6)),
    "gelu": (lambda: dense(nn.GELU()), (7, 6)),
    "tanh and a norm": (lambda: dense(nn.Tanh(), nn.LayerNorm(30)), (7, 6)),
    "nothing between": (lambda: dense(), (7, 6)),
    "dropout before its relu": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.LeakyReLU(), nn.Linear(9, 9)),
        (7, 6),
    ),
    "dropout before tanh": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Tanh(), nn.Linear(9, 9)),
        (7, 6),
    ),
    "narrow head": (lambda: nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3)), (7, 6)),
    "narrow head without bias": (
        lambda: nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3, bias=False)),
        (7, 6),
    ),
    "dropout last": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5)), (7, 6)),
    "max pool": (lambda: Convolutions(nn.MaxPool2d(2)), (5, 2, 8, 8)),
    "average pool": (lambda: Convolutions(nn.AvgPool2d(2)), (5, 2, 8, 8)),
    "adaptive pool": (lambda: Convolutions(nn.AdaptiveAvgPool2d(4)), (5, 2, 8, 8)),
    "circular padding": (lambda: Convolutions(nn.MaxPool2d(2), "circular"), (5, 2, 8, 8)),
    "sequences": (
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.Dropout1d(0.5), nn.ReLU(), nn.Conv1d(8, 4, 3)),
        (5, 3, 9),
    ),
    "volumes": (
        lambda: nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.Dropout3d(0.5), nn.MaxPool3d(2), nn.Conv3d(6, 4, 2)),
        (3, 2, 4, 4, 4),
    ),
    "habits": (Habits, (5, 6)),
    "a function of one's own": (OwnFunction, (5, 6)),
}


def outputs(network: nn.Module, x: Tensor, strategy: Any) -> Tensor:
    with torch.no_grad():
        forward = Forward(network, (x,), {})
        return torch.cat(list(Sampler(strategy=strategy).chunks(forward, num_samples=20, seed=3)))


@pytest.mark.parametrize("name", NETWORKS)
def test_compaction_is_exact(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network, x = make().double().eval(), torch.randn(shape, dtype=torch.float64)
    before = x.clone()
    want = outputs(network, x, "loop")
    got = outputs(network, x, "compact")
    assert want.std(dim=0).max() > 1e-3
    assert type(got) is Tensor
    assert (got - want).abs().max() < 1e-10
    assert torch.equal(x, before)


@pytest.mark.parametrize("dropped", ["first", "second"])
def test_all_channels_may_be_dropped(dropped: str) -> None:
    """With two channels and p = 0.5 it happens in a quarter of the draws."""
    torch.manual_seed(0)
    wide, narrow = (2, 8) if dropped == "first" else (8, 2)
    network = nn.Sequential(
        nn.Conv2d(1, wide, 3),
        nn.Dropout2d(),
        nn.Conv2d(wide, narrow, 3),
        nn.ReLU(),
        nn.Dropout2d(),
        nn.Conv2d(narrow, 3, 2),
    )
    network, x = network.double().eval(), torch.randn(5, 1, 6, 6, dtype=torch.float64)
    want, got = outputs(network, x, "loop"), outputs(network, x, "compact")
    assert (got - want).abs().max() < 1e-12
    assert (want.std(dim=1).flatten(1).amax(dim=1) == 0).any()


def test_what_is_dropped_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden layer is computed for the units that the next dropout keeps, from those that the last one kept."""
    seen: list[tuple[int, ...]] = []
    plain = Product.of

    def counted(self: Product, rows: Tensor | None) -> Tensor:
        result = plain(self, rows)
        seen.append((*result.shape, self.input.values().shape[-1]))
        return result

    monkeypatch.setattr(Product, "of", counted)
    outputs(dense(nn.ReLU()).eval(), torch.randn(7, 6), "compact")
    hidden = [shape for shape in seen if shape[1] != 3]
    assert hidden
    assert all(units < 30 and inputs < 40 for _, units, inputs in hidden)


def test_a_wrong_scale_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: forgetting 1 / (1 - p) makes the strategy differ from the loop, and it is not used."""
    monkeypatch.setattr(Kept, "values", lambda self: _unscaled(self))
    network, x = dense(nn.ReLU()).eval(), torch.randn(20, 6)
    sampler = Sampler()
    with torch.no_grad():
        list(sampler.chunks(Forward(network, (x,), {}), num_samples=20, seed=3))
    assert sampler.last_plan is not None
    assert "compact" not in sampler.last_plan.per_draw


def _unscaled(part: Kept) -> Tensor:
    whole = part.picked if part.picked is not None else part.source.index_select(part.axis, part.index)  # type: ignore[union-attr]
    return whole / part.scale


def test_gradients_take_the_plain_way() -> None:
    network, x = dense(nn.ReLU()).eval(), torch.randn(7, 6)
    sampler = Sampler(strategy="compact")
    parts = torch.cat(list(sampler.chunks(Forward(network, (x,), {}), num_samples=3, seed=0)))
    parts.sum().backward()
    assert network[0].weight.grad is not None


class SwitchesAutocast(nn.Module):
    """Layers called where autocast is on, off, or of another dtype, and looked at elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(6, 20), nn.Linear(20, 20), nn.Dropout(0.5)
        self.third, self.head = nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            hidden = self.second(self.drop(self.first(x)))
        hidden = self.drop(F.gelu(hidden))
        with torch.autocast("cpu", enabled=False):
            hidden = self.third(hidden.float())
        return self.head(self.drop(F.relu(hidden)))


AUTOCAST: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: dense(nn.ReLU()), (7, 6)),
    "not of any dtype": (lambda: dense(nn.Softplus()), (7, 6)),
    "convolutions": (lambda: Convolutions(nn.MaxPool2d(2)), (5, 2, 8, 8)),
    "averages": (lambda: Convolutions(nn.AvgPool2d(2)), (5, 2, 8, 8)),
    "habits": (Habits, (7, 6)),
    "switches": (SwitchesAutocast, (7, 6)),
    "wide": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 3)), (7, 64)),
    "narrow": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 3)), (7, 64)),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_gives_the_loops_draws(name: str) -> None:
    torch.manual_seed(0)
    make, shape = AUTOCAST[name]
    network, x = make().eval(), torch.randn(shape)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loop, compact = (
            torch.cat(list(Sampler(strategy=strategy).chunks(Forward(network, (x,), {}), num_samples=9, seed=0)))
            for strategy in ("loop", "compact")
        )
    assert compact.dtype == loop.dtype
    # Half precision rounds every layer's result: some of its 2^-8.
    assert (compact - loop).abs().max() <= 2**-5 * loop.abs().max()
    assert loop.std(dim=0).max() > 2**-4 * loop.abs().max()


@pytest.mark.parametrize("function", sorted(_OF_ANY_DTYPE, key=str))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_these_functions_keep_their_dtype_under_autocast(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    name = getattr(function, "__name__", "")
    wide = [2] * int(name[-2]) if "pool" in name else []
    values = torch.randn(2, 3, *wide).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert function(values, *([2] if wide else [])).dtype == dtype


def test_a_deferred_tensor_is_an_ordinary_one_to_others() -> None:
    source = torch.arange(6.0).reshape(2, 3)
    part = Kept(source.shape, 1, torch.tensor([0, 2]), 2.0, source=source)
    deferred = Deferred(part, source)
    assert isinstance(deferred, Tensor)
    assert deferred.shape == (2, 3)
    assert (deferred + 0).tolist() == [[0, 0, 4], [6, 0, 10]]
    deferred.add_(1)
    assert deferred.value().tolist() == [[1, 1, 5], [7, 1, 11]]
