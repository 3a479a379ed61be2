"""The fitted temperature against closed forms, SciPy, and a scan of the pooled likelihood in plain loops."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import optimize
from torch import Tensor

from bayesguard.calibration import TemperatureScaling
from bayesguard.calibration.likelihood import PooledLikelihood
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive


def problem(draws: int, seed: int, count: int = 60, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Over-confident logits `[S, N, K]` of which about half have the target on top."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (count,), generator=generator)
    logits = torch.randn(draws, count, classes, generator=generator, dtype=torch.float64)
    logits += torch.nn.functional.one_hot(targets, classes)
    return 20 * logits, targets


def loop_nll(logits: Tensor, targets: Tensor, log_temperature: float) -> float:
    """Mean of -log of the mean over draws of softmax(logits / T), one number at a time."""
    inverse, total = math.exp(-log_temperature), 0.0
    for n, target in enumerate(targets.tolist()):
        pooled = 0.0
        for row in logits[:, n].tolist():
            largest = max(row)
            weights = [math.exp((x - largest) * inverse) for x in row]
            pooled += weights[target] / sum(weights) / logits.shape[0]
        total -= math.log(max(pooled, 1e-300))
    return total / len(targets)


@pytest.mark.parametrize("draws", [1, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_optimum_of_the_pooled_likelihood(draws: int, seed: int) -> None:
    logits, targets = problem(draws, seed, count=150)
    scaling = TemperatureScaling().fit(Predictive.from_logits(logits, draws=True), targets)
    scan = min((loop_nll(logits, targets, x / 5), x / 5) for x in range(-10, 20))[1]
    best = optimize.minimize_scalar(
        lambda x: loop_nll(logits, targets, x),
        bounds=(scan - 0.2, scan + 0.2),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert float(scaling.temperature) == pytest.approx(math.exp(best.x), rel=1e-6)
    assert scaling.diagnostics["nll_after"] == pytest.approx(best.fun, rel=1e-12)
    assert scaling.diagnostics["nll_before"] == pytest.approx(loop_nll(logits, targets, 0.0), rel=1e-12)


def test_two_kinds_of_answers_by_hand() -> None:
    """Log-odds 4, right three times of four: T = 4 / log 3; the information of N Bernoullis gives its error."""
    odds = torch.full((40,), 4.0)
    answers = torch.tensor([1, 1, 1, 0] * 10)
    scaling = TemperatureScaling().fit(BernoulliPredictive.from_logits(odds), answers)
    assert float(scaling.temperature) == pytest.approx(4 / math.log(3), rel=1e-6)
    # d^2 NLL / d(log T)^2 = N p (1 - p) (log-odds / T)^2 at the optimum
    error = float(scaling.temperature) / math.sqrt(40 * 0.75 * 0.25 * math.log(3) ** 2)
    assert scaling.diagnostics["standard_error"] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("at", [0.27, 1.0, 2.7])
def test_derivatives(draws: int, at: float) -> None:
    logits, targets = problem(draws, 3)
    weights = torch.full((draws,), 1 / draws, dtype=torch.float64)
    found = PooledLikelihood(logits, targets, weights)(at)

    def nll(x: Tensor) -> Tensor:
        picked = (logits * x).log_softmax(-1).gather(-1, targets.expand(draws, -1).unsqueeze(-1)).squeeze(-1)
        return -(picked.logsumexp(0) - math.log(draws)).mean()

    point = torch.tensor(at, dtype=torch.float64)
    first: Callable[[Tensor], Tensor] = torch.func.grad(nll)
    assert found.nll == pytest.approx(float(nll(point)), rel=1e-12)
    assert found.first == pytest.approx(float(first(point)), rel=1e-9)
    assert found.second == pytest.approx(float(torch.func.grad(first)(point)), rel=1e-9)


def test_deepest_of_several_minima() -> None:
    """Two draws that disagree can make two minima; a local search from T = 1 may end in the shallow one."""
    found = 0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        logits = 10 ** (2 * torch.rand(2, 6, 1, generator=generator, dtype=torch.float64))
        logits = logits * torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
        targets = torch.randint(3, (6,), generator=generator)
        scan = [loop_nll(logits, targets, x / 10) for x in range(-45, 46)]
        minima = [i for i in range(1, 90) if scan[i] < min(scan[i - 1], scan[i + 1])]
        if len(minima) > 1:
            found += 1
            scaling = TemperatureScaling().fit(Predictive.from_logits(logits, draws=True), targets)
            assert scaling.diagnostics["nll_after"] <= min(scan) + 1e-9
    assert found  # otherwise the test tested nothing


def test_many_classes_of_many_examples() -> None:
    """Targets drawn from softmax(logits): T = 1 within five standard errors; of logits times 3, T = 3."""
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(4000, 20, generator=generator)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    for factor in (1.0, 3.0):
        scaling = TemperatureScaling().fit(CategoricalPredictive.from_logits(factor * logits), targets)
        error = scaling.diagnostics["standard_error"]
        assert error < 0.05 * factor
        assert abs(float(scaling.temperature) - factor) < 5 * error
        assert not abs(float(scaling.temperature) - 1.5 * factor) < 5 * error  # a wrong fit would be seen
