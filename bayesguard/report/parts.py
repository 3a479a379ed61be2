"""The sections of the page that have diagrams: which diagrams of what, and the words around them."""

import math
from collections.abc import Mapping
from html import escape

import torch
from torch import Tensor

from bayesguard.metrics.functional.binned import BinnedSums, ReliabilityBins, wilson_interval
from bayesguard.report import diagrams, tables
from bayesguard.results import Evaluation
from bayesguard.summaries import Estimate, class_gaps, group_gaps

_MOST_ROWS = 20
_MOST_PANELS = 6


def reliability(evaluations: Mapping[str, Evaluation]) -> str:
    """Return a reliability diagram a label, clean and, where there are any, under the middle and the largest shift."""
    panels = []
    for label, evaluation in evaluations.items():
        severities = sorted(evaluation.reliability)
        if len(severities) > 2:
            severities = [severities[0], severities[len(severities) // 2], severities[-1]]
        bins = {
            f"severity {severity:g}" if severity else "clean": evaluation.reliability[severity]
            for severity in severities
        }
        panels.append(diagrams.reliability(bins, *_axes(evaluation), label if len(evaluations) > 1 else ""))
    return (
        '<h2>Can the confidence be believed?</h2><p class="note">On the diagonal it can; points below it promise too much. '
        "Upright lines are Wilson's intervals; the lower panel counts the answers, on a logarithmic axis. Shifts of a "
        f'severity are pooled.</p><div class="panels">{"".join(panels)}</div>'
    )


def confidences(evaluations: Mapping[str, Evaluation]) -> str:
    """Return how sure right and wrong answers are, and clean and shifted ones."""
    panels = []
    for label, evaluation in evaluations.items():
        name = f" ({label})" if len(evaluations) > 1 else ""
        assert evaluation.answers is not None
        confidence, right = evaluation.answers.confidence, evaluation.answers.right == 1
        sides = {"right": confidence[right], "wrong": confidence[~right]}
        low = 0.5 if evaluation.meta["kind"] == "binary" else 0.0
        panels.append(diagrams.histograms(sides, "confidence", f"right and wrong answers{name}", (low, 1.0)))
        doubt = dict(zip(("right", "wrong"), evaluation.doubt[0.0], strict=True))
        panels.append(_uncertainty(doubt, f"their uncertainty{name}"))
        severity = max(evaluation.reliability)
        if severity > 0:
            both = {"clean": evaluation.reliability[0.0], f"severity {severity:g}": evaluation.reliability[severity]}
            first = evaluation.reliability[0.0]
            counted: dict[str, list[float]] = {key: bins.count.tolist() for key, bins in both.items()}
            edges: list[float] = [*first.lower.tolist(), first.upper[-1].item()]
            panels.append(diagrams.bars(counted, edges, _axes(evaluation)[0], f"clean and shifted data{name}"))
    return f'<h2>How sure the answers are</h2><div class="panels">{"".join(panels)}</div>'


def classes(evaluations: Mapping[str, Evaluation]) -> str:
    """Return how far each class's probability is from its share, and the diagrams of the worst classes."""
    found = []
    for label, evaluation in evaluations.items():
        sums = evaluation.by_class
        if sums is None:
            continue
        errors = sums.errors().tolist()
        worst = sorted(range(len(errors)), key=lambda k: -errors[k])
        gaps = class_gaps(evaluation)
        rows = []
        for k in worst[:_MOST_ROWS]:
            share = (sums.hits[k].sum() / sums.count[k].sum()).item()
            values = (f"{share:.1%}", f"{share + gaps[k].value:.1%}", _gap(gaps[k]), f"{errors[k]:.3f}")
            rows.append((f"class {k}", "".join(f"<td>{value}</td>" for value in values)))
        head = ["comes in", "promised", "gap (points)", "calibration error"]
        panels = [
            diagrams.reliability(
                {"": _bins(sums, evaluation, k)}, f"probability of class {k}", f"share of class {k}", f"class {k}"
            )
            for k in worst[:_MOST_PANELS]
        ]
        found.append(_named(label, evaluations) + tables.table(head, rows, "class") + _more(len(errors)))
        found.append(_folded("Diagrams of the classes with the largest errors", panels))
    if not found:
        return ""
    return (
        '<h2>Class by class</h2><p class="note">Each class\'s probability against how often it comes, those with the largest '
        "calibration error first; intervals of gaps are widened for the number of classes.</p>" + "".join(found)
    )


def groups(evaluations: Mapping[str, Evaluation]) -> str:
    """Return how far promises are from outcomes in each group, and the diagrams of the worst groups."""
    found = []
    for label, evaluation in evaluations.items():
        gaps = group_gaps(evaluation)
        if not gaps:
            continue
        worst = sorted(gaps, key=lambda name: -abs(gaps[name].value))
        promise, outcome = _axes(evaluation)
        rows = []
        for name in worst[:_MOST_ROWS]:
            sums = evaluation.by_group[name]
            count, hits = sums.count.sum().item(), sums.hits.sum().item()
            values = (
                f"{count:,.0f}",
                f"{hits / count:.1%}",
                f"{sums.score.sum().item() / count:.1%}",
                _gap(gaps[name]),
            )
            rows.append((escape(f"group {name}"), "".join(f"<td>{value}</td>" for value in values)))
        panels = [
            diagrams.reliability({"": _bins(evaluation.by_group[name], evaluation)}, promise, outcome, f"group {name}")
            for name in worst[:_MOST_PANELS]
        ]
        shown = {f"group {name}": gaps[name] for name in worst[:_MOST_ROWS]}
        found.append(_named(label, evaluations))
        found.append(
            tables.table(["answers", outcome, f"mean {promise}", "gap (points)"], rows, "group") + _more(len(gaps))
        )
        caption = "In the order of the table; intervals are widened for the number of groups."
        found.append(f'<div class="panels">{diagrams.gaps(shown, "Gaps of the groups", caption)}</div>')
        found.append(_folded("Diagrams of the groups with the largest gaps", panels))
    return "<h2>Group by group</h2>" + "".join(found) if found else ""


def shifts(evaluations: Mapping[str, Evaluation]) -> str:
    """Return metrics against severity, and a table of the shifts one by one."""
    shifted = {label: item for label, item in evaluations.items() if len(item.severities) > 1}
    if not shifted:
        return ""
    first = next(iter(shifted.values()))
    wanted = [name for name in ("ece", "nll", "accuracy", "crps", "coverage_90") if name in first.metrics]
    panels = [diagrams.against_severity(shifted, metric) for metric in wanted or first.metrics[:1]]
    return (
        '<h2>When the data shift</h2><p class="note">The mean over the shifts of a severity; bands are intervals.</p>'
        f'<div class="panels">{"".join(panels)}</div>{tables.by_shift(shifted)}'
    )


def _uncertainty(named: Mapping[str, Tensor], title: str) -> str:
    top = max([1e-6, *(float(values.max()) for values in named.values() if len(values))])
    return diagrams.histograms(named, "total uncertainty (nats)", title, (0.0, top))


def _bins(sums: BinnedSums, evaluation: Evaluation, row: int | None = None) -> ReliabilityBins:
    """Return the bins of sums; the elements of a dense example count as one in the intervals."""
    count, score, hits = ((part if row is None else part[row]).double() for part in (sums.count, sums.score, sums.hits))
    assert evaluation.answers is not None
    examples = int(evaluation.meta["num_examples"])
    elements = len(evaluation.answers.right) // examples
    limits = wilson_interval(hits / elements, count / elements, evaluation.meta["confidence_level"])
    edges = torch.arange(len(count) + 1, dtype=torch.float64) / len(count)
    return ReliabilityBins(edges[:-1], edges[1:], count, score / count, hits / count, *limits)


def _axes(evaluation: Evaluation) -> tuple[str, str]:
    return ("probability of yes", "share of yes") if evaluation.meta["kind"] == "binary" else ("confidence", "accuracy")


def _named(label: str, evaluations: Mapping[str, Evaluation]) -> str:
    return f"<h3>{escape(label)}</h3>" if len(evaluations) > 1 else ""


def _gap(gap: Estimate) -> str:
    if math.isnan(gap.lower):
        return f"{100 * gap.value:+.1f}"
    return f"{100 * gap.value:+.1f} <small>[{100 * gap.lower:+.1f}, {100 * gap.upper:+.1f}]</small>"


def _more(count: int) -> str:
    return f'<p class="note">The first {_MOST_ROWS} of {count}.</p>' if count > _MOST_ROWS else ""


def _folded(summary: str, panels: list[str]) -> str:
    return f'<details><summary>{escape(summary)}</summary><div class="panels">{"".join(panels)}</div></details>'
