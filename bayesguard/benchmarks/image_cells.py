"""One training, many questions: each method is trained once a seed, and held against shifted and foreign images.

The shifts are those of Ovadia et al. (2019) on MNIST, exactly: `bayesguard.shift.Rotation` interpolates linearly, the paper's
rotation by cubic splines, whose overshoots it keeps.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.benchmarks.cells import Cell, Record, collect, measure_all
from bayesguard.benchmarks.costs import costs
from bayesguard.benchmarks.datasets import ImageSet, load, ood_images
from bayesguard.benchmarks.detection import Scores, detection, scores
from bayesguard.benchmarks.image_recipes import METHODS, NETWORKS, recipe_of, trained
from bayesguard.benchmarks.unseen import CONTENT, FAMILIES
from bayesguard.calibration import ShiftAwareScaling, TemperatureScaling
from bayesguard.errors import BadInput
from bayesguard.metrics.functional import (
    accuracy,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)
from bayesguard.predictor import Predictor
from bayesguard.shift import suite
from bayesguard.shifting import shifting

DEGREES = tuple(range(15, 181, 15))
PIXELS = tuple(range(2, 27, 2))
FOREIGN = {
    "mnist": ("fashion_mnist", "notmnist", "omniglot"),
    "fashion_mnist": ("mnist", "notmnist", "omniglot"),
    "cifar10": ("cifar100",),
}
BUDGETS: dict[str, dict[str, int | None]] = {
    "full": {"members": 10, "epochs": 20, "samples": 300, "limit": None},
    "small": {"members": 2, "epochs": 1, "samples": 8, "limit": 2000},
}
HELD_ROWS = 2000
HELD_SEVERITIES = (1, 3, 5)
POINTWISE, SET = "ensemble + shift-aware, pointwise", "ensemble + shift-aware, unlabelled batch"


def rotated(images: Tensor, degrees: float) -> Tensor:
    """Rotate `[N, C, H, W]` about the centre by cubic splines, and cut the middle out."""
    from scipy.ndimage import rotate

    height, width = images.shape[-2:]
    turned = torch.from_numpy(rotate(images.numpy(), degrees, axes=(-1, -2)))
    top, left = turned.shape[-2] // 2 - height // 2, turned.shape[-1] // 2 - width // 2
    return turned[..., top : top + height, left : left + width].contiguous()


def rolled(images: Tensor, pixels: int) -> Tensor:
    """Shift `[N, C, H, W]` to the right; what leaves on one side enters on the other."""
    return images.roll(pixels, dims=-1)


SHIFTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Any], Tensor]]] = {
    "rotation": (DEGREES, rotated),
    "translation": (PIXELS, rolled),
}


def records_of(
    data: str,
    *,
    network: str | None = None,
    methods: Sequence[str] = METHODS,
    seeds: int = 1,
    budget: str = "full",
    members: int | None = None,
    epochs: int | None = None,
    samples: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    out: str | Path = "results",
    data_dir: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = False,
) -> list[Record]:
    """Train and measure what has no file under `out` yet; return a record for each method and seed.

    Args:
        data: "mnist", "fashion_mnist" or "cifar10".
        network: One of `image_recipes.NETWORKS`; None for "resnet20" on CIFAR-10, and otherwise "lenet" or, with the small
            budget, "lenet5".
        methods: Among `image_recipes.METHODS`.
        seeds: How many; the first is 0.
        budget: "full" for the published sizes, "small" for a run of minutes that shows that everything works.
        members: Networks of an ensemble; None for the budget's, as for the next three.
        epochs: Passes over the training data.
        samples: Draws in one prediction.
        limit: Rows of each part at most.
        device: As in `cells.measure_all`.
        out: A folder; the records lie in `cells` below it.
        data_dir: Folder of the data; see `bayesguard.benchmarks.files.read`.
        jobs: As in `cells.measure_all`.
        progress: Show a progress bar on stderr.

    Raises:
        BadInput: An unknown data set, network, method or budget, or a number below 1.
    """
    if data not in FOREIGN:
        raise BadInput(f"data must be one of {', '.join(FOREIGN)}, got {data!r}")
    if budget not in BUDGETS:
        raise BadInput(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    chosen = network or ("resnet20" if data == "cifar10" else "lenet5" if budget == "small" else "lenet")
    if not methods:
        raise BadInput(f"methods is empty; it must be among {', '.join(METHODS)}")
    recipes = {method: recipe_of(chosen, method)._asdict() for method in methods}
    given = {"members": members, "epochs": epochs, "samples": samples, "limit": limit}
    sizes = BUDGETS[budget] | {name: value for name, value in given.items() if value is not None}
    for name, value in {**sizes, "seeds": seeds}.items():
        if value is not None and value < 1:
            raise BadInput(f"{name} must be 1 or more, got {value}")

    def settings(cell: Cell) -> dict[str, Any]:
        # Of the one method whose answers are calibrated on perturbed images, too.
        calibrated = {"calibrated_on": ["images", CONTENT]} if cell.method == "ensemble" else {}
        return {"network": chosen, **sizes, "recipe": recipes[cell.method], "held_rows": HELD_ROWS, **calibrated}

    return measure_all(
        partial(measure, network=chosen, sizes=sizes, data_dir=data_dir),
        [Cell(data, method, seed) for method in methods for seed in range(seeds)],
        settings=settings,
        folder=Path(out) / "cells" / f"{data}-{chosen}",
        device=device,
        jobs=jobs,
        progress=progress,
    )


def measure(
    cell: Cell, device: torch.device, *, network: str, sizes: Mapping[str, Any], data_dir: str | Path | None
) -> dict[str, Any]:
    """Train one method, and return what it says of shifted and of foreign images, and what it costs."""
    images, foreign = _images(cell.data, sizes["limit"], data_dir)
    start = time.perf_counter()
    numbers = {name: sizes[name] for name in ("members", "epochs", "samples")}
    predictor = trained(cell.method, network, images, seed=cell.seed, device=device, **numbers)
    seconds = time.perf_counter() - start
    rows = _rows(cell, predictor, images)
    found: dict[str, dict[str, Any]] = {row: {"shifts": {}, "ood": {}} for row in rows}
    inputs, labels = images.test
    inside: dict[str, Scores] = {}
    sets = [("clean", 0), *((kind, level) for kind, (levels, _) in _shifts(inputs).items() for level in levels)]
    for kind, level in sets:
        pred = predictor.predict(inputs if kind == "clean" else SHIFTS[kind][1](inputs, level))
        for row, adjust in rows.items():
            answer = adjust(pred)
            found[row]["shifts"].setdefault(kind, {})[str(level)] = quality(answer, labels)
            if kind == "clean":
                inside[row] = scores(answer)
                found[row]["confidence"] = _confidence(answer)
    for name, others in foreign.items():
        pred = predictor.predict(others)
        for row, adjust in rows.items():
            # Which set a row is from is what detection has to find out: nothing may be fitted to a set by itself.
            if row != SET:
                answer = adjust(pred)
                found[row]["ood"][name] = detection(inside[row], scores(answer)) | {"confidence": _confidence(answer)}
    return {"rows": found, "costs": network_costs(predictor, network, images, seconds)}


def quality(pred: Any, labels: Tensor) -> dict[str, float]:
    """Return accuracy, NLL (nats), Brier score (class sum) and ECE (15 bins of equal width)."""
    labels = labels.to(pred.device)
    return {
        "accuracy": float(accuracy(pred.probs, labels)),
        "nll": float(negative_log_likelihood(pred.logits.log_softmax(-1), labels)),
        "brier": float(brier_score(pred.probs, labels)),
        "ece": float(expected_calibration_error(pred.probs, labels)),
    }


def _confidence(pred: Any) -> float:
    return float(pred.probs.double().max(-1).values.mean())


def _images(data: str, limit: int | None, data_dir: str | Path | None) -> tuple[ImageSet, dict[str, Tensor]]:
    images = load(data, limit=limit, data_dir=data_dir)
    return images, {name: ood_images(name, data_dir=data_dir)[:limit] for name in FOREIGN[data]}


def _shifts(inputs: Tensor) -> dict[str, tuple[tuple[int, ...], Callable[[Tensor, Any], Tensor]]]:
    """The published angles and distances belong to images of 28 pixels."""
    return SHIFTS if inputs.shape[-1] == 28 else {}


def _rows(cell: Cell, predictor: Predictor, images: ImageSet) -> dict[str, Callable[[Any], Any]]:
    """What each row of the tables makes of the predictor's answers; all is fitted on held-out data."""
    rows: dict[str, Callable[[Any], Any]] = {cell.method: lambda pred: pred}
    if cell.method == "vanilla":
        clean, labels = predictor.predict_with_targets(images.calibration)
        rows["temperature"] = TemperatureScaling().fit(clean, labels)
    if cell.method == "ensemble":
        part = images.calibration[0][:HELD_ROWS], images.calibration[1][:HELD_ROWS]
        clean, labels = predictor.predict_with_targets(part)
        answers = [clean]
        for shift in (*suite("images", cell.seed), *suite(CONTENT, cell.seed)):
            if shift.name not in FAMILIES["geometric"] and shift.severity in HELD_SEVERITIES:
                answers.append(predictor.predict_with_targets(part, transform=shifting(shift, cell.seed))[0])
        rows[POINTWISE] = ShiftAwareScaling("point", seed=cell.seed).fit_shifted(answers, labels)
        batch = ShiftAwareScaling("set", seed=cell.seed).fit_shifted(answers, labels)
        rows[SET] = lambda pred: batch.adapt(pred)(pred)
    return rows


def network_costs(predictor: Predictor, network: str, images: ImageSet, train_seconds: float) -> dict[str, float]:
    """Return the costs of a predictor beside one network of the kind, on the first 1,000 test images."""
    inputs = images.test[0][:1000]
    _, channels, side, _ = inputs.shape
    single = bg.Deterministic(NETWORKS[network](channels, images.num_classes, side, 0.0))
    return costs(predictor, single, inputs, train_seconds)


def collect_rows(
    records: Sequence[Record],
    path: str | Path,
    keep: Callable[[dict[str, Any]], dict[str, Any] | None],
    **meta: str,
) -> None:
    """Write the records of a run with what `keep` leaves of each row; rows of which it leaves nothing are dropped."""
    kept = []
    for record in records:
        values = record["values"]
        rows = {row: part for row, found in values["rows"].items() if (part := keep(found)) is not None}
        kept.append({**record, "values": {"rows": rows, "costs": values["costs"]}})
    collect(kept, path, **meta)
