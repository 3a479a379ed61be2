"""One network with its inputs, ready to be called: on all rows, on some, or on the same rows several times."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bayesguard.errors import BadInput, BadType, BayesguardError, UnsupportedNetwork

Select = str | int | Callable[[Any], Tensor] | None


class Forward:
    """A network's call on given inputs.

    Args:
        network: The module to call.
        inputs: Positional inputs; tensors whose first axis is that of the examples are cut with it.
        kwargs: Keyword inputs, likewise.
        select: Which part of the output to take: a key, an index or a callable.
        copies: Every call gets copies of the inputs, for a network that changes them in place.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
        select: Select = None,
        *,
        copies: bool = False,
    ) -> None:
        self.copies = copies
        self.network, self.inputs, self.kwargs, self.select = network, tuple(inputs), dict(kwargs), select
        self.num_rows = self._count_rows()

    def __call__(self) -> Tensor:
        outputs = self.unchecked()
        if outputs.dim() == 0 or outputs.shape[0] != self.num_rows:
            raise BadInput(
                f"the network's output has shape {tuple(outputs.shape)} for {self.num_rows} examples; "
                "its first axis must be that of the examples"
            )
        return outputs

    def unchecked(self) -> Tensor:
        """Return the outputs, whatever their number of rows."""
        inputs, kwargs = self._copied() if self.copies else (self.inputs, self.kwargs)
        try:
            output = self.network(*inputs, **kwargs)
        except (RuntimeError, TypeError) as error:
            if isinstance(error, (BayesguardError, torch.OutOfMemoryError)):
                raise
            if (why := self._misfit(str(error))) is not None:
                raise BadType(f"{why}: {error}") from error
            if not getattr(error, "__notes__", None):
                error.add_note(self._described())
            raise
        return select_output(output, self.select)

    def _described(self) -> str:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors())
        few = "; bayesguard tries a network on a few rows before it takes all" if self.num_rows < 4 else ""
        return f"the network was called on inputs of shape {shapes}{few}"

    def _misfit(self, message: str) -> str | None:
        """Say why inputs do not fit the network, where a call that failed with such a message shows it."""
        if self.kwargs and "keyword argument" in message:
            return (
                f"the network was called with {', '.join(map(repr, self.kwargs))} as keyword arguments, which it does not "
                "take; for batches that are mappings, name its input by input_key= and the targets by target_key="
            )
        parameter = next(self.network.parameters(), None)
        if parameter is None or "type" not in message:
            return None
        other = next((t.dtype for t in self.tensors() if t.dtype != parameter.dtype), None)
        if other is None:
            return None
        return (
            f"the inputs are {other} and the network's parameters {parameter.dtype}; convert the inputs, as by "
            f".to({parameter.dtype}), or the network"
        )

    @property
    def device(self) -> torch.device:
        """The device of the first tensor among the inputs."""
        return next(self.tensors()).device

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a plan depends on: types and shapes of the inputs; of their rows only whether there are 0, 1 or more.

        And what else may choose another way through the network: options, and which arguments are given at all.
        """
        leaves, spec = pytree.tree_flatten((self.inputs, self.kwargs))
        # As text: the object cannot be copied without a warning, and predictors are.
        return (*map(_kind, leaves), str(spec), min(self.num_rows, 2), dtype_of_autocast(self.device))

    @property
    def row_leaves(self) -> tuple[bool, ...]:
        """Which of the inputs have the examples along their first axis."""
        return tuple(self._has_rows(leaf) for leaf in pytree.tree_leaves((self.inputs, self.kwargs)))

    def few_rows(self, wanted: int) -> int:
        """Return a number of rows, that wanted or a little more, which no input without rows has along its first axis."""
        taken = {tensor.shape[0] for tensor in self.tensors() if tensor.dim() and not self._has_rows(tensor)}
        return next(number for number in count(wanted) if number not in taken)

    def rows(self, index: Tensor | slice) -> "Forward":
        """Return the call on some of the rows."""
        return self._mapped(lambda tensor: tensor[index])

    def repeated(self, times: int) -> "Forward":
        """Return the call on all the rows `times` over, one copy after the other."""
        return self._mapped(lambda tensor: tensor.repeat(times, *(1 for _ in tensor.shape[1:])))

    def floats(self, function: Callable[[Tensor], Tensor]) -> "Forward":
        """Return the call with a function of the floating-point inputs that have rows."""
        return self._mapped(lambda tensor: function(tensor) if tensor.is_floating_point() else tensor)

    def copying(self) -> "Forward":
        """Return the same call with copies of the inputs for each time that it is made."""
        return Forward(self.network, self.inputs, self.kwargs, self.select, copies=True)

    def copied(self) -> "Forward":
        """Return the call on one copy of the inputs, which a network may change."""
        return Forward(self.network, *self._copied(), self.select)

    def _copied(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        copied: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
            Tensor, Tensor.clone, (self.inputs, self.kwargs)
        )
        return copied

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "Forward":
        def apply(leaf: Any) -> Any:
            return function(leaf) if self._has_rows(leaf) else leaf

        inputs, kwargs = pytree.tree_map(apply, (self.inputs, self.kwargs))
        return Forward(self.network, inputs, kwargs, self.select, copies=self.copies)

    def _has_rows(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.num_rows

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors among the inputs."""
        return (leaf for leaf in pytree.tree_leaves((self.inputs, self.kwargs)) if isinstance(leaf, Tensor))

    def _count_rows(self) -> int:
        first = next(self.tensors(), None)
        if first is None:
            given = ", ".join(type(leaf).__name__ for leaf in (*self.inputs, *self.kwargs.values())) or "nothing"
            raise BadInput(
                f"no tensor among the inputs, got {given}; hand in at least one tensor whose first axis is that of the "
                "examples"
            )
        if first.dim() == 0:
            raise BadInput("the first input has no axes; its first axis must be that of the examples")
        return first.shape[0]


