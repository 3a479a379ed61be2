"""Passes of a network on numbers that are not its own leave it as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bayesguard.sampling.batched_calls import Unbatchable

# What cannot be changed in place, and is the same where it is equal.
SIMPLE = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Put back the attributes, buffers and parameters that a network replaces in the block.

    What it would have kept of a pass is of several members at once, and would be of the first one only.

    Raises:
        Unbatchable: At the end of the block, where something was replaced.
    """
    held = [own for module in network.modules() for own in (vars(module), module._buffers, module._parameters)]
    before = [dict(own) for own in held]
    try:
        yield
    finally:
        changed = [place for place, own in enumerate(held) if not same_attributes(own, before[place])]
        for place in changed:
            held[place].clear()
            held[place].update(before[place])
    if changed:
        raise Unbatchable("the network changes its attributes or replaces a buffer in a pass")


def same_attributes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Tell whether two dicts hold the same things: one object, or equal numbers and strings."""
    return ours.keys() == theirs.keys() and all(_is(ours[name], theirs[name]) for name in ours)


def _is(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, SIMPLE) and bool(a == b))
