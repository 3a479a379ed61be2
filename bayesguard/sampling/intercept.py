"""Dropout switched on by intercepting calls, never by flipping module flags.

A function mode sees every dropout, attention and recurrent kernel that the network calls, in this thread only, and
supplies the masks. No module changes its mode, so batch statistics stay put and nothing has to be restored.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bayesguard.errors import BadInput
from bayesguard.sampling.compaction import Compaction, Deferred
from bayesguard.sampling.kernels import attention, multi_head_attention, recurrent
from bayesguard.sampling.masks import MaskSource, PassesDiffer

Kernel = Callable[..., Any]
Handler = Callable[..., Any]

# alpha' = -lambda * alpha of SELU: the value that a dropped unit takes (Klambauer et al. 2017, NeurIPS, section 3).
_ALPHA = -1.7580993408473766
_UNBATCHED_DIM = {F.dropout1d: 2, F.dropout3d: 4}

# Random calls that carry no `training` flag: where a network makes one, its passes differ by themselves.
RANDOM_CALLS = frozenset(
    (
        "rand",
        "randn",
        "randint",
        "rand_like",
        "randn_like",
        "randint_like",
        "randperm",
        "bernoulli",
        "bernoulli_",
        "normal",
        "normal_",
        "uniform_",
        "multinomial",
        "poisson",
        "exponential_",
        "cauchy_",
        "geometric_",
        "log_normal_",
        "random_",
        "gumbel_softmax",
        "fractional_max_pool2d",
        "fractional_max_pool2d_with_indices",
        "fractional_max_pool3d",
        "fractional_max_pool3d_with_indices",
    )
)

# Calls that give Python a number: what it does with that holds for all rows of the batch.
_HOST_READS = frozenset(
    (
        *("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"),
        *("equal", "allclose", "is_nonzero"),
    )
)


class Intercept(TorchFunctionMode):
    """Supplies the masks of every dropout, attention and recurrent kernel called in this thread.

    Args:
        masks: Where the masks come from.
        selected: Names of the layers whose dropout is wanted; None for all.
        compaction: What to do with masks of whole channels; None to multiply with them.
        spared: Dropout in place writes over its input, unless that lies in one of these storages; None: it never does.
        is_whole: Whether the pass is that of one draw over all rows, so that numbers which the network reads from its
            tensors are those that it would read in a loop.
    """

    def __init__(
        self,
        masks: MaskSource,
        selected: frozenset[str] | None = None,
        compaction: Compaction | None = None,
        *,
        spared: frozenset[int] | None = None,
        is_whole: bool = True,
    ) -> None:
        super().__init__()
        self.spared, self.is_whole = spared, is_whole
        self.drops_in_place = False
        self.masks = masks
        self.selected = selected
        self.compaction = compaction
        self.own_randomness = False

    def __torch_function__(
        self, func: Kernel, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call, with masks where it is a random one."""
        handler = HANDLERS.get(func)
        if handler is not None and self.is_selected():
            return handler(self, func, *args, **kwargs)
        if self.compaction is not None and args and type(args[0]) is Deferred:
            result = self.compaction.call(func, args, kwargs)
            if result is not None:
                return result
        name = getattr(func, "__name__", "")
        if name in RANDOM_CALLS:
            self.own_randomness = True
        elif name in _HOST_READS and not self.is_whole and self.masks.is_spread:
            raise PassesDiffer("it reads numbers from its tensors, and would read others from a batch of its own")
        return func(*args, **kwargs)

    def once(self, compute: Callable[[], Any]) -> Any:
        """Compute what a random call needs and what no draw changes; a replayed pass has it already."""
        return compute()

    def in_place(self, input: Tensor, result: Tensor) -> Tensor:
        """Return the result of a dropout in place, written over its input where the network looks at that again."""
        self.drops_in_place = True
        if self.spared is None or input.untyped_storage().data_ptr() in self.spared:
            return result
        return input.copy_(result)

    def is_random(self, func: Kernel) -> bool:
        """Tell whether a call may be random, so that a recorded prefix has to end before it."""
        return func in HANDLERS or getattr(func, "__name__", "") in RANDOM_CALLS

    def is_selected(self) -> bool:
        """Tell whether dropout is wanted where the network is now."""
        return self.selected is None or any(name in self.selected for name in running_layers())


def _dropout(mode: Intercept, func: Kernel, input: Tensor, p: float = 0.5, *flags: Any, **more: Any) -> Tensor:
    result = _masked(mode, input, mode.masks.rate(p, module=True), input.shape)
    return mode.in_place(input, result) if _is_in_place(func, flags, more) else result


def _feature_dropout(mode: Intercept, func: Kernel, input: Tensor, p: float = 0.5, *flags: Any, **more: Any) -> Tensor:
    result = _masked(mode, input, mode.masks.rate(p, module=True), _feature_shape(func, input))
    return mode.in_place(input, result) if _is_in_place(func, flags, more) else result


def _is_in_place(func: Kernel, flags: tuple[Any, ...], more: dict[str, Any]) -> bool:
    """Tell whether a dropout was asked to write over its input; `flags` are `training` and `inplace`."""
    return func.__name__.endswith("_") or bool(more.get("inplace", flags[1] if len(flags) > 1 else False))


