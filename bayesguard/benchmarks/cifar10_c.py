"""CIFAR-10-C, regenerated: every method on the shifted sets of a published list, summed up as that publication does.

"cifar10-c-ovadia": quartiles over 16 corruptions at five severities, as Ovadia et al. (2019, NeurIPS) print them.
"cifar10-c": means over 15 corruptions at five severities, as google/uncertainty-baselines prints them. The two are different
lists, and their numbers are never set beside one another.
"""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.benchmarks import recipes
from bayesguard.benchmarks.augmented import check_augment
from bayesguard.benchmarks.cells import Cell, Record, check_methods, collect, measure_all
from bayesguard.benchmarks.cifar10_c_scores import Scored, averaged, by_set, scored
from bayesguard.benchmarks.cifar10_c_tables import table
from bayesguard.benchmarks.costs import costs
from bayesguard.benchmarks.datasets import ImageSet, load
from bayesguard.benchmarks.recipes import METHODS, Plan
from bayesguard.benchmarks.residual import NETWORKS
from bayesguard.benchmarks.unseen import CONTENT, FAMILIES, ROWS, answers, fitted, rows
from bayesguard.calibration import TemperatureScaling
from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.predictive import Predictive
from bayesguard.shift import suite as suite_of

SUITES = ("cifar10-c-ovadia", "cifar10-c")
# Members as in the table that is set beside: 10 by Ovadia et al., 4 by uncertainty-baselines.
MEMBERS = {"cifar10-c-ovadia": 10, "cifar10-c": 4}
DRAWS = {"cifar10-c-ovadia": 128, "cifar10-c": 30}
_NETWORK = "resnet20"
# What smaller budgets change.
BUDGETS: dict[str, dict[str, Any]] = {
    "full": {},
    "cpu": {
        "epochs": 8,
        "members": 3,
        "draws": 4,
        "train": 20_000,
        "test": 1000,
        "timings": 1,
        "precision": "bfloat16",
    },
    "small": {
        **{"network": "small_cnn", "epochs": 2, "members": 2, "draws": 2, "train": 2000, "test": 500, "timings": 1},
        "severities": [1, 5],
        "kinds": ["gaussian_noise", "fog", "contrast"],  # Of three families.
    },
}
_TIMINGS = 3


