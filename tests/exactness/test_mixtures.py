"""Mixtures against brute force in float64 loops, SciPy, and numbers worked out by hand."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import integrate, optimize, special, stats
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Laplace,
    MixtureSameFamily,
    Normal,
    Poisson,
    StudentT,
)

from bayesguard.predictive import (
    BernoulliPredictive,
    CategoricalPredictive,
    ContinuousPredictive,
    CountPredictive,
    Predictive,
    mixture,
)

Array = npt.NDArray[np.float64]
DRAWS, EXAMPLES = 4, 3
# A twin that is wrong on purpose: the same statistic must see it.
WRONG = pytest.param(True, marks=pytest.mark.xfail(strict=True, raises=AssertionError))
WEIGHTS = [0.1, 0.4, 0.3, 0.2]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


LOC = 2 * randn(DRAWS, EXAMPLES, seed=0)
SCALE = randn(DRAWS, EXAMPLES, seed=1).exp()
TARGET = 2 * randn(EXAMPLES, seed=2)
DF = torch.tensor(3.5, dtype=torch.float64)


def reference(family: str, method: str, s: int, n: int) -> Callable[[float], float]:
    """Density or cdf of one component, from SciPy's special functions and the textbook."""
    loc, scale, df = float(LOC[s, n]), float(SCALE[s, n]), float(DF)
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    standard: dict[tuple[str, str], Callable[[float], float]] = {
        ("normal", "cdf"): special.ndtr,
        ("normal", "pdf"): lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi),
        ("laplace", "cdf"): lambda z: math.exp(z) / 2 if z < 0 else 1 - math.exp(-z) / 2,
        ("laplace", "pdf"): lambda z: math.exp(-abs(z)) / 2,
        ("student", "cdf"): lambda z: float(special.stdtr(df, z)),
        ("student", "pdf"): lambda z: constant * (1 + z * z / df) ** (-(df + 1) / 2),
    }
    function, unit = standard[family, method], scale if method == "pdf" else 1.0
    return lambda x: function((x - loc) / scale) / unit


def component(family: str) -> Distribution:
    if family == "normal":
        return Normal(LOC, SCALE)
    if family == "laplace":
        return Laplace(LOC, SCALE)
    return StudentT(DF, LOC, SCALE)


def summed(family: str, n: int, method: str) -> Callable[[float], float]:
    """The mixture's pdf or cdf as a loop over its components."""
    parts = [reference(family, method, s, n) for s in range(DRAWS)]
    return lambda x: sum(w * part(x) for w, part in zip(WEIGHTS, parts, strict=True))


FAMILIES = ["normal", "laplace", "student"]


