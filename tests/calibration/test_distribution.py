"""Conformal predictive distributions: uniform PIT by simulation beside a twin that must fail, and what the result is."""

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.calibration import CDFCalibration, ConformalDistribution, TemperatureScaling
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wrong(rows: int, seed: int) -> tuple[bg.Predictive, Tensor]:
    """Predictions with a bias, three times too sure, of skewed noise that grows with the input."""
    x = torch.rand(rows, generator=generator(seed)).double()
    noise = torch.rand(rows, generator=generator(seed + 1)).double().log() + 1
    return bg.Predictive.from_normal(x + 0.3, 0.1 + 0.3 * x), x + (0.3 + 0.9 * x) * noise


TRIALS = 2000


def trials(count: int) -> tuple[Any, Tensor, Any, Tensor]:
    """Held-out examples and a new one, for outputs that are trials: each has residuals of its own."""
    x, uniform = torch.rand(2, count + 1, TRIALS, generator=generator(count), dtype=torch.float64)
    noise = uniform.log() + 1
    pred, y = bg.Predictive.from_normal(x + 0.3, 0.1 + 0.3 * x), x + (0.3 + 0.9 * x) * noise
    return pred[:count], y[:count], pred[count:], y[count:]


@pytest.mark.parametrize("score", ["absolute", "normalised"])
@pytest.mark.parametrize("count", [20, 100, 1000])
def test_the_cdf_at_the_answer_is_uniform(score: Any, count: int) -> None:
    """On 0, 1/n, ..., 1: Kolmogorov's distance to that, and the mean; the predictive itself is the twin."""
    pred, y, new, answers = trials(count)
    calibrated: Any = ConformalDistribution(score).fit(pred, y)(new)
    found, plain = calibrated.cdf(answers)[0], new.cdf(answers)[0]
    place = (found * count).round()
    assert torch.allclose(place, found * count)
    points = torch.arange(count + 1)
    even = (points + 1).double() / (count + 1)
    critical = 2.75 / TRIALS**0.5  # Kolmogorov's distribution exceeds 2.75 with probability 5e-7, as 5 sigma
    assert ((place <= points.unsqueeze(-1)).double().mean(1) - even).abs().max() < critical
    assert ((plain * count <= points.unsqueeze(-1)).double().mean(1) - even).abs().max() > critical
    assert abs(found.mean() - 0.5) < 5 * math.sqrt((count + 2) / (12 * count) / TRIALS)


@pytest.mark.parametrize("alpha", [0.1, 0.3])
@pytest.mark.parametrize(("count", "draws"), [(20, 1000), (100, 1000), (1000, 1000), (1000, 99)])
def test_coverage_of_intervals(count: int, draws: int, alpha: float) -> None:
    pred, y, new, answers = trials(count)
    calibrated: Any = ConformalDistribution("absolute", alpha, num_draws=draws).fit(pred, y)(new)
    lower, upper = calibrated.interval()
    covered = ((lower <= answers) & (answers <= upper)).double().mean().item()
    want = 1 - 2 * math.floor((count + 1) * alpha / 2) / (count + 1)
    error = 5 * math.sqrt(want * (1 - want) / TRIALS)
    assert want >= 1 - alpha
    assert want - error < covered < want + error + (2 / (draws + 1) if draws < count else 0)
    low, high = calibrated.icdf(alpha / 2), calibrated.icdf(1 - alpha / 2)
    plain = ((low <= answers) & (answers <= high)).double().mean().item()
    if count == 20 and alpha == 0.1:  # quantiles of the samples are the twin: 18 of 21 gaps instead of 19
        assert plain < want - error


def test_moments_and_quantiles_are_those_of_the_residuals() -> None:
    pred, y = wrong(60, 1)
    calibrated: Any = ConformalDistribution("normalised").fit(pred, y)(pred[:5])
    residuals = (y - pred.mean) / pred.stddev
    assert torch.allclose(calibrated.mean, pred.mean[:5] + pred.stddev[:5] * residuals.mean())
    assert torch.allclose(calibrated.stddev, pred.stddev[:5] * residuals.std(unbiased=False))
    assert torch.allclose(calibrated.icdf(0.25), pred.mean[:5] + pred.stddev[:5] * residuals.sort().values[14])
    assert bool((calibrated.standard_error == 0).all())
    assert calibrated.crps(y[:5]).shape == calibrated.sample().shape == (5,)
    lower, upper = calibrated.interval(0.2)
    ordered = residuals.sort().values  # 61 * 0.1 = 6.1
    assert torch.allclose(lower, pred.mean[:5] + pred.stddev[:5] * ordered[5])
    assert torch.allclose(upper, pred.mean[:5] + pred.stddev[:5] * ordered[-6])


