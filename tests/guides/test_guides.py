"""Guides: samples have the moments they claim, and divergences are those of brute force."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from bayesguard import priors
from bayesguard.errors import BadInput
from bayesguard.guides import (
    FAMILIES,
    FullNormal,
    Guide,
    LowRankNormal,
    MatrixNormal,
    MeanFieldNormal,
    Radial,
    make_guide,
)
from bayesguard.sampling.normal_numbers import standard_normal_like
from bayesguard.weights import Weights, select_weights

# A flow is not centred, and has tests of its own.
RANDOM = [family for family in FAMILIES if family not in ("delta", "flow")]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()


def guide_of(family: str, init_scale: float = 0.3) -> Guide:
    module = network()
    guide = make_guide(family, Weights(module, select_weights(module)), init_scale=init_scale)
    # Away from the start, where nothing is correlated.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return guide


def samples(guide: Guide, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return torch.stack([guide.draw(generator) for _ in range(count)])


@pytest.mark.parametrize("family", RANDOM)
def test_moments(family: str) -> None:
    guide, count = guide_of(family), 4000
    drawn = samples(guide, count)
    variance = guide.variance().detach()
    deviations = drawn - guide.weights.flatten().detach()
    assert bool((deviations.mean(0).abs() < 5 * (variance / count).sqrt()).all())
    squares = deviations.square()
    error = 5 * squares.std(0) / math.sqrt(count)
    assert bool(((squares.mean(0) - variance).abs() < error).all())
    # The twin: a variance that is a fifth larger.
    assert bool(((squares.mean(0) - 1.2 * variance).abs() > error).any())


@pytest.mark.parametrize("family", ["low_rank", "full", "matrix_normal"])
def test_correlations(family: str) -> None:
    guide, count = guide_of(family), 4000
    deviations = samples(guide, count) - guide.weights.flatten().detach()
    want = covariance(guide)
    products = deviations.unsqueeze(-1) * deviations.unsqueeze(-2)
    error = 5.5 * products.std(0) / math.sqrt(count)
    assert bool(((products.mean(0) - want).abs() < error).all())
    assert bool(((products.mean(0) - want.diag().diag()).abs() > error).any())


@torch.no_grad()
def covariance(guide: Guide) -> Tensor:
    if isinstance(guide, FullNormal):
        return guide.covariance()
    # Column by column: a guide is linear in its noise.
    units = torch.eye(guide.noise_size, dtype=torch.float64)
    factor = torch.stack([guide.perturb(unit) for unit in units], dim=-1)
    return factor @ factor.T


@pytest.mark.parametrize("family", ["normal", "low_rank", "full", "matrix_normal"])
def test_entropy_of_gaussians(family: str) -> None:
    guide = guide_of(family)
    want = MultivariateNormal(torch.zeros(guide.weights.size, dtype=torch.float64), covariance(guide)).entropy()
    assert torch.allclose(guide.entropy(), want, atol=1e-10)


@pytest.mark.parametrize("family", ["normal", "low_rank", "full", "matrix_normal"])
@pytest.mark.parametrize("prior", [priors.Normal(0.7), priors.Normal(0.7, by_fan_in=True)])
def test_divergence_of_gaussians(family: str, prior: priors.Prior) -> None:
    guide = guide_of(family)
    mean = guide.weights.flatten().detach()
    posterior = MultivariateNormal(mean, covariance(guide))
    scale = prior.joint(guide.weights.named()).stddev
    want = kl_divergence(posterior, MultivariateNormal(torch.zeros_like(mean), scale.square().diag()))
    assert torch.allclose(guide.kl(prior, guide.draw()), want, atol=1e-10)
    assert torch.allclose(guide.draw_with_kl(prior)[1], want, atol=1e-10)


def test_divergence_is_the_sum_of_torchs_closed_forms() -> None:
    guide = guide_of("normal")
    mean, stddev = guide.weights.flatten().detach(), guide.stddev().detach()
    for prior in (priors.Normal(0.7), priors.Laplace(0.4)):
        want = kl_divergence(Normal(mean, stddev), prior.joint(guide.weights.named())).sum()
        assert torch.allclose(guide.kl(prior, guide.draw()), want, atol=1e-6)


def test_correlated_weights_under_a_laplace_prior() -> None:
    guide = guide_of("full")
    mean = guide.weights.flatten().detach()
    marginals = Normal(mean, guide.stddev().detach())
    cross = kl_divergence(marginals, Laplace(0 * mean, 0 * mean + 0.4)).sum() + marginals.entropy().sum()
    assert torch.allclose(guide.kl(priors.Laplace(0.4), guide.draw()), cross - guide.entropy(), atol=1e-10)


@pytest.mark.parametrize("prior", [priors.StudentT(3.0, 0.4), priors.ScaleMixture((1.0, 0.1)), priors.Horseshoe(0.5)])
def test_divergence_from_other_priors_is_unbiased(prior: priors.Prior) -> None:
    guide, count = guide_of("normal"), 3000
    with torch.no_grad():
        drawn = samples(guide, count)
        estimates = torch.stack([guide.kl(prior, sample) for sample in drawn])
        mean, stddev = guide.weights.flatten(), guide.stddev()
        # Gauss-Hermite would miss the horseshoe's pole; a fine grid does not.
        grid = torch.linspace(-8, 8, 40_001, dtype=torch.float64)[:-1] + 2e-4
        density = prior.distribution("w", torch.zeros(1, dtype=torch.float64))
        points = mean.unsqueeze(-1) + stddev.unsqueeze(-1) * grid
        inner = Normal(0.0, 1.0).log_prob(grid).exp() * density.log_prob(points.reshape(-1)).reshape(points.shape)
        want = -inner.sum(-1).sum() * 4e-4 - guide.entropy()
    error = 5 * (estimates.std() / math.sqrt(count)).item()
    assert abs((estimates.mean() - want).item()) < error
    # The twin: the entropy of standard deviations that are a fifth smaller.
    assert abs((estimates.mean() - want + guide.weights.size * math.log(0.8)).item()) > error


def test_radial_entropy_by_importance() -> None:
    """The entropy is that of the density: its expectation over samples of the same family."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 1, bias=False).double()
    guide = Radial(Weights(layer, ["weight"]), 0.5)
    drawn = samples(guide, 20_000) - guide.weights.flatten().detach()
    # In d = 3 the density of the radius r is spread over 4 pi r^2.
    radius = (drawn / 0.5).norm(dim=-1)
    log_density = math.log(2 / math.sqrt(2 * math.pi)) - radius.square() / 2 - (4 * math.pi * radius.square()).log()
    log_density = log_density - 3 * math.log(0.5)
    error = 5 * log_density.std().item() / math.sqrt(len(drawn))
    assert abs(-log_density.mean().item() - guide.entropy().item()) < error


