"""Whether modules differ in their numbers only, so that what one does the others do."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesguard.sampling.unchanged import SIMPLE


def why_not_alike(modules: Sequence[nn.Module]) -> str:
    """Return in what members differ beyond their numbers; what is not known to be the same counts as different."""
    if not modules:
        return "there are none"
    first = modules[0]
    owned = [parameter for module in modules for parameter in module.parameters()]
    if len(set(map(id, owned))) != len(owned):
        return "members share parameters"
    for name, part in first.named_modules():
        if isinstance(part, nn.RNNBase):
            return f"vmap has no rule for {type(part).__name__} ({name or 'the member itself'})"
    for other in modules[1:]:
        if reason := _difference(first, other):
            return reason
    return ""


def _difference(first: nn.Module, other: nn.Module) -> str:
    ours, theirs = dict(first.named_modules()), dict(other.named_modules())
    if [*map(_kind, ours.items())] != [*map(_kind, theirs.items())]:
        return "members are of different classes, or hold their modules in another order"
    for kind in ("parameter", "buffer", "module"):
        a, b = ([*getattr(module, f"named_{kind}s")(remove_duplicate=False)] for module in (first, other))
        if kind != "module" and (name := _unlike(dict(a), dict(b))):
            return f"{kind} {name} differs in shape, dtype, device or requires_grad"
        if _uses(a) != _uses(b):
            return f"a {kind} is used at other places, or comes in another order"
    for name, part in ours.items():
        mine, its = _attributes(part), _attributes(theirs[name])
        for attribute in sorted(mine.keys() | its.keys()):
            if not same_values(mine.get(attribute), its.get(attribute)):
                return f"attribute {name + '.' if name else ''}{attribute} differs"
    return ""


def _kind(named: tuple[str, nn.Module]) -> tuple[str, type[nn.Module]]:
    name, module = named
    return name, type(module)


def _unlike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str:
    names = sorted(a.keys() | b.keys())
    return next((name for name in names if name not in a or name not in b or _form(a[name]) != _form(b[name])), "")


def _uses(named: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Return each name with the first name of the same object: two members may tie their weights in two ways."""
    first: dict[int, str] = {}
    return [(name, first.setdefault(id(held), name)) for name, held in named]


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds beside parameters, buffers and submodules: rates, modes, functions, hooks."""
    held = ("_parameters", "_buffers", "_modules")
    return {name: value for name, value in vars(module).items() if name not in held}


def same_values(a: Any, b: Any) -> bool:
    """Tell whether two objects are known to hold the same: what is not known to counts as different."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) in (dict, OrderedDict) and not a:  # Most attributes of modules, such as their hooks.
        return not b
    if isinstance(a, Tensor):
        return _form(a) == _form(b) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (Mapping, list, tuple)):
        return _same_items(a, b) and same_values(getattr(a, "__dict__", None), getattr(b, "__dict__", None))
    if isinstance(a, (*SIMPLE, set, frozenset)):
        return bool(a == b)
    # Two objects of one class are the same if what they hold is; functions and generators only if they are one.
    return _holds_all_in_dict(type(a)) and not callable(a) and same_values(vars(a), vars(b))


def _same_items(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        # Code that walks over a dict sees its order.
        return [*a] == [*b] and all(same_values(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same_values, a, b))


class _Plain:
    """What an object of Python's own takes that has nothing but a `__dict__`."""


def _holds_all_in_dict(kind: type) -> bool:
    """Tell whether objects of a class keep nothing in slots, nor in C, as a random generator does."""
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    return kind.__basicsize__ == _Plain.__basicsize__ and not slots
