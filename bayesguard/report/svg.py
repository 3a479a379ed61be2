"""The few shapes that the diagrams are made of, as SVG text: a frame with axes, marks, lines, bands and bars.

Colours come from the page's style (classes s0 to s6), so that the dark and the printed page have their own.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH = 360
NUM_STYLES = 7


class Frame(NamedTuple):
    """Where data lie in the drawing: edges in pixels, and the values at them."""

    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def axes(
        self,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
        x_label: str = "",
        y_label: str = "",
    ) -> str:
        """Return the frame, its lines, and the names of the axes; the name of y stands above the frame."""
        parts = []
        for value, name in y_ticks:
            at = self.y(value)
            parts.append(f'<line class="grid" x1="{self.left:g}" x2="{self.right:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{self.left - 6:g}" y="{at + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for value, name in x_ticks:
            parts.append(
                f'<text x="{self.x(value):.1f}" y="{self.bottom + 16:g}" text-anchor="middle">{escape(name)}</text>'
            )
        parts.append(f'<path class="edge" d="M{self.left:g} {self.top:g}V{self.bottom:g}H{self.right:g}"/>')
        if y_label:
            parts.append(f'<text x="4" y="{self.top - 8:g}">{escape(y_label)}</text>')
        if x_label:
            middle = (self.left + self.right) / 2
            parts.append(f'<text x="{middle:g}" y="{self.bottom + 34:g}" text-anchor="middle">{escape(x_label)}</text>')
        return "".join(parts)


def drawing(height: float, name: str, content: str, *, data: str = "") -> str:
    """Return a whole drawing with its name for those who cannot see it."""
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(name)}"{data}>{content}</svg>'


def point(tip: str, content: str) -> str:
    """Return shapes that show a text when pointed at."""
    return f'<g class="pt"><title>{escape(tip)}</title>{content}</g>'


def mark(x: float, y: float, style: int) -> str:
    """Return the mark of a series: disc, square, diamond or triangle."""
    place, size = style % NUM_STYLES, 3.8
    shapes = (
        f'<circle class="mark s{place}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>',
        f'<rect class="mark s{place}" x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"/>',
        f'<path class="mark s{place}" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"/>',
        f'<path class="mark s{place}" d="M{x:.1f} {y - 5:.1f}l5 9h-10z"/>',
    )
    return shapes[style % len(shapes)]


def line(points: Sequence[tuple[float, float]], style: int) -> str:
    """Return a line through pixels; every other series is dashed."""
    if len(points) < 2:
        return ""
    dash = ' stroke-dasharray="6 3"' if style % 2 else ""
    return f'<path class="s{style % NUM_STYLES} line" d="M{_path(points)}"{dash}/>'


def band(lower: Sequence[tuple[float, float]], upper: Sequence[tuple[float, float]], style: int) -> str:
    """Return the area between two lines."""
    return f'<path class="s{style % NUM_STYLES} band" d="M{_path([*lower, *reversed(upper)])}z"/>'


def error_bar(x: float, low: float, high: float, style: int) -> str:
    """Return an upright interval, in pixels."""
    shape = f"M{x - 2.5:.1f} {low:.1f}h5m-2.5 0V{high:.1f}m-2.5 0h5"
    return f'<path class="s{style % NUM_STYLES} error" d="{shape}"/>'


def bar(x: float, width: float, top: float, bottom: float, style: int) -> str:
    """Return an upright bar."""
    height = max(0.0, bottom - top)
    dash = ' stroke-dasharray="3 2"' if style % 2 else ""
    return (
        f'<rect class="s{style % NUM_STYLES} bar" x="{x:.1f}" y="{top:.1f}" width="{max(0.8, width):.1f}" '
        f'height="{height:.1f}"{dash}/>'
    )


def hit(x: float, y: float, width: float, height: float) -> str:
    """Return an unseen area that is easy to point at."""
    return f'<rect class="hit" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def legend(names: Sequence[str]) -> str:
    """Return names with the mark and line of their series; nothing for a single one without a name."""
    if not any(names):
        return ""
    items = "".join(
        f'<li><svg viewBox="0 0 28 12" aria-hidden="true">{line([(0, 6), (28, 6)], style)}{mark(14, 6, style)}</svg>'
        f"{escape(name)}</li>"
        for style, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round values from low to high, about as many as asked for."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    step: float = 10.0 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
