"""Comparison: several predictors on the same data, as paired differences with intervals."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bayesguard.checks import check_count, check_level
from bayesguard.data import is_one_shot
from bayesguard.errors import BadInput, BadType
from bayesguard.evaluation import check_order, check_same_targets, predictions
from bayesguard.grouping import cluster_index
from bayesguard.metrics.bootstrap import bootstrap_weights, critical_value, largest, standardised
from bayesguard.metrics.registry import EVALUATION_METRICS, Kind, Scores, kind_of, specs_for
from bayesguard.metrics.scores import Together
from bayesguard.predictive import Predictive
from bayesguard.predictor import Predictor
from bayesguard.results import to_json
from bayesguard.sheet import NUM_RESAMPLES, Drawn


class Difference(NamedTuple):
    """A metric of `name` minus that of the baseline, on the same examples.

    `p_value` is that of no difference, corrected for all differences of the comparison unless `correction` was None; NaN
    where the difference is undefined or infinite.
    """

    name: str
    metric: str
    value: float
    difference: float
    lower: float
    upper: float
    p_value: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the difference leaves out 0, which is where the p-value is 1 - level at most."""
        return not math.isnan(self.p_value) and (self.lower > 0 or self.upper < 0)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: for each predictor and metric the value, and the paired difference from the baseline."""

    baseline: str
    differences: tuple[Difference, ...]
    meta: dict[str, Any]

    def table(self) -> str:
        """Return a table for the terminal; a star marks differences that are clear: their interval leaves out 0."""
        metrics = list(dict.fromkeys(row.metric for row in self.differences))
        rows = [["", *(EVALUATION_METRICS[name].label for name in metrics)]]
        for name in dict.fromkeys(row.name for row in self.differences):
            found = {row.metric: row for row in self.differences if row.name == name}
            rows.append([name, *(self._cell(found[metric]) for metric in metrics)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        level = self.meta["confidence_level"]
        scope = (
            "each interval by itself" if self.meta["correction"] is None else "intervals hold for all at once (max-|t|)"
        )
        note = (
            f"differences from {self.baseline} with paired {level:.0%} intervals; {scope}; * the interval leaves out 0"
        )
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
    clusters: object = None,
    correction: Literal["max_t"] | None = "max_t",
    confidence_level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare predictors on the same examples: each metric's difference from the baseline, resampled in pairs.

    A pair shares what makes an example easy or hard, so that a difference may be clear where two intervals overlap.

    Of many differences some look clear by chance. So intervals and p-values hold for all predictors and metrics at once:
    they go by the largest of all differences in standard errors, whose law the joint resamples tell. Where nothing
    differs, anything at all is marked as clear in 5 of 100 comparisons at most. Unlike Holm's steps from p-values one by
    one, this uses that metrics of the same rows go together, and needs no p-value smaller than 1,000 resamples can tell.

    Args:
        predictors: Predictors by name, or their Predictives (then `data` are the targets).
        data: As for `evaluate`.
        baseline: Name of the one that the others are held against; None for the first.
        metrics: As for `evaluate`; None for those defaults that all of the predictions have.
        clusters: As for `evaluate`.
        correction: "max_t", or None for intervals and p-values of each difference by itself.
        confidence_level: Of the intervals.
        seed: Of the resamples.

    Raises:
        BadInput: Fewer than two predictors, an unknown baseline or correction, clusters of another length or for shuffled
            data, predictions of different targets, or of classes and of numbers.

    References:
        J. Romano, M. Wolf (2005). Exact and approximate stepdown methods for multiple hypothesis testing. JASA (the
        single step).

    Examples:
        >>> sure, unsure = Predictive.from_probs([[0.9, 0.1]] * 9), Predictive.from_probs([[0.6, 0.4]] * 9)
        >>> compare({"sure": sure, "unsure": unsure}, torch.zeros(9, dtype=torch.long)).differences[-1].is_clear
        True
    """
    check_level(confidence_level, "confidence_level")
    check_count(seed, "seed", minimum=0)
    if not isinstance(predictors, Mapping):
        raise BadType(f'predictors must be a mapping, as {{"a": first, "b": second}}, got {type(predictors).__name__}')
    names = list(predictors)
    if len(names) < 2:
        raise BadInput(f"predictors has {len(names)} entries; a comparison needs two at least")
    first = names[0] if baseline is None else baseline
    if first not in predictors:
        raise BadInput(f"baseline is {first!r}; predictors has {', '.join(names)}")
    if is_one_shot(data):
        raise BadInput("data is an iterator, but each predictor reads it; pass a list of batches or a DataLoader")
    if correction not in (None, "max_t"):
        raise BadInput(f"correction must be 'max_t' or None, got {correction!r}")
    if clusters is not None:
        check_order(data, "clusters")
    scores = _scores(predictors, data, None if metrics is None else list(metrics))
    pairs = _pairs(scores, first, seed, clusters)
    tests = _tests(pairs, confidence_level, correction)
    meta = {
        "confidence_level": confidence_level,
        "num_resamples": NUM_RESAMPLES,
        "seed": seed,
        "correction": correction,
    }
    return Comparison(first, tuple(tests), meta)


