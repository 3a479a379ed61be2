"""Rows of the benchmark, and the three ways to write them: text, Markdown, JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bayesguard.benchmarks.speed.measure import Spread, Timings


@dataclass(frozen=True)
class Row:
    """One figure.

    Args:
        case: Key of the case, as on the command line.
        name: What was done.
        value: Ours, in `unit`, with its range.
        baseline: What the value is a ratio to; empty for plain quantities.
        must: The value may not be above this; None for no demand.
        aim: What would be good.
        limit: What the arithmetic allows, in the same unit.
        peers: Values of the others, in the same unit.
        unit: "x" for ratios, else the unit of the value.
        seconds: Median seconds of everything that was timed.
        note: What a reader has to know to judge the figure.
    """

    case: str
    name: str
    value: Spread
    baseline: str = ""
    must: float | None = None
    aim: float | None = None
    limit: float | None = None
    peers: Mapping[str, float] = field(default_factory=dict)
    unit: str = "x"
    seconds: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "aim", "must" or "missed", whichever is reached; empty where nothing is demanded."""
        if self.must is None:
            return ""
        if self.aim is not None and self.value.median <= self.aim:
            return "aim"
        return "must" if self.value.median <= self.must else "missed"

    @property
    def fastest_peer(self) -> tuple[str, float] | None:
        """The best of the others."""
        return min(self.peers.items(), key=lambda item: item[1], default=None)


def row_of(
    timings: Timings, case: str, name: str, baseline: str, *, peers: Sequence[str] = (), limit: str = "", **fields: Any
) -> Row:
    """Make a row of ratios to `baseline` from timings that have "ours", perhaps a limit, and perhaps peers."""
    timed = timings.seconds
    return Row(
        case,
        name,
        timings.ratio("ours", baseline),
        baseline,
        limit=timings.ratio(limit, baseline).median if limit else None,
        peers={peer: timings.ratio(peer, baseline).median for peer in peers if peer in timed},
        seconds={entry: timings.of(entry).median for entry in timed},
        **fields,
    )


_HEADER = ("case", "ours", "over", "must", "aim", "", "fastest peer", "limit")


def as_text(rows: Sequence[Row]) -> str:
    """Return the rows in aligned columns, with their notes below."""
    cells = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    notes = [f"{row.name}: {row.note}" for row in rows if row.note]
    return "\n".join(
        [lines[0], "  ".join("-" * width for width in widths), *lines[1:], *([""] if notes else []), *notes]
    )


def as_markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table: case, ours with its range, the baseline, must, aim, what is reached, peer, limit."""
    lines = [f"| {' | '.join(_HEADER)} |", "|" + "---|" * len(_HEADER)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in _cells(row))} |" for row in rows]
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain data: every field of `Row`, with the verdict and the fastest peer."""
    return [
        {
            **asdict(row),
            "peers": dict(row.peers),
            "seconds": dict(row.seconds),
            "verdict": row.verdict,
            "fastest_peer": row.fastest_peer and row.fastest_peer[0],
        }
        for row in rows
    ]


def _cells(row: Row) -> tuple[str, ...]:
    unit = "" if row.unit == "x" else f" {row.unit}"
    value = f"{row.value.median:.3g}{unit} [{row.value.low:.3g}, {row.value.high:.3g}]"
    peer = row.fastest_peer
    return (
        row.name,
        value,
        row.baseline,
        _number(row.must),
        _number(row.aim),
        row.verdict,
        f"{peer[1]:.3g} ({peer[0]})" if peer else "",
        _number(row.limit),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
