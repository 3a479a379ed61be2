"""Every strategy gives the plain loop's draws, or says that it cannot."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput, RandomnessWarning
from bayesguard.sampling import Forward, Sampler, engine, planning
from bayesguard.sampling.engine import _joined
from bayesguard.sampling.masks import PassesDiffer
from bayesguard.sampling.strategies import Draws
from tests.networks import Attention, Recurrent, Residual, Transformer, mlp

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "mlp": (lambda: mlp(nn.Dropout(0.5)), lambda: (torch.randn(6, 8),)),
    "residual": (Residual, lambda: (torch.randn(6, 1, 8, 8),)),
    "transformer": (Transformer, lambda: (torch.randint(0, 11, (6, 5)),)),
    "transformer time first": (lambda: Transformer(False), lambda: (torch.randint(0, 11, (6, 5)),)),
    "attention": (Attention, lambda: (torch.randn(6, 5, 8),)),
    "attention with weights": (lambda: Attention(True), lambda: (torch.randn(6, 5, 8),)),
    "lstm": (Recurrent, lambda: (torch.randn(6, 7, 4),)),
    "lstm time first": (lambda: Recurrent(batch_first=False), lambda: (torch.randn(6, 7, 4),)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: (torch.randn(6, 7, 4),)),
    "lstm packed": (
        lambda: Recurrent(packed=True),
        lambda: (torch.randn(6, 7, 4), torch.tensor([7, 3, 5, 7, 1, 2])),
    ),
    "float64": (lambda: mlp(nn.Dropout(0.5)).double(), lambda: (torch.randn(6, 8).double(),)),
}


def draws(
    network: nn.Module, inputs: tuple[Tensor, ...], strategy: Any, num_samples: int = 5, **settings: Any
) -> Tensor:
    sampler = Sampler(strategy=strategy, **settings)
    with torch.no_grad():
        return torch.cat(list(sampler.chunks(Forward(network.eval(), inputs, {}), num_samples=num_samples, seed=3)))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("strategy", ["replay", "compact", "fold", "fold_tail", "vmap"])
@pytest.mark.parametrize("per_example", [False, True])
def test_strategies_agree_with_the_loop(name: str, strategy: Any, per_example: bool) -> None:
    torch.manual_seed(0)
    network, inputs = NETWORKS[name][0](), NETWORKS[name][1]()
    want = draws(network, inputs, "loop", per_example=per_example)
    assert want.std(dim=0).max() > 1e-3
    try:
        got = draws(network, inputs, strategy, per_example=per_example)
    except BadInput as refusal:
        # vmap has no recurrent kernels, and packing sorts the draws of a folded batch into one another. Folding at
        # the first mask is for networks that do not come back to what they computed before it.
        no_rule = strategy == "vmap" and "batching rule" in str(refusal).lower()
        assert no_rule or "packed" in name or (strategy == "fold_tail" and name not in ("mlp", "float64"))
        return
    if strategy == "replay":
        assert torch.equal(got, want)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_shared_mask_treats_equal_examples_equally(name: str) -> None:
    """A draw is one function: whatever the batch, the same input gets the same output."""
    torch.manual_seed(0)
    network, inputs = NETWORKS[name][0](), NETWORKS[name][1]()
    twice = tuple(torch.cat([value, value]) for value in inputs)
    outputs = draws(network, twice, "loop")
    assert torch.allclose(outputs[:, :6], outputs[:, 6:], atol=1e-6)
    alone = draws(network, tuple(value[:1] for value in inputs), "loop")
    assert torch.allclose(outputs[:, :1], alone, atol=1e-6)


def test_masks_of_ones_own_treat_equal_examples_apart() -> None:
    outputs = draws(mlp(nn.Dropout(0.5)), (torch.ones(2, 8),), "loop", per_example=True)
    assert (outputs[:, 0] - outputs[:, 1]).abs().min(dim=1).values.max() > 0


def test_the_automatic_choice_is_measured_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(call: Callable[[], Any], device: torch.device) -> float:
        call()
        return 1e-3  # of a busy machine's own clock nothing may depend here

    monkeypatch.setattr(planning, "seconds_of", seconds)
    sampler = Sampler()
    with torch.no_grad():
        list(sampler.chunks(Forward(mlp(nn.Dropout(0.5)).eval(), (torch.ones(16, 8),), {}), num_samples=3, seed=0))
    plan = sampler.last_plan
    assert plan is not None
    assert plan.reason.startswith("measured for 3 draws: ")
    assert set(plan.per_draw) == {"replay", "compact", "vmap", "fold_tail", "fold"}
    assert plan.strategy in plan.per_draw


def test_the_explanation_has_choice_cost_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which a pass takes 2 ms, and 6 ms the first time; 1 ms a draw by replay, 3 by any other way."""
    made = {"passes": 0}

    def seconds(call: Callable[[], Any], device: torch.device) -> float:
        call()
        if isinstance(call, Forward):
            made["passes"] += 1
            return 2e-3 if made["passes"] > 1 else 6e-3
        return 1e-3

    def of_draws(made_of: Draws, name: str, numbers: Sequence[int]) -> float:
        list(made_of.run(name, numbers))
        return 7e-3 if list(numbers) == [0] else len(numbers) * (1e-3 if name == "replay" else 3e-3)

    monkeypatch.setattr(planning, "seconds_of", seconds)
    monkeypatch.setattr(planning, "_seconds", of_draws)
    network, x = mlp(nn.Dropout(0.5)), torch.randn(64, 8)
    own = bg.MCDropout(network, num_samples=50)
    assert own.explain() == "strategy: not used yet"
    own(x)
    strategy, why, cost, memory = own.explain().splitlines()
    assert strategy == "strategy: replay"
    assert why.startswith("  why: measured for 50 draws: replay 53 ms, ")
    # A first draw takes a pass and a draw at most, however long it took when it was the very first.
    assert cost == "  cost: 50 draws take the time of 26.5 plain passes (one takes 2 ms)"
    # Held: the features before the dropout, one byte a unit of the mask that all rows share, and its factors.
    assert memory.endswith(" MiB beside that of one pass")
    held = float(memory.split()[1]) * 2**20
    assert 64 * 32 * 4 <= held < 2 * 64 * 32 * 4


