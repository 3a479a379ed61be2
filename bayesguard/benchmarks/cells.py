"""The cells of a benchmark, data x method x seed: each is measured once, kept in a file, on as many processes as wanted.

joblib does the fan-out: over processes of this machine, or over whatever backend surrounds the call (a Dask or Ray cluster).
"""

import json
import math
import platform
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bayesguard as bg
from bayesguard.errors import BadFile, BadInput, BayesguardError
from bayesguard.results import to_json


class Cell(NamedTuple):
    """One thing to measure: a method on a data set, with a seed (or the number of a split)."""

    data: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.data}, {self.method}, {self.seed}"


class CellsFailed(BayesguardError):
    """Some cells could not be measured; the message says which and why. The others are kept."""


Measure = Callable[[Cell, torch.device], dict[str, Any]]
Settings = Mapping[str, Any] | Callable[[Cell], Mapping[str, Any]]
MeasureTogether = Callable[[Sequence[Cell], torch.device], Sequence[dict[str, Any]]]
Record = dict[str, Any]


def measure_all(
    measure: Measure,
    cells: Sequence[Cell],
    *,
    settings: Settings,
    folder: str | Path,
    device: str = "auto",
    jobs: int | None = None,
    progress: bool = False,
) -> list[Record]:
    """Measure every cell that has no file in `folder` yet, and return the records of all, in the order of `cells`.

    Args:
        measure: `(cell, device) -> values`, what JSON can hold; called in other processes where `jobs` is not 1.
        cells: What to measure.
        settings: What else decides the values, as JSON, of all cells or `cell -> settings`; a file made with other settings is
            refused, never overwritten.
        folder: Holds a file for each cell; made where it does not exist.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:0"; with "cuda" the cells go round all GPUs.
        jobs: Processes; None for one, or as many as the surrounding `joblib.parallel_config` says.
        progress: Show a progress bar on stderr.

    Raises:
        BadInput: A file that was made with other settings, an unknown device, or no process.
        BadFile: A file that cannot be read.
        CellsFailed: After all others were measured.
    """
    one = partial(_alone, measure)
    return _measured(one, cells, 1, settings=settings, folder=folder, device=device, jobs=jobs, progress=progress)


def measure_together(
    measure: MeasureTogether,
    cells: Sequence[Cell],
    *,
    settings: Settings,
    folder: str | Path,
    device: str = "auto",
    progress: bool = False,
) -> list[Record]:
    """Do what `measure_all` does by one call for all cells that have no file yet: `(cells, device) -> values of each`.

    For what trains faster together. A cell's seconds are an equal share. Its random numbers may depend on the cells it was
    measured with.
    """
    return _measured(
        measure, cells, len(cells), settings=settings, folder=folder, device=device, jobs=1, progress=progress
    )


def _alone(measure: Measure, cells: Sequence[Cell], device: torch.device) -> list[dict[str, Any]]:
    return [measure(cell, device) for cell in cells]


def _measured(
    measure: MeasureTogether,
    cells: Sequence[Cell],
    at_once: int,
    *,
    settings: Settings,
    folder: str | Path,
    device: str,
    jobs: int | None,
    progress: bool,
) -> list[Record]:
    import joblib
    from tqdm import tqdm

    if jobs == 0:
        raise BadInput("jobs must be 1 or more processes, or -1 for as many as there are cores; got 0")
    folder = Path(folder)
    devices = _devices(device)
    asked: dict[Cell, dict[str, Any]] = {
        cell: json.loads(json.dumps(dict(settings(cell) if callable(settings) else settings))) for cell in cells
    }
    todo = [cell for cell in cells if _kept(folder, cell, asked[cell]) is None]
    groups = [todo[start : start + at_once] for start in range(0, len(todo), at_once)]
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    # One thread a process: cells are many, and processes that share cores by threads slow one another down.
    threads = None if parallel.n_jobs == 1 else 1
    calls = [
        joblib.delayed(_guarded)(
            measure, group, str(devices[place % len(devices)]), [asked[cell] for cell in group], threads
        )
        for place, group in enumerate(groups)
    ]
    failures: dict[str, list[Cell]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(cells), initial=len(cells) - len(todo), disable=not progress, unit="cell") as bar:
        for group, records, error in parallel(calls):
            if error is not None:
                failures.setdefault(error, []).extend(group)
            for cell, record in zip(group, records, strict=False):
                to_json(record, _path(folder, cell))
            bar.update(len(group))
    if failures:
        # What all of them lack, such as a file of data, is said once.
        told = "; ".join(f"{' and '.join(map(str, failed))}: {error}" for error, failed in failures.items())
        raise CellsFailed(f"{sum(map(len, failures.values()))} of {len(todo)} cells failed: {told}")
    return [record for cell in cells if (record := _kept(folder, cell, asked[cell])) is not None]


