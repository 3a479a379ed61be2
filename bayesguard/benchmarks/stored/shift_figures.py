"""Accuracy and calibration error against severity: box plots over shifts, as in figure 2 of Ovadia et al. (2019), or lines.

Boxes span the quartiles, the line in them is the median, and whiskers reach from the smallest to the largest of the shifts.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import torch

from bayesguard.benchmarks import cifar10_c_scores, mnist_shift
from bayesguard.benchmarks.recipes import METHODS
from bayesguard.benchmarks.stored.files import Content
from bayesguard.benchmarks.stored.shift_tables import results
from bayesguard.metrics.functional.binned import ReliabilityBins
from bayesguard.report import diagrams, svg
from bayesguard.results import MEAN

_METRICS = {"accuracy": "accuracy", "ece": "ECE"}
# More series than this in a panel are too thin to see; other methods go on in another.
_MOST = 6

Points = dict[str, dict[float, list[float]]]


def of_evaluations(contents: Mapping[str, Content]) -> str:
    """Return box plots of every file of `bayesguard benchmark shift`, and reliability diagrams where the file has bins."""
    parts = []
    for stem, content in contents.items():
        points = {metric: found for metric in _METRICS if (found := points_of(content, metric))}
        parts.append(f"<h3>{escape(stem)}</h3>{_boxes(points) if points else ''}{_reliability(content)}")
    return "".join(parts)


def of_levels(contents: Mapping[str, Content]) -> str:
    """Return lines against the level of one shift; where there are several seeds, of their means."""
    parts = []
    for content in contents.values():
        shift, panels = content["meta"]["shift"], []
        curves = mnist_shift.curves_of(content["cells"], shift)
        unit = "degrees" if shift == "rotation" else "pixels"
        for metric, label in _METRICS.items():
            lines = {row: _mean([seed[metric] for seed in seeds]) for row, seeds in curves.items()}
            panels.append(_lines(lines, label, f"{shift} ({unit})"))
        parts.append(f'<div class="panels">{"".join(panels)}</div>')
    return "".join(parts)


def points_of(content: Content, metric: str) -> Points:
    """Return a metric on every shifted set, by label and severity; 0 is undisturbed data.

    Both forms are read: evaluations by label, and cells whose rows have "clean" and "sets".
    """
    found: Points = {}
    for label, evaluation in content.get("results", {}).items():
        for result in results(evaluation):
            if result.metric == metric and result.shift != MEAN and result.group is None:
                found.setdefault(label, {}).setdefault(result.severity, []).append(result.value)
    for cell in content.get("cells", ()):
        for row, values in cell["values"]["rows"].items():
            own = found.setdefault(label_of(cell["method"], row), {})
            own.setdefault(0.0, []).append(values["clean"][metric])
            for each in values["sets"]:
                own.setdefault(float(each["severity"]), []).append(each[metric])
    return found


def label_of(method: str, row: str) -> str:
    """Return the name of one row of a method's cells."""
    return f"{METHODS[method].label if method in METHODS else method}, {row}"


