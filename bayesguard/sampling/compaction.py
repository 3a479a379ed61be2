"""Dropped channels leave the products: with a mask shared by the batch, a linear layer needs only what is kept.

A dropout that drops whole channels gives a `Deferred` tensor: it says which channels are left, and computes its
numbers when somebody looks at them. A linear or convolution layer takes only the kept channels of it, and is deferred
in turn, so that of what the next dropout drops nothing is computed either: with p = 0.5 on both sides a quarter of
the product is left. Where the input does not depend on the draw and the layer is narrow, the layer is computed for
eight draws as one product with the eight masked weight matrices. Both give the plain result up to rounding.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from bayesguard.sampling.forward import dtype_of_autocast
from bayesguard.sampling.masks import Channels, Masks, PassesDiffer

Kernel = Callable[..., Any]

# A layer this many times narrower than its input is computed for eight draws at once.
_NARROW = 4

_CONVOLUTIONS: dict[Kernel, int] = {
    F.conv1d: 1,
    F.conv2d: 2,
    F.conv3d: 3,
}
_LINEAR: Kernel = F.linear

# f(0) = 0 and f(c x) = c f(x) for c > 0, channel by channel: these pass through a mask.
_HOMOGENEOUS: set[Kernel] = {F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_, F.leaky_relu}
_POOLS: set[Kernel] = {
    torch.max_pool1d,
    torch.max_pool2d,
    torch.max_pool3d,
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
}
# Number by number: these may be applied to the channels that are left once the next dropout is known.
_ELEMENTWISE: set[Kernel] = {
    *_HOMOGENEOUS,
    F.gelu,
    F.silu,
    F.elu,
    F.selu,
    F.celu,
    F.mish,
    F.softplus,
    F.hardswish,
    F.hardtanh,
    F.relu6,
    F.logsigmoid,
    F.tanh,
    torch.tanh,
    Tensor.tanh,
    F.sigmoid,
    torch.sigmoid,
    Tensor.sigmoid,
}
# Autocast leaves these in the dtype that they are given; on a CPU not max_pool3d, nor averages, for one.
_OF_ANY_DTYPE: set[Kernel] = {*_HOMOGENEOUS, torch.max_pool1d, torch.max_pool2d}
_FLATTEN: set[Kernel] = {torch.flatten, Tensor.flatten}


@dataclass(frozen=True)
class Kept:
    """A tensor of which some channels are zero: those that are not, before their scaling by 1 / (1 - rate)."""

    shape: torch.Size
    axis: int
    index: Tensor
    scale: float
    source: Tensor | None = None  # the whole tensor before the mask, where there is one
    version: int = 0  # of the source
    picked: Tensor | None = None  # its kept channels
    mask: Channels | None = None  # set while nothing was applied since the mask

    def values(self) -> Tensor:
        if self.picked is not None:
            return self.picked
        return _picked(self.unchanged_source(), self.axis, self.index)

    def unchanged_source(self) -> Tensor:
        assert self.source is not None
        if version_of(self.source) != self.version:
            raise PassesDiffer("what a dropout was applied to was changed in place before the result was used")
        return self.source

    def whole(self) -> Tensor:
        values = self.values()
        zeros = values.new_zeros(self.shape)
        return zeros.index_copy_(self.axis, self.index, values * self.scale)


@dataclass(frozen=True)
class Product:
    """A linear or convolution layer on kept channels, with what is applied to each number after it."""

    shape: torch.Size
    axis: int
    input: Kept
    func: Kernel
    weight: Tensor
    bias: Tensor | None
    options: tuple[Any, ...] = ()
    after: tuple[Callable[[Tensor], Tensor], ...] = ()
    autocast: torch.dtype | None = None  # where the layer was called, which may not be where its numbers are wanted

    def of(self, rows: Tensor | None) -> Tensor:
        """Return some of the output's channels, or all."""
        weight = self.weight if rows is None else self.weight.index_select(0, rows)
        weight = _picked(weight, 1, self.input.index).mul_(self.input.scale)
        bias = self.bias if rows is None or self.bias is None else self.bias.index_select(0, rows)
        values = self.input.values()
        with _autocast_to(self.autocast, values):
            result: Tensor = self.func(values, weight, bias, *self.options)
            for function in self.after:
                result = function(result)
        return result

    def whole(self) -> Tensor:
        return self.of(None)


