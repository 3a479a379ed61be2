"""What a run of the benchmark was asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from bayesguard.benchmarks.speed.limits import Rates, measure_rates
from bayesguard.benchmarks.speed.measure import Clock, clock_for

# What most demands are about.
MAIN_SAMPLES = 50


@dataclass
class Settings:
    """Options of a run, and the two rates of its machine.

    Args:
        device: Where everything runs.
        samples: Numbers of draws.
        members: Sizes of the ensembles.
        repeats: Interleaved rounds.
        threads: CPU threads.
        quick: Small sizes: shows that the benchmark runs, not how fast anything is.
        peers: Whether other libraries are timed as well.
        say: Where lines about the run go.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    samples: tuple[int, ...] = (10, 50, 100)
    members: tuple[int, ...] = (5, 10)
    repeats: int = 5
    threads: int = 1
    quick: bool = False
    peers: bool = True
    say: Callable[[str], None] = print

    @property
    def main_samples(self) -> int:
        """The number of draws that the demands are about: 50, or the nearest to it that was asked for."""
        return min(self.samples, key=lambda number: abs(number - MAIN_SAMPLES))

    @cached_property
    def clock(self) -> Clock:
        """The clock of this device."""
        return clock_for(self.device, self.threads)

    @cached_property
    def rates(self) -> Rates:
        """What the machine allows, measured at first use."""
        return measure_rates(self.device, self.clock)
