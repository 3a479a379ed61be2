"""Conformal Bayes: closed forms and naive loops, coverage where the model is wrong, and what is refused."""

import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.calibration import ConformalBayes, VarianceScaling
from bayesguard.calibration.conformal_bayes import compare
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Likelihood, Poisson

Array = npt.NDArray[Any]


class LinearDraws(bg.Predictor):
    """A linear network under given weights, `[S, P]` or `[S, P, K]`."""

    is_reweightable = True

    def __init__(self, weights: Array, likelihood: Likelihood) -> None:
        super().__init__(nn.Linear(1, 1).double(), likelihood.double(), num_samples=len(weights))
        self.given = torch.as_tensor(weights)

    def output_chunks(
        self, *inputs: Any, num_samples: int, seed: int, offset: int = 0, **kwargs: Any
    ) -> Iterator[Tensor]:
        yield torch.tensordot(inputs[0], self.given[:num_samples], dims=([1], [1])).movedim(1, 0)

    def draw(self, seed: int) -> nn.Module:
        raise NotImplementedError

    @property
    def strategy(self) -> str:
        return "given"


def posterior(x: Array, y: Array, noise: float, prior: float) -> tuple[Array, Array]:
    """Mean and covariance of a linear model's weights in closed form."""
    covariance = np.linalg.inv(x.T @ x / noise**2 + np.eye(x.shape[1]) / prior**2)
    return covariance @ x.T @ y / noise**2, covariance


def exact_draws(x: Array, y: Array, noise: float, prior: float, count: int, random: np.random.Generator) -> Array:
    mean, covariance = posterior(x, y, noise, prior)
    found: Array = mean + random.standard_normal((count, len(mean))) @ np.linalg.cholesky(covariance).T
    return found


def linear(rows: int, features: int, random: np.random.Generator) -> tuple[Array, Array]:
    x = random.standard_normal((rows, features))
    return x, x.sum(1) + random.standard_normal(rows)


def refitted_scores(x: Array, y: Array, new: Array, answer: float, noise: float, prior: float) -> Array:
    """Log predictive densities of all n + 1 rows, the new one last, given all n + 1 of them."""
    more, answers = np.vstack([x, new]), np.append(y, answer)
    mean, covariance = posterior(more, answers, noise, prior)
    variance = noise**2 + ((more @ covariance) * more).sum(1)
    found: Array = -0.5 * ((answers - more @ mean) ** 2 / variance + np.log(2 * math.pi * variance))
    return found


def gaussian_log(y: Array, centre: Array, noise: float) -> Array:
    found: Array = -0.5 * ((y - centre) / noise) ** 2 - math.log(noise * math.sqrt(2 * math.pi))
    return found


def naive(rows: Array, candidate: Array) -> tuple[int, int, float]:
    """Eqs. 3 and 4 of the paper for one candidate: log-likelihoods `[S, n]` and `[S]`, one number at a time."""
    top = max(candidate)
    weights = [math.exp(value - top) for value in candidate]
    logs = [value - top - math.log(sum(weights)) for value in candidate]

    def mean(values: Array) -> float:
        terms = [log + float(value) for log, value in zip(logs, values, strict=True)]
        largest = max(terms)
        return largest + math.log(sum(math.exp(term - largest) for term in terms))

    own, of_rows = mean(candidate), [mean(values) for values in rows.T]
    return (
        sum(value <= own for value in of_rows),
        sum(value <= top for value in of_rows),
        sum(weights) ** 2 / sum(weight**2 for weight in weights),
    )


