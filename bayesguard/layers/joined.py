"""The posteriors of all Bayesian layers of a network as one guide, and their priors as one prior."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bayesguard.errors import BadInput
from bayesguard.guides import Guide
from bayesguard.layers.base import BayesianLayer, bayesian_layers
from bayesguard.priors import Prior
from bayesguard.weights import Weights


class LayerPosteriors(Guide):
    """The posteriors of a network's Bayesian layers, one after another; they stay where they are, in the layers.

    Args:
        network: A network with Bayesian layers.

    Raises:
        BadInput: Two layers share a parameter, which would then have two posteriors.
    """

    def __init__(self, network: nn.Module) -> None:
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        layers = bayesian_layers(network)
        tensors = [tensor for layer in layers for tensor in layer.posterior.weights.tensors()]
        if len(set(map(id, tensors))) < len(tensors):
            raise BadInput(
                "two Bayesian layers share a parameter, which then has two posteriors; hand in the network of plain layers "
                "(Variational samples such a parameter once)"
            )
        super().__init__(Weights(network, [names[id(tensor)] for tensor in tensors]))
        # In a list, so that their parameters are the network's only.
        self.layers: list[BayesianLayer] = layers

    @property
    def noise_size(self) -> int:
        return sum(layer.posterior.noise_size for layer in self.layers)

    def perturb(self, noise: Tensor) -> Tensor:
        parts = noise.split([layer.posterior.noise_size for layer in self.layers])
        return torch.cat([layer.posterior.perturb(part) for layer, part in zip(self.layers, parts, strict=True)])

    def entropy(self) -> Tensor:
        return torch.stack([layer.posterior.entropy() for layer in self.layers]).sum()

    def variance(self) -> Tensor:
        return torch.cat([layer.posterior.variance() for layer in self.layers])

    def draw_with_kl(self, prior: Prior) -> tuple[Tensor, Tensor]:
        found = [layer.posterior.draw_with_kl(layer.prior) for layer in self.layers]
        return torch.cat([sample for sample, _ in found]), torch.stack([kl for _, kl in found]).sum()

    def kl(self, prior: Prior, sample: Tensor) -> Tensor:
        parts = sample.split([layer.posterior.weights.size for layer in self.layers])
        terms = [layer.posterior.kl(layer.prior, part) for layer, part in zip(self.layers, parts, strict=True)]
        return torch.stack(terms).sum()

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers for tensor in layer.posterior.tensors]


class LayerPriors(Prior):
    """For each parameter the prior of the Bayesian layer that it belongs to.

    Args:
        network: A network with Bayesian layers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        self._by_name: dict[str, tuple[Prior, str]] = {}
        for layer in bayesian_layers(network):
            for slot in layer.posterior.weights.slots:
                self._by_name[names[id(slot.tensor)]] = layer.prior, slot.name

    def distribution(self, name: str, parameter: Tensor) -> Distribution:
        prior, local = self._by_name[name]
        return prior.distribution(local, parameter)

    def joint(self, named: Mapping[str, Tensor]) -> Distribution:
        raise BadInput("layers may have priors of different families; ask for those of single tensors")

    def _make(self, loc: Tensor, scale: Tensor) -> Distribution:
        raise BadInput("layers may have priors of different families; ask for those of single tensors")

    def __repr__(self) -> str:
        return "of each layer"
