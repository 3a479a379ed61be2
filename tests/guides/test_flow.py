"""The flow: its density is that of its samples, and it reaches posteriors that no Gaussian does."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard import priors
from bayesguard.errors import BadInput
from bayesguard.guides import FullNormal, InverseAutoregressive
from bayesguard.guides.base import LOG_2_PI
from bayesguard.weights import Weights


def flow(size: int = 4, init_scale: float = 0.5) -> InverseAutoregressive:
    torch.manual_seed(0)
    guide = InverseAutoregressive(Weights(nn.Linear(size, 1, bias=False).double(), ["weight"]), init_scale)
    with torch.no_grad():
        for parameter in guide.flows.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


def test_the_density_is_that_of_the_samples() -> None:
    guide = flow()
    noise = torch.randn(4, dtype=torch.float64)
    jacobian = torch.func.jacrev(guide.perturb)(noise)
    want = -(noise.square().sum() + 4 * LOG_2_PI) / 2 - torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(guide._flowed(noise)[1], want, atol=1e-10)
    assert not torch.allclose(jacobian, jacobian.diag().diag())


def test_at_first_it_is_a_gaussian_of_the_scale_asked_for() -> None:
    guide = InverseAutoregressive(Weights(nn.Linear(6, 1, bias=False), ["weight"]), 0.2)
    assert torch.allclose(guide.stddev(), torch.full((6,), 0.2), rtol=5 * math.sqrt(0.5 / 256))


def test_variance_and_divergence() -> None:
    guide, prior = flow(), priors.Laplace(0.7)
    with torch.no_grad():
        drawn = torch.stack([guide.draw() for _ in range(4000)])
        estimates = torch.stack([guide.draw_with_kl(prior)[1] for _ in range(4000)])
        deviation, log_prob = guide._flowed(torch.randn(200_000, 4, dtype=torch.float64))
        sample = guide.weights.flatten() + deviation
        terms = log_prob - torch.distributions.Laplace(0.0, 0.7).log_prob(sample).sum(-1)
    error = 5 * (estimates.var() / 4000 + terms.var() / 200_000).sqrt()
    assert abs(estimates.mean() - terms.mean()) < error
    assert torch.allclose(guide.variance(), drawn.var(0), rtol=0.5)


class Product(nn.Module):
    """`x * a * b`: its posterior is a ridge that no Gaussian follows."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor([1.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors.prod()


def test_it_has_more_evidence_than_a_full_gaussian() -> None:
    x = torch.linspace(-1, 1, 20).reshape(-1, 1)
    bounds = {}
    for guide in ("flow", "full"):
        torch.manual_seed(0)
        likelihood = bg.likelihoods.Gaussian(scale=0.1)
        predictor = bg.Variational(Product(), likelihood, guide=guide, init_scale=0.1, prior=priors.Normal(2.0))
        predictor.fit((x, x), epochs=700, batch_size=20, optimizer=partial(torch.optim.Adam, lr=0.01))
        with torch.no_grad():
            bounds[guide] = torch.stack([predictor.loss(x, x, num_data=20) for _ in range(1000)]).double() * 20
    error = 5 * (sum(bound.var() / 1000 for bound in bounds.values())) ** 0.5
    assert bounds["flow"].mean() + error < bounds["full"].mean()


def test_a_predictor_with_it_copies() -> None:
    from bayesguard.testing import check_predictor

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    predictor = bg.Variational(network, guide="flow", subset_of_weights="last_layer", init_scale=0.3, num_samples=6)
    check_predictor(predictor, torch.randn(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 1]))
    assert not isinstance(predictor.guide, FullNormal)


@pytest.mark.parametrize("size", [1, 3000])
def test_sizes_that_are_refused(size: int) -> None:
    with pytest.raises(BadInput, match="2 to 2,000"):
        InverseAutoregressive(Weights(nn.Linear(size, 1, bias=False), ["weight"]))
