"""Simulation-based calibration: exact samplers pass, and a posterior that is a fifth too narrow does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput
from bayesguard.testing import simulation_based_calibration

ROWS, NOISE = 15, 0.5
X = torch.randn(ROWS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prior(seed: int) -> Tensor:
    return torch.randn(2, dtype=torch.float64, generator=generator(seed))


def simulate(weights: Tensor, seed: int) -> Tensor:
    return X @ weights + NOISE * torch.randn(ROWS, dtype=torch.float64, generator=generator(seed))


def conjugate(shrink: float) -> Callable[[Tensor, int], Tensor]:
    precision = X.T @ X / NOISE**2 + torch.eye(2, dtype=torch.float64)
    covariance = torch.linalg.inv(precision)
    factor = torch.linalg.cholesky(covariance)

    def draw(y: Tensor, seed: int) -> Tensor:
        noise = torch.randn(99, 2, dtype=torch.float64, generator=generator(seed))
        return covariance @ X.T @ y / NOISE**2 + shrink * noise @ factor.T

    return draw


def test_the_conjugate_posterior_passes() -> None:
    found = simulation_based_calibration(prior, simulate, conjugate(1.0), num_simulations=2000)
    assert found.passed(alpha=1e-4)
    assert found.ranks.min() >= 0
    assert found.ranks.max() <= 99


def test_a_posterior_that_is_too_narrow_fails() -> None:
    # A fifth less: the outer bins of ten expect 1.8 times as many ranks; at 2,000 simulations chi-square is about 170.
    found = simulation_based_calibration(prior, simulate, conjugate(0.8), num_simulations=2000)
    assert not found.passed(alpha=1e-4)


def test_p_values_are_uniform_for_uniform_ranks() -> None:
    from scipy.stats import chisquare

    ranks = torch.randint(0, 100, (500, 3), generator=generator(1))
    from bayesguard.simulation_based_calibration import _p_values

    counts = torch.stack([torch.bincount(ranks[:, k] // 10, minlength=10) for k in range(3)])
    want: Any = chisquare(counts.numpy(), axis=1).pvalue
    assert torch.allclose(_p_values(ranks, 99, 10), torch.as_tensor(want))


@pytest.mark.filterwarnings("ignore::bayesguard.errors.ConvergenceWarning")
def test_the_no_u_turn_sampler_passes() -> None:
    def posterior(y: Tensor, seed: int) -> Tensor:
        network = nn.Linear(2, 1, bias=False).double()
        nuts = bg.NUTS(network, bg.likelihoods.Gaussian(scale=NOISE), seed=seed % 2**31)
        nuts.fit((X, y.unsqueeze(-1)), num_samples=38, num_chains=1, warmup=30)
        return nuts.draws[0, ::2]

    found = simulation_based_calibration(prior, simulate, posterior, num_simulations=60, num_bins=5)
    assert found.num_draws == 19
    assert found.passed(alpha=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_simulations": 20}, "less than 5 for each of 10 bins"),
        ({"num_bins": 7}, "does not divide the 100 possible ranks"),
        ({"posterior": lambda y, seed: torch.zeros(99)}, r"posterior \[L, P\]"),
        ({"posterior": lambda y, seed: torch.full((99, 2), torch.nan)}, "not finite"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    posterior = settings.pop("posterior", conjugate(1.0))
    with pytest.raises(BadInput, match=message):
        simulation_based_calibration(prior, simulate, posterior, **settings)
