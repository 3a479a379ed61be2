"""Calibration on kinds of shift that calibration never saw: a family of perturbations is left out, and tested on.

A deep ensemble is calibrated on held-out data, undisturbed, under the perturbations of all families but one, and under those that
take the content away, which are of no family; its calibration error is measured under the family left out, for each in turn. The last row is the best temperature for each
tested set, found with its labels: the limit of scaling.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.benchmarks.cells import Cell, Record, check_run, collect, measure_all, spread
from bayesguard.benchmarks.costs import costs, with_costs
from bayesguard.benchmarks.datasets import load
from bayesguard.benchmarks.shift import SETTINGS, factory, train
from bayesguard.calibration import ShiftAwareScaling, TemperatureScaling
from bayesguard.errors import BadInput
from bayesguard.metrics.functional import brier_score, expected_calibration_error
from bayesguard.predictive import Predictive
from bayesguard.predictor import Predictor
from bayesguard.shift import suite
from bayesguard.shifting import AnyShift, shifting

FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    "weather": ("snow", "frost", "fog", "spatter"),
    "digital": ("brightness", "contrast", "saturate", "pixelate", "jpeg_compression"),
    "geometric": ("elastic_transform", "rotation", "translation"),
}
ROWS = (
    "as trained",
    "temperature",
    "shift-aware, pointwise",
    "shift-aware, unlabelled batch",
    "best temperature for each set",
)
_MEMBERS = 5
# What calibration sees but for the family left out, and never a tested set: perturbations down to chance.
CONTENT = "content"


def run(
    data: str = "digits",
    *,
    seeds: int = 1,
    device: str = "auto",
    out: str | Path = "results",
    jobs: int | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Train an ensemble a seed, leave each family out in turn, print the table, and write `unseen-<data>.json` under `out`.

    Args:
        data: Name of an image set; see `bayesguard.benchmarks.datasets.load`.
        seeds: How many, from 0 on; each has its own split, networks and shifts.
        device: As in `cells.measure_all`.
        out: Folder for the results; made where it does not exist.
        jobs: As in `cells.measure_all`.
        epochs: Training epochs; None for the data set's own.
        limit: Rows of the training and test parts at most, for a quick look.
        data_dir: Folder of the data; see `bayesguard.benchmarks.files.read`.
        progress: Show a progress bar on stderr.
        say: Where the table goes.

    Returns:
        A record for each seed: the calibration error and the Brier score (class sum) of each row under each unseen set, and the
        calibration error on undisturbed test data, once for each family that is left out.

    Raises:
        BadInput: An unknown data set or device, or a number below 1.
    """
    if data not in SETTINGS:
        raise BadInput(f"data must be one of {', '.join(SETTINGS)}, got {data!r}")
    check_run(("ensemble",), ("ensemble",), "full", seeds)
    records = measure_all(
        partial(measure, epochs=epochs, limit=limit, data_dir=data_dir),
        [Cell(data, "ensemble", seed) for seed in range(seeds)],
        settings={"members": _MEMBERS, "epochs": epochs, "limit": limit, "calibrated_on": ["images", CONTENT]},
        folder=Path(out) / "cells" / "unseen",
        device=device,
        jobs=jobs,
        progress=progress,
    )
    say(f"{table(records)}\n")
    path = Path(out) / f"unseen-{data}.json"
    collect(records, path, benchmark="unseen", data=data)
    say(f"wrote {path}")
    return records


