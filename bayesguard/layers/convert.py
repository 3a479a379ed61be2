"""An ordinary network as one of Bayesian layers, with an account of what became of each of its parts."""

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bayesguard.errors import UnsupportedNetwork
from bayesguard.layers.base import at_mean, bayesian_layers
from bayesguard.layers.torch_layers import BY_TYPE
from bayesguard.priors import Prior
from bayesguard.sampling.estimators import Estimator, check_estimator


class Conversion(NamedTuple):
    """What `convert` made, and what of.

    Its `network` is the copy; `converted` has the names of the layers that are Bayesian now, each with its type, and `left`
    those of the modules with parameters that stayed as they were, each with the reason.
    """

    network: nn.Module
    converted: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name or '(root)'}: {kind}" for name, kind in self.converted.items()]
        return "\n".join(lines + [f"{name or '(root)'}: left as it was, {why}" for name, why in self.left.items()])


def convert(
    network: nn.Module,
    *,
    prior: Prior | None = None,
    posterior: str = "normal",
    estimator: Estimator = "shared",
    init_scale: float = 0.01,
    relative: bool = False,
    subset: Callable[[str, nn.Module], bool] | None = None,
    example_inputs: tuple[Any, ...] | None = None,
) -> Conversion:
    """Return a copy of a network whose layers have distributions over their weights.

    Device, dtype, padding mode, groups, hooks and modes stay, since a layer is the same object of another class. With
    `relative=True` and an `Informed` prior of each layer's own network this is the start of MOPED (Krishnan et al., 2020).

    Args:
        network: The network; it is left as it is.
        prior: Prior of every layer; None for `priors.Normal(1.0)`.
        posterior: Family of every layer's posterior.
        estimator: For layers that it covers; the others draw one shared sample.
        init_scale: First standard deviation of a weight.
        relative: `init_scale` is a share of each weight's size instead.
        subset: `(name, module) -> bool`: which layers to convert; None for all.
        example_inputs: Positional inputs on which the copy at its mean has to give the network's own output.

    Raises:
        UnsupportedNetwork: There is nothing to convert, or the copy at its mean answers otherwise.

    Examples:
        >>> made = convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
        >>> print(made)
        0: Linear
        2: Linear
        1: left as it was, there is no Bayesian BatchNorm1d
    """
    check_estimator(estimator)
    copy = deepcopy(network)
    tied = _tied(copy)
    converted: dict[str, str] = {}
    left: dict[str, str] = {}
    inside: list[str] = []
    for name, module in list(copy.named_modules()):
        if any(name.startswith(f"{outer}.") for outer in inside) or not _has_own(module):
            continue
        if why := _why_not(name, module, tied, subset):
            left[name] = why
            continue
        kind = BY_TYPE[type(module)]
        module.__class__ = kind
        covered: Estimator = "shared" if kind.only_shared else estimator
        module.make_bayesian(prior, posterior, covered, init_scale, relative)
        converted[name] = kind.__name__
        inside.append(name)
    if not converted:
        raise UnsupportedNetwork(
            f"network has no layer to convert; {'; '.join(left.values()) or 'it has no parameters'}"
        )
    _check_same(network, copy, example_inputs)
    return Conversion(copy, converted, left)


def _has_own(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _why_not(name: str, module: nn.Module, tied: set[int], subset: Callable[[str, nn.Module], bool] | None) -> str:
    if type(module) not in BY_TYPE:
        return f"there is no Bayesian {type(module).__name__}"
    if subset is not None and not subset(name, module):
        return "it is not in the subset"
    own = list(module.parameters())
    if not any(parameter.requires_grad for parameter in own):
        return "its parameters are frozen"
    if any(id(parameter) in tied for parameter in own):
        return "it shares a parameter with another layer (bayesguard.Variational samples such a parameter once)"
    return ""


def _tied(network: nn.Module) -> set[int]:
    uses = Counter(id(p) for module in network.modules() for p in module._parameters.values() if p is not None)
    return {parameter for parameter, count in uses.items() if count > 1}


@torch.no_grad()
def _check_same(network: nn.Module, copy: nn.Module, inputs: tuple[Any, ...] | None) -> None:
    """Raise UnsupportedNetwork unless the copy has the network's numbers and, on given inputs, its output."""
    own = copy.state_dict()
    for name, tensor in network.state_dict().items():
        if not torch.equal(own[name], tensor):
            raise UnsupportedNetwork(f"the copy has other numbers in {name}")
    if inputs is None:
        return
    outputs = []
    for module in (network, copy):
        evaluated = deepcopy(module).eval()
        with at_mean():
            outputs.append(pytree.tree_leaves(evaluated(*inputs)))
    for want, got in zip(*outputs, strict=True):
        if isinstance(want, Tensor) and not torch.allclose(got, want, rtol=1e-5, atol=1e-6):
            layers = ", ".join(type(layer).__name__ for layer in bayesian_layers(copy))
            raise UnsupportedNetwork(f"the copy at its mean answers otherwise than the network; it has {layers}")
