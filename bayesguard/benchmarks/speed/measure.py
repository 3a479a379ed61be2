"""Timing: candidates called in turn, medians with their range, and ratios taken within each round.

A slow spell of the machine hits all candidates of a round alike, so a ratio within a round is steadier than the ratio
of two medians.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

Clock = Callable[[], float]
Call = Callable[[], object]

# A timed stretch lasts at least this long, in seconds, so that the clock's own steps do not show.
_SHORTEST = 0.02
_MOST_CALLS = 2000
# A first call shorter than this is made again before it counts as an estimate: it may have paid for what is set up once.
_SETTLED = 1.0
# Above this many seconds a round, three repeats have to do.
_LONG_ROUND = 20.0


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Args:
        prepare: Makes the call that is timed; its own time does not count.
        scale: Factor from the measured time to the reported one, where only a part of the work is done.
        repeatable: Whether one prepared call may be made several times. False for calls that use up their state.
    """

    prepare: Callable[[], Call]
    scale: float = 1.0
    repeatable: bool = True


def calling(call: Call, scale: float = 1.0) -> Candidate:
    """Return the candidate that makes the same call each time."""
    return Candidate(lambda: call, scale)


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Summarise some values."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))


@dataclass
class Timings:
    """Seconds of each candidate, one entry a round, and the optional candidates that could not run, with the reason."""

    seconds: dict[str, list[float]]
    skipped: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> Spread:
        """Return the seconds of one candidate."""
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> Spread:
        """Return one candidate's time over another's, each round by itself."""
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return Spread.of(a / b for a, b in pairs)

    def combined(self, name: str, factors: Mapping[str, float]) -> None:
        """Add, as `name`, the weighted sum of other candidates, each round by itself."""
        rounds = zip(*(self.seconds[part] for part in factors), strict=True)
        self.seconds[name] = [sum(f * s for f, s in zip(factors.values(), row, strict=True)) for row in rounds]


def clock_for(device: torch.device, threads: int) -> Clock:
    """Return CPU seconds of this process on one thread, wall seconds on several, finished wall seconds on CUDA."""
    if device.type == "cuda":

        def finished() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return finished
    return time.process_time if threads == 1 else time.perf_counter


def interleaved(
    candidates: Mapping[str, Candidate], repeats: int, clock: Clock, *, optional: Iterable[str] = ()
) -> Timings:
    """Time all candidates in turn, `repeats` times, after one call of each to warm up.

    Args:
        candidates: What to time, by name.
        repeats: Rounds; three at most where one round takes more than 20 s.
        clock: Returns seconds.
        optional: Names that may fail in the warm-up; they are left out and their error is kept.
    """
    allowed, skipped = set(optional), dict[str, str]()
    numbers: dict[str, int] = {}
    total = 0.0
    for name, candidate in candidates.items():
        try:
            taken = _timed(candidate, 1, clock)
            if taken < _SETTLED:
                taken = _timed(candidate, 1, clock)
        except Exception as error:
            if name not in allowed:
                raise
            skipped[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        numbers[name] = _calls(taken) if candidate.repeatable else 1
        total += max(taken, _SHORTEST)
    rounds = min(repeats, 3) if total > _LONG_ROUND else repeats
    names = list(numbers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        gc.collect()
        # Each round starts at another candidate, so that none always follows the same one.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            candidate = candidates[name]
            seconds[name].append(candidate.scale * _timed(candidate, numbers[name], clock))
    return Timings(seconds, skipped)


def _calls(seconds: float) -> int:
    return min(_MOST_CALLS, max(1, round(_SHORTEST / max(seconds, 1e-9))))


def _timed(candidate: Candidate, number: int, clock: Clock) -> float:
    """Return the seconds of one call, the mean of `number`; the garbage collector rests meanwhile."""
    call = candidate.prepare()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        for _ in range(number):
            call()
        return (clock() - start) / number
    finally:
        if was_enabled:
            gc.enable()