def _kind(leaf: Any) -> Any:
    """Return what a plan depends on of one input."""
    if isinstance(leaf, Tensor):
        return leaf.shape[1:], leaf.dtype, leaf.device
    # A number is mostly one to compute with, such as a time: one plan for all of them.
    return leaf if isinstance(leaf, (bool, str)) else type(leaf)


def dtype_of_autocast(device: torch.device) -> torch.dtype | None:
    """Return the dtype that layers compute in where autocast is on; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def select_output(output: Any, select: Select) -> Tensor:
    """Return the tensor of raw outputs among what a network gave."""
    if callable(select):
        output = select(output)
    elif select is not None:
        try:
            output = output[select]
        except (KeyError, IndexError, TypeError) as error:
            raise BadInput(f"output={select!r} does not fit the network's output: {describe(output)}") from error
    if not isinstance(output, Tensor):
        raise BadType(
            f"the network returned {describe(output)}, where one tensor of raw outputs is needed; "
            "say which part with output=, a key, an index or a callable"
        )
    if not output.is_floating_point():
        raise BadType(f"the network's output has dtype {output.dtype}; raw outputs (logits) are floating-point numbers")
    return output


def describe(output: Any) -> str:
    """Say in words what a network returned."""
    if isinstance(output, Mapping):
        return f"a {type(output).__name__} with the keys {', '.join(map(repr, output))}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)} items"
    return f"a {type(output).__name__}"


def check_network(network: nn.Module) -> None:
    """Raise UnsupportedNetwork for what cannot be wrapped as it is."""
    if not isinstance(network, nn.Module):
        raise BadType(f"network must be a torch.nn.Module, got {type(network).__name__}")
    for name, module in network.named_modules():
        where = f"its layer {name!r}" if name else "it"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedNetwork(
                f"network cannot be used: {where} is scripted or traced, which compiles dropout in or away; "
                "hand in the original nn.Module"
            )
    for name, parameter in [*network.named_parameters(), *network.named_buffers()]:
        if isinstance(parameter, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise UnsupportedNetwork(
                f"network cannot be used: {name!r} belongs to a lazy module without a shape yet; run one batch through "
                "it first"
            )
        if parameter.is_meta:
            raise UnsupportedNetwork(
                f"network cannot be used: {name!r} is on the meta device and has no values; "
                'network.to_empty(device="cpu") makes room for them, then load its weights'
            )


def own_network(network: nn.Module, *, copy: bool) -> nn.Module:
    """Return the network that a predictor will call: checked, unwrapped, and by default a copy in eval mode."""
    check_network(network)
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        # Replicas run in threads of their own, where interception cannot follow.
        network = network.module
    if not copy:
        return network
    try:
        return deepcopy(network).eval()
    except Exception as error:
        raise UnsupportedNetwork(
            f"network cannot be copied ({_uncopyable(network)}: {error}); pass copy=False to work on it as it is, "
            "or use torch.nn.utils.parametrizations in place of hooked weight_norm"
        ) from error


def _uncopyable(network: nn.Module) -> str:
    for name, module in network.named_modules():
        if name and not list(module.children()):
            try:
                deepcopy(module)
            except Exception:
                return f"layer {name!r}, a {type(module).__name__}"
    return f"a {type(network).__name__}"
