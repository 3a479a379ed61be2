"""A network under other weights than its own, by intercepting calls: no parameter is ever replaced or written.

A function mode sees every call that takes a random parameter, in this thread only, and hands it the sample instead, so
that any network works, tied parameters stay tied, and autocast caches nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Handler = Callable[..., Any]


class RandomWeights(TorchFunctionMode):
    """Replaces parameters by samples in every call.

    Args:
        samples: What stands for each parameter: `id(parameter)` and a tensor of its shape.
        handlers: Functions that compute a call otherwise, by the function that is called: `(func, args, kwargs)` to a
            result, or `NotImplemented`.

    Attributes:
        used: Whether any call took a random parameter.
    """

    def __init__(self, samples: Mapping[int, Tensor], handlers: Mapping[Any, Handler] | None = None) -> None:
        super().__init__()
        self.samples, self.handlers = samples, handlers or {}
        self.used = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = self.handlers.get(func)
        if handler is not None:
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                self.used = True
                return result
        if func is F.embedding and (padding := _padding(*args, **kwargs)) is not None:
            rows = func(*map(self._replaced, args), **{name: self._replaced(value) for name, value in kwargs.items()})
            return torch.where(padding.mask.unsqueeze(-1), padding.row, rows)
        args = tuple(self._replaced(value) for value in args)
        if kwargs:
            kwargs = {name: self._replaced(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            sample = self.samples.get(id(value))
            if sample is None:
                return value
            self.used = True
            return sample
        # Recurrent kernels take their weights as a list, `torch.cat` and `torch.stack` any of them.
        if type(value) in (list, tuple) and value and isinstance(value[0], Tensor):
            return type(value)(self._replaced(item) for item in value)
        return value


class _Padding(NamedTuple):
    """Which places of an embedding's input are padding, and the fixed row that stands for them."""

    mask: Tensor
    row: Tensor


def _padding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *more: Any, **kwargs: Any
) -> _Padding | None:
    """The padding row of a table is never trained, so that a distribution over it would be the prior's noise."""
    if padding_idx is None:
        return None
    index = padding_idx % len(weight)
    return _Padding(input == index, weight[index].detach())
