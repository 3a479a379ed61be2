"""Scores of real predictions against SciPy and loops."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from sklearn.metrics import root_mean_squared_error
from torch import Tensor
from torch.distributions import Poisson

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M
from bayesguard.predictive import CountPredictive, Predictive


def normal_draws(rows: int) -> tuple[Tensor, Tensor]:
    """Means, and targets of unit variance about them."""
    generator = torch.Generator().manual_seed(0)
    loc = 3 * torch.randn(rows, generator=generator, dtype=torch.float64)
    return loc, loc + torch.randn(rows, generator=generator, dtype=torch.float64)


def test_rmse_against_sklearn() -> None:
    loc, y = normal_draws(60)
    assert M.root_mean_squared_error(loc, y).item() == pytest.approx(root_mean_squared_error(y, loc), rel=1e-12)
    both = M.root_mean_squared_error(loc.reshape(30, 2), y.reshape(30, 2))
    assert both.item() == pytest.approx(root_mean_squared_error(y, loc), rel=1e-12)
    far = M.root_mean_squared_error(*torch.tensor([[1e8], [1e8 + 1]], dtype=torch.float64))
    assert far.item() == 1.0


def test_crps_against_quadrature() -> None:
    loc, y = normal_draws(3)
    wanted = 0.0
    for m, target in zip(loc.tolist(), y.tolist(), strict=True):
        below, _ = integrate.quad(lambda t, m=m: stats.norm.cdf(t, m) ** 2, m - 12, target)
        above, _ = integrate.quad(lambda t, m=m: stats.norm.sf(t, m) ** 2, target, m + 12)
        wanted += (below + above) / 3
    pred = Predictive.from_normal(loc, torch.ones_like(loc))
    assert M.continuous_ranked_probability_score(pred, y).item() == pytest.approx(wanted, rel=1e-7)


def test_intervals_against_loops() -> None:
    loc, y = normal_draws(200)
    low, high = loc - 1, loc + 1.5
    rows = list(zip(low.tolist(), high.tolist(), y.tolist(), strict=True))
    assert M.interval_coverage(low, high, y).item() == pytest.approx(sum(a <= t <= b for a, b, t in rows) / 200)
    assert M.interval_width(low, high).item() == pytest.approx(2.5)
    score = sum(b - a + 20 * max(a - t, 0) + 20 * max(t - b, 0) for a, b, t in rows) / 200
    assert M.interval_score(low, high, y, alpha=0.1).item() == pytest.approx(score, rel=1e-12)


def test_intervals_are_closed_and_may_be_unbounded() -> None:
    assert M.interval_coverage([0.0, -math.inf], [1.0, math.inf], [1.0, 7.0]).item() == 1.0
    assert M.interval_width([0.0, -math.inf], [1.0, math.inf]).item() == math.inf
    assert M.interval_width([0.0, -math.inf], [1.0, math.inf], weights=[1, 0]).item() == 1.0


def test_interval_score_is_proper() -> None:
    _, y = normal_draws(20_000)
    y = (y - y.mean()) / y.std()
    z = stats.norm.ppf(0.95)
    scores = [M.interval_score(-w * torch.ones_like(y), w * torch.ones_like(y), y, alpha=0.1) for w in (1.2, z, 2.4)]
    assert scores[1] < scores[0]
    assert scores[1] < scores[2]


def test_pit_is_the_cdf() -> None:
    loc, y = normal_draws(50)
    ours = M.pit(Predictive.from_normal(loc, 2 * torch.ones_like(loc)), y)
    np.testing.assert_allclose(ours, stats.norm.cdf(y, loc, 2), atol=1e-9)
    assert ours.dtype == torch.float64


def test_pit_of_counts_is_uniform_only_because_it_is_randomised() -> None:
    rate = torch.full((4000,), 1.3, dtype=torch.float64)
    y = torch.from_numpy(np.random.default_rng(0).poisson(1.3, 4000)).double()
    pred = CountPredictive(Poisson(rate.unsqueeze(0)))
    values = M.pit(pred, y)
    # 5 standard errors of a mean of uniform variables.
    tolerance = 5 * math.sqrt(1 / 12 / 4000)
    assert abs(values.mean().item() - 0.5) < tolerance
    assert abs(pred.cdf(y).double().mean().item() - 0.5) > tolerance
    assert torch.equal(values, M.pit(pred, y))
    assert not torch.equal(values, M.pit(pred, y, seed=1))


def test_quantile_calibration_against_a_loop() -> None:
    loc, y = normal_draws(300)
    values = M.pit(Predictive.from_normal(loc, 2 * torch.ones_like(loc)), y)
    levels = [i / 20 for i in range(1, 20)]
    gaps = [abs(sum(v <= t for v in values.tolist()) / 300 - t) for t in levels]
    assert M.quantile_calibration_error(values).item() == pytest.approx(math.fsum(gaps) / 19, abs=1e-12)


def test_weights_are_repetitions() -> None:
    loc, y = normal_draws(40)
    loc, y = loc.reshape(20, 2), y.reshape(20, 2)
    weights = torch.randint(0, 4, (20,), generator=torch.Generator().manual_seed(1))
    rows = torch.arange(20).repeat_interleave(weights)
    ours = M.root_mean_squared_error(loc, y, weights=weights)
    assert ours.item() == pytest.approx(M.root_mean_squared_error(loc[rows], y[rows]).item(), rel=1e-12)
    ours = M.interval_coverage(loc - 1, loc + 1, y, weights=weights)
    assert ours.item() == pytest.approx(M.interval_coverage(loc[rows] - 1, loc[rows] + 1, y[rows]).item())
    pred = Predictive.from_normal(loc, torch.ones_like(loc))
    ours = M.continuous_ranked_probability_score(pred, y, weights=weights)
    assert ours.item() == pytest.approx(M.continuous_ranked_probability_score(pred[rows], y[rows]).item(), rel=1e-9)
    values = M.pit(pred, y)
    ours = M.quantile_calibration_error(values, weights=weights)
    assert ours.item() == pytest.approx(M.quantile_calibration_error(values[rows]).item(), abs=1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(BadInput, match="exactly"):
        M.root_mean_squared_error(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(BadInput, match=r"targets.*row 1"):
        M.root_mean_squared_error([0.0, 0.0], [0.0, math.nan])
    with pytest.raises(BadInput, match="NaN"):
        M.interval_coverage([math.nan], [1.0], [0.0])
    with pytest.raises(BadInput, match="below lower in element 1"):
        M.interval_width([0.0, 1.0], [1.0, 0.0])
    with pytest.raises(BadInput, match="at least one row"):
        M.root_mean_squared_error([], [])
    with pytest.raises(BadInput, match="alpha"):
        M.interval_score([0.0], [1.0], [0.0], alpha=1.0)
    with pytest.raises(BadInput, match="in element 1"):
        M.quantile_calibration_error([0.5, 1.5])
    with pytest.raises(BadInput, match="levels"):
        M.quantile_calibration_error([0.5], levels=[0.0])
    with pytest.raises(BadType, match="real targets"):
        M.pit(Predictive.from_probs([[0.5, 0.5]]), [0])
    with pytest.raises(BadInput, match="exactly"):
        M.pit(Predictive.from_normal([0.0, 0.0], [1.0, 1.0]), [[0.0], [0.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_on_the_grid_of_samples_are_reached(dtype: torch.dtype) -> None:
    samples = torch.arange(1, 21, dtype=dtype).unsqueeze(-1).expand(20, 20)
    values = M.pit(Predictive.from_samples(samples), torch.arange(1, 21, dtype=dtype))
    # F(y) is k/20 for k = 1..20: a share of exactly t lies at or below each level t.
    assert M.quantile_calibration_error(values).item() == pytest.approx(0.0, abs=1e-12)
