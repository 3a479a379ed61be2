"""The profile-likelihood interval of a temperature: against brute force, and how often it covers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from bayesguard.calibration import TemperatureScaling, likelihood
from bayesguard.calibration.likelihood import PooledLikelihood, Slope, minimise
from bayesguard.calibration.profile import profile_end
from bayesguard.errors import CalibrationWarning
from bayesguard.predictive import CategoricalPredictive, Predictive

CHI_SQUARE = 3.841458820694124


def problem(draws: int, count: int, num: int, seed: int = 0, temperature: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, num, generator=generator, dtype=torch.float64)
    targets = (logits / temperature).softmax(-1).multinomial(1, generator=generator)[:, 0]
    noise = torch.randn(draws, count, num, generator=generator, dtype=torch.float64) if draws > 1 else 0.0
    return (logits + noise).expand(draws, -1, -1), targets


def nll_of(logits: Tensor, targets: Tensor, shares: Tensor | None = None) -> Callable[[float], float]:
    """Mean NLL as a function of T, in plain float64."""
    shares = torch.ones(len(targets)).double() if shares is None else shares

    def nll(temperature: float) -> float:
        probs = (logits / temperature).softmax(-1).mean(0)[torch.arange(len(targets)), targets]
        return float(-(probs.log() * shares).sum() / shares.sum())

    return nll


def by_brute_force(nll: Callable[[float], float], worth: float) -> tuple[float, float, float]:
    """T and the interval: a grid, then Brent's method on both sides."""
    grid = np.geomspace(0.1, 40, 50)
    scores = np.array([nll(each) for each in grid])
    at = int(scores.argmin())
    best = optimize.minimize_scalar(
        nll, bounds=(grid[at - 1], grid[at + 1]), method="bounded", options={"xatol": 1e-10}
    )
    most = best.fun + CHI_SQUARE / (2 * worth)
    below, above = (scores > most) & (grid < best.x), (scores > most) & (grid > best.x)
    lower = optimize.brentq(lambda at: nll(at) - most, grid[below].max(), best.x, xtol=1e-12)
    upper = optimize.brentq(lambda at: nll(at) - most, best.x, grid[above].min(), xtol=1e-12)
    return best.x, lower, upper


@pytest.mark.parametrize(("draws", "count", "num"), [(1, 12, 3), (1, 200, 4), (4, 150, 4), (1, 3000, 10), (1, 300, 2)])
def test_the_interval_is_that_of_brute_force(draws: int, count: int, num: int) -> None:
    logits, targets = problem(draws, count, num)
    found = TemperatureScaling().fit(CategoricalPredictive(logits), targets).diagnostics["profile_interval"]
    best, *wanted = by_brute_force(nll_of(logits, targets), count)
    assert found == pytest.approx(wanted, rel=2e-6)
    assert found[0] < best < found[1]


def test_of_weighted_examples_it_is_that_of_their_effective_number() -> None:
    logits, targets = problem(1, 400, 4)
    weights = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 2
    scaling = TemperatureScaling().fit(CategoricalPredictive(logits), targets, weights=weights)
    worth = float(weights.sum() ** 2 / weights.square().sum())
    _, *wanted = by_brute_force(nll_of(logits, targets, weights), worth)
    assert scaling.diagnostics["profile_interval"] == pytest.approx(wanted, rel=2e-6)
    _, *unweighted = by_brute_force(nll_of(logits, targets, weights), 400)
    assert scaling.diagnostics["profile_interval"] != pytest.approx(unweighted, rel=1e-2)


# -- many logits: no further pass over them


