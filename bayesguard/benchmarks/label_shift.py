"""Label shift: the classes look as they did, and only their shares have changed. What does correction of the prior repair?

Shifts as in Z. C. Lipton, Y.-X. Wang, A. J. Smola (2018, ICML) and A. Alexandari, A. Kundaje, A. Shrikumar (2020, ICML):
class shares from a Dirichlet distribution, or one class with a large share. Networks are trained on the training set as
it is, and every correction is fitted on held-out rows whose shares are those of the training set.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesguard.benchmarks.cells import Cell, Record, check_run, collect, measure_all
from bayesguard.benchmarks.datasets import ImageSet, load
from bayesguard.benchmarks.image_cells import network_costs, quality
from bayesguard.benchmarks.image_recipes import recipe_of, trained
from bayesguard.benchmarks.label_shift_draws import SHIFTS, Shift, fitting_counts, resampled, shares_of, total_variation
from bayesguard.benchmarks.label_shift_tables import NOTE, described, tables
from bayesguard.calibration import Calibrator, PriorCorrection, TemperatureScaling, VectorScaling
from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.predictive import Predictive
from bayesguard.sampling import stream

METHODS = ("vanilla", "ensemble")


@dataclass(frozen=True)
class Settings:
    """What is trained, and how much of it is tested.

    Attributes:
        network: One of `image_recipes.NETWORKS`.
        epochs: Passes over the training rows.
        members: Networks of the ensemble.
        limit: Training rows at most; None for all.
        rows: Test rows of a draw; fewer where a class has not as many.
        draws: Draws of class shares for each shift and seed.
    """

    network: str
    epochs: int
    members: int = 5
    limit: int | None = None
    rows: int = 1000
    draws: int = 10


DATA = {
    "digits": Settings("mlp", 40, rows=200),
    "mnist": Settings("lenet5", 6),
    "fashion_mnist": Settings("lenet5", 6),
    "cifar10": Settings("resnet20", 30),
}
_SMALL: dict[str, Any] = {"members": 2, "limit": 1000, "rows": 200, "draws": 2}
_SMALL_EPOCHS = {"digits": 10, "mnist": 4, "fashion_mnist": 4, "cifar10": 1}


class Answer(NamedTuple):
    """One row of the table: the calibrated predictions, and what corrects them to the shares of a draw."""

    pred: Predictive
    correction: PriorCorrection | None = None
    knows: bool = False


def run(
    data: str = "mnist",
    *,
    methods: Sequence[str] = METHODS,
    seeds: int = 3,
    seed: int = 0,
    budget: str = "full",
    device: str = "auto",
    out: str | Path = "results",
    data_dir: str | Path | None = None,
    jobs: int | None = None,
    progress: bool = False,
    say: Callable[[str], None] = print,
    **sizes: Any,
) -> list[Record]:
    """Train every method with every seed, test it under every shift, print the tables and write `label-shift-<data>.json`.

    Args:
        data: "digits", "mnist", "fashion_mnist" or "cifar10".
        methods: Among `METHODS`.
        seeds: How many.
        seed: The first of them.
        budget: "full", or "small" for a look of seconds (minutes for cifar10) that shows that everything runs.
        device: As in `cells.measure_all`.
        out: Folder for the results. Cells that were measured are kept in `label-shift` below it, and not measured again.
        data_dir: Folder of the data; see `bayesguard.benchmarks.files.read`.
        jobs: As in `cells.measure_all`.
        progress: Show a progress bar on stderr.
        say: Where the tables go.
        sizes: Fields of `Settings` that are not those of the data set and budget; None leaves one as it is.

    Raises:
        BadInput: An unknown data set, method, network, budget or size, or a number below 1.
    """
    if data not in DATA:
        raise BadInput(f"data must be one of {', '.join(DATA)} for label shift, got {data!r}")
    check_run(methods, METHODS, budget, seeds)
    check_count(seed, "seed", minimum=0)
    settings = _settings(data, budget, sizes)
    recipes = {method: recipe_of(settings.network, method)._asdict() for method in METHODS}
    records = measure_all(
        partial(measure, settings=settings, data_dir=data_dir),
        [Cell(data, method, number) for method in methods for number in range(seed, seed + seeds)],
        settings={**asdict(settings), "budget": budget, "recipes": recipes, "shifts": [str(s) for s in SHIFTS]},
        folder=Path(out) / "label-shift",
        device=device,
        jobs=jobs,
        progress=progress,
    )
    path = Path(out) / f"label-shift-{data}.json"
    collect(records, path, benchmark="label-shift", data=data, budget=budget, note=NOTE)
    say(f"\n{data}; {described(records)}\n\n{tables(records)}\n\n{NOTE}\n\nwrote {path}")
    return records


def measure(
    cell: Cell, device: torch.device, *, settings: Settings, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Train one method with one seed, and return what each row of the table scores in every draw of every shift."""
    images = load(cell.data, seed=cell.seed, data_dir=data_dir)
    images = images._replace(train=(images.train[0][: settings.limit], images.train[1][: settings.limit]))
    start = time.perf_counter()
    predictor = trained(
        cell.method,
        settings.network,
        images,
        seed=cell.seed,
        members=settings.members,
        epochs=settings.epochs,
        samples=1,
        device=device,
    )
    seconds = time.perf_counter() - start
    held, held_labels = predictor.predict_with_targets(images.calibration, keep_draws=True)
    answers = answers_of(held, held_labels, predictor.predict(images.test[0], keep_draws=True))
    natural = torch.bincount(images.calibration[1], minlength=images.num_classes).double() / len(images.calibration[1])
    found = {str(shift): _drawn(answers, images, natural, shift, settings, cell.seed) for shift in SHIFTS}
    return {
        "shifts": found,
        "costs": network_costs(predictor, settings.network, images, seconds),
    }


