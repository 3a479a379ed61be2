"""Coverage of the intervals of evaluations: how often they hold the true number of a model that is known.

Answers are P(y = 1) = sigmoid(z) with z normal, and the truth is P(y = 1 | z) = sigmoid(z / T): calibrated at T = 1,
over-confident above. The true calibration error is that of the population in the same 15 bins, by numerical integration.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bayesguard.benchmarks.cells import circumstances
from bayesguard.checks import check_count
from bayesguard.metrics.registry import specs_for
from bayesguard.predictive import Predictive
from bayesguard.results import CLEAN
from bayesguard.sampling import derive_seed, stream
from bayesguard.sheet import NUM_RESAMPLES, Interval, Sheet

METRICS = ("accuracy", "nll", "brier", "ece")
KINDS: tuple[Interval | None, ...] = (None, "basic", "percentile", "bca")
TEMPERATURES = (1.25, 2.0, 1.0)
# Data sets that share their resamples, which are drawn anew for the next ones.
_TOGETHER = 20
_LEVEL, _SPREAD, _BINS, _NODES = 0.95, 2.0, 15, 60


class Coverage(NamedTuple):
    """How many runs' intervals held the truth, lay above it, and lay below it, and how wide they were."""

    metric: str
    interval: str
    truth: float
    coverage: float
    above: float
    below: float
    mean_width: float

    def standard_error(self, runs: int) -> float:
        """Return the Monte-Carlo error of the coverage, by the binomial of the promised level."""
        return math.sqrt(_LEVEL * (1 - _LEVEL) / runs)


def truths(temperature: float) -> dict[str, float]:
    """Return the population's metrics, by Gauss-Legendre quadrature within each bin."""
    inner = np.arange(1, _BINS) / _BINS
    cuts = np.log(inner / (1 - inner))
    # The answer changes at 0, in the middle of a bin; beyond 10 standard deviations there is nothing.
    ends = np.unique([-10 * _SPREAD, *cuts, 0.0, 10 * _SPREAD])
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    half = np.diff(ends)[:, None] / 2
    z = (ends[:-1, None] + ends[1:, None]) / 2 + half * nodes
    mass = half * weights * np.exp(-((z / _SPREAD) ** 2) / 2) / (_SPREAD * math.sqrt(2 * math.pi))
    said, true = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-z / temperature))
    bins = np.searchsorted(cuts, (ends[:-1] + ends[1:]) / 2)
    gaps = np.bincount(bins, (mass * (said - true)).sum(1))
    return {
        "accuracy": float((mass * np.where(z > 0, true, 1 - true)).sum()),
        "nll": float((mass * (true * np.logaddexp(0, -z) + (1 - true) * np.logaddexp(0, z))).sum()),
        "brier": float((2 * mass * (true * (1 - said) ** 2 + (1 - true) * said**2)).sum()),
        "ece": float(np.abs(gaps).sum()),
    }


def coverage(
    temperature: float,
    num_examples: int,
    runs: int,
    seed: int,
    *,
    metrics: Sequence[str] = METRICS,
    kinds: Sequence[Interval | None] = KINDS,
) -> list[Coverage]:
    """Draw `runs` data sets, and count how often each kind of interval of each metric holds the truth."""
    wanted = truths(temperature)
    ends: list[list[list[tuple[float, float]]]] = []
    for first in range(0, runs, _TOGETHER):
        sheet = Sheet(_LEVEL, derive_seed(seed, first), "bca" if "bca" in kinds else None, None)
        for run in range(first, min(first + _TOGETHER, runs)):
            generator = stream("cpu", seed, "intervals", repr(temperature), num_examples, run)
            z = _SPREAD * torch.randn(num_examples, generator=generator, dtype=torch.float64)
            chance = torch.rand(num_examples, generator=generator, dtype=torch.float64)
            answers = Predictive.from_probs(z.sigmoid())
            targets = (chance < (z / temperature).sigmoid()).long()
            sheet.add(CLEAN, run, answers, targets, specs_for(answers, list(metrics)))
        limits = [
            [number.interval(_LEVEL, cell.spec.bounds, kind) for kind in kinds]
            for cell, number in zip(sheet.cells, sheet.drawn(), strict=True)
        ]
        ends += [limits[start : start + len(metrics)] for start in range(0, len(limits), len(metrics))]
    all_ends = torch.tensor(ends, dtype=torch.float64)
    found = []
    for row, metric in enumerate(metrics):
        for column, kind in enumerate(kinds):
            lower, upper = all_ends[:, row, column].unbind(-1)
            above, below = (
                (lower > wanted[metric]).double().mean().item(),
                (upper < wanted[metric]).double().mean().item(),
            )
            width = (upper - lower).mean().item()
            held = 1 - above - below
            found.append(Coverage(metric, kind or "default", wanted[metric], held, above, below, width))
    return found


def run(
    *,
    runs: int = 1000,
    sizes: Sequence[int] = (1000, 5000),
    temperatures: Sequence[float] = TEMPERATURES,
    out: str | Path = "results",
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Simulate every setting, print the table, and write `intervals.json` under `out`.

    Args:
        runs: Data sets of each setting.
        sizes: Examples of a data set.
        temperatures: T of the truth; 1 is calibrated.
        out: Folder for the results; made where it does not exist.
        seed: Of the data and of the resamples.
        say: Where the progress and the table go.

    Returns:
        What was written: settings, time, device, date, versions, and the coverage of each metric, size, truth and kind of interval.

    Raises:
        BadInput: No run.
    """
    check_count(runs, "runs")
    path = Path(out) / "intervals.json"
    # Before the simulation, not after it.
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for temperature in temperatures:
        for size in sizes:
            for found in coverage(temperature, size, runs, seed):
                place = {"temperature": temperature, "num_examples": size}
                rows.append({**place, **found._asdict(), "standard_error": found.standard_error(runs)})
            say(f"T = {temperature:g}, N = {size}: {time.perf_counter() - start:.0f} s")
    meta = {
        "confidence_level": _LEVEL,
        "runs": runs,
        "num_resamples": NUM_RESAMPLES,
        "num_bins": _BINS,
        "sd_of_logits": _SPREAD,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        **circumstances(torch.device("cpu"), torch.get_num_threads()),
    }
    content = {"meta": meta, "coverage": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    say(f"\n{table(rows)}\n\nwrote {path}")
    return content


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the coverage in % as Markdown: truths by metrics, and for the calibration error by kinds of interval."""
    columns = [(metric, "default") for metric in METRICS] + [("ece", kind) for kind in KINDS if kind]
    lines = [
        "| T | N | true ECE | accuracy | NLL | Brier | ECE | ECE, basic | ECE, percentile | ECE, BCa |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for temperature, size in dict.fromkeys((row["temperature"], row["num_examples"]) for row in rows):
        own = {
            (row["metric"], row["interval"]): row
            for row in rows
            if (row["temperature"], row["num_examples"]) == (temperature, size)
        }
        cells = [f"{100 * own[column]['coverage']:.1f}" for column in columns]
        lines.append(f"| {temperature:g} | {size:,} | {own['ece', 'default']['truth']:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)
