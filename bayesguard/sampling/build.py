"""How a network is built: what decides, beside its numbers, which way its calls go."""

from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

_PLAIN = {bool, int, float, str, type(None), FunctionType, BuiltinFunctionType}


def build_of(network: nn.Module) -> list[Any]:
    """Return the modules' classes, hooks and plain attributes (rates, modes, sizes, functions), to be compared later."""
    found: list[Any] = []
    for module in network.modules():
        own = vars(module)
        # Hooks are told by the numbers that torch gives them.
        hooks = (*own["_forward_pre_hooks"], *own["_forward_hooks"])
        found.append((type(module), hooks, {name: value for name, value in own.items() if _is_plain(value)}))
    return found


def _is_plain(value: Any) -> bool:
    # A tuple of tensors cannot be compared.
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))
