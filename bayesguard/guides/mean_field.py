"""Independent Gaussians, one for each weight."""

from typing import Any

import torch
from torch import Tensor, nn

from bayesguard import priors
from bayesguard.guides.base import LOG_2_PI, Guide, log_initial_scales
from bayesguard.guides.fused import GaussianFactors, SampleAndDivergence, gaussian_factors
from bayesguard.sampling.normal_numbers import standard_normal_like
from bayesguard.weights import Weights


class MeanFieldNormal(Guide):
    """Independent Gaussians (Graves, 2011, NeurIPS; Blundell et al., 2015, ICML).

    Args:
        weights: The parameters.
        init_scale: First standard deviation of every weight.
        relative: `init_scale` is a share of each weight's size instead.
    """

    is_odd = True

    def __init__(self, weights: Weights, init_scale: float = 0.01, *, relative: bool = False) -> None:
        super().__init__(weights)
        self.log_scale = nn.Parameter(log_initial_scales(weights, init_scale, relative))
        self._remembered: tuple[Any, GaussianFactors | None] | None = None

    def perturb(self, noise: Tensor) -> Tensor:
        return self.log_scale.exp() * noise

    def parts_with_kl(self, prior: priors.Prior) -> tuple[list[Tensor], Tensor]:
        factors = self._factors_of(prior)
        if factors is None:
            return super().parts_with_kl(prior)
        noise = standard_normal_like(self.log_scale)
        arguments = (self.log_scale, noise, factors.loc, factors.precision, *self.weights.tensors())
        divergence, *samples = SampleAndDivergence.apply(*arguments)  # type: ignore[no-untyped-call]
        return samples, divergence + factors.constant

    def draw_with_kl(self, prior: priors.Prior) -> tuple[Tensor, Tensor]:
        if self._factors_of(prior) is None:
            return super().draw_with_kl(prior)
        parts, divergence = self.parts_with_kl(prior)
        return torch.cat([part.reshape(-1) for part in parts]), divergence

    def _factors_of(self, prior: priors.Prior) -> GaussianFactors | None:
        """What a Gaussian prior is made of, looked at once for each prior and device; None for another prior."""
        key = (prior, self.log_scale.device, self.log_scale.dtype)
        if self._remembered is None or self._remembered[0] != key:
            self._remembered = key, gaussian_factors(prior, self.weights)
        return self._remembered[1]

    def entropy(self) -> Tensor:
        return self.log_scale.sum() + self.weights.size * (LOG_2_PI + 1) / 2

    def variance(self) -> Tensor:
        return (2 * self.log_scale).exp()

    def stddev(self) -> Tensor:
        return self.log_scale.exp()


class Radial(Guide):
    """A Gaussian distance in a direction that is uniform, tensor by tensor: no mass far out in many dimensions.

    References:
        Farquhar, Osborne, Gal, 2020, AISTATS, section 3; the entropy follows from the density of the radius.
    """

    is_odd = True
    gaussian_marginals = False

    def __init__(self, weights: Weights, init_scale: float = 0.01, *, relative: bool = False) -> None:
        super().__init__(weights)
        self.log_scale = nn.Parameter(log_initial_scales(weights, init_scale, relative))

    @property
    def noise_size(self) -> int:
        return self.weights.size + len(self.weights.names)

    def perturb(self, noise: Tensor) -> Tensor:
        size = self.weights.size
        # A distance has no sign: with one, the opposite noise would be the same sample.
        directions, radii = noise[:size], noise[size:].abs()
        parts = [part.reshape(-1) for part in self.weights.split(directions)]
        rays = [part / part.norm() * radius for part, radius in zip(parts, radii, strict=True)]
        return self.log_scale.exp() * torch.cat(rays)

    def entropy(self) -> Tensor:
        return self.log_scale.sum() + sum(_ray_entropy(part.numel()) for part in self.weights.tensors())

    def variance(self) -> Tensor:
        sizes = [part.new_full((part.numel(),), float(part.numel())) for part in self.weights.tensors()]
        return (2 * self.log_scale).exp() / torch.cat(sizes)


def _ray_entropy(dimension: int) -> float:
    """Entropy of a uniform direction times |N(0, 1)|: of the radius, the sphere, and the volume between."""
    d = torch.tensor(float(dimension), dtype=torch.float64)
    half_normal = 0.5 * torch.tensor(torch.pi / 2, dtype=torch.float64).log() + 0.5
    sphere = (
        torch.log(torch.tensor(2.0, dtype=torch.float64))
        + d / 2 * torch.log(d.new_tensor(torch.pi))
        - torch.lgamma(d / 2)
    )
    mean_log_radius = -(0.5772156649015329 + torch.log(d.new_tensor(2.0))) / 2
    return float(half_normal + sphere + (d - 1) * mean_log_radius)


class Delta(Guide):
    """A point: the maximum a posteriori. Under a Normal prior that is L2 regularisation, under a Laplace prior L1."""

    gaussian_marginals = False

    @property
    def noise_size(self) -> int:
        return 0

    def perturb(self, noise: Tensor) -> Tensor:
        return torch.zeros_like(self.weights.flatten())

    def rsample(self, noise: Tensor) -> Tensor:
        return self.weights.flatten()

    def entropy(self) -> Tensor:
        return self.variance().sum()

    def variance(self) -> Tensor:
        return torch.zeros_like(self.weights.flatten()).detach()

    def kl(self, prior: priors.Prior, sample: Tensor) -> Tensor:
        """Return minus the prior's log density at the point (a point has no entropy that could change)."""
        return -prior.joint(self.weights.named()).log_prob(self.weights.flatten()).sum()