@pytest.mark.parametrize(("first", "runs"), [(20e-3, 1), (6e-3, 2)], ids=["hopeless", "close"])
def test_a_way_that_was_much_slower_at_first_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch, first: float, runs: int
) -> None:
    """On a clock by which draws take 0.5 ms one after another, and `first` seconds for 16 in one batch the first time."""
    made: list[str] = []

    def seconds(call: Callable[[], Any], device: torch.device) -> float:
        call()
        return 1e-3 if isinstance(call, Forward) else first

    def of_draws(made_of: Draws, name: str, numbers: Sequence[int]) -> float:
        list(made_of.run(name, numbers))
        return len(numbers) * 0.5e-3

    def run(self: Draws, strategy: str, numbers: Sequence[int]) -> Any:
        made.append(strategy)
        return originally(self, strategy, numbers)

    originally = Draws.run
    monkeypatch.setattr(Draws, "run", run)
    monkeypatch.setattr(planning, "seconds_of", seconds)
    monkeypatch.setattr(planning, "_seconds", of_draws)
    sampler = Sampler(strategy="auto")
    with torch.no_grad():
        list(sampler.chunks(Forward(mlp(nn.Dropout(0.5)).eval(), (torch.ones(16, 8),), {}), num_samples=16, seed=0))
    plan = sampler.last_plan
    assert plan is not None
    assert plan.per_draw["vmap"] == (first / 16 if runs == 1 else 0.5e-3)
    assert made.count("vmap") == runs


@pytest.mark.parametrize("strategy", ["replay", "compact", "loop"])
@pytest.mark.parametrize("balanced", [False, True])
def test_seeds_decide_the_draws_and_chunks_do_not(strategy: Any, balanced: bool) -> None:
    network, x = mlp(nn.Dropout(0.5)).eval(), torch.randn(4, 8)
    sampler = Sampler(strategy=strategy, balanced=balanced)
    with torch.no_grad():
        whole = torch.cat(list(sampler.chunks(Forward(network, (x,), {}), num_samples=8, seed=5)))
        parts = [
            torch.cat(list(sampler.chunks(Forward(network, (x,), {}), num_samples=n, seed=5, first=first)))
            for first, n in ((0, 1), (1, 4), (5, 3))
        ]
        other = torch.cat(list(sampler.chunks(Forward(network, (x,), {}), num_samples=8, seed=6)))
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, other)


@pytest.mark.parametrize("strategy", ["fold", "vmap"])
def test_group_sizes_do_not_change_the_draws(strategy: Any) -> None:
    network, x = mlp(nn.Dropout(0.5)), torch.randn(4, 8)
    whole = draws(network, (x,), strategy, 8)
    assert torch.allclose(whole, draws(network, (x,), strategy, 8, memory_budget=1), atol=1e-6)


def test_chunks_end_with_a_block_and_hold_as_many_draws_as_asked() -> None:
    network, x = mlp(nn.Dropout(0.5)).eval(), torch.randn(4, 8)
    forward = Forward(network, (x,), {})
    with torch.no_grad():
        for strategy in ("replay", "fold"):
            sampler = Sampler(strategy=strategy)
            sizes = [len(part) for part in sampler.chunks(forward, num_samples=27, seed=0, chunk=8)]
            assert sizes == [8, 8, 8, 3]
            sizes = [len(part) for part in sampler.chunks(forward, num_samples=27, seed=0, first=5, chunk=16)]
            assert sizes == [19, 8]
            assert [len(part) for part in sampler.chunks(forward, num_samples=27, seed=0)] == [27]


