"""Networks of one architecture as one batched product: the first one's own code, on everybody's parameters."""

import dis
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from bayesguard.sampling.batched_calls import BatchedCalls, Step, Unbatchable
from bayesguard.sampling.unchanged import SIMPLE, unchanged
from bayesguard.sampling.vmapped import VmappedMembers


def check_batchable(networks: Sequence[nn.Module], x: Tensor) -> None:
    """Raise Unbatchable where networks cannot be run as one product; takes the memory of one pass on few rows `x`.

    Whatever the first network's code changes about itself is put back.
    """
    count = len(networks)
    stacked = {id(tensor): tensor.detach().expand(count, *tensor.shape) for tensor in _tensors(networks[0]).values()}
    with unchanged(networks[0]):
        BatchedCalls(stacked, count).run(networks[0], x)


class MemberBatch:
    """Networks of one architecture, in eval mode, as one batched product, or under `vmap`.

    Once it is `adopted` the parameters of the networks are views of the stacked ones, so that there is one copy of
    them and a change to either is a change to both, however it is made.

    Args:
        networks: Two or more that differ in their numbers only.

    Raises:
        Unbatchable: Where something about them cannot be watched for changes.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks, self.count = tuple(networks), len(networks)
        every = list(chain.from_iterable(network.modules() for network in networks))
        for module in every:
            _check_watchable(module)
        named = [_tensors(network) for network in networks]
        if not all(tensor.is_contiguous() for own in named for tensor in own.values()):
            # An optimizer that walks memory keeps its means in the order that a parameter had at first.
            raise Unbatchable("a parameter is not contiguous")
        stacks = [torch.stack([own[name].detach() for own in named]) for name in named[0]]
        self._stacked = {id(tensor): stack for tensor, stack in zip(named[0].values(), stacks, strict=True)}
        children = [module._modules for module in every]
        self._held = [vars(module) for module in every] + [own for own in children if own]
        self._copies = [dict(held) for held in self._held]
        # Dicts are equal in any order, and `nn.Sequential` runs its modules in theirs.
        self._children = [own for own in children if own]
        self._orders = list(map(list, self._children))
        named_tensors = [own for module in every for own in (module._parameters, module._buffers)]
        hooks = [own for module in every for own in (module._forward_hooks, module._forward_pre_hooks)]
        # Most of these hold nothing, and one look shows whether that is still so.
        self._empty = [own for own in (*children, *named_tensors) if not own] + hooks
        self._named = [own for own in named_tensors if own]
        self._owned = list(_values(self._named))
        self._identities = list(map(id, self._owned))
        self._tensors = list(chain.from_iterable(own.values() for own in named))
        self._views = list(chain.from_iterable(zip(*(stack.unbind() for stack in stacks), strict=True)))
        self._plain = has_one_path(networks[0])
        self._forwards = [(module, _code_of(module)) for module in networks[0].modules() if not _is_torchs_own(module)]
        self._steps: list[Step] | None = None
        self._by_name = dict(zip(named[0], stacks, strict=True))
        self._vmapped: VmappedMembers | None = None

    def adopt(self) -> None:
        """Make the members' parameters views of the stacked ones; their numbers stay."""
        with torch.no_grad():
            for tensor, view in zip(self._tensors, self._views, strict=True):
                view.copy_(tensor)
                tensor.data = view

    def is_current(self) -> bool:
        """Tell whether the members are what they were when they were adopted, but for the numbers in their views."""
        try:
            same = self._held == self._copies
        except (RuntimeError, ValueError):  # A tensor or an array among the attributes was replaced.
            return False
        return (
            same
            and list(map(list, self._children)) == self._orders
            and not any(self._empty)
            and all(_code_of(module) is code for module, code in self._forwards)
            and not _hooks_of_all_modules()
            and list(map(id, _values(self._named))) == self._identities
            and all(map(Tensor.is_set_to, self._tensors, self._views))
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs `[M, N, ...]` of all members.

        Raises:
            Unbatchable: At the first call without a batched form.
        """
        if self._steps is not None:
            for step in self._steps:
                x = step(x)
            return x.contiguous()
        mode = BatchedCalls(self._stacked, self.count)
        outputs = mode.run(self.networks[0], x)
        if self._plain and mode.steps:
            self._steps = mode.steps
        return outputs.contiguous()

    def vmapped(self, x: Tensor) -> Tensor:
        """Return the outputs `[M, N, ...]` of all members without knowing a batched form of their calls.

        Raises:
            Exception: Of torch's or of the network's own, where it cannot be mapped.
        """
        if self._vmapped is None:
            self._vmapped = VmappedMembers(self.networks[0], self._by_name)
        return self._vmapped(x)


class TrainedBatch:
    """The passes in training of a network that nobody else changes, for M members at once.

    Args:
        network: The network, in the mode of each pass.
        stacked: `id` of each of its parameters -> those of all members, `[M, ...]`, the same tensors in all passes.
        count: M.
    """

    def __init__(self, network: nn.Module, stacked: Mapping[int, Tensor], count: int) -> None:
        self.network, self.stacked, self.count = network, stacked, count
        self._has_one_path = has_one_path(network)
        self._recorded: dict[Any, list[Step]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs `[M, N, ...]`; the network's code is left out where earlier calls say what it does.

        Raises:
            Unbatchable: Without a batched form.
        """
        kind = (x.shape[1:], x.dtype, torch.is_grad_enabled(), self.network.training)
        if kind in self._recorded and not _hooks_of_all_modules():
            for step in self._recorded[kind]:
                x = step(x)
            return x
        mode = BatchedCalls(self.stacked, self.count, random=True)
        outputs = mode.run(self.network, x)
        if self._has_one_path and mode.steps:
            self._recorded[kind] = mode.steps
        return outputs


def has_one_path(network: nn.Module) -> bool:
    """Whether a network calls the same for every input: its code is torch's own, or has no branch."""
    return all(_is_torchs_own(module) or only_calls_children(module) for module in network.modules())


def _hooks_of_all_modules() -> bool:
    return bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)


