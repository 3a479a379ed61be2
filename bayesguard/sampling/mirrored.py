"""Layers on a network's own inputs, under two samples of their weights that lie mirrored about the parameters.

A layer is affine in its weights and biases together. Where two samples are M + D and M - D, its outputs under the second
are twice those under M less those under the first; and those under M are the same for all pairs, where its input is.
Half the products of such layers, less one, are left.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesguard.sampling.estimators import LAYERS, layer_arguments
from bayesguard.sampling.random_weights import Handler

Place = Literal["first", "second", "alone"]


class MirroredPairs:
    """Handlers of `RandomWeights` for one network and one batch, draw after draw.

    Only layers that take one of the inputs, or a view of one, are computed in this way: what the network computed from
    other random weights differs from draw to draw.

    Args:
        inputs: The network's inputs; they have to stay as they are.

    Attributes:
        used: Whether any layer was computed in this way.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        self._inputs = {_memory(tensor): tensor for tensor in inputs if _memory(tensor)}
        self._at_mean: dict[Any, Tensor] = {}
        self._of_second: dict[Any, Tensor] = {}
        self.used = False

    def handlers(self, samples: dict[int, Tensor], place: Place) -> dict[Any, Handler]:
        """Return the handlers of one draw.

        Args:
            samples: A sample for each `id(parameter)`.
            place: Whether the draw is the first of a pair, the second, whose first was the draw before, or neither.
        """
        if place != "second":
            self._of_second.clear()
        if place == "alone":
            return {}

        def handler(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, weight, bias, more, rest = layer_arguments(args, kwargs)
            # A bias that was computed need not be affine in the weights.
            if id(weight) not in samples or not (bias is None or isinstance(bias, nn.Parameter)):
                return NotImplemented
            if _memory(x) not in self._inputs:
                return NotImplemented
            where = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
            key = (func, id(weight), id(bias), where, repr((more, rest)))
            if place == "second":
                return self._of_second.pop(key, NotImplemented)
            if key not in self._at_mean:
                self._at_mean[key] = func(x, weight, bias, *more, **rest)
            outputs = func(x, samples[id(weight)], samples.get(id(bias), bias), *more, **rest)
            # Made now: the network may write over the outputs that it gets.
            self._of_second[key] = self._at_mean[key] + (self._at_mean[key] - outputs)
            self.used = True
            return outputs

        return dict.fromkeys(LAYERS, handler)


def _memory(tensor: Tensor) -> int | None:
    """Return where a tensor's memory is; None for one without memory, or without a count of its changes."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_inference():
        return None
    return tensor.untyped_storage().data_ptr()
