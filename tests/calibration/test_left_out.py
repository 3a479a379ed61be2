"""Jackknife+, CV+ and jackknife+ after the bootstrap from arrays: brute force, and coverage beside a twin that must fail."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from bayesguard.calibration.left_out import cross_interval
from bayesguard.errors import BadInput, BadType, CalibrationWarning

ALPHA = 0.1
Array = npt.NDArray[Any]


def least_squares(x: Array, y: Array, new: Array) -> Array:
    found: Array = new @ np.linalg.lstsq(x, y, rcond=None)[0]
    return found


def brute(x: Array, y: Array, new: Array, folds: Array, alpha: float) -> tuple[Array, Array]:
    """Eq. 11 of Barber et al. (2021) line by line; with each row a fold of its own, eq. 5."""
    low, high = [], []
    for point in new:
        below, above = [], []
        for i in range(len(y)):
            others = folds != folds[i]
            residual = abs(y[i] - least_squares(x[others], y[others], x[i]))
            said = least_squares(x[others], y[others], point)
            below.append(said - residual)
            above.append(said + residual)
        # -q+(-v) of the paper, with its own rank.
        rank = math.ceil(round((1 - alpha) * (len(y) + 1), 9))
        low.append(-sorted(-value for value in below)[rank - 1])
        high.append(sorted(above)[rank - 1])
    return np.array(low), np.array(high)


@pytest.mark.parametrize("num_folds", [5, 20])
@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_against_brute_force(num_folds: int, alpha: float) -> None:
    random = np.random.default_rng(num_folds)
    x, new = random.standard_normal((20, 4)), random.standard_normal((7, 4))
    y = x.sum(1) + random.standard_normal(20)
    folds = np.arange(20) % num_folds
    fits = [np.linalg.lstsq(x[folds != fold], y[folds != fold], rcond=None)[0] for fold in range(num_folds)]
    seen = folds != np.arange(num_folds)[:, None]
    lower, upper = cross_interval(np.stack(fits) @ x.T, y, seen, np.stack(fits) @ new.T, alpha)
    low, high = brute(x, y, new, folds, alpha)
    assert np.allclose(lower.numpy(), low, atol=1e-10)
    assert np.allclose(upper.numpy(), high, atol=1e-10)


def test_after_the_bootstrap_against_brute_force() -> None:
    random = np.random.default_rng(3)
    given, new, y = random.standard_normal((8, 15)), random.standard_normal((8, 3)), random.standard_normal(15)
    seen = random.random((8, 15)) < 0.6
    seen[0] = False
    lower, upper = cross_interval(np.where(seen, np.nan, given), y, seen, new, 0.2)
    for point in range(3):
        below, above = [], []
        for i in range(15):
            out = ~seen[:, i]
            residual = abs(y[i] - given[out, i].mean())
            below.append(new[out, point].mean() - residual)
            above.append(new[out, point].mean() + residual)
        # 16 * 0.2 = 3.2 and 16 * 0.8 = 12.8
        assert lower[point].item() == pytest.approx(sorted(below)[2])
        assert upper[point].item() == pytest.approx(sorted(above)[12])


def trial(count: int, num_features: int, random: np.random.Generator) -> tuple[Array, Array, Array, float]:
    """Rows of a linear model with heavy tails, and one new one."""
    x = random.standard_normal((count + 1, num_features))
    y = x @ np.ones(num_features) + random.standard_t(4, count + 1)
    return x[:-1], y[:-1], x[-1], float(y[-1])


@pytest.mark.parametrize("count", [20, 100])
def test_coverage_of_jackknife_plus_where_training_residuals_fail(count: int) -> None:
    """Half as many features as rows: training residuals are far too small."""
    trials, random = 2000, np.random.default_rng(count)
    seen = ~torch.eye(count, dtype=torch.bool)
    covered, naive = np.zeros(trials), np.zeros(trials)
    for index in range(trials):
        x, y, new, answer = trial(count, count // 2, random)
        inverse = np.linalg.inv(x.T @ x)
        fit = inverse @ x.T @ y
        leverage = ((x @ inverse) * x).sum(1)
        residual = y - x @ fit
        without = y - residual / (1 - leverage)
        at_new = new @ fit - (x @ inverse @ new) * residual / (1 - leverage)
        lower, upper = cross_interval(np.diag(without), y, seen, at_new[:, None], ALPHA)
        covered[index] = lower.item() <= answer <= upper.item()
        naive[index] = abs(answer - new @ fit) <= np.sort(np.abs(residual))[math.ceil(0.9 * (count + 1)) - 1]
    error = 5 * math.sqrt(ALPHA * (1 - ALPHA) / trials)
    assert covered.mean() > 1 - 2 * ALPHA  # what is promised
    assert covered.mean() > 1 - ALPHA - error  # what is typical
    assert covered.mean() < 1 - ALPHA + 1 / (count + 1) + error + 0.02  # fits without a row are worse by a little
    assert naive.mean() < 1 - 2 * ALPHA - error


def test_coverage_of_cv_plus_and_after_the_bootstrap() -> None:
    trials, count, random = 600, 20, np.random.default_rng(0)
    folds = np.arange(count) % 5
    found: dict[str, list[bool]] = {"folds": [], "bootstrap": [], "naive": []}
    for _ in range(trials):
        x, y, new, answer = trial(count, 8, random)
        rows = np.stack([random.integers(count, size=count) for _ in range(30)])
        drawn = np.stack([np.bincount(own, minlength=count) for own in rows]).astype(float)
        for kind, weights in (("folds", (folds != np.arange(5)[:, None]).astype(float)), ("bootstrap", drawn)):
            # A touch of ridge, for samples with fewer different rows than features.
            gram = np.einsum("mn,np,nq->mpq", weights, x, x) + 1e-3 * np.eye(8)
            fits = np.linalg.solve(gram, np.einsum("mn,np,n->mp", weights, x, y)[..., None])[..., 0]
            lower, upper = cross_interval(fits @ x.T, y, weights > 0, (fits @ new)[:, None], ALPHA)
            found[kind].append(lower.item() <= answer <= upper.item())
        fit = least_squares(x, y, np.eye(8))
        found["naive"].append(abs(answer - new @ fit) <= np.sort(np.abs(y - x @ fit))[18])
    error = 5 * math.sqrt(ALPHA * (1 - ALPHA) / trials)
    for kind in ("folds", "bootstrap"):
        assert np.mean(found[kind]) > 1 - ALPHA - error
    assert np.mean(found["naive"]) < 1 - ALPHA - error


def test_few_rows_and_rows_that_all_saw() -> None:
    y, eye = torch.arange(8.0), torch.eye(8).bool()
    with pytest.warns(CalibrationWarning, match="8 held-out examples are too few"):
        lower, upper = cross_interval(torch.zeros(8, 8), y, ~eye, torch.zeros(8, 2), ALPHA)
    assert lower.tolist() == [-math.inf] * 2
    assert upper.tolist() == [math.inf] * 2
    seen = ~torch.eye(20).bool()
    seen[3] = True
    with pytest.warns(CalibrationWarning, match="1 of 20 rows were seen by all 20"):
        lower, upper = cross_interval(torch.zeros(20, 20), torch.arange(20.0), seen, torch.zeros(20, 1), ALPHA)
    assert upper.item() == 19  # the largest residual but the infinite one


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seen": torch.ones(3, 5).bool()}, BadInput, "no row can be scored"),
        ({"seen": torch.zeros(3, 5)}, BadInput, "seen must be bool"),
        ({"predictions": torch.zeros(3, 4)}, BadInput, "predictions has shape"),
        ({"predictions": torch.full((3, 5), torch.nan)}, BadInput, "predictions has NaN"),
        ({"targets": torch.zeros(5, 1)}, BadInput, "targets has shape"),
        ({"new": torch.zeros(2, 7)}, BadInput, "new has shape"),
        ({"new": "no"}, BadType, "must be a tensor"),
        ({"alpha": 0.0}, BadInput, "alpha must be"),
    ],
)
def test_what_is_refused(change: dict[str, Any], error: Any, message: str) -> None:
    good = {"predictions": torch.zeros(3, 5), "targets": torch.zeros(5), "new": torch.zeros(3, 7), "alpha": 0.5}
    with pytest.raises(error, match=message):
        cross_interval(**{**good, "seen": torch.zeros(3, 5).bool(), **change})
