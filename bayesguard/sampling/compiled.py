"""A group of draws as one compiled graph: on request, and only where it gives the plain loop's draws.

The network runs once under `vmap` over the draws while its operations are recorded, with the masks as inputs of the
recorded graph; `torch.compile` makes code of that graph. A network that looks at numbers (`.item()`, `if x.sum() > 0`)
cannot be recorded, and is not compiled. What the recording took for constant is looked at again before every use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bayesguard.sampling.build import build_of
from bayesguard.sampling.forward import Forward

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Graph:
    """A compiled pass and what it took for constant."""

    run: Callable[[list[Tensor]], Tensor]
    constants: tuple[Any, ...]


def compile_pass(forward: Forward, keeps: Sequence[Tensor], run: Run) -> Graph:
    """Record `run(forward, *keeps)` and compile it.

    Raises:
        RuntimeError: The network cannot be recorded, or there is no compiler.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    leaves, spec = pytree.tree_flatten((forward.inputs, forward.kwargs))
    where = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def function(tensors: list[Tensor]) -> Tensor:
        own = list(leaves)
        for index, tensor in zip(where, tensors, strict=False):
            own[index] = tensor
        inputs, kwargs = pytree.tree_unflatten(own, spec)
        return run(Forward(forward.network, inputs, kwargs, forward.select), *tensors[len(where) :])

    recorded = make_fx(function)(graph_inputs(forward, keeps))
    return Graph(torch.compile(recorded, dynamic=False), constants_of(forward))


def graph_inputs(forward: Forward, keeps: Sequence[Tensor]) -> list[Tensor]:
    """Return what a graph is called with: the input's tensors, then the masks."""
    leaves = pytree.tree_leaves((forward.inputs, forward.kwargs))
    return [*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *keeps]


def constants_of(forward: Forward) -> tuple[Any, ...]:
    """Return what a recording holds of the network and of the inputs that are no tensors.

    Parameters and buffers are held as objects, so that changes in place are followed; here they are told by their
    identity and their storage's type.
    """
    leaves = pytree.tree_leaves((forward.inputs, forward.kwargs))
    plain = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    tensors = [*forward.network.parameters(), *forward.network.buffers()]
    held = [(id(tensor), tensor.dtype, tensor.device) for tensor in tensors]
    return (*plain, *held, *build_of(forward.network))
