"""SmoothECE against quadrature with mirrored kernels, the kernel error against loops, and the test's p-values."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.functional.smooth import (
    _pair_sums,
    binary_smooth_calibration_error,
    calibration_test,
    kernel_calibration_error,
    smooth_calibration_error,
)

Floats = npt.NDArray[np.float64]
ROWS = st.lists(
    st.tuples(st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1)), st.booleans()),
    min_size=1,
    max_size=12,
)


def smoothed(scores: Floats, gaps: Floats, bandwidth: float) -> float:
    """The mean absolute smoothed gap: mirror images of every score, and the trapezoidal rule."""
    grid = np.linspace(0, 1, 8001)
    value = np.zeros_like(grid)
    for score, gap in zip(scores, gaps, strict=True):
        for image in range(-5, 6):
            for mirrored in (score + 2 * image, -score + 2 * image):
                value += gap / len(scores) * stats.norm.pdf(grid, mirrored, bandwidth)
    return float(np.trapezoid(np.abs(value), grid))


def made(rows: int, classes: int, seed: int = 0, sharpen: float = 1.0) -> tuple[Tensor, Tensor]:
    """Probabilities, and labels drawn from them; calibrated if `sharpen` is 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return (sharpen * logits).softmax(-1), labels


@settings(max_examples=40, deadline=None)
@given(rows=ROWS)
def test_smooth_error_is_the_fixed_point(rows: list[tuple[float, bool]]) -> None:
    scores, hits = np.array([r[0] for r in rows]), np.array([float(r[1]) for r in rows])
    ours = binary_smooth_calibration_error(scores, hits)
    assert ours.dtype == torch.float64
    error = ours.item()
    if error > 0.005:  # the grid of the trapezoidal rule is too coarse for narrower kernels
        assert smoothed(scores, hits - scores, error) == pytest.approx(error, abs=1e-6)
    else:
        assert smoothed(scores, hits - scores, 0.005) <= 0.005 + 1e-6
    # No kernel makes the mean of absolute gaps larger, or smaller than the absolute mean gap.
    assert abs((hits - scores).mean()) - 1e-12 <= error <= np.abs(hits - scores).mean() + 1e-12


def test_smooth_error_where_it_is_known() -> None:
    # Gaps of one sign do not cancel, at any bandwidth.
    assert binary_smooth_calibration_error([0.3], [1]).item() == pytest.approx(0.7, abs=1e-7)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(200, generator=generator, dtype=torch.float64)
    assert binary_smooth_calibration_error(scores, [0] * 200).item() == pytest.approx(scores.mean().item(), abs=1e-12)
    # Gaps that cancel at the same score do so at any bandwidth.
    assert binary_smooth_calibration_error([0.5] * 4, [0, 1, 0, 1]).item() == pytest.approx(0.0, abs=1e-12)
    assert binary_smooth_calibration_error([0.0, 1.0], [0, 1]).item() == 0.0
    rare = torch.full((1000,), 1e-5, dtype=torch.float64)  # below the narrowest bandwidth
    assert binary_smooth_calibration_error(rare, torch.zeros(1000)).item() == pytest.approx(1e-5, rel=1e-9)


