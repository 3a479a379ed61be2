"""Variational inference against Bayesian linear regression in closed form."""

import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg

NOISE = 0.5


class Closed(NamedTuple):
    """Data of a linear regression with noise 0.5 and a standard normal prior, and its posterior."""

    x: Tensor
    y: Tensor
    mean: Tensor
    precision: Tensor

    @property
    def covariance(self) -> Tensor:
        return torch.linalg.inv(self.precision)


@pytest.fixture(scope="module")
def closed() -> Closed:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.8, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    x = torch.randn(40, 3, dtype=torch.float64, generator=generator) @ mixing
    noise = NOISE * torch.randn(40, dtype=torch.float64, generator=generator)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + noise
    precision = x.T @ x / NOISE**2 + torch.eye(3, dtype=torch.float64)
    return Closed(x, y.unsqueeze(-1), torch.linalg.solve(precision, x.T @ y / NOISE**2), precision)


def fitted(closed: Closed, guide: str, epochs: int = 1200, **settings: Any) -> bg.Variational:
    torch.manual_seed(0)
    predictor = bg.Variational(
        nn.Linear(3, 1, bias=False).double(),
        bg.likelihoods.Gaussian(scale=NOISE),
        guide=guide,
        init_scale=0.05,
        num_samples=400,
        **settings,
    )
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
    predictor.fit(
        (closed.x, closed.y),
        epochs=epochs,
        optimizer=partial(torch.optim.Adam, lr=0.02),
        scheduler=cosine,
        batch_size=40,
    )
    return predictor


def test_full_covariance_is_the_posterior(closed: Closed) -> None:
    predictor = fitted(closed, "full", epochs=3000)
    guide = predictor.guide
    assert isinstance(guide, bg.guides.FullNormal)
    stddev = closed.covariance.diag().sqrt()
    assert bool(((guide.weights.flatten().detach() - closed.mean).abs() < 0.15 * stddev).all())
    scaled = (guide.covariance().detach() - closed.covariance) / (stddev.unsqueeze(-1) * stddev)
    assert bool((scaled.abs() < 0.1).all())


def test_mean_field_is_narrower_than_the_marginals(closed: Closed) -> None:
    stddev = fitted(closed, "normal").guide.stddev().detach()
    assert bool(((stddev * closed.precision.diag().sqrt() - 1).abs() < 0.1).all())
    # Independent weights cannot follow the ridge of correlated ones: one of them is sure by a quarter too much.
    ratio = stddev / closed.covariance.diag().sqrt()
    assert ratio.min() < 0.8
    assert ratio.max() < 1.1


def test_the_maximum_a_posteriori(closed: Closed) -> None:
    predictor = fitted(closed, "delta")
    assert torch.allclose(predictor.network.get_parameter("weight")[0].detach(), closed.mean, atol=1e-6)


def test_the_predictive_is_the_closed_forms(closed: Closed) -> None:
    """With the exact posterior in the guide, the predictive has its mean and its variance."""
    predictor = bg.Variational(
        nn.Linear(3, 1, bias=False).double(), bg.likelihoods.Gaussian(scale=NOISE), guide="full", num_samples=4000
    )
    factor = torch.linalg.cholesky(closed.covariance)
    with torch.no_grad():
        predictor.network.get_parameter("weight").copy_(closed.mean.unsqueeze(0))
        predictor.guide.get_parameter("log_scale").copy_(factor.diag().log())
        rows, columns = torch.tril_indices(3, 3, -1)
        predictor.guide.get_parameter("lower").copy_((factor / factor.diag().unsqueeze(-1))[rows, columns])
    pred = predictor(closed.x)
    between = (closed.x @ closed.covariance * closed.x).sum(-1)
    assert torch.allclose(pred.mean.squeeze(-1), closed.x @ closed.mean, atol=1e-9)  # antithetic pairs: exact
    variance = pred.uncertainty().epistemic.squeeze(-1)
    # 2,000 independent pairs: the relative error of a variance is sqrt(2 / 2000).
    error = 5 * math.sqrt(2 / 2000)
    assert bool((variance / between - 1).abs().max() < error)
    assert bool((1.3 * variance / between - 1).abs().max() > error)


def test_the_divergence_of_the_exact_posterior(closed: Closed) -> None:
    predictor = fitted(closed, "full")
    evidence_bound = -40 * torch.stack([predictor.loss(closed.x, closed.y, num_data=40) for _ in range(400)]).detach()
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(40, dtype=torch.float64),
        closed.x @ closed.x.T + NOISE**2 * torch.eye(40, dtype=torch.float64),
    ).log_prob(closed.y[:, 0])
    error = 5 * evidence_bound.std() / math.sqrt(400)
    # The bound is the log evidence itself where the posterior is in the family, less what optimisation left.
    assert evidence_bound.mean() < marginal + error
    assert evidence_bound.mean() > marginal - error - 0.1
