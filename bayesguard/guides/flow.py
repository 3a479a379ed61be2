"""A normalising flow over the weights, on Pyro's masked networks."""

from typing import Any

import torch
from torch import Tensor, nn

from bayesguard import priors
from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.guides.base import LOG_2_PI, Guide, log_initial_scales
from bayesguard.weights import Weights

# The hidden layer has three units for each weight: its matrices grow with the square.
_MAX_WEIGHTS = 2_000
_VARIANCE_DRAWS = 256
_MAX_LOG_STRETCH = 5.0


class InverseAutoregressive(Guide):
    """Gaussian noise through inverse autoregressive flows, for posteriors that no Gaussian describes.

    The network as it stands is where the flow is centred at first, and not the mean of what it learns. Its marginal
    variances are estimates from 256 draws.

    Args:
        weights: The parameters, at most 2,000 numbers.
        init_scale: First standard deviation of every weight, about.
        relative: `init_scale` is a share of each weight's size instead.
        num_flows: Transforms one after another, the order of the weights reversed in between.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, 2016, NeurIPS, algorithm 1.
    """

    gaussian_marginals = False

    def __init__(
        self, weights: Weights, init_scale: float = 0.01, *, relative: bool = False, num_flows: int = 2
    ) -> None:
        from pyro.nn import AutoRegressiveNN

        super().__init__(weights)
        size = weights.size
        if not 2 <= size <= _MAX_WEIGHTS:
            raise BadInput(
                f'guide="flow" is over {size:,} weights; it is for 2 to {_MAX_WEIGHTS:,}: use '
                'subset_of_weights="last_layer", or guide="low_rank"'
            )
        log_scale = log_initial_scales(weights, init_scale, relative)
        self.log_scale = nn.Parameter(log_scale)
        self.flows = nn.ModuleList()
        for number in range(check_count(num_flows, "num_flows")):
            order = torch.arange(size) if number % 2 == 0 else torch.arange(size).flip(0)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                hyper: Any = AutoRegressiveNN(size, [3 * size], permutation=order)  # type: ignore[arg-type]
            # Near the identity at first, so that init_scale is the spread.
            with torch.no_grad():
                hyper.layers[-1].weight.mul_(0.01)
                hyper.layers[-1].bias.zero_()
            self.flows.append(hyper.to(log_scale))

    def _flowed(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return deviations from the centre `[..., P]`, and the log density of each such sample `[...]`."""
        log_prob = -(noise.square().sum(-1) + self.weights.size * LOG_2_PI) / 2 - self.log_scale.sum()
        value = noise
        for hyper in self.flows:
            shift, log_stretch = hyper(value)
            log_stretch = log_stretch.clamp(-_MAX_LOG_STRETCH, _MAX_LOG_STRETCH)
            value = log_stretch.exp() * value + shift
            log_prob = log_prob - log_stretch.sum(-1)
        return self.log_scale.exp() * value, log_prob

    def perturb(self, noise: Tensor) -> Tensor:
        return self._flowed(noise)[0]

    def draw_with_kl(self, prior: priors.Prior) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(self.log_scale)
        deviation, log_prob = self._flowed(noise)
        sample = self.weights.flatten() + deviation
        return sample, log_prob - prior.joint(self.weights.named()).log_prob(sample).sum()

    def kl(self, prior: priors.Prior, sample: Tensor) -> Tensor:
        """Return the divergence estimated with a sample of its own: `sample` has lost the noise that it came from."""
        return self.draw_with_kl(prior)[1]

    def entropy(self) -> Tensor:
        """Return an estimate from one sample, in nats."""
        return -self._flowed(torch.randn_like(self.log_scale))[1]

    def variance(self) -> Tensor:
        generator = torch.Generator(self.log_scale.device).manual_seed(0)
        shape = _VARIANCE_DRAWS, self.weights.size
        noise = torch.randn(shape, dtype=self.log_scale.dtype, device=self.log_scale.device, generator=generator)
        return self._flowed(noise)[0].var(0)
