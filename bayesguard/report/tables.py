"""The tables of the page, and what the words in them mean."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.results import CLEAN, MEAN, Evaluation, Result, show

_WORDS = {
    "accuracy": "Share of answers that are right.",
    "nll": "Negative log-likelihood: minus the logarithm of what was promised to the truth, in nats. A proper score: "
    "it rewards being right and honest at once.",
    "brier": "Squared distance of the probabilities from the truth, summed over classes (0 to 2). A proper score.",
    "ece": "Expected calibration error: the gap between confidence and accuracy, averaged over 15 bins of confidence. "
    "For yes or no the bins are of the probability of yes. 0 is perfect; estimates from few answers are biased upwards, "
    "so that the honest value is rather lower than the number, and an interval above 0 does not prove miscalibration.",
    "classwise_ece": "The calibration error of each class's probability, averaged over classes.",
    "aurc": "Area under risk-coverage: the mean error rate when only the surest answers are kept.",
    "error_auroc": "Probability that a wrong answer is less confident than a right one; 0.5 is chance.",
    "rmse": "Root mean squared error of the mean, in the target's unit.",
    "crps": "Continuous ranked probability score, in the target's unit. A proper score.",
    "coverage_90": "Share of targets in their 90 % intervals; 0.9 is what they promise.",
    "width_90": "Mean width of the 90 % intervals, in the target's unit.",
    "quantile_error": "Mean gap between quantile levels and the share of targets below the quantiles.",
}


def headline(evaluations: Mapping[str, Evaluation]) -> str:
    """Return every metric of the clean data, one column a label."""
    rows = []
    for metric in _metrics(evaluations):
        found = {label: item.result(metric) for label, item in evaluations.items() if metric in item.metrics}
        spec = EVALUATION_METRICS[metric]
        better = "" if spec.direction == "none" else f" <small>{spec.direction} is better</small>"
        rows.append((f"{escape(spec.label)}{better}", cells(found, list(evaluations), spec.direction)))
    return table(list(evaluations) if len(evaluations) > 1 else ["value"], rows, "metric")


def by_metric(evaluations: Mapping[str, Evaluation]) -> str:
    """Return one table a metric: severities and groups down, labels across; nothing where there is only clean data."""
    parts = []
    for metric in _metrics(evaluations):
        spec = EVALUATION_METRICS[metric]
        places: dict[str, dict[str, Result]] = {}
        for label, evaluation in evaluations.items():
            for result in evaluation.results:
                if result.metric == metric and result.shift in (CLEAN, MEAN):
                    places.setdefault(_place(result), {})[label] = result
        if len(places) < 2:
            continue
        rows = [(escape(place), cells(found, list(evaluations), spec.direction)) for place, found in places.items()]
        better = "" if spec.direction == "none" else f'<p class="note">{spec.direction.capitalize()} is better.</p>'
        parts.append(f"<h3>{escape(spec.label)}</h3>{better}{table(list(evaluations), rows, 'data')}")
    return "<h2>By severity and group</h2>" + "".join(parts) if parts else ""


def by_shift(evaluations: Mapping[str, Evaluation]) -> str:
    """Return every shift at its largest severity, for the calibration error or the first metric."""
    first = next(iter(evaluations.values()))
    names = sorted({result.shift for result in first.results} - {CLEAN, MEAN})
    if not names:
        return ""
    metric = "ece" if "ece" in first.metrics else first.metrics[0]
    spec = EVALUATION_METRICS[metric]
    rows = []
    for name in names:
        severity = max(result.severity for result in first.results if result.shift == name)
        found = {
            label: result
            for label, evaluation in evaluations.items()
            for result in evaluation.results
            if (result.metric, result.shift, result.severity) == (metric, name, severity)
        }
        rows.append((f"{escape(name)} {severity:g}", cells(found, list(evaluations), spec.direction)))
    head = f"<h3>{escape(spec.label)} of each shift at its largest severity</h3>"
    return head + table(list(evaluations), rows, "shift")


def words(evaluations: Mapping[str, Evaluation]) -> str:
    """Return what the metrics are."""
    entries = "".join(
        f"<dt>{escape(EVALUATION_METRICS[name].label)}</dt><dd>{escape(_WORDS[name])}</dd>"
        for name in _metrics(evaluations)
        if name in _WORDS
    )
    return f"<h2>What the words mean</h2><dl>{entries}</dl>"


def settings(evaluations: Mapping[str, Evaluation]) -> str:
    """Return the settings, one column a label."""
    names = dict.fromkeys(name for evaluation in evaluations.values() for name in evaluation.meta)
    rows = [
        (
            escape(name.replace("_", " ")),
            "".join(f'<td class="wrap">{escape(str(item.meta.get(name, "")))}</td>' for item in evaluations.values()),
        )
        for name in names
    ]
    return "<h2>Settings</h2>" + table(list(evaluations), rows, "setting")


def table(columns: Sequence[str], rows: Sequence[tuple[str, str]], corner: str) -> str:
    """Return a table from plain column names, and rows of markup: the row's name and its cells."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in (corner, *columns))
    body = "".join(f'<tr><th scope="row">{name}</th>{row}</tr>' for name, row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cells(found: Mapping[str, Result], labels: Sequence[str], direction: str) -> str:
    """Return the numbers of a row, the best of them marked if there are several."""
    values = [result.value for result in found.values() if not math.isnan(result.value)]
    choose = {"lower": min, "higher": max}.get(direction)
    best = choose(values) if choose and values else None
    parts = []
    for label in labels:
        if label not in found:
            parts.append("<td></td>")
            continue
        number, _, interval = show(found[label]).partition(" ")
        mark = ' class="best"' if len(labels) > 1 and found[label].value == best else ""
        parts.append(f"<td{mark}>{number} <small>{interval}</small></td>")
    return "".join(parts)


def _metrics(evaluations: Mapping[str, Evaluation]) -> list[str]:
    return list(dict.fromkeys(metric for evaluation in evaluations.values() for metric in evaluation.metrics))


def _place(result: Result) -> str:
    if result.group is not None:
        return f"group {result.group}"
    return CLEAN if result.shift == CLEAN else f"severity {result.severity:g}"
