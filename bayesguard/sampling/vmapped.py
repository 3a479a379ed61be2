"""Networks of one architecture under `vmap`: the code of one of them, on stacked parameters."""

import threading
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bayesguard.sampling.batched_calls import Unbatchable
from bayesguard.sampling.unchanged import unchanged


class VmappedMembers:
    """The outputs of networks that differ in their numbers only.

    Args:
        network: One of them, in eval mode.
        stacked: The parameters and buffers of all, `[M, ...]`, by name.
    """

    def __init__(self, network: nn.Module, stacked: Mapping[str, Tensor]) -> None:
        self._stacked = dict(stacked)
        # `functional_call` lends it the members' numbers: in a live member another thread would find foreign ones.
        self._skeleton = _Skeleton(network)
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs `[M, N, ...]`.

        Raises:
            Unbatchable: The network changes itself or its input.
            RuntimeError: It looks at its numbers, is random, or makes a call that `vmap` has no rule for.
        """

        def outputs(tensors: dict[str, Tensor]) -> Tensor:
            result: Tensor = functional_call(self._skeleton, tensors, (x,))
            return result

        # A network may write over its input where some numbers are in it, which the first pass did not see.
        x = x.clone()
        with self._lock:
            return torch.vmap(outputs)({f"network.{name}": own for name, own in self._stacked.items()}).contiguous()


class _Skeleton(nn.Module):
    """A copy of a network without its numbers; it watches the first pass for what would be lost with a copy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # What is in the memo is not copied.
        memo: dict[int, Any] = {id(own): _shape_of(own) for own in (*network.parameters(), *network.buffers())}
        self.network = deepcopy(network, memo)
        self.is_watched = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_watched:
            outputs: Tensor = self.network(x)
            return outputs
        version = x._version
        with unchanged(self.network):
            outputs = self.network(x)
        if x._version != version:
            raise Unbatchable("the network changes its input in place")
        self.is_watched = False
        return outputs


def _shape_of(tensor: Tensor) -> Tensor:
    bare = tensor.detach().to("meta")
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