def _feature_shape(func: Kernel, input: Tensor) -> list[int]:
    leading = 1 if input.dim() == _UNBATCHED_DIM.get(func) else 2
    return [*input.shape[:leading], *(1 for _ in input.shape[leading:])]


def _masked(mode: Intercept, input: Tensor, rate: float, shape: Any) -> Tensor:
    check_rate(rate)
    if rate == 0:
        return input
    if mode.compaction is not None:
        deferred = mode.compaction.dropout(input, rate, shape)
        if deferred is not None:
            return deferred
    # Out of place: the mask of a dropout in place would compound in a replayed prefix.
    return mode.masks.multiply(input, rate, shape)


def _alpha_dropout(mode: Intercept, func: Kernel, input: Tensor, p: float = 0.5, *flags: Any, **more: Any) -> Tensor:
    result = _alpha_masked(mode.masks, input, mode.masks.rate(p, module=True), input.shape)
    return mode.in_place(input, result) if _is_in_place(func, flags, more) else result


def _feature_alpha_dropout(
    mode: Intercept, func: Kernel, input: Tensor, p: float = 0.5, *flags: Any, **more: Any
) -> Tensor:
    result = _alpha_masked(mode.masks, input, mode.masks.rate(p, module=True), _feature_shape(func, input))
    return mode.in_place(input, result) if _is_in_place(func, flags, more) else result


def _alpha_masked(masks: MaskSource, input: Tensor, rate: float, shape: Any) -> Tensor:
    check_rate(rate)
    if rate == 0:
        return input
    if rate == 1:
        masks.keep(shape, rate, input.device)
        return torch.zeros_like(input)
    scale = ((1 - rate) * (1 + rate * _ALPHA**2)) ** -0.5
    dropped = input.new_full((), _ALPHA)
    return scale * torch.where(masks.keep(shape, rate, input.device), input, dropped) - scale * _ALPHA * rate


def check_rate(rate: float) -> None:
    """Raise BadInput unless a drop rate lies in [0, 1]."""
    if not 0 <= rate <= 1:
        raise BadInput(f"a dropout has p={rate}; a drop rate must lie in 0..1")


HANDLERS: dict[Kernel, Handler] = {
    F.dropout: _dropout,
    torch.dropout: _dropout,
    torch.dropout_: _dropout,
    F.dropout1d: _feature_dropout,
    F.dropout2d: _feature_dropout,
    F.dropout3d: _feature_dropout,
    torch.feature_dropout: _feature_dropout,
    torch.feature_dropout_: _feature_dropout,
    F.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout_: _alpha_dropout,
    F.feature_alpha_dropout: _feature_alpha_dropout,
    torch.feature_alpha_dropout: _feature_alpha_dropout,
    torch.feature_alpha_dropout_: _feature_alpha_dropout,
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head_attention,
    torch.lstm: recurrent,
    torch.gru: recurrent,
    torch.rnn_tanh: recurrent,
    torch.rnn_relu: recurrent,
}


class _Running(threading.local):
    """What this thread is in: the marked layers, and the mode that DropPath modules ask for masks."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.mode: Intercept | None = None


_RUNNING = _Running()


def running_layers() -> list[str]:
    """Return the names of the marked layers that this thread is inside of."""
    return _RUNNING.layers


@contextmanager
def intercepted(mode: Intercept) -> Iterator[None]:
    """Run a block with `mode` on, known also to the modules that drop whole paths."""
    before, _RUNNING.mode = _RUNNING.mode, mode
    try:
        with mode:
            yield
    finally:
        _RUNNING.mode = before


def mark_layers(network: nn.Module, names: frozenset[str]) -> None:
    """Have `network` say when it is inside one of the named layers."""
    for name in names:
        layer = network.get_submodule(name)
        layer.register_forward_pre_hook(_Enter(name))
        layer.register_forward_hook(_leave, always_call=True)


class _Enter:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: Any) -> None:
        _RUNNING.layers.append(self.name)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    _RUNNING.layers.pop()


def watch_drop_paths(network: nn.Module) -> None:
    """Give stochastic-depth modules, whose gate is a flag that no mode can see, their masks by a hook."""
    for module in network.modules():
        if type(module).__name__ in {"DropPath", "StochasticDepth"}:
            module.register_forward_hook(_drop_path)


def _drop_path(module: nn.Module, args: Any, output: Any) -> Any:
    mode = _RUNNING.mode
    if mode is None or module.training or not isinstance(output, Tensor) or not mode.is_selected():
        return None
    own = getattr(module, "drop_prob", getattr(module, "p", 0.0)) or 0.0
    rate = mode.masks.rate(float(own), module=True)
    whole_batch = getattr(module, "mode", "row") == "batch"
    shape = [1 if whole_batch else output.shape[0], *(1 for _ in output.shape[1:])]
    # Scaled like the published DropPath: what is kept is divided by the keep rate unless the module says not to.
    scaled = _masked(mode, output, rate, shape)
    return scaled if getattr(module, "scale_by_keep", True) else scaled * (1 - rate)