def run(
    *,
    suite: str = "cifar10-c-ovadia",
    methods: Sequence[str] = tuple(METHODS),
    network: str | None = None,
    seed: int = 0,
    seeds: int = 1,
    epochs: int | None = None,
    device: str = "auto",
    out: str | Path = "results",
    data_dir: str | Path | None = None,
    jobs: int | None = None,
    budget: str = "full",
    augment: str = recipes.AUGMENT,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Train and measure every method, print the tables, and write `shift-<suite>.json` under `out`.

    Args:
        suite: "cifar10-c-ovadia" (quartiles over 80 sets) or "cifar10-c" (means over 75 sets).
        methods: Names of `recipes.METHODS`.
        network: Name in `residual.NETWORKS`; None for the budget's, "resnet20" of the full one.
        seed: The first seed: of networks, training, draws and shifts.
        seeds: How many, from `seed` on.
        epochs: Of training; None for the recipe's.
        device: "auto", "cpu" or "cuda".
        out: Folder for the results. Cells that were measured are kept below it, and not measured again.
        data_dir: Folder of the data; None for `BAYESGUARD_DATA`, or the download.
        jobs: Processes; see `bayesguard.benchmarks.cells.measure_all`.
        budget: "full"; "cpu" for all shifts in two or three hours without a GPU: eight epochs on 20,000 images, 1,000 images to
            calibrate and 1,000 to test on, three members, four draws, trained in bfloat16; or "small" for a quick look: the small
            convolutional network, two epochs on 2,000 images by Adam, 500 and 500, two members and draws, three kinds at two
            severities.
        augment: How the training images are augmented, one of `augmented.AUGMENTATIONS`; AugMix's own method keeps its own.
        progress: Show a progress bar.
        say: Where the tables go.

    Returns:
        A record for each method and seed, with every number of every shifted set, and reliability bins by severity.

    Raises:
        BadInput: An unknown suite, method, network, budget, augmentation or device.
    """
    check_methods(methods, METHODS)
    check_augment(augment)
    check_count(seed, "seed", minimum=0)
    for name, given, allowed in (
        ("suite", suite, SUITES),
        ("network", network or _NETWORK, NETWORKS),
        ("budget", budget, tuple(BUDGETS)),
    ):
        if given not in allowed:
            raise BadInput(f"{name} must be one of {', '.join(allowed)}, got {given!r}")
    if seeds < 1 or (epochs is not None and epochs < 1):
        raise BadInput(f"seeds and epochs must be 1 or more, got {seeds} and {epochs}")
    settings = _settings(suite, network, epochs, budget)
    own_network = settings["network"] != BUDGETS[budget].get("network", _NETWORK)
    parts = [suite, budget if budget != "full" else "", settings["network"] if own_network else ""]
    name = "-".join(["shift", *filter(None, parts)])

    def own(cell: Cell) -> dict[str, Any]:
        # Each is a setting of the methods only that have it, and cells of the recipe's own augmentation do not name it.
        method = METHODS[cell.method]
        calibrated = {"calibrated_on": [suite, CONTENT]} if method.shift_aware else {}
        augmented = {} if method.augmented or augment == recipes.AUGMENT else {"augment": augment}
        return {**settings, **calibrated, **augmented}

    records = measure_all(
        partial(measure, settings={**settings, "augment": augment}, data_dir=data_dir),
        [Cell("cifar10", method, seed + k) for method in methods for k in range(seeds)],
        settings=own,
        folder=Path(out) / f"{name}-cells",
        device=device,
        jobs=jobs,
        progress=progress,
    )
    say(f"\n{table(records)}\n")
    path = Path(out) / f"{name}.json"
    collect(records, path, benchmark="shift", data="cifar10", **settings)
    say(f"wrote {path}")
    return records


def measure(
    cell: Cell, device: torch.device, *, settings: dict[str, Any], data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Train a method and return its numbers on undisturbed and shifted test data, and its costs."""
    images = _images(settings["train"], settings["test"], data_dir)
    plan = Plan(
        settings["network"],
        images,
        device,
        cell.seed,
        settings["epochs"],
        settings["members"],
        settings["draws"],
        augment=settings["augment"],
        precision=settings["precision"],
    )
    method = METHODS[cell.method]
    start = time.perf_counter()
    predictor = method.build(plan)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    shifts = [
        shift
        for shift in suite_of(settings["suite"], cell.seed)
        if shift.severity in settings["severities"] and (settings["kinds"] is None or shift.name in settings["kinds"])
    ]
    clean, targets = predictor.predict_with_targets(images.calibration)
    tested, labels = answers(predictor, images.test, shifts, cell.seed + 1)
    temperature = TemperatureScaling().fit(Predictive.from_logits(clean.logits), targets).temperature
    found = {
        "as trained": [scored(pred, labels) for pred in tested],
        "temperature": [scored(Predictive.from_logits(pred.logits / temperature), labels) for pred in tested],
    }
    if method.shift_aware:
        seen = [*shifts, *suite_of(CONTENT, cell.seed)]
        held, _ = answers(predictor, images.calibration, seen, cell.seed)
        found |= left_out(held, targets, tested, labels, [shift.name for shift in seen], cell.seed)
    return {
        "rows": {row: by_set(shifts, own) for row, own in found.items()},
        "temperature": float(temperature),
        "costs": costs(
            predictor,
            bg.Deterministic(plan.make(plan.seed)),
            images.test[0],
            seconds,
            repeats=settings["timings"],
        ),
    }


def left_out(
    held: Sequence[Predictive],
    targets: Tensor,
    tested: Sequence[Predictive],
    labels: Tensor,
    kinds: Sequence[str],
    seed: int,
) -> dict[str, list[Scored]]:
    """Return scores of what is calibrated on shifts of all families but one, on undisturbed data and on that one.

    Args:
        held: Answers to held-out data: undisturbed, then under each shift.
        targets: Their labels.
        tested: Answers to test data in the same order, but for the last shifts that are of no family.
        labels: Their labels.
        kinds: The kind of each shift of `held`.
        seed: Of the calibrators.

    Returns:
        For each row of `unseen.ROWS` that follows the shift: the scores and bins of each set, those of undisturbed data as means
        and sums over the families left out.
    """
    names = ["", *kinds]
    found: dict[str, list[list[Scored]]] = {row: [[] for _ in tested] for row in ROWS[2:]}
    for family in FAMILIES.values():
        if not set(family) & set(kinds):
            continue
        calibrators = fitted(
            [pred for pred, name in zip(held, names, strict=True) if name not in family], targets, seed
        )
        for place, (name, pred) in enumerate(zip(names, tested, strict=False)):
            if name and name not in family:
                continue
            for row, answer in rows(calibrators, pred, labels).items():
                if row in found:
                    found[row][place].append(scored(answer, labels))
    return {row: [averaged(each) for each in sets] for row, sets in found.items()}


def _settings(suite: str, network: str | None, epochs: int | None, budget: str) -> dict[str, Any]:
    """Return what decides the numbers, as JSON."""
    own: dict[str, Any] = {
        "network": _NETWORK,
        "epochs": recipes.EPOCHS,
        "members": MEMBERS[suite],
        "draws": DRAWS[suite],
        "train": None,
        "test": None,
        "timings": _TIMINGS,
        "severities": list(range(1, 6)),
        "kinds": None,
        "precision": None,
        **BUDGETS[budget],
    }
    return {
        "suite": suite,
        "budget": budget,
        **own,
        "network": network or own["network"],
        "epochs": epochs or own["epochs"],
        "batch_size": recipes.BATCH_SIZE,
        "learning_rate": recipes.LEARNING_RATE,
        "weight_decay": recipes.WEIGHT_DECAY,
        "adam_learning_rate": recipes.ADAM_LEARNING_RATE,
    }


@lru_cache(maxsize=1)
def _images(train: int | None, test: int | None, data_dir: str | Path | None) -> ImageSet:
    """CIFAR-10, kept for the next cell of this process; the first so many rows of each part."""
    images = load("cifar10", data_dir=data_dir)

    def first(part: tuple[Tensor, Tensor], count: int | None) -> tuple[Tensor, Tensor]:
        return part[0][:count].contiguous(), part[1][:count].contiguous()

    return images._replace(
        train=first(images.train, train),
        calibration=first(images.calibration, test),
        test=first(images.test, test),
    )


def run_shift(data: str, *, methods: Sequence[str] | None, limit: int | None, budget: str, **options: Any) -> None:
    """Run the command `bayesguard benchmark shift`: this module's `run` for CIFAR-10, that of `shift` for other data.

    Raises:
        BadInput: An option that the data set's benchmark does not have.
    """
    from bayesguard.benchmarks import shift, shift_methods

    given = {name: value for name, value in options.items() if value is not None}
    if data == "cifar10":
        if limit is not None:
            raise BadInput("--limit is not for cifar10; use --budget small for a quick look")
        run(methods=methods or tuple(METHODS), budget=budget, **given)
        return
    if only := [name for name in ("suite", "network", "seeds", "augment") if name in given]:
        raise BadInput(f"--{only[0]} is for --data cifar10, got --data {data}; leave it out")
    if budget not in ("full", "small"):
        raise BadInput(f"budget must be full or small, got {budget!r}")
    if budget == "small":
        given["epochs"], limit = given.get("epochs", 2), limit or 500
    shift.run(data, methods=methods or list(shift_methods.METHODS), limit=limit, **given)
