"""Calibration on shifted data: every method, before and after temperature scaling, clean and at severities 1 to 5.

The question of Ovadia et al. (2019, NeurIPS), "Can you trust your model's uncertainty?": a network is trained and
calibrated on clean data, and its confidence is then held against the truth while the data drift away. CIFAR-10 has every
method, published numbers and costs in `bayesguard.benchmarks.cifar10_c`.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bayesguard as bg
from bayesguard.benchmarks import recipes
from bayesguard.benchmarks.augmentation import Augment, AugmentedBatches
from bayesguard.benchmarks.augmented import AUGMENTATIONS, Augmentation
from bayesguard.benchmarks.cells import Cell, check_methods, measure_all
from bayesguard.benchmarks.costs import costs, with_costs
from bayesguard.benchmarks.datasets import ImageSet, load
from bayesguard.benchmarks.networks import ResNet20, SmallCNN
from bayesguard.benchmarks.shift_methods import METHODS
from bayesguard.calibration import ShiftAwareScaling
from bayesguard.checkpoint import load_tree, save_tree
from bayesguard.checks import check_count
from bayesguard.errors import BadFile, BadInput
from bayesguard.metrics.functional.binned import BinnedSums, ReliabilityBins
from bayesguard.metrics.functional.selective import RiskCoverage
from bayesguard.predictor import Predictor
from bayesguard.results import Answers, Evaluation, Result, to_json

METRICS = ("accuracy", "nll", "brier", "ece")
_KIND = "evaluations"


@dataclass(frozen=True)
class Settings:
    """How a data set's networks are built and trained."""

    network: Callable[[int, int, int], nn.Module]
    epochs: int
    batch_size: int
    learning_rate: float
    suite: str


SETTINGS = {
    "digits": Settings(SmallCNN, epochs=40, batch_size=64, learning_rate=1e-3, suite="images"),
    "mnist": Settings(SmallCNN, epochs=10, batch_size=256, learning_rate=1e-3, suite="images"),
    "fashion_mnist": Settings(SmallCNN, epochs=15, batch_size=256, learning_rate=1e-3, suite="images"),
    # Trained by bayesguard.benchmarks.recipes.
    "cifar10": Settings(
        ResNet20,
        epochs=recipes.EPOCHS,
        batch_size=recipes.BATCH_SIZE,
        learning_rate=recipes.LEARNING_RATE,
        suite="cifar10-c-ovadia",
    ),
}


def run(
    data: str = "digits",
    *,
    methods: Sequence[str] = tuple(METHODS),
    device: str = "auto",
    out: str | Path = "results",
    seed: int = 0,
    epochs: int | None = None,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Evaluation]:
    """Train, calibrate and evaluate each method, and write the table, the figures and the page under `out`.

    Args:
        data: Name of an image set; see `bayesguard.benchmarks.datasets.load`.
        methods: Which methods, in order.
        device: As in `cells.measure_all`.
        out: Folder for the results; made where it does not exist. Methods that were measured are kept in `cells` below it.
        seed: Of the split, the networks, the draws, the shifts and the bootstrap.
        epochs: Training epochs; None for the data set's own.
        limit: Rows of the training and test parts at most, for a quick look.
        data_dir: Folder of the data; see `bayesguard.benchmarks.files.read`.
        jobs: As in `cells.measure_all`.
        progress: Show a progress bar on stderr.
        say: Where the table goes, and how long each method took.

    Returns:
        The evaluations by label, in the table's order: each method as trained, then with temperature scaling, and those that
        combine with `ShiftAwareScaling`.

    Raises:
        BadInput: An unknown data set, method or device.
        BadFile: What was kept of a method cannot be read.
    """
    if data not in SETTINGS:
        raise BadInput(f"data must be one of {', '.join(SETTINGS)}, got {data!r}")
    check_methods(methods, METHODS)
    check_count(seed, "seed", minimum=0)
    folder = Path(out) / "cells" / f"shift-{data}"
    records = measure_all(
        partial(measure, folder=folder, epochs=epochs, limit=limit, data_dir=data_dir),
        [Cell(data, method, seed) for method in methods],
        settings={"epochs": epochs, "limit": limit},
        folder=folder,
        device=device,
        jobs=jobs,
        progress=progress,
    )
    evaluations: dict[str, Evaluation] = {}
    kept = {record["values"]["label"]: record["values"].get("costs") for record in records}
    for record in records:
        evaluations |= _load(_kept(folder, record["data"], record["method"], seed))
        say("{label}: trained in {trained} s, evaluated in {evaluated} s, {strategy}".format(**record["values"]))
    meta: dict[str, object] = {
        "data": data,
        "methods": list(methods),
        "seed": seed,
        "epochs": epochs,
        "limit": limit,
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "peak_memory_mib": max(record["peak_memory_mib"] for record in records),
        **{name: records[-1][name] for name in ("device", "date", "versions")},
    }
    _write(evaluations, meta, {label: found for label, found in kept.items() if found}, Path(out), say)
    return evaluations


