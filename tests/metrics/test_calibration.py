"""Binned calibration errors against loops in float64, and the accumulator behind them."""

import math
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M
from bayesguard.metrics.functional.binned import BinnedSums, bin_index
from bayesguard.metrics.functional.inputs import answered


def brute(scores: list[float], hits: list[float], edges: list[float], norm: str, debiased: bool = False) -> float:
    """The definition, bin by bin and row by row: bin b is (edge b, edge b+1], and 0 is in the first."""
    normal = NormalDist()
    total, largest = 0.0, 0.0
    for b in range(len(edges) - 1):
        rows = [i for i, s in enumerate(scores) if (edges[b] < s or b == 0) and s <= edges[b + 1]]
        if not rows:
            continue
        mean = math.fsum(scores[i] for i in rows) / len(rows)
        rate = math.fsum(hits[i] for i in rows) / len(rows)
        gap = abs(mean - rate)
        largest = max(largest, gap)
        square = gap**2
        if debiased:
            variance = rate * (1 - rate) / max(1, len(rows) - 1)
            square = 0.0 if len(rows) == 1 else square - variance
            if variance > 0:
                z = gap / math.sqrt(variance)
                gap -= math.sqrt(variance) * 2 * (normal.pdf(z) - z * normal.cdf(-z))
            gap = 0.0 if len(rows) == 1 else gap
        total += len(rows) / len(scores) * (gap if norm == "l1" else square)
    return {"l1": max(0.0, total), "l2": math.sqrt(max(0.0, total)), "max": largest}[norm]


def edges_like(num_bins: int, dtype: torch.dtype) -> list[float]:
    inner = [torch.tensor(i / num_bins, dtype=torch.float64).to(dtype).double().item() for i in range(1, num_bins)]
    return [0.0, *inner, 1.0]


