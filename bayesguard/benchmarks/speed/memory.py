"""Peak memory of a prediction, in a process of its own, beside that of one forward pass.

`python -m bayesguard.benchmarks.speed.memory mlp 100 cpu 1 0` (threads, quick) prints bytes; 0 draws stand for the plain pass.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

import bayesguard as bg
from bayesguard.benchmarks.speed.measure import Spread
from bayesguard.benchmarks.speed.networks import RECIPES, subject
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# With a fixed threshold, glibc gives large blocks back as soon as they are free: the peak is what was in use.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def rows(settings: Settings) -> list[Row]:
    """Measure every network at every number of draws: memory should not depend on it."""
    keys = ["mlp"] if settings.quick else list(RECIPES)
    return [row for key in keys for row in _rows_of(key, settings)]


def _rows_of(key: str, settings: Settings) -> list[Row]:
    repeats = 1 if settings.quick else 3
    plain = [measured(key, 0, settings) for _ in range(repeats)]
    found = []
    for number in settings.samples:
        peaks = [measured(key, number, settings) for _ in range(repeats)]
        spread = Spread.of(peak / max(base, 1) for peak, base in zip(peaks, plain, strict=True))
        note = f"{_median(peaks) / 2**20:.1f} MiB over {_median(plain) / 2**20:.1f} MiB; the ratio includes the N x K results"
        name = f"peak memory of predict, {RECIPES[key].title}, S={number}"
        found.append(Row("memory", name, spread, "one pass", must=1.5, note=note))
    return found


def _median(values: list[int]) -> float:
    return Spread.of(values).median


def measured(key: str, number: int, settings: Settings) -> int:
    """Return `peak_bytes` of a process of its own: memory that a process has used before counts for nothing."""
    words = [key, str(number), str(settings.device), str(settings.threads), str(int(settings.quick))]
    command = [sys.executable, "-m", "bayesguard.benchmarks.speed.memory", *words]
    return int(subprocess.check_output(command, text=True, env={**os.environ, **_MALLOC}))


def peak_bytes(key: str, number: int, device: torch.device, *, quick: bool = False) -> int:
    """Return the bytes that one prediction (one plain pass, where `number` is 0) takes at most, in this process."""
    chosen = subject(key, device, quick=quick)
    network, inputs = chosen.network, chosen.inputs
    predictor = bg.MCDropout(network, num_samples=max(number, 1), copy=False)
    with torch.no_grad():
        # Libraries set themselves up, and the code of each operation is read into memory at its first use.
        network(inputs[:1])
        predictor.predict(inputs[:1])
        _reset_peak(device)
        before = _peak(device)
        if number:
            predictor.predict(inputs, batch_size=len(inputs))
        else:
            network(inputs)
        return _peak(device) - before


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET.exists():
        _RESET.write_text("5")


def _peak(device: torch.device) -> int:
    """Return the largest memory so far: of the device, or the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main(arguments: list[str]) -> None:
    """Print the bytes of one case."""
    key, number, device, threads, quick = arguments
    torch.set_num_threads(int(threads))
    print(peak_bytes(key, int(number), torch.device(device), quick=bool(int(quick))))


if __name__ == "__main__":
    main(sys.argv[1:])
