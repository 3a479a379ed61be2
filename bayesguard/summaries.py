"""Single numbers with intervals about answers: how far promises are from outcomes, and whether confidence finds errors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.metrics.functional.binned import BinnedSums
from bayesguard.metrics.functional.selective import area_under_roc
from bayesguard.results import Answers


class Estimate(NamedTuple):
    """A number with its interval; NaN where it is undefined."""

    value: float
    lower: float
    upper: float


def confidence_gap(answers: Answers, num_examples: int, confidence_level: float) -> Estimate:
    """Return mean confidence minus accuracy: above 0 is over-confident.

    The interval is the normal one of the mean over examples; the elements of a dense example are averaged first.
    """
    gaps = (answers.confidence.double() - answers.right).reshape(num_examples, -1).mean(-1)
    error = gaps.std().item() / math.sqrt(num_examples) if num_examples > 1 else math.nan
    return _normal(gaps.mean().item(), error, confidence_level)


def gaps_of_sums(sums: BinnedSums, confidence_level: float, *, elements: int = 1) -> list[Estimate]:
    """Return mean promise minus mean outcome of each row of sums `[K, B]`, or of sums `[B]`, with normal intervals.

    The variance comes from the sums of squares, so that nothing is lost by binning.

    Args:
        sums: Of promises and outcomes.
        confidence_level: Of the intervals.
        elements: Elements of an example, whose errors may all be one: variances are multiplied by it.
    """
    count, score, hits, squares, both = (values.double().reshape(-1, values.shape[-1]).sum(-1) for values in sums.tensors())
    mean = (score - hits) / count
    variance = ((squares - 2 * both + hits) / count - mean.square()).clamp_min(0) / (count - 1) * elements
    pairs = zip(mean.tolist(), variance.sqrt().tolist(), strict=True)
    return [_normal(value, error, confidence_level) for value, error in pairs]


def error_auroc(answers: Answers, num_examples: int, confidence_level: float) -> Estimate:
    """Return the probability that a wrong answer is less confident than a right one, with a normal interval.

    NaN where all answers are right, or all wrong.

    References:
        E. DeLong, D. DeLong, D. Clarke-Pearson (1988). Comparing the areas under two or more correlated receiver
        operating characteristic curves. Biometrics.
        N. Obuchowski (1997). Nonparametric analysis of clustered ROC curve data. Biometrics (dense examples).
    """
    wrong = answers.right == 0
    if bool(wrong.all()) or not bool(wrong.any()):
        return Estimate(math.nan, math.nan, math.nan)
    area = area_under_roc(-answers.confidence.double(), wrong).item()
    # What each answer adds to the area: how many of the other kind it is on the right side of.
    influence = torch.empty_like(answers.right)
    for kind, sign in ((wrong, 1), (~wrong, -1)):
        own, others = (sign * answers.confidence[side].double() for side in (kind, ~kind))
        influence[kind] = (_share_above(own, others) - area) / int(kind.sum())
    per_example = influence.reshape(num_examples, -1).sum(-1)
    error = (per_example.square().sum() * num_examples / max(1, num_examples - 1)).sqrt().item()
    value, lower, upper = _normal(area, error, confidence_level)
    return Estimate(value, max(0.0, lower), min(1.0, upper))


def _share_above(values: Tensor, others: Tensor) -> Tensor:
    """Return for each value the share of the others that are larger; ties count half."""
    ordered = others.sort().values
    left, right = (torch.searchsorted(ordered, values, right=side) for side in (False, True))
    return 1 - (left + right).double() / (2 * len(ordered))


def _normal(value: float, error: float, confidence_level: float) -> Estimate:
    half = normal_quantile(confidence_level) * error
    return Estimate(value, value - half, value + half)


def normal_quantile(confidence_level: float) -> float:
    """Return how many standard errors an interval of a level reaches to either side."""
    return torch.special.ndtri(torch.tensor(0.5 + confidence_level / 2, dtype=torch.float64)).item()