def test_low_rank_is_torchs() -> None:
    guide = guide_of("low_rank")
    assert isinstance(guide, LowRankNormal)
    want = LowRankMultivariateNormal(
        torch.zeros(guide.weights.size, dtype=torch.float64),
        guide.log_scale.exp().unsqueeze(-1) * guide.factor,
        (2 * guide.log_scale).exp(),
    )
    assert torch.allclose(covariance(guide), want.covariance_matrix.detach())


def test_fused_sample_and_divergence() -> None:
    """Values and gradients of the fused step are those of the plain formulas."""
    for prior in (priors.Normal(0.7), priors.Normal(0.7, by_fan_in=True), priors.Informed(network(), 0.3)):
        guide = guide_of("normal")
        parameters = [*(tensor for tensor in guide.weights.tensors()), *guide.parameters()]
        found = []
        for step in (guide.draw_with_kl, lambda prior, guide=guide: Guide.draw_with_kl(guide, prior)):
            torch.manual_seed(1)
            sample, divergence = step(prior)
            loss = (sample * torch.linspace(-1, 1, len(sample), dtype=torch.float64)).sum() + 0.3 * divergence
            found.append((sample, divergence, *torch.autograd.grad(loss, parameters)))
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))


def test_fused_samples_lie_as_their_parameters_do() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = Weights(module, select_weights(module))
    guide = MeanFieldNormal(weights, 0.3)
    for parts in (guide.parts_with_kl(priors.Normal())[0], weights.split(guide.draw())):
        assert [part.stride() for part in parts] == [tensor.stride() for tensor in weights.tensors()]
    torch.manual_seed(1)
    parts, divergence = guide.parts_with_kl(priors.Normal())
    torch.manual_seed(1)
    sample, same = Guide.draw_with_kl(guide, priors.Normal())
    assert torch.allclose(divergence, same)
    assert all(torch.allclose(a, b) for a, b in zip(parts, weights.split(sample), strict=True))


def test_fused_step_follows_another_prior() -> None:
    guide = guide_of("normal")
    values = {guide.draw_with_kl(priors.Normal(scale))[1].item() for scale in (0.5, 1.0, 0.5)}
    assert len(values) == 2


def test_delta_is_the_maximum_a_posteriori() -> None:
    guide = guide_of("delta")
    sample, divergence = guide.draw_with_kl(priors.Normal(0.7))
    assert torch.equal(sample, guide.weights.flatten())
    want = -Independent(Normal(0 * sample, 0 * sample + 0.7), 1).log_prob(sample)
    assert torch.allclose(divergence, want)
    assert guide.noise_size == 0