def _values(dicts: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, dicts))


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _is_torchs_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.") and "forward" not in vars(module)


# All that `return self.after(self.before(x))` is made of: no branch, no loop, no global, no arithmetic.
_STRAIGHT = {"RESUME", "PUSH_NULL", "PRECALL", "CALL", "RETURN_VALUE", "LOAD_ATTR", "LOAD_METHOD"}


def only_calls_children(module: nn.Module) -> bool:
    """Tell whether a module's code does nothing but hand tensors from one of its children to the next.

    It is then the same for every input, as its byte code shows; what the byte code does not show counts as no.
    """
    kind, code = type(module), _code_of(module)
    as_usual = (
        kind.__call__ is nn.Module.__call__
        and kind.__getattr__ is nn.Module.__getattr__
        and kind.__getattribute__ is object.__getattribute__
        and "forward" not in vars(module)
    )
    if code is None or not as_usual:
        return False
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            name = step.argval
            if name not in module._modules or hasattr(kind, name) or hasattr(Tensor, name):
                return False
        elif step.opname not in _STRAIGHT and not step.opname.startswith(("LOAD_FAST", "STORE_FAST")):
            return False
    return True


def _code_of(module: nn.Module) -> Any:
    return getattr(type(module).forward, "__code__", None)


_OF_MODULES = set(vars(nn.Module()))


def _check_watchable(module: nn.Module) -> None:
    """Refuse what could change without a trace in the identities of attributes: containers, objects, hooks."""
    if module._forward_hooks or module._forward_pre_hooks:
        raise Unbatchable(f"{type(module).__name__} has forward hooks")
    for name, value in vars(module).items():
        if name not in _OF_MODULES and not _is_fixed(value):
            raise Unbatchable(f"attribute {name} of {type(module).__name__} may change unseen")


def _is_fixed(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return value is None or isinstance(value, SIMPLE) or (callable(value) and not hasattr(value, "__dict__"))
