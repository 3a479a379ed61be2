"""Guides: approximate posteriors of a module's weights, around the module's own parameters."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from bayesguard import priors
from bayesguard.checks import check_positive
from bayesguard.weights import Weights

LOG_2_PI = math.log(2 * math.pi)
_SQRT_2 = math.sqrt(2)


class Guide(nn.Module, ABC):
    """A distribution over P weights that is centred on the module's own parameters, which are what it learns first.

    The network as it stands is therefore always the network at the posterior mean. A guide adds what describes the
    spread.

    Args:
        weights: The parameters it is about.

    Attributes:
        gaussian_marginals: Whether each weight by itself is Gaussian.
        is_odd: Whether noise of the other sign gives the opposite deviation, so that draws of a pair lie mirrored about
            the module's own parameters. Predictions then share products of a first layer.
    """

    gaussian_marginals = True
    is_odd = False

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

    @property
    def noise_size(self) -> int:
        """How many standard normal numbers a sample is made of."""
        return self.weights.size

    @abstractmethod
    def perturb(self, noise: Tensor) -> Tensor:
        """Return deviations from the mean `[P]` for standard normal `noise` `[noise_size]`, differentiable."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """Return the differential entropy in nats."""

    @abstractmethod
    def variance(self) -> Tensor:
        """Return the marginal variance of every weight, `[P]`."""

    def stddev(self) -> Tensor:
        """Return the marginal standard deviation of every weight, `[P]`."""
        return self.variance().sqrt()

    def rsample(self, noise: Tensor) -> Tensor:
        """Return a sample of the weights `[P]`, differentiable in the means and the spread."""
        return self.weights.flatten() + self.perturb(noise)

    def draw(self, generator: torch.Generator | None = None, *, opposite: bool = False) -> Tensor:
        """Return a sample of the weights `[P]`; `opposite` for the one with the noise of the other sign.

        Args:
            generator: Where the noise comes from; None for torch's default generator.
            opposite: Negate the noise: the antithetic sample.
        """
        like = self.weights.slots[0].tensor
        noise = torch.randn(self.noise_size, dtype=like.dtype, device=like.device, generator=generator)
        return self.rsample(-noise if opposite else noise)

    def draw_with_kl(self, prior: priors.Prior) -> tuple[Tensor, Tensor]:
        """Return a sample from torch's default generator, and the divergence from the prior estimated with it."""
        sample = self.draw()
        return sample, self.kl(prior, sample)

    def parts_with_kl(self, prior: priors.Prior) -> tuple[list[Tensor], Tensor]:
        """Return the same with the sample as one tensor for each parameter: what a training step needs."""
        sample, divergence = self.draw_with_kl(prior)
        return self.weights.split(sample), divergence

    @property
    def tensors(self) -> list[Tensor]:
        """What a sample of given noise is made of."""
        return [*self.weights.tensors(), *self.parameters(), *self.buffers()]

    def kl(self, prior: priors.Prior, sample: Tensor) -> Tensor:
        """Return the Kullback-Leibler divergence from the prior in nats, summed over every weight once.

        In closed form for `Normal` and `Informed`, and for `Laplace` where marginals are Gaussian; for other priors the
        expectation of the prior's log density is estimated with the one `sample` `[P]`.
        """
        return self._cross_entropy(prior, sample) - self.entropy()

    def _cross_entropy(self, prior: priors.Prior, sample: Tensor) -> Tensor:
        distribution = prior.joint(self.weights.named())
        if isinstance(distribution, torch.distributions.Normal):
            scale = distribution.scale
            second = self.variance() + (self.weights.flatten() - distribution.loc).square()
            return (second / scale.square()).sum() / 2 + scale.log().sum() + scale.numel() * LOG_2_PI / 2
        if isinstance(distribution, torch.distributions.Laplace) and self.gaussian_marginals:
            mean, stddev = self.weights.flatten() - distribution.loc, self.stddev()
            scale = distribution.scale
            ratio = mean / stddev
            # The mean of |w| of a Gaussian (Leone, Nelson, Nottingham, 1961).
            absolute = stddev * math.sqrt(2 / math.pi) * (-ratio.square() / 2).exp() + mean * torch.erf(ratio / _SQRT_2)
            return (absolute / scale + (2 * scale).log()).sum()
        return -distribution.log_prob(sample).sum()

    def extra_repr(self) -> str:
        return f"{self.weights.size} weights: {', '.join(self.weights.names)}"


def log_initial_scales(weights: Weights, init_scale: float, relative: bool) -> Tensor:
    """Return the logarithm of each weight's first standard deviation `[P]`.

    Args:
        weights: The parameters.
        init_scale: The standard deviation, or with `relative` its ratio to the size of the weight.
        relative: As MOPED does (Krishnan et al., 2020); weights at zero get 0.01 of it.
    """
    check_positive(init_scale, "init_scale")
    flat = weights.flatten().detach()
    scale = flat.abs().clamp_min(0.01) if relative else torch.ones_like(flat)
    return (init_scale * scale).log()
