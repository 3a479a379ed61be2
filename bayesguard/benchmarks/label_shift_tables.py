"""The tables of the label-shift benchmark, as Markdown: means over seeds and draws with 95 % t intervals."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bayesguard.benchmarks.cells import Record, spread
from bayesguard.benchmarks.costs import cost_table

NOTE = (
    "Means over seeds x draws with 95 % t intervals over them. All draws of a seed have the networks and the test set in "
    'common, so the intervals are about draws of shares more than about other networks. "NLL less that of temperature" is '
    'paired: on the same rows; below 0 is better. "Worse" is the share of draws in which it is above 0. "Shares off by" is '
    "the total variation between the shares that a row assumes and those of the draw; without correction it assumes "
    "those of the held-out set."
)
REFERENCE = "temperature"
SHIFT_LABELS = {
    "none": "no shift",
    "dirichlet 10": "Dirichlet, alpha 10",
    "dirichlet 1": "Dirichlet, alpha 1",
    "dirichlet 0.1": "Dirichlet, alpha 0.1",
    "tweak_one 0.5": "one class has 0.5",
    "tweak_one 0.9": "one class has 0.9",
}
_METHOD_LABELS = {"vanilla": "Deterministic", "ensemble": "Ensemble"}
_COLUMNS = ("accuracy", "NLL (nats)", "NLL less that of temperature", "worse", "Brier", "ECE", "shares off by")

Scores = list[dict[str, Any] | None]


def tables(records: Sequence[Record]) -> str:
    """Return all tables with their titles: the change of NLL by shift, every quality for each shift, and costs."""
    titled = {"Change of NLL by shift": change_table(records)}
    titled |= {f"Every quality: {SHIFT_LABELS[shift]}": shift_table(records, shift) for shift in _shifts(records)}
    titled["Costs"] = cost_table(records, _METHOD_LABELS)
    return "\n\n".join(f"{title}:\n\n{table}" for title, table in titled.items())


def change_table(records: Sequence[Record]) -> str:
    """Return the NLL less that of temperature scaling on the same rows, a column for each shift."""
    shifts = _shifts(records)
    lines = [f"| | {' | '.join(SHIFT_LABELS[shift] for shift in shifts)} |", "|---" * (len(shifts) + 1) + "|"]
    for method, row in _rows(records):
        if row != REFERENCE:
            cells = [shown(_changes(records, method, shift, row), digits=4) for shift in shifts]
            lines.append(f"| {_METHOD_LABELS[method]}, {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shift_table(records: Sequence[Record], shift: str) -> str:
    """Return every quality of every row under one shift."""
    lines = [f"| | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for method, row in _rows(records):
        found = scores_of(records, method, shift, row)
        accuracy, nll, brier, ece, distance = (
            shown([None if score is None else _number(score[name]) for score in found])
            for name in ("accuracy", "nll", "brier", "ece", "distance")
        )
        changes = _changes(records, method, shift, row)
        known = [change for change in changes if change is not None]
        change, worse = "", ""
        if row != REFERENCE and known:
            change, worse = shown(changes, digits=4), f"{sum(one > 0 for one in known) / len(known):.0%}"
        cells = (accuracy, nll, change, worse, brier, ece, distance)
        lines.append(f"| {_METHOD_LABELS[method]}, {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def described(records: Sequence[Record]) -> str:
    """Say what was run, for the head of the tables."""
    settings = records[0]["settings"]
    seeds = len({record["seed"] for record in records})
    sizes = [size for record in records for found in record["values"]["shifts"].values() for size in found["sizes"]]
    trained = "all training rows" if settings["limit"] is None else f"{settings['limit']:,} training rows at most"
    each = f"{max(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
    return (
        f"{settings['network']}, {settings['epochs']} epochs, ensemble of {settings['members']}, {trained}; {seeds} seeds x "
        f"{settings['draws']} draws of {each} test rows for each shift; {records[0]['device']}"
    )


def scores_of(records: Sequence[Record], method: str, shift: str, row: str) -> Scores:
    """Return the scores of a row in every draw of every seed; None where it could not be made."""
    return [
        score
        for record in records
        if record["method"] == method
        for score in record["values"]["shifts"][shift]["rows"][row]
    ]


def shown(values: Sequence[float | None], digits: int = 3) -> str:
    """Return a mean with its 95 % t interval, or the median if a value (but not half of them) is infinite.

    Missing values are counted.

    Examples:
        >>> shown([0.5]), shown([0.25, 0.75]), shown([None, 0.5])
        ('0.500', '0.500 [-2.677, 3.677]', '0.500 (refused in 1 of 2)')
        >>> shown([math.inf, 0.5, 0.25])
        'infinite in 1 of 3, median 0.500'
    """
    known = [value for value in values if value is not None]
    refused = len(values) - len(known)
    told = f" (refused in {refused} of {len(values)})" if refused else ""
    if not known:
        return "refused"
    if infinite := sum(math.isinf(value) for value in known):
        median = statistics.median(known)
        middle = "" if math.isinf(median) else f", median {median:.{digits}f}"
        return f"infinite in {infinite} of {len(values)}{middle}{told}"
    found = spread(known)
    # Adding 0 makes a rounded -0 a 0.
    mean, lower, upper = (
        f"{round(value, digits) + 0.0:.{digits}f}" for value in (found.mean, found.lower, found.upper)
    )
    return f"{mean} [{lower}, {upper}]{told}" if len(known) > 1 else f"{mean}{told}"


def _changes(records: Sequence[Record], method: str, shift: str, row: str) -> list[float | None]:
    pairs = zip(scores_of(records, method, shift, row), scores_of(records, method, shift, REFERENCE), strict=True)
    return [
        None if ours is None or theirs is None else _number(ours["nll"]) - _number(theirs["nll"])
        for ours, theirs in pairs
    ]


def _number(value: float | None) -> float:
    """JSON has no infinity: the files say null."""
    return math.inf if value is None else value


def _shifts(records: Sequence[Record]) -> list[str]:
    return list(records[0]["values"]["shifts"])


def _rows(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Method and row, in the order of the table."""
    first = next(iter(records[0]["values"]["shifts"].values()))
    return [(method, row) for method in dict.fromkeys(record["method"] for record in records) for row in first["rows"]]