def measure(
    cell: Cell,
    device: torch.device,
    *,
    folder: Path,
    epochs: int | None,
    limit: int | None,
    data_dir: str | Path | None,
) -> dict[str, Any]:
    """Train one method, evaluate it as trained and with each calibration, and keep the evaluations in a file of `folder`."""
    images, settings = load(cell.data, seed=cell.seed, limit=limit, data_dir=data_dir), SETTINGS[cell.data]
    method = METHODS[cell.method]
    start = time.perf_counter()
    predictor = method.build(factory(settings, images), cell.seed, partial(train, images, settings, epochs, device))
    trained = time.perf_counter()
    evaluate = partial(bg.evaluate, data=images.test, metrics=list(METRICS), shifts=settings.suite, seed=cell.seed)
    evaluations = {method.label: evaluate(predictor)}
    predictor.calibrate(images.calibration)
    temperature = float(predictor.calibrators[0].temperature)  # type: ignore[arg-type]
    evaluations[f"{method.label} + T={temperature:.2f}"] = evaluate(predictor)
    if method.shift_aware:
        predictor.forget_calibration()
        # Of the kinds of shift that it is tested on it sees none.
        predictor.calibrate(images.calibration, ShiftAwareScaling(shifts="content", seed=cell.seed))
        evaluations[f"{method.label} + shift-aware"] = evaluate(predictor)
    trees = {label: _tree(evaluation) for label, evaluation in evaluations.items()}
    save_tree(_kept(folder, *cell), trees, kind=_KIND)
    evaluated = time.perf_counter() - trained
    single = bg.Deterministic(factory(settings, images)(cell.seed))
    return {
        "label": method.label,
        "trained": round(trained - start, 1),
        "evaluated": round(evaluated, 1),
        "strategy": predictor.strategy,
        "costs": costs(predictor, single, images.test[0], trained - start),
    }


def _kept(folder: Path, data: str, method: str, seed: int) -> Path:
    return folder / f"{data}-{method}-{seed}.evaluations"


def _load(path: Path) -> dict[str, Evaluation]:
    try:
        found = load_tree(path, kind=_KIND)
    except (BadFile, FileNotFoundError) as error:
        beside = path.with_suffix(".json").name
        raise BadFile(f"{error}; delete {beside} beside it, and its method is measured again") from None
    return {label: _of_tree(tree) for label, tree in found.items()}


def _tree(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as what a file can hold. Those of this benchmark have no groups."""
    bins = {severity: vars(found) for severity, found in evaluation.reliability.items()}
    return {**vars(evaluation), "reliability": bins, "by_class": vars(evaluation.by_class)}


def _of_tree(tree: dict[str, Any]) -> Evaluation:
    return Evaluation(
        results=tuple(Result(*row) for row in tree["results"]),
        meta=tree["meta"],
        reliability={severity: ReliabilityBins(**bins) for severity, bins in tree["reliability"].items()},
        risk=RiskCoverage(*tree["risk"]),
        doubt=tree["doubt"],
        answers=Answers(*tree["answers"]),
        by_class=BinnedSums(**tree["by_class"]),
    )


def factory(settings: Settings, images: ImageSet) -> Callable[[int], nn.Module]:
    """Return what makes the data set's network."""
    _, channels, side, _ = images.train[0].shape
    return lambda seed: settings.network(channels, images.num_classes, side)


def train(
    images: ImageSet,
    settings: Settings,
    epochs: int | None,
    device: torch.device,
    predictor: Predictor,
    *,
    augment: Augment | None = None,
) -> None:
    """Train a predictor as the data set's settings say, for CIFAR-10 by the recipe; images are augmented where `augment` is given."""
    if images.name == "cifar10":
        # The variational objective holds the prior, and weight decay on its spreads would be another one.
        adam = isinstance(predictor, bg.Variational)
        chosen = AUGMENTATIONS[recipes.AUGMENT] if augment is None else Augmentation(augment)
        recipes.fit(predictor, images.train, epochs=epochs or settings.epochs, device=device, augment=chosen, adam=adam)
        return
    predictor.to(device)
    x, y = images.train
    predictor.fit(
        images.train if augment is None else AugmentedBatches(x.to(device), y, settings.batch_size, augment),
        epochs=epochs or settings.epochs,
        batch_size=settings.batch_size if augment is None else None,
        optimizer=partial(torch.optim.Adam, lr=settings.learning_rate),
    )


def choose_device(name: str) -> torch.device:
    """Return the device of that name, CUDA for "auto" where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise BadInput(f"device must be auto, cpu or cuda, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput("device is cuda, but torch sees no CUDA device here; use --device cpu")
    return torch.device(name)


def _write(
    evaluations: dict[str, Evaluation],
    meta: dict[str, object],
    costs: dict[str, dict[str, float]],
    out: Path,
    say: Callable[[str], None],
) -> None:
    from bayesguard import plots, report
    from bayesguard.results import combined_table

    out.mkdir(parents=True, exist_ok=True)
    name = f"shift-{meta['data']}"
    table = combined_table(evaluations)
    records = [{"method": label, "values": {"costs": found}} for label, found in costs.items()]
    say(f"\n{with_costs(table, records)}\n")
    results = {
        label: {**json.loads(evaluation.to_json()), "reliability": _reliability(evaluation)}
        for label, evaluation in evaluations.items()
    }
    to_json({"meta": meta, "costs": costs, "results": results}, out / f"{name}.json")
    plots.metric_against_severity(evaluations, "ece").savefig(out / f"{name}-ece.png", dpi=150)
    plots.metric_against_severity(evaluations, "nll").savefig(out / f"{name}-nll.png", dpi=150)
    plots.reliability_diagram(evaluations).savefig(out / f"{name}-reliability.png", dpi=150)
    report.to_html(evaluations, out / f"{name}.html", title=f"Calibration under shift: {meta['data']}")
    for suffix in (".json", "-ece.png", "-nll.png", "-reliability.png", ".html"):
        say(f"wrote {out / (name + suffix)}")


def _reliability(evaluation: Evaluation) -> dict[str, dict[str, list[float | None]]]:
    """Return the reliability bins of each severity as plain numbers; empty bins have None."""
    return {
        f"{severity:g}": {
            name: [value if math.isfinite(value) else None for value in values.tolist()]
            for name, values in vars(bins).items()
        }
        for severity, bins in evaluation.reliability.items()
    }
