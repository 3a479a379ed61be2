"""Thresholds between in and out of distribution, against scikit-learn and loops over all of them."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_curve
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M

Side = Literal["out", "in"]
SIDES: tuple[Side, Side] = ("out", "in")
SCORES = st.lists(st.integers(0, 5).map(lambda i: i / 4), min_size=1, max_size=8)
LEVELS = st.sampled_from([0.05, 0.25, 0.5, 0.75, 0.95])


def sorted_by_side(inside: list[float], outside: list[float], positive: Side) -> tuple[list[float], list[float]]:
    """Scores of positives and of negatives, larger is more positive."""
    return (outside, inside) if positive == "out" else ([-s for s in inside], [-s for s in outside])


def brute_precision(positives: list[float], negatives: list[float]) -> float:
    area = recall = 0.0
    for threshold in sorted({*positives, *negatives}, reverse=True):
        hits, alarms = (sum(s >= threshold for s in side) for side in (positives, negatives))
        area += (hits / len(positives) - recall) * hits / (hits + alarms)
        recall = hits / len(positives)
    return area


def brute_rate(positives: list[float], negatives: list[float], level: float) -> float:
    rates = []
    for threshold in {*positives, *negatives}:
        hits, alarms = (sum(s >= threshold for s in side) for side in (positives, negatives))
        if hits / len(positives) >= level:
            rates.append(alarms / len(negatives))
    return min(rates)


@settings(max_examples=100, deadline=None)
@given(inside=SCORES, outside=SCORES, level=LEVELS)
def test_both_are_their_definitions(inside: list[float], outside: list[float], level: float) -> None:
    for positive in SIDES:
        sides = sorted_by_side(inside, outside, positive)
        area = M.area_under_precision_recall(inside, outside, positive=positive)
        assert area.item() == pytest.approx(brute_precision(*sides), abs=1e-12)
        rate = M.false_positive_rate_at(inside, outside, level, positive=positive)
        assert rate.item() == pytest.approx(brute_rate(*sides, level), abs=1e-12)
        assert area.dtype == rate.dtype == torch.float64
        assert area.dim() == rate.dim() == 0
        assert 0 < area.item() <= 1 + 1e-12
        # The other side is the same question about negated scores.
        other: Side = "in" if positive == "out" else "out"
        swapped = [-s for s in outside], [-s for s in inside]
        assert M.area_under_precision_recall(*swapped, positive=other).item() == pytest.approx(area.item(), abs=1e-12)
        assert M.false_positive_rate_at(*swapped, level, positive=other).item() == rate.item()


@settings(max_examples=40, deadline=None)
@given(inside=SCORES, outside=SCORES, level=LEVELS, data=st.data())
def test_weights_are_repeats_and_order_does_not_matter(
    inside: list[float], outside: list[float], level: float, data: st.DataObject
) -> None:
    sides: list[Tensor] = []
    weights, repeats = [], []
    for side in (inside, outside):
        counts = data.draw(st.lists(st.integers(0, 4), min_size=len(side), max_size=len(side)).filter(any))
        order = torch.tensor(data.draw(st.permutations(range(len(side)))))
        values, mass = torch.tensor(side, dtype=torch.float64), torch.tensor(counts)
        sides.append(values[order])
        weights.append(mass[order])
        repeats.append(values.repeat_interleave(mass))
    for positive in SIDES:
        area = M.area_under_precision_recall(*repeats, positive=positive).item()
        rate = M.false_positive_rate_at(repeats[0], repeats[1], level, positive=positive).item()
        for factor in (1, 0.1):
            given_weights = [factor * mass.double() for mass in weights]
            ours = M.area_under_precision_recall(*sides, positive=positive, weights=given_weights)
            assert ours.item() == pytest.approx(area, abs=1e-12)
            ours = M.false_positive_rate_at(sides[0], sides[1], level, positive=positive, weights=given_weights)
            assert ours.item() == pytest.approx(rate, abs=1e-12)
        # A rate is of one side each: the weight of a whole side changes nothing.
        heavier = (7 * weights[0], weights[1])
        ours = M.false_positive_rate_at(sides[0], sides[1], level, positive=positive, weights=heavier)
        assert ours.item() == pytest.approx(rate, abs=1e-12)
        # Only the order of the scores counts.
        bent = [values.exp() for values in sides]
        ours = M.area_under_precision_recall(*bent, positive=positive, weights=weights)
        assert ours.item() == pytest.approx(area, abs=1e-12)


def made(rows: int = 700) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inside = torch.randint(30, (rows,), generator=generator).float() / 20
    return inside, torch.randint(10, 40, (rows // 3,), generator=generator).float() / 20


def test_against_sklearn() -> None:
    inside, outside = made()
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(len(side), generator=generator) for side in (inside, outside)]
    scores, is_out = torch.cat([inside, outside]), torch.arange(len(inside) + len(outside)) >= len(inside)
    for positive in SIDES:
        truth, sign = (is_out, 1) if positive == "out" else (~is_out, -1)
        for given_weights, theirs in ((None, None), (weights, torch.cat(weights).double().numpy())):
            area = average_precision_score(truth.numpy(), (sign * scores).numpy(), sample_weight=theirs)
            ours = M.area_under_precision_recall(inside, outside, positive=positive, weights=given_weights)
            assert ours.item() == pytest.approx(area, abs=1e-12)
            false, true, _ = roc_curve(
                truth.numpy(), (sign * scores).numpy(), sample_weight=theirs, drop_intermediate=False
            )
            for level in (0.5, 0.8, 0.95):
                wanted = false[(true >= level).argmax()]
                ours = M.false_positive_rate_at(inside, outside, level, positive=positive, weights=given_weights)
                assert ours.item() == pytest.approx(wanted, abs=1e-12)


def test_scores_that_say_nothing() -> None:
    for inside, outside in ((3, 5), (100, 1)):
        share = outside / (inside + outside)
        sides = [0.5] * inside, [0.5] * outside
        assert M.area_under_precision_recall(*sides, positive="out").item() == pytest.approx(share, abs=1e-15)
        assert M.area_under_precision_recall(*sides, positive="in").item() == pytest.approx(1 - share, abs=1e-15)
        assert M.false_positive_rate_at(*sides, positive="out").item() == 1.0
        # Weights set the share.
        even = ([1 / inside] * inside, [1 / outside] * outside)
        assert M.area_under_precision_recall(*sides, positive="in", weights=even).item() == pytest.approx(0.5)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 20_000, generator=generator)
    rate = M.false_positive_rate_at(noise[0], noise[1], positive="in").item()
    # Of two independent samples, the variance of such a rate is twice that of a share.
    assert abs(rate - 0.95) < 5 * math.sqrt(2 * 0.95 * 0.05 / 20_000)


def test_perfect_scores_and_the_two_sides_differ() -> None:
    for positive in SIDES:
        assert M.area_under_precision_recall([0.1, 0.2], [0.3], positive=positive).item() == 1.0
        assert M.false_positive_rate_at([0.1, 0.2], [0.3], positive=positive).item() == 0.0
    # One in-distribution row of ten that looks far out, and one of the others that looks familiar.
    inside, outside = [0.1] * 9 + [0.9], [0.5] * 9 + [0.05]
    assert M.false_positive_rate_at(inside, outside, 0.9, positive="in").item() == pytest.approx(0.1)
    assert M.false_positive_rate_at(inside, outside, positive="in").item() == 1.0
    assert M.false_positive_rate_at(inside, outside, 0.9, positive="out").item() == pytest.approx(0.1)


@pytest.mark.parametrize("count", [20, 100, 140, 1000])
def test_a_level_that_is_met_exactly_is_met(count: int) -> None:
    positives = torch.arange(count, dtype=torch.float64)
    weights = (None, torch.full((count,), 0.1, dtype=torch.float64))  # whose sums are rounded
    for k in range(1, count):
        # The threshold that finds k of n is just above the negative; that for k + 1 is below it.
        negative = [count - k - 0.5]
        for given_weights in (None, weights):
            rate = M.false_positive_rate_at(negative, positives, k / count, positive="out", weights=given_weights)
            assert rate.item() == 0.0
            rate = M.false_positive_rate_at(
                negative, positives, k / count + 1e-9, positive="out", weights=given_weights
            )
            assert rate.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_lower_precision_has_the_values_of_its_numbers(dtype: torch.dtype) -> None:
    inside, outside = (side.to(dtype) for side in made())
    for metric in (M.area_under_precision_recall, M.false_positive_rate_at):
        assert metric(inside, outside, positive="out") == metric(inside.double(), outside.double(), positive="out")


def test_bad_input_is_named() -> None:
    for metric in (M.area_under_precision_recall, M.false_positive_rate_at):
        with pytest.raises(BadInput, match="out_scores"):
            metric([0.1], [], positive="out")
        with pytest.raises(BadInput, match=r"in_scores.*row 1"):
            metric([0.1, math.nan], [0.2], positive="out")
        with pytest.raises(BadInput, match=r"'out' or 'in'.*'both'"):
            metric([0.1], [0.2], positive="both")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="positive"):
            metric([0.1], [0.2])  # type: ignore[call-arg]
        with pytest.raises(BadType, match="pair"):
            metric([0.1], [0.2], positive="out", weights=torch.ones(2))  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="exactly"):
            metric([0.1], [0.2], positive="out", weights=([1.0, 1.0], None))
        with pytest.raises(BadInput, match="not all zero"):
            metric([0.1], [0.2], positive="out", weights=(None, [0.0]))
    with pytest.raises(BadInput, match="true_positive_rate"):
        M.false_positive_rate_at([0.1], [0.2], 1.0, positive="in")
