"""Which of a module's parameters are random, as tensors by name and as one vector."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bayesguard.errors import BadInput

Subset = Literal["all", "last_layer"] | str | Sequence[str] | Callable[[str, Tensor], bool]


class Slot(NamedTuple):
    """Where a parameter is: its name, and the module that holds it under an attribute."""

    name: str
    owner: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is now."""
        tensor = self.owner._parameters[self.attribute]
        assert tensor is not None
        return tensor


class Weights:
    """Chosen parameters of a module, P numbers in all; a parameter that is used twice is there once.

    Args:
        module: The module.
        names: Names as in `module.named_parameters()`.

    Examples:
        >>> weights = Weights(nn.Linear(3, 2), ["weight", "bias"])
        >>> weights.size, {name: tuple(w.shape) for name, w in weights.unflatten(torch.zeros(8)).items()}
        (8, {'weight': (2, 3), 'bias': (2,)})
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.slots = [_slot(module, name) for name in names]
        self._shapes = [slot.tensor.shape for slot in self.slots]
        self._sizes = [slot.tensor.numel() for slot in self.slots]
        self.size = sum(self._sizes)

    @property
    def names(self) -> list[str]:
        """Their names, in order."""
        return [slot.name for slot in self.slots]

    def tensors(self) -> list[Tensor]:
        """Return the parameters as they are now."""
        return [slot.tensor for slot in self.slots]

    def check_in(self, network: nn.Module) -> None:
        """Raise BadInput where a network's parameters are no longer these: they would be taken for fixed numbers.

        Args:
            network: The module that the names are of.
        """
        for slot, shape in zip(self.slots, self._shapes, strict=True):
            *path, attribute = slot.name.split(".")
            owner: nn.Module | None = network
            for part in path:
                owner = None if owner is None else owner._modules.get(part)
            tensor = slot.owner._parameters.get(attribute)
            if owner is not slot.owner or tensor is None or tensor.shape != shape:
                raise BadInput(
                    f"parameter {slot.name!r} of the network is not the one that the distribution over weights is about: its "
                    "layer was replaced, or it has another shape, or is gone. Make a new predictor of the changed network; "
                    "numbers may change, and a parameter may be replaced by one of its shape"
                )

    def named(self) -> dict[str, Tensor]:
        """Return the parameters by name."""
        return {slot.name: slot.tensor for slot in self.slots}

    def flatten(self) -> Tensor:
        """Return all numbers as one vector `[P]`, differentiable."""
        return torch.cat([tensor.reshape(-1) for tensor in self.tensors()])

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return the parts of a vector `[..., P]`, each `[..., *shape]` of its parameter.

        One vector's parts lie in memory as the parameters do: with kernels of another order a convolution is slower.
        """
        leading = flat.shape[:-1]
        parts = flat.split(self._sizes, dim=-1)
        shaped = [part.view(*leading, *shape) for part, shape in zip(parts, self._shapes, strict=True)]
        if leading or torch._C._functorch.is_batchedtensor(flat):
            return shaped
        return [_in_order_of(slot.tensor, part) for slot, part in zip(self.slots, shaped, strict=True)]

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parts of a vector `[..., P]` by name, `[..., *shape]`."""
        return dict(zip(self.names, self.split(flat), strict=True))


def _in_order_of(parameter: Tensor, part: Tensor) -> Tensor:
    if parameter.dim() != 4 or parameter.stride() == part.stride():
        return part
    if parameter.is_contiguous():
        # With one channel both orders are one, and the strides alone tell kernels which is meant.
        return part.as_strided(part.shape, parameter.stride())
    return part.contiguous(memory_format=torch.channels_last)


def select_weights(network: nn.Module, subset: Subset = "all") -> list[str]:
    """Return the names of the parameters that are to be random: of those that require gradients.

    Args:
        network: The network.
        subset: "all"; "last_layer", the last module (in the order of definition) that has parameters of its own;
            names of parameters or of modules; or a predicate `(name, parameter) -> bool`.

    Raises:
        BadInput: A name that the network does not have, or nothing chosen.

    Examples:
        >>> select_weights(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), "last_layer")
        ['2.weight', '2.bias']
    """
    free = {name: p for name, p in network.named_parameters() if p.requires_grad and p.is_floating_point()}
    if callable(subset):
        chosen = [name for name, parameter in free.items() if subset(name, parameter)]
    elif subset == "all":
        chosen = list(free)
    elif subset == "last_layer":
        chosen = _under(free, [last_layer(network)])
    else:
        chosen = _named(network, free, [subset] if isinstance(subset, str) else list(subset))
    if not chosen:
        raise BadInput(
            f"subset_of_weights={subset!r} chooses no parameter that requires gradients; the network has "
            f"{', '.join(free) or 'none'}"
        )
    return chosen


def last_layer(network: nn.Module) -> str:
    """Return the name of the last module, in the order of definition, with trainable parameters of its own."""
    own = [
        name
        for name, module in network.named_modules()
        if any(p is not None and p.requires_grad for p in module._parameters.values())
    ]
    if not own:
        raise BadInput("the network has no module with trainable parameters, so no last layer")
    return own[-1]


def _named(network: nn.Module, free: Mapping[str, Tensor], wanted: list[str]) -> list[str]:
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    unknown = [name for name in wanted if name not in modules and name not in parameters]
    if unknown:
        raise BadInput(
            f"subset_of_weights names {', '.join(map(repr, unknown))}, which the network does not have; it has the "
            f"parameters {', '.join(parameters)}"
        )
    frozen = [name for name in wanted if name in parameters and name not in free]
    if frozen:
        raise BadInput(
            f"subset_of_weights names {', '.join(map(repr, frozen))}, which is frozen (requires_grad=False); a posterior "
            "is over parameters that are trained"
        )
    return [name for name in free if name in wanted or _under([name], [n for n in wanted if n in modules])]


def _under(names: Sequence[str] | Mapping[str, Tensor], modules: list[str]) -> list[str]:
    return [name for name in names if any(not module or name.startswith(f"{module}.") for module in modules)]


def _slot(module: nn.Module, name: str) -> Slot:
    owner, _, attribute = name.rpartition(".")
    return Slot(name, module.get_submodule(owner), attribute)
