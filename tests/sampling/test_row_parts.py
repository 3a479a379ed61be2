"""Draws made of some rows after the others: the same draws, and only where no row looks at another."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.sampling import Forward, Sampler, row_parts

ROWS, STEPS, WIDTH = 12, 5, 8


class Encoder(nn.Module):
    """Two transformer layers behind a layer without masks; remembers how many rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.25, batch_first=True)
        self.drop, self.encoder = nn.Dropout(0.25), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.rows: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.rows.add(len(x))
        return self.head(self.encoder(self.drop(self.first(x))).mean(dim=1))


class Masked(nn.Module):
    """Two layers with a dropout between them, after something that only whole batches show."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.first, self.head = before, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.first(self.before(x)).relu(), 0.5, self.training).mean(dim=1))


def centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=0)


def full(x: Tensor) -> Tensor:
    """Only a batch of many rows differs from its parts, which a look at few rows does not show."""
    return x * 2 if len(x) > 8 else x


def trimmed(x: Tensor) -> Tensor:
    """Cut what is padding in every row: rows that are short have shorter masks by themselves."""
    return x[:, (x != 0).any(dim=2).any(dim=0)]


class UnitsFirst(nn.Module):
    """Its dropout has the examples along an axis of all units and examples, but not the examples first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).movedim(0, 1)
        return self.head(F.dropout(hidden.reshape(-1, WIDTH), 0.5, self.training).view_as(hidden).mean(dim=0))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make parts of four rows."""
    monkeypatch.setattr(row_parts, "_PART_BYTES", 1)
    monkeypatch.setattr(row_parts, "_FEWEST_ROWS", 4)


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return make().double().eval(), torch.randn(ROWS, STEPS, WIDTH, dtype=torch.float64)


def drawn(sampler: Sampler, network: nn.Module, *inputs: Tensor, first: int = 0) -> Tensor:
    with torch.no_grad():
        return torch.cat(list(sampler.chunks(Forward(network, inputs, {}), num_samples=20, seed=1, first=first)))


def chosen(sampler: Sampler) -> str:
    assert sampler.last_plan is not None
    return sampler.last_plan.strategy


@pytest.mark.parametrize("first", [0, 8])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("rows", [8, 11, ROWS])
def test_draws_in_parts_are_those_of_the_loop(rows: int, balanced: bool, first: int) -> None:
    network, x = made(Encoder)
    sampler = Sampler(balanced=balanced)
    got = drawn(sampler, network, x[:rows], first=first)
    assert chosen(sampler) == "replay_parts"
    want = drawn(Sampler(strategy="loop", balanced=balanced), network, x[:rows], first=first)
    assert want.std(dim=0).min() > 1e-3
    assert (got - want).abs().max() < 1e-12


def test_only_parts_of_the_rows_are_in_memory() -> None:
    network, x = made(Encoder)
    sampler = Sampler()
    drawn(sampler, network, x)
    network.rows.clear()  # type: ignore[operator, union-attr]
    drawn(sampler, network, x)
    assert network.rows == {4}
    drawn(Sampler(strategy="replay"), network, x)
    assert ROWS in network.rows


def test_small_activations_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_parts, "_PART_BYTES", 1 << 20)
    network, x = made(Encoder)
    sampler = Sampler()
    drawn(sampler, network, x)
    assert chosen(sampler) != "replay_parts"


@pytest.mark.parametrize("make", [lambda: Masked(centred), lambda: Masked(full), UnitsFirst])
def test_networks_whose_rows_do_not_go_apart(make: Callable[[], nn.Module]) -> None:
    network, x = made(make)
    sampler = Sampler()
    got = drawn(sampler, network, x)
    assert chosen(sampler) != "replay_parts"
    assert (got - drawn(Sampler(strategy="loop"), network, x)).abs().max() < 1e-12


def test_masks_of_other_shapes_send_the_draws_to_the_whole_batch() -> None:
    network, x = made(lambda: Masked(trimmed))
    sampler = Sampler()
    drawn(sampler, network, x)
    assert chosen(sampler) == "replay_parts"
    x[:4, 3:] = 0
    got, want = drawn(sampler, network, x), drawn(Sampler(strategy="loop"), network, x)
    assert chosen(sampler) == "replay_parts"
    assert (got - want).abs().max() < 1e-12


class Weighted(nn.Module):
    """Multiplies with a second input, which may have as many rows as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return F.linear(F.dropout(self.first(x), 0.5, self.training), weights).mean(dim=1)


def test_an_input_that_only_looks_like_one_of_examples_is_not_cut() -> None:
    network, x = made(Weighted)
    sampler = Sampler()
    weights = torch.randn(9, WIDTH, dtype=torch.float64)
    drawn(sampler, network, x, weights)
    assert chosen(sampler) == "replay_parts"
    got = drawn(sampler, network, x[:9], weights)
    assert chosen(sampler) != "replay_parts"
    assert got.shape == (20, 9, 9)
    assert torch.allclose(got, drawn(Sampler(strategy="replay"), network, x[:10], weights)[:, :9], atol=1e-12)


def test_masks_of_each_example_are_drawn_for_all_rows() -> None:
    network, x = made(Encoder)
    sampler = Sampler(per_example=True)
    got = drawn(sampler, network, x)
    assert chosen(sampler) != "replay_parts"
    assert (got - drawn(Sampler(strategy="loop", per_example=True), network, x)).abs().max() < 1e-12


def test_gradients_flow_through_draws_of_a_network_that_is_drawn_in_parts() -> None:
    network, x = made(Encoder)
    sampler = Sampler()
    drawn(sampler, network, x)
    gradients = []
    for each in (sampler, Sampler(strategy="loop")):
        outputs = torch.cat(list(each.chunks(Forward(network, (x,), {}), num_samples=9, seed=1)))
        gradients.append(torch.autograd.grad(outputs.square().sum(), network.first.weight)[0])  # type: ignore[union-attr, arg-type]
    assert chosen(sampler) == "replay_parts"
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-10)


class Greedy(Encoder):
    """Runs out of memory above a number of rows, once it is told one."""

    limits: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > min(self.limits, default=ROWS):
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


def test_a_part_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made(Greedy)
    sampler = Sampler()
    want = drawn(sampler, network, x)
    monkeypatch.setattr(Greedy, "limits", [2])
    assert chosen(sampler) == "replay_parts"
    assert (drawn(sampler, network, x) - want).abs().max() < 1e-12


@pytest.mark.parametrize("options", [{"num_samples": 24}, {"tolerance": 0.02, "max_samples": 64}])
def test_predictions_in_parts(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_parts, "_FEWEST_ROWS", 6)  # the looks at few rows are at four
    network, x = made(Encoder)
    found = []
    for strategy in ("auto", "loop"):
        rows: set[int] = set()
        network.rows = rows  # type: ignore[assignment]
        predictor = bg.MCDropout(network, seed=0, strategy=strategy, copy=False)
        found.append(predictor.predict(x, **options))
        # A tolerance leaves fewer rows than can be cut, in the end.
        assert (6 in rows) == (strategy == "auto")
    assert found[0].num_samples == found[1].num_samples
    assert (found[0].probs - found[1].probs).abs().max() < 1e-12
