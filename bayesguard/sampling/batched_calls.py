"""The calls of one network, made for all networks of its architecture at once.

Each call on a parameter is replaced by its batched form on the parameters of all members, stacked `[M, ...]`. Results
carry a leading axis of members, which the network's code does not see. A call that is not known here raises
`Unbatchable`: there is no guessing.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from bayesguard.sampling.memory_order import channels_last

# Where one tall product over all members was measured to be faster than M small ones (0.8 for 784 -> 64).
_MANY_INPUTS, _FEW_OUTPUTS = 256, 128

Step = Callable[[Tensor], Tensor]


class Unbatchable(Exception):
    """The networks cannot be run as one batched product; the message says why."""


class BatchedCalls(TorchFunctionMode):
    """Runs a network's calls for M members at a time.

    Args:
        stacked: `id` of each of the network's parameters and buffers -> those of all members, `[M, ...]`.
        count: M.
        random: Whether dropout is allowed, with masks of its own for each member.

    Attributes:
        steps: The calls as functions of one another's result, where the network is such a chain; None where not.
    """

    def __init__(self, stacked: Mapping[int, Tensor], count: int, *, random: bool = False) -> None:
        super().__init__()
        self.stacked, self.count, self.random = stacked, count, random
        self.steps: list[Step] | None = []
        # Marks the results; the mode itself would be held by them, and hold them.
        self._mark = object()
        self._last: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            raise Unbatchable(f"there is no batched form of {resolve_name(func) or func}")
        try:
            return handler(self, func, *args, **(kwargs or {}))
        except TypeError as error:  # A way of calling that the handler does not know.
            raise Unbatchable(f"{resolve_name(func)}: {error}") from error

    def run(self, network: nn.Module, x: Tensor) -> Tensor:
        """Return the outputs of all members `[M, N, ...]`."""
        self._last = x
        with self:
            outputs = network(x)
        if not isinstance(outputs, Tensor) or not self.is_batched(outputs):
            raise Unbatchable("the output is not a tensor that depends on the parameters")
        if outputs is not self._last:
            self.steps = None
        del outputs._members  # type: ignore[attr-defined]
        if outputs.dim() < 2 or outputs.shape[1] != x.shape[0]:
            raise Unbatchable("the first axis of the output is not that of the examples")
        return outputs

    def is_batched(self, value: Any) -> bool:
        """Tell whether a tensor has a leading axis of members."""
        return getattr(value, "_members", None) is self._mark

    def marked(self, tensor: Tensor) -> Tensor:
        """Note that a tensor has a leading axis of members."""
        tensor._members = self._mark  # type: ignore[attr-defined]
        return tensor

    def one_step(self, x: Tensor, step: Step) -> Tensor:
        """Run a step whose only argument that differs from pass to pass is `x`; the result is batched."""
        result = self.marked(step(x))
        if self.steps is not None and x is self._last:
            self.steps.append(step)
            self._last = result
        else:
            self.steps = None
        return result

    def plain(self, tensor: Any) -> Tensor:
        """Return a tensor that is neither batched nor a member's."""
        if not isinstance(tensor, Tensor) or self.is_batched(tensor) or id(tensor) in self.stacked:
            raise Unbatchable("a parameter is used in a way that has no batched form")
        return tensor

    def logical(self, tensor: Tensor) -> int:
        """Return the number of axes that the network's code sees."""
        return tensor.dim() - self.is_batched(tensor)

    def aligned(self, tensor: Tensor, axes: int) -> Tensor:
        """Return a tensor in the form that broadcasts with batched ones of `axes` axes beside that of the members."""
        if not self.is_batched(tensor) and id(tensor) not in self.stacked:
            if tensor.dim() > axes:
                raise Unbatchable("broadcasting would mix examples and members")
            return tensor
        own = self.stacked.get(id(tensor), tensor)
        return own.reshape(self.count, *[1] * (axes - own.dim() + 1), *own.shape[1:])