class Deferred(Tensor):
    """A tensor whose numbers are computed when they are needed. To all code but ours it is an ordinary tensor."""

    part: Kept | Product | None
    computed: Tensor | None

    @staticmethod
    def __new__(cls, part: Kept | Product, like: Tensor, dtype: torch.dtype | None = None) -> "Deferred":
        self: Deferred = Tensor._make_wrapper_subclass(cls, part.shape, dtype=dtype or like.dtype, device=like.device)
        self.part, self.computed = part, None
        return self

    def value(self) -> Tensor:
        """Return the numbers, computed once."""
        if self.computed is None:
            assert self.part is not None
            self.computed = self.part.whole()
            self.part = None
        return self.computed

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        plain, named = pytree.tree_map_only(Deferred, Deferred.value, (args, kwargs or {}))
        result = func(*plain, **named)
        alias = func._schema.arguments[0].alias_info if func._schema.arguments else None
        # What was changed in place stays the same object for whoever holds it.
        return args[0] if alias is not None and alias.is_write else result


class Compaction:
    """What a pass does with masks of whole channels.

    Args:
        masks: The masks of the pass, those of one draw.
        products: Products with eight masked weight matrices, shared by the passes of one run.
    """

    def __init__(self, masks: Masks, products: dict[int, tuple[Any, Tensor]]) -> None:
        self.masks, self.products = masks, products

    def dropout(self, input: Tensor, rate: float, shape: Any) -> Tensor | None:
        """Return the dropped-out tensor, deferred; None where its mask is not one of channels."""
        if torch.is_grad_enabled():
            return None
        # Only what comes before every random call is the same in every draw.
        is_shared = not self.masks.calls
        mask = self.masks.channels(shape, rate, input.device)
        if mask is None:
            return None
        if not len(mask.kept):  # convolutions take no tensors without channels
            return torch.zeros(input.shape, dtype=input.dtype, device=input.device)
        part = _part_of(input)
        if isinstance(part, Product) and part.axis == mask.axis:
            kept = Kept(part.shape, part.axis, mask.kept, mask.scale, picked=part.of(mask.kept))
        else:
            source = input.value() if isinstance(input, Deferred) else input
            own = mask if is_shared else None
            version = version_of(source)
            kept = Kept(input.shape, mask.axis, mask.kept, mask.scale, source=source, version=version, mask=own)
        return Deferred(kept, input)

    def call(self, func: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the result of a call on a deferred tensor, deferred; None where the call needs its numbers."""
        input = args[0]
        part = _part_of(input)
        if part is None:
            return None
        if isinstance(part, Kept) and (func is _LINEAR or func in _CONVOLUTIONS):
            return self._layer(func, input, part, args[1:], kwargs)
        if func in _FLATTEN:
            return _flattened(input, part, args[1:], kwargs)
        if func in _ELEMENTWISE or func in _POOLS:
            return _applied(func, input, part, args[1:], kwargs)
        return None

    def _layer(
        self, func: Kernel, input: Deferred, part: Kept, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        call = _layer_arguments(func, args, kwargs)
        if call is None:
            return None
        weight, bias, options = call
        dtype = dtype_of_autocast(input.device)
        if dtype is not None and not {input.dtype, weight.dtype} <= {torch.float32, dtype}:
            return None
        spatial = _CONVOLUTIONS.get(func, 0)
        if part.axis != (1 if spatial else len(part.shape) - 1) or (spatial and len(part.shape) != spatial + 2):
            return None
        if func is _LINEAR:
            if part.mask is not None and _NARROW * weight.shape[0] <= weight.shape[1]:
                return self._for_eight_draws(part, part.mask, weight, bias)
            shape = torch.Size((*part.shape[:-1], weight.shape[0]))
        else:
            shape = func(_meta(part.shape, weight), weight[:, :1].to("meta"), None, *options).shape
        return Deferred(Product(shape, part.axis, part, func, weight, bias, options, autocast=dtype), input, dtype)

    def _for_eight_draws(self, part: Kept, mask: Channels, weight: Tensor, bias: Tensor | None) -> Tensor:
        source = part.unchanged_source()
        key = (mask.block, source, version_of(source), weight, version_of(weight))
        held = self.products.get(0)
        if held is None or not _same(held[0], key):
            factors = mask.factors(weight.dtype)
            masked = (weight * factors.unsqueeze(1)).flatten(0, 1)
            product = F.linear(source, masked).unflatten(-1, (len(factors), -1))
            held = self.products[0] = (key, product.movedim(-2, 0).contiguous())
        result = held[1][mask.position]
        return result.clone() if bias is None else result + bias.to(result.dtype)


def _autocast_to(dtype: torch.dtype | None, like: Tensor) -> AbstractContextManager[Any]:
    if dtype_of_autocast(like.device) == dtype:
        return nullcontext()
    return torch.autocast(like.device.type, dtype, enabled=dtype is not None)


def version_of(tensor: Tensor) -> int:
    """Return the number that an in-place change moves."""
    # Tensors made in inference mode have no counter, and refuse changes outside of it.
    return 0 if tensor.is_inference() else tensor._version


def _picked(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """Return what is kept of an axis."""
    if tensor.element_size() == 2 and tensor.stride(axis) == 1:
        # torch picks single numbers of two bytes one by one, six times as slow as those of four.
        return tensor.float().index_select(axis, index).to(tensor.dtype)
    return tensor.index_select(axis, index)


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(x is y if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


def _part_of(input: Any) -> Kept | Product | None:
    return input.part if type(input) is Deferred and input.computed is None else None


def _layer_arguments(
    func: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, tuple[Any, ...]] | None:
    """Return weight, bias and the other options of a layer's call; None for what has to be computed plainly."""
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    weight, bias = given.pop("weight", None), given.pop("bias", None)
    if type(weight) not in (Tensor, torch.nn.Parameter) or given.get("groups", 1) != 1 or not set(given) <= set(names):
        return None
    defaults: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1}
    options = () if func is _LINEAR else tuple(given.get(name, default) for name, default in defaults.items())
    return weight, bias, options


