"""One self-contained HTML page: tables with intervals, figures, and what the words mean."""

import base64
import io
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from bayesguard import plots
from bayesguard.errors import BadInput
from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.results import CLEAN, MEAN, Evaluation, Result, show, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #666; --line: #ccc; --paper: #fff; --best: #e7f1fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a0a0a0; --line: #444; --paper: #161616; --best: #16324a; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem .3rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.best { background: var(--best); } td small { color: var(--soft); }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; background: #fff; border-radius: 4px; }
figcaption, .note { color: var(--soft); font-size: .9rem; max-width: 46rem; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem 0; max-width: 46rem; }
"""

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


def to_html(evaluations: Mapping[str, Evaluation], path: str | Path, *, title: str = "Evaluation") -> None:
    """Write one page about one or several evaluations, which needs nothing from any network.

    Args:
        evaluations: By label.
        path: File to write; it is written whole or not at all.
        title: Of the page.

    Raises:
        BadInput: No evaluations.
    """
    if not evaluations:
        raise BadInput("evaluations is empty; at least one is needed")
    first = next(iter(evaluations.values()))
    parts = [f"<h1>{escape(title)}</h1>", _summary(first), *_tables(evaluations), *_figures(evaluations)]
    parts += [_by_shift(evaluations), _words(evaluations), _settings(evaluations)]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The browser itself refuses whatever is not in the page.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    write_text(path, page)


def _summary(evaluation: Evaluation) -> str:
    level = evaluation.meta["confidence_level"]
    brackets = f"Square brackets are {level:.0%} bootstrap intervals over examples; a"
    if not evaluation.meta["num_resamples"]:
        brackets = "A"
    return (
        f'<p class="note">{evaluation.meta["num_examples"]} examples. {brackets} shaded number is the best of its '
        "row.</p>"
    )


def _tables(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """One table a metric: severities (and groups) down, labels across."""
    metrics = list(dict.fromkeys(metric for evaluation in evaluations.values() for metric in evaluation.metrics))
    return [_table(metric, evaluations) for metric in metrics]


def _table(metric: str, evaluations: Mapping[str, Evaluation]) -> str:
    spec = EVALUATION_METRICS[metric]
    rows: dict[str, dict[str, Result]] = {}
    for label, evaluation in evaluations.items():
        for result in evaluation.results:
            if result.metric == metric and result.shift in (CLEAN, MEAN):
                rows.setdefault(_place(result), {})[label] = result
    head = "".join(f"<th>{escape(label)}</th>" for label in evaluations)
    body = "".join(
        f"<tr><th>{escape(place)}</th>{_cells(found, list(evaluations), spec.direction)}</tr>"
        for place, found in rows.items()
    )
    return (
        f'<h2>{escape(spec.label)}</h2>\n{_better(spec.direction)}<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _better(direction: str) -> str:
    return "" if direction == "none" else f'<p class="note">{direction.capitalize()} is better.</p>'


def _place(result: Result) -> str:
    if result.group is not None:
        return f"group {result.group}"
    return CLEAN if result.shift == CLEAN else f"severity {result.severity:g}"


def _cells(found: Mapping[str, Result], labels: list[str], direction: str) -> str:
    values = [result.value for result in found.values() if not math.isnan(result.value)]
    choose = {"lower": min, "higher": max}.get(direction)
    best = choose(values) if choose and values else None
    cells = []
    for label in labels:
        if label not in found:
            cells.append("<td></td>")
            continue
        number, _, interval = show(found[label]).partition(" ")
        mark = ' class="best"' if len(labels) > 1 and found[label].value == best else ""
        cells.append(f"<td{mark}>{number} <small>{interval}</small></td>")
    return "".join(cells)


def _figures(evaluations: Mapping[str, Evaluation]) -> list[str]:
    parts = ["<h2>Figures</h2>"]
    shifted = all(len(evaluation.severities) > 1 for evaluation in evaluations.values())
    first = next(iter(evaluations.values()))
    if shifted:
        for metric in [name for name in ("ece", "nll", "crps") if name in first.metrics]:
            caption = f"{EVALUATION_METRICS[metric].label} against severity: the mean over shifts, bands are intervals."
            parts.append(_image(plots.metric_against_severity(evaluations, metric), caption))
    if all(evaluation.reliability for evaluation in evaluations.values()):
        caption = (
            "Accuracy against confidence (for yes or no: share of yes against its probability), with Wilson's intervals, "
            "all shifts of a severity pooled. On the diagonal, confidence can be believed; below it, it promises too "
            "much. The lower panels count the answers, on a logarithmic axis."
        )
        parts.append(_image(plots.reliability_diagram(evaluations), caption))
        caption = (
            "Error rate among the answers kept, the surest first: low on the left means that doubt finds the errors."
        )
        parts.append(_image(plots.risk_coverage(evaluations), caption))
        label, last = list(evaluations.items())[-1]
        caption = f"Total uncertainty of right and wrong answers{' and of clean and shifted data' * shifted}: apart is good ({label})."
        parts.append(_image(plots.uncertainty_histograms(last), caption))
    return parts if len(parts) > 1 else []


def _image(figure: "Figure", caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _by_shift(evaluations: Mapping[str, Evaluation]) -> str:
    """List every shift at its largest severity, for the first proper score."""
    first = next(iter(evaluations.values()))
    names = sorted({result.shift for result in first.results} - {CLEAN, MEAN})
    if not names:
        return ""
    metric = "ece" if "ece" in first.metrics else first.metrics[0]
    rows = []
    for name in names:
        severity = max(result.severity for result in first.results if result.shift == name)
        found = {label: evaluation.result(metric, severity, name) for label, evaluation in evaluations.items()}
        cells = _cells(found, list(evaluations), EVALUATION_METRICS[metric].direction)
        rows.append(f"<tr><th>{escape(name)} {severity:g}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(label)}</th>" for label in evaluations)
    return (
        f"<h2>{escape(EVALUATION_METRICS[metric].label)} of each shift at its largest severity</h2>"
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _words(evaluations: Mapping[str, Evaluation]) -> str:
    metrics = dict.fromkeys(metric for evaluation in evaluations.values() for metric in evaluation.metrics)
    entries = "".join(
        f"<dt>{escape(EVALUATION_METRICS[name].label)}</dt><dd>{escape(_WORDS[name])}</dd>" for name in metrics
    )
    return f"<h2>What the words mean</h2><dl>{entries}</dl>"


def _settings(evaluations: Mapping[str, Evaluation]) -> str:
    """List the settings, one column a label."""
    names = dict.fromkeys(name for evaluation in evaluations.values() for name in evaluation.meta)
    head = "".join(f"<th>{escape(label)}</th>" for label in evaluations)
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th>"
        + "".join(f"<td>{escape(str(item.meta.get(name, '')))}</td>" for item in evaluations.values())
        + "</tr>"
        for name in names
    )
    return (
        f'<h2>Settings</h2><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