class MixesExamples(nn.Module):
    """Centres each feature over the batch after dropout: draws must not share a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.drop(x)
        return dropped - dropped.mean(dim=0)


def test_draws_that_were_joined_are_not_kept() -> None:
    made: list[weakref.ref[Tensor]] = []

    def draws() -> Iterator[Tensor]:
        for _ in range(24):
            draw = torch.zeros(1, 2, 3)
            made.append(weakref.ref(draw))
            yield draw
            del draw

    groups = _joined(draws(), 0, 8)
    for _ in range(3):
        assert next(groups).shape == (8, 2, 3)
        # The last one may be held by the iterator that gave it.
        assert sum(draw() is not None for draw in made) <= 1


def test_fold_is_refused_where_examples_are_mixed() -> None:
    with pytest.raises(BadInput, match=r"strategy='fold' cannot be used.*mixes examples"):
        draws(MixesExamples(), (torch.randn(5, 4),), "fold")
    draws(MixesExamples(), (torch.randn(5, 4),), "vmap")


class ChangesPrefix(nn.Module):
    """Adds the dropped branch in place to what was computed before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h += self.drop(h)
        return h


def test_replay_falls_back_where_the_prefix_is_changed_in_place() -> None:
    network, x = ChangesPrefix(), torch.randn(5, 8)
    want = draws(network, (x,), "loop")
    assert torch.equal(draws(network, (x,), "replay"), want)
    assert torch.equal(draws(network, (x,), "auto"), want)


class Branches(nn.Module):
    """Makes a second random call in some draws only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.again = nn.Linear(8, 8), nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.first(x))
        return self.again(h) if h[0, 0] != 0 else h


def test_control_flow_that_follows_the_draw_still_works() -> None:
    with pytest.warns(RandomnessWarning, match="every example gets its own"):
        outputs = draws(Branches(), (torch.randn(5, 8),), "auto", 20)
    assert outputs.shape == (20, 5, 8)


def test_no_draw_is_lost_where_plan_after_plan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plans that share a batch, then one of single passes: after the last the masks are planned for nothing."""
    tried: list[str] = []

    def run(self: Draws, strategy: str, numbers: Sequence[int]) -> Any:
        if self.structure.layout is not None:
            raise PassesDiffer("nothing fits")
        return originally(self, strategy, numbers)

    def planned(made_of: Draws, candidates: planning.Candidates, number: int) -> planning.Plan:
        tried.append("fold" if candidates.untried else "loop")
        return planning.Plan(tried[-1], "", candidates.structure)

    originally = Draws.run
    monkeypatch.setattr(Draws, "run", run)
    monkeypatch.setattr(engine, "choose", planned)
    with torch.no_grad(), pytest.warns(RandomnessWarning, match="nothing fits"):
        found = list(
            Sampler().chunks(Forward(mlp(nn.Dropout(0.5)).eval(), (torch.ones(3, 8),), {}), num_samples=5, seed=0)
        )
    assert tried == ["fold", "fold", "loop", "loop"]
    assert torch.cat(found).shape[:2] == (5, 3)


def test_a_changed_rate_is_noticed() -> None:
    network, x = mlp(nn.Dropout(0.5)).eval(), torch.randn(4, 8)
    sampler = Sampler(strategy="vmap")
    with torch.no_grad():
        list(sampler.chunks(Forward(network, (x,), {}), num_samples=3, seed=0))
        network[2].p = 0.9  # type: ignore[assignment]
        got = torch.cat(list(sampler.chunks(Forward(network, (x,), {}), num_samples=3, seed=0)))
    fresh = Sampler(strategy="loop")
    with torch.no_grad():
        want = torch.cat(list(fresh.chunks(Forward(network, (x,), {}), num_samples=3, seed=0)))
    assert torch.allclose(got, want, atol=1e-6)


class Greedy(nn.Module):
    """Runs out of memory above a number of rows."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.drop = limit, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return self.drop(x)


@pytest.mark.parametrize("strategy", ["auto", "loop", "fold"])
@pytest.mark.parametrize("limit", [20, 7, 3])
def test_out_of_memory_halves_the_work_and_keeps_the_draws(strategy: Any, limit: int) -> None:
    x = torch.randn(10, 4)
    want = draws(Greedy(1000), (x,), "loop")
    assert torch.equal(draws(Greedy(limit), (x,), strategy), want)


def test_out_of_memory_with_one_row_is_the_users_to_see() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        draws(Greedy(0), (torch.randn(3, 4),), "loop")


def test_bad_settings_are_named() -> None:
    with pytest.raises(
        BadInput, match="strategy must be one of auto, replay, compact, vmap, fold, fold_tail, loop, got 'fast'"
    ):
        Sampler(strategy="fast")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="memory_budget must be a positive"):
        Sampler(memory_budget=0)


def test_outputs_without_an_axis_of_examples_are_refused() -> None:
    class Pools(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=0)

    with pytest.raises(BadInput, match="first axis must be that of the examples"):
        Forward(Pools(), (torch.randn(4, 3),), {})()
    with pytest.raises(BadInput, match="no tensor among the inputs"):
        Forward(Pools(), ("text",), {})


def test_an_error_of_the_network_says_what_it_was_called_on() -> None:
    for predictor in (bg.MCDropout(mlp(nn.Dropout(0.5))), bg.Deterministic(mlp())):
        with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
            predictor(torch.randn(100, 5))
        assert "inputs of shape (2, 5); bayesguard tries" in "".join(caught.value.__notes__)