def collect(records: Sequence[Record], path: str | Path, **meta: Any) -> None:
    """Write the records of a run as one JSON file, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    to_json({"meta": meta, "cells": list(records)}, path)


def check_methods(methods: Sequence[str], known: Iterable[str]) -> None:
    """Raise BadInput for unknown methods, or none."""
    named = list(known)
    unknown = [name for name in methods if name not in named]
    if unknown or not methods:
        raise BadInput(f"methods must be among {', '.join(named)}, got {', '.join(unknown) or 'none'}")


def check_run(methods: Sequence[str], known: Iterable[str], budget: str, seeds: int = 1) -> None:
    """Raise BadInput for what no benchmark can run: unknown methods or none, an unknown budget, or no seeds."""
    check_methods(methods, known)
    if budget not in ("full", "small"):
        raise BadInput(f"budget must be 'full' or 'small', got {budget!r}")
    if seeds < 1:
        raise BadInput(f"seeds must be 1 or more, got {seeds}")


class Spread(NamedTuple):
    """A mean over seeds or splits, its standard error, the standard deviation, and the 95 % t interval of the mean."""

    mean: float
    error: float
    deviation: float
    lower: float
    upper: float
    num_values: int

    def shown(self, digits: int = 3) -> str:
        """Return the mean with its 95 % interval, unless it is one value.

        Examples:
            >>> spread([0.5]).shown(), spread([0.25, 0.75]).shown()
            ('0.500', '0.500 [-2.677, 3.677]')
        """
        mean = f"{self.mean:.{digits}f}"
        return mean if self.num_values == 1 else f"{mean} [{self.lower:.{digits}f}, {self.upper:.{digits}f}]"


def spread(values: Sequence[float]) -> Spread:
    """Return the mean of values over seeds with its spread; a single value has NaN for all but the mean.

    Examples:
        >>> spread([1.0, 2.0, 3.0]).error
        0.5773502691896258
    """
    from scipy.stats import t

    count = len(values)
    if not count:
        raise BadInput("values is empty; at least one is needed")
    mean = math.fsum(values) / count
    if count == 1:
        return Spread(mean, math.nan, math.nan, math.nan, math.nan, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    error = deviation / math.sqrt(count)
    reach = float(t.ppf(0.975, count - 1)) * error
    return Spread(mean, error, deviation, mean - reach, mean + reach, count)


def _guarded(
    measure: MeasureTogether,
    cells: Sequence[Cell],
    device: str,
    settings: Sequence[dict[str, Any]],
    threads: int | None,
) -> tuple[Sequence[Cell], list[Record], str | None]:
    """Measure some cells in one call; an error is a result, so that it does not end the others."""
    where, before = torch.device(device), torch.get_num_threads()
    torch.set_num_threads(threads or before)
    _warm_up()
    start = time.perf_counter()
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    try:
        values = measure(cells, where)
    except Exception as error:
        return cells, [], f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(before)
    common = {
        "seconds": round((time.perf_counter() - start) / len(cells), 3),
        "peak_memory_mib": _peak(where),
        **circumstances(where, threads or before),
    }
    records = [
        {**cell._asdict(), "settings": asked, "values": own, **common}
        for cell, asked, own in zip(cells, settings, values, strict=True)
    ]
    return cells, records, None


def circumstances(device: torch.device, threads: int) -> dict[str, Any]:
    """Return on what a run was made, today's date, and the versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} threads",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"bayesguard": bg.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


@cache
def _warm_up() -> None:
    """Take a process's first step of an optimiser, before which torch loads its compiler: no cell's time is to have those seconds."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.sum().backward()
    torch.optim.Adam([parameter]).step()


def _peak(device: torch.device) -> float:
    """Peak memory in MiB: of the device since the cell began, or of the process since that began."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    # Bytes on macOS, KiB elsewhere.
    unit = 1 if platform.system() == "Darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.data}-{cell.method}-{cell.seed}.json"


def _kept(folder: Path, cell: Cell, settings: dict[str, Any]) -> Record | None:
    path = _path(folder, cell)
    if not path.is_file():
        return None
    try:
        record: Record = json.loads(path.read_text())
        same = dict(record["settings"]) == settings
        dict(record["values"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadFile(f"{path} is not the result of a cell ({error}); delete it, and it is measured again") from None
    if not same:
        changed = sorted(name for name in settings if record["settings"].get(name) != settings[name])
        raise BadInput(
            f"{path} was measured with other settings ({', '.join(changed) or 'more of them'}); choose another folder, or "
            "delete that one"
        )
    return record


def _devices(name: str) -> list[torch.device]:
    from bayesguard.benchmarks.shift import choose_device

    first = choose_device(name)
    if first == torch.device("cuda"):
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [first]
