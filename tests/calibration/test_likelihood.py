"""The pooled likelihood of many logits, read in their own dtype, against plain formulas in float64."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from bayesguard.calibration import TemperatureScaling, likelihood
from bayesguard.calibration.likelihood import PooledLikelihood, Slope, minimise
from bayesguard.errors import CalibrationWarning
from bayesguard.predictive import CategoricalPredictive, Predictive


def problem(
    draws: int, count: int, classes: int, *, temperature: float = 2.0, noise: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities `[S, N, K]` in float64 whose targets come from the softmax of a part of them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    if draws > 1:
        logits = logits + noise * torch.randn(draws, count, classes, generator=generator, dtype=torch.float64)
    weights = torch.rand(draws, generator=generator, dtype=torch.float64) + 0.5
    return (temperature * logits.reshape(draws, count, classes)).log_softmax(-1), labels, weights / weights.sum()


def plain(logits: Tensor, labels: Tensor, weights: Tensor, inverse: float) -> Slope:
    """The same as `PooledLikelihood` for the whole in float64, derivatives by automatic differentiation."""

    def nll(b: Tensor) -> Tensor:
        scores = (logits.double() * b).log_softmax(-1)
        own = scores.gather(-1, labels.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)
        return -(own + weights.log().unsqueeze(-1)).logsumexp(0).mean()

    at = torch.tensor(inverse, dtype=torch.float64)
    first = torch.func.grad(nll)
    return Slope(float(nll(at)), float(first(at)), float(torch.func.grad(first)(at)))


def optimum(logits: Tensor, labels: Tensor, weights: Tensor, lower: float, upper: float) -> float:
    """The zero of the slope of the plain formula, by halving."""
    while upper - lower > 1e-9:
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if plain(logits, labels, weights, middle).first < 0 else (lower, middle)
    return lower


@pytest.fixture
def no_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits count as many, and slices are short."""
    monkeypatch.setattr(likelihood, "SMALL", 2000)
    monkeypatch.setattr(likelihood, "CACHED", 1 << 12)


@pytest.mark.usefixtures("no_small")
@pytest.mark.parametrize("inverse", [0.01, 0.3, 1.0, 2.5, 100.0])
@pytest.mark.parametrize("draws", [1, 3])
def test_slices_of_float64_are_the_whole(draws: int, inverse: float) -> None:
    logits, labels, weights = problem(draws, 500, 30)
    found, wanted = PooledLikelihood(logits, labels, weights)(inverse), plain(logits, labels, weights, inverse)
    assert found.nll == pytest.approx(wanted.nll, rel=1e-12)
    assert found.first == pytest.approx(wanted.first, rel=1e-10, abs=1e-10)
    assert found.second == pytest.approx(wanted.second, rel=1e-9, abs=1e-10)