class _Pair(NamedTuple):
    """A difference and its values over resamples `[R]`."""

    name: str
    metric: str
    value: float
    difference: float
    resampled: Tensor


def _pairs(scores: dict[str, dict[str, Scores]], first: str, seed: int, clusters: object) -> list[_Pair]:
    resampled = _resample(scores, seed, clusters)
    pairs = []
    for name, own in scores.items():
        for metric, kept in own.items():
            value, base = kept.value(), scores[first][metric].value()
            again = _less(resampled[name][metric], resampled[first][metric])
            less = _less(torch.tensor(value, dtype=torch.float64), torch.tensor(base, dtype=torch.float64))
            pairs.append(_Pair(name, metric, value, float(less), again))
    return pairs


def _less(values: Tensor, others: Tensor) -> Tensor:
    """Return the difference, exactly 0 where it is only what rounding leaves."""
    difference = values - others
    rounding = difference.isfinite() & (difference.abs() <= 1e-13 * (values.abs() + others.abs()))
    return difference.masked_fill(rounding, 0.0)


def _tests(pairs: Sequence[_Pair], level: float, correction: str | None) -> Iterator[Difference]:
    """Yield the differences with intervals that are equally wide in standard errors, the bias of resampling taken off."""
    table = torch.stack([pair.resampled for pair in pairs], -1)
    # A difference that is infinite, or sometimes has no value at all, has no standard error.
    is_known = [math.isfinite(pair.difference) and bool(pair.resampled.isfinite().any()) for pair in pairs]
    standard = standardised(table[:, torch.tensor(is_known)])
    joint = largest(standard) if any(is_known) else None
    columns = iter(standard.unbind(-1))
    for pair, known in zip(pairs, is_known, strict=True):
        if not known:
            limits = Drawn(pair.difference, pair.resampled).interval(level)
            yield Difference(*pair[:4], *limits, math.nan)
            continue
        column = next(columns)
        law = column.abs() if joint is None or correction is None else joint
        yield Difference(*pair[:4], *_test(pair, column, law, level))


def _test(pair: _Pair, standard: Tensor, law: Tensor, level: float) -> tuple[float, float, float]:
    """Return the ends of the interval and the p-value of one difference."""
    if not bool(standard.any()):  # the same in every resample
        p_value = 1.0 if pair.difference == 0 else 1 / (len(law) + 1)
        return pair.difference, pair.difference, p_value
    finite = pair.resampled[pair.resampled.isfinite()]
    error = float(finite.std(correction=0))
    centre = 2 * pair.difference - float(finite.mean())
    beyond = int((law >= abs(centre) / error).sum())
    half = critical_value(law, level) * error
    lower, upper = min(centre - half, pair.difference), max(centre + half, pair.difference)
    return lower, upper, (1 + beyond) / (len(law) + 1)


def _scores(
    predictors: Mapping[str, Predictor | Predictive], data: Any, metrics: list[str] | None
) -> dict[str, dict[str, Scores]]:
    scores: dict[str, dict[str, Scores]] = {}
    kinds: dict[str, Kind] = {}
    truth: Tensor | None = None
    for name, predictor in predictors.items():
        predictive, targets = predictions(predictor, data)
        if truth is not None:
            check_same_targets(truth, targets)
        truth = targets
        kinds[name] = kind_of(predictive)
        # The likelihood of a class is a probability and that of a number a density: their difference means nothing.
        if len({kind in ("categorical", "binary") for kind in kinds.values()}) > 1:
            raise BadInput(f"predictors answer in different kinds ({_listing(kinds)}), and cannot be compared")
        scores[name] = {spec.name: spec.scores(predictive, targets) for spec in specs_for(predictive, metrics)}
    common = [metric for metric in next(iter(scores.values())) if all(metric in own for own in scores.values())]
    return {name: {metric: own[metric] for metric in common} for name, own in scores.items()}


def _listing(kinds: Mapping[str, Kind]) -> str:
    return ", ".join(f"{name!r}: {kind}" for name, kind in kinds.items())


def _resample(scores: dict[str, dict[str, Scores]], seed: int, clusters: object) -> dict[str, dict[str, Tensor]]:
    count = next(iter(next(iter(scores.values())).values())).num_examples
    if count == 1:
        raise BadInput(
            "data has one example only; from one nothing can be told about others, and a comparison needs two at least"
        )
    index = None if clusters is None else cluster_index(clusters, count)
    together = Together([kept for own in scores.values() for kept in own.values()])
    chunks = [
        [values for values, _ in together.resample(weights)]
        for weights in bootstrap_weights(count, NUM_RESAMPLES, seed, clusters=index)
    ]
    resampled = iter([torch.cat(parts) for parts in zip(*chunks, strict=True)])
    return {name: {metric: next(resampled) for metric in own} for name, own in scores.items()}
