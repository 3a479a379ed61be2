"""Priors: densities that integrate to one, scales by fan-in, and what they refuse."""

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import kl_divergence

from bayesguard import priors
from bayesguard.errors import BadInput

ALL = [
    priors.Normal(0.7),
    priors.Laplace(0.5),
    priors.StudentT(df=3.0, scale=0.4),
    priors.ScaleMixture((1.0, 0.1), (0.3, 0.7)),
    priors.Horseshoe(0.5),
]


@pytest.mark.parametrize("prior", ALL, ids=lambda prior: type(prior).__name__)
def test_densities_integrate_to_one(prior: priors.Prior) -> None:
    density = prior.distribution("w", torch.zeros(1, dtype=torch.float64))
    half = torch.logspace(-14, 7, 200_001, dtype=torch.float64)
    grid = torch.cat([-half.flip(0), half])
    assert torch.trapezoid(density.log_prob(grid).exp(), grid).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("prior", ALL, ids=lambda prior: type(prior).__name__)
def test_the_joint_is_the_product(prior: priors.Prior) -> None:
    named = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    flat = torch.cat([tensor.reshape(-1) for tensor in named.values()])
    parts = sum(prior.distribution(name, tensor).log_prob(tensor).sum() for name, tensor in named.items())
    assert torch.allclose(prior.joint(named).log_prob(flat).sum(), torch.as_tensor(parts))


@pytest.mark.parametrize("prior", ALL, ids=lambda prior: type(prior).__name__)
def test_shape_dtype_and_repr(prior: priors.Prior) -> None:
    density = prior.distribution("w", torch.zeros(2, 3, dtype=torch.float64))
    assert density.batch_shape == (2, 3)
    assert density.sample().dtype == torch.float64
    assert type(prior).__name__ in repr(prior)


def test_horseshoe_is_a_gaussian_with_a_cauchy_scale() -> None:
    # P(|w| < t) by samples of the definition and by the density in closed form.
    generator = torch.Generator().manual_seed(0)
    draws = 400_000
    local = torch.empty(draws, dtype=torch.float64).cauchy_(generator=generator).abs()
    weights = 0.5 * local * torch.randn(draws, dtype=torch.float64, generator=generator)
    half = torch.logspace(-14, math.log10(0.3), 100_001, dtype=torch.float64)
    density = priors.Horseshoe(0.5).distribution("w", torch.zeros(1, dtype=torch.float64))
    below = 2 * torch.trapezoid(density.log_prob(half).exp(), half).item()
    share = (weights.abs() < 0.3).double().mean().item()
    error = 5 * math.sqrt(share * (1 - share) / draws)
    assert abs(share - below) < error
    # The twin: a Laplace of the same scale is another distribution.
    assert abs(share - (1 - math.exp(-0.3 / 0.5))) > error


def test_horseshoe_samples_follow_its_density() -> None:
    torch.manual_seed(0)
    density = priors.Horseshoe(0.5).distribution("w", torch.zeros(100_000, dtype=torch.float64))
    share = (density.sample().abs() < 0.3).double().mean().item()
    half = torch.logspace(-14, math.log10(0.3), 100_001, dtype=torch.float64)
    one = priors.Horseshoe(0.5).distribution("w", torch.zeros(1, dtype=torch.float64))
    below = 2 * torch.trapezoid(one.log_prob(half).exp(), half).item()
    assert abs(share - below) < 5 * math.sqrt(below * (1 - below) / 100_000)


def test_horseshoe_gradient() -> None:
    density = priors.Horseshoe(0.5).distribution("w", torch.zeros(6, dtype=torch.float64))
    value = torch.tensor([-3.0, -0.2, 1e-3, 0.4, 1.0, 30.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(density.log_prob, value, eps=1e-7)
    at_zero = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    density.log_prob(at_zero).sum().backward()
    assert at_zero.grad is not None
    assert bool(at_zero.grad.isfinite().all())


def test_scale_by_fan_in() -> None:
    prior = priors.Normal(2.0, by_fan_in=True)
    assert prior.scale_of(torch.zeros(5, 4)) == 1.0
    assert prior.scale_of(torch.zeros(6, 4, 2, 2)) == 0.5
    assert prior.scale_of(torch.zeros(5)) == 2.0


def test_informed_by_trained_weights() -> None:
    network = nn.Linear(3, 2)
    prior = priors.Informed(network, scale=0.5)
    density = prior.distribution("weight", network.weight)
    assert torch.equal(density.mean, network.weight.detach())
    with torch.no_grad():
        network.weight.zero_()
    assert not torch.equal(prior.distribution("weight", network.weight).mean, network.weight)
    with pytest.raises(BadInput, match="same architecture"):
        prior.distribution("weight", torch.zeros(4, 4))
    with pytest.raises(BadInput, match="nothing of that name"):
        prior.distribution("other", network.weight)


def test_maximum_a_posteriori_is_regularisation() -> None:
    weight = torch.randn(7, dtype=torch.float64)
    normal, laplace = (prior.distribution("w", weight) for prior in (priors.Normal(0.5), priors.Laplace(0.5)))
    zero = torch.zeros_like(weight)
    l2 = (normal.log_prob(zero) - normal.log_prob(weight)).sum()
    l1 = (laplace.log_prob(zero) - laplace.log_prob(weight)).sum()
    assert torch.allclose(l2, weight.square().sum() / (2 * 0.5**2))
    assert torch.allclose(l1, weight.abs().sum() / 0.5)


def test_torch_knows_their_divergences() -> None:
    prior = priors.Normal(2.0).distribution("w", torch.zeros(1))
    assert kl_divergence(prior, prior).item() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: priors.Normal(0.0), "scale must be a positive number"),
        (lambda: priors.Normal(float("nan")), "scale must be a positive number"),
        (lambda: priors.StudentT(df=-1.0), "df must be"),
        (lambda: priors.ScaleMixture((1.0,), (0.5, 0.5)), "one number for each part"),
        (lambda: priors.check_prior(priors.Normal), "got the class Normal"),
        (lambda: priors.check_prior("normal"), "object of bayesguard.priors"),
    ],
)
def test_what_they_refuse(make: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()


@pytest.mark.parametrize("df", [2.0, 19.0, 21.0, 1e3, 1e6, 1e12])
def test_student_t_keeps_its_digits_in_single_precision(df: float) -> None:
    where = torch.linspace(-4, 4, 41)
    prior = priors.StudentT(df=df, scale=0.5)
    density = prior.distribution("w", where).log_prob(where)
    assert density.dtype == torch.float32
    exact = torch.from_numpy(stats.t.logpdf(where.double().numpy(), df, scale=0.5))
    assert torch.allclose(density.double(), exact, rtol=2e-6, atol=5e-6)
    assert torch.allclose(prior.joint({"w": where}).log_prob(where).double(), exact, rtol=2e-6, atol=5e-6)