def answers_of(held: Predictive, labels: Tensor, test: Predictive) -> dict[str, Answer]:
    """Fit every row of the table on held-out predictions, and return it with its predictions for all test rows."""
    found: dict[str, Answer] = {}
    maps: dict[str, Calibrator | None] = {
        "as trained": None,
        "temperature": TemperatureScaling(),
        "vector": VectorScaling(),
    }
    for name, calibrator in maps.items():
        own, pred = held, test
        if calibrator is not None:
            calibrator.fit(held, labels)
            own, pred = calibrator(held), calibrator(test)
        found[name] = Answer(pred)
        found[f"{name} + EM"] = Answer(pred, PriorCorrection("em").fit(own, labels))
        if name == "temperature":
            found[f"{name} + BBSE"] = Answer(pred, PriorCorrection("bbse").fit(own, labels))
        if calibrator is not None:
            found[f"{name} + true shares"] = Answer(pred, PriorCorrection().fit(own, labels), knows=True)
    return found


def scored(answer: Answer, chosen: Tensor, labels: Tensor, assumed: Tensor) -> dict[str, float] | None:
    """Return the qualities of a row on chosen test rows, and how far the shares that it assumes are from the true ones.

    Args:
        answer: The row.
        chosen: Indices of test rows.
        labels: Labels of all test rows.
        assumed: Shares that predictions without correction are made for `[K]`.

    Returns:
        Accuracy, NLL (nats; infinite where a class of a row was ruled out), Brier score, ECE and the total variation
        between shares; None where BBSE refuses, because predictions do not tell the classes apart.
    """
    pred, truth = answer.pred[chosen], labels[chosen]
    shares = torch.bincount(truth, minlength=len(assumed)).double() / len(truth)
    if answer.correction is not None:
        try:
            correction = answer.correction.adapt_to(shares) if answer.knows else answer.correction.adapt(pred)
        except BadInput:
            return None
        pred, assumed = correction(pred), correction.new.cpu()
    values = {**quality(pred, truth), "distance": total_variation(assumed, shares)}
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def _drawn(
    answers: Mapping[str, Answer], images: ImageSet, natural: Tensor, shift: Shift, settings: Settings, seed: int
) -> dict[str, Any]:
    """Return for each row of the table its scores in every draw, and how many test rows each draw had."""
    labels, sizes = images.test[1], []
    rows: dict[str, list[dict[str, float] | None]] = {name: [] for name in answers}
    available = torch.bincount(labels, minlength=images.num_classes)
    for draw in range(settings.draws):
        counts = fitting_counts(shares_of(shift, natural, seed, draw), available, settings.rows)
        chosen = resampled(labels, counts, stream("cpu", seed, "label shift, rows", str(shift), draw))
        sizes.append(len(chosen))
        for name, answer in answers.items():
            rows[name].append(scored(answer, chosen, labels, natural))
    return {"sizes": sizes, "rows": rows}


def _settings(data: str, budget: str, sizes: Mapping[str, Any]) -> Settings:
    given = {name: value for name, value in sizes.items() if value is not None}
    small = {**_SMALL, "epochs": _SMALL_EPOCHS[data]} if budget == "small" else {}
    chosen = {**asdict(DATA[data]), **small}
    if unknown := [name for name in given if name not in chosen]:
        raise BadInput(f"{unknown[0]} is not a setting of label shift; those are {', '.join(chosen)}")
    settings = Settings(**{**chosen, **given})
    for name, value in asdict(settings).items():
        if name != "network" and value is not None and value < 1:
            raise BadInput(f"{name} must be 1 or more, got {value}")
    return settings
