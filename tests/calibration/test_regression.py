"""Scaling of variances, and maps of the cdf: against closed forms, and against truths that are known."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Cauchy,
    Distribution,
    Laplace,
    MixtureSameFamily,
    Normal,
    Poisson,
    StudentT,
)

import bayesguard as bg
from bayesguard.calibration import ConformalInterval
from bayesguard.calibration.conformal import IntervalScore
from bayesguard.calibration.regression import CDFCalibration, VarianceScaling
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted
from bayesguard.likelihoods import Gaussian
from bayesguard.predictive import (
    ContinuousPredictive,
    CountPredictive,
    Predictive,
    RecalibratedPredictive,
    SamplePredictive,
    concatenate,
    mixture,
)
from bayesguard.predictive.components import parameters
from bayesguard.predictive.guaranteed import GuaranteedRecalibrated
from bayesguard.predictive.quadrature import mixture_log_prob, panels_of

CHANCE = 1e-6  # that a statistical test fails on the truth


def kolmogorov(pit: Tensor) -> float:
    """Largest gap between the cdf of values and that of the uniform distribution."""
    ordered, count = pit.flatten().double().sort().values, pit.numel()
    ranks = torch.arange(count + 1, dtype=torch.float64) / count
    return float(torch.maximum((ranks[1:] - ordered).abs(), (ordered - ranks[:-1]).abs()).max())


def largest_by_chance(*counts: int) -> float:
    """Quantile of Kolmogorov's statistic, of samples compared (Smirnov's bound)."""
    return math.sqrt(-math.log(CHANCE / 2) / 2 * sum(1 / count for count in counts))


def over_confident(count: int, seed: int, factor: float = 2.0) -> tuple[ContinuousPredictive, Tensor]:
    """One Gaussian draw whose scale is `factor` times too small, and its targets."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(count, generator=generator, dtype=torch.float64)
    scale = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
    y = loc + factor * scale * torch.randn(count, generator=generator, dtype=torch.float64)
    return Predictive.from_normal(loc, scale), y


