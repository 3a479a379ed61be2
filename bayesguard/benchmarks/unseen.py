"""Calibration on kinds of shift that calibration never saw: a family of perturbations is left out, and tested on.

A deep ensemble is calibrated on held-out data, undisturbed, under the perturbations of all families but one, and under those that
take the content away, which are of no family; its calibration error is measured under the family left out, for each in turn. The last row is the best temperature for each
tested set, found with its labels: the limit of scaling.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.benchmarks.datasets import load
from bayesguard.benchmarks.shift import SETTINGS, choose_device, factory, train
from bayesguard.calibration import ShiftAwareScaling, TemperatureScaling
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
    device: str = "auto",
    out: str | Path = "results",
    seed: int = 0,
    epochs: int | None = None,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train one ensemble, leave each family out in turn, print the table, and write `unseen-<data>.json` under `out`.

    Args:
        data: Name of an image set; see `bayesguard.benchmarks.datasets.load`.
        device: "auto", "cpu" or "cuda".
        out: Folder for the results; made where it does not exist.
        seed: Of the split, the networks, and the shifts.
        epochs: Training epochs; None for the data set's own.
        limit: Rows of the training and test parts at most, for a quick look.
        data_dir: Folder of the data; see `bayesguard.benchmarks.files.read`.
        say: Where the progress and the table go.

    Returns:
        For each row of the table the quartiles of the calibration error over unseen sets, its mean on undisturbed test
        data, and the mean Brier score over unseen sets.

    Raises:
        BadInput: An unknown data set or device.
    """
    chosen = choose_device(device)
    images, settings = load(data, seed=seed, limit=limit, data_dir=data_dir), SETTINGS[data]
    start = time.perf_counter()
    ensemble = bg.DeepEnsemble(factory(settings, images), num_members=_MEMBERS, seed=seed)
    train(images, settings, epochs, chosen, ensemble)
    say(f"trained {_MEMBERS} members in {time.perf_counter() - start:.1f} s")
    shifts: list[AnyShift] = list(suite("images", seed))
    content = suite(CONTENT, seed)
    held, held_labels = answers(ensemble, images.calibration, [*shifts, *content], seed)
    tested, labels = answers(ensemble, images.test, shifts, seed + 1)
    names = ["", *(shift.name for shift in shifts)]
    found: dict[str, dict[str, list[float]]] = {row: {"unseen": [], "clean": [], "brier": []} for row in ROWS}
    for family, members in FAMILIES.items():
        own = [k for k, name in enumerate(names) if name in members]
        calibrators = fitted([pred for k, pred in enumerate(held) if k not in own], held_labels, seed)
        for k, name in enumerate(names):
            if name and name not in members:
                continue
            for row, answer in rows(calibrators, tested[k], labels).items():
                error = float(expected_calibration_error(answer.probs, labels))
                found[row]["unseen" if name else "clean"].append(error)
                if name:
                    found[row]["brier"].append(float(brier_score(answer.probs, labels)))
        say(f"left out {family}: {time.perf_counter() - start:.1f} s")
    summary = {row: _summary(values) for row, values in found.items()}
    say(f"\n{table(summary)}\n")
    _write(
        summary,
        found,
        Path(out) / f"unseen-{images.name}.json",
        {"data": images.name, "seed": seed, "device": str(chosen), "calibrated_on": ["images", CONTENT]},
    )
    say(f"wrote {Path(out) / f'unseen-{images.name}.json'}")
    return summary


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


def _summary(values: dict[str, list[float]]) -> dict[str, Any]:
    unseen = torch.tensor(values["unseen"], dtype=torch.float64)
    quartiles = unseen.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    mean = float(torch.tensor(values["clean"], dtype=torch.float64).mean())
    return {
        "ece_quartiles": quartiles,
        "ece_mean": float(unseen.mean()),
        "ece_clean": mean,
        "brier_mean": float(torch.tensor(values["brier"], dtype=torch.float64).mean()),
        "num_sets": len(unseen),
    }


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    lines = ["| | ECE, 25 % | median | 75 % | mean | clean | Brier, mean |", "|---|---|---|---|---|---|---|"]
    for row, values in summary.items():
        figures = [*values["ece_quartiles"], values["ece_mean"], values["ece_clean"], values["brier_mean"]]
        lines.append(f"| {row} | {' | '.join(f'{value:.3f}' for value in figures)} |")
    return "\n".join(lines)


def _write(summary: dict[str, Any], found: dict[str, Any], path: Path, meta: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "bayesguard": bg.__version__}
    content = {"meta": {**meta, **versions, "members": _MEMBERS}, "summary": summary, "every_set": found}
    path.write_text(json.dumps(content, indent=1) + "\n")