def test_against_refits_in_closed_form() -> None:
    """Every rank lies between those of the exact densities moved by five standard errors of these draws."""
    noise, prior, random = 1.0, 2.0, np.random.default_rng(0)
    x, y = linear(30, 3, random)
    new, grid = random.standard_normal((4, 3)), np.linspace(-6, 6, 121)
    weights = exact_draws(x, y, noise, prior, 20_000, random)
    predictor = LinearDraws(weights, Gaussian(noise))
    conformal = ConformalBayes(predictor, (torch.as_tensor(x), torch.as_tensor(y)), grid=grid)
    found: Any = conformal(torch.as_tensor(new))
    density = np.exp(gaussian_log(y, weights @ x.T, noise))  # [S, n]
    equal, off, twin_off = [], 0, 0
    for row in range(4):
        at_new = np.exp(gaussian_log(grid, (weights @ new[row])[:, None], noise))  # [S, G]
        share = at_new / at_new.sum(0)
        least, most = [], []
        for column, answer in enumerate(grid):
            scores = refitted_scores(x, y, new[row], answer, noise, prior)
            both = np.column_stack([density, at_new[:, column]])
            error = np.sqrt((share[:, column, None] ** 2 * (both / (share[:, column] @ both) - 1) ** 2).sum(0))
            margin = 5 * (error[:-1] + error[-1])
            least.append((scores[:-1] + margin <= scores[-1]).sum())
            most.append((scores[:-1] - margin <= scores[-1]).sum())
        trusted = found.rows["effective_draws"][row].numpy() > 1000
        rank = found.rows["stranger"][row].numpy()
        off += ((rank < least) | (rank > most))[trusted].sum()
        equal.append((np.array(least) == np.array(most))[trusted].mean())
        twin = (density.mean(0)[:, None] <= at_new.mean(0)).sum(0)  # the added row is forgotten
        twin_off += ((twin < least) | (twin > most))[trusted].sum()
        lower, upper = (float(end[row]) for end in found.interval(0.2))
        inside = grid[
            [
                (refitted_scores(x, y, new[row], a, noise, prior) <= z).sum() > 0.2 * 31
                for a, z in zip(grid, [refitted_scores(x, y, new[row], a, noise, prior)[-1] for a in grid], strict=True)
            ]
        ]
        assert abs(lower - (inside.min() - 0.1)) < 0.1 + 1e-9
        assert abs(upper - (inside.max() + 0.1)) < 0.1 + 1e-9
    assert off == 0
    assert np.mean(equal) > 0.5
    assert twin_off > 20


@pytest.mark.parametrize("kind", ["numbers", "classes", "yes and no"])
def test_against_a_naive_loop(kind: str) -> None:
    random = np.random.default_rng(1)
    x, new = torch.as_tensor(random.standard_normal((12, 2))), torch.as_tensor(random.standard_normal((5, 2)))
    likelihood: Likelihood
    if kind == "numbers":
        weights, y, likelihood = (
            random.standard_normal((7, 2)),
            torch.as_tensor(random.standard_normal(12)),
            Gaussian(0.7),
        )
    elif kind == "classes":
        weights, y, likelihood = random.standard_normal((7, 2, 4)), torch.arange(12) % 4, Categorical()
    else:
        weights, y, likelihood = random.standard_normal((7, 2, 1)), (torch.arange(12) % 2)[:, None], Bernoulli()
    predictor = LinearDraws(weights, likelihood)
    conformal = ConformalBayes(predictor, (x, y), grid=torch.linspace(-9, 9, 31) if kind == "numbers" else None)
    found: Any = conformal(new)
    outputs = predictor.draw_outputs(x)
    rows = torch.stack([likelihood.log_prob(each, y) for each in outputs]).reshape(7, 12).numpy()
    at_new = predictor.draw_outputs(new)
    for row in range(5):
        for column, answer in enumerate(conformal.candidates):
            target = answer.reshape(y[:1].shape)
            own = torch.stack([likelihood.log_prob(each[row : row + 1], target) for each in at_new]).reshape(7).numpy()
            stranger, at_best, effective = naive(rows, own)
            assert found.rows["stranger"][row, column] == stranger
            assert found.rows["at_best"][row, column] == at_best
            assert found.rows["effective_draws"][row, column].item() == pytest.approx(effective, rel=1e-10)


def test_a_row_that_is_added_again_ties_with_itself() -> None:
    rows = np.random.default_rng(3).normal(-1, 0.5, (200, 60))
    found = compare(torch.as_tensor(rows), torch.as_tensor(rows), torch.full((200,), 1 / 200))[0]
    shares = np.exp(rows) / np.exp(rows).sum(0)
    scores = np.exp(rows).T @ shares  # of row i under the weights of row c
    below = (scores < scores.diagonal()) & ~np.eye(60, dtype=bool)
    assert found.tolist() == (below.sum(0) + 1).tolist()


def test_densities_that_underflow() -> None:
    random = np.random.default_rng(2)
    rows, own = random.normal(-3000, 2000, (6, 8)), random.normal(-3000, 1000, (6, 5))
    for uniform in (own, np.full((6, 5), -2000.0)):
        found = compare(torch.as_tensor(rows), torch.as_tensor(uniform), torch.full((6,), 1 / 6))
        for column in range(5):
            stranger, at_best, effective = naive(rows, uniform[:, column])
            assert found[0][column] == stranger
            assert found[1][column] == at_best
            assert found[2][column].item() == pytest.approx(effective)
    never = compare(torch.as_tensor(rows), torch.full((6, 1), -torch.inf).double(), torch.full((6,), 1 / 6))
    assert [value.item() for value in never] == [0, 0, pytest.approx(6)]