def quartiles(values: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Return the smallest value, the quartiles, and the largest.

    Examples:
        >>> quartiles([3.0, 1.0, 2.0, 5.0, 4.0])
        (1.0, 2.0, 3.0, 4.0, 5.0)
    """
    at = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    smallest, lower, median, upper, largest = torch.tensor(values, dtype=torch.float64).quantile(at).tolist()
    return smallest, lower, median, upper, largest


def _boxes(points: Mapping[str, Points]) -> str:
    note = "Over the shifts of a severity: boxes are quartiles, lines in them medians, whiskers the whole range."
    # Boxes of one metric are compared across panels.
    tops = {metric: max(v for by in own.values() for vs in by.values() for v in vs) for metric, own in points.items()}
    panels = [
        _box_panel({label: own[label] for label in labels}, _METRICS[metric], tops[metric])
        for labels in _shared_out(list(next(iter(points.values()))))
        for metric, own in points.items()
    ]
    return f'<p class="note">{note}</p><div class="panels">{"".join(panels)}</div>'


def _shared_out(labels: Sequence[str]) -> list[list[str]]:
    """Return the labels of each panel: rows of one method, which is named before a comma, are not divided."""
    panels: list[list[str]] = [[]]
    for _, own in groupby(labels, key=lambda label: label.partition(", ")[0]):
        rows = list(own)
        if panels[-1] and len(panels[-1]) + len(rows) > _MOST:
            panels.append([])
        panels[-1] += rows
    return panels


def _box_panel(points: Points, label: str, top: float) -> str:
    severities = sorted({severity for own in points.values() for severity in own})
    frame = svg.Frame(44, 354, 24, 224, (0, len(severities)), (0, max(1.05 * top, 1e-6)))
    x_ticks = [(place + 0.5, f"{severity:g}" if severity else "clean") for place, severity in enumerate(severities)]
    y_ticks = [(value, f"{value:.3g}") for value in svg.ticks(0, frame.y_range[1])]
    parts = [frame.axes(x_ticks, y_ticks, "severity of shift", label)]
    width = 0.84 * (frame.right - frame.left) / len(severities) / len(points)
    for place, severity in enumerate(severities):
        for style, (name, own) in enumerate(points.items()):
            if severity in own:
                left = frame.x(place + 0.08) + style * width
                parts.append(_box(frame, own[severity], left, width, style, f"{name}\nseverity {severity:g}"))
    title = f"{label} against severity"
    return diagrams.figure(svg.drawing(264, title, "".join(parts)), title=title, below=svg.legend(list(points)))


def _box(frame: svg.Frame, values: Sequence[float], left: float, width: float, style: int, name: str) -> str:
    smallest, lower, median, upper, largest = quartiles(values)
    middle, place = left + width / 2, style % svg.NUM_STYLES
    tip = f"{name}: median {median:.3f}\nquartiles {lower:.3f}, {upper:.3f}\nfrom {smallest:.3f} to {largest:.3f} ({len(values)} sets)"
    y = [frame.y(value) for value in (smallest, lower, median, upper, largest)]
    whiskers = (
        f'<path class="s{place} error" d="M{middle:.1f} {y[0]:.1f}V{y[1]:.1f}M{middle:.1f} {y[3]:.1f}V{y[4]:.1f}"/>'
    )
    line = f'<path class="s{place} line" d="M{left + 0.5:.1f} {y[2]:.1f}h{width - 1:.1f}"/>'
    shapes = whiskers + svg.bar(left + 0.5, width - 1, y[3], y[1], style) + line
    return svg.point(tip, shapes + svg.hit(left, y[4] - 4, width, y[0] - y[4] + 8))


def _lines(lines: Mapping[str, Mapping[int, float]], label: str, x_label: str) -> str:
    levels = sorted({level for own in lines.values() for level in own})
    top = max(value for own in lines.values() for value in own.values())
    room = 0.03 * (levels[-1] - levels[0]) or 1
    frame = svg.Frame(44, 354, 24, 224, (levels[0] - room, levels[-1] + room), (0, max(1.05 * top, 1e-6)))
    x_ticks = [(level, f"{level:g}") for level in levels[:: -(-len(levels) // 7)]]
    y_ticks = [(value, f"{value:.3g}") for value in svg.ticks(0, frame.y_range[1])]
    parts = [frame.axes(x_ticks, y_ticks, x_label, label)]
    for style, (name, own) in enumerate(lines.items()):
        at = [(frame.x(level), frame.y(value)) for level, value in sorted(own.items())]
        parts.append(svg.line(at, style))
        for (x, y), (level, value) in zip(at, sorted(own.items()), strict=True):
            tip = f"{name}\n{level:g}: {value:.3f}"
            parts.append(svg.point(tip, svg.mark(x, y, style) + svg.hit(x - 8, y - 10, 16, 20)))
    title = f"{label} against {x_label}"
    return diagrams.figure(svg.drawing(264, title, "".join(parts)), title=title, below=svg.legend(list(lines)))


def _mean(seeds: Sequence[Mapping[int, float]]) -> dict[int, float]:
    return {level: math.fsum(seed[level] for seed in seeds) / len(seeds) for level in seeds[0]}


def bins_of(content: Content) -> dict[str, dict[str, ReliabilityBins]]:
    """Return reliability bins by label and severity, shifts of a severity pooled, of cells the seeds, too; none where a file has none."""
    found = {
        label: {severity: _bins(own) for severity, own in evaluation.get("reliability", {}).items()}
        for label, evaluation in content.get("results", {}).items()
    }
    stored: dict[str, dict[str, list[Any]]] = {}
    for cell in content.get("cells", ()):
        for row, values in cell["values"]["rows"].items():
            for severity, own in values.get("reliability", {}).items():
                stored.setdefault(label_of(cell["method"], row), {}).setdefault(severity, []).append(own)
    for label, by_severity in stored.items():
        found[label] = {severity: cifar10_c_scores.reliability_of(own) for severity, own in by_severity.items()}
    return found


def _reliability(content: Content) -> str:
    panels = []
    for label, bins in bins_of(content).items():
        shown = {"clean" if name == "0" else f"severity {name}": bins[name] for name in ("0", "3", "5") if name in bins}
        if shown:
            panels.append(diagrams.reliability(shown, "confidence", "accuracy", label))
    if not panels:
        return ""
    return (
        "<details><summary>Reliability under shift: accuracy against confidence, shifts of a severity pooled</summary>"
        f'<div class="panels">{"".join(panels)}</div></details>'
    )


def _bins(own: Mapping[str, Sequence[Any]]) -> ReliabilityBins:
    return ReliabilityBins(
        **{
            name: torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)
            for name, values in own.items()
        }
    )