def skewed(count: int, seed: int, draws: int = 3) -> tuple[ContinuousPredictive, Tensor]:
    """Draws of Gaussians whose targets have exponential noise."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(count, generator=generator, dtype=torch.float64)
    draw = loc + 0.3 * torch.randn(draws, count, generator=generator, dtype=torch.float64)
    noise = torch.empty(count, dtype=torch.float64).exponential_(generator=generator)
    return ContinuousPredictive(Normal(draw, torch.ones_like(draw))), loc + noise - 0.5


def components(seed: int = 0) -> dict[str, Distribution]:
    generator = torch.Generator().manual_seed(seed)
    loc = 2 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    scale = 0.3 + torch.rand(3, 6, generator=generator, dtype=torch.float64)
    parts = torch.stack([loc, loc + 4], -1)
    mixing = Categorical(logits=torch.zeros_like(parts))
    return {
        "normal": Normal(loc, scale),
        "laplace": Laplace(loc, scale),
        "student": StudentT(torch.full_like(loc, 5.0), loc, scale),
        "density": MixtureSameFamily(mixing, Normal(parts, torch.stack([scale, scale], -1))),
    }


KNOTS, LEVELS = [0.0, 1e-4, 0.1, 0.4, 0.8, 0.99, 1.0], [0.0, 0.02, 0.3, 0.5, 0.6, 0.9, 1.0]


def recalibrated(name: str) -> RecalibratedPredictive:
    return RecalibratedPredictive(ContinuousPredictive(components()[name]), KNOTS, LEVELS)


def grid_of(pred: RecalibratedPredictive, count: int = 200_001) -> Tensor:
    """Points `[count, N]` from quantile to quantile, beyond which there is about 1e-10 of mass."""
    share = torch.linspace(-1, 1, count, dtype=torch.float64).unsqueeze(-1)
    middle, reach = pred.icdf(0.5), pred.icdf(1 - 1e-10) - pred.icdf(1e-10)
    return middle + reach * share.sign() * share.abs() ** 3  # closer together in the middle


# -- one factor


def test_one_gaussian_draw_has_a_closed_form() -> None:
    pred, y = over_confident(500, 0)
    scaling = VarianceScaling().fit(pred, y)
    wanted = float(((y - pred.mean) / pred.stddev).square().mean().sqrt())
    assert float(scaling.factor) == pytest.approx(wanted, rel=1e-7)
    assert scaling.diagnostics["standard_error"] == pytest.approx(wanted / math.sqrt(1000), rel=1e-4)
    assert scaling.diagnostics["num_examples"] == 500
    assert not scaling.diagnostics["at_bound"]
    calibrated = scaling(pred)
    torch.testing.assert_close(calibrated.stddev, pred.stddev * float(scaling.factor))
    assert torch.equal(calibrated.mean, pred.mean)
    assert calibrated.exact
    assert scaling.diagnostics["nll_before"] == pytest.approx(-float(pred.log_prob(y).mean()), rel=1e-12)
    assert scaling.diagnostics["nll_after"] == pytest.approx(-float(calibrated.log_prob(y).mean()), rel=1e-12)


def test_the_search_finds_the_closed_forms() -> None:
    pred, y = over_confident(500, 0)
    loc, scale = pred.mean, pred.stddev
    twice = VarianceScaling().fit(ContinuousPredictive(Normal(loc.repeat(2, 1), scale.repeat(2, 1))), y)
    assert float(twice.factor) == pytest.approx(float(VarianceScaling().fit(pred, y).factor), rel=1e-6)
    laplace = VarianceScaling().fit(ContinuousPredictive(Laplace(loc[None], scale[None])), y)
    assert float(laplace.factor) == pytest.approx(float(((y - loc) / scale).abs().mean()), rel=1e-6)
    gaussian = VarianceScaling().fit(ContinuousPredictive(StudentT(torch.tensor(1e9), loc[None], scale[None])), y)
    assert float(gaussian.factor) == pytest.approx(float(VarianceScaling().fit(pred, y).factor), rel=1e-5)


@pytest.mark.parametrize("name", components())
def test_no_factor_nearby_is_better(name: str) -> None:
    pred = ContinuousPredictive(components()[name], [1, 2, 3])
    y = 3 * torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scaling = VarianceScaling().fit(pred, y)
    assert scaling.diagnostics["nll_after"] < scaling.diagnostics["nll_before"]
    best = scaling.diagnostics["nll_after"]
    for change in (0.5, 0.999, 1.001, 2.0):
        other = VarianceScaling()
        other.load_state_dict(scaling.state_dict())
        other.factor *= change
        assert -float(other(pred).log_prob(y).mean()) > best
    calibrated = scaling(pred)
    assert torch.equal(calibrated.weights, pred.weights)
    assert type(calibrated.component) is type(pred.component)


def test_rows_in_slices_and_a_sample_for_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    pred, y = skewed(2000, 0)
    whole = VarianceScaling().fit(pred, y)
    monkeypatch.setattr("bayesguard.calibration.regression.BUDGET", 8 * 300)
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 1000)
    assert float(VarianceScaling().fit(pred, y).factor) == pytest.approx(float(whole.factor), rel=1e-6)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert float(VarianceScaling().fit(pred[order], y[order]).factor) == pytest.approx(float(whole.factor), rel=1e-6)


def test_new_targets_fall_into_scaled_intervals() -> None:
    scaling = VarianceScaling().fit(*over_confident(4000, 0, 3.0))
    assert float(scaling.factor) == pytest.approx(3.0, abs=5 * 3 / math.sqrt(8000))
    pred, y = over_confident(4000, 1, 3.0)
    assert kolmogorov(scaling(pred).cdf(y)) < largest_by_chance(4000) + 5 / math.sqrt(8000)
    assert kolmogorov(pred.cdf(y)) > 0.15


def test_a_bound_is_told() -> None:
    pred = Predictive.from_normal(torch.zeros(5), 1.0)
    with pytest.warns(CalibrationWarning, match="bound"):
        scaling = VarianceScaling().fit(pred, torch.zeros(5))
    assert float(scaling.factor) == pytest.approx(1e-4)
    assert scaling.diagnostics["at_bound"]
    draws = ContinuousPredictive(Laplace(torch.zeros(2, 5), torch.ones(2, 5)))
    with pytest.warns(CalibrationWarning, match="bound"):
        VarianceScaling().fit(draws, torch.full((5,), 1e9))


def test_what_has_no_scale() -> None:
    for pred in (
        Predictive.from_probs([0.5]),
        CountPredictive(Poisson(torch.ones(1, 1))),
        SamplePredictive([[1.0], [2]]),
    ):
        with pytest.raises(BadType, match="components with loc and scale"):
            VarianceScaling().fit(pred, [1])
    pred, y = over_confident(10, 0)
    with pytest.raises(BadInput, match="targets has shape"):
        VarianceScaling().fit(pred, y.unsqueeze(-1))
    with pytest.raises(BadInput, match="targets has NaN or infinity in row 4"):
        VarianceScaling().fit(pred, y.index_fill(0, torch.tensor(4), torch.nan))
    with pytest.raises(NotFitted):
        VarianceScaling()(pred)
    assert "not fitted" in repr(VarianceScaling())
    assert "factor=" in repr(VarianceScaling().fit(pred, y))


# -- a map of the cdf


def test_the_map_is_that_of_the_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    pit = torch.rand(30, generator=generator, dtype=torch.float64).sort().values
    pred = Predictive.from_normal(torch.zeros(30, dtype=torch.float64), 1.0)
    calibration = CDFCalibration(num_knots=30).fit(pred, pred.icdf(pit))
    inner = (30 * torch.arange(1, 31) / 31 + pit) / 31
    torch.testing.assert_close(calibration.levels, torch.cat([torch.zeros(1), inner, torch.ones(1)]).double())
    torch.testing.assert_close(calibration.knots[1:-1], pit, rtol=1e-12, atol=0)
    some = torch.linspace(0.001, 0.999, 30, dtype=torch.float64)
    wanted = np.interp(some, calibration.knots, calibration.levels)
    np.testing.assert_allclose(calibration(pred).cdf(pred.icdf(some)), wanted, rtol=1e-12)
    assert calibration.diagnostics["num_knots"] == 30


def test_ties_have_the_mean_of_their_ranks() -> None:
    pred = Predictive.from_normal(torch.zeros(5, dtype=torch.float64), 1.0)
    calibration = CDFCalibration().fit(pred, torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0]))
    assert calibration.knots[2] == 0.5
    assert float(calibration.levels[2]) == pytest.approx((5 * 3 / 6 + 0.5) / 6)
    equal = CDFCalibration().fit(pred, torch.zeros(5))
    torch.testing.assert_close(equal(pred).cdf(torch.tensor(0.3)), pred.cdf(0.3))


def test_few_knots_and_knots_in_the_tails() -> None:
    pred, y = over_confident(1000, 0, 1.0)
    calibration = CDFCalibration().fit(pred, y)
    ranks = (calibration.levels[1:-1] * 1001 - calibration.knots[1:-1]) * 1001 / 1000
    found = ranks.round().long().tolist()
    assert found[:6] == [1, 2, 4, 8, 16, 32]
    assert found == [1001 - rank for rank in reversed(found)]
    assert {round(place * 1001 / 21) for place in range(1, 21)} < set(found)
    assert calibration.diagnostics["num_knots"] == len(found)


@pytest.mark.parametrize("make", [over_confident, skewed])
def test_new_targets_have_uniform_pits_and_had_not(
    make: Callable[[int, int], tuple[ContinuousPredictive, Tensor]],
) -> None:
    calibration = CDFCalibration().fit(*make(4000, 0))
    pred, y = make(4000, 1)
    limit = largest_by_chance(4000, 4000)
    assert kolmogorov(calibration(pred).cdf(y)) < limit
    assert kolmogorov(pred.cdf(y)) > 1.5 * limit
    lower, upper = calibration(pred).interval(0.1)
    share = float(((lower <= y) & (y <= upper)).double().mean())
    assert share == pytest.approx(0.9, abs=5 * math.sqrt(0.09 * 2 / 4000))
    nll = -float(calibration(pred).log_prob(y).mean())
    assert nll < -float(pred.log_prob(y).mean()) - 0.05
    assert calibration.diagnostics["nll_after"] == pytest.approx(nll, abs=0.1)


def test_a_map_of_nothing_changes_little() -> None:
    """Targets that are from the predictive: what the slopes cost is about half a knot a row, not 0.42 nats."""
    calibration = CDFCalibration().fit(*over_confident(4000, 0, 1.0))
    pred, y = over_confident(4000, 1, 1.0)
    cost = float((pred.log_prob(y) - calibration(pred).log_prob(y)).mean())
    assert cost < 0.02
    every = CDFCalibration(num_knots=4000).fit(*over_confident(4000, 0, 1.0))
    assert float((pred.log_prob(y) - every(pred).log_prob(y)).mean()) == pytest.approx(1 - 0.5772, abs=0.1)


def test_order_of_rows_does_not_matter() -> None:
    pred, y = skewed(500, 0)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    first, second = CDFCalibration().fit(pred, y), CDFCalibration().fit(pred[order], y[order])
    assert torch.equal(first.knots, second.knots)
    assert torch.equal(first.levels, second.levels)


def test_targets_beyond_float64_are_told() -> None:
    pred = Predictive.from_normal(torch.zeros(100), 1.0)
    y = torch.linspace(-2, 2, 100)
    y[:3], y[-3:] = -50, 60
    with pytest.warns(CalibrationWarning, match="6 of 100 targets lie so far out"):
        calibration = CDFCalibration().fit(pred, y)
    assert calibration.diagnostics["num_far"] == 6
    calibrated = calibration(pred)
    assert calibrated.log_prob(y).isfinite().all()
    lower, upper = calibrated.interval(0.02)
    torch.testing.assert_close(lower, -upper)  # both tails alike
    assert upper.isfinite().all()
    assert float(calibrated.cdf(torch.tensor(2.1))[0]) == pytest.approx(1 - 3.5 / 101, abs=0.02)


def test_float32_has_the_digits_of_float64() -> None:
    pred, y = over_confident(2000, 0)
    single = pred.to(torch.float32)
    rounded = single.to(torch.float64)
    torch.testing.assert_close(CDFCalibration().fit(single, y).knots, CDFCalibration().fit(rounded, y).knots)
    calibrated = CDFCalibration().fit(single, y)(single)
    assert calibrated.dtype == calibrated.mean.dtype == calibrated.crps(y).dtype == torch.float32
    assert calibrated.to(torch.float64).mean.dtype == torch.float64


def test_outputs_share_a_map() -> None:
    pred, y = over_confident(600, 0)
    both = Predictive.from_normal(pred.mean.reshape(200, 3), pred.stddev.reshape(200, 3))
    calibration = CDFCalibration().fit(both, y.reshape(200, 3))
    assert torch.equal(calibration.knots, CDFCalibration().fit(pred, y).knots)
    torch.testing.assert_close(calibration(both).crps(y.reshape(200, 3)).flatten(), calibration(pred).crps(y))
    assert calibration(both).sample(4, seed=0).shape == (4, 200, 3)


@pytest.mark.parametrize("make", [VarianceScaling, CDFCalibration])
def test_state_loads_into_a_fresh_one(make: type[VarianceScaling] | type[CDFCalibration]) -> None:
    pred, y = skewed(100, 0)
    fitted, fresh = nn.ModuleList([make().fit(pred, y)]), nn.ModuleList([make()])
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh[0](pred).log_prob(y), fitted[0](pred).log_prob(y))
    fresh.load_state_dict(nn.ModuleList([make()]).state_dict())
    with pytest.raises(NotFitted):
        fresh[0](pred)
    assert "not fitted" in repr(fresh)
    assert "not fitted" not in repr(fitted)
    before = fitted[0](pred).cdf(y)
    # Knots in float32 have an error of 1e-7, and slopes are in the thousands.
    torch.testing.assert_close(fitted.float()[0](pred).cdf(y), before, atol=1e-3, rtol=0)


def test_what_has_no_continuous_cdf() -> None:
    for pred in (
        Predictive.from_probs([0.5]),
        CountPredictive(Poisson(torch.ones(1, 1))),
        SamplePredictive([[1.0], [2]]),
    ):
        with pytest.raises(BadType, match="CDFCalibration is for a ContinuousPredictive"):
            CDFCalibration().fit(pred, [1])
    pred, y = over_confident(10, 0)
    fitted = CDFCalibration().fit(pred, y)
    with pytest.raises(BadType, match="recalibrated already"):
        fitted(fitted(pred))
    with pytest.raises(BadInput, match="targets has shape"):
        CDFCalibration().fit(pred, y[:-1])
    with pytest.raises(BadInput, match="targets has NaN or infinity in row 4"):
        CDFCalibration().fit(pred, y.index_fill(0, torch.tensor(4), torch.inf))
    with pytest.raises(NotFitted):
        CDFCalibration()(pred)
    with pytest.raises(BadInput, match="num_knots must be at least 1"):
        CDFCalibration(0)


# -- the distribution that comes of it


@pytest.mark.parametrize("name", components())
def test_density_cdf_and_moments_are_those_of_one_distribution(name: str) -> None:
    """Against the trapezoidal rule on 200,000 points, which errs by at most variation times spacing."""
    pred = recalibrated(name)
    points = grid_of(pred)
    for row in range(2):
        x = points[:, row]
        many = RecalibratedPredictive(pred._base[[row] * len(x)], KNOTS, LEVELS)
        density, below = many.log_prob(x).exp(), many.cdf(x)
        error = float((density.diff().abs() * x.diff()).sum()) + 1e-9
        assert error < 2e-3
        assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=error)
        running = torch.cumulative_trapezoid(density, x)
        torch.testing.assert_close(running, below[1:], atol=error, rtol=0)
        assert (below.diff() >= 0).all()
        # From the cdf, which does not jump.
        centre = float(pred.mean[row])
        up, down = torch.where(x > centre, 1 - below, 0), torch.where(x <= centre, below, 0)
        assert float(torch.trapezoid(up - down, x)) == pytest.approx(0, abs=2e-4)
        second = 2 * torch.trapezoid((up + down) * (x - centre).abs(), x)
        assert float(second) == pytest.approx(float(pred.variance[row]), rel=1e-3)
        y = pred.icdf(0.3)
        score = torch.trapezoid((below - (x >= y[row]).double()).square(), x)
        assert float(score) == pytest.approx(float(pred.crps(y)[row]), rel=1e-3)
        entropy = torch.trapezoid(torch.special.entr(density), x)
        assert float(entropy) == pytest.approx(float(pred.entropy()[row]), abs=1e-3)


def test_moments_and_scores_of_two_half_gaussians() -> None:
    """Four of five below 0, and both sides half-normal: closed forms."""
    base = Predictive.from_normal(torch.zeros(1, dtype=torch.float64), 1.0)
    pred = RecalibratedPredictive(base, [0.0, 0.5, 1.0], [0.0, 0.8, 1.0])
    mean = -0.6 * math.sqrt(2 / math.pi)
    assert pred.mean.item() == pytest.approx(mean, rel=1e-7)
    assert pred.variance.item() == pytest.approx(1 - mean**2, rel=1e-7)
    entropy = 0.5 * math.log(2 * math.pi * math.e) - 0.8 * math.log(1.6) - 0.2 * math.log(0.4)
    assert pred.entropy().item() == pytest.approx(entropy, rel=1e-7)
    # The integral of Phi(x)^2 below 0 is (1 - 1 / sqrt 2) / sqrt(2 pi) ... by E|Z - Z'| and E|Z|.
    square = math.sqrt(1 / (2 * math.pi)) - 0.5 / math.sqrt(math.pi)
    assert pred.crps([0.0]).item() == pytest.approx((1.6**2 + 0.4**2) * square, rel=1e-7)
    total, aleatoric, epistemic = pred.uncertainty()
    assert torch.equal(total, aleatoric)
    assert (epistemic == 0).all()


@pytest.mark.parametrize("name", components())
def test_the_identity_changes_nothing(name: str) -> None:
    base = ContinuousPredictive(components()[name], [1, 2, 3], exact=False)
    for knots in ([0.0, 1.0], [0.0, 1e-6, 0.2, 0.5, 1.0]):
        pred = RecalibratedPredictive(base, knots, knots)
        y = base.mean + 0.7
        torch.testing.assert_close(pred.mean, base.mean, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(pred.variance, base.variance, rtol=1e-6, atol=0)
        torch.testing.assert_close(pred.crps(y), base.crps(y), rtol=1e-7, atol=0)
        torch.testing.assert_close(pred.entropy(), base.entropy(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(pred.log_prob(y), base.log_prob(y))
        torch.testing.assert_close(pred.standard_error, base.standard_error, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", components())
def test_quantiles_are_the_inverse(name: str) -> None:
    pred = recalibrated(name)
    last = torch.full((6,), -torch.inf, dtype=torch.float64)
    for level in (1e-9, 0.02, 0.1, 0.3, 0.4, 0.55, 0.9, 0.999, 1 - 1e-9):
        found = pred.icdf(level)
        torch.testing.assert_close(
            pred.cdf(found), torch.full((6,), level, dtype=torch.float64), rtol=1e-10, atol=1e-12
        )
        assert (found > last).all()
        last = found
    assert (pred.icdf(0.0) == -torch.inf).all()
    assert (pred.icdf(1.0) == torch.inf).all()
    assert (pred.cdf(-torch.inf) == 0).all()
    assert (pred.cdf(torch.inf) == 1).all()
    levels = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    assert [float(pred.icdf(float(q))[row]) for row, q in enumerate(levels)] == pytest.approx(
        pred.icdf(levels).tolist()
    )
    lower, upper = pred.interval(0.2)
    torch.testing.assert_close(lower, pred.icdf(0.1))
    torch.testing.assert_close(upper, pred.icdf(0.9))


@pytest.mark.parametrize("name", components())
def test_samples_are_of_that_distribution(name: str) -> None:
    pred = recalibrated(name)
    count = 300 if name == "student" else 2000  # whose cdf takes its time
    samples = pred.sample(count, seed=1)
    assert torch.equal(samples[:, 0], pred.sample(count, seed=1)[:, 0])
    for row in range(6):
        alone = RecalibratedPredictive(pred._base[[row] * count], KNOTS, LEVELS)
        assert kolmogorov(alone.cdf(samples[:, row])) < largest_by_chance(count)
        assert kolmogorov(alone._base.cdf(samples[:, row])) > largest_by_chance(count)
    assert pred.sample((2, 3)).shape == (2, 3, 6)
    assert pred.sample((0,)).shape == (0, 6)


def test_a_sample_far_out_is_finite() -> None:
    pred = RecalibratedPredictive(Predictive.from_normal([0.0, 0.0], [1.0, 1.0]), KNOTS, LEVELS)
    assert pred._moved(torch.tensor([-40.0, 40.0], dtype=torch.float64)).isfinite().all()


def test_samples_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pred = recalibrated("normal")
    whole = pred.sample(20, seed=0)
    monkeypatch.setattr("bayesguard.predictive.recalibrated.BUDGET", 100)
    torch.testing.assert_close(pred.sample(20, seed=0), whole)


def test_outputs_keep_what_they_have_in_common() -> None:
    loc = torch.tensor([-3.0, 3.0]).reshape(2, 1, 1).expand(2, 1, 2)
    pred = RecalibratedPredictive(ContinuousPredictive(Normal(loc, 1.0)), KNOTS, LEVELS)
    first, second = pred.sample(500, seed=0)[:, 0].T
    assert float(torch.corrcoef(torch.stack([first, second]))[0, 1]) > 0.5
    with pytest.raises(BadType, match="no joint density"):
        pred.joint_log_prob(torch.zeros(1, 2))


@pytest.mark.parametrize("name", components())
def test_standard_error_is_that_of_a_mean_moved_by_its_draws(name: str) -> None:
    """The derivative of the mean in the weight of each draw, by differences."""
    component = components()[name]
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def mean(shares: Tensor) -> Tensor:
        return RecalibratedPredictive(ContinuousPredictive(component, shares), KNOTS, LEVELS).mean

    step = 1e-4
    moved = torch.stack(
        [
            (mean((1 - step) * weights + step * one) - mean((1 + step) * weights - step * one)) / (2 * step)
            for one in torch.eye(3, dtype=torch.float64)
        ]
    )
    spread = (weights.unsqueeze(-1) * moved.square()).sum(0)
    factor = float(weights.square().sum() / (1 - weights.square().sum()))
    pred = RecalibratedPredictive(ContinuousPredictive(component, weights), KNOTS, LEVELS)
    torch.testing.assert_close(pred.standard_error, (spread * factor).sqrt(), rtol=1e-4, atol=1e-6)


def test_standard_errors_of_exact_ones_and_of_one_draw() -> None:
    exact = RecalibratedPredictive(Predictive.from_normal([0.0, 1.0], [1.0, 1.0]), KNOTS, LEVELS)
    assert exact.standard_error.tolist() == [0, 0]
    single = RecalibratedPredictive(ContinuousPredictive(Normal(torch.zeros(1, 2), 1.0)), KNOTS, LEVELS)
    assert single.standard_error.tolist() == [torch.inf, torch.inf]
    base = ContinuousPredictive(components()["normal"]).with_groups([0, 0, 1])
    same = RecalibratedPredictive(base, [0.0, 1.0], [0.0, 1.0])
    torch.testing.assert_close(same.standard_error, base.standard_error)


def test_it_is_a_predictive_like_the_others() -> None:
    pred = recalibrated("student")
    assert len(pred) == 6
    assert pred.batch_shape == (6,)
    assert not pred.has_draws
    assert pred.reduce() is pred
    assert "draws not kept" in repr(pred)
    assert set(pred.numpy()) == {"mean", "stddev", "total", "aleatoric", "epistemic"}
    y = pred.icdf(0.3)
    rows = pred[[4, 0]]
    torch.testing.assert_close(rows.log_prob(y[[4, 0]]), pred.log_prob(y)[[4, 0]])
    torch.testing.assert_close(rows.mean, pred.mean[[4, 0]])
    assert pred[2].batch_shape == (1,)
    joined = concatenate([pred[:2], pred[2:]])
    torch.testing.assert_close(joined.log_prob(y), pred.log_prob(y))
    assert pred.to(torch.float32).log_prob(y).dtype == torch.float32
    torch.testing.assert_close(pred.to(torch.float32).mean.double(), pred.mean, rtol=1e-5, atol=1e-5)
    assert torch.equal(pred.draws_used, torch.full((6,), 3))
    empty = pred[[]]
    assert empty.mean.shape == empty.crps(torch.zeros(0)).shape == empty.sample().shape == (0,)
    with pytest.raises(BadType, match="no component distributions"):
        _ = pred.component
    with pytest.raises(BadType, match="groups"):
        pred.with_groups([0, 0, 1])


def test_other_maps_are_never_joined() -> None:
    pred = recalibrated("normal")
    other = RecalibratedPredictive(pred._base, KNOTS, KNOTS)
    with pytest.raises(BadInput, match="different maps"):
        concatenate([pred, other])
    with pytest.raises(BadInput, match="different maps"):
        concatenate([pred, recalibrated("laplace")])
    with pytest.raises(BadType, match="RecalibratedPredictive"):
        mixture([pred, pred])


def test_tails_too_heavy_for_a_number() -> None:
    loc = torch.zeros(2, 1, dtype=torch.float64)
    cauchy = RecalibratedPredictive(ContinuousPredictive(StudentT(torch.ones_like(loc), loc, 1.0)), KNOTS, LEVELS)
    assert cauchy.mean.isnan().all()
    assert cauchy.crps(torch.zeros(1)).isfinite().all()
    base = ContinuousPredictive(StudentT(torch.full_like(loc, 1.8), loc, 1.0))
    assert RecalibratedPredictive(base, KNOTS, LEVELS).variance.tolist() == [torch.inf]
    base = ContinuousPredictive(StudentT(torch.full_like(loc, 2.1), loc, 1.0))
    assert RecalibratedPredictive(base, KNOTS, LEVELS).mean.isfinite().all()
    with pytest.raises(BadInput, match="tails are too heavy"):
        _ = RecalibratedPredictive(base, KNOTS, LEVELS).variance


def test_far_draws_and_far_from_zero() -> None:
    """Two narrow draws with nothing between, a million away from 0."""
    loc = torch.tensor([[1e6 - 10], [1e6 + 10]], dtype=torch.float64)
    pred = RecalibratedPredictive(ContinuousPredictive(Normal(loc, 0.1)), [0.0, 0.5, 1.0], [0.0, 0.75, 1.0])
    assert pred.mean.item() - 1e6 == pytest.approx(-5, rel=1e-6)
    assert pred.variance.item() == pytest.approx(0.01 + 75, rel=1e-6)


def test_gradients_reach_the_parameters() -> None:
    loc = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    pred = RecalibratedPredictive(ContinuousPredictive(Normal(loc, 1.0)), KNOTS, LEVELS)
    pred.log_prob(torch.ones(3)).sum().backward()
    torch.testing.assert_close(loc.grad, torch.full((2, 3), 0.5, dtype=torch.float64))


def test_maps_that_will_not_do() -> None:
    base = Predictive.from_normal([0.0], [1.0])
    with pytest.raises(BadInput, match=r"knots must increase strictly from 0 to 1.*after element 1"):
        RecalibratedPredictive(base, [0.0, 0.5, 0.5, 1.0], [0.0, 0.2, 0.5, 1.0])
    with pytest.raises(BadInput, match=r"levels must increase strictly from 0 to 1, got 0 to 0\.9"):
        RecalibratedPredictive(base, [0.0, 1.0], [0.0, 0.9])
    with pytest.raises(BadInput, match="levels must increase strictly"):
        RecalibratedPredictive(base, [0.0, 0.5, 1.0], [0.0, math.nan, 1.0])
    with pytest.raises(BadInput, match="3 elements and levels 2"):
        RecalibratedPredictive(base, [0.0, 0.5, 1.0], [0.0, 1.0])
    with pytest.raises(BadInput, match="at least the ends"):
        RecalibratedPredictive(base, [0.0], [0.0])
    with pytest.raises(BadType, match="ContinuousPredictive"):
        RecalibratedPredictive(Predictive.from_probs([0.5]), [0.0, 1.0], [0.0, 1.0])
    pred = RecalibratedPredictive(base, KNOTS, LEVELS)
    with pytest.raises(BadInput, match="value has shape"):
        pred.log_prob([0.0, 1.0])
    with pytest.raises(BadInput, match=r"probabilities in \[0, 1\]"):
        pred.icdf(1.5)
    with pytest.raises(BadInput, match="must not be NaN"):
        pred.cdf(math.nan)
    with pytest.raises(BadInput, match="alpha"):
        pred.interval(1.0)


# -- against closed forms, and in use


def moments_by_closed_form(pred: RecalibratedPredictive) -> tuple[Tensor, Tensor]:
    """Mean and variance of a recalibrated mixture of Gaussians, from their partial moments between the knots."""
    base, weights = pred._base, pred._base.weights[:, None]
    loc, scale = parameters(base.component).values()
    middle = base.mean
    z = (torch.stack([base.icdf(float(knot)) for knot in pred._knots[1:-1]]).unsqueeze(1) - loc) / scale
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)

    def between(values: Tensor, first: float, last: float) -> Tensor:
        ends = [torch.full_like(values[:1], end) for end in (first, last)]
        return torch.cat([ends[0], values, ends[1]]).diff(dim=0)

    upper = torch.cat([torch.full_like(z[:1], -9), z]) > 0  # there, from the other end
    lower_mass = between(torch.special.erfc(-z / math.sqrt(2)) / 2, 0, 1)
    mass = torch.where(upper, -between(torch.special.erfc(z / math.sqrt(2)) / 2, 1, 0), lower_mass)
    offset, first, second = loc - middle, between(density, 0, 0), between(z * density, 0, 0)
    parts = (
        mass,
        offset * mass - scale * first,
        (offset.square() + scale.square()) * mass - 2 * offset * scale * first - scale.square() * second,
    )
    pieces = [(weights * part).sum(1) for part in parts]
    slopes = pred._levels.diff().unsqueeze(-1) / pieces[0]
    mean, square = ((slopes * piece).sum(0) for piece in pieces[1:])
    return middle + mean, square - mean.square()


@pytest.mark.parametrize("stretch", [1.0, 3.0], ids=["fit", "over-confident"])
@pytest.mark.parametrize(("widths", "apart"), [(0.3, 0.5), (1.5, 1.0), (3.0, 2.0), (0.0, 30.0)])
@pytest.mark.parametrize("draws", [1, 2, 5, 30])
def test_moments_and_crps_to_the_accuracy_that_is_stated(
    draws: int, widths: float, apart: float, stretch: float
) -> None:
    """Alike, of unlike widths (up to e^6 apart), and without overlap; targets up to 3 times as far out as predicted."""
    generator = torch.Generator().manual_seed(draws)
    loc = apart * torch.randn(draws, 6, generator=generator, dtype=torch.float64)
    scale = (widths * (2 * torch.rand(draws, 6, generator=generator, dtype=torch.float64) - 1)).exp()
    base = ContinuousPredictive(Normal(loc, scale))
    normal = stretch * torch.randn(1000, generator=generator, dtype=torch.float64)
    one = Predictive.from_normal(torch.zeros(1000, dtype=torch.float64), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        fitted = CDFCalibration().fit(one, normal)
    for knots, levels in ((KNOTS, LEVELS), (fitted.knots, fitted.levels)):
        pred = RecalibratedPredictive(base, knots, levels)
        mean, variance = moments_by_closed_form(pred)
        deviation = variance.sqrt()
        torch.testing.assert_close(pred.mean / deviation, mean / deviation, rtol=0, atol=1e-6)
        torch.testing.assert_close(pred.variance, variance, rtol=1e-5, atol=0)
        y = pred.icdf(torch.linspace(0.01, 0.99, 6, dtype=torch.float64))
        y[0] = -1e3
        if stretch == 1:  # else the reference is rounded: slopes of 1e10 where the mixture's cdf is nearly 1
            y[-1] = 1e3
        other = reference_crps(pred, y)
        torch.testing.assert_close(pred.crps(y) / deviation, other / deviation, rtol=0, atol=1e-6)


def reference_crps(pred: RecalibratedPredictive, y: Tensor) -> Tensor:
    """By 8 nodes on each of the panels between the knots, the target and points around every component."""
    loc, scale = parameters(pred._base.component).values()
    steps = torch.linspace(-10, 10, 121, dtype=torch.float64).reshape(-1, 1, 1)
    knots = torch.stack([pred._base.icdf(float(knot)) for knot in pred._knots[1:-1]])
    cuts = torch.cat([(loc + steps * scale).flatten(0, 1), knots, y.unsqueeze(0)]).sort(0).values
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(8))
    scores = torch.zeros_like(y)
    half, middle = cuts.diff(dim=0) / 2, (cuts[1:] + cuts[:-1]) / 2
    rows = torch.arange(len(y)).repeat(len(half))
    repeated = pred[rows]
    for node, weight in zip(nodes, weights, strict=True):
        x = middle + node * half
        below = repeated.cdf(x.flatten()).reshape(x.shape)
        scores = scores + weight * (half * (below - (x >= y).double()).square()).sum(0)
    return scores


def test_quantiles_and_split_panels() -> None:
    """Also far out: a density of e^-30 is interpolated to 1e-3 of itself."""
    base = ContinuousPredictive(components()["normal"])
    panels = next(panels_of(base.component, base.weights, lifted=True))
    levels = torch.tensor([1e-12, 1e-6, 0.01, 0.3, 0.5, 0.9, 1 - 1e-6], dtype=torch.float64)
    points = panels.quantiles(levels)
    exact = torch.stack([base.icdf(float(level)) for level in levels])
    torch.testing.assert_close(points, exact, rtol=0, atol=1e-4)
    split = panels.split(points)
    assert len(split.density) == len(panels.density) + len(points)
    nodes = split.nodes.flatten(0, 1)
    wanted = mixture_log_prob(base.component, base.weights, nodes)
    error = (split.density.flatten(0, 1).log() - wanted).abs()
    assert float(error[wanted > -30].max()) < 1e-3
    with pytest.raises(BadInput, match="too heavy"):
        for _ in panels_of(base.component, base.weights):
            pass


def line() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2, generator=generator)
    noise = torch.empty(400, 1).exponential_(generator=generator) - 1
    return x, x[:, :1] - x[:, 1:] + noise


def ensemble() -> bg.DeepEnsemble:
    def member(shift: float) -> nn.Module:
        network = nn.Linear(2, 1)
        network.weight.data, network.bias.data = torch.tensor([[1.0, -1.0]]), torch.tensor([shift])
        return network

    return bg.DeepEnsemble([member(shift) for shift in (-0.1, 0.0, 0.1)], Gaussian(scale=0.5))


def test_a_calibrated_predictor_is_evaluated_and_compared() -> None:
    x, y = line()
    plain, calibrated = ensemble(), ensemble()
    calibrated.calibrate((x[:200], y[:200]), CDFCalibration())
    pred = calibrated.predict(x[200:])
    assert isinstance(pred, RecalibratedPredictive)
    evaluation = bg.evaluate(calibrated, (x[200:], y[200:]))
    assert evaluation.metrics == bg.evaluate(plain, (x[200:], y[200:])).metrics
    assert evaluation.value("rmse") == pytest.approx(float((pred.mean - y[200:]).square().mean().sqrt()), rel=1e-5)
    assert evaluation.value("crps") == pytest.approx(float(pred.crps(y[200:]).mean()), rel=1e-5)
    again = bg.evaluate(pred, y[200:], metrics=["crps", "nll", "coverage_90"])
    assert again.value("nll") == pytest.approx(evaluation.value("nll"), rel=1e-5)
    found = {row.metric: row for row in bg.compare({"plain": plain, "map": calibrated}, (x[200:], y[200:])).differences}
    assert found["crps"].difference < 0
    assert found["nll"].difference < 0
    assert found["nll"].is_clear


@pytest.mark.parametrize("score", ["absolute", "normalised", "cdf"])
def test_a_guarantee_on_top_of_the_map(score: IntervalScore) -> None:
    x, y = line()
    predictor = ensemble().calibrate((x[:200], y[:200]), CDFCalibration(), ConformalInterval(score, alpha=0.2))
    pred = predictor.predict(x[200:])
    assert isinstance(pred, GuaranteedRecalibrated)
    lower, upper = pred.interval()
    # Beta(81, 20): the coverage of one fit to 100 examples; and then 200 targets.
    assert float(((lower <= y[200:]) & (y[200:] <= upper)).double().mean()) > 0.8 - 5 * math.sqrt(
        0.16 * (1 / 100 + 1 / 200)
    )
    assert (pred.interval(0.05)[0] <= lower).all()
    torch.testing.assert_close(pred[:7].interval()[0], lower[:7])
    assert bg.evaluate(pred, y[200:], metrics=["coverage_90", "crps"]).value("coverage_90") > 0.7
    assert pred.sample(3, seed=0).shape == (3, 200, 1)


def test_a_family_of_ones_own() -> None:
    """Whatever has a location, a scale and a cdf."""
    pred = ContinuousPredictive(Cauchy(torch.zeros(2, 50, dtype=torch.float64), 1.0))
    y = 3 * Cauchy(torch.zeros(50, dtype=torch.float64), 1.0).icdf(torch.linspace(0.01, 0.99, 50, dtype=torch.float64))
    assert float(VarianceScaling().fit(pred, y).factor) == pytest.approx(3, abs=0.3)
    assert CDFCalibration().fit(pred, y)(pred).log_prob(y).isfinite().all()