@pytest.mark.parametrize(("count", "trials"), [(20, 1200), (100, 600)])
def test_coverage_where_prior_and_noise_are_wrong(count: int, trials: int) -> None:
    """The noise is said to be 0.6 and is 1, weights are said to be near 0 and are 1."""
    alpha, noise, prior, answers, random = 0.2, 0.6, 0.5, 20, np.random.default_rng(count)
    features, draws = 4, 1000
    least = math.floor(round(alpha * (count + 1), 9))
    covered, credible, forgetful = np.zeros(trials), np.zeros(trials), np.zeros(trials)
    for trial in range(trials):
        x, y = linear(count + answers, features, random)
        x, new, y, answer = x[:count], x[count:], y[:count], y[count:]
        weights = exact_draws(x, y, noise, prior, draws, random)
        rows, at_new = gaussian_log(y, weights @ x.T, noise), gaussian_log(answer, weights @ new.T, noise)
        equal = torch.full((draws,), 1 / draws)
        covered[trial] = (compare(torch.as_tensor(rows), torch.as_tensor(at_new), equal)[0] >= least).double().mean()
        mean, covariance = posterior(x, y, noise, prior)
        sd = np.sqrt(noise**2 + ((new @ covariance) * new).sum(1))
        credible[trial] = (np.abs(answer - new @ mean) <= 1.2815515655446004 * sd).mean()
        scores = np.exp(rows).mean(0)[:, None] <= np.exp(at_new).mean(0)
        forgetful[trial] = (scores.sum(0) >= least).mean()

    def error(values: Array) -> float:
        return float(5 * values.std() / math.sqrt(trials))

    exact = 1 - least / (count + 1)  # of scores without ties, between 1 - alpha and 1 / (n + 1) above
    assert abs(covered.mean() - exact) < error(covered)
    assert credible.mean() < 1 - alpha - error(credible)
    if count == 20:  # with a hundred rows one more changes little
        assert forgetful.mean() < 1 - alpha - error(forgetful)


@pytest.fixture(scope="module")
def of_numbers() -> tuple[LinearDraws, Tensor, Tensor, Tensor]:
    random = np.random.default_rng(5)
    x, y = linear(40, 2, random)
    predictor = LinearDraws(exact_draws(x, y, 1.0, 1.0, 2000, random)[..., None], Gaussian(1.0))
    return predictor, torch.as_tensor(x), torch.as_tensor(y)[:, None], torch.as_tensor(random.standard_normal((6, 2)))


def test_the_order_of_rows_changes_nothing(of_numbers: tuple[LinearDraws, Tensor, Tensor, Tensor]) -> None:
    predictor, x, y, new = of_numbers
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    one, other = ConformalBayes(predictor, (x, y)), ConformalBayes(predictor, (x[order], y[order]))
    assert torch.equal(one.p_values(new), other.p_values(new))


def test_what_a_call_returns(of_numbers: tuple[LinearDraws, Tensor, Tensor, Tensor]) -> None:
    predictor, x, y, new = of_numbers
    conformal = ConformalBayes(predictor, (x, y), alpha=0.2)
    pred: Any = conformal(new)
    assert torch.allclose(pred.mean, predictor(new).mean)
    lower, upper = pred.interval()
    assert lower.shape == (6, 1)
    inside = conformal.p_values(new) > 0.2
    step = conformal.candidates[1] - conformal.candidates[0]
    for row in range(6):
        held = conformal.candidates[inside[row]]
        assert torch.allclose(lower[row], held[0] - step)
        assert torch.allclose(upper[row], held[-1] + step)
    narrow, wide = pred.interval(0.5), pred.interval(0.05)
    assert bool((wide[0] < narrow[0]).all() & (wide[1] > narrow[1]).all())
    assert torch.equal(pred[2:4].interval()[0], lower[2:4])
    assert torch.equal(pickle.loads(pickle.dumps(pred)).interval()[0], lower)
    assert conformal(new[:0]).interval()[0].shape == (0, 1)
    assert "2000 draws, 40 rows" in repr(conformal)


def test_ends_that_are_not_known(of_numbers: tuple[LinearDraws, Tensor, Tensor, Tensor]) -> None:
    predictor, x, y, new = of_numbers
    with pytest.warns(CalibrationWarning, match="6 of 6 rows reach an end of the grid, -0.1 to 0.1"):
        lower, upper = ConformalBayes(predictor, (x, y), grid=[-0.1, 0.0, 0.1])(torch.zeros(6, 2).double()).interval()
    assert bool(lower.isinf().all() & upper.isinf().all())
    with pytest.warns(CalibrationWarning, match="40 held-out examples are too few for alpha=0.01"):
        lower, upper = ConformalBayes(predictor, (x, y))(new).interval(0.01)
    assert bool(lower.isinf().all() & upper.isinf().all())
    # Every answer is stranger than the rows: the least strange one and its neighbours stand for the empty set.
    lower, upper = ConformalBayes(predictor, (x, y), grid=torch.linspace(-5, 5, 101))(new).interval(0.99)
    assert bool((lower < upper).all() & (upper - lower < 0.5).all())


