"""What would be answered at a threshold on confidence: exact counts for every setting of the slider."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesguard.metrics.functional.binned import wilson_interval
from bayesguard.results import Answers, Evaluation
from bayesguard.summaries import normal_quantile

# Finer towards 1, where most answers of today's networks are: 0, 0.01 ... 0.9, 0.901 ... 0.99, 0.9901 ... 0.9999, 1.
THRESHOLDS = (
    *(step / 100 for step in range(90)),
    *((900 + step) / 1000 for step in range(90)),
    *((9900 + step) / 10000 for step in range(90)),
    *((99900 + step) / 100000 for step in range(91)),
    1.0,
)
_START = THRESHOLDS.index(0.95)


class Counts(NamedTuple):
    """Answers with at least each threshold's confidence, and how many of them are wrong, float64 `[T]`."""

    kept: Tensor
    wrong: Tensor


def counts_at(answers: Answers) -> Counts:
    """Return the counts at every threshold, rounded to the dtype of the confidences: float32 0.95 is at least 0.95."""
    confidence = answers.confidence
    limits = torch.tensor(THRESHOLDS, dtype=torch.float64, device=confidence.device).to(confidence.dtype).double()
    ordered, order = confidence.double().sort()
    below = torch.searchsorted(ordered, limits)
    wrong = torch.nn.functional.pad((1 - answers.right.double())[order].cumsum(0), (1, 0))
    return Counts((len(ordered) - below).double(), wrong[-1] - wrong[below])


def section(evaluations: Mapping[str, Evaluation]) -> str:
    """Return the slider and the table that it moves, with numbers for 0.95 in place; data for every other setting."""
    rows, curves = [], []
    level = next(iter(evaluations.values())).meta["confidence_level"]
    chosen = [(label, item, item.answers) for label, item in evaluations.items() if item.answers is not None]
    for row, (label, item, answers) in enumerate(chosen):
        counts = counts_at(answers)
        elements = len(answers.right) // int(item.meta["num_examples"])
        kept, wrong = (values[_START].item() for values in counts)
        lower, upper = (limit.item() for limit in _wilson(counts, elements, level))
        share, rate, limits = f"{100 * kept / counts.kept[0].item():.1f}%", "no answers", ""
        if kept:
            rate, limits = f"{100 * wrong / kept:.1f}%", f"[{100 * lower:.1f}%, {100 * upper:.1f}%]"
        rows.append(
            f'<tr><th scope="row">{escape(label)}</th><td id="share-{row}">{share}</td><td id="rate-{row}">{rate}</td>'
            f'<td id="interval-{row}">{limits}</td><td><span id="wrong-{row}">{wrong:,.0f}</span> of '
            f'<span id="kept-{row}">{kept:,.0f}</span></td></tr>'
        )
        curves.append({"kept": _ints(counts.kept), "wrong": _ints(counts.wrong), "elements": elements})
    data = {"z": normal_quantile(level), "thresholds": THRESHOLDS, "curves": curves}
    heads = ("", "share answered", "error rate", f"{level:.0%} interval", "wrong of answered")
    head = "".join(f'<th scope="col">{name}</th>' if name else "<td></td>" for name in heads)
    return (
        '<div class="slider"><label for="threshold">Answer where the confidence is at least '
        f'<output id="threshold-now" for="threshold">{THRESHOLDS[_START]}</output></label>'
        f'<input id="threshold" type="range" min="0" max="{len(THRESHOLDS) - 1}" step="1" value="{_START}" '
        f'aria-valuetext="confidence of at least {THRESHOLDS[_START]}" autocomplete="off">'
        f'<div class="scroll" tabindex="0" aria-live="polite"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}'
        "</tbody></table></div>"
        f'<p class="note screen"><a id="threshold-link" href="#threshold={THRESHOLDS[_START]}">Link to this setting</a>. '
        "Intervals are Wilson's, for a threshold chosen beforehand. One that was chosen by looking at these data is better "
        "here than it will be on new data: <code>bg.calibration.SelectiveClassifier</code> finds one with a guarantee.</p>"
        f'</div><script type="application/json" id="thresholds">{script_json(data)}</script>'
    )


def script_json(tree: Any) -> str:
    """Return JSON that cannot end the script element that it stands in."""
    text = json.dumps(tree, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _wilson(counts: Counts, elements: int, level: float) -> tuple[Tensor, Tensor]:
    """Return the interval at the first setting; the elements of a dense example count as one."""
    kept, wrong = counts.kept[_START], counts.wrong[_START]
    return wilson_interval(wrong / elements, kept / elements, level)


def _ints(values: Tensor) -> list[int]:
    whole: list[int] = values.long().tolist()
    return whole
