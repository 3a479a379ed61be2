"""The diagrams of the page: each a figure with a caption or a title, its points telling their numbers."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import torch
from torch import Tensor

from bayesguard.metrics.functional.binned import ReliabilityBins
from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.report import svg
from bayesguard.results import Evaluation, Result, show
from bayesguard.summaries import Estimate

_NUM_BARS = 20
_LINE_POINTS = 240


def figure(drawing: str, *, title: str = "", caption: str = "", below: str = "") -> str:
    """Return a drawing with a title above, and a caption and numbers below."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    foot = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{head}{drawing}{foot}{below}</figure>"


def reliability(bins_by_name: Mapping[str, ReliabilityBins], promise: str, outcome: str, title: str = "") -> str:
    """Return what came true against what was promised, with intervals, and how many answers each point stands for."""
    frame = svg.Frame(44, 350, 24, 264, (0, 1), (0, 1))
    most = max(float(bins.count.max()) for bins in bins_by_name.values())
    # Logarithmic, with room for a bar where there is a single answer.
    counts = svg.Frame(44, 350, 312, 368, (0, 1), (-0.3, max(1.0, math.log10(max(1.0, most)))))
    fifths = [(step / 5, f"{step / 5:.1f}") for step in range(6)]
    decades = [(float(power), _short(10**power)) for power in range(math.floor(counts.y_range[1]) + 1)]
    if len(decades) > 4:
        decades = decades[::2]
    parts = [frame.axes(fifths, fifths, "", outcome), counts.axes(fifths, decades, promise, "answers")]
    parts.append(
        f'<path class="ideal" d="M{frame.x(0):g} {frame.y(0):g}L{frame.x(1):g} {frame.y(1):g}"/>',
    )
    for style, (name, bins) in enumerate(bins_by_name.items()):
        filled = [row for row in _rows(bins) if row.count > 0]
        parts.append(svg.line([(frame.x(row.promised), frame.y(row.share)) for row in filled], style))
        width = (counts.right - counts.left) / len(bins.count) / len(bins_by_name) - 1
        for row in filled:
            tip = (
                f"{name + ': ' if name else ''}{promise} {row.promised:.3f}\n{outcome} {row.share:.3f} "
                f"[{row.lower:.3f}, {row.upper:.3f}]\n{row.count:,.0f} answers"
            )
            x, y = frame.x(row.promised), frame.y(row.share)
            shapes = svg.error_bar(x, frame.y(row.lower), frame.y(row.upper), style) + svg.mark(x, y, style)
            shapes += svg.hit(x - 8, y - 12, 16, 24)
            left = counts.x(row.edge) + 0.5 + style * (width + 1)
            shapes += svg.bar(left, width, counts.y(math.log10(row.count)), counts.bottom, style)
            parts.append(svg.point(tip, shapes))
    what = f"Reliability diagram{' of ' + title if title else ''}: {outcome} against {promise}"
    head = (promise, outcome, "interval", "answers")
    numbers = [
        (f"{row.promised:.3f}", f"{row.share:.3f}", f"[{row.lower:.3f}, {row.upper:.3f}]", f"{row.count:,.0f}")
        for row in _rows(next(iter(bins_by_name.values())))
        if row.count > 0
    ]
    names = list(bins_by_name)
    below = svg.legend(names if len(names) > 1 else []) + details(
        f"Numbers ({names[0]})" if names[0] else "Numbers", head, numbers
    )
    return figure(svg.drawing(408, what, "".join(parts)), title=title, below=below)


