"""The tables of CIFAR-10-C: ours and the published numbers, summed up in the same way."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from bayesguard.benchmarks.cells import Record, spread
from bayesguard.benchmarks.costs import with_costs
from bayesguard.benchmarks.published import OVADIA_CIFAR10, UNCERTAINTY_BASELINES_CIFAR10, Quartiles
from bayesguard.benchmarks.recipes import METHODS

_QUARTILES = {"ece": "ECE", "brier": "Brier, sum over classes", "nll": "NLL (nats)"}
# The columns of uncertainty-baselines, in their order.
_MEANS = (("nll", "NLL"), ("accuracy", "accuracy"), ("ece", "ECE"))
# What the two rows are meant to reach, of "Ensemble with dropout"; nobody published these.
AIMS = {
    ("shift-aware, pointwise", "ece"): "0.022 / 0.030 / 0.070",
    ("shift-aware, unlabelled batch", "ece"): "0.012 / 0.020 / 0.045",
    ("shift-aware, unlabelled batch", "brier"): "50 % at most 0.299",
}
_AIMED = (
    '"aim" is what nobody published. More of it: pointwise, the clean ECE within the deep ensemble\'s interval; with a batch, '
    "an accuracy not below the deep ensemble's."
)


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the quartiles of the values, between two of them by linear interpolation.

    Examples:
        >>> quartiles([4.0, 1.0, 3.0, 2.0, 5.0])
        Quartiles(lower=2.0, median=3.0, upper=4.0)
    """
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return Quartiles(*found.tolist())


def table(records: Sequence[Record]) -> str:
    """Return the tables of one suite as Markdown, with notes on where the protocol is not the published one."""
    settings = records[0]["settings"]
    rows = _of_quartiles(records) if settings["suite"] == "cifar10-c-ovadia" else _of_means(records)
    devices = ", ".join(dict.fromkeys(record["device"] for record in records))
    labels = {name: method.label for name, method in METHODS.items()}
    augment = [kept for record in records if (kept := record["settings"].get("augment"))]
    trained = f"\nTrained with the augmentation {augment[0]}, but for AugMix's own method." if augment else ""
    return f"{with_costs(rows, records, labels)}\n\n{notes(settings)}{trained}\nMeasured on {devices}."


def notes(settings: dict[str, Any]) -> str:
    """Say what the numbers are, and how they differ from the published ones."""
    ovadia = settings["suite"] == "cifar10-c-ovadia"
    lines = [
        "CIFAR-10-C regenerated. "
        + (
            "Cells: quartiles over the shifted sets. Published: Ovadia et al. (2019), ResNet-20, Adam, 200 epochs, batches "
            "of 5 to 107."
            if ovadia
            else "Clean numbers, then means over the shifted sets. Published: google/uncertainty-baselines, WRN-28-10, 200 "
            "epochs, all 50,000 training images."
        ),
        f"Ours: {settings['network']}, {settings['epochs']} epochs, batches of {settings['batch_size']}, the last 10,000 "
        f"training images held out, {settings['members']} members, {settings['draws']} draws.",
        "Brackets are 95 % intervals over seeds, where there are several.",
        *([_AIMED] if ovadia else []),
    ]
    if settings["budget"] == "cpu":
        lines.append(
            f"CPU BUDGET: {settings['train']:,} training images, {settings['test']:,} to calibrate and {settings['test']:,} to test on, "
            "bfloat16: the published numbers are of longer training on more images, and of ten thousand test images. With so few the "
            "calibration error of a calibrated predictor, too, is between 0.03 and 0.04 (1,000 simulated answers); methods are to be compared with one another."
        )
    if settings["budget"] == "small":
        lines.append(
            f"SMALL BUDGET: {settings['train']:,} training and {settings['test']:,} test images, {len(settings['kinds'])} kinds "
            f"of shift at severities {', '.join(map(str, settings['severities']))}, Adam: shows that everything runs; not to be compared with anything."
        )
    return "\n".join(lines)


def _of_quartiles(records: Sequence[Record]) -> str:
    columns = [f"{label}, 25 / 50 / 75 % | published" for label in _QUARTILES.values()]
    lines = [
        f"| | accuracy, clean | ECE, clean | accuracy, 25 / 50 / 75 % | {' | '.join(columns)} |",
        "|---" * (2 * len(_QUARTILES) + 4) + "|",
    ]
    for method, row, own in _rows(records):
        cells = [_figure([values["clean"][metric] for values in own]) for metric in ("accuracy", "ece")]
        cells.append(_figures(own, "accuracy"))
        for metric in _QUARTILES:
            cells += [_figures(own, metric), _published_quartiles(method, row, metric)]
        lines.append(f"| {_label(method, row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(own: Sequence[dict[str, Any]], metric: str) -> str:
    """The quartiles of a metric over the shifted sets."""
    each = [quartiles([one[metric] for one in values["sets"]]) for values in own]
    return " / ".join(_figure(place) for place in zip(*each, strict=True))


def _published_quartiles(method: str, row: str, metric: str) -> str:
    source = METHODS[method].ovadia if row == "as trained" else None
    if method == "deterministic" and row == "temperature":
        source = "temperature"
    if source is not None:
        return " / ".join(f"{value:.3f}" for value in OVADIA_CIFAR10[source][metric])
    aim = AIMS.get((row, metric)) if method == "dropout_ensemble" else None
    return "" if aim is None else f"aim: {aim}"


def _of_means(records: Sequence[Record]) -> str:
    columns = [f"{when}{label}" for when in ("", "shifted ") for _, label in _MEANS]
    lines = [
        "| | " + " | ".join(f"{column} | published" for column in columns) + " |",
        "|---" * (2 * len(columns) + 1) + "|",
    ]
    for method, row, own in _rows(records):
        source = METHODS[method].baselines if row == "as trained" else None
        theirs = UNCERTAINTY_BASELINES_CIFAR10[source] if source else None
        cells = [_label(method, row)]
        for place in range(2 * len(_MEANS)):
            metric = _MEANS[place % len(_MEANS)][0]
            ours = [values["clean"][metric] if place < len(_MEANS) else _mean_of(values, metric) for values in own]
            cells += [_figure(ours), f"{theirs[place]:.3f}" if theirs else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(records: Sequence[Record]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """The rows of a table: method, how it is calibrated, and the values of each seed."""
    return [
        (method, row, [record["values"]["rows"][row] for record in records if record["method"] == method])
        for method in dict.fromkeys(record["method"] for record in records)
        for row in next(record["values"]["rows"] for record in records if record["method"] == method)
    ]


def _label(method: str, row: str) -> str:
    return METHODS[method].label + ("" if row == "as trained" else f", {row}")


def _mean_of(values: dict[str, Any], metric: str) -> float:
    return math.fsum(one[metric] for one in values["sets"]) / len(values["sets"])


def _figure(values: Sequence[float]) -> str:
    """A mean over seeds, with its interval where there are several."""
    return spread(values).shown()
