"""Rows of the benchmark, and the three ways to write them: text, Markdown, JSON."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bayesguard.benchmarks.speed.measure import Spread, Timings
from bayesguard.benchmarks.speed.settings import MAIN_SAMPLES


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


_SAMPLES = re.compile(r", S=(\d+)")
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
    return _markdown(_HEADER, [_cells(row) for row in rows])


def tables(rows: Sequence[Row]) -> str:
    """Return Markdown of all rows: one table at the number of draws of each demand, then one of all numbers of draws.

    The second has a column for each number, and only cases that were measured at more than one.
    """
    main = as_markdown(rows_at_main_samples(rows))
    several = [group for group in _by_samples(rows).values() if len(group) > 1]
    numbers = sorted({number for group in several for number in group})
    lines = [
        (_SAMPLES.sub("", own.name), own.baseline, *(_value(group[n]) if n in group else "" for n in numbers))
        for group in several
        for own in [next(iter(group.values()))]
    ]
    columns = ("case", "over", *(f"S={number}" for number in numbers))
    return f"{main}\n\nOther numbers of draws:\n\n{_markdown(columns, lines)}" if several else main


def rows_at_main_samples(rows: Sequence[Row]) -> list[Row]:
    """Return one row a case: the one with a demand, or where there are several (or none) the nearest to 50 draws."""
    kept = []
    for group in _by_samples(rows).values():
        demanded = {number: row for number, row in group.items() if row.must is not None} or group
        kept.append(demanded[min(demanded, key=lambda number: abs(number - MAIN_SAMPLES))])
    return kept


def _by_samples(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Return rows by their name without the number of draws, then by that number (0 where there is none)."""
    groups: dict[str, dict[int, Row]] = {}
    for row in rows:
        found = _SAMPLES.search(row.name)
        groups.setdefault(_SAMPLES.sub("", row.name), {})[int(found[1]) if found else 0] = row
    return groups


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", chr(92) + "|") for cell in line] for line in lines]
    rule = "|" + "---|" * len(header)
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(line)} |" for line in escaped)])


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
    peer = row.fastest_peer
    return (
        row.name,
        _value(row),
        row.baseline,
        _number(row.must),
        _number(row.aim),
        row.verdict,
        f"{peer[1]:.3g} ({peer[0]})" if peer else "",
        _number(row.limit),
    )


def _value(row: Row) -> str:
    unit = "" if row.unit == "x" else f" {row.unit}"
    return f"{row.value.median:.3g}{unit} [{row.value.low:.3g}, {row.value.high:.3g}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
