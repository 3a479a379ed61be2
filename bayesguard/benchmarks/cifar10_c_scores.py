"""What a cell of CIFAR-10-C keeps of its answers: the scores of every set, and reliability bins by severity."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesguard.benchmarks.image_cells import quality
from bayesguard.metrics.functional.binned import BinnedSums, ReliabilityBins, bin_index, wilson_interval
from bayesguard.metrics.functional.inputs import top_label
from bayesguard.predictive import Predictive
from bayesguard.shifting import AnyShift

NUM_BINS = 15
_LEVEL = 0.95
_SUMS = ("count", "confidence", "accuracy")


@dataclass(frozen=True)
class Bins:
    """Sums over the answers in each of 15 bins of equal width of confidence; those of several sets add up.

    Attributes:
        sets: How many sets of the same images were pooled.
        count: Answers.
        confidence: Their summed confidence.
        accuracy: How many of them are right.
    """

    sets: int
    count: list[float]
    confidence: list[float]
    accuracy: list[float]


class Scored(NamedTuple):
    """The scores of one set of answers, and its bins."""

    scores: dict[str, float]
    bins: Bins


def scored(pred: Predictive, labels: Tensor) -> Scored:
    """Score the answers to one set."""
    confidence, right = top_label(pred.probs, labels)
    sums = BinnedSums.of(confidence, right, bin_index(confidence, NUM_BINS, "width"), NUM_BINS)
    return Scored(quality(pred, labels), Bins(1, sums.count.tolist(), sums.score.tolist(), sums.hits.tolist()))


def averaged(found: Sequence[Scored]) -> Scored:
    """Return mean scores and pooled bins of several answers to one set."""
    scores = {name: sum(each.scores[name] for each in found) / len(found) for name in found[0].scores}
    return Scored(scores, pooled([each.bins for each in found]))


def pooled(found: Sequence[Bins]) -> Bins:
    """Add bins up."""
    columns = (torch.tensor([getattr(each, name) for each in found], dtype=torch.float64) for name in _SUMS)
    return Bins(sum(each.sets for each in found), *(column.sum(0).tolist() for column in columns))


def by_set(shifts: Sequence[AnyShift], found: Sequence[Scored]) -> dict[str, Any]:
    """Return what is stored of a row: the scores of undisturbed data and of each shift, and bins by severity ("0" is undisturbed)."""
    clean, *shifted = found
    severities: dict[str, list[Bins]] = {"0": [clean.bins]}
    for shift, own in zip(shifts, shifted, strict=True):
        severities.setdefault(f"{shift.severity:g}", []).append(own.bins)
    return {
        "clean": clean.scores,
        "sets": [
            {"shift": shift.name, "severity": shift.severity, **own.scores}
            for shift, own in zip(shifts, shifted, strict=True)
        ],
        "reliability": {severity: asdict(pooled(bins)) for severity, bins in severities.items()},
    }


def reliability_of(stored: Sequence[Mapping[str, Any]]) -> ReliabilityBins:
    """Return the reliability bins of stored sums, those of several seeds pooled; an image counts once in the intervals."""
    sums = pooled([Bins(**each) for each in stored])
    count, confidence, right = (torch.tensor(getattr(sums, name), dtype=torch.float64) for name in _SUMS)
    edges = torch.arange(len(count) + 1, dtype=torch.float64) / len(count)
    once = count / sums.sets
    limits = wilson_interval(right / sums.sets, once, _LEVEL)
    return ReliabilityBins(edges[:-1], edges[1:], count, confidence / count, right / count, *limits)
