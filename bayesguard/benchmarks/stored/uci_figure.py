"""UCI regression as dots: each method's mean and standard error over the splits, beside the published one."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bayesguard.benchmarks import uci
from bayesguard.benchmarks.cells import Record
from bayesguard.benchmarks.published import UCI as PUBLISHED
from bayesguard.benchmarks.stored.files import Content
from bayesguard.report import svg
from bayesguard.report.diagrams import figure

_METRICS = {"rmse": "RMSE", "nll": "NLL (nats)"}
_SOURCES = {
    "ensemble": "Deep ensemble (2017)",
    "dropout": "MC dropout",
    "dropout_2016": "MC dropout (2016)",
    "pbp": "PBP",
}
_ROW = 19
_OURS, _THEIRS = 0, 1


class Dot(NamedTuple):
    """A mean with its standard error (0 where there is none), ours or published."""

    name: str
    mean: float
    error: float
    style: int

    @property
    def tip(self) -> str:
        """What it says when pointed at."""
        whose = "published" if self.style == _THEIRS else "ours"
        return f"{self.name} ({whose})\n{self.mean:.4g} ± {self.error:.2g}"


def dots(contents: Mapping[str, Content]) -> str:
    """Return one panel a data set, with what is ours and what is published."""
    panels = []
    for content in contents.values():
        records = content["cells"]
        panels.append(_panel(records[0]["data"], {metric: rows(records, metric) for metric in _METRICS}))
    note = "Means over splits with one standard error, further left is better; where no bar is seen it is smaller than the mark."
    return f'<p class="note">{note}</p>{svg.legend(["ours", "published"])}<div class="panels">{"".join(panels)}</div>'


def rows(records: Sequence[Record], metric: str) -> list[Dot]:
    """Return ours, in the order of the methods, and then the published ones."""
    data = records[0]["data"]
    found = []
    for name, recipe in uci.METHODS.items():
        own = uci.found(records, name, metric)
        if own is not None:
            found.append(Dot(recipe.label, own.mean, own.error if own.num_values > 1 else 0.0, _OURS))
    for source, label in _SOURCES.items():
        published = PUBLISHED[metric].get(source, {}).get(data)
        if published is not None:
            found.append(Dot(label, published.mean, published.error or 0.0, _THEIRS))
    return found


def _panel(data: str, by_metric: Mapping[str, Sequence[Dot]]) -> str:
    count = max(len(own) for own in by_metric.values())
    bottom = 24.0 + _ROW * count
    parts = []
    for (metric, own), (left, right) in zip(by_metric.items(), ((172.0, 258.0), (270.0, 356.0)), strict=True):
        parts.append(_frame(own, _METRICS[metric], left, right, bottom))
    for place, dot in enumerate(next(iter(by_metric.values()))):
        parts.append(f'<text x="164" y="{24 + _ROW * (place + 0.5) + 4:.1f}" text-anchor="end">{dot.name}</text>')
    return figure(svg.drawing(bottom + 22, f"RMSE and NLL on {data}", "".join(parts)), title=data)


def _frame(own: Sequence[Dot], label: str, left: float, right: float, bottom: float) -> str:
    low, high = min(dot.mean - dot.error for dot in own), max(dot.mean + dot.error for dot in own)
    room = 0.08 * (high - low) or 0.1
    frame = svg.Frame(left, right, 24, bottom, (low - room, high + room), (0, len(own)))
    marks = svg.ticks(*frame.x_range, 3)
    if len(marks) < 2:
        marks = svg.ticks(*frame.x_range, 5)
    parts = [frame.axes([(value, f"{value:.4g}") for value in marks], ())]
    parts.append(f'<text x="{(left + right) / 2:g}" y="14" text-anchor="middle">{label}</text>')
    for place, dot in enumerate(own):
        y = frame.top + _ROW * (place + 0.5)
        bar = f'<path class="s{dot.style} error" d="M{frame.x(dot.mean - dot.error):.1f} {y:.1f}H{frame.x(dot.mean + dot.error):.1f}"/>'
        guide = f'<line class="grid" x1="{left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        target = svg.hit(left, y - _ROW / 2, right - left, _ROW)
        parts.append(svg.point(dot.tip, guide + bar + svg.mark(frame.x(dot.mean), y, dot.style) + target))
    return "".join(parts)
