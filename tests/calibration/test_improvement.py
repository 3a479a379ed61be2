"""Post-hoc improvement against loops over the folds, known worlds, and an interval that forgets the pairs."""

import math

import pytest
import torch
from torch import Tensor

from bayesguard.calibration import (
    CDFCalibration,
    ConformalInterval,
    HistogramBinning,
    IsotonicCalibration,
    TemperatureScaling,
    VarianceScaling,
    post_hoc_improvement,
    score_decomposition,
)
from bayesguard.calibration.improvement import PostHocImprovement
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import Predictive
from bayesguard.sampling import stream


def classes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits, and labels that are drawn from their softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def numbers(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Means, and targets at a standard deviation of 1 from them."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(count, generator=generator, dtype=torch.float64)
    return loc, loc + torch.randn(count, generator=generator, dtype=torch.float64)


def folds_of(count: int, folds: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=stream("cpu", seed, "folds")) % folds


def test_classes_by_hand() -> None:
    logits, y = classes(80, seed=0)
    pred = Predictive.from_logits(2 * logits)
    part = folds_of(80, 4, seed=3)
    after = torch.empty(80, dtype=torch.float64)
    for fold in range(4):
        scaling = TemperatureScaling().fit(pred[part != fold], y[part != fold])
        after[part == fold] = -scaling(pred[part == fold]).log_prob(y[part == fold])
    before = -pred.log_prob(y)
    found = post_hoc_improvement(TemperatureScaling(), pred, y, num_folds=4, seed=3)
    wanted = [(before - after).mean().item(), before.mean().item(), after.mean().item()]
    assert [found.value, found.before, found.after] == pytest.approx(wanted, abs=1e-12)
    assert found.relative == pytest.approx(wanted[0] / wanted[1], abs=1e-12)
    parts = score_decomposition(pred, y, num_folds=4, seed=3)
    assert parts.miscalibration.item() == found.value


def test_numbers_by_hand() -> None:
    loc, y = numbers(60, seed=1)
    pred = Predictive.from_normal(loc, 0.5)
    part = folds_of(60, 3, seed=0)
    nll, crps = torch.empty(60, dtype=torch.float64), torch.empty(60, dtype=torch.float64)
    for fold in range(3):
        own = part == fold
        scale = 0.5 * ((y - loc)[~own] / 0.5).square().mean().sqrt()  # what variance scaling finds for one Gaussian
        law = torch.distributions.Normal(loc[own], scale)
        nll[own] = -law.log_prob(y[own])
        z = (y - loc)[own] / scale
        unit = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
        crps[own] = scale * (z * (2 * unit.cdf(z) - 1) + 2 * unit.log_prob(z).exp() - math.pi**-0.5)
    for score, after in (("log", nll), ("crps", crps)):
        found = post_hoc_improvement(VarianceScaling(), pred, y, score=score, num_folds=3)  # type: ignore[arg-type]
        assert found.after == pytest.approx(after.mean().item(), abs=1e-5)  # the factor is kept in float32
        assert found.value == pytest.approx(found.before - after.mean().item(), abs=1e-5)
        assert found.lower < found.value < found.upper


def test_the_improvement_of_a_known_error() -> None:
    loc, y = numbers(20_000, seed=2)
    found = post_hoc_improvement(VarianceScaling(), Predictive.from_normal(loc, 0.5), y)
    wanted = math.log(0.5) + (1 / 0.5**2) / 2 - 1 / 2  # of scale 1/2 instead of 1: the divergence of two Gaussians
    noise = (y - loc).square().std().item() * (1 / 0.5**2 - 1) / 2 / 20_000**0.5
    assert abs(found.value - wanted) < 5 * noise
    assert (found.upper - found.lower) / 2 == pytest.approx(
        1.96 * noise, rel=0.12
    )  # 1,000 resamples: 5 of their errors


def covered(found: PostHocImprovement, truth: float) -> bool:
    return found.lower <= truth <= found.upper


def test_the_interval_covers_and_is_that_of_pairs() -> None:
    runs, count = 200, 150
    hits, paired, apart = 0, 0.0, 0.0
    for seed in range(runs):
        loc, y = numbers(count, seed)
        pred = Predictive.from_normal(loc, 0.6)
        found = post_hoc_improvement(VarianceScaling(), pred, y)
        truth = math.log(0.6) + (1 / 0.6**2) / 2 - 1 / 2 - 1 / (2 * 0.8 * count)  # less what the factor's error costs
        hits += covered(found, truth)
        paired += (found.upper - found.lower) / runs
        before, after = -pred.log_prob(y), -Predictive.from_normal(loc, (y - loc).square().mean().sqrt()).log_prob(y)
        apart += 2 * 1.96 * math.sqrt((before.var() + after.var()) / count) / runs
    assert abs(hits / runs - 0.95) < 5 * math.sqrt(0.95 * 0.05 / runs)
    gain = (1 / 0.6**2 - 1) / 2 * math.sqrt(2 / count)  # standard error of the mean difference
    assert paired == pytest.approx(2 * 1.96 * gain, rel=0.1)
    assert apart > 1.2 * paired  # an interval that forgets the pairs is too wide


def test_nothing_to_mend() -> None:
    logits, y = classes(4000, seed=4)
    found = post_hoc_improvement(TemperatureScaling(), Predictive.from_logits(logits), y)
    assert abs(found.value) < 5 * math.sqrt(2 * 5 / 4) / 4000  # the noise of the fits
    assert covered(found, 0.0)
    coarse = post_hoc_improvement(HistogramBinning(2), Predictive.from_logits(logits), y, score="brier")
    assert coarse.upper < 0  # two bins spoil what was told apart, and the score says so


def test_a_perfect_model_has_nothing_to_gain() -> None:
    sure = torch.eye(2).repeat(50, 1)
    with pytest.warns(UserWarning, match="none is best"):
        found = post_hoc_improvement(TemperatureScaling(), Predictive.from_probs(sure), torch.tensor([0, 1]).repeat(50))
    assert tuple(found) == (0.0,) * 5
    assert math.isnan(found.relative)


@pytest.mark.parametrize("weighted", [False, True])
def test_weights_and_seeds(weighted: bool) -> None:
    logits, y = classes(90, seed=5)
    pred = Predictive.from_logits(3 * logits)
    weights = torch.rand(90, generator=torch.Generator().manual_seed(0), dtype=torch.float64) if weighted else None
    found = post_hoc_improvement(TemperatureScaling(), pred, y, weights=weights)
    assert found == post_hoc_improvement(TemperatureScaling(), pred, y, weights=weights)
    assert found != post_hoc_improvement(TemperatureScaling(), pred, y, weights=weights, seed=1)
    wider = post_hoc_improvement(TemperatureScaling(), pred, y, weights=weights, confidence_level=0.99)
    assert wider.lower < found.lower < found.value < found.upper < wider.upper
    if weights is not None:
        mean = (weights @ -pred.log_prob(y)) / weights.sum()
        assert found.before == pytest.approx(mean.item(), abs=1e-12)


def test_other_calibrators_of_numbers() -> None:
    loc, y = numbers(120, seed=6)
    found = post_hoc_improvement(CDFCalibration(), Predictive.from_normal(loc, 3.0), y)
    assert found.lower > 0
    assert post_hoc_improvement(VarianceScaling(), Predictive.from_normal(loc, 0.01), y).relative > 0.9


def test_an_infinite_score_before() -> None:
    logits, y = classes(80, seed=7)
    probs = logits.softmax(-1)
    probs[3], y[3] = torch.tensor([1.0, 0.0, 0.0]), 1
    found = post_hoc_improvement(IsotonicCalibration(), Predictive.from_probs(probs), y)
    assert found.value == found.upper == found.before == math.inf
    assert math.isfinite(found.lower)
    assert math.isfinite(found.after)
    assert math.isnan(found.relative)


def test_bad_input_is_named() -> None:
    logits, y = classes(20, seed=8)
    pred = Predictive.from_logits(logits)
    with pytest.raises(BadInput, match="score must be one of 'log', 'brier', 'crps'; got 'ece'"):
        post_hoc_improvement(TemperatureScaling(), pred, y, score="ece")  # type: ignore[arg-type]
    with pytest.raises(BadType, match="crps is for"):
        post_hoc_improvement(TemperatureScaling(), pred, y, score="crps")
    with pytest.raises(BadInput, match="confidence_level"):
        post_hoc_improvement(TemperatureScaling(), pred, y, confidence_level=1.0)
    with pytest.raises(BadType, match="must be a Predictive"):
        post_hoc_improvement(TemperatureScaling(), logits, y)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="adds sets or intervals"):
        post_hoc_improvement(ConformalInterval(), Predictive.from_normal(torch.zeros(20), 1.0), torch.zeros(20))