def test_few_draws_are_refused_or_warned_of(of_numbers: tuple[LinearDraws, Tensor, Tensor, Tensor]) -> None:
    predictor, x, y, new = of_numbers
    pred: Any = ConformalBayes(predictor, (x, y), num_samples=8)(new)
    with pytest.raises(BadInput, match=r"6 of 6 rows, the first of them 0, .* draws, too few for a density"):
        pred.interval()
    with pytest.warns(CalibrationWarning, match="weights worth fewer than 50 draws may decide"):
        ConformalBayes(predictor, (x, y), num_samples=50)(new).interval()


def given(rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 2, generator=generator), torch.randn(rows, 1, generator=generator)


def draws(likelihood: Likelihood, outputs: int = 1) -> LinearDraws:
    return LinearDraws(np.random.default_rng(0).standard_normal((50, 2, outputs)), likelihood)


def calibrated() -> bg.Predictor:
    predictor = draws(Gaussian(1.0))
    x, y = given(60)
    return predictor.calibrate((x.double(), y), VarianceScaling())


def dropout() -> bg.Predictor:
    return bg.MCDropout(nn.Sequential(nn.Linear(2, 8), nn.Dropout(), nn.Linear(8, 1)), Gaussian(1.0))


@pytest.mark.parametrize(
    ("predictor", "settings", "error", "message"),
    [
        (
            lambda: bg.DeepEnsemble(lambda seed: nn.Linear(2, 1), Gaussian(1.0)),
            {},
            BadType,
            "not draws from a posterior",
        ),
        (lambda: bg.Deterministic(nn.Linear(2, 1), Gaussian(1.0)), {}, BadType, "Deterministic are not draws"),
        (dropout, {}, BadType, "MCDropout are not draws"),
        (lambda: bg.Variational(nn.Linear(2, 1), Gaussian(1.0), guide="delta"), {}, BadInput, "posterior is a point"),
        (calibrated, {}, BadInput, "forget_calibration"),
        (lambda: draws(Poisson()), {}, BadType, "CountPredictive"),
        (lambda: LinearDraws(np.ones((4, 2, 1)), Gaussian(1.0)), {}, BadInput, "4 draws are all the same function"),
        (lambda: draws(Gaussian(1.0), 3), {"y": torch.zeros(12, 3)}, BadInput, "several an example"),
        (lambda: draws(Categorical(), 3), {"y": torch.arange(12) % 3, "grid": [0.0, 1.0]}, BadInput, "is for numbers"),
        (lambda: draws(Categorical(), 3), {"y": torch.arange(12)}, BadInput, "label 3 in row 3"),
        (lambda: draws(Gaussian(1.0)), {"y": torch.zeros(12)}, BadInput, "targets has shape"),
        (lambda: draws(Gaussian(1.0)), {"y": torch.full((12, 1), torch.nan)}, BadInput, "targets has NaN"),
        (lambda: draws(Gaussian(1.0)), {"y": torch.zeros(12, 1)}, BadInput, "all targets are the same"),
        (lambda: draws(Gaussian(1.0)), {"grid": [1.0, 0.0]}, BadInput, "ascending order"),
        (lambda: draws(Gaussian(1.0)), {"grid": [0.0, math.inf]}, BadInput, "finite numbers in ascending order"),
        (lambda: draws(Gaussian(1.0)), {"alpha": 1.0}, BadInput, "alpha must be"),
        (lambda: draws(Bernoulli()), {"y": torch.full((12, 1), 0.5)}, BadInput, "other than 0 and 1 in row 0"),
    ],
)
def test_what_is_refused(predictor: Any, settings: dict[str, Any], error: Any, message: str) -> None:
    made = predictor()
    x, y = given()
    x = x.double() if isinstance(made, LinearDraws) else x
    with pytest.raises(error, match=message):
        ConformalBayes(made, (x, settings.pop("y", y)), **settings)


def test_predictors_of_this_package() -> None:
    x, y = given(30)
    for likelihood, outputs, targets in ((Gaussian(1.0), 1, y), (HeteroscedasticGaussian(), 2, y[:, 0])):
        predictor = bg.Variational(nn.Linear(2, outputs), likelihood, num_samples=500)
        conformal = ConformalBayes(predictor, (x, targets), grid=torch.linspace(-20, 20, 81))
        lower, upper = conformal(x[:3]).interval(0.2)
        assert lower.shape == targets[:3].shape
        assert bool((lower < upper).all())
