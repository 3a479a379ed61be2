"""Tables of the files that `bayesguard benchmark shift` writes: a list of evaluations by label."""

import math
from collections.abc import Sequence
from typing import Any

from bayesguard.benchmarks.costs import with_costs
from bayesguard.benchmarks.stored.files import Content
from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.results import CLEAN, MEAN, Result, show

_SEVERITIES = (0.0, 1.0, 3.0, 5.0)


def results(evaluation: Content) -> list[Result]:
    """Return the numbers of a stored evaluation; null, which JSON has for what is not finite, is NaN."""
    return [Result(**{name: _number(name, value) for name, value in row.items()}) for row in evaluation["results"]]


def of_evaluations(content: Content) -> str:
    """Return the calibration error and then every metric, at severities 0, 1, 3 and 5, means over shifts; and costs."""
    found = {label: results(evaluation) for label, evaluation in content["results"].items()}
    metrics = list(dict.fromkeys(result.metric for rows in found.values() for result in rows))
    parts = [f"ECE by severity:\n\n{_by_severity(found, 'ece')}"] if "ece" in metrics else []
    records = [{"method": label, "values": {"costs": costs}} for label, costs in content.get("costs", {}).items()]
    return with_costs("\n\n".join([*parts, f"Every metric:\n\n{_by_metric(found, metrics)}"]), records)


def _by_severity(found: dict[str, list[Result]], metric: str) -> str:
    severities = _severities(found)
    heads = ["", *(f"severity {severity:g}" if severity else CLEAN for severity in severities)]
    rows = [[label, *(_shown(rows, metric, severity) for severity in severities)] for label, rows in found.items()]
    return markdown(heads, rows)


def _by_metric(found: dict[str, list[Result]], metrics: Sequence[str]) -> str:
    rows = [
        [
            "" if place else label,
            f"{severity:g}" if severity else CLEAN,
            *(_shown(own, metric, severity) for metric in metrics),
        ]
        for label, own in found.items()
        for place, severity in enumerate(_severities(found))
    ]
    return markdown(["", "severity", *(EVALUATION_METRICS[metric].label for metric in metrics)], rows)


def _severities(found: dict[str, list[Result]]) -> list[float]:
    there = {result.severity for rows in found.values() for result in rows}
    return [severity for severity in _SEVERITIES if severity in there]


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _shown(rows: Sequence[Result], metric: str, severity: float) -> str:
    shift = MEAN if severity else CLEAN
    wanted = [
        row for row in rows if (row.metric, row.severity, row.shift, row.group) == (metric, severity, shift, None)
    ]
    return show(wanted[0]) if wanted else ""


def _number(name: str, value: Any) -> Any:
    return math.nan if value is None and name in ("value", "lower", "upper") else value
