"""What an evaluation found: numbers with intervals, and ways to read, keep and show them."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bayesguard.checks import check_writable
from bayesguard.errors import BadInput
from bayesguard.metrics.functional.binned import BinnedSums, ReliabilityBins
from bayesguard.metrics.functional.selective import RiskCoverage
from bayesguard.metrics.registry import EVALUATION_METRICS

CLEAN = "clean"
MEAN = "mean"


class Result(NamedTuple):
    """One number with its interval: a metric on clean data, on one shift, or the mean over shifts of a severity."""

    shift: str
    severity: float
    group: str | None
    metric: str
    value: float
    lower: float
    upper: float
    num_examples: int


class Answers(NamedTuple):
    """Class predictions as diagrams see them, flat `[M]`: M examples, or the elements of dense ones.

    Attributes:
        confidence: Probability of the answer.
        right: 1 where the answer is right, else 0.
        promised: What the calibration error bins: the confidence, or for yes or no the probability of yes.
        outcome: What came of it: `right`, or for yes or no the target.
        total: Total uncertainty in nats.
    """

    confidence: Tensor
    right: Tensor
    promised: Tensor
    outcome: Tensor
    total: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        results: Every number; shift "clean" has severity 0, shift "mean" is the mean over shifts of a severity.
        reliability: Reliability bins by severity, shifts of a severity pooled (class predictions only): of the confidence
            in the answer, or for yes or no of the probability of yes. Intervals are Wilson's.
        risk: Risk-coverage curve of the clean data (class predictions only).
        doubt: Total uncertainty in nats of right and of wrong answers, by severity (class predictions only).
        answers: The answers to the clean data (class predictions only).
        by_class: Sums over 15 bins of each class's probability `[K, 15]`, clean data (several classes only).
        by_group: Sums over 15 bins of what `answers` promised, by group (class predictions only).
        simultaneous: The groups' numbers again, with intervals that hold for all groups of a metric at once.
        meta: Name of the predictor's class, kind of target, seed, level of the intervals, number of resamples, versions.
    """

    results: tuple[Result, ...] = field(repr=False)
    meta: dict[str, Any]
    reliability: dict[float, ReliabilityBins] = field(default_factory=dict, repr=False)
    risk: RiskCoverage | None = field(default=None, repr=False)
    doubt: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    answers: Answers | None = field(default=None, repr=False)
    by_class: BinnedSums | None = field(default=None, repr=False)
    by_group: dict[str, BinnedSums] = field(default_factory=dict, repr=False)
    simultaneous: tuple[Result, ...] = field(default=(), repr=False)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in order."""
        return list(dict.fromkeys(result.metric for result in self.results))

    @property
    def severities(self) -> list[float]:
        """Severities in rising order; 0 is the clean data."""
        return sorted({result.severity for result in self.results})

    def result(self, metric: str, severity: float = 0, shift: str | None = None, group: str | None = None) -> Result:
        """Return one number with its interval.

        Raises:
            BadInput: There is no such number; the message says what there is.
        """
        name = shift or (MEAN if severity else CLEAN)
        for result in self.results:
            if (result.metric, result.severity, result.shift, result.group) == (metric, severity, name, group):
                return result
        raise BadInput(
            f"no result for metric={metric!r}, severity={severity}, shift={name!r}, group={group!r}; there are metrics "
            f"{', '.join(self.metrics)} at severities {', '.join(f'{s:g}' for s in self.severities)}"
        )

    def value(self, metric: str, severity: float = 0, shift: str | None = None) -> float:
        """Return one number without its interval."""
        return self.result(metric, severity, shift).value

    def worst_group(self, metric: str) -> Result:
        """Return the group with the worst value of a metric; groups where it is undefined are passed over.

        Chance helps to pick the worst of many, which looks worse than it is. Its interval holds for all groups at once, and
        so for the one that was picked.

        Raises:
            BadInput: No groups, or a metric that is neither better nor worse when larger.
        """
        rows = [result for result in self.simultaneous if result.metric == metric]
        if not rows:
            raise BadInput(f"the evaluation has no groups with {metric!r}; pass groups= to evaluate")
        direction = EVALUATION_METRICS[metric].direction
        if direction == "none":
            raise BadInput(f"{metric} has no worst group: more of it is neither better nor worse")
        defined = [result for result in rows if not math.isnan(result.value)] or rows
        return (min if direction == "higher" else max)(defined, key=lambda result: result.value)

    def table(self) -> str:
        """Return a table for the terminal: clean data, severities and groups by metrics, with intervals.

        Under it the worst group by each metric is named, with the interval of `worst_group`.
        """
        text = combined_table({"": self})
        if any(result.group is not None for result in self.results):
            judged = [metric for metric in self.metrics if EVALUATION_METRICS[metric].direction != "none"]
            for metric in judged:
                worst = self.worst_group(metric)
                text += f"\nworst group by {EVALUATION_METRICS[metric].label}: {worst.group} with {show(worst)}"
            if self.meta["num_resamples"]:
                text += f"\n[{self.meta['confidence_level']:.0%} intervals of the worst hold for all groups at once]"
        return text

    def to_frame(self) -> Any:
        """Return the results as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed; `pip install "bayesguard[tables]"` brings it.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError('to_frame needs pandas: pip install "bayesguard[tables]"') from error
        return pandas.DataFrame(self.results, columns=list(Result._fields))

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the results as JSON, and write them to `path` if one is given; NaN and infinity are null."""
        tree: dict[str, Any] = {"meta": self.meta, "results": [result._asdict() for result in self.results]}
        if self.simultaneous:
            tree["simultaneous"] = [result._asdict() for result in self.simultaneous]
        return to_json(tree, path)

    def plot(self, path: str | Path | None = None) -> Any:
        """Return a matplotlib figure of the evaluation, and save it to `path` if one is given."""
        from bayesguard import plots

        figure = plots.overview(self)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def to_html(self, path: str | Path, title: str = "Evaluation") -> None:
        """Write one self-contained HTML page."""
        from bayesguard import report

        report.to_html({"predictions": self}, path, title=title)


def combined_table(evaluations: Mapping[str, Evaluation]) -> str:
    """Return one table of several evaluations for the terminal, with intervals.

    Rows are labels by severity (and group), columns metrics.
    """
    if not isinstance(evaluations, Mapping) or not evaluations:
        raise BadInput("evaluations must be a mapping of labels to evaluations, of one at least")
    metrics = list(dict.fromkeys(metric for evaluation in evaluations.values() for metric in evaluation.metrics))
    rows = [["", "", *(EVALUATION_METRICS[name].label for name in metrics)]]
    for label, evaluation in evaluations.items():
        for place, found in _table_rows(evaluation):
            cells = [show(found[name]) if name in found else "" for name in metrics]
            rows.append([label, place, *cells])
            label = ""
    columns = [column for column in zip(*rows, strict=True) if any(column)]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]
    text = "\n".join([lines[0], "-" * len(max(lines, key=len)), *lines[1:]])
    if not any(evaluation.meta["num_resamples"] for evaluation in evaluations.values()):
        return text
    level = next(iter(evaluations.values())).meta["confidence_level"]
    return f"{text}\n\n[{level:.0%} bootstrap intervals]"


def _table_rows(evaluation: Evaluation) -> list[tuple[str, dict[str, Result]]]:
    """Return the rows of a table: clean, groups, then the mean over shifts of each severity."""
    found: dict[str, dict[str, Result]] = {}
    for result in evaluation.results:
        if result.shift == CLEAN:
            place = CLEAN if result.group is None else f"group {result.group}"
        elif result.shift == MEAN:
            place = f"severity {result.severity:g}"
        else:
            continue
        found.setdefault(place, {})[result.metric] = result
    return list(found.items())


def show(result: Result) -> str:
    """Return "value [lower, upper]", or the value alone, with three decimals, or as many as three digits of it need."""
    if math.isnan(result.value):
        return "undefined"
    scale = max((abs(x) for x in (result.value, result.lower, result.upper) if math.isfinite(x)), default=1.0)
    if scale == 0 or 0.005 <= scale < 1000:
        form = ".3f"
    else:
        form = ".0f" if 1000 <= scale < 1e6 else ".2e"
    value, lower, upper = (format(x, form) for x in (result.value, result.lower, result.upper))
    return value if math.isnan(result.lower) else f"{value} [{lower}, {upper}]"


def to_json(tree: Any, path: str | Path | None = None) -> str:
    """Return plain values as JSON text, and write it to `path` if one is given."""
    text = json.dumps(_finite(tree), indent=1, allow_nan=False) + "\n"
    if path is not None:
        write_text(path, text)
    return text


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not know by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all."""
    check_writable(path)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