def test_fused_step_of_many_weights() -> None:
    """In float32 the noise is made otherwise: the same noise gives the sample, divergence and gradients of the formulas."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 3))
    guide = MeanFieldNormal(Weights(module, select_weights(module)), 0.3)
    with torch.no_grad():
        guide.log_scale.uniform_(-7, 0)
    for prior in (priors.Normal(0.7), priors.Normal(0.7, by_fan_in=True), priors.Informed(deepcopy(module), 0.3)):
        torch.manual_seed(1)
        sample, divergence = guide.draw_with_kl(prior)
        slope = torch.linspace(-1, 1, len(sample))
        loss = (sample * slope).sum() + 0.3 * divergence
        got = (sample, divergence, *torch.autograd.grad(loss, [guide.log_scale, *guide.weights.tensors()]))
        torch.manual_seed(1)
        noise = standard_normal_like(guide.log_scale)
        exact = deepcopy(guide).double()
        exact.weights = Weights(deepcopy(module).double(), guide.weights.names)
        sample = exact.rsample(noise.double())
        divergence = exact.kl(prior, sample)
        loss = (sample * slope.double()).sum() + 0.3 * divergence
        want = (sample, divergence, *torch.autograd.grad(loss, [exact.log_scale, *exact.weights.tensors()]))
        assert all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5) for a, b in zip(got, want, strict=True))
        # The twins: other noise, and a divergence that is counted half.
        assert not torch.allclose(got[0], exact.rsample(noise.double().flip(0)).float(), atol=1e-3)
        assert not torch.allclose(got[2].double(), want[2] + 0.15, rtol=1e-5, atol=1e-5)


def test_steps_accumulate() -> None:
    """What one step keeps for its gradient is its own: two losses in one backward pass, and one twice."""
    torch.manual_seed(0)
    module = nn.Linear(200, 100)
    guide = MeanFieldNormal(Weights(module, ["weight", "bias"]), 0.3)
    tensors = [guide.log_scale, *guide.weights.tensors()]

    def loss() -> Tensor:
        sample, divergence = guide.draw_with_kl(priors.Normal())
        return sample.square().sum() + divergence

    torch.manual_seed(1)
    apart = [torch.autograd.grad(loss(), tensors) for _ in range(2)]
    torch.manual_seed(1)
    first, second = loss(), loss()
    both = torch.autograd.grad(first + second, tensors, retain_graph=True)
    assert all(torch.allclose(a + b, c, rtol=1e-5) for a, b, c in zip(*apart, both, strict=True))
    again = torch.autograd.grad(first, tensors)
    assert all(torch.equal(a, b) for a, b in zip(again, apart[0], strict=True))


@pytest.mark.parametrize("family", RANDOM)
def test_opposite_draws(family: str) -> None:
    guide = guide_of(family)
    assert guide.is_odd
    first, second = (guide.draw(torch.Generator().manual_seed(3), opposite=opposite) for opposite in (False, True))
    assert torch.allclose((first + second) / 2, guide.weights.flatten())
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_copies_are_about_their_own_network(family: str) -> None:
    module = network()
    both = nn.ModuleList([module, make_guide(family, Weights(module, select_weights(module)))])
    copied = deepcopy(both)
    with torch.no_grad():
        copied[0].get_parameter("0.weight").add_(1.0)
    weights = copied[1].weights
    assert isinstance(weights, Weights)
    assert weights.tensors()[0] is copied[0].get_parameter("0.weight")
    assert not torch.equal(weights.tensors()[0], module.get_parameter("0.weight"))


def test_relative_scales() -> None:
    module = nn.Linear(3, 2)
    guide = make_guide("normal", Weights(module, ["weight"]), init_scale=0.1, relative=True)
    assert isinstance(guide, MeanFieldNormal)
    assert torch.allclose(guide.stddev(), 0.1 * module.weight.detach().abs().clamp_min(0.01).reshape(-1))


def test_matrix_normal_needs_few_numbers() -> None:
    module = nn.Linear(30, 20, bias=False)
    guide = make_guide("matrix_normal", Weights(module, ["weight"]), init_scale=0.2)
    assert isinstance(guide, MatrixNormal)
    assert sum(parameter.numel() for parameter in guide.parameters()) == 20 * 21 // 2 + 30 * 31 // 2
    assert torch.allclose(guide.stddev(), torch.full((600,), 0.2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda weights: make_guide("gaussian", weights), "one of 'normal'"),
        (lambda weights: make_guide(cast(Any, lambda w: nn.Linear(1, 1)), weights), "it made a Linear"),
        (lambda weights: make_guide("normal", weights, init_scale=0.0), "init_scale must be"),
        (lambda weights: make_guide("normal", weights, init_scale=math.nan), "init_scale must be"),
        (lambda weights: LowRankNormal(weights, rank=0), "rank"),
    ],
)
def test_what_they_refuse(make: Callable[[Weights], object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make(Weights(nn.Linear(3, 2), ["weight"]))


def test_a_full_covariance_has_a_limit() -> None:
    module = nn.Linear(101, 100, bias=False)
    with pytest.raises(BadInput, match=r"10,100 weights.*last_layer"):
        FullNormal(Weights(module, ["weight"]))
