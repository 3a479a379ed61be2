"""What the machine allows: the rate of its matrix products and of its copies, both measured."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bayesguard.benchmarks.speed.measure import Clock, calling, interleaved

_SIDE = 1024
_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second in float32 products, and bytes a second (read and written) in copies."""

    operations: float
    bytes: float

    def seconds(self, operations: float, moved: float) -> float:
        """Return the least time for so many operations and so many bytes, whichever takes longer."""
        return max(operations / self.operations, moved / self.bytes)


def measure_rates(device: torch.device, clock: Clock, repeats: int = 5) -> Rates:
    """Measure both rates; the best round counts, since this is a bound."""
    left, right = torch.rand(_SIDE, _SIDE, device=device), torch.rand(_SIDE, _SIDE, device=device)
    source = torch.zeros(_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    calls: dict[str, Callable[[], object]] = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    timings = interleaved({name: calling(call) for name, call in calls.items()}, repeats, clock)
    return Rates(2 * _SIDE**3 / timings.of("product").low, 2 * _BYTES / timings.of("copy").low)