def _linear(mode: BatchedCalls, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    stacked, shift = mode.stacked.get(id(weight)), None if bias is None else mode.stacked.get(id(bias))
    if stacked is None or (bias is not None and shift is None) or id(input) in mode.stacked:
        raise Unbatchable("a linear layer's weight is not a parameter")
    if mode.logical(input) < 2:
        raise Unbatchable("a linear layer without an axis of examples")
    count = mode.count
    if mode.is_batched(input):
        return mode.one_step(input, _linear_step(stacked, shift))
    if (
        torch.is_grad_enabled()
        and input.dim() == 2
        and input.shape[1] >= _MANY_INPUTS
        and stacked.shape[1] <= _FEW_OUTPUTS
    ):
        return mode.one_step(input, lambda x: _shared_product(x, stacked, shift))
    step = _linear_step(stacked, shift)
    return mode.one_step(input, lambda x: step(x.expand(count, *x.shape)))


def _linear_step(weights: Tensor, shift: Tensor | None) -> Step:
    """Return `_product` with these weights as a function of its input; without gradients, their views are made once."""
    if torch.is_grad_enabled() or shift is None:
        return lambda x: _product(x, weights, shift)
    right, row = weights.transpose(1, 2), shift.unsqueeze(1)
    return lambda x: torch.baddbmm(row, x, right) if x.dim() == 3 else _product(x, weights, shift)


def _product(x: Tensor, weights: Tensor, shift: Tensor | None) -> Tensor:
    """Return `x @ weights' + shift` for each member, from `[M, ..., in]`, `[M, out, in]` and `[M, out]`.

    With the weights on the left their gradients come out in the order of memory that they have themselves (0.85 of
    the time of a training step); without gradients the other order is faster for few rows, and as fast for many.
    """
    if x.dim() != 3:
        flat = _product(x.reshape(len(x), -1, x.shape[-1]), weights, shift)
        return flat.reshape(*x.shape[:-1], flat.shape[-1])
    if not torch.is_grad_enabled():
        right = weights.transpose(1, 2)
        return torch.bmm(x, right) if shift is None else torch.baddbmm(shift.unsqueeze(1), x, right)
    columns = x.transpose(1, 2)
    rows = torch.bmm(weights, columns) if shift is None else torch.baddbmm(shift.unsqueeze(2), weights, columns)
    return rows.transpose(1, 2)


def _shared_product(x: Tensor, weights: Tensor, shift: Tensor | None) -> Tensor:
    """Return the same from inputs `[N, in]` that all members share: one product with all rows of all weights."""
    tall, columns = weights.flatten(0, 1), x.t()
    rows = tall @ columns if shift is None else torch.addmm(shift.reshape(-1, 1), tall, columns)
    return rows.unflatten(0, weights.shape[:2]).transpose(1, 2)


def _convolution(
    mode: BatchedCalls,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    stacked, shift = mode.stacked.get(id(weight)), None if bias is None else mode.stacked.get(id(bias))
    if stacked is None or (bias is not None and shift is None) or id(input) in mode.stacked:
        raise Unbatchable("a convolution's weight is not a parameter")
    if not mode.random or mode.logical(input) != 4:
        raise Unbatchable("convolutions are batched in training alone, and on images [N, C, H, W]")
    kernels, offset = stacked.flatten(0, 1), None if shift is None else shift.flatten()
    if mode.is_batched(input):
        images, groups = _as_channels(input), mode.count * groups
    elif groups == 1:
        # Inputs that members share need no groups: each output channel sees all of them.
        images = channels_last(input)
    else:
        raise Unbatchable("a convolution in groups of inputs that members share")
    return mode.marked(_as_members(func(images, kernels, offset, stride, padding, dilation, groups), mode.count))


def _pooling(mode: BatchedCalls, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not mode.is_batched(input):
        return func(mode.plain(input), *args, **kwargs)
    if mode.logical(input) != 4 or kwargs.get("return_indices"):
        raise Unbatchable("pooling of other than images [N, C, H, W], or with indices")
    return mode.marked(_as_members(func(_as_channels(input), *args, **kwargs), mode.count))


def _as_channels(x: Tensor) -> Tensor:
    """Return `[M, N, C, H, W]` as images `[N, M C, H, W]` with the channels last in memory."""
    return channels_last(x.movedim(0, 1).flatten(1, 2))


def _as_members(images: Tensor, count: int) -> Tensor:
    return images.unflatten(1, (count, -1)).movedim(1, 0)


def _elementwise(mode: BatchedCalls, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        raise Unbatchable(f"{resolve_name(func)} with several tensors has no batched form")
    if mode.is_batched(input):
        # F.relu is code in Python around torch.relu.
        is_plain_relu = func is F.relu and not any(args) and not any(kwargs.values())
        return mode.one_step(input, torch.relu if is_plain_relu else partial(_call, func, args, kwargs))
    if kwargs.get("inplace") or (args and func in _INPLACE):
        raise Unbatchable("an input is changed in place")
    if id(input) in mode.stacked:
        return mode.marked(func(mode.stacked[id(input)], *args, **kwargs))
    return func(input, *args, **kwargs)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Tensor:
    return func(x, *args, **kwargs)


def _binary(mode: BatchedCalls, func: Any, first: Any, second: Any, **kwargs: Any) -> Tensor:
    pair = (first, second)
    tensors = [value for value in pair if isinstance(value, Tensor)]
    if kwargs or not all(isinstance(value, (Tensor, int, float)) for value in pair):
        raise Unbatchable(f"{resolve_name(func)} with more than numbers and tensors has no batched form")
    if not any(mode.is_batched(value) or id(value) in mode.stacked for value in tensors):
        return func(first, second)
    axes = max(value.dim() if id(value) in mode.stacked else mode.logical(value) for value in tensors)
    left, right = (mode.aligned(value, axes) if isinstance(value, Tensor) else value for value in pair)
    return mode.marked(func(left, right))


def _dropout(
    mode: BatchedCalls, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if not training:
        return input
    if not mode.random:
        raise Unbatchable("dropout is on")
    # Whoever rests dropout for one pass would rest it for ever.
    mode.steps = None
    if mode.is_batched(input):
        return mode.marked(func(input, p, True, inplace))
    # Every member draws masks of its own.
    return mode.marked(func(mode.plain(input).expand(mode.count, *input.shape), p, True, False))


def _layer_norm(
    mode: BatchedCalls,
    func: Any,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = mode.logical(input)
    scale, shift = (None if value is None else mode.aligned(value, axes) for value in (weight, bias))
    if torch.is_grad_enabled():
        # These views of parameters are nodes of one pass's graph.
        mode.steps = None

    def step(x: Tensor) -> Tensor:
        result = F.layer_norm(x, tuple(normalized_shape), eps=eps)
        result = result if scale is None else result * scale
        return result if shift is None else result + shift

    if mode.is_batched(input):
        return mode.one_step(input, step)
    if scale is None:
        return func(mode.plain(input), normalized_shape, weight, bias, eps)
    return mode.one_step(mode.plain(input), step)


def _flatten(mode: BatchedCalls, func: Any, input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    if not mode.is_batched(input):
        return func(mode.plain(input), start_dim, end_dim)
    axes = mode.logical(input)
    start, end = (dim % axes + 1 for dim in (start_dim, end_dim))
    return mode.one_step(input, lambda x: x.flatten(start, end))


def _last_axes(mode: BatchedCalls, func: Any, input: Tensor, dim: int, *args: Any) -> Tensor:
    if not mode.is_batched(input):
        return func(mode.plain(input), dim, *args)
    axes = mode.logical(input)
    if not -axes < dim < axes or dim == 0:
        raise Unbatchable(f"{resolve_name(func)} on the axis of the examples, or beyond the last")
    axis = dim + (dim > 0)
    return mode.one_step(input, lambda x: func(x, axis, *args))


def _shape(mode: BatchedCalls, func: Any, input: Tensor, *args: Any) -> Any:
    shape = input.shape[mode.is_batched(input) :]
    return shape[args[0]] if args else shape


def _num_axes(mode: BatchedCalls, func: Any, input: Tensor) -> int:
    return mode.logical(input)


def _length(mode: BatchedCalls, func: Any, input: Tensor) -> int:
    return input.shape[int(mode.is_batched(input))]


def _same(mode: BatchedCalls, func: Any, input: Tensor) -> Any:
    return func(input)


# F.relu and its like take `inplace` by position as well.
_INPLACE = {F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.silu, F.mish, F.hardtanh, F.hardswish}
_UNARY: list[Any] = [*_INPLACE, F.gelu, F.softplus, F.logsigmoid, F.softsign, F.hardsigmoid, F.tanh, F.sigmoid]
_UNARY += [getattr(torch, name) for name in ("relu", "tanh", "sigmoid", "exp", "sin", "cos", "square", "abs", "neg")]
_UNARY += [getattr(Tensor, name) for name in ("relu", "tanh", "sigmoid", "exp", "sin", "cos", "square", "abs", "neg")]
_BINARY = [getattr(torch, name) for name in ("add", "sub", "mul", "div")]
_BINARY += [getattr(Tensor, name) for name in ("add", "sub", "mul", "div", "__add__", "__sub__", "__mul__")]
_BINARY += [getattr(Tensor, name) for name in ("__truediv__", "__radd__", "__rsub__", "__rmul__", "__rtruediv__")]
_GETTERS: list[Any] = [getattr(Tensor, name).__get__ for name in ("dtype", "device", "requires_grad")]

_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.dropout: _dropout,
    F.conv2d: _convolution,
    F.avg_pool2d: _pooling,
    torch.max_pool2d: _pooling,
    F.max_pool2d: _pooling,
    F.layer_norm: _layer_norm,
    torch.flatten: _flatten,
    Tensor.flatten: _flatten,
    Tensor.unflatten: _last_axes,
    Tensor.squeeze: _last_axes,
    Tensor.unsqueeze: _last_axes,
    Tensor.size: _shape,
    Tensor.dim: _num_axes,
    Tensor.__len__: _length,
    Tensor.shape.__get__: _shape,  # type: ignore[attr-defined]
    Tensor.ndim.__get__: _num_axes,  # type: ignore[attr-defined]
    Tensor.is_floating_point: _same,
    **dict.fromkeys(_GETTERS, _same),
    **dict.fromkeys(_UNARY, _elementwise),
    **dict.fromkeys(_BINARY, _binary),
}
