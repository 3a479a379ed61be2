"""Gaps and the AUROC of errors, with intervals: against plain loops, the bootstrap, and simulated coverage."""

import math

import pytest
import torch

from bayesguard.metrics.functional.binned import BinnedSums, bin_index
from bayesguard.results import Answers
from bayesguard.summaries import confidence_gap, error_auroc, gaps_of_sums, normal_quantile


def answers(confidence: torch.Tensor, right: torch.Tensor) -> Answers:
    return Answers(confidence, right, confidence, right, confidence)


def drawn(count: int, seed: int) -> Answers:
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.5 + 0.5 * torch.rand(count, generator=generator, dtype=torch.float64)
    return answers(confidence, torch.bernoulli(confidence, generator=generator))


def test_normal_quantile() -> None:
    assert normal_quantile(0.95) == pytest.approx(1.959963984540054)


def test_gap_is_the_mean_with_its_standard_error() -> None:
    gap = confidence_gap(answers(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1.0, 0, 1, 0])), 4, 0.95)
    gaps = [-0.1, 0.8, -0.3, 0.6]
    error = math.sqrt(sum((g - 0.25) ** 2 for g in gaps) / 3 / 4)
    assert gap == pytest.approx((0.25, 0.25 - 1.959964 * error, 0.25 + 1.959964 * error), abs=1e-6)


def test_elements_of_a_dense_example_are_one_observation() -> None:
    one = drawn(200, 0)
    dense = answers(one.confidence.repeat_interleave(3), one.right.repeat_interleave(3))
    assert confidence_gap(dense, 200, 0.95) == pytest.approx(confidence_gap(one, 200, 0.95))
    assert error_auroc(dense, 200, 0.95) == pytest.approx(error_auroc(one, 200, 0.95))
    # The twin: taken as 600 examples, the interval would be far too short.
    short, honest = confidence_gap(dense, 600, 0.95), confidence_gap(one, 200, 0.95)
    assert short.upper - short.lower < 0.6 * (honest.upper - honest.lower)


def test_sums_give_the_gap_of_the_rows() -> None:
    one = drawn(300, 1)
    sums = BinnedSums.of(one.confidence, one.right, bin_index(one.confidence, 15, "width"), 15)
    (gap,) = gaps_of_sums(sums, 0.9)
    assert gap == pytest.approx(confidence_gap(one, 300, 0.9), abs=1e-12)
    (wider,) = gaps_of_sums(sums, 0.9, elements=4)
    assert wider.upper - wider.value == pytest.approx(2 * (gap.upper - gap.value))


def test_classes_have_a_gap_each() -> None:
    generator = torch.Generator().manual_seed(2)
    probs = torch.randn(100, 3, generator=generator, dtype=torch.float64).softmax(-1)
    labels = probs.multinomial(1, generator=generator).squeeze(-1)
    gaps = gaps_of_sums(BinnedSums.of_classes(probs, labels, 15), 0.95)
    for k, gap in enumerate(gaps):
        column = answers(probs[:, k], (labels == k).double())
        assert gap == pytest.approx(confidence_gap(column, 100, 0.95), abs=1e-12)


def test_auroc_and_its_error_are_those_of_delong_by_loops() -> None:
    confidence = torch.tensor([0.9, 0.8, 0.8, 0.7, 0.6, 0.6, 0.5])
    right = torch.tensor([1.0, 1, 0, 1, 0, 1, 0])
    wrong = [c for c, r in zip(confidence.tolist(), right.tolist(), strict=True) if r == 0]
    good = [c for c, r in zip(confidence.tolist(), right.tolist(), strict=True) if r == 1]

    def wins(w: float, g: float) -> float:
        return 1.0 if w < g else 0.5 if w == g else 0.0

    by_wrong = [sum(wins(w, g) for g in good) / len(good) for w in wrong]
    by_good = [sum(wins(w, g) for w in wrong) / len(wrong) for g in good]
    area = sum(by_wrong) / len(wrong)
    squares = sum(((v - area) / len(wrong)) ** 2 for v in by_wrong) + sum(
        ((v - area) / len(good)) ** 2 for v in by_good
    )
    error = math.sqrt(squares * 7 / 6)
    found = error_auroc(answers(confidence, right), 7, 0.5)
    half = 0.6744898 * error
    assert found == pytest.approx((area, area - half, min(1.0, area + half)), abs=1e-6)


def test_auroc_interval_covers_as_often_as_it_says() -> None:
    """Uniform confidences in [0.5, 1], right with that probability: the area is (by integration) 0.5 + 1/18."""
    # P(wrong < right) for densities 8 (1 - c) and (8 / 3) c on [0.5, 1].
    grid = torch.linspace(0.5, 1, 200_001, dtype=torch.float64)
    below = torch.cumulative_trapezoid(8 * (1 - grid), grid)
    truth = torch.trapezoid((8 / 3) * grid[1:] * below, grid[1:]).item()
    runs = 400
    found = [error_auroc(drawn(300, seed), 300, 0.9) for seed in range(runs)]
    covered = sum(estimate.lower <= truth <= estimate.upper for estimate in found) / runs
    tolerance = 5 * math.sqrt(0.9 * 0.1 / runs)
    assert abs(covered - 0.9) < tolerance
    # The twin: half as long an interval.
    halved = sum(abs(e.value - truth) <= (e.upper - e.lower) / 4 for e in found) / runs
    assert abs(halved - 0.9) > tolerance


def test_widened_intervals_rarely_call_any_of_ten_honest_groups() -> None:
    runs, groups = 400, 10
    called = {0.95: 0, 1 - 0.05 / groups: 0}
    for seed in range(runs):
        one = drawn(groups * 200, seed)
        each = [
            BinnedSums.of(score, right, bin_index(score, 15, "width"), 15)
            for score, right in zip(one.confidence.reshape(-1, groups).T, one.right.reshape(-1, groups).T, strict=True)
        ]
        sums = BinnedSums(torch.stack([s.rows for s in each]), torch.stack([s.sums for s in each], 1))
        for level in called:
            called[level] += any(gap.lower > 0 or gap.upper < 0 for gap in gaps_of_sums(sums, level))
    limit = 0.05 + 5 * math.sqrt(0.05 * 0.95 / runs)
    assert called[1 - 0.05 / groups] / runs < limit
    assert called[0.95] / runs > limit  # the twin: each at 95 %


def test_nothing_to_rank() -> None:
    for right in (torch.ones(3), torch.zeros(3)):
        assert all(math.isnan(value) for value in error_auroc(answers(torch.rand(3), right), 3, 0.95))
