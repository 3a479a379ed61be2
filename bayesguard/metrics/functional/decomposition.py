"""Scores taken apart: what miscalibration costs, what discrimination gains, and what was uncertain to begin with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.metrics.functional.inputs import element_weights, group_sums, weighted_mean, yes_or_no
from bayesguard.metrics.functional.multivariate import ensemble
from bayesguard.predictive.numerics import slices


class ScoreDecomposition(NamedTuple):
    """`score = miscalibration - discrimination + uncertainty`; 0-d float64, in the unit of the score.

    Attributes:
        miscalibration: By how much recalibrating the forecasts would lower the score (lower is better).
        discrimination: By how much the recalibrated forecasts beat the base rate (higher is better).
        uncertainty: The score of the base rate itself, which no forecast changes.
    """

    miscalibration: Tensor
    discrimination: Tensor
    uncertainty: Tensor

    @property
    def score(self) -> Tensor:
        """The score that the parts add up to."""
        return self.miscalibration - self.discrimination + self.uncertainty


def corp_brier_decomposition(probs: object, targets: object, *, weights: object = None) -> ScoreDecomposition:
    """Return the parts of the mean squared error of P(y = 1), by isotonic recalibration (CORP); there are no bins.

    The recalibrated forecast is the isotonic regression of the outcomes on the forecasts (pool adjacent violators), so
    neither miscalibration nor discrimination is negative. The score is that of yes alone, 0 to 1: half of what
    `brier_score` gives for `[1 - p, p]`. For bins and more classes see `classification.brier_decomposition`.

    Args:
        probs: Probability of yes, any shape.
        targets: 0/1 of exactly that shape.
        weights: How often each row counts, `[N]`; once if None.

    Raises:
        BadInput: No rows, another shape, probabilities outside 0..1, targets that are neither 0 nor 1.

    References:
        T. Dimitriadis, T. Gneiting, A. Jordan (2021). Stable reliability diagrams for probabilistic classifiers. PNAS.

    Examples:
        >>> parts = corp_brier_decomposition([0.2, 0.6, 0.6, 0.9], [0, 0, 1, 1])
        >>> [round(part.item(), 4) for part in parts], round(parts.score.item(), 4)
        ([0.0175, 0.125, 0.25], 0.1425)
    """
    return _corp(probs, targets, weights, lambda p, y: (p - y).square())


def corp_log_score_decomposition(probs: object, targets: object, *, weights: object = None) -> ScoreDecomposition:
    """Return the parts of the mean logarithmic score of P(y = 1), in nats, by isotonic recalibration (CORP).

    An outcome that had probability 0 makes score and miscalibration infinite; nothing is clipped. Arguments as for
    `corp_brier_decomposition`.

    References:
        T. Dimitriadis, T. Gneiting, A. Jordan (2021). Stable reliability diagrams for probabilistic classifiers. PNAS.

    Examples:
        >>> parts = corp_log_score_decomposition([0.2, 0.6, 0.6, 0.9], [0, 0, 1, 1])
        >>> [round(part.item(), 4) for part in parts], round(parts.score.item(), 4)
        ([0.0923, 0.3466, 0.6931], 0.4389)
    """
    return _corp(probs, targets, weights, lambda p, y: -torch.xlogy(y, p) - torch.xlogy(1 - y, 1 - p))


def _corp(
    probs: object, targets: object, weights: object, score: Callable[[Tensor, Tensor], Tensor]
) -> ScoreDecomposition:
    scores, outcomes = yes_or_no(probs, targets)
    per_row = element_weights(weights, targets, len(scores), scores.device)
    if per_row is not None:
        kept = per_row > 0
        scores, outcomes, per_row = scores[kept], outcomes[kept], per_row[kept]
    base = weighted_mean(outcomes, per_row).expand_as(outcomes)
    forecasts = (scores.double(), isotonic(scores, outcomes, per_row), base)
    given, recalibrated, constant = (weighted_mean(score(p, outcomes), per_row) for p in forecasts)
    # The isotonic regression is the best of all monotone forecasts: what is below 0 here is rounding.
    return ScoreDecomposition(
        (given - recalibrated).clamp_min(0), (constant - recalibrated).clamp_min(0), uncertainty=constant
    )


def isotonic(scores: Tensor, outcomes: Tensor, weights: Tensor | None) -> Tensor:
    """Return the isotonic regression of outcomes on scores, for every row; equal scores get equal values."""
    values, group = scores.unique(return_inverse=True)
    mass = torch.ones_like(outcomes) if weights is None else weights
    totals = group_sums(group, mass * outcomes, len(values)).tolist()
    masses = group_sums(group, mass, len(values)).tolist()
    rates, sizes = _pool(totals, masses)
    return outcomes.new_tensor(rates).repeat_interleave(group.new_tensor(sizes))[group]


def _pool(totals: list[float], masses: list[float]) -> tuple[list[float], list[int]]:
    """Pool adjacent violators: merge a block with the one before it until means rise; return means and sizes."""
    blocks: list[tuple[float, float, int]] = []
    for total, mass in zip(totals, masses, strict=True):
        size = 1
        while blocks and blocks[-1][0] * mass >= total * blocks[-1][1]:
            before = blocks.pop()
            total, mass, size = total + before[0], mass + before[1], size + before[2]
        blocks.append((total, mass, size))
    return [total / mass for total, mass, _ in blocks], [size for _, _, size in blocks]


def weighted_corp_brier(scores: Tensor, outcomes: Tensor, weights: Tensor) -> ScoreDecomposition:
    """Return the parts of `corp_brier_decomposition` for each row of weights `[R, M]`, each `[R]`."""
    values, group = scores.unique(return_inverse=True)
    rows, count = len(weights), len(values)
    index = (group + torch.arange(rows, device=group.device).unsqueeze(-1) * count).flatten()
    mass = group_sums(index, weights.flatten(), rows * count)
    hits = group_sums(index, (weights * outcomes).flatten(), rows * count)
    owner = torch.arange(rows, device=group.device).repeat_interleave(count)
    kept = mass > 0
    captured = _pooled_squares(hits[kept], mass[kept], owner[kept], rows)
    total, right = weights.sum(-1), weights @ outcomes
    base = right / total
    # Of 0/1 outcomes, the squared error of a block's mean is its hits less their square over its mass.
    missed = weights @ (scores.double() - outcomes).square() - (right - captured)
    return ScoreDecomposition(
        (missed / total).clamp_min(0), (captured / total - base.square()).clamp_min(0), uncertainty=base * (1 - base)
    )


def _pooled_squares(hits: Tensor, mass: Tensor, owner: Tensor, rows: int) -> Tensor:
    """Return the sum over isotonic blocks of hits^2 / mass, for each of `rows` sequences laid end to end.

    Adjacent violators of all sequences are pooled at once, in a few rounds. `_pool` takes one sequence, in linear time
    however bad it is.
    """
    while True:
        mean = hits / mass
        starts = torch.nn.functional.pad((mean[1:] > mean[:-1]) | (owner[1:] != owner[:-1]), (1, 0), value=True)
        if bool(starts.all()):
            return group_sums(owner, hits * mean, rows)
        block = starts.cumsum(0) - 1
        owner = owner[starts]
        hits, mass = (group_sums(block, values, len(owner)) for values in (hits, mass))


def crps_decomposition(samples: object, targets: object, *, weights: object = None) -> ScoreDecomposition:
    """Return Hersbach's parts of the mean CRPS of samples, in the target's unit.

    Between two neighbouring samples k and k + 1 the forecast cdf is k/S; miscalibration weighs how far that lies from
    how often the target was below, discrimination is what remains of the climatological CRPS. The score is the one of
    the S samples as they are (`estimator="nrg"`, the mean of `|x - y|` less half the mean distance of all pairs), not
    the fair estimate of `continuous_ranked_probability_score`. Miscalibration is not negative; discrimination may be.

    Args:
        samples: `[S, N, ...]`, or a Predictive of samples of one weight; of other predictives pass `pred.sample(S)`.
        targets: `[N, ...]`; all elements count alike, so they should be in one unit.
        weights: How often each row counts, `[N]`; once if None.

    Raises:
        BadInput: No samples or rows, shapes that differ, NaN or infinity (with the row).

    References:
        H. Hersbach (2000). Decomposition of the continuous ranked probability score for ensemble prediction systems.
        Weather and Forecasting, section 4.

    Examples:
        >>> parts = crps_decomposition([[0.0, 4.0], [2.0, 6.0]], [1.0, 5.5])
        >>> [round(part.item(), 4) for part in parts], round(parts.score.item(), 4)
        ([0.0312, 0.6562, 1.125], 0.5)
    """
    values, truth = ensemble(samples, targets)
    count, columns, y = len(values), values.flatten(1), truth.flatten()
    share = element_weights(weights, targets, len(y), y.device)
    share = torch.full_like(y, 1 / len(y)) if share is None else share / share.sum()
    below, above, edges = y.new_zeros(count - 1), y.new_zeros(count - 1), y.new_zeros(4)
    for part in slices(len(y), 4 * count):
        ordered, at, mass = columns[:, part].sort(0).values, y[part], share[part]
        gaps = ordered.diff(dim=0)
        above += (at - ordered[:-1]).clamp_min(0).minimum(gaps) @ mass
        below += (ordered[1:] - at).clamp_min(0).minimum(gaps) @ mass
        low, high = (ordered[0] - at).clamp_min(0), (at - ordered[-1]).clamp_min(0)
        edges += torch.stack([low, (low > 0).double(), high, (high > 0).double()]) @ mass
    level = torch.arange(1, count, dtype=torch.float64, device=y.device) / count
    width = below + above
    rate = below / width.where(width > 0, 1.0)
    # Targets outside all samples: the forecast says 0 or 1, and the share of such targets is how wrong that is.
    miss_low, often_low, miss_high, often_high = edges
    miscalibration = (width * (rate - level).square()).sum() + miss_low * often_low + miss_high * often_high
    potential = (width * rate * (1 - rate)).sum() + miss_low * (1 - often_low) + miss_high * (1 - often_high)
    uncertainty = _climatology(y, share)
    return ScoreDecomposition(miscalibration, uncertainty - potential, uncertainty)


def _climatology(targets: Tensor, share: Tensor) -> Tensor:
    """Return the mean CRPS of the targets' own distribution: the integral of F (1 - F)."""
    order = targets.argsort(stable=True)
    level = share[order].cumsum(0)[:-1]
    return (level * (1 - level) * targets[order].diff()).sum()
