"""Single numbers with intervals about answers: how far promises are from outcomes, and whether confidence finds errors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.metrics.functional.binned import BinnedSums
from bayesguard.metrics.functional.selective import area_under_roc
from bayesguard.results import Answers, Evaluation


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
    count, score, hits, squares, both = (
        values.reshape(-1, values.shape[-1]).sum(-1)
        for values in (sums.count, sums.score, sums.hits, sums.score_squared, sums.score_hits)
    )
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
    area, influence = area_and_influence(-answers.confidence, wrong)
    per_example = influence.reshape(num_examples, -1).sum(-1)
    error = (per_example.square().sum() * num_examples / max(1, num_examples - 1)).sqrt().item()
    value, lower, upper = _normal(area, error, confidence_level)
    return Estimate(value, max(0.0, lower), min(1.0, upper))


def area_and_influence(scores: Tensor, positive: Tensor) -> tuple[float, Tensor]:
    """Return the area under the ROC curve, and what each row adds to its error, `[N]`: the sum of squares is the variance.

    Args:
        scores: `[N]`, larger where a row looks more like a positive one.
        positive: `[N]`, bool; both kinds must be there.
    """
    area = area_under_roc(scores.double(), positive).item()
    # What each row adds to the area: how many of the other kind it is on the right side of.
    influence = torch.empty_like(scores, dtype=torch.float64)
    for kind, sign in ((positive, -1), (~positive, 1)):
        own, others = (sign * scores[side].double() for side in (kind, ~kind))
        influence[kind] = (_share_above(own, others) - area) / int(kind.sum())
    return area, influence


def class_gaps(evaluation: Evaluation) -> list[Estimate]:
    """Return mean probability minus share of each class, intervals widened for the number of classes."""
    sums = evaluation.by_class
    return (
        []
        if sums is None
        else gaps_of_sums(sums, _shared_level(evaluation, len(sums.count)), elements=_elements(evaluation))
    )


def group_gaps(evaluation: Evaluation) -> dict[str, Estimate]:
    """Return mean promise minus outcome of each group, intervals widened for the number of groups."""
    level = _shared_level(evaluation, len(evaluation.by_group))
    elements = _elements(evaluation)
    return {name: gaps_of_sums(sums, level, elements=elements)[0] for name, sums in evaluation.by_group.items()}


def _shared_level(evaluation: Evaluation, count: int) -> float:
    alpha: float = 1 - evaluation.meta["confidence_level"]
    return 1 - alpha / max(1, count)


def _elements(evaluation: Evaluation) -> int:
    answers, count = evaluation.answers, evaluation.meta["num_examples"]
    return 1 if answers is None else len(answers.right) // int(count)


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
