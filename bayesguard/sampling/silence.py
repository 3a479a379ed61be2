"""Dropout that never fires: layers whose code asks `if self.training`, which no call shows."""

import threading
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bayesguard.sampling.forward import Forward
from bayesguard.sampling.intercept import Intercept, intercepted
from bayesguard.sampling.masks import Masks
from bayesguard.sampling.streams import seeded_default_generators


def silent_dropout(forward: Forward, seed: int, masks: Masks) -> list[str]:
    """Return the names of dropout-like layers that run without a single random call."""
    layers = [(name, module) for name, module in forward.network.named_modules() if _is_dropout_like(module)]
    # An ordinary dropout module makes its call whatever happens.
    if all(type(module) in _KNOWN for _, module in layers):
        return []
    thread = threading.get_ident()
    silent: dict[str, bool] = {}
    started: dict[str, int] = {}

    def watch(name: str, module: nn.Module) -> list[RemovableHandle]:
        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                started[name] = len(masks.calls)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                silent[name] = silent.get(name, True) and len(masks.calls) == started[name]

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    with seeded_default_generators(forward.device, seed, 0):
        hooks = [hook for name, module in layers for hook in watch(name, module)]
        try:
            with torch.no_grad(), intercepted(Intercept(masks)):
                forward.rows(slice(0, 2)).copied()()
        finally:
            for hook in hooks:
                hook.remove()
    return [name for name, quiet in silent.items() if quiet]


_KNOWN = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout}


def _is_dropout_like(module: nn.Module) -> bool:
    rate = getattr(module, "p", getattr(module, "drop_prob", None))
    return "drop" in type(module).__name__.lower() and isinstance(rate, float) and rate > 0