def test_thinned_residuals_leave_gaps_of_equal_mass() -> None:
    pred, y = wrong(1000, 2)
    fitted = ConformalDistribution(num_draws=90).fit(pred, y)
    assert len(fitted.residuals) == 90
    gaps = torch.cat([fitted.ranks[:1], fitted.ranks.diff(), 1001 - fitted.ranks[-1:]])
    assert gaps.min() >= 10
    assert gaps.max() <= 12
    assert torch.equal(ConformalDistribution().fit(pred, y).ranks, torch.arange(1, 1001))


def test_several_outputs_have_residuals_of_their_own() -> None:
    y = torch.randn(200, 2, generator=generator(0)) * torch.tensor([1.0, 5.0])
    pred = bg.Predictive.from_normal(torch.zeros(200, 2), 1.0)
    fitted = ConformalDistribution("absolute").fit(pred, y)
    calibrated: Any = fitted(pred)
    assert torch.allclose(calibrated.stddev[0], y.std(0, unbiased=False))
    lower, upper = calibrated.interval()
    assert ((lower <= y) & (y <= upper)).double().mean(0).min() >= 0.9
    with pytest.raises(BadInput, match=r"pred has outputs \(\), this calibrator was fitted to \(2,\)"):
        fitted(bg.Predictive.from_normal(torch.zeros(3), 1.0))


def test_states_and_files() -> None:
    pred, y = wrong(300, 3)
    fitted = ConformalDistribution().fit(pred, y)
    loaded = ConformalDistribution()
    loaded.load_state_dict(fitted.state_dict())
    first, again = (each(pred).interval() for each in (fitted, loaded))
    assert torch.equal(first[0], again[0])
    assert torch.equal(pickle.loads(pickle.dumps(loaded(pred))).interval()[1], first[1])
    assert torch.equal(loaded(pred)[10:20].interval()[1], first[1][10:20])


def test_what_was_recalibrated_or_sampled_can_be_calibrated() -> None:
    pred, y = wrong(300, 4)
    wide = bg.calibration.VarianceScaling().fit(pred, y)(pred)
    mapped = CDFCalibration().fit(wide[:100], y[:100])(wide[100:])
    samples = bg.Predictive.from_samples(pred[100:].sample(torch.Size([50])))
    for given in (mapped, samples):
        lower, upper = ConformalDistribution().fit(given, y[100:])(given).interval()
        assert ((lower <= y[100:]) & (y[100:] <= upper)).double().mean() >= 0.9


def test_a_predictor_keeps_it_last_and_joins_batches() -> None:
    x = torch.randn(300, 2, generator=generator(0))
    y = x.sum(-1, keepdim=True) + torch.randn(300, 1, generator=generator(1))
    predictor = bg.Deterministic(nn.Linear(2, 1), bg.likelihoods.Gaussian())
    predictor.fit((x[:100], y[:100]), epochs=3)
    predictor.calibrate((x[100:200], y[100:200]), ConformalDistribution())
    whole: Any = predictor(x[200:])
    batches: Any = predictor.predict(x[200:], batch_size=30)
    assert torch.allclose(batches.interval()[0], whole.interval()[0])
    evaluation = bg.evaluate(predictor, (x[200:], y[200:]))
    assert evaluation.value("crps") > 0
    with pytest.raises(BadInput, match="whose coverage it would undo"):
        predictor.calibrate((x, y), TemperatureScaling(), append=True)


PRED, Y = wrong(50, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ConformalDistribution("cdf"), BadInput, "score must be one of 'absolute', 'normalised'"),  # type: ignore[arg-type]
        (lambda: ConformalDistribution(num_draws=1), BadInput, "num_draws"),
        (lambda: ConformalDistribution()(PRED), NotFitted, "not fitted"),
        (lambda: ConformalDistribution().fit(PRED[:1], Y[:1]), BadInput, "two held-out examples"),
        (lambda: ConformalDistribution().fit(PRED, Y[:9]), BadInput, "targets has shape"),
        (
            lambda: ConformalDistribution().fit(bg.Predictive.from_probs([[0.5, 0.5]]), torch.tensor([0])),
            BadType,
            "predictives of numbers",
        ),
        (
            lambda: ConformalDistribution().fit(bg.likelihoods.Poisson().predictive(torch.zeros(1, 3)), torch.ones(3)),
            BadType,
            "make no count",
        ),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_too_few_residuals_give_everything() -> None:
    fitted = ConformalDistribution().fit(PRED[:18], Y[:18])
    with pytest.warns(CalibrationWarning, match="18 residuals are too few"):
        lower, upper = fitted(PRED).interval()
    assert bool(lower.isinf().all() & upper.isinf().all())
