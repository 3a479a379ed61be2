"""The tables of the text benchmark, as Markdown: ours as means with 95 % t intervals over seeds, and the published numbers."""

from collections.abc import Sequence
from typing import Any

from bayesguard.benchmarks.cells import Record, spread
from bayesguard.benchmarks.published import UNCERTAINTY_BASELINES_CLINC

MAX_ERROR = 0.02
NOTE = (
    "Published: BERT-base fine-tuned (google/uncertainty-baselines), another class of model than the small network of hashed "
    "n-grams measured here. The numbers are not comparable; only the order of the methods may be compared."
)
# Of each method its label, and its name among the published ones.
LABELS: dict[str, tuple[str, str | None]] = {
    "deterministic": ("Deterministic", "deterministic"),
    "mc_dropout": ("MC dropout", "dropout"),
    "deep_ensemble": ("Deep ensemble", "ensemble"),
    "variational": ("Variational, last layer", None),
}
_FORMS = {"as_trained": "", "calibrated": " + temperature"}
_SCORES = ("max_probability", "entropy", "mutual_information")

_COLUMNS = {"accuracy": ("accuracy", 1), "nll": ("NLL (nats)", 0), "ece": ("ECE", 2)}


def table(records: Sequence[Record]) -> str:
    """Return accuracy and calibration in scope as Markdown: ours as mean with the 95 % t interval over seeds."""
    names = [part for label, _ in _COLUMNS.values() for part in (label, "published, BERT")]
    lines = [
        f"| | {' | '.join(names)} | answered at {MAX_ERROR:.0%} error | error of answers |",
        "|---" * (len(names) + 3) + "|",
    ]
    for method, label, form, kept in _rows(records):
        published = _published(records, method, form)
        cells = [label]
        for metric, (_, place) in _COLUMNS.items():
            cells += [shown([values[metric] for values in kept]), "" if published is None else f"{published[place]:g}"]
        cells.append(shown([values["answered"] for values in kept]))
        cells.append(shown([values["answered_error"] for values in kept]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def detection_table(records: Sequence[Record]) -> str:
    """Return how well queries outside every intent are told from the others, as Markdown."""
    lines = [
        "| | outside | score | AUROC | published, BERT | AUPRC | published, BERT | FPR95 | answered |",
        "|---" * 9 + "|",
    ]
    for method, label, form, kept in _rows(records):
        published = _published(records, method, form)
        for name, first in kept[0]["outside"].items():
            for score in (score for score in _SCORES if score in first):
                comparable = published is not None and name == "out of scope" and score == "max_probability"
                theirs = [f"{value:g}" if comparable else "" for value in (published or (0.0,) * 5)[3:]]
                auroc, auprc, fpr = (
                    shown([values["outside"][name][score][metric] for values in kept])
                    for metric in ("auroc", "auprc", "fpr95")
                )
                answered = shown([values["outside"][name]["answered"] for values in kept])
                cells = [label, name, score.replace("_", " "), auroc, theirs[0], auprc, theirs[1], fpr, answered]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(records: Sequence[Record]) -> str:
    """Return parameters, seconds of training, and the time of a prediction beside that of the deterministic network."""
    lines = ["| | parameters | training (s) | prediction, times deterministic | temperature |", "|---" * 5 + "|"]
    own = {name: [record["values"] for record in records if record["method"] == name] for name in LABELS}
    single = [values["prediction_seconds"] for values in own["deterministic"]]
    for name, kept in own.items():
        if not kept:
            continue
        seconds = sum(values["prediction_seconds"] for values in kept) / len(kept)
        times = f"{seconds / (sum(single) / len(single)):.1f}" if single else ""
        training = sum(values["training_seconds"] for values in kept) / len(kept)
        temperature = shown([values["temperature"] for values in kept])
        lines.append(
            f"| {LABELS[name][0]} | {kept[0]['num_parameters']:,} | {training:.0f} | {times} | {temperature} |"
        )
    return "\n".join(lines)


def _published(records: Sequence[Record], method: str, form: str) -> tuple[float, ...] | None:
    """Return the published row, which is of a network as trained on all intents."""
    if form != "as_trained" or records[0]["data"] != "clinc150":
        return None
    return UNCERTAINTY_BASELINES_CLINC.get(LABELS[method][1] or "")


def _rows(records: Sequence[Record]) -> list[tuple[str, str, str, list[dict[str, Any]]]]:
    """Method, label, form, and the values of each seed."""
    return [
        (method, label + suffix, form, kept)
        for method, (label, _) in LABELS.items()
        for form, suffix in _FORMS.items()
        if (kept := [record["values"][form] for record in records if record["method"] == method])
    ]


def shown(values: Sequence[float | None]) -> str:
    """Return a mean over seeds with its 95 % t interval; seeds without a value are named, never left out silently.

    Examples:
        >>> shown([0.5]), shown([0.25, 0.75]), shown([None, 0.5])
        ('0.500', '0.500 [-2.677, 3.677]', '0.500 (1 of 2 seeds)')
    """
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    missing = f" ({len(known)} of {len(values)} seeds)" if len(known) < len(values) else ""
    return spread(known).shown() + missing