def measure(
    cell: Cell, device: torch.device, *, epochs: int | None, limit: int | None, data_dir: str | Path | None
) -> dict[str, Any]:
    """Train one ensemble and calibrate it once for each family that is left out; see `run` for what is returned."""
    seed = cell.seed
    images, settings = load(cell.data, seed=seed, limit=limit, data_dir=data_dir), SETTINGS[cell.data]
    ensemble = bg.DeepEnsemble(factory(settings, images), num_members=_MEMBERS, seed=seed)
    start = time.perf_counter()
    train(images, settings, epochs, device, ensemble)
    seconds = time.perf_counter() - start
    shifts: list[AnyShift] = list(suite("images", seed))
    held, held_labels = answers(ensemble, images.calibration, [*shifts, *suite(CONTENT, seed)], seed)
    tested, labels = answers(ensemble, images.test, shifts, seed + 1)
    names = ["", *(shift.name for shift in shifts)]
    found: dict[str, dict[str, Any]] = {row: {"unseen": {}, "clean": [], "brier": {}} for row in ROWS}
    for members in FAMILIES.values():
        own = [k for k, name in enumerate(names) if name in members]
        calibrators = fitted([pred for k, pred in enumerate(held) if k not in own], held_labels, seed)
        for row, answer in rows(calibrators, tested[0], labels).items():
            found[row]["clean"].append(_error(answer, labels))
        for k in own:
            for row, answer in rows(calibrators, tested[k], labels).items():
                found[row]["unseen"].setdefault(names[k], []).append(_error(answer, labels))
                found[row]["brier"].setdefault(names[k], []).append(float(brier_score(answer.probs, labels)))
    single = bg.Deterministic(factory(settings, images)(seed))
    return {"rows": found, "num_images": len(labels), "costs": costs(ensemble, single, images.test[0], seconds)}


def _error(answer: Predictive, labels: Tensor) -> float:
    return float(expected_calibration_error(answer.probs, labels))


def answers(
    predictor: Predictor, part: tuple[Tensor, Tensor], shifts: Sequence[AnyShift], seed: int
) -> tuple[list[Predictive], Tensor]:
    """Return reduced predictives of undisturbed data and of each shift, and the labels."""
    clean, labels = predictor.predict_with_targets(part)
    return [
        clean,
        *(predictor.predict_with_targets(part, transform=shifting(shift, seed))[0] for shift in shifts),
    ], labels


def fitted(held: Sequence[Predictive], labels: Tensor, seed: int) -> tuple[ShiftAwareScaling, ShiftAwareScaling]:
    """Return calibrators of both modes, fitted to the answers to undisturbed data and to each shift of them."""
    point, batch = ShiftAwareScaling("point", seed=seed), ShiftAwareScaling("set", seed=seed)
    return point.fit_shifted(held, labels), batch.fit_shifted(held, labels)


def rows(
    calibrators: tuple[ShiftAwareScaling, ShiftAwareScaling], pred: Predictive, labels: Tensor
) -> dict[str, Predictive]:
    """Return what each row of the table answers to one set of data."""
    point, batch = calibrators
    once = partial(_at, pred)
    best = TemperatureScaling().fit(Predictive.from_logits(pred.logits), labels).temperature
    answers = (pred, once(float(point.clean_temperature)), point(pred), batch.adapt(pred)(pred), once(float(best)))
    return dict(zip(ROWS, answers, strict=True))


def _at(pred: Predictive, temperature: float) -> Predictive:
    return Predictive.from_logits(pred.logits / temperature)


def summary(values: dict[str, Any]) -> tuple[float, ...]:
    """Return what the table shows of a row of one seed: quartiles and mean over unseen sets, undisturbed data, Brier score."""
    unseen = torch.tensor([*values["unseen"].values()], dtype=torch.float64).flatten()
    quartiles = unseen.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    means = [
        torch.tensor(part, dtype=torch.float64).mean().item() for part in (values["clean"], [*values["brier"].values()])
    ]
    return (*quartiles, float(unseen.mean()), *means)


def table(records: Sequence[Record]) -> str:
    """Return the table as Markdown: means over seeds, with 95 % t intervals where there are several; and costs."""
    lines = ["| | ECE, 25 % | median | 75 % | mean | clean | Brier, mean |", "|---|---|---|---|---|---|---|"]
    for row in ROWS:
        seeds = [summary(record["values"]["rows"][row]) for record in records]
        lines.append(f"| {row} | {' | '.join(spread(column).shown() for column in zip(*seeds, strict=True))} |")
    return with_costs("\n".join(lines), records, {"ensemble": "Deep ensemble"})