def risk_coverage(evaluations: Mapping[str, Evaluation]) -> str:
    """Return the error rate among the answers kept, with a ring for each label that the slider moves."""
    curves = [(label, item.risk) for label, item in evaluations.items() if item.risk is not None]
    highest = max(float(curve.risk.max()) for _, curve in curves)
    top = max(0.01, highest * 1.05)
    frame = svg.Frame(52, 350, 24, 264, (0, 1), (0, top))
    y_ticks = [(value, f"{100 * value:.3g}%") for value in svg.ticks(0, top)]
    parts = [frame.axes([(step / 5, f"{20 * step}%") for step in range(6)], y_ticks, "share answered", "error rate")]
    for style, (label, curve) in enumerate(curves):
        chosen = torch.linspace(0, len(curve.risk) - 1, min(_LINE_POINTS, len(curve.risk))).round().long().unique()
        pairs = list(zip(curve.coverage[chosen].tolist(), curve.risk[chosen].tolist(), strict=True))
        parts.append(svg.line([(frame.x(x), frame.y(y)) for x, y in pairs], style))
        for x, y in pairs[:: max(1, len(pairs) // 20)] + pairs[-1:]:
            tip = f"{label}\n{x:.1%} answered\n{y:.2%} of them wrong"
            parts.append(svg.point(tip, svg.hit(frame.x(x) - 8, frame.y(y) - 12, 16, 24)))
        parts.append(
            f'<circle id="now-{style}" class="s{style % svg.NUM_STYLES}" fill-opacity="0" stroke-width="3" r="7" '
            'visibility="hidden"/>'
        )
    data = (
        f' data-left="{frame.left:g}" data-width="{frame.right - frame.left:g}" data-bottom="{frame.bottom:g}" '
        f'data-height="{frame.bottom - frame.top:g}" data-top="{top!r}"'
    )
    drawing = svg.drawing(
        304, "Error rate among the answers given, against the share answered", "".join(parts), data=data
    )
    caption = "The surest answers first: low on the left means that confidence finds the errors. Rings: the threshold chosen above."
    return figure(drawing, caption=caption, below=svg.legend([label for label, _ in curves] if len(curves) > 1 else []))


def histograms(named: Mapping[str, Tensor], x_label: str, title: str, x_range: tuple[float, float]) -> str:
    """Return the shares of some values by bins of equal width, side by side; a value on an edge counts to its right."""
    low, high = x_range
    counted = {
        name: torch.histc(values.double(), _NUM_BARS, low, high).tolist()
        for name, values in named.items()
        if len(values)
    }
    edges = [low + (high - low) * step / _NUM_BARS for step in range(_NUM_BARS + 1)]
    return bars(counted, edges, x_label, title)


def bars(counted: Mapping[str, Sequence[float]], edges: Sequence[float], x_label: str, title: str) -> str:
    """Return counts between edges as shares of their sums, one series beside the other."""
    shares = {name: [count / sum(counts) for count in counts] for name, counts in counted.items()}
    top = max(max(values) for values in shares.values()) * 1.05
    frame = svg.Frame(48, 350, 24, 200, (edges[0], edges[-1]), (0, top))
    x_ticks = [(value, f"{value:.3g}") for value in svg.ticks(edges[0], edges[-1])]
    y_ticks = [(value, f"{100 * value:.3g}%") for value in svg.ticks(0, top, 4)]
    parts = [frame.axes(x_ticks, y_ticks, x_label, "share of answers")]
    width = (frame.right - frame.left) / (len(edges) - 1) / len(shares) - 0.5
    for place in range(len(edges) - 1):
        for style, (name, values) in enumerate(shares.items()):
            if values[place] == 0:
                continue
            left = frame.x(edges[place]) + style * (width + 0.5)
            tip = (
                f"{name}: {x_label} {edges[place]:.3g} to {edges[place + 1]:.3g}\n{values[place]:.1%}, "
                f"{counted[name][place]:,.0f} answers"
            )
            shape = svg.bar(left, width, frame.y(values[place]), frame.bottom, style)
            parts.append(svg.point(tip, shape + svg.hit(left, frame.top, width, frame.bottom - frame.top)))
    names = [f"{name} ({sum(counts):,.0f})" for name, counts in counted.items()]
    return figure(svg.drawing(240, f"Histogram: {title}", "".join(parts)), title=title, below=svg.legend(names))


def against_severity(evaluations: Mapping[str, Evaluation], metric: str) -> str:
    """Return a metric against the severity of shift, one line a label, intervals as bands."""
    spec = EVALUATION_METRICS[metric]
    lines = {
        label: [
            result for severity in item.severities if math.isfinite((result := item.result(metric, severity)).value)
        ]
        for label, item in evaluations.items()
        if metric in item.metrics
    }
    values = [limit for results in lines.values() for result in results for limit in _finite_limits(result)]
    if not values:
        return ""
    low, high = min(values), max(values)
    if spec.direction == "lower" and low >= 0:
        low = 0.0
    high = high + 0.05 * (high - low) if high > low else low + 1.0
    last = max(severity for item in evaluations.values() for severity in item.severities)
    frame = svg.Frame(52, 340, 24, 220, (0, last), (low, high))
    severities = sorted({severity for item in evaluations.values() for severity in item.severities})
    x_ticks = [(severity, f"{severity:g}") for severity in severities[:: -(-len(severities) // 8)]]
    y_ticks = [(value, f"{value:.4g}") for value in svg.ticks(low, high)]
    parts = [frame.axes(x_ticks, y_ticks, "severity of shift (0: clean)", spec.label)]
    for style, (label, results) in enumerate(lines.items()):
        at = [frame.x(result.severity) for result in results]
        limits = [_finite_limits(result) for result in results]
        below = [(x, frame.y(min(pair))) for x, pair in zip(at, limits, strict=True)]
        above = [(x, frame.y(max(pair))) for x, pair in zip(at, limits, strict=True)]
        parts.append(svg.band(below, above, style))
        parts.append(svg.line([(x, frame.y(result.value)) for x, result in zip(at, results, strict=True)], style))
        for x, result in zip(at, results, strict=True):
            y = frame.y(result.value)
            tip = f"{label}\nseverity {result.severity:g}: {show(result)}"
            parts.append(svg.point(tip, svg.mark(x, y, style) + svg.hit(x - 10, y - 12, 20, 24)))
    names = list(lines) if len(lines) > 1 else []
    name = f"{spec.label} against severity of shift"
    return figure(svg.drawing(260, name, "".join(parts)), title=name, below=svg.legend(names))


def details(summary: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that opens on request: the numbers of a diagram, also for those who cannot see it."""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<details><summary>{escape(summary)}</summary><div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def gaps(named: Mapping[str, Estimate], title: str, caption: str) -> str:
    """Return gaps with intervals, one line each, around 0; names are numbers that the table beside explains."""
    ends = [end for gap in named.values() for end in gap if math.isfinite(end)]
    reach = max(0.001, *map(abs, ends)) * 1.1
    height = 24 + 20 * len(named)
    frame = svg.Frame(14, 346, 20, height, (-reach, reach), (0, len(named)))
    x_ticks = [(value, f"{100 * value:+.3g}" if value else "0") for value in svg.ticks(-reach, reach)]
    zero = frame.x(0)
    parts = [frame.axes(x_ticks, (), "points too sure (right), too unsure (left)")]
    parts.append(f'<path class="ideal" d="M{zero:.1f} {frame.top:g}V{frame.bottom:g}"/>')
    for place, (name, gap) in enumerate(named.items()):
        y = frame.top + (place + 0.5) * (frame.bottom - frame.top) / len(named)
        bar, interval = "", ""
        if not math.isnan(gap.lower):  # which it is for one example
            bar = f'<path class="s0 error" d="M{frame.x(gap.lower):.1f} {y:.1f}H{frame.x(gap.upper):.1f}"/>'
            interval = f" [{100 * gap.lower:+.1f}, {100 * gap.upper:+.1f}]"
        tip = f"{name}\n{100 * gap.value:+.1f} points{interval}"
        shapes = bar + svg.mark(frame.x(gap.value), y, 0) + svg.hit(frame.left, y - 9, frame.right - frame.left, 18)
        parts.append(svg.point(tip, shapes))
    return figure(svg.drawing(height + 42, title, "".join(parts)), title=title, caption=caption)


class _Row:
    """One bin of a reliability diagram as plain numbers."""

    def __init__(self, bins: ReliabilityBins, place: int) -> None:
        self.edge = bins.lower[place].item()
        self.count = bins.count[place].item()
        self.promised = bins.confidence[place].item()
        self.share = bins.accuracy[place].item()
        self.lower, self.upper = bins.accuracy_lower[place].item(), bins.accuracy_upper[place].item()


def _rows(bins: ReliabilityBins) -> list[_Row]:
    return [_Row(bins, place) for place in range(len(bins.count))]


def _finite_limits(result: Result) -> tuple[float, float]:
    """Return the interval, or the value where an end of it is infinite or undefined."""
    low, high = (limit if math.isfinite(limit) else result.value for limit in (result.lower, result.upper))
    return low, high


def _short(count: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count // size}{letter}"
    return str(count)
