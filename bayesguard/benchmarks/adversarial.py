"""Adversarial perturbations as a shift whose severity is a radius: does uncertainty rise before accuracy falls?

Each method is attacked in the open: the attack climbs the negative log-likelihood of the mixture over the method's own
draws, held fixed, within a radius of each test image in the largest pixel difference. A temperature leaves the attack
as it is: it climbs the loss of the network as trained.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

import bayesguard as bg
from bayesguard.adversarial import fgsm, pgd
from bayesguard.benchmarks.cells import Cell, Record, check_run, collect, measure_all, spread
from bayesguard.benchmarks.costs import costs, with_costs
from bayesguard.benchmarks.datasets import ImageSet, Part, load
from bayesguard.benchmarks.networks import seeded
from bayesguard.benchmarks.shift import SETTINGS, factory, train
from bayesguard.benchmarks.shift_methods import METHODS as TRAINED
from bayesguard.data import Batch
from bayesguard.errors import BadInput
from bayesguard.metrics.functional import error_auroc
from bayesguard.predictor import Predictor
from bayesguard.sampling import derive_seed

METHODS = {
    "deterministic": "Deterministic",
    "temperature": "Deterministic, temperature",
    "mc_dropout": "MCDropout",
    "deep_ensemble": "DeepEnsemble",
    "variational": "Variational",
}
ATTACKS = ("pgd", "fgsm")
RADII = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
STEPS = 20
_DRAWS = 8  # under attack at once; predictions have the method's own number
_BATCH = 200


class Answers(NamedTuple):
    """What a method says to each test image: all `[N]`."""

    right: Tensor
    confidence: Tensor
    entropy: Tensor
    information: Tensor
    error_auroc: float | None


def attacked_loss(predictor: Predictor, seed: int, draws: int = _DRAWS) -> Callable[[Batch], Tensor]:
    """Return the negative log-likelihood of the mixture over fixed draws, as a function of a batch, differentiable."""
    functions: list[nn.Module]
    if isinstance(predictor, bg.DeepEnsemble):
        functions = [member.draw(seed) for member in predictor.members]
    elif isinstance(predictor, bg.Deterministic):
        functions = [predictor.draw(seed)]
    else:
        functions = [predictor.draw(derive_seed(seed, "attack", k)) for k in range(draws)]

    def loss(batch: Batch) -> Tensor:
        if batch.targets is None:
            raise BadInput("the attack needs the targets of a batch; this one has none")
        log_probs = torch.stack([function(*batch.inputs).log_softmax(-1) for function in functions])
        mixture = log_probs.logsumexp(0) - math.log(len(functions))
        return nll_loss(mixture, batch.targets, reduction="sum")

    return loss


def perturbed(predictor: Predictor, part: Part, radius: float, attack: str, seed: int) -> Tensor:
    """Return the images under attack, in [0, 1]."""
    images, labels = part
    loss = attacked_loss(predictor, seed)
    moved = []
    for number, (rows, targets) in enumerate(zip(images.split(_BATCH), labels.split(_BATCH), strict=True)):
        batch = Batch((rows,), {}, targets)
        if attack == "fgsm":
            moved.append(fgsm(loss, batch, radius).inputs[0].clamp(0, 1))
        else:
            start = derive_seed(seed, "start", number)
            moved.append(pgd(loss, batch, radius, steps=STEPS, bounds=(0, 1), seed=start).inputs[0])
    return torch.cat(moved).detach()


def answers(predictor: Predictor, images: Tensor, labels: Tensor) -> Answers:
    """Return what a predictor says to images."""
    found = predictor.predict((images, labels))
    probs, uncertainty, labels = found.probs, found.uncertainty(), labels.cpu()
    confidence, guess = probs.max(-1)
    right = guess == labels
    ranked = None if bool(right.all()) or not bool(right.any()) else float(error_auroc(probs, labels))
    return Answers(right, confidence, uncertainty.total, uncertainty.epistemic, ranked)


def onset(changes: Sequence[Tensor], radii: Sequence[float]) -> float | None:
    """Return the first radius at which a change per image `[N]` is above 0, at 95 % over images; None for never.

    Examples:
        >>> onset([torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1.0, 1.1, 0.9, 1.0])], [0, 1, 2])
        2
    """
    for radius, change in zip(radii, changes, strict=True):
        values = change.double()
        if bool(values.mean() > 1.96 * values.std() / math.sqrt(len(values))):
            return radius
    return None


def measured(predictor: Predictor, part: Part, radii: Sequence[float], attack: str, seed: int) -> dict[str, Any]:
    """Return the figures at each radius, and where entropy starts to rise and accuracy to fall."""
    found = [answers(predictor, perturbed(predictor, part, radius, attack, seed), part[1]) for radius in radii]
    clean = found[0]
    return {
        "radii": [
            {
                "radius": radius,
                "accuracy": float(each.right.double().mean()),
                "confidence": float(each.confidence.double().mean()),
                "entropy": float(each.entropy.double().mean()),
                "mutual_information": float(each.information.double().mean()),
                "error_auroc": each.error_auroc,
            }
            for radius, each in zip(radii, found, strict=True)
        ],
        "entropy_rises_at": onset([each.entropy - clean.entropy for each in found], radii),
        "accuracy_falls_at": onset([clean.right.double() - each.right.double() for each in found], radii),
    }


def measure(
    cell: Cell, device: torch.device, *, attack: str, radii: Sequence[float], epochs: int | None, limit: int | None
) -> dict[str, Any]:
    """Train one method and attack it; see `measure_all`."""
    images = load(cell.data, seed=cell.seed, limit=limit)
    start = time.perf_counter()
    predictor = _trained(cell, images, device, epochs)
    seconds = time.perf_counter() - start
    if cell.method == "temperature":
        predictor.calibrate(images.calibration)
    part = images.test[0].to(device), images.test[1].to(device)
    single = bg.Deterministic(factory(SETTINGS[cell.data], images)(cell.seed))
    return {
        **measured(predictor, part, radii, attack, cell.seed),
        "num_images": len(part[1]),
        "costs": costs(predictor, single, part[0], seconds),
    }


def _trained(cell: Cell, images: ImageSet, device: torch.device, epochs: int | None) -> Predictor:
    settings = SETTINGS[cell.data]
    fit = partial(train, images, settings, epochs, device)
    if cell.method == "variational":
        predictor = bg.Variational(seeded(factory(settings, images), cell.seed), seed=cell.seed)
        fit(predictor)
        return predictor
    build = TRAINED["deterministic" if cell.method == "temperature" else cell.method].build
    return build(factory(settings, images), cell.seed, fit)


def run(
    data: str = "digits",
    *,
    methods: Sequence[str] = tuple(METHODS),
    seeds: int = 3,
    attack: str = "pgd",
    radii: Sequence[float] = RADII,
    device: str = "auto",
    out: str | Path = "results",
    jobs: int | None = None,
    budget: str = "full",
    epochs: int | None = None,
    limit: int | None = None,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Train and attack every method with every seed, print the table, and write `adversarial-<data>.json` under `out`.

    Args:
        data: Name of an image set; see `bayesguard.benchmarks.datasets.load`.
        methods: Among `METHODS`.
        seeds: How many, from 0.
        attack: "pgd" (20 steps from a random start) or "fgsm" (one step).
        radii: Largest change of a pixel, of images in [0, 1]; the first is 0.
        device: "auto", "cpu" or "cuda".
        out: Folder for the results, and of one file a cell, from which a run continues.
        jobs: Processes.
        budget: "full", or "small" for a quick look: two epochs, 200 rows, one seed.
        epochs: Training epochs; None for the data set's own.
        limit: Rows of the training and test parts at most.
        progress: Show a progress bar.
        say: Where the table goes.

    Raises:
        BadInput: An unknown data set, method, attack, budget or device; radii that do not rise from 0.
    """
    check_run(methods, METHODS, budget, seeds)
    if data not in SETTINGS:
        raise BadInput(f"data must be one of {', '.join(SETTINGS)}, got {data!r}")
    if attack not in ATTACKS:
        raise BadInput(f"attack must be one of {', '.join(ATTACKS)}, got {attack!r}")
    if list(radii[:1]) != [0] or any(b <= a for a, b in itertools.pairwise(radii)):
        raise BadInput(f"radii must rise from 0, got {list(radii)}")
    if budget == "small":
        seeds, epochs, limit = 1, epochs or 2, limit or 200
    options: dict[str, Any] = {"attack": attack, "radii": list(radii), "epochs": epochs, "limit": limit}
    cells = [Cell(data, method, seed) for method in methods for seed in range(seeds)]
    settings = {**options, "steps": STEPS, "draws_attacked": _DRAWS}
    folder = Path(out) / f"adversarial-{data}-cells"
    records = measure_all(
        partial(measure, **options),
        cells,
        settings=settings,
        folder=folder,
        device=device,
        jobs=jobs,
        progress=progress,
    )
    say(f"\n{table(records)}\n")
    path = Path(out) / f"adversarial-{data}.json"
    collect(records, path, benchmark="adversarial", **settings)
    say(f"wrote {path}")
    return records


def table(records: Sequence[Record]) -> str:
    """Return means over seeds with 95 % t intervals as Markdown, and where entropy rises and accuracy falls by seed, and costs."""
    lines = [
        "| | radius | accuracy | confidence | entropy | mutual information | AUROC of errors |",
        "|---|---|---|---|---|---|---|",
    ]
    names = ("accuracy", "confidence", "entropy", "mutual_information", "error_auroc")
    onsets = ["| | entropy rises at | accuracy falls at |", "|---|---|---|"]
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record["values"] for record in records if record["method"] == method]
        for place, row in enumerate(own[0]["radii"]):
            figures = [_figure([values["radii"][place][name] for values in own]) for name in names]
            label = "" if place else METHODS[method]
            lines.append(f"| {label} | {row['radius']:g} | {' | '.join(figures)} |")
        places = [_radii([values[key] for values in own]) for key in ("entropy_rises_at", "accuracy_falls_at")]
        onsets.append(f"| {METHODS[method]} | {' | '.join(places)} |")
    return with_costs("\n".join([*lines, "", *onsets]), records, METHODS)


def _figure(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known).shown() if known else "-"


def _radii(values: Sequence[float | None]) -> str:
    return ", ".join("never" if value is None else f"{value:g}" for value in values)