@pytest.mark.parametrize("family", FAMILIES)
def test_density_and_cdf(family: str) -> None:
    pred = ContinuousPredictive(component(family), WEIGHTS)
    density = [math.log(summed(family, n, "pdf")(float(TARGET[n]))) for n in range(EXAMPLES)]
    below = [summed(family, n, "cdf")(float(TARGET[n])) for n in range(EXAMPLES)]
    np.testing.assert_allclose(pred.log_prob(TARGET), density, rtol=1e-12)
    np.testing.assert_allclose(pred.cdf(TARGET), below, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", [1e-6, 0.025, 0.5, 0.9, 0.999])
def test_quantile(family: str, level: float) -> None:
    pred = ContinuousPredictive(component(family), WEIGHTS)
    found = pred.icdf(level)
    for n in range(EXAMPLES):
        below = summed(family, n, "cdf")
        exact = optimize.brentq(lambda x, below=below: below(x) - level, -1e4, 1e4, xtol=1e-13, rtol=1e-14)
        assert float(found[n]) == pytest.approx(exact, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_crps_is_the_integral_of_squared_cdf_differences(family: str) -> None:
    pred = ContinuousPredictive(component(family), WEIGHTS)
    for n in range(EXAMPLES):
        y, below = float(TARGET[n]), summed(family, n, "cdf")
        cuts = sorted(float(x) for x in LOC[:, n])

        def squared(x: float, y: float = y, below: Callable[[float], float] = below) -> float:
            return (below(x) - (x >= y)) ** 2

        left, right = brute_integral(squared, -2e3, y, cuts), brute_integral(squared, y, 2e3, cuts)
        assert float(pred.crps(TARGET)[n]) == pytest.approx(left + right, rel=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_entropy_is_minus_the_integral_of_density_times_its_log(family: str) -> None:
    pred = ContinuousPredictive(component(family), WEIGHTS)
    for n in range(EXAMPLES):
        density = summed(family, n, "pdf")

        def integrand(x: float, density: Callable[[float], float] = density) -> float:
            return -density(x) * math.log(density(x)) if density(x) > 0 else 0.0

        exact = brute_integral(integrand, -3e4, 3e4, sorted(float(x) for x in LOC[:, n]))
        assert float(pred.entropy()[n]) == pytest.approx(exact, rel=1e-6)


def brute_integral(function: Callable[[float], float], lower: float, upper: float, cuts: list[float]) -> float:
    edges = [lower, *(x for x in (-300.0, -30.0, *cuts, 30.0, 300.0) if lower < x < upper), upper]
    parts = itertools.pairwise(edges)
    return float(sum(integrate.quad(function, a, b, epsabs=1e-12, epsrel=1e-10, limit=200)[0] for a, b in parts))


def test_gaussian_closed_form_against_quadrature_of_the_library() -> None:
    from bayesguard.predictive.quadrature import quadrature_crps, quadrature_entropy

    pred = ContinuousPredictive(Normal(LOC, SCALE), WEIGHTS)
    by_quadrature = quadrature_crps(pred.component, pred.weights, TARGET)
    torch.testing.assert_close(pred.crps(TARGET), by_quadrature, rtol=1e-8, atol=1e-8)
    one = ContinuousPredictive(StudentT(DF, LOC[:1], SCALE[:1]))
    torch.testing.assert_close(quadrature_entropy(one.component, one.weights), one.entropy(), rtol=1e-7, atol=1e-7)


def test_crps_of_one_gaussian() -> None:
    """Gneiting and Raftery 2007, equation 21: a standard Gaussian at its mean scores (sqrt 2 - 1) / sqrt pi."""
    score = Predictive.from_normal(torch.zeros(1, dtype=torch.float64), 1.0).crps([0.0])
    assert float(score[0]) == pytest.approx((math.sqrt(2) - 1) / math.sqrt(math.pi), rel=1e-14)


def test_mixture_density_members_are_flattened() -> None:
    """S draws of M Gaussians are one mixture of S M Gaussians."""
    members, outputs = 3, randn(DRAWS, EXAMPLES, 9, seed=3)
    logits, loc, scale = outputs[..., :3], 2 * outputs[..., 3:6], outputs[..., 6:].exp()
    pred = ContinuousPredictive(MixtureSameFamily(Categorical(logits=logits), Normal(loc, scale)), WEIGHTS)
    share = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None] * logits.softmax(-1)
    for n in range(EXAMPLES):
        flat = ContinuousPredictive(
            Normal(loc[:, n].reshape(-1, 1), scale[:, n].reshape(-1, 1)), share[:, n].reshape(DRAWS * members)
        )
        y = TARGET[n : n + 1]
        for method in ("log_prob", "cdf", "crps"):
            torch.testing.assert_close(getattr(pred, method)(TARGET)[n : n + 1], getattr(flat, method)(y))
        torch.testing.assert_close(pred.icdf(0.3)[n : n + 1], flat.icdf(0.3))
        torch.testing.assert_close(pred.entropy()[n : n + 1], flat.entropy(), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(pred.variance[n : n + 1], flat.variance)


def test_ensemble_mean_and_variance_by_hand() -> None:
    """Three members N(1, 1), N(2, 4), N(6, 9): mean 3; variance 14/3 inside and (4 + 1 + 9) / 3 between."""
    members = [Predictive.from_normal([mean], [scale]) for mean, scale in ((1.0, 1.0), (2.0, 2.0), (6.0, 3.0))]
    pred = mixture(members)
    total, aleatoric, epistemic = pred.uncertainty()
    assert pred.mean.tolist() == [3.0]
    torch.testing.assert_close(aleatoric, torch.tensor([14 / 3]))
    torch.testing.assert_close(epistemic, torch.tensor([14 / 3]))
    torch.testing.assert_close(total, torch.tensor([28 / 3]))
    torch.testing.assert_close(pred.standard_error, torch.tensor([math.sqrt(7.0 / 3)]))  # unbiased variance 7, S = 3


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_class_probabilities_and_mutual_information(weights: list[float] | None) -> None:
    logits = 3 * randn(DRAWS, EXAMPLES, 5, seed=4)
    pred = CategoricalPredictive(logits, weights)
    share = weights or [1 / DRAWS] * DRAWS
    for n in range(EXAMPLES):
        rows = [[math.exp(x) for x in row] for row in logits[:, n].tolist()]
        probs = [[x / sum(row) for x in row] for row in rows]
        pooled = [sum(w * row[k] for w, row in zip(share, probs, strict=True)) for k in range(5)]
        total = -sum(p * math.log(p) for p in pooled)
        expected = sum(w * -sum(p * math.log(p) for p in row) for w, row in zip(share, probs, strict=True))
        found = pred.uncertainty()
        np.testing.assert_allclose(pred.probs[n], pooled, rtol=1e-12)
        np.testing.assert_allclose([float(part[n]) for part in found], [total, expected, total - expected], rtol=1e-10)
        between = [sum(w * (row[k] - pooled[k]) ** 2 for w, row in zip(share, probs, strict=True)) for k in range(5)]
        spent = sum(w * w for w in share)
        np.testing.assert_allclose(
            pred.standard_error[n], [math.sqrt(v / (1 - spent) * spent) for v in between], rtol=1e-10
        )


def test_yes_or_no_is_two_classes() -> None:
    odds = 3 * randn(DRAWS, EXAMPLES, seed=5)
    binary = BernoulliPredictive(odds, WEIGHTS)
    classes = CategoricalPredictive(torch.stack([torch.zeros_like(odds), odds], -1), WEIGHTS)
    torch.testing.assert_close(binary.probs, classes.probs[:, 1])
    torch.testing.assert_close(torch.stack(binary.uncertainty()), torch.stack(classes.uncertainty()))
    torch.testing.assert_close(binary.standard_error, classes.standard_error[:, 1])
    torch.testing.assert_close(binary.log_prob([1, 0, 1]), classes.log_prob([1, 0, 1]))
    assert torch.equal(binary.prediction_set(0.1), classes.prediction_set(0.1))


def test_counts() -> None:
    rate = torch.tensor([[0.5, 3.0, 40.0], [2.0, 3.5, 70.0]], dtype=torch.float64)
    pred, y = CountPredictive(Poisson(rate), [0.25, 0.75]), torch.tensor([1.0, 5.0, 55.0], dtype=torch.float64)
    support = np.arange(400)
    for n in range(3):
        mass: Array = 0.25 * stats.poisson.pmf(support, rate[0, n]) + 0.75 * stats.poisson.pmf(support, rate[1, n])
        below = mass.cumsum()
        observed = int(y[n])
        assert float(pred.log_prob(y)[n]) == pytest.approx(math.log(mass[observed]), rel=1e-12)
        assert float(pred.cdf(y)[n]) == pytest.approx(below[observed], rel=1e-9)
        assert float(pred.crps(y)[n]) == pytest.approx(((below - (support >= observed)) ** 2).sum(), rel=1e-9)
        positive = mass[mass > 0]
        assert float(pred.entropy()[n]) == pytest.approx(-(positive * np.log(positive)).sum(), rel=1e-9)
        for q in (0.01, 0.5, 0.99):
            assert int(pred.icdf(q)[n]) == int(np.searchsorted(below, q))
        mean = (mass * support).sum()
        assert float(pred.variance[n]) == pytest.approx((mass * (support - mean) ** 2).sum(), rel=1e-9)


def samples_of_mixture(pred: ContinuousPredictive, averaged: bool) -> Array:
    """100,000 samples; `averaged` is the wrong way, one Gaussian with the mean of the parameters."""
    normal = pred.component
    assert isinstance(normal, Normal)
    if averaged:
        pred = ContinuousPredictive(Normal(normal.loc.mean(0, keepdim=True), normal.scale.mean(0, keepdim=True)))
    drawn: Array = pred.sample((100_000,), seed=0)[:, 0].numpy()
    return drawn


@pytest.mark.parametrize("averaged", [False, WRONG])
def test_samples_have_the_moments_of_the_mixture(averaged: bool) -> None:
    """Mean and variance within five of their standard errors; the twin averages parameters and must fail."""
    loc, scale = torch.tensor([[-2.0], [3.0]]).double(), torch.tensor([[1.0], [0.5]]).double()
    pred = ContinuousPredictive(Normal(loc, scale))
    drawn = samples_of_mixture(pred, averaged)
    deviations = (drawn - float(pred.mean)) ** 2
    assert abs(drawn.mean() - float(pred.mean)) < 5 * drawn.std() / math.sqrt(len(drawn))
    assert abs(deviations.mean() - float(pred.variance)) < 5 * deviations.std() / math.sqrt(len(drawn))


@pytest.mark.parametrize("biased", [False, WRONG])
def test_fair_crps_is_unbiased_for_the_distribution_of_the_samples(biased: bool) -> None:
    """The mean over 20,000 examples is the closed form, within five standard errors; the biased estimate is not."""
    count, size = 20_000, 4
    samples = torch.randn(size, count, generator=generator(6), dtype=torch.float64)
    y = torch.full((count,), 0.3, dtype=torch.float64)
    exact = float(Predictive.from_normal(torch.zeros(1).double(), 1.0).crps(y[:1]))
    scores = Predictive.from_samples(samples).crps(y)
    if biased:
        pairs = (samples[:, None] - samples[None]).abs().mean((0, 1))
        scores = (samples - y).abs().mean(0) - pairs / 2
    assert abs(float(scores.mean()) - exact) < 5 * float(scores.std()) / math.sqrt(count)


def test_fair_crps_against_all_pairs() -> None:
    samples, y = randn(7, EXAMPLES, seed=7), TARGET
    for n in range(EXAMPLES):
        x = samples[:, n].tolist()
        near = sum(abs(a - float(y[n])) for a in x) / 7
        pairs = sum(abs(a - b) for a in x for b in x) / (7 * 6)
        assert float(Predictive.from_samples(samples).crps(y)[n]) == pytest.approx(near - pairs / 2, rel=1e-12)


def test_joint_density_sums_outputs_inside_every_draw() -> None:
    loc, scale, y = randn(DRAWS, 2, 3, seed=8), randn(DRAWS, 2, 3, seed=9).exp(), randn(2, 3, seed=10)
    pred = ContinuousPredictive(Normal(loc, scale), WEIGHTS)
    for n in range(2):
        parts = [
            w * math.prod(float(stats.norm(loc[s, n, d], scale[s, n, d]).pdf(y[n, d])) for d in range(3))
            for s, w in enumerate(WEIGHTS)
        ]
        assert float(pred.joint_log_prob(y)[n]) == pytest.approx(math.log(sum(parts)), rel=1e-12)
