"""Bayesian layers of other libraries: an ordinary network with each dense and convolutional layer replaced by theirs."""

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from bayesguard.benchmarks.speed.peers import torch_uncertainty
from bayesguard.errors import BadInput


class Bayesian(NamedTuple):
    """A converted network, and its divergence from the prior as the library computes it."""

    network: nn.Module
    divergence: Callable[[], Tensor]


def by_bayesian_torch(network: nn.Module) -> dict[str, Bayesian]:
    """Its `dnn_to_bnn` with reparameterisation layers, and `get_kl_loss`."""
    models = import_module("bayesian_torch.models.dnn_to_bnn")
    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.6}
    converted = deepcopy(network)
    models.dnn_to_bnn(converted, {**settings, "type": "Reparameterization", "moped_enable": False})
    return {"bayesian-torch": Bayesian(converted, lambda: models.get_kl_loss(converted))}


def by_torch_uncertainty(network: nn.Module) -> dict[str, Bayesian]:
    """Its `BayesLinear` and `BayesConv2d`; the divergence is the sum over layers of `lprior` and `lvposterior`."""
    layers = torch_uncertainty("layers.bayesian")
    loss = torch_uncertainty("losses.bayesian").KLDiv
    converted = _replaced(network, layers.BayesLinear, layers.BayesConv2d)
    divergence = loss(converted)
    return {"torch-uncertainty": Bayesian(converted, divergence)}


def by_blitz(network: nn.Module) -> dict[str, Bayesian]:
    """Its `BayesianLinear` and `BayesianConv2d`, with a prior of one Gaussian where it has that."""
    modules = import_module("blitz.modules")
    kl = import_module("blitz.losses").kl_divergence_from_nn

    def convolution(before: int, after: int, kernel: tuple[int, int], **settings: Any) -> nn.Module:
        made: nn.Module = modules.BayesianConv2d(before, after, kernel, **settings)
        return made

    converted = _replaced(network, modules.BayesianLinear, convolution)
    return {"BLiTZ": Bayesian(converted, lambda: kl(converted))}


def _replaced(network: nn.Module, dense: Callable[..., nn.Module], convolution: Callable[..., nn.Module]) -> nn.Module:
    converted = deepcopy(network)
    found = 0
    for parent in list(converted.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, dense(layer.in_features, layer.out_features, bias=layer.bias is not None))
            elif isinstance(layer, nn.Conv2d):
                settings = {"stride": layer.stride, "padding": layer.padding, "bias": layer.bias is not None}
                made = convolution(layer.in_channels, layer.out_channels, layer.kernel_size, **settings)
                setattr(parent, name, made)
            else:
                continue
            found += 1
    if not found:
        raise BadInput("the network has no dense or convolutional layer")
    return converted


BAYESIAN = {"bayesian-torch": by_bayesian_torch, "torch-uncertainty": by_torch_uncertainty, "BLiTZ": by_blitz}