@pytest.mark.usefixtures("no_small")
@pytest.mark.parametrize("inverse", [0.01, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("draws", [1, 3])
def test_float32_is_summed_in_float64(draws: int, inverse: float) -> None:
    logits, labels, weights = problem(draws, 4000, 30)
    logits = logits.float()
    found, wanted = PooledLikelihood(logits, labels, weights)(inverse), plain(logits, labels, weights, inverse)
    assert found.nll == pytest.approx(wanted.nll, rel=1e-7)
    assert found.first == pytest.approx(wanted.first, abs=1e-6 * abs(wanted.second) * inverse)
    assert found.second == pytest.approx(wanted.second, rel=1e-5)
    exact = PooledLikelihood(logits, labels, weights).exactly(inverse)
    assert exact.nll == pytest.approx(wanted.nll, rel=1e-12)
    assert exact.second == pytest.approx(wanted.second, rel=1e-9)


@pytest.mark.usefixtures("no_small")
@pytest.mark.parametrize("draws", [1, 3])
def test_masked_classes_add_nothing(draws: int) -> None:
    logits, labels, weights = problem(draws, 500, 30)
    masked = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    masked.scatter_(-1, labels.expand(draws, -1).unsqueeze(-1), False)
    if draws > 1:
        masked[0, ::5] |= torch.nn.functional.one_hot(labels[::5], 30).bool()  # one draw rules the target out
    some = logits.masked_fill(masked, -1e4)
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        given = logits.masked_fill(masked, -torch.inf).to(dtype)
        found, wanted = PooledLikelihood(given, labels, weights)(0.7), plain(some, labels, weights, 0.7)
        assert list(found) == pytest.approx(list(wanted), rel=near)


@pytest.mark.usefixtures("no_small")
@pytest.mark.parametrize("temperature", [0.2, 1.0, 1.7, 9.0])
@pytest.mark.parametrize("draws", [1, 3])
def test_optimum_of_float32_is_that_of_float64(draws: int, temperature: float) -> None:
    logits, labels, weights = problem(draws, 3000, 10, temperature=temperature)
    logits = logits.float()
    scaling = TemperatureScaling().fit(CategoricalPredictive(logits, weights), labels)
    wanted = optimum(logits, labels, weights, 0.3 / temperature, 3 / temperature)
    assert 1 / float(scaling.temperature) == pytest.approx(wanted, rel=1e-6)
    here = plain(logits, labels, weights, wanted)
    assert scaling.diagnostics["nll_after"] == pytest.approx(here.nll, rel=1e-7)
    assert scaling.diagnostics["nll_before"] == pytest.approx(plain(logits, labels, weights, 1.0).nll, rel=1e-7)
    error = 1 / (wanted * wanted * math.sqrt(3000 * here.second))
    assert scaling.diagnostics["standard_error"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_many_rows_are_read_about_twice(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    logits, labels, weights = problem(1, 40_000, 50, temperature=temperature)
    read: list[int] = []
    slope = PooledLikelihood._slope

    def counted(self: PooledLikelihood, inverse: float, in_float64: bool) -> Slope:
        read.append(self.logits.numel())
        return slope(self, inverse, in_float64)

    monkeypatch.setattr(PooledLikelihood, "_slope", counted)
    monkeypatch.setattr(likelihood, "SMALL", 100_000)
    minimise(PooledLikelihood(logits.float(), labels, weights), 0.01, 100.0)
    assert read.count(logits.numel()) <= 3
    assert sum(read) < 4.5 * logits.numel()


@pytest.mark.usefixtures("no_small")
def test_no_gain_leaves_the_temperature_at_one() -> None:
    """Logits scaled by their own optimum: what is left to gain is less than float32 can see."""
    logits, labels, weights = problem(1, 6000, 30)
    best = optimum(logits, labels, weights, 0.2, 2.0)
    pred = Predictive.from_logits((logits[0] * best).float())
    scaling = TemperatureScaling().fit(pred, labels)
    assert float(scaling.temperature) == pytest.approx(1.0, abs=1e-5)
    assert scaling.diagnostics["nll_after"] <= scaling.diagnostics["nll_before"]


@pytest.mark.usefixtures("no_small")
@pytest.mark.parametrize("end", [0.01, 100.0])
def test_bounds_of_many_logits(end: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3000, 5, generator=generator)
    if end == 100.0:
        labels = logits.argmin(-1)  # the predictions know nothing of the targets
    else:
        labels = logits.argmax(-1)
        labels[0] = logits[0].argsort()[-2]
        logits = logits / 1000
    with pytest.warns(CalibrationWarning, match="bound"):
        scaling = TemperatureScaling().fit(Predictive.from_logits(logits), labels)
    assert float(scaling.temperature) == pytest.approx(end, rel=1e-6)
    assert scaling.diagnostics["at_bound"]


@pytest.mark.usefixtures("no_small")
def test_a_sample_without_mistakes_is_only_a_bad_start() -> None:
    """The mistakes lie between the rows of the sample, whose own likelihood has no optimum."""
    logits, _, weights = problem(1, 6000, 30)
    labels = logits[0].argmax(-1)
    labels[1::16] = (labels[1::16] + 1) % 30
    found = minimise(PooledLikelihood(logits.float(), labels, weights), 0.01, 100.0)
    assert found == pytest.approx(optimum(logits.float(), labels, weights, 0.01, 10.0), rel=1e-6)


def test_equal_tops_are_not_separable() -> None:
    logits = torch.tensor([[[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]]]).log_softmax(-1)
    one = torch.ones(1, dtype=torch.float64)
    assert PooledLikelihood(logits[:, :1], torch.tensor([0]), one).separable()
    assert not PooledLikelihood(logits, torch.tensor([0, 0]), one).separable()
    assert not PooledLikelihood(logits[:, :1], torch.tensor([1]), one).separable()


@pytest.mark.usefixtures("no_small")
def test_separable_rows_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 200)
    logits = problem(1, 500, 30)[0][0].float()
    with pytest.warns(CalibrationWarning, match="T stays 1"):
        scaling = TemperatureScaling().fit(Predictive.from_logits(logits), logits.argmax(-1))
    assert float(scaling.temperature) == 1.0


@pytest.mark.parametrize("seed", range(8))
def test_many_shapes_of_likelihood_have_no_slope_left(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 40, 4, generator=generator, dtype=torch.float64) * 10 ** (seed % 4 - 1)
    logits = (logits * (1 + 10 * torch.rand(1, 40, 1, generator=generator, dtype=torch.float64))).log_softmax(-1)
    labels = (logits[0] + logits.std() * torch.randn(40, 4, generator=generator)).argmax(-1)
    weights = torch.ones(1, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = minimise(PooledLikelihood(logits, labels, weights), 1e-4, 1e4)
    here = plain(logits, labels, weights, found)
    assert abs(here.first) < 1e-6 * here.second * found


@pytest.mark.usefixtures("no_small")
@pytest.mark.parametrize("inverse", [0.01, 0.7, 100.0])
@pytest.mark.parametrize("draws", [1, 3])
def test_counted_examples_are_repeated_ones(draws: int, inverse: float) -> None:
    logits, labels, weights = problem(draws, 500, 30)
    counts = torch.randint(1, 5, (500,), generator=torch.Generator().manual_seed(2))
    repeated = logits.repeat_interleave(counts, 1), labels.repeat_interleave(counts)
    found, wanted = PooledLikelihood(logits, labels, weights, counts.double()), PooledLikelihood(*repeated, weights)
    assert list(found(inverse)) == pytest.approx(list(wanted(inverse)), rel=1e-12)
    assert found.at_one() == pytest.approx(wanted.at_one(), rel=1e-12)
    assert list(found(inverse)) != pytest.approx(list(plain(logits, labels, weights, inverse)), rel=1e-3)
    assert found.worth == pytest.approx(float(counts.sum() ** 2 / counts.square().sum()))
    some = found.sample(50 * draws * 30)
    assert some.num_examples == 50
    assert some.shares is not None
    assert torch.equal(some.shares / some.shares[0], counts[::10].double() / counts[0])
