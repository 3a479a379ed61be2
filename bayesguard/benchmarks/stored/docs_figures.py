"""The figures of README and docs that are drawn from result files, and what a file of a figure says it was drawn from.

A PNG holds a checksum of the data that it shows. Pixels differ between versions of matplotlib; the checksum does not.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bayesguard import plots
from bayesguard.benchmarks import mnist_shift
from bayesguard.benchmarks.shift_methods import METHODS
from bayesguard.benchmarks.stored import shift_figures
from bayesguard.benchmarks.stored.files import Content, read
from bayesguard.benchmarks.stored.page import made
from bayesguard.benchmarks.stored.shift_tables import results
from bayesguard.results import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEY = "Data"
_BOXES = {
    ("deterministic", "as trained"): "deterministic",
    ("deterministic", "temperature"): "deterministic, temperature",
    ("deep_ensemble", "as trained"): "deep ensemble",
    ("augmix_last_layer", "shift-aware, pointwise"): "AugMix, last layer variational, shift-aware, pointwise",
    ("augmix_last_layer", "shift-aware, unlabelled batch"): "the same with an unlabelled batch",
}
_DRAWN = [METHODS[name].label for name in ("deterministic", "mc_dropout", "deep_ensemble")]


class Drawing(NamedTuple):
    """Which result file a figure shows, how it is drawn, and its resolution."""

    stem: str
    draw: Callable[[Content], "Figure"]
    dpi: int


def ece_by_severity(content: Content) -> "Figure":
    """Return the calibration error of three methods against severity; all of them are too many lines for one panel."""
    evaluations = {
        label: Evaluation(tuple(results(found)), found["meta"])
        for label, found in content["results"].items()
        if label.partition(" + ")[0] in _DRAWN
    }
    return plots.metric_against_severity(evaluations, "ece")


def ece_boxes(content: Content) -> "Figure":
    """Return box plots of the calibration error of some methods over the shifts of a severity, as in the paper's figure 2."""
    from matplotlib.figure import Figure

    points = shift_figures.points_of(content, "ece")
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axis = figure.subplots()
    for number, ((method, row), label) in enumerate(_BOXES.items()):
        own = points[shift_figures.label_of(method, row)]
        severities = sorted(own)
        places = [severity + 0.15 * (number - (len(_BOXES) - 1) / 2) for severity in severities]
        boxes = axis.boxplot(
            [own[severity] for severity in severities],
            positions=places,
            widths=0.12,
            whis=(0, 100),
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": f"C{number}", "linewidth": 0.6},
            medianprops={"color": "black"},
            manage_ticks=False,
        )
        boxes["boxes"][0].set_label(label)
        # By name, so that each counts in the checksum; those that begin so are not in the legend.
        for kind in ("whiskers", "caps", "medians"):
            for place, line in enumerate(boxes[kind]):
                line.set_label(f"_{label}, {kind} {place}")
    axis.set_xticks(severities, ["clean", *(f"{severity:g}" for severity in severities[1:])])
    axis.set_xlabel("severity of shift")
    axis.set_ylabel("expected calibration error")
    axis.set_ylim(0)
    axis.legend(fontsize="small", loc="upper left")
    return figure


FIGURES = {
    "shift-cifar10-c-ece.png": Drawing("shift-cifar10-c-ovadia-cpu", ece_boxes, 150),
    "shift-digits-ece.png": Drawing("shift-digits", ece_by_severity, 150),
    "shift-mnist-rotation.png": Drawing("shift-mnist-rotation", mnist_shift.figure, mnist_shift.DPI),
}


def drawn(name: str, folder: Path) -> "Figure":
    """Return the figure of that name, drawn from the result files in `folder`.

    Raises:
        BadFile: A result file that is not there, or cannot be shown.
    """
    stem, draw, _ = FIGURES[name]
    path = folder / f"{stem}.json"
    content = read(path)
    return made(lambda: draw(content), path.name)


def data_of(figure: "Figure") -> list[dict[str, Any]]:
    """Return what a figure shows, by panel: names of the axes, points of lines by their labels, and corners of the bands.

    Raises:
        ValueError: Two lines of a panel have the same label.
    """
    for axis in figure.axes:
        labels = [line.get_label() for line in axis.lines]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two lines of a panel have the same label, among {labels}")
    return [
        {
            "axes": [axis.get_xlabel(), axis.get_ylabel()],
            "lines": {str(line.get_label()): _points(np.column_stack(line.get_data())) for line in axis.lines},
            # Where a band begins and which way round it goes is matplotlib's business.
            "bands": [
                sorted(set(_points(np.asarray(path.vertices))))
                for band in axis.collections
                for path in band.get_paths()
            ],
        }
        for axis in figure.axes
    ]


def checksum(figure: "Figure") -> str:
    """Return a checksum of what a figure shows."""
    return hashlib.sha256(json.dumps(data_of(figure)).encode()).hexdigest()


def stored_checksum(path: Path) -> str | None:
    """Return the checksum that a PNG holds; None of one without, and of what is no PNG or not there."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            found = image.info.get(_KEY)
    except (OSError, UnidentifiedImageError):
        return None
    return found if isinstance(found, str) else None


def save(name: str, figure: "Figure", path: Path) -> None:
    """Write a figure with its checksum."""
    figure.savefig(path, dpi=FIGURES[name].dpi, metadata={"Software": None, _KEY: checksum(figure)})


def _points(values: NDArray[Any]) -> list[tuple[str, ...]]:
    # The last digits of a sum may differ between machines.
    return [tuple(f"{value:.9g}" for value in point) for point in values.astype(float).tolist()]
