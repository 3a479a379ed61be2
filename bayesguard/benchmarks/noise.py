"""Human labels of CIFAR-10: their doubt as the truth to compare with, and their mistakes as what a network learns from.

CIFAR-10H (Peterson et al. 2019, ICCV): about 50 people labelled each test image, so that a predicted distribution can be held
against theirs. CIFAR-10N (Wei et al. 2022, ICLR): three people labelled each training image, with mistakes of their own kind.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks.augmented import AUGMENTATIONS, check_augment, training_batches
from bayesguard.benchmarks.cells import Cell, Record, check_run, collect, measure_all
from bayesguard.benchmarks.costs import costs, with_costs
from bayesguard.benchmarks.datasets import ImageSet, load
from bayesguard.benchmarks.files import read
from bayesguard.benchmarks.networks import ResNet20, SmallCNN
from bayesguard.benchmarks.shift_methods import METHODS as BUILDERS
from bayesguard.benchmarks.text_tables import shown
from bayesguard.calibration import ShiftAwareScaling, TemperatureScaling
from bayesguard.calibration.base import Calibrator
from bayesguard.errors import BadFile, BadInput
from bayesguard.metrics.functional import accuracy, expected_calibration_error
from bayesguard.predictive import Predictive
from bayesguard.predictor import Predictor
from bayesguard.shift import Corruption, Shift, suite

LABELS = ("cifar10h", "cifar10n")
NOISES = ("aggregate", "random1", "worst")
METHODS = ("deterministic", "mc_dropout", "deep_ensemble", "variational")
# What shift-aware scaling learns from: one kind of perturbation of each family and what takes
# the content away, mild, middling and strong.
_PERTURBED = ("gaussian_noise", "defocus_blur", "fog", "contrast")
_SEVERITIES = (1, 3, 5)


@dataclass(frozen=True)
class Budget:
    """The network, how it is trained, and on how many images."""

    network: str
    epochs: int
    batch_size: int
    learning_rate: float
    num_train: int | None
    num_held_out: int | None

    def __str__(self) -> str:
        rows = f"{self.num_train or 40000:,} training and {self.num_held_out or 10000:,} held-out images"
        return f"{self.network}, {rows}, {self.epochs} epochs"


BUDGETS = {
    # The settings of the shift benchmark.
    "full": Budget("ResNet20", 60, 128, 1e-3, None, None),
    "small": Budget("SmallCNN", 4, 128, 2e-3, 10000, 2000),
}
_NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {"ResNet20": ResNet20, "SmallCNN": SmallCNN}


def run(
    labels: str = "cifar10h",
    *,
    methods: Sequence[str] = METHODS,
    seeds: int = 3,
    device: str = "auto",
    out: str | Path = "results",
    data_dir: str | Path | None = None,
    jobs: int | None = None,
    budget: str = "full",
    augment: str = "none",
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Train and test every method with every seed, print the table, and write `noise-<labels>.json` under `out`.

    Args:
        labels: "cifar10h": trained on clean labels, held against the labels of about 50 people. "cifar10n": trained on
            people's labels ("aggregate", "random1" and "worst"), held against clean ones.
        methods: Names of `METHODS`.
        seeds: How many, from 0.
        device: "auto", "cpu" or "cuda".
        out: Folder for the results. Cells that were measured are kept in `noise-<budget>` below it, and not measured again.
        data_dir: Folder of the data; None for `BAYESGUARD_DATA`, or the download.
        jobs: Processes; see `bayesguard.benchmarks.cells.measure_all`.
        budget: "full": ResNet-20 on all images, for a GPU. "small": two convolutions on a part of the images.
        augment: How the training images are augmented, one of `augmented.AUGMENTATIONS`.
        progress: Show a progress bar.
        say: Where the table goes.

    Returns:
        A record for each cell.

    Raises:
        BadInput: Unknown labels, method, budget or augmentation, or no seeds.
    """
    if labels not in LABELS:
        raise BadInput(f"labels must be {' or '.join(LABELS)}, got {labels!r}")
    check_run(methods, METHODS, budget, seeds)
    check_augment(augment)
    chosen = BUDGETS[budget]
    kinds = ("cifar10h",) if labels == "cifar10h" else tuple(f"cifar10n_{noise}" for noise in NOISES)
    perturbed = [f"{shift.name} {shift.severity:g}" for shift in _shifts()] if labels == "cifar10h" else None
    records = measure_all(
        partial(measure, budget=chosen, augment=augment, data_dir=data_dir),
        [Cell(kind, name, seed) for kind in kinds for name in methods for seed in range(seeds)],
        settings={
            **asdict(chosen),
            "budget": budget,
            **({"perturbed": perturbed} if perturbed else {}),
            **({} if augment == "none" else {"augment": augment}),
        },
        folder=Path(out) / f"noise-{budget}",
        device=device,
        jobs=jobs,
        progress=progress,
    )
    say(f"\n{tables(records, labels)}\n\nBudget: {budget} ({chosen}), {seeds} seeds.\n")
    path = Path(out) / (f"noise-{labels}.json" if budget == "full" else f"noise-{labels}-{budget}.json")
    collect(records, path, benchmark="noise", labels=labels, budget=budget, protocol=str(chosen))
    say(f"wrote {path}")
    return records


