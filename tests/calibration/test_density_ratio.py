"""Density ratios: two Gaussians of one covariance, whose ratio is exp-linear and known."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.calibration import ConformalInterval, density_ratio
from bayesguard.errors import BadInput, BadType

ROWS = 4000
MOVED = torch.tensor([0.7, -0.4, 0.0], dtype=torch.float64)


def gaussian(rows: int, seed: int, mean: Tensor = MOVED * 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.randn(rows, len(mean), dtype=torch.float64, generator=generator)


def exact_log_ratio(x: Tensor) -> Tensor:
    return x @ MOVED - MOVED.square().sum() / 2


def covariance_of_the_estimate() -> Tensor:
    """Inverse Fisher information of the logistic regression (offset, slope) on as many rows of each."""
    x = torch.cat([gaussian(200_000, 8), gaussian(200_000, 9, MOVED)])
    x = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x], dim=1)
    sure = torch.sigmoid(exact_log_ratio(x[:, 1:]))
    information = (x * (sure * (1 - sure)).unsqueeze(1)).T @ x / len(x)
    return torch.linalg.inv(information) / (2 * ROWS)


@pytest.fixture(scope="module")
def gaussians() -> tuple[Tensor, Tensor, Any]:
    source, target = gaussian(ROWS, 0), gaussian(ROWS, 1, MOVED)
    return source, target, density_ratio(source, target)


def fits(ratio: Any) -> bool:
    """Whether log ratios at new rows are within five standard errors of the truth, on average over them."""
    x = gaussian(2000, 3, MOVED / 2)
    design = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), x], dim=1)
    expected = ((design @ covariance_of_the_estimate()) * design).sum(-1).mean().sqrt()
    error = (ratio(x).log() - exact_log_ratio(x)).square().mean().sqrt()
    return bool(error < 5 * expected)


def test_the_ratio_of_two_gaussians(gaussians: Any) -> None:
    source, target, ratio = gaussians
    assert fits(ratio)
    assert not fits(density_ratio(target, source))  # the wrong way round
    assert not fits(lambda x: ratio(x).sqrt())  # odds that are not honest
    assert ratio.weights.mean() == pytest.approx(1, abs=1e-12)
    for weights, x in ((ratio.weights, source), (ratio.target_weights, target)):
        assert np.corrcoef(weights, exact_log_ratio(x).exp())[0, 1] > 0.99


def test_effective_size_is_that_of_the_chi_square(gaussians: Any) -> None:
    """E r^2 = exp(|m|^2) for a shift by m, so that rows are worth exp(-|m|^2) of their number."""
    square = float(MOVED.square().sum())
    true = torch.stack([exact_log_ratio(gaussian(ROWS, seed)).exp() for seed in range(100, 300)])
    sizes = true.sum(1).square() / true.square().sum(1)
    by_chance = float((sizes / ROWS).log().std())
    of_the_slope = 2 * float((MOVED @ covariance_of_the_estimate()[1:, 1:] @ MOVED).sqrt())
    tolerance = 5 * (by_chance**2 + of_the_slope**2) ** 0.5
    assert tolerance < 0.5  # log(1 / exp(-0.65)) is more: equal weights would fail
    assert abs(np.log(gaussians[2].effective_size / ROWS) + square) < tolerance
    assert abs(np.log(1.0) + square) > tolerance


def test_area_under_the_curve_is_exact(gaussians: Any) -> None:
    distance = float(MOVED.norm())
    exact = 0.5 * (1 + torch.erf(torch.tensor(distance / 2)).item())
    assert gaussians[2].auc == pytest.approx(exact, abs=5 * (0.25 / ROWS) ** 0.5)


def test_no_row_is_weighted_by_a_classifier_that_saw_it() -> None:
    """Many features and nothing to find: what saw the rows tells them apart, and its weights are of chance."""
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 150, 100, generator=generator, dtype=torch.float64)
    ratio = density_ratio(source, target)
    assert ratio.effective_size > 0.9 * 150
    x, labels = torch.cat([source, target]).numpy(), np.arange(300) >= 150
    seen = np.exp(LogisticRegression().fit(x, labels).decision_function(x[:150]))
    assert seen.sum() ** 2 / np.square(seen).sum() < 0.5 * 150


def test_standardised_features_seeds_and_clipping(gaussians: Any) -> None:
    source, target, ratio = gaussians
    units = torch.tensor([1e-3, 1e3, 1.0], dtype=torch.float64)
    moved = density_ratio(source * units + 5, target * units + 5)
    torch.testing.assert_close(moved.weights, ratio.weights, rtol=1e-4, atol=1e-6)
    assert torch.equal(density_ratio(source, target).weights, ratio.weights)
    assert not torch.equal(density_ratio(source, target, seed=1).weights, ratio.weights)
    clipped = density_ratio(source, target, clip=0.9)
    assert clipped.num_clipped == ROWS // 10
    assert clipped.effective_size > ratio.effective_size
    assert clipped.weights.mean() == pytest.approx(1, abs=1e-12)
    assert clipped(target).max() == pytest.approx(float(clipped.weights.max()), rel=1e-12)
    constant = torch.cat([source, torch.ones(ROWS, 1)], dim=1)
    torch.testing.assert_close(
        density_ratio(constant, torch.cat([target, torch.ones(ROWS, 1)], dim=1)).weights, ratio.weights
    )


def wrong_at_the_edge(x: Tensor, seed: int) -> tuple[Any, Tensor]:
    """Answers whose spread grows with x, under a predictive that says 1 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(x), dtype=torch.float64, generator=generator)
    return bg.Predictive.from_normal(torch.zeros(len(x), dtype=torch.float64), 1.0), (0.7 * x[:, 0]).exp() * noise


