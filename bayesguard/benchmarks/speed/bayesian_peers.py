"""Variational inference in other libraries, for an ordinary network.

Three replace each dense and convolutional layer by one of theirs; two sample all weights of the network as it is.
"""

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesguard.benchmarks.speed.peers import torch_uncertainty
from bayesguard.errors import BadInput


class Bayesian(NamedTuple):
    """A network with new weights at each call, and its negative evidence bound over the number of data.

    The divergence from the prior in it is as the library computes it. Called as `loss(inputs, targets, num_data)`.
    """

    network: nn.Module
    loss: Callable[[Tensor, Tensor, int], Tensor]


def by_bayesian_torch(network: nn.Module) -> dict[str, Bayesian]:
    """Its `dnn_to_bnn` with reparameterisation layers, and `get_kl_loss`."""
    models = import_module("bayesian_torch.models.dnn_to_bnn")
    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.6}
    converted = deepcopy(network)
    models.dnn_to_bnn(converted, {**settings, "type": "Reparameterization", "moped_enable": False})
    return {"bayesian-torch": _by_layers(converted, lambda: models.get_kl_loss(converted))}


def by_torch_uncertainty(network: nn.Module) -> dict[str, Bayesian]:
    """Its `BayesLinear` and `BayesConv2d`; the divergence is the sum over layers of `lprior` and `lvposterior`."""
    layers = torch_uncertainty("layers.bayesian")
    loss = torch_uncertainty("losses.bayesian").KLDiv
    converted = _replaced(network, layers.BayesLinear, layers.BayesConv2d)
    return {"torch-uncertainty": _by_layers(converted, loss(converted))}


def by_blitz(network: nn.Module) -> dict[str, Bayesian]:
    """Its `BayesianLinear` and `BayesianConv2d`, with a prior of one Gaussian where it has that."""
    modules = import_module("blitz.modules")
    kl = import_module("blitz.losses").kl_divergence_from_nn

    def convolution(before: int, after: int, kernel: tuple[int, int], **settings: Any) -> nn.Module:
        made: nn.Module = modules.BayesianConv2d(before, after, kernel, **settings)
        return made

    converted = _replaced(network, modules.BayesianLinear, convolution)
    return {"BLiTZ": _by_layers(converted, lambda: kl(converted))}


def by_posteriors(network: nn.Module) -> dict[str, Bayesian]:
    """The bound of its `vi.diag`, and its `diag_normal_sample`."""
    library = import_module("posteriors")
    normals = _Normals(network, library.diag_normal_sample)
    drawn = _Drawn(network, normals)

    def loss(inputs: Tensor, targets: Tensor, num_data: int) -> Tensor:
        def log_posterior(weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            outputs = torch.func.functional_call(drawn.network, weights, (batch[0],))
            likelihood = -nn.functional.cross_entropy(outputs, batch[1])
            return likelihood + library.diag_normal_log_prob(weights) / num_data, outputs

        means, scales = normals.moments()
        bound: Tensor = library.vi.diag.nelbo(means, scales, (inputs, targets), log_posterior, 1 / num_data)[0]
        return bound

    return {"posteriors": Bayesian(drawn, loss)}


def by_pyro(network: nn.Module) -> dict[str, Bayesian]:
    """Its `Trace_ELBO` with an `AutoNormal` guide over all weights."""
    pyro, infer = import_module("pyro"), import_module("pyro.infer")
    plain = deepcopy(network)
    prior = {
        name: pyro.distributions.Normal(torch.zeros_like(value), 1.0).to_event(value.dim())
        for name, value in plain.named_parameters()
    }

    def model(inputs: Tensor | None = None, targets: Tensor | None = None, num_data: int = 1) -> None:
        weights = {name: pyro.sample(name, distribution) for name, distribution in prior.items()}
        if inputs is not None:
            logits = torch.func.functional_call(plain, weights, (inputs,))
            with pyro.poutine.scale(scale=num_data / len(inputs)), pyro.plate("rows", len(inputs)):
                pyro.sample("targets", pyro.distributions.Categorical(logits=logits), obs=targets)

    # The store of parameters is global, and would give a guide those of the network before by their names.
    pyro.clear_param_store()
    guide = infer.autoguide.AutoNormal(model, init_scale=0.01)
    guide()  # makes its parameters
    bound = infer.Trace_ELBO().differentiable_loss
    drawn = _Drawn(plain, guide)
    return {
        "Pyro": Bayesian(
            drawn, lambda inputs, targets, num_data: bound(model, guide, inputs, targets, num_data) / num_data
        )
    }


class _Drawn(nn.Module):
    """A network under the weights by name that a module returns at each call."""

    def __init__(self, network: nn.Module, weights: nn.Module) -> None:
        super().__init__()
        self.network, self.weights = deepcopy(network).requires_grad_(False), weights

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(self.network, self.weights(), (inputs,))


class _Normals(nn.Module):
    """Independent normal weights."""

    def __init__(self, network: nn.Module, sample: Callable[..., dict[str, Tensor]]) -> None:
        super().__init__()
        self._sample = sample
        self._names = [name for name, _ in network.named_parameters()]
        self.means = nn.ParameterList([value.detach().clone() for value in network.parameters()])
        self.log_scales = nn.ParameterList([torch.full_like(value, -4.6) for value in self.means])

    def moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        scales = [value.exp() for value in self.log_scales]
        return dict(zip(self._names, self.means, strict=True)), dict(zip(self._names, scales, strict=True))

    def forward(self) -> dict[str, Tensor]:
        return self._sample(*self.moments())


def _by_layers(network: nn.Module, divergence: Callable[[], Tensor]) -> Bayesian:
    def loss(inputs: Tensor, targets: Tensor, num_data: int) -> Tensor:
        return nn.functional.cross_entropy(network(inputs), targets) + divergence() / num_data

    return Bayesian(network, loss)


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


BAYESIAN = {
    "bayesian-torch": by_bayesian_torch,
    "torch-uncertainty": by_torch_uncertainty,
    "BLiTZ": by_blitz,
    "posteriors": by_posteriors,
    "Pyro": by_pyro,
}
