"""Choices by measurement: candidates are timed once on real input, and the winner is remembered."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch


class Choice(NamedTuple):
    """The fastest of some candidates, and what each of them took, in seconds."""

    winner: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        ordered = sorted(self.seconds.items(), key=lambda item: item[1])
        return ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in ordered)


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return the wall time of one call, its work on the device included."""
    _finish(device)
    start = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - start


def fastest(candidates: Mapping[str, Callable[[], Any]], device: torch.device, *, repeats: int = 2) -> Choice:
    """Time every candidate and return the fastest: the best of `repeats` interleaved calls, after two to warm up.

    A candidate that took more than twice the best on its first calls is not called again.
    """
    seconds = {name: min(seconds_of(call, device) for _ in range(2)) for name, call in candidates.items()}
    close = [name for name, taken in seconds.items() if taken <= 2 * min(seconds.values())]
    if len(close) > 1:
        for _ in range(repeats):
            for name in close:
                seconds[name] = min(seconds[name], seconds_of(candidates[name], device))
    return Choice(min(seconds, key=lambda name: seconds[name]), seconds)


def cost_line(what: str, seconds: float, plain_pass: float) -> str:
    """Say in a line of an explanation what something costs beside plain passes."""
    one = f"one takes {1000 * plain_pass:.3g} ms"
    return f"  cost: {what} take the time of {seconds / plain_pass:.3g} plain passes ({one})"


def memory_line(size: int) -> str:
    """Say in a line of an explanation how many bytes are held."""
    return f"  memory: {size / 2**20:.3g} MiB beside that of one pass"


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