def test_weighted_intervals_cover_where_the_inputs_have_moved(gaussians: Any) -> None:
    source, _, ratio = gaussians
    pred, answers = wrong_at_the_edge(source, 5)
    new = gaussian(10_000, 6, MOVED)
    wanted, truth = wrong_at_the_edge(new, 7)

    def coverage(fitted: Any, **more: Any) -> float:
        lower, upper = fitted(wanted, **more).interval()
        return float(((lower <= truth) & (truth <= upper)).double().mean())

    weighted = coverage(ConformalInterval("absolute").fit(pred, answers, weights=ratio.weights), weights=ratio(new))
    plain = coverage(ConformalInterval("absolute").fit(pred, answers))
    # Of the held-out rows, of the new ones, and of the slope: a unit of it moves coverage by the covariance of
    # covering and x under the target, (its inputs have spread 1) at most 0.3 = sqrt(0.1 * 0.9).
    of_slope = 0.3 * float(covariance_of_the_estimate()[1:, 1:].diagonal().sum().sqrt())
    tolerance = 5 * (0.09 / ratio.effective_size + 0.09 / len(new) + of_slope**2) ** 0.5
    assert abs(weighted - 0.9) < tolerance
    assert abs(plain - 0.9) > tolerance


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: density_ratio(torch.rand(60), torch.rand(60)),
            BadInput,
            r"source_features must be \[rows, features\]",
        ),
        (lambda: density_ratio(torch.rand(60, 2), torch.rand(60, 3)), BadInput, "target_features has shape"),
        (lambda: density_ratio(torch.rand(60, 2), torch.rand(49, 2)), BadInput, "target_features has 49 rows"),
        (lambda: density_ratio(torch.full((60, 2), torch.nan), torch.rand(60, 2)), BadInput, "NaN"),
        (lambda: density_ratio(torch.rand(60, 2), torch.rand(60, 2), clip=1.0), BadInput, "clip must be"),
        (lambda: density_ratio(gaussian(500, 0), gaussian(500, 1) + 6), BadInput, "too few to stand for the target"),
        (lambda: density_ratio(gaussian(500, 0), gaussian(500, 1) + 6, clip=0.9), BadInput, "than any source row"),
        (lambda: density_ratio(gaussian(500, 0), gaussian(500, 1) + 2), BadInput, "too few to stand for the target"),
        (lambda: density_ratio("rows", torch.rand(60, 2)), BadType, "source_features must be"),
        (
            lambda: density_ratio(gaussian(60, 0), gaussian(60, 1))(torch.rand(3, 2)),
            BadInput,
            "features has shape",
        ),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