@pytest.mark.parametrize(("rows", "distance"), [(1000, 0.05), (1000, 0.001), (10_000, 0.0001)])
def test_smooth_error_of_two_opposite_gaps(rows: int, distance: float) -> None:
    # Far from 0 and 1, two opposite masses m at distance d leave 2 m erf(d / (2 sqrt(2) bandwidth)).
    scores = torch.tensor([0.5, 0.5 + distance], dtype=torch.float64).repeat_interleave(rows)
    hits = torch.zeros(2, rows, dtype=torch.float64)
    moved = round(rows * distance)
    hits[0, : rows // 2 + moved] = 1
    hits[1, : rows // 2] = 1
    error = binary_smooth_calibration_error(scores, hits.flatten()).item()
    left = moved / rows * math.erf(distance / (2 * math.sqrt(2) * error))
    assert 0.5 * moved / rows < error < moved / rows
    assert error == pytest.approx(left, rel=1e-8)


def test_top_label_is_the_binary_error_of_the_confidence() -> None:
    probs, targets = made(300, 4, sharpen=2.0)
    confidence, label = probs.max(-1)
    wanted = binary_smooth_calibration_error(confidence, label == targets)
    assert smooth_calibration_error(probs, targets).item() == pytest.approx(wanted.item(), abs=1e-12)
    dense = smooth_calibration_error(probs.reshape(30, 10, 4), targets.reshape(30, 10))
    assert dense.item() == pytest.approx(wanted.item(), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 40), classes=st.integers(2, 5))
def test_smooth_error_knows_no_order_and_no_number(seed: int, rows: int, classes: int) -> None:
    probs, targets = made(rows, classes, seed, sharpen=1.5)
    error = smooth_calibration_error(probs, targets).item()
    generator = torch.Generator().manual_seed(seed)
    order, names = torch.randperm(rows, generator=generator), torch.randperm(classes, generator=generator)
    again = smooth_calibration_error(probs[order][:, names.argsort()], names[targets[order]])
    assert again.item() == pytest.approx(error, abs=1e-11)
    twice = smooth_calibration_error(probs.repeat(2, 1), targets.repeat(2))
    assert twice.item() == pytest.approx(error, abs=1e-11)
    weights = torch.randint(1, 4, (rows,), generator=generator)
    index = torch.arange(rows).repeat_interleave(weights)
    repeated = smooth_calibration_error(probs[index], targets[index]).item()
    assert smooth_calibration_error(probs, targets, weights=weights).item() == pytest.approx(repeated, abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_lower_precision_has_the_values_of_its_probabilities(dtype: torch.dtype) -> None:
    scores, hits = torch.rand(500, generator=torch.Generator().manual_seed(0)).to(dtype), torch.arange(500) % 2
    assert binary_smooth_calibration_error(scores, hits) == binary_smooth_calibration_error(scores.double(), hits)
    probs, targets = made(60, 3)
    for function in (smooth_calibration_error, kernel_calibration_error, calibration_test):
        assert function(probs.to(dtype), targets) == function(probs.to(dtype).double(), targets)


def test_smooth_error_falls_to_zero_when_calibrated_and_not_otherwise() -> None:
    fair = [smooth_calibration_error(*made(rows, 3)).item() for rows in (100, 10_000)]
    assert fair[1] < fair[0] / 2
    assert smooth_calibration_error(*made(10_000, 3, sharpen=2.0)).item() > 5 * fair[1]


def pairs(probs: Tensor, targets: Tensor, bandwidth: float) -> float:
    """The definition, pair by pair."""
    p, y = probs.double().numpy(), targets.tolist()
    units = np.eye(p.shape[1])
    values = [
        math.exp(-np.abs(p[i] - p[j]).sum() / 2 / bandwidth) * float((units[y[i]] - p[i]) @ (units[y[j]] - p[j]))
        for i in range(len(p))
        for j in range(i)
    ]
    return math.fsum(values) / len(values)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(2, 12), classes=st.integers(2, 4))
def test_kernel_error_is_the_mean_over_pairs(seed: int, rows: int, classes: int) -> None:
    probs, targets = made(rows, classes, seed)
    given_width = kernel_calibration_error(probs, targets, bandwidth=0.3)
    assert given_width.item() == pytest.approx(pairs(probs, targets, 0.3), abs=1e-12)
    p = probs.numpy()
    median = np.median([np.abs(p[i] - p[j]).sum() / 2 for i in range(rows) for j in range(i)])
    ours = kernel_calibration_error(probs, targets).item()
    assert ours == pytest.approx(pairs(probs, targets, float(median)), abs=1e-12)
    generator = torch.Generator().manual_seed(seed)
    order, names = torch.randperm(rows, generator=generator), torch.randperm(classes, generator=generator)
    again = kernel_calibration_error(probs[order][:, names.argsort()], names[targets[order]])
    assert again.item() == pytest.approx(ours, abs=1e-12)
    double, both = probs.repeat(2, 1), targets.repeat(2)
    twice = kernel_calibration_error(double, both, bandwidth=0.3)
    assert twice.item() == pytest.approx(pairs(double, both, 0.3), abs=1e-12)


def test_kernel_error_in_slices_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, targets = made(50, 3)
    whole = kernel_calibration_error(probs, targets).item()
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 120)
    assert kernel_calibration_error(probs, targets).item() == pytest.approx(whole, abs=1e-14)