def measure(
    cell: Cell, device: torch.device, *, budget: Budget, augment: str = "none", data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Train one method with one seed, and test it before and after calibration."""
    images = load("cifar10", data_dir=data_dir)
    noise = None if cell.data == "cifar10h" else cell.data.removeprefix("cifar10n_")
    train, held = parts(images, None if noise is None else noisy_labels(noise, images, data_dir), budget)
    _, channels, side, _ = train[0].shape
    network = _NETWORKS[budget.network]
    start = time.perf_counter()
    predictor = BUILDERS[cell.method].build(
        lambda _: network(channels, images.num_classes, side),
        cell.seed,
        partial(_fit, train=train, budget=budget, augment=augment, device=device),
    )
    seconds = time.perf_counter() - start
    if noise is None:
        found = _human(predictor, images, held, human_counts(images, data_dir))
    else:
        found = _noisy(predictor, images, held)
    single = bg.Deterministic(network(channels, images.num_classes, side))
    return {**found, "costs": costs(predictor, single, images.test[0][:1000], seconds)}


Part = tuple[Tensor, Tensor]
Held = tuple[Tensor, Tensor, Tensor]


def parts(images: ImageSet, noisy: Tensor | None, budget: Budget) -> tuple[Part, Held]:
    """Return what is trained on, and held-out images with the labels that people gave and with clean ones.

    Args:
        images: CIFAR-10; its first 40,000 training images train, the other 10,000 are held out.
        noisy: Labels of all training images in their order; None for clean ones.
        budget: How many images of each part.
    """
    (x, y), (held, clean) = images.train, images.calibration
    given, held_given = (y, clean) if noisy is None else noisy.split([len(y), len(clean)])
    n, m = budget.num_train, budget.num_held_out
    return (x[:n], given[:n]), (held[:m], held_given[:m], clean[:m])


def noisy_labels(noise: str, images: ImageSet, data_dir: str | Path | None) -> Tensor:
    """Return CIFAR-10N's labels of all training images, in the order of CIFAR-10."""
    labels = torch.from_numpy(read("images/cifar10n_labels.npz", data_dir)[noise].astype("int64"))
    _check_rows(len(labels), len(images.train[1]) + len(images.calibration[1]), "images/cifar10n_labels.npz")
    return labels


def human_counts(images: ImageSet, data_dir: str | Path | None) -> Tensor:
    """Return how many people chose each class, for each test image `[N, K]`."""
    counts = torch.from_numpy(read("images/cifar10h_counts.npz", data_dir)["counts"].astype("float64"))
    _check_rows(len(counts), len(images.test[1]), "images/cifar10h_counts.npz")
    return counts


def human_scores(pred: Predictive, counts: Tensor) -> dict[str, float]:
    """Return how a prediction compares with the distribution of people's labels, entropies in nats.

    Cross-entropy of the prediction to people's shares, and what is left when their own entropy is taken off (the
    Kullback-Leibler divergence); accuracy and ECE against the class that most people chose (the first of those that tie); Pearson
    and Spearman correlations of predicted with human entropy.
    """
    from scipy.stats import pearsonr, spearmanr

    shares = counts / counts.sum(-1, keepdim=True)
    human = -torch.special.xlogy(shares, shares).sum(-1)
    cross = -(shares * pred.logits.double().log_softmax(-1)).sum(-1)
    majority, entropy = counts.argmax(-1), pred.uncertainty().total.double()
    return {
        "cross_entropy": float(cross.mean()),
        "kl": float((cross - human).mean()),
        "accuracy_majority": float(accuracy(pred.probs, majority)),
        "ece_majority": float(expected_calibration_error(pred.probs, majority)),
        "pearson": float(pearsonr(entropy.numpy(), human.numpy()).statistic),
        "spearman": float(spearmanr(entropy.numpy(), human.numpy()).statistic),
        "entropy": float(entropy.mean()),
        "human_entropy": float(human.mean()),
    }


def _human(predictor: Predictor, images: ImageSet, held: Held, counts: Tensor) -> dict[str, Any]:
    calibrators: dict[str, Calibrator | None] = {
        "as trained": None,
        "temperature": TemperatureScaling(),
        "shift-aware": ShiftAwareScaling(shifts=_shifts(), seed=predictor.seed),
    }
    return {
        name: human_scores(_calibrated(predictor, calibrator, (held[0], held[2]), images), counts)
        for name, calibrator in calibrators.items()
    }


def _noisy(predictor: Predictor, images: ImageSet, held: Held) -> dict[str, Any]:
    found = {"as trained": clean_scores(_calibrated(predictor, None, held[:2], images), images.test[1])}
    for name, labels in (("noisy", held[1]), ("clean", held[2])):
        pred = _calibrated(predictor, TemperatureScaling(), (held[0], labels), images)
        found[f"temperature, {name} held-out labels"] = clean_scores(pred, images.test[1])
    return {**found, "held_out_noise": float((held[1] != held[2]).double().mean())}


def clean_scores(pred: Predictive, labels: Tensor) -> dict[str, float]:
    """Return accuracy, NLL in nats and ECE against clean labels."""
    return {
        "accuracy": float(accuracy(pred.probs, labels)),
        "nll": float(-pred.log_prob(labels).double().mean()),
        "ece": float(expected_calibration_error(pred.probs, labels)),
    }


def tables(records: Sequence[Record], labels: str) -> str:
    """Return the table of the labels and that of the costs, as Markdown."""
    rows = human_table(records) if labels == "cifar10h" else noise_table(records)
    return with_costs(rows, records, {name: BUILDERS[name].label for name in METHODS})


def human_table(records: Sequence[Record]) -> str:
    """Return how methods compare with people, as Markdown: means with 95 % t intervals over seeds."""
    columns = {
        "cross_entropy": "cross-entropy (nats)",
        "kl": "KL (nats)",
        "accuracy_majority": "accuracy, majority",
        "ece_majority": "ECE, majority",
        "pearson": "correlation of entropies",
        "spearman": "rank correlation",
        "entropy": "mean entropy (nats)",
    }
    human = records[0]["values"]["as trained"]["human_entropy"]
    people = [f"{human:.3f}", "0", "", "", "1", "1", f"{human:.3f}"]
    return "\n".join([*_table("", records, columns), f"| People themselves | {' | '.join(people)} |"])


def noise_table(records: Sequence[Record]) -> str:
    """Return accuracy, NLL and ECE on clean labels after training on noisy ones, as Markdown."""
    columns = {"accuracy": "accuracy", "nll": "NLL (nats)", "ece": "ECE"}
    lines: list[str] = []
    for noise in NOISES:
        kept = [record for record in records if record["data"] == f"cifar10n_{noise}"]
        lines += _table(noise, kept, columns)[2 if lines else 0 :]
    return "\n".join(lines)


def _table(lead: str, records: Sequence[Record], columns: dict[str, str]) -> list[str]:
    first = ["labels"] if lead else []
    lines = [f"| {' | '.join([*first, 'method', *columns.values()])} |", "|---" * (len(columns) + 1 + len(first)) + "|"]
    for method in METHODS:
        kept = [record["values"] for record in records if record["method"] == method]
        forms = (
            [name for name, values in kept[0].items() if isinstance(values, dict) and name != "costs"] if kept else []
        )
        for form in forms:
            label = BUILDERS[method].label + ("" if form == "as trained" else f" + {form}")
            cells = [shown([values[form][metric] for values in kept]) for metric in columns]
            lines.append(f"| {' | '.join([*([lead] if lead else []), label, *cells])} |")
    return lines


def _fit(predictor: Predictor, *, train: Part, budget: Budget, augment: str, device: torch.device) -> None:
    predictor.to(device)
    fit = partial(predictor.fit, epochs=budget.epochs, optimizer=partial(torch.optim.Adam, lr=budget.learning_rate))
    if augment == "none":
        fit(train, batch_size=budget.batch_size)
        return
    images, labels = (part.to(device) for part in train)
    with training_batches(predictor, images, labels, budget.batch_size, AUGMENTATIONS[augment]) as batches:
        fit(batches)


def _calibrated(predictor: Predictor, calibrator: Calibrator | None, held: Part, images: ImageSet) -> Predictive:
    """Predict the test images with one calibrator, or with none."""
    predictor.forget_calibration()
    if calibrator is not None:
        predictor.calibrate(held, calibrator)
    return predictor.predict(images.test[0])


def _shifts() -> list[Shift]:
    corruptions = [Corruption(name, severity=severity) for name in _PERTURBED for severity in _SEVERITIES]
    return [*corruptions, *(shift for shift in suite("content") if shift.severity in _SEVERITIES)]


def _check_rows(found: int, expected: int, name: str) -> None:
    if found != expected:
        raise BadFile(f"{name} has {found} rows, but CIFAR-10 has {expected} images there; fetch both again")
