"""Scores of vectors, quantiles and standard deviations against loops; the test of the PIT against SciPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import mean_pinball_loss
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M
from bayesguard.metrics.functional.multivariate import (
    Estimator,
    energy_score,
    expected_normalised_calibration_error,
    pit_uniformity_test,
    variogram_score,
    weighted_interval_score,
)
from bayesguard.predictive import Predictive, SamplePredictive


def made(samples: int, rows: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, rows, size, generator=generator, dtype=torch.float64),
        torch.randn(rows, size, generator=generator, dtype=torch.float64),
    )


def energy(samples: Tensor, targets: Tensor, fair: bool) -> float:
    count, rows = samples.shape[:2]
    total = 0.0
    for n in range(rows):
        draws, y = samples[:, n].tolist(), targets[n].tolist()
        near = math.fsum(math.dist(x, y) for x in draws) / count
        pairs = count * (count - 1) if fair else count**2
        total += near - math.fsum(math.dist(a, b) for a in draws for b in draws) / (2 * pairs)
    return total / rows


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(2, 5),
    rows=st.integers(1, 4),
    size=st.integers(1, 3),
    seed=st.integers(0, 999),
    fair=st.booleans(),
)
def test_energy_score_is_the_definition(count: int, rows: int, size: int, seed: int, fair: bool) -> None:
    samples, targets = made(count, rows, size, seed)
    estimator: Estimator = "fair" if fair else "nrg"
    ours = energy_score(samples, targets, estimator=estimator)
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(energy(samples, targets, fair), abs=1e-12)
    generator = torch.Generator().manual_seed(seed)
    rows_order, draws, axes = (torch.randperm(n, generator=generator) for n in (rows, count, size))
    mixed = energy_score(samples[draws][:, rows_order][..., axes], targets[rows_order][:, axes], estimator=estimator)
    assert mixed.item() == pytest.approx(ours.item(), abs=1e-12)
    twice = energy_score(samples.repeat(1, 2, 1), targets.repeat(2, 1), estimator=estimator)
    assert twice.item() == pytest.approx(ours.item(), abs=1e-12)


def test_energy_score_of_one_component_is_the_crps() -> None:
    samples, targets = made(20, 30, 1)
    crps = M.continuous_ranked_probability_score(Predictive.from_samples(samples), targets)
    assert energy_score(samples, targets).item() == pytest.approx(crps.item(), abs=1e-12)
    assert energy_score(Predictive.from_samples(samples), targets).item() == pytest.approx(crps.item(), abs=1e-12)


def test_energy_score_against_pyro() -> None:
    ops = pytest.importorskip("pyro.ops.stats")
    samples, targets = made(15, 10, 3)
    theirs = ops.energy_score_empirical(samples.transpose(0, 1), targets).mean().item()
    assert energy_score(samples, targets, estimator="nrg").item() == pytest.approx(theirs, abs=1e-9)


def test_scores_against_scoringrules() -> None:
    rules = pytest.importorskip("scoringrules")
    samples, targets = made(15, 10, 3)
    draws = samples.transpose(0, 1).numpy()
    ours = energy_score(samples, targets, estimator="nrg").item()
    assert ours == pytest.approx(float(np.mean(rules.es_ensemble(targets.numpy(), draws))), abs=1e-9)
    ours = variogram_score(samples, targets).item()
    assert ours == pytest.approx(float(np.mean(rules.vs_ensemble(targets.numpy(), draws, p=0.5))), abs=1e-9)


def test_energy_score_of_close_samples_far_from_zero() -> None:
    samples, targets = made(60, 5, 3)
    near = energy_score(samples, targets).item()
    assert energy_score(samples + 1e8, targets + 1e8).item() == pytest.approx(near, abs=1e-6)


def test_energy_score_is_fair() -> None:
    samples, targets = made(40_000, 1, 2)
    law = energy_score(samples[:3000], targets, estimator="nrg").item()
    couples, targets = samples.reshape(2, 20_000, 2), targets.expand(20_000, 2)
    fair, raw = (energy_score(couples, targets, estimator=name).item() for name in ("fair", "nrg"))
    # The law's own score is known from 3,000 distances to the target, and as many between samples.
    distance = torch.linalg.vector_norm(samples[:3000, 0] - targets[0], dim=-1)
    tolerance = 5 * 2 * distance.std().item() / math.sqrt(3000)
    assert abs(fair - law) < tolerance
    assert abs(raw - law) > tolerance  # what is not fair must be seen to be biased


def variogram(samples: Tensor, targets: Tensor, p: float, matrix: Tensor) -> float:
    count, rows, size = samples.shape
    total = 0.0
    for n in range(rows):
        for i in range(size):
            for j in range(size):
                spread = math.fsum(abs(x[i] - x[j]) ** p for x in samples[:, n].tolist()) / count
                gap = abs(float(targets[n, i] - targets[n, j])) ** p - spread
                total += float(matrix[i, j]) * gap**2
    return total / rows


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 5),
    rows=st.integers(1, 4),
    size=st.integers(2, 4),
    seed=st.integers(0, 999),
    p=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_variogram_score_is_the_definition(count: int, rows: int, size: int, seed: int, p: float) -> None:
    samples, targets = made(count, rows, size, seed)
    matrix = torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = variogram_score(samples, targets, p=p, pair_weights=matrix)
    assert ours.item() == pytest.approx(variogram(samples, targets, p, matrix), rel=1e-12, abs=1e-12)
    plain = variogram_score(samples, targets, p=p)
    assert plain.item() == pytest.approx(variogram(samples, targets, p, torch.ones(size, size)), rel=1e-12, abs=1e-12)
    axes = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    mixed = variogram_score(samples.flip(0, 1)[..., axes], targets.flip(0)[:, axes], p=p)
    assert mixed.item() == pytest.approx(plain.item(), rel=1e-12, abs=1e-12)


def test_variogram_score_sees_correlation() -> None:
    samples, _ = made(200, 300, 2)
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(300, 2, generator=generator, dtype=torch.float64)
    mix = torch.tensor([[1.0, 0.9], [0.0, math.sqrt(1 - 0.81)]], dtype=torch.float64)
    assert variogram_score(samples @ mix, z @ mix) < variogram_score(samples, z @ mix)


def test_slices_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, targets = made(6, 20, 3)
    whole = [energy_score(samples, targets).item(), variogram_score(samples, targets).item()]
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 120)
    parts = [energy_score(samples, targets).item(), variogram_score(samples, targets).item()]
    assert parts == pytest.approx(whole, abs=1e-14)


LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]


def quantiles(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5, rows, generator=generator, dtype=torch.float64).sort(0).values
    return values, 2 * torch.randn(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("median", [True, False])
def test_weighted_interval_score_is_the_definition(median: bool) -> None:
    values, y = quantiles(40)
    total = 0.0
    for q, t in zip(values.t().tolist(), y.tolist(), strict=True):
        for low, high, alpha in ((q[0], q[4], 0.1), (q[1], q[3], 0.5)):
            total += alpha / 2 * (high - low + 2 / alpha * (max(low - t, 0) + max(t - high, 0)))
        total += 0.5 * abs(t - q[2]) if median else 0.0
    kept = [0, 1, 2, 3, 4] if median else [0, 1, 3, 4]
    levels = [LEVELS[i] for i in kept]
    ours = weighted_interval_score(values[kept], y, levels).item()
    assert ours == pytest.approx(total / 40 / (2.5 if median else 2), rel=1e-12)
    pinball = [2 * mean_pinball_loss(y, values[i], alpha=LEVELS[i]) for i in kept]
    assert ours == pytest.approx(math.fsum(pinball) / len(kept), rel=1e-12)


def test_weighted_interval_score_of_one_interval_is_the_interval_score() -> None:
    values, y = quantiles(40)
    ours = weighted_interval_score(values[[0, 4]], y, [0.05, 0.95]).item()
    assert ours == pytest.approx(0.05 * M.interval_score(values[0], values[4], y, alpha=0.1).item(), rel=1e-12)
    with_infinite = values[[0, 4]].clone()
    with_infinite[0, 3] = -math.inf
    assert weighted_interval_score(with_infinite, y, [0.05, 0.95]).item() == math.inf


def test_weighted_interval_score_tends_to_the_crps() -> None:
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(50, generator=generator, dtype=torch.float64)
    y = loc + torch.randn(50, generator=generator, dtype=torch.float64)
    pred = Predictive.from_normal(loc, torch.ones_like(loc))
    levels = [(2 * i + 1) / 501 / 2 for i in range(501)]
    ours = weighted_interval_score(pred, y, levels).item()
    assert ours == pytest.approx(M.continuous_ranked_probability_score(pred, y).item(), rel=5e-3)
    table = torch.stack([pred.icdf(level) for level in LEVELS])
    by_table = weighted_interval_score(table, y, LEVELS).item()
    assert weighted_interval_score(pred, y, LEVELS).item() == pytest.approx(by_table, rel=1e-12)


def ence(mean: Tensor, scale: Tensor, targets: Tensor, num_bins: int) -> float:
    """Bin by bin: an element goes where the first of its equals would go by rank."""
    order = sorted(scale.tolist())
    bins: dict[int, list[int]] = {}
    for i, sigma in enumerate(scale.tolist()):
        bins.setdefault(order.index(sigma) * num_bins // len(order), []).append(i)
    total = 0.0
    for rows in bins.values():
        variance = math.fsum(float(scale[i]) ** 2 for i in rows) / len(rows)
        square = math.fsum(float(mean[i] - targets[i]) ** 2 for i in rows) / len(rows)
        total += abs(math.sqrt(variance) - math.sqrt(square)) / math.sqrt(variance)
    return total / len(bins)


@settings(max_examples=50, deadline=None)
@given(
    sigmas=st.lists(st.integers(1, 6), min_size=1, max_size=20), num_bins=st.integers(1, 7), seed=st.integers(0, 999)
)
def test_ence_is_the_definition(sigmas: list[int], num_bins: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor(sigmas, dtype=torch.float64) / 3
    mean, y = torch.randn(2, len(sigmas), generator=generator, dtype=torch.float64)
    ours = expected_normalised_calibration_error(mean, scale, y, num_bins=num_bins)
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(ence(mean, scale, y, num_bins), abs=1e-12)
    order = torch.randperm(len(sigmas), generator=generator)
    again = expected_normalised_calibration_error(mean[order], scale[order], y[order], num_bins=num_bins)
    assert again.item() == pytest.approx(ours.item(), abs=1e-12)
    twice = expected_normalised_calibration_error(mean.repeat(2), scale.repeat(2), y.repeat(2), num_bins=num_bins)
    assert twice.item() == pytest.approx(ours.item(), abs=1e-12)


def test_ence_has_no_unit_and_sees_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = 0.5 + torch.rand(20_000, generator=generator, dtype=torch.float64)
    y = scale * torch.randn(20_000, generator=generator, dtype=torch.float64)
    mean = torch.zeros_like(y)
    right = expected_normalised_calibration_error(mean, scale, y).item()
    # A relative error of 1/sqrt(2 n) in each of 15 bins of n = 1333.
    assert right < 5 / math.sqrt(2 * 1333)
    assert expected_normalised_calibration_error(mean, 1e3 * scale, 1e3 * y).item() == pytest.approx(right)
    assert expected_normalised_calibration_error(mean, 2 * scale, y).item() == pytest.approx(0.5, abs=0.02)


def test_weights_are_repetitions() -> None:
    samples, targets = made(6, 20, 3)
    weights = torch.randint(0, 4, (20,), generator=torch.Generator().manual_seed(1))
    index = torch.arange(20).repeat_interleave(weights)
    for function in (energy_score, variogram_score):
        ours = function(samples, targets, weights=weights)
        assert ours.item() == pytest.approx(function(samples[:, index], targets[index]).item(), rel=1e-12)
    values, y = quantiles(20)
    ours = weighted_interval_score(values, y, LEVELS, weights=weights)
    assert ours.item() == pytest.approx(weighted_interval_score(values[:, index], y[index], LEVELS).item(), rel=1e-12)
    scale = torch.rand(20, generator=torch.Generator().manual_seed(2)) + 0.1
    ours = expected_normalised_calibration_error(values[0], scale, y, num_bins=4, weights=weights)
    again = expected_normalised_calibration_error(values[0][index], scale[index], y[index], num_bins=4)
    assert ours.item() == pytest.approx(again.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_lower_precision_has_the_values_of_its_numbers(dtype: torch.dtype) -> None:
    samples, targets = (value.to(dtype) for value in made(6, 20, 3))
    for function in (energy_score, variogram_score):
        assert function(samples, targets) == function(samples.double(), targets.double())
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert pit_uniformity_test(uniform) == pit_uniformity_test(uniform.double())


@pytest.mark.parametrize("count", [1, 2, 7, 100, 500, 501, 3000])
def test_uniformity_against_scipy(count: int) -> None:
    tolerance = 1e-10 if count <= 100 else 1e-6 if count <= 500 else 5e-5  # SciPy itself is asymptotic above 140
    for seed in range(20):
        values = np.random.default_rng(seed).uniform(0, 1, count) ** (1 + seed / 30)
        ours, theirs = pit_uniformity_test(values), stats.kstest(values, "uniform", method="exact")
        assert ours.statistic.item() == pytest.approx(theirs.statistic, abs=1e-14)
        assert ours.p_value.item() == pytest.approx(theirs.pvalue, abs=tolerance)
        assert ours.p_value.dtype == torch.float64


def test_uniformity_p_values_are_uniform_and_reject() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(400, 30, generator=generator, dtype=torch.float64)
    p_values = [pit_uniformity_test(row).p_value.item() for row in uniform]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    bent = [pit_uniformity_test(row**2).p_value.item() for row in uniform]
    assert stats.kstest(bent, "uniform").pvalue < 1e-10
    assert pit_uniformity_test(torch.zeros(2000)).p_value.item() == 0.0
    assert pit_uniformity_test([1.0, 0.0]).p_value.item() == pytest.approx(stats.kstwo.sf(0.5, 2))


def test_bad_input_is_named() -> None:
    samples, targets = made(3, 2, 2)
    for function in (energy_score, variogram_score):
        broken = samples.clone()
        broken[1, 1, 0] = math.nan
        with pytest.raises(BadInput, match=r"samples.*row 1"):
            function(broken, targets)
        with pytest.raises(BadInput, match="exactly"):
            function(samples, targets[0])
        with pytest.raises(BadInput, match="a sample and a row"):
            function(samples[:, :0], targets[:0])
        with pytest.raises(BadInput, match=r"\[S, N, D\]"):
            function(samples[..., 0], targets[..., 0])
        with pytest.raises(BadType, match="SamplePredictive"):
            function(Predictive.from_normal(targets, torch.ones_like(targets)), targets)
        with pytest.raises(BadInput, match="weights"):
            function(SamplePredictive(samples, [0.5, 0.3, 0.2]), targets)
    with pytest.raises(BadInput, match="one sample"):
        energy_score(samples[:1], targets)
    with pytest.raises(BadInput, match="estimator"):
        energy_score(samples, targets, estimator="v")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="p must be"):
        variogram_score(samples, targets, p=0.0)
    with pytest.raises(BadInput, match="1 component"):
        variogram_score(samples[..., :1], targets[..., :1])
    with pytest.raises(BadInput, match="negative in row 1"):
        variogram_score(samples, targets, pair_weights=[[1.0, 1.0], [-1.0, 1.0]])
    with pytest.raises(BadInput, match="pair_weights has shape"):
        variogram_score(samples, targets, pair_weights=[1.0, 1.0])
    values, y = quantiles(4)
    with pytest.raises(BadInput, match="element 0"):
        weighted_interval_score(values.flip(0), y, LEVELS)
    with pytest.raises(BadInput, match="symmetric"):
        weighted_interval_score(values[:2], y, [0.1, 0.5])
    with pytest.raises(BadInput, match="levels"):
        weighted_interval_score(values[:2], y, [0.0, 1.0])
    with pytest.raises(BadInput, match="empty"):
        weighted_interval_score(values, y, [])
    with pytest.raises(BadInput, match="exactly"):
        weighted_interval_score(values, y)
    with pytest.raises(BadInput, match=r"targets.*row 0"):
        weighted_interval_score(values, y * math.nan, LEVELS)
    with pytest.raises(BadInput, match="at least one row"):
        weighted_interval_score(values[:, :0], y[:0], LEVELS)
    with pytest.raises(BadType, match="real targets"):
        weighted_interval_score(Predictive.from_probs([[0.5, 0.5]]), [0], LEVELS)
    with pytest.raises(BadInput, match="0 in element 1"):
        expected_normalised_calibration_error([0.0, 0.0], [1.0, 0.0], [0.0, 0.0])
    with pytest.raises(BadInput, match=r"scale.*row 1"):
        expected_normalised_calibration_error([0.0, 0.0], [1.0, math.nan], [0.0, 0.0])
    with pytest.raises(BadInput, match="num_bins"):
        expected_normalised_calibration_error([0.0], [1.0], [0.0], num_bins=0)
    with pytest.raises(BadInput, match="element 1"):
        pit_uniformity_test([0.5, 1.5])
    with pytest.raises(BadInput, match="at least one row"):
        pit_uniformity_test([])
    with pytest.raises(BadInput, match="NaN"):
        pit_uniformity_test([math.nan])