def _flattened(input: Deferred, part: Kept | Product, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Flatten kept channels `[N, C, ...]` into kept units `[N, C * ...]`."""
    bounds = {"start_dim": 0, "end_dim": -1} | dict(zip(("start_dim", "end_dim"), args, strict=False)) | kwargs
    last = bounds["end_dim"] % len(part.shape)
    if bounds["start_dim"] != 1 or last != len(part.shape) - 1 or part.axis != 1 or not isinstance(part, Kept):
        return None
    each = part.shape[2:].numel()
    index = (
        part.index
        if each == 1
        else (part.index.unsqueeze(1) * each + torch.arange(each, device=part.index.device)).flatten()
    )
    shape = torch.Size((part.shape[0], part.shape[1] * each))
    return Deferred(Kept(shape, 1, index, part.scale, picked=part.values().flatten(1)), input)


def _meta(shape: torch.Size, like: Tensor) -> Tensor:
    """Return a tensor without numbers, of one channel: enough to learn an output's size."""
    return torch.empty((shape[0], 1, *shape[2:]), dtype=like.dtype, device="meta")


def _applied(
    func: Kernel, input: Deferred, part: Kept | Product, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Apply a function of single numbers, or of single channels, to what is kept."""
    if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        return None
    options = {name: value for name, value in kwargs.items() if name != "inplace"}
    in_place = bool(kwargs.get("inplace")) or getattr(func, "__name__", "").endswith("_")

    def function(values: Tensor) -> Tensor:
        result: Tensor = func(values, *args, **options)
        return result

    shape, pools = part.shape, func in _POOLS
    if pools:
        if part.axis != 1 or len(part.shape) < 3:
            return None
        after = function(_meta(part.shape, input)).shape
        shape = torch.Size((after[0], part.shape[1], *after[2:]))
    elif any(isinstance(value, bool) for value in args):
        return None  # inplace=True by position
    if dtype_of_autocast(input.device) is not None and func not in _OF_ANY_DTYPE:
        return None
    new: Kept | Product
    if isinstance(part, Product):
        new = replace(part, shape=shape, after=(*part.after, function))
    elif pools or func in _HOMOGENEOUS:
        new = Kept(shape, part.axis, part.index, part.scale, picked=function(part.values()))
    else:
        return None
    if in_place:
        input.part = new
        return input
    return Deferred(new, input)
