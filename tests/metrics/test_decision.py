"""Decisions against loops over rows, actions, thresholds and replacements."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M

ROWS = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 1)), min_size=1, max_size=14)
COSTS = st.lists(st.lists(st.integers(-4, 4).map(lambda i: i / 4), min_size=2, max_size=2), min_size=1, max_size=4)


def sides(scores: list[float], hits: list[int], threshold: float) -> tuple[list[float], float]:
    """The gap of each side, and the share-weighted mean of their sizes."""
    gaps, error = [], 0.0
    for above in (False, True):
        kept = [(p, y) for p, y in zip(scores, hits, strict=True) if (p >= threshold) == above]
        gaps.append(math.fsum(p - y for p, y in kept) / len(kept) if kept else math.nan)
        error += abs(gaps[-1]) * len(kept) / len(scores) if kept else 0.0
    return gaps, error


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, threshold=st.integers(1, 9))
def test_the_two_sides_are_their_definition(rows: list[tuple[int, int]], threshold: int) -> None:
    scores, hits = [p / 10 for p, _ in rows], [y for _, y in rows]
    gaps, error = sides(scores, hits, threshold / 10)
    found = M.binary_calibration_error_at(torch.tensor(scores, dtype=torch.float64), hits, threshold / 10)
    assert found.error.item() == pytest.approx(error, abs=1e-14)
    assert found.gap_below.item() == pytest.approx(gaps[0], abs=1e-14, nan_ok=True)
    assert found.gap_above.item() == pytest.approx(gaps[1], abs=1e-14, nan_ok=True)
    assert found.share_above.item() == pytest.approx(sum(p >= threshold / 10 for p in scores) / len(rows))
    assert all(part.dtype == torch.float64 and part.dim() == 0 for part in found)


def made(rows: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(rows, classes, generator=generator, dtype=torch.float64).softmax(-1)
    return probs, torch.randint(classes, (rows,), generator=generator)


def test_the_top_label_is_its_confidence() -> None:
    probs, y = made(60, 4)
    confidence, label = probs.max(-1)
    ours = M.calibration_error_at(probs, y, 0.5)
    wanted = M.binary_calibration_error_at(confidence, (label == y).long(), 0.5)
    torch.testing.assert_close(torch.stack(ours), torch.stack(wanted), rtol=0, atol=1e-15)
    dense = M.calibration_error_at(probs.reshape(6, 5, 2, 4), y.reshape(6, 5, 2), 0.5)
    assert torch.equal(torch.stack(dense), torch.stack(ours))
    # The error of one threshold cannot be above that of bins which meet there.
    assert ours.error <= M.expected_calibration_error(probs, y, num_bins=10) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_score_on_the_threshold_is_above(dtype: torch.dtype) -> None:
    scores = torch.tensor([0.3, 0.2], dtype=dtype)
    assert M.binary_calibration_error_at(scores, [1, 0], 0.3).share_above.item() == 0.5
    rows = torch.stack([torch.tensor([0.7, 0.6], dtype=dtype), torch.tensor([0.3, 0.4], dtype=dtype)], -1)
    assert M.calibration_error_at(rows, [1, 0], 0.7).share_above.item() == 0.5


def chosen(p: list[float], losses: list[list[float]]) -> int:
    expected = [math.fsum(q * cost for q, cost in zip(p, row, strict=True)) for row in losses]
    return next(a for a, value in enumerate(expected) if value <= min(expected) + 1e-12)


def costs(probs: list[list[float]], labels: list[int], losses: list[list[float]]) -> dict[str, float]:
    """Promised, realised, of the best replacement of every action, and of the best action for all rows."""
    picked, count = [chosen(p, losses) for p in probs], len(probs)
    actions = range(len(losses))
    replaced = [
        math.fsum(losses[new[a]][y] for a, y in zip(picked, labels, strict=True)) / count
        for new in itertools.product(actions, repeat=len(losses))
    ]
    return {
        "promised": math.fsum(
            math.fsum(q * c for q, c in zip(p, losses[a], strict=True)) for p, a in zip(probs, picked, strict=True)
        )
        / count,
        "realised": math.fsum(losses[a][y] for a, y in zip(picked, labels, strict=True)) / count,
        "replaced": min(replaced),
        "best_fixed": min(math.fsum(losses[a][y] for y in labels) / count for a in actions),
    }


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 12), classes=st.integers(3, 4), actions=st.integers(1, 4), seed=st.integers(0, 1000))
def test_costs_of_many_classes_are_their_definition(rows: int, classes: int, actions: int, seed: int) -> None:
    probs, y = made(rows, classes, seed)
    losses = torch.randint(-4, 5, (actions, classes), generator=torch.Generator().manual_seed(seed)).double() / 4
    wanted = costs(probs.tolist(), y.tolist(), losses.tolist())
    found = M.decision_regret(probs, y, losses)
    assert found.promised.item() == pytest.approx(wanted["promised"], abs=1e-13)
    assert found.realised.item() == pytest.approx(wanted["realised"], abs=1e-13)
    assert found.recalibrated.item() == pytest.approx(wanted["replaced"], abs=1e-13)
    assert found.best_fixed.item() == pytest.approx(wanted["best_fixed"], abs=1e-13)
    assert found.gap.item() == pytest.approx(wanted["realised"] - wanted["promised"], abs=1e-13)
    assert found.regret.item() >= -1e-13
    assert found.fixed_regret.item() <= found.regret.item() + 1e-13


def monotone(scores: list[float], hits: list[int], losses: list[list[float]]) -> float:
    """The least mean loss of all rules that give each score an action, by their order in P(yes)."""
    # An action further on must gain at least as much from a yes: only such rules follow from a rising probability.
    order = sorted(range(len(losses)), key=lambda a: losses[a][1] - losses[a][0], reverse=True)
    values = sorted(set(scores))
    best = math.inf
    for rule in itertools.combinations_with_replacement(order, len(values)):
        action = dict(zip(values, rule, strict=True))
        cost = math.fsum(losses[action[p]][y] for p, y in zip(scores, hits, strict=True)) / len(scores)
        best = min(best, cost)
    return best


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, losses=COSTS)
def test_recalibrated_yes_or_no_is_the_best_rising_rule(rows: list[tuple[int, int]], losses: list[list[float]]) -> None:
    scores, hits = [p / 10 for p, _ in rows], [y for _, y in rows]
    probs = [[1 - p, p] for p in scores]
    found = M.decision_regret(torch.tensor(probs, dtype=torch.float64), hits, torch.tensor(losses))
    wanted = costs(probs, hits, losses)
    assert found.promised.item() == pytest.approx(wanted["promised"], abs=1e-12)
    assert found.realised.item() == pytest.approx(wanted["realised"], abs=1e-12)
    assert found.best_fixed.item() == pytest.approx(wanted["best_fixed"], abs=1e-12)
    assert found.recalibrated.item() == pytest.approx(monotone(scores, hits, losses), abs=1e-12)
    assert found.regret.item() >= -1e-12


def test_right_probabilities_promise_what_they_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)).softmax(-1)
    y = torch.multinomial(probs, 1, generator=generator).squeeze(-1)
    losses = torch.tensor([[0.0, 4.0, 2.0], [1.0, 0.0, 3.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    found = M.decision_regret(probs, y, losses)
    action = (probs @ losses.t()).argmin(-1)
    tolerance = 5 * losses[action, y].std().item() / math.sqrt(20_000)
    assert abs(found.gap.item()) < tolerance
    assert found.regret.item() < tolerance
    assert found.fixed_regret.item() < 0
    sure = probs.pow(3)
    sure = sure / sure.sum(-1, keepdim=True)
    assert M.decision_regret(sure, y, losses).gap.item() > tolerance  # the twin that promises too much
    wrong = M.decision_regret(probs.flip(-1), y, losses)
    assert wrong.regret.item() > tolerance
    assert wrong.fixed_regret.item() > tolerance


def test_regret_does_not_depend_on_how_a_score_is_written() -> None:
    p = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.bernoulli(p, generator=torch.Generator().manual_seed(1)).long()
    losses = [[0.0, 1.0], [0.2, 0.0]]
    ours, squared = (M.decision_regret(torch.stack([1 - q, q], -1), y, losses) for q in (p, p.square()))
    assert squared.recalibrated.item() == pytest.approx(ours.recalibrated.item(), abs=1e-15)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    shuffled = M.decision_regret(torch.stack([1 - p, p], -1)[order], y[order], losses)
    torch.testing.assert_close(torch.stack(shuffled), torch.stack(ours), rtol=0, atol=1e-14)


def test_slices_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, y = made(50, 4)
    losses = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    whole = torch.stack(M.decision_regret(probs, y, losses))
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 20)
    torch.testing.assert_close(torch.stack(M.decision_regret(probs, y, losses)), whole, rtol=0, atol=1e-14)


def test_bad_input_is_named() -> None:
    probs: Any = [[0.5, 0.5], [0.5, 0.5]]
    for losses, message in (
        ([0.0, 1.0], r"losses has shape \(2,\); \[A, 2\] is needed"),
        ([[0.0, 1.0, 2.0]], "a column for each class"),
        ([[0.0, 1.0], [math.nan, 0.0]], "losses.*row 1"),
        (torch.zeros(0, 2), "losses"),
    ):
        with pytest.raises(BadInput, match=message):
            M.decision_regret(probs, [0, 1], losses)
    with pytest.raises(BadInput, match="target"):
        M.decision_regret(probs, [0, 2], [[0.0, 1.0]])
    with pytest.raises(BadType, match="floating"):
        M.decision_regret(torch.ones(2, 2).long(), [0, 1], [[0.0, 1.0]])
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(BadInput, match="threshold"):
            M.calibration_error_at(probs, [0, 1], level)
    with pytest.raises(BadInput, match="probs"):
        M.binary_calibration_error_at([1.5], [1], 0.5)
