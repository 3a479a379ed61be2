"""The page as a whole: its sections in order, its style and script, and the policy that lets nothing else in."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from bayesguard.advice import advise
from bayesguard.errors import BadInput, BadType
from bayesguard.report import diagrams, parts, tables, threshold
from bayesguard.results import Evaluation, write_text

_FOLDER = Path(__file__).parent


def to_html(evaluations: Mapping[str, Evaluation], path: str | Path, *, title: str = "Evaluation") -> None:
    """Write one page about one or several evaluations, which needs nothing from any network.

    It says what to do about what was found (`bayesguard.advice`), and shows the numbers with intervals, reliability
    diagrams, what is answered and how well at any threshold on confidence, confidences of right and wrong answers,
    classes and groups by themselves, and metrics against the severity of shift. Points tell their numbers when pointed at, or
    with the arrow keys. `page.html#threshold=0.99` opens it at that threshold.

    Args:
        evaluations: By label.
        path: File to write; it is written whole or not at all.
        title: Of the page.

    Raises:
        BadInput: No evaluations.
    """
    if not isinstance(evaluations, Mapping):
        raise BadType(
            f"evaluations must be a mapping of labels to evaluations, got {type(evaluations).__name__}; for one, "
            "evaluation.to_html(path)"
        )
    if not evaluations:
        raise BadInput("evaluations is empty; at least one is needed")
    body = [f"<h1>{escape(title)}</h1>", _summary(evaluations), tables.headline(evaluations), _advice(evaluations)]
    classified = {label: item for label, item in evaluations.items() if item.answers is not None}
    if classified:
        body += [parts.reliability(classified), _threshold(classified), parts.confidences(classified)]
        body += [parts.classes(classified), parts.groups(classified)]
    body += [parts.shifts(evaluations), tables.by_metric(evaluations), tables.words(evaluations)]
    body += [tables.settings(evaluations), '<div id="tip" role="status" hidden></div>']
    write_text(path, document(title, body, (_FOLDER / "script.js").read_text(encoding="utf-8")))


def document(title: str, body: Sequence[str], script: str = "") -> str:
    """Return a page of the given parts in the style of all pages, which needs nothing from any network."""
    style = (_FOLDER / "style.css").read_text(encoding="utf-8")
    # The browser itself refuses whatever is not in the page, and any script or style but these two.
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}"
    if script:
        policy += f"; script-src {_hash(script)}"
        script = f"<script>{script}</script>"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{style}</style></head>\n<body>\n'
        + "\n".join(part for part in body if part)
        + f"\n{script}</body></html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _summary(evaluations: Mapping[str, Evaluation]) -> str:
    meta = next(iter(evaluations.values())).meta
    shaded = "; a shaded number is the best of its row" * (len(evaluations) > 1)
    brackets = f"Square brackets are {meta['confidence_level']:.0%} bootstrap intervals over examples"
    if not meta["num_resamples"]:
        brackets = "There are no intervals: no resamples were asked for"
    return f'<p class="note">{meta["num_examples"]:,} examples, as they are (not shifted). {brackets}{shaded}.</p>'


def _advice(evaluations: Mapping[str, Evaluation]) -> str:
    level = next(iter(evaluations.values())).meta["confidence_level"]
    found = [
        "<h2>What to do about it</h2>",
        f'<p class="note">Rules on the numbers and their {level:.0%} intervals: where nothing is wrong, each still speaks in '
        f"about {1 - level:.0%} of cases.</p>",
    ]
    for label, evaluation in evaluations.items():
        if len(evaluations) > 1:
            found.append(f"<h3>{escape(label)}</h3>")
        given = advise(evaluation)
        for advice in given:
            code = f"<pre><code>{escape(advice.code)}</code></pre>" if advice.code else ""
            found.append(
                f'<div class="advice"><p><strong>{escape(advice.finding)}</strong></p><p>{escape(advice.remedy)}</p>{code}</div>'
            )
        if not given:
            found.append(
                '<div class="advice none"><p>No rule found anything wrong that is clear of chance and large enough to '
                "matter.</p></div>"
            )
    return "".join(found)


def _threshold(evaluations: Mapping[str, Evaluation]) -> str:
    return (
        "<h2>What is answered at a confidence</h2>"
        + threshold.section(evaluations)
        + f'<div class="panels">{diagrams.risk_coverage(evaluations)}</div>'
    )