def made(rows: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(-1).to(dtype), torch.randint(classes, (rows,), generator=generator)


# Multiples of 1/60 lie on the edges of many numbers of bins; the ends and repeated values come often.
SCORES = st.lists(
    st.tuples(st.one_of(st.integers(0, 60).map(lambda i: i / 60), st.floats(0, 1)), st.booleans()),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=SCORES,
    num_bins=st.integers(1, 20),
    norm=st.sampled_from(["l1", "l2", "max"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_binary_error_is_the_definition(
    rows: list[tuple[float, bool]], num_bins: int, norm: Any, dtype: torch.dtype
) -> None:
    scores = torch.tensor([s for s, _ in rows], dtype=torch.float64).to(dtype)
    hits = torch.tensor([h for _, h in rows])
    ours = M.binary_calibration_error(scores, hits, num_bins=num_bins, norm=norm)
    theirs = brute(scores.double().tolist(), hits.double().tolist(), edges_like(num_bins, dtype), norm)
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(theirs, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(rows=SCORES, num_bins=st.integers(1, 12), order=st.randoms(use_true_random=False))
def test_equal_mass_depends_on_no_order_and_splits_no_ties(
    rows: list[tuple[float, bool]], num_bins: int, order: Any
) -> None:
    shuffled = list(rows)
    order.shuffle(shuffled)
    errors = [
        M.binary_calibration_error(
            torch.tensor([s for s, _ in some]), torch.tensor([h for _, h in some]), num_bins=num_bins, binning="mass"
        ).item()
        for some in (rows, shuffled)
    ]
    assert errors[0] == pytest.approx(errors[1], abs=1e-12)
    scores = torch.tensor([s for s, _ in rows])
    index = bin_index(scores, num_bins, "mass")
    assert int(index.min()) >= 0
    assert int(index.max()) < num_bins
    for value in scores.unique():
        assert len(index[scores == value].unique()) == 1
    ordered = index[scores.argsort()]
    assert bool((ordered.diff() >= 0).all())


def test_equal_mass_without_ties_has_equal_mass() -> None:
    scores = torch.rand(90, generator=torch.Generator().manual_seed(0))
    assert bin_index(scores, 9, "mass").bincount().tolist() == [10] * 9


def test_equal_mass_reports_the_effective_number_of_bins() -> None:
    probs = torch.tensor([[0.9, 0.1]] * 8 + [[0.6, 0.4]] * 2)
    bins = M.reliability_bins(probs, [0] * 10, num_bins=5, binning="mass")
    assert bins.num_filled == 2
    assert bins.count[bins.count > 0].tolist() == [2.0, 8.0]
    np.testing.assert_allclose(bins.lower[bins.count > 0], [0.6, 0.9], rtol=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("debiased", [False, True])
def test_top_label_error_is_the_definition(norm: Any, debiased: bool) -> None:
    probs, targets = made(400, 5)
    if debiased and norm == "max":
        with pytest.raises(BadInput, match="debiased"):
            M.expected_calibration_error(probs, targets, norm=norm, debiased=True)
        return
    confidence, label = probs.max(-1)
    hits = (label == targets).double().tolist()
    theirs = brute(confidence.double().tolist(), hits, edges_like(15, torch.float32), norm, debiased)
    ours = M.expected_calibration_error(probs, targets, norm=norm, debiased=debiased)
    assert ours.item() == pytest.approx(theirs, abs=1e-12)


def test_debiasing_takes_away_what_noise_adds() -> None:
    def mean_square(debiased: bool) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(1)
        found = []
        for _ in range(400):
            scores = torch.rand(100, generator=generator, dtype=torch.float64)
            hits = torch.rand(100, generator=generator, dtype=torch.float64) < scores
            sums = BinnedSums.of(scores, hits, bin_index(scores, 10, "width"), 10)
            rate = sums.hits / sums.count
            square = (sums.score / sums.count - rate).square() - debiased * rate * (1 - rate) / (sums.count - 1)
            ours = sums.error("l2", debiased=debiased).item()
            raw = float((sums.count.double() / 100 * square).sum())
            assert ours == pytest.approx(math.sqrt(max(0.0, raw)), abs=1e-9)
            found.append(raw)
        values = torch.tensor(found, dtype=torch.float64)
        return values.mean().item(), 5 * values.std().item() / math.sqrt(len(values))

    value, tolerance = mean_square(True)
    assert abs(value) < tolerance
    value, tolerance = mean_square(False)
    assert value > tolerance  # what is not debiased must be seen to be biased


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_classwise_error_is_that_of_each_class(norm: Any, binning: Any) -> None:
    probs, targets = made(300, 4)
    targets[targets == 2] = 1  # a class that no row has
    each = torch.stack(
        [
            M.binary_calibration_error(probs[:, k].contiguous(), targets == k, norm=norm, binning=binning)
            for k in range(4)
        ]
    )
    wanted = {"l1": each.mean(), "l2": each.square().mean().sqrt(), "max": each.max()}[norm]
    ours = M.classwise_calibration_error(probs, targets, norm=norm, binning=binning)
    assert ours.item() == pytest.approx(wanted.item(), abs=1e-12)


def test_classwise_error_in_slices_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, targets = made(50, 4)
    whole = M.classwise_calibration_error(probs, targets)
    monkeypatch.setattr("bayesguard.metrics.functional.inputs.BUDGET", 12)
    assert M.classwise_calibration_error(probs, targets).item() == pytest.approx(whole.item(), abs=1e-14)


def test_edges_ends_and_exact_arithmetic() -> None:
    # Every eleventh: scores i/10 with (a, b] bins of width 1/10, each in the bin that it closes.
    for dtype in (torch.float16, torch.float32, torch.float64):
        scores = (torch.arange(11, dtype=torch.float64) / 10).to(dtype)
        assert bin_index(scores, 10, "width").tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    for num_bins in (7, 15, 49, 99):
        scores = torch.arange(1, num_bins + 1, dtype=torch.float64) / num_bins
        assert bin_index(scores, num_bins, "width").tolist() == list(range(num_bins))


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=5), seed=st.integers(0, 1000))
def test_sums_of_parts_are_the_sums_of_the_whole(cuts: list[int], seed: int) -> None:
    probs, targets = made(60, 3, seed)
    whole = BinnedSums.of_classes(probs, targets, 15)
    bounds = [0, *sorted(cuts), 60]
    parts = [BinnedSums.of_classes(probs[a:b], targets[a:b], 15) for a, b in pairwise(bounds) if b > a]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    assert torch.equal(merged.rows, whole.rows)
    assert merged.rows.dtype == torch.int64
    torch.testing.assert_close(merged.sums, whole.sums, rtol=0, atol=1e-12)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_weights_are_repetitions(binning: Any) -> None:
    probs, targets = made(60, 3)
    weights = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(3))
    rows = torch.arange(60).repeat_interleave(weights)
    for function in (M.expected_calibration_error, M.classwise_calibration_error):
        for options in ({}, {"norm": "l2"}, {"norm": "max"}):
            some: dict[str, Any] = {"binning": binning, **options}
            ours = function(probs, targets, weights=weights, **some)
            assert ours.item() == pytest.approx(function(probs[rows], targets[rows], **some).item(), abs=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_debiasing_does_not_hang_on_the_scale_of_weights(norm: Any) -> None:
    probs, targets = made(200, 3)
    one = M.expected_calibration_error(probs, targets, norm=norm, debiased=True)
    assert one > 0
    for scale in (0.1, 1e-6, 1 / 3, 1e6):
        scaled = M.expected_calibration_error(probs, targets, norm=norm, debiased=True, weights=[scale] * 200)
        assert scaled.item() == pytest.approx(one.item(), rel=1e-9)
    bins = M.reliability_bins(probs, targets)
    scaled_bins = M.reliability_bins(probs, targets, weights=[1e-3] * 200)
    np.testing.assert_allclose(scaled_bins.accuracy_lower, bins.accuracy_lower, rtol=1e-9)


def test_debiasing_under_weights_takes_away_what_noise_adds() -> None:
    def mean_square(by_repetition: bool) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(2)
        found = []
        for _ in range(600):
            hits = torch.rand(60, generator=generator, dtype=torch.float64) < 0.3
            weights = 4 * torch.rand(60, generator=generator, dtype=torch.float64).square()
            sums = BinnedSums.of(torch.full((60,), 0.3).double(), hits, torch.zeros(60).long(), 1, weights)
            if by_repetition:  # as if a row of weight 2 were two rows
                rate = sums.hits / sums.count
                squares = (0.3 - rate).square() - rate * (1 - rate) / (sums.count - 1)
                found.append(float(squares))
            else:
                found.append(sums.errors("l2", debiased=True).item())
        values = torch.tensor(found, dtype=torch.float64)
        return values.mean().item(), 5 * values.std().item() / math.sqrt(len(values))

    value, tolerance = mean_square(False)
    assert abs(value) < tolerance
    value, tolerance = mean_square(True)
    assert value > tolerance  # squared weights are needed


def test_debiased_l1_is_the_mean_of_its_simulation() -> None:
    # Kumar's code draws what noise adds: error less (mean error of noisy rates less error), with n - 1 in place of n.
    probs, targets = made(300, 3)
    sums = BinnedSums.of(*(found := answered(probs, targets)), bin_index(found[0], 10, "width"), 10)
    filled = sums.count > 1
    rate, count = (sums.hits / sums.count)[filled], sums.count[filled]
    gap = (sums.score / sums.count)[filled] - rate
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, len(gap), generator=generator, dtype=torch.float64)
    share = count / sums.count.sum()
    draws = ((gap + noise * (rate * (1 - rate) / (count - 1)).sqrt()).abs() * share).sum(-1)
    wanted = 2 * float((gap.abs() * share).sum()) - draws.mean().item()
    tolerance = 5 * draws.std().item() / math.sqrt(len(draws))
    assert abs(sums.error("l1", debiased=True).item() - wanted) < tolerance
    assert abs(sums.error("l1").item() - wanted) > tolerance


def test_debiasing_l1_takes_away_part_of_the_bias() -> None:
    raw, less = [], []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(300, generator=generator, dtype=torch.float64)
        hits = torch.rand(300, generator=generator, dtype=torch.float64) < scores
        raw.append(M.binary_calibration_error(scores, hits, num_bins=10).item())
        less.append(M.binary_calibration_error(scores, hits, num_bins=10, debiased=True).item())
    for values in (np.subtract(raw, less), np.array(less)):  # some goes, some stays
        assert float(values.mean()) > 5 * float(values.std()) / math.sqrt(len(values))


def test_reliability_bins_and_wilson() -> None:
    probs, targets = made(500, 3)
    bins = M.reliability_bins(probs, targets, num_bins=10)
    assert all(
        getattr(bins, name).dtype == torch.float64
        for name in ("lower", "upper", "count", "confidence", "accuracy", "accuracy_lower", "accuracy_upper")
    )
    assert bins.count.sum() == 500
    filled = bins.count > 0
    gap = (bins.count / 500 * (bins.confidence - bins.accuracy).abs())[filled].sum()
    assert gap.item() == pytest.approx(M.expected_calibration_error(probs, targets, num_bins=10).item(), abs=1e-12)
    assert bool(bins.confidence[~filled].isnan().all())
    # Wilson's interval holds the rates q with |rate - q| <= z sqrt(q (1 - q) / n): its ends are where that is equal.
    z = 1.959963984540054
    n, rate = bins.count[filled], bins.accuracy[filled]
    for end in (bins.accuracy_lower[filled], bins.accuracy_upper[filled]):
        inside = (end > 1e-12) & (end < 1 - 1e-12)
        np.testing.assert_allclose((rate - end).abs()[inside], (z * (end * (1 - end) / n).sqrt())[inside], rtol=1e-9)


def test_dense_predictions_are_flattened() -> None:
    probs, targets = made(24, 3)
    flat = M.expected_calibration_error(probs, targets)
    dense = M.expected_calibration_error(probs.reshape(2, 3, 4, 3), targets.reshape(2, 3, 4))
    assert dense.item() == flat.item()
    weighted = M.expected_calibration_error(probs.reshape(2, 12, 3), targets.reshape(2, 12), weights=[1.0, 0.0])
    assert weighted.item() == pytest.approx(M.expected_calibration_error(probs[:12], targets[:12]).item(), abs=1e-12)


def test_bad_input_is_named() -> None:
    probs, targets = made(4, 3)
    with pytest.raises(BadInput, match=r"row 1.*softmax"):
        M.expected_calibration_error(torch.tensor([[0.5, 0.5], [2.0, -1.0]]), [0, 1])
    with pytest.raises(BadInput, match="exactly"):
        M.expected_calibration_error(probs, targets.unsqueeze(-1))
    with pytest.raises(BadInput, match="label 3 in row 0"):
        M.classwise_calibration_error(probs, torch.full((4,), 3))
    with pytest.raises(BadInput, match="at least one row"):
        M.expected_calibration_error(probs[:0], targets[:0])
    with pytest.raises(BadInput, match="two classes"):
        M.expected_calibration_error(torch.ones(4, 1), targets)
    with pytest.raises(BadType, match="integer"):
        M.expected_calibration_error(probs, targets.float())
    with pytest.raises(BadInput, match=r"sigmoid.*"):
        M.binary_calibration_error([0.5, 3.0], [0, 1])
    with pytest.raises(BadInput, match="row 1"):
        M.binary_calibration_error([0.5, 0.5], [0, 2])
    with pytest.raises(BadInput, match="weights"):
        M.expected_calibration_error(probs, targets, weights=[-1.0, 1, 1, 1])
    with pytest.raises(BadInput, match="binning"):
        M.expected_calibration_error(probs, targets, binning="rank")  # type: ignore[arg-type]


def test_numpy_is_accepted_and_left_as_it_was() -> None:
    probs, targets = made(20, 3)
    array = probs.numpy().copy()
    array.flags.writeable = False
    ours = M.expected_calibration_error(array, targets.numpy().astype(np.uint8))
    assert ours.item() == M.expected_calibration_error(probs, targets).item()
