"""The run: chosen cases one after another in one process, then the table and the file."""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import bayesguard as bg
from bayesguard.benchmarks.speed import (
    calibration,
    draws,
    dropout,
    ensembles,
    half,
    imports,
    kernels,
    memory,
    metrics,
    training,
    variational,
)
from bayesguard.benchmarks.speed.peers import PACKAGES
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row, as_json, as_text, tables
from bayesguard.checks import check_count
from bayesguard.errors import BadInput, BayesguardError

CASES: dict[str, Callable[[Settings], list[Row]]] = {
    **{key: partial(dropout.rows, key) for key in dropout.DEMANDS},
    "overhead": dropout.overhead,
    "draws": draws.rows,
    "ensemble": ensembles.rows,
    "bfloat16": half.rows,
    "training": training.rows,
    "variational": variational.rows,
    "memory": memory.rows,
    "temperature": kernels.temperature,
    "ece": kernels.calibration_error,
    "dirichlet": calibration.dirichlet,
    "aps": calibration.adaptive_sets,
    "ece-by-hand": metrics.calibration_errors,
    "crps": metrics.sample_crps,
    "bootstrap": metrics.bootstrap,
    "import": imports.rows,
}


def run(
    device: str = "cpu",
    *,
    cases: Sequence[str] = tuple(CASES),
    samples: Sequence[int] = (10, 50, 100),
    repeats: int = 5,
    threads: int = 1,
    quick: bool = False,
    peers: bool = True,
    out: str | Path = "results",
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Time the chosen cases, print the table, and write `speed-<device>.json` and `.md` under `out`.

    Args:
        device: "cpu" or "cuda".
        cases: Keys of `CASES`, in order.
        samples: Numbers of draws of MC dropout; the demands are about 50, or the nearest to it.
        repeats: Interleaved rounds; three at most where one round takes more than 20 s.
        threads: CPU threads, as long as this runs.
        quick: Small sizes: shows that everything runs, not how fast it is. Files are named `speed-quick-<device>`.
        peers: Whether other libraries are timed as well.
        out: Folder for the results; made where it does not exist.
        say: Where the progress and the table go.

    Returns:
        The rows of the table.

    Raises:
        BadInput: An unknown case or device, or a number that is not positive.
        BayesguardError: Cases that failed, after the others were written.
    """
    settings = _settings(device, cases, samples, repeats, threads, quick, peers, say)
    # Before the timing, not after it.
    Path(out).mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    failed: dict[str, str] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case in cases:
            start = time.perf_counter()
            try:
                rows = CASES[case](settings)
                # The demands are about the full sizes.
                found += [replace(row, must=None, aim=None) for row in rows] if quick else rows
            except Exception as error:
                failed[case] = f"{type(error).__name__}: {' '.join(str(error).split())}"
                say(f"{case} failed: {failed[case]}")
            say(f"{case}: {time.perf_counter() - start:.1f} s")
    finally:
        torch.set_num_threads(before)
    say(f"\n{as_text(found)}\n")
    for path, text in _files(found, failed, settings):
        target = Path(out) / path
        target.write_text(text)
        say(f"wrote {target}")
    if failed:
        raise BayesguardError(f"{len(failed)} of {len(cases)} cases failed: {', '.join(failed)}; their lines say why")
    return found


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Return what the figures depend on: the processor, the threads, and the versions of all that was timed."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": threads,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"bayesguard": bg.__version__, **_versions(("torch", "numpy", *PACKAGES))},
    }


def _settings(
    device: str,
    cases: Sequence[str],
    samples: Sequence[int],
    repeats: int,
    threads: int,
    quick: bool,
    peers: bool,
    say: Callable[[str], None],
) -> Settings:
    unknown = [case for case in cases if case not in CASES]
    if unknown or not cases:
        raise BadInput(f"cases must be among {', '.join(CASES)}, got {', '.join(unknown) or 'none'}")
    if device not in ("cpu", "cuda"):
        raise BadInput(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("device is cuda, but torch sees no CUDA device here; use --device cpu")
    if not samples:
        raise BadInput("samples is empty; give numbers of draws, such as 10,50,100")
    numbers = tuple(check_count(number, "samples", minimum=2) for number in samples)
    return Settings(
        torch.device(device),
        numbers[:1] if quick else numbers,
        (5,) if quick else (5, 10),
        min(3, check_count(repeats, "repeats")) if quick else check_count(repeats, "repeats"),
        check_count(threads, "threads"),
        quick,
        peers,
        say,
    )


def _files(rows: list[Row], failed: dict[str, str], settings: Settings) -> list[tuple[str, str]]:
    name = f"speed-{'quick-' if settings.quick else ''}{settings.device.type}"
    facts = machine(settings.device, settings.threads)
    content = {
        "machine": facts,
        "rates": {"operations": settings.rates.operations, "bytes": settings.rates.bytes},
        "repeats": settings.repeats,
        "quick": settings.quick,
        "failed": failed,
        "rows": as_json(rows),
    }
    where = facts["gpu"] or f"{facts['cpu']}, {settings.threads} thread{'s' if settings.threads > 1 else ''}"
    caption = f"{where}, torch {facts['versions']['torch']}, {facts['date']}"
    return [
        (f"{name}.json", json.dumps(content, indent=1, allow_nan=False) + "\n"),
        (f"{name}.md", f"{caption}\n\n{tables(rows)}\n"),
    ]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _versions(names: Sequence[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