def test_bandwidth_of_many_rows_and_of_equal_rows() -> None:
    probs, targets = made(1500, 3)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(1))
    ours = kernel_calibration_error(probs, targets).item()
    assert kernel_calibration_error(probs[order], targets[order]).item() == pytest.approx(ours, abs=1e-14)
    same = torch.tensor([[0.5, 0.5]] * 4, dtype=torch.float64)
    assert kernel_calibration_error(same, [0, 0, 1, 1]).item() == pytest.approx(-1 / 6)
    mostly = torch.tensor([[0.5, 0.5]] * 4 + [[0.9, 0.1]], dtype=torch.float64)  # the median distance is 0
    labels = torch.tensor([0, 0, 1, 1, 0])
    mean = 4 * 0.4 / 10
    assert kernel_calibration_error(mostly, labels).item() == pytest.approx(pairs(mostly, labels, mean), abs=1e-12)


def test_kernel_error_is_unbiased() -> None:
    fair = torch.stack([kernel_calibration_error(*made(30, 3, seed), bandwidth=0.3) for seed in range(400)])
    tolerance = 5 * fair.std().item() / 20
    assert abs(fair.mean().item()) < tolerance
    unfair = torch.stack(
        [kernel_calibration_error(*made(30, 3, seed, sharpen=3.0), bandwidth=0.3) for seed in range(400)]
    )
    assert unfair.mean().item() > tolerance  # what is miscalibrated must be seen to be


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_sums_of_drawn_labels_are_those_of_pairs(seed: int) -> None:
    probs, targets = made(7, 3, seed)
    other = torch.randint(3, (7,), generator=torch.Generator().manual_seed(seed))
    sums = _pair_sums(probs, torch.stack([targets, other]), 0.3)
    for value, labels in zip(sums.tolist(), (targets, other), strict=True):
        assert value == pytest.approx(42 * pairs(probs, labels, 0.3), abs=1e-12)


@pytest.mark.parametrize("block_size", [500, 15])
def test_p_values_are_uniform_only_under_calibration(block_size: int) -> None:
    def p_values(sharpen: float) -> list[float]:
        some: dict[str, Any] = {"num_resamples": 99, "block_size": block_size}
        return [calibration_test(*made(60, 3, seed, sharpen), seed, **some).item() for seed in range(120)]

    # The values are 1/100, ..., 1: made continuous, they are uniform, not merely nearly so.
    noise = np.random.default_rng(0).uniform(0, 1 / 100, 120)
    assert stats.kstest(np.array(p_values(1.0)) - noise, "uniform").pvalue > 1e-3
    unfair = np.array(p_values(4.0))
    assert stats.kstest(unfair - noise, "uniform").pvalue < 1e-10
    assert (unfair <= 0.05).mean() > 0.5


def test_test_repeats_itself_and_leaves_the_generator_alone() -> None:
    probs, targets = made(100, 3)
    state = torch.get_rng_state()
    first = calibration_test(probs, targets, seed=3)
    assert torch.equal(first, calibration_test(probs, targets, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert first.dtype == torch.float64
    assert calibration_test([[1.0, 0.0]] * 5, [0] * 5).item() == 1.0  # sure and right: no draw differs
    assert calibration_test([[1.0, 0.0]] * 5, [1] * 5).item() == 0.005


def test_bad_input_is_named() -> None:
    probs, targets = made(4, 3)
    for function in (smooth_calibration_error, kernel_calibration_error, calibration_test):
        with pytest.raises(BadInput, match=r"NaN.*row 1"):
            function([[0.5, 0.5], [math.nan, 0.5]], [0, 0])
        with pytest.raises(BadInput, match="at least one row"):
            function(probs[:0], targets[:0])
        with pytest.raises(BadInput, match="exactly"):
            function(probs, targets.unsqueeze(-1))
        with pytest.raises(BadInput, match="label 3 in row 0"):
            function(probs, torch.full((4,), 3))
        with pytest.raises(BadType, match="integer"):
            function(probs, targets.double())
    with pytest.raises(BadInput, match="sigmoid"):
        binary_smooth_calibration_error([0.5, 3.0], [0, 1])
    with pytest.raises(BadInput, match="weights"):
        smooth_calibration_error(probs, targets, weights=[0.0] * 4)
    with pytest.raises(BadInput, match="1 row"):
        kernel_calibration_error(probs[:1], targets[:1])
    with pytest.raises(BadInput, match="bandwidth"):
        kernel_calibration_error(probs, targets, bandwidth=0.0)
    with pytest.raises(BadInput, match="block_size"):
        calibration_test(probs, targets, block_size=1)
    with pytest.raises(BadInput, match="num_resamples"):
        calibration_test(probs, targets, num_resamples=0)
    with pytest.raises(BadInput, match="seed"):
        calibration_test(probs, targets, seed=-1)
