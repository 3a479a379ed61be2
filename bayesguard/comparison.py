"""Comparison: several predictors on the same data, as paired differences with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesguard.checks import check_count, check_level
from bayesguard.data import is_one_shot
from bayesguard.errors import BadInput
from bayesguard.evaluation import NUM_RESAMPLES, check_same_targets, interval, predictions
from bayesguard.metrics.bootstrap import bootstrap_weights
from bayesguard.metrics.registry import EVALUATION_METRICS, Scores, specs_for
from bayesguard.predictive import Predictive
from bayesguard.predictor import Predictor
from bayesguard.results import to_json


class Difference(NamedTuple):
    """A metric of `name` minus that of the baseline, on the same examples."""

    name: str
    metric: str
    value: float
    difference: float
    lower: float
    upper: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.lower > 0 or self.upper < 0


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: for each predictor and metric the value, and the paired difference from the baseline."""

    baseline: str
    differences: tuple[Difference, ...]
    meta: dict[str, Any]

    def table(self) -> str:
        """Return a table for the terminal; a star marks differences whose interval leaves out 0."""
        metrics = list(dict.fromkeys(row.metric for row in self.differences))
        rows = [["", *(EVALUATION_METRICS[name].label for name in metrics)]]
        for name in dict.fromkeys(row.name for row in self.differences):
            found = {row.metric: row for row in self.differences if row.name == name}
            rows.append([name, *(self._cell(found[metric]) for metric in metrics)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        level = self.meta["confidence_level"]
        note = f"differences from {self.baseline} with paired {level:.0%} intervals; * the interval leaves out 0"
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", note])

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the comparison as JSON, and write it to `path` if one is given; undefined numbers are null."""
        rows = [row._asdict() | {"is_clear": row.is_clear} for row in self.differences]
        return to_json({"meta": self.meta, "baseline": self.baseline, "differences": rows}, path)

    def _cell(self, row: Difference) -> str:
        if row.name == self.baseline:
            return f"{row.value:.3f}"
        star = "*" if row.is_clear else ""
        return f"{row.value:.3f} ({row.difference:+.3f} [{row.lower:+.3f}, {row.upper:+.3f}]{star})"


def compare(
    predictors: Mapping[str, Predictor | Predictive],
    data: Any,
    *,
    baseline: str | None = None,
    metrics: Sequence[str] | None = None,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare predictors on the same examples: each metric's difference from the baseline, resampled in pairs.

    A pair shares what makes an example easy or hard, so that a difference may be clear where two intervals overlap.

    Args:
        predictors: Predictors by name, or their Predictives (then `data` are the targets).
        data: As for `evaluate`.
        baseline: Name of the one that the others are held against; None for the first.
        metrics: As for `evaluate`.
        confidence_level: Of the intervals.
        seed: Of the resamples.

    Raises:
        BadInput: Fewer than two predictors, an unknown baseline, or predictions of different targets.

    Examples:
        >>> sure, unsure = Predictive.from_probs([[0.9, 0.1]] * 9), Predictive.from_probs([[0.6, 0.4]] * 9)
        >>> compare({"sure": sure, "unsure": unsure}, torch.zeros(9, dtype=torch.long)).differences[-1].is_clear
        True
    """
    check_level(confidence_level, "confidence_level")
    check_count(seed, "seed", minimum=0)
    names = list(predictors)
    if len(names) < 2:
        raise BadInput(f"predictors has {len(names)} entries; a comparison needs two at least")
    first = names[0] if baseline is None else baseline
    if first not in predictors:
        raise BadInput(f"baseline is {first!r}; predictors has {', '.join(names)}")
    if is_one_shot(data):
        raise BadInput("data is an iterator, but each predictor reads it; pass a list of batches or a DataLoader")
    scores = _scores(predictors, data, None if metrics is None else list(metrics))
    differences: list[Difference] = []
    resampled = _resample(scores, seed)
    for name in names:
        for metric, own in scores[name].items():
            other = scores[first][metric]
            value, base = own.value(), other.value()
            again = resampled[name][metric] - resampled[first][metric]
            limits = interval(value - base, again, confidence_level)
            differences.append(Difference(name, metric, value, value - base, *limits))
    meta = {"confidence_level": confidence_level, "num_resamples": NUM_RESAMPLES, "seed": seed}
    return Comparison(first, tuple(differences), meta)


def _scores(
    predictors: Mapping[str, Predictor | Predictive], data: Any, metrics: list[str] | None
) -> dict[str, dict[str, Scores]]:
    scores: dict[str, dict[str, Scores]] = {}
    truth: Tensor | None = None
    for name, predictor in predictors.items():
        predictive, targets = predictions(predictor, data)
        if truth is not None:
            check_same_targets(truth, targets)
        truth = targets
        scores[name] = {spec.name: spec.scores(predictive, targets) for spec in specs_for(predictive, metrics)}
    return scores


def _resample(scores: dict[str, dict[str, Scores]], seed: int) -> dict[str, dict[str, Tensor]]:
    first = next(iter(next(iter(scores.values())).values()))
    parts: dict[str, dict[str, list[Tensor]]] = {name: {metric: [] for metric in own} for name, own in scores.items()}
    for weights in bootstrap_weights(first.num_examples, NUM_RESAMPLES, seed):
        for name, own in scores.items():
            for metric, kept in own.items():
                parts[name][metric].append(kept.resample(weights))
    return {name: {metric: torch.cat(part) for metric, part in own.items()} for name, own in parts.items()}