@pytest.mark.parametrize("temperature", [0.6, 1.0, 3.0])
def test_many_rows_are_not_read_again(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    logits, targets = problem(1, 20_000, 10, temperature=temperature)
    monkeypatch.setattr(likelihood, "SMALL", 20_000)
    whole = PooledLikelihood(logits.float(), targets, torch.ones(1, dtype=torch.float64))
    best = minimise(whole, 0.01, 100.0)

    def none(self: PooledLikelihood, inverse: float, in_float64: bool) -> Slope:
        raise AssertionError("another pass")

    with monkeypatch.context() as patch:
        patch.setattr(PooledLikelihood, "_slope", none)
        upper, lower = 1 / profile_end(whole, best, 0.01), 1 / profile_end(whole, best, 100.0)
    _, *wanted = by_brute_force(nll_of(logits.float().double(), targets), 20_000)
    assert max(abs(lower - wanted[0]), abs(upper - wanted[1])) < 1e-3 * (wanted[1] - wanted[0])
    # The quadratic alone errs by more: the interval is not even.
    error = (wanted[1] - wanted[0]) / 2
    assert abs((wanted[1] + wanted[0]) / 2 - 1 / best) > 3e-3 * error


def test_many_logits_of_few_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What derivatives tell is not enough where the interval is wide."""
    monkeypatch.setattr(likelihood, "SMALL", 30_000)
    logits, targets = problem(1, 60, 1000, temperature=1.0)
    logits = logits.float()
    found = TemperatureScaling().fit(CategoricalPredictive(logits), targets).diagnostics["profile_interval"]
    _, *wanted = by_brute_force(nll_of(logits.double(), targets), 60)
    assert found == pytest.approx(wanted, rel=1e-5)


# -- where the data do not bound it


@pytest.mark.parametrize("small", [1 << 20, 1])
def test_ends_that_the_data_do_not_bound(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr(likelihood, "SMALL", small)
    logits = torch.tensor([[3.0, 0.0], [0.0, 2.0], [2.5, 0.0], [0.0, 3.5]])
    with pytest.warns(CalibrationWarning, match="separable|T stays 1"):
        sure = TemperatureScaling().fit(Predictive.from_logits(logits), [0, 1, 0, 1])
    lower, upper = sure.diagnostics["profile_interval"]
    assert lower == 0
    # At T -> 0 all answers are right and sure: the smallest NLL is 0.
    assert 4 * nll_of(logits.double()[None], torch.tensor([0, 1, 0, 1]))(upper) == pytest.approx(
        CHI_SQUARE / 2, rel=1e-5
    )
    with pytest.warns(CalibrationWarning, match="bound"):
        wrong = TemperatureScaling().fit(Predictive.from_logits(logits), [1, 0, 1, 0])
    assert wrong.diagnostics["profile_interval"][1] == math.inf
    assert 1 < wrong.diagnostics["profile_interval"][0] < 100
    with pytest.warns(CalibrationWarning, match="bound"):
        nothing = TemperatureScaling().fit(Predictive.from_logits(torch.zeros(4, 2)), [1, 0, 1, 0])
    assert nothing.diagnostics["profile_interval"] == (0.0, math.inf)


def test_a_best_temperature_at_its_bound_leaves_that_end_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many examples, too: the likelihood has a slope at the bound, and an expansion around a minimum is wrong there."""
    monkeypatch.setattr(likelihood, "SMALL", 100)
    generator = torch.Generator().manual_seed(0)
    logits = 120 * torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    targets = (logits / 120).softmax(-1).multinomial(1, generator=generator)[:, 0]
    whole = PooledLikelihood(logits[None].log_softmax(-1), targets, torch.ones(1, dtype=torch.float64))
    whole(0.0101)  # a second place, from which to tell the third derivative
    assert profile_end(whole, 0.01, 0.01) == 0
    nll = nll_of(logits[None], targets)
    wanted = optimize.brentq(lambda at: 4000 * (nll(at) - nll(100)) - CHI_SQUARE / 2, 50, 100)
    assert 1 / profile_end(whole, 0.01, 100.0) == pytest.approx(wanted, abs=1e-3 * (100 - wanted))


# -- what they promise


def repeated(times: int, count: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """T, its standard error and the interval in samples of which the true T is 2."""
    found, errors, intervals = [], [], []
    for seed in range(times):
        logits, targets = problem(1, count, 3, seed=seed)
        scaling = TemperatureScaling().double().fit(CategoricalPredictive(logits), targets)
        found.append(float(scaling.temperature))
        errors.append(scaling.diagnostics["standard_error"])
        intervals.append(scaling.diagnostics["profile_interval"])
    return torch.tensor(found), torch.tensor(errors), torch.tensor(intervals)


def test_they_tell_how_far_another_sample_would_be() -> None:
    times = 1500
    found, errors, intervals = repeated(times)
    # In log T the error is nearly normal, and of nearly one size.
    relative = (found / 2).log()
    expected = (errors / found).square()
    z = relative.square() - expected
    assert abs(float(z.mean())) < 5 * float(z.std()) / math.sqrt(times)
    twin = relative.square() - 2 * expected  # an error that forgets a factor in the variance
    assert abs(float(twin.mean())) > 5 * float(twin.std()) / math.sqrt(times)
    covered = ((intervals[:, 0] <= 2) & (intervals[:, 1] >= 2)).double().mean()
    tolerance = 5 * math.sqrt(0.95 * 0.05 / times)
    assert abs(float(covered) - 0.95) < tolerance
    half = intervals[:, 1] / found, found / intervals[:, 0]  # the twin: half as wide
    narrow = ((found / half[1].sqrt() <= 2) & (found * half[0].sqrt() >= 2)).double().mean()
    assert abs(float(narrow) - 0.95) > tolerance
