"""Whether modules differ in their numbers only, so that what one does the others do."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

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
    if {name: type(part) for name, part in ours.items()} != {name: type(part) for name, part in theirs.items()}:
        return "members are of different classes"
    for kind, a, b in (
        ("parameter", dict(first.named_parameters()), dict(other.named_parameters())),
        ("buffer", dict(first.named_buffers()), dict(other.named_buffers())),
    ):
        for name in sorted(a.keys() | b.keys()):
            if name not in a or name not in b or _form(a[name]) != _form(b[name]):
                return f"{kind} {name} differs in shape, dtype, device or requires_grad"
    for name, part in ours.items():
        mine, its = _attributes(part), _attributes(theirs[name])
        for attribute in sorted(mine.keys() | its.keys()):
            if not _same(mine.get(attribute), its.get(attribute)):
                return f"attribute {name + '.' if name else ''}{attribute} differs"
    return ""


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds beside parameters, buffers and submodules: rates, modes, functions, hooks."""
    held = ("_parameters", "_buffers", "_modules")
    return {name: value for name, value in vars(module).items() if name not in held}


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) in (dict, OrderedDict) and not a:  # Most attributes of modules, such as their hooks.
        return not b
    if isinstance(a, Tensor):
        return _form(a) == _form(b) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (*SIMPLE, set, frozenset)):
        return bool(a == b)
    # Two objects of one class are the same if what they hold is; functions and generators only if they are one.
    return hasattr(a, "__dict__") and not callable(a) and _same(vars(a), vars(b))
