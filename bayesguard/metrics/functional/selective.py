"""How well confidence ranks: risk against coverage, and the area under the ROC curve."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, bad_row, check_finite
from bayesguard.errors import BadInput
from bayesguard.metrics.functional.inputs import answered, element_weights, paired, side_weights
from bayesguard.predictive.numerics import BUDGET, CACHED, slices


class RiskCoverage(NamedTuple):
    """The error rate among the rows kept, for every share of rows kept, float64 `[M]`."""

    coverage: Tensor
    risk: Tensor


def risk_coverage(confidence: object, errors: object, *, weights: object = None) -> RiskCoverage:
    """Return the risk-coverage curve: the k most confident rows are kept, k = 1..M; ties share their errors evenly.

    Args:
        confidence: `[M]`, larger is surer.
        errors: Loss of each row `[M]`: 0/1 for right and wrong, or any loss of at least 0.
        weights: How often each row counts, `[M]`; once if None. The curve then has a point for each row with weight,
            where all of that row is kept; of equally sure rows, the lightest is kept first.

    Raises:
        BadInput: No rows, shapes that differ, NaN or infinity (with the row), negative losses or weights.

    Examples:
        >>> risk_coverage([0.9, 0.8], [0.0, 1.0]).risk
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    sure, losses, mass = _weighted_losses(confidence, errors, weights)
    if weights is not None:
        # By weight first: where rows tie, the points must not depend on the order of the rows.
        order = mass.argsort(stable=True)[int((mass == 0).sum()) :]
        sure, losses, mass = sure[order], losses[order], mass[order]
    if isinstance(confidence, Tensor) and confidence.dtype == torch.float32:
        sure = sure.float()  # has the same order and ties in half the memory
    ordered, order = sure.sort(descending=True, stable=True)
    del sure  # of millions of rows, every copy counts
    losses = losses[order] if weights is None else (mass * losses)[order]
    kept = None if weights is None else _from_zero(mass[order].cumsum(-1))
    del mass, order
    totals = _from_zero(losses.cumsum(-1))
    del losses
    # A run of ties starts where a confidence is not the one before; what follows the last row starts one as well.
    starts = torch.ones(len(ordered) + 1, dtype=torch.bool, device=ordered.device)
    torch.ne(ordered[1:], ordered[:-1], out=starts[1:-1])
    del ordered
    if kept is None:
        kept = torch.arange(len(starts), dtype=torch.float64, device=starts.device)
    if bool(starts.all()):
        return RiskCoverage(kept[1:] / kept[-1], totals[1:] / kept[1:])
    bounds, before = starts.nonzero().squeeze(-1), 0
    risk = torch.empty_like(kept[1:])
    for rows in slices(len(risk), 8 * BUDGET // CACHED):
        run = starts[rows].cumsum(0) + (before - 1)
        before = int(run[-1]) + 1
        start, end, here = bounds[run], bounds[run + 1], kept[1:][rows]
        share = (here - kept[start]) / (kept[end] - kept[start])
        risk[rows] = (totals[start] + share * (totals[end] - totals[start])) / here
    return RiskCoverage(kept[1:].div_(kept[-1].item()), risk)


def area_under_risk_coverage(confidence: object, errors: object, *, weights: object = None) -> Tensor:
    """Return the mean risk over all coverages (AURC); lower is better.

    Ties are averaged: it is the mean over all orders of equally confident rows.

    Args:
        confidence: `[M]`, larger is surer.
        errors: Loss of each row `[M]`: 0/1 for right and wrong, or any loss of at least 0.
        weights: How often each row counts, `[M]`; once if None. They are counts: doubling all of them moves the area,
            as repeating all rows does.

    References:
        Y. Geifman, G. Uziel, R. El-Yaniv (2019). Bias-reduced uncertainty estimation for deep neural classifiers. ICLR.

    Examples:
        >>> area_under_risk_coverage([0.9, 0.8], [0.0, 1.0]).item()
        0.25
    """
    if weights is None:
        return risk_coverage(confidence, errors).risk.mean()
    sure, losses, mass = _weighted_losses(confidence, errors, weights)
    return weighted_aurc(sure, losses, mass.unsqueeze(0))[0]


def excess_area_under_risk_coverage(confidence: object, errors: object, *, weights: object = None) -> Tensor:
    """Return by how much the AURC is above that of the best order of the same losses (E-AURC); lower is better.

    The best order keeps the smallest losses first, so that 0 means that no other confidence would rank the rows better.
    It takes off most of what the AURC owes to the error rate alone. The best area is that of these M losses, not its
    limit `r + (1 - r) log(1 - r)` for many rows; that limit is what an error rate r leaves to the best ranking.

    Args:
        confidence: `[M]`, larger is surer; ties are averaged, as for `area_under_risk_coverage`.
        errors: Loss of each row `[M]`: 0/1 for right and wrong, or any loss of at least 0.
        weights: How often each row counts, `[M]`; once if None. They are counts: doubling all of them moves the area,
            as repeating all rows does.

    Returns:
        0-d float64 on the device of `confidence`, in the unit of the loss.

    Raises:
        BadInput: No rows, shapes that differ, NaN or infinity (with the row), negative losses or weights.

    References:
        Y. Geifman, G. Uziel, R. El-Yaniv (2019). Bias-reduced uncertainty estimation for deep neural classifiers. ICLR,
        section 3.

    Examples:
        >>> excess_area_under_risk_coverage([0.9, 0.8], [1.0, 0.0]).item()  # 0.75, where the best order has 0.25
        0.5
    """
    sure, losses, mass = _weighted_losses(confidence, errors, weights)
    return weighted_excess_aurc(sure, losses, mass.unsqueeze(0))[0]


def area_under_generalised_risk_coverage(confidence: object, errors: object, *, weights: object = None) -> Tensor:
    """Return the area under the generalised risk (AUGRC): the loss let through, over all coverages; lower is better.

    The generalised risk is the summed loss of the rows kept, divided by all M rows rather than by those kept: for right
    and wrong, the probability that an answer is kept and wrong. Its area from no coverage to all of it, with straight
    lines between the rows and through ties, is the mean over pairs of rows (a, b) of the loss of a where a is surer
    than b, half of it where they tie. So every error weighs by its rank alone; in the AURC the surest few weigh most.

    For 0/1 losses with error rate r and AUROC A of telling errors, it is `(1 - A) r (1 - r) + r^2 / 2`: from `r^2 / 2`
    for the best order, by `r / 2` for confidence that says nothing, to `r - r^2 / 2`.

    Args:
        confidence: `[M]`, larger is surer.
        errors: Loss of each row `[M]`: 0/1 for right and wrong, or any loss of at least 0.
        weights: How often each row counts, `[M]`; once if None.

    Returns:
        0-d float64 on the device of `confidence`, in the unit of the loss; at most 1/2 for 0/1 losses.

    Raises:
        BadInput: No rows, shapes that differ, NaN or infinity (with the row), negative losses or weights.

    References:
        J. Traub et al. (2024). Overcoming common flaws in the evaluation of selective classification systems. NeurIPS.

    Examples:
        >>> area_under_generalised_risk_coverage([0.9, 0.8], [0.0, 1.0]).item()
        0.125
    """
    sure, losses, mass = _weighted_losses(confidence, errors, weights)
    return weighted_augrc(sure, losses, mass.unsqueeze(0))[0]


def area_under_roc(scores: object, positives: object, *, weights: object = None) -> Tensor:
    """Return the probability that a positive has a larger score than a negative; ties count half.

    Args:
        scores: `[M]`.
        positives: 1 for positives, 0 for negatives, `[M]`.
        weights: How often each row counts, `[M]`; once if None.

    Raises:
        BadInput: Only positives or only negatives (among the rows with weight): there is nothing to rank.

    References:
        J. Hanley, B. McNeil (1982). The meaning and use of the area under a ROC curve. Radiology.

    Examples:
        >>> area_under_roc([0.1, 0.4, 0.4, 0.9], [0, 0, 1, 1]).item()
        0.875
    """
    values, labels = paired(scores, positives, "scores", "positives")
    bad = (labels != 0) & (labels != 1)
    if bad.any():
        raise BadInput(f"positives has {labels[bad][0].item():g} in row {bad_row(bad)}; allowed are 0 and 1")
    return _roc(values, labels, element_weights(weights, positives, len(values), values.device))


def _roc(values: Tensor, labels: Tensor, mass: Tensor | None) -> Tensor:
    kinds = labels if mass is None else labels[mass > 0]
    if kinds.min() == kinds.max():
        raise BadInput(f"positives are all {int(kinds[0])}; the area needs both kinds of rows")
    return weighted_roc(values, labels, (torch.ones_like(values) if mass is None else mass).unsqueeze(0))[0]


def error_auroc(probs: object, targets: object, *, weights: object = None) -> Tensor:
    """Return the probability that a wrong answer is less confident than a right one; ties count half.

    Args:
        probs: `[N, ..., K]`.
        targets: Class labels `[N, ...]`.
        weights: How often each row counts, `[N]`; once if None.

    Raises:
        BadInput: All answers are right, or all wrong: there is nothing to rank.

    References:
        D. Hendrycks, K. Gimpel (2017). A baseline for detecting misclassified and out-of-distribution examples. ICLR.

    Examples:
        >>> error_auroc([[0.9, 0.1], [0.6, 0.4]], [0, 1]).item()
        1.0
    """
    confidence, right = answered(probs, targets)
    return _roc(-confidence.double(), 1 - right, element_weights(weights, targets, len(right), right.device))


def ood_auroc(in_scores: object, out_scores: object, *, weights: Sequence[object] | None = None) -> Tensor:
    """Return how well scores tell out-of-distribution rows (larger) from in-distribution ones; ties count half.

    Args:
        in_scores: `[N]`, of in-distribution rows.
        out_scores: `[M]`, of the others.
        weights: How often each row counts: a pair `([N], [M])`, either of which may be None for once.

    Raises:
        BadInput: No rows on one side, NaN or infinity (with the row), weights without meaning.

    Examples:
        >>> ood_auroc([0.1, 0.2], [0.3, 0.2]).item()
        0.875
    """
    inside, outside = as_tensor(in_scores, "in_scores").flatten(), as_tensor(out_scores, "out_scores").flatten()
    check_finite(inside, "in_scores")
    check_finite(outside, "out_scores")
    if not (len(inside) and len(outside)):
        raise BadInput("in_scores and out_scores need at least one row each")
    parts = inside.double(), outside.double().to(inside.device)
    mass = torch.cat(side_weights(weights, (in_scores, out_scores), parts))
    scores = torch.cat(parts)
    is_out = torch.arange(len(scores), device=scores.device) >= len(inside)
    return _roc(scores, is_out.double(), mass)


def weighted_roc(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the area for each row of weights `[R, M]`; NaN where all the weight lies on one kind."""
    order = scores.argsort(stable=True)
    starts, ends = _ties(scores[order])
    weights = weights[:, order]
    positive, negative = weights * labels[order], weights * (1 - labels[order])
    below = _from_zero(negative.cumsum(-1))
    won = (positive * (below[:, starts] + below[:, ends + 1]) / 2).sum(-1)
    return won / (positive.sum(-1) * negative.sum(-1))


def weighted_aurc(confidence: Tensor, errors: Tensor, weights: Tensor) -> Tensor:
    """Return the area under risk-coverage for each row of counts `[R, M]`, as if every row stood there that often.

    A run of ties of mass g after mass m, with errors c before it and at rate r inside, adds the sum over j = 1..g of
    (c + r j) / (m + j) = r g + (c - r m) (H(m + g) - H(m)), where H are the harmonic numbers.
    """
    order = confidence.argsort(descending=True, stable=True)
    last = _ties(confidence[order])[1].unique_consecutive()
    weights = weights[:, order]
    mass = _from_zero(weights.cumsum(-1)[:, last])
    total = _from_zero((weights * errors[order]).cumsum(-1)[:, last])
    inside, lost = mass.diff(dim=-1), total.diff(dim=-1)
    rate = lost / inside.where(inside > 0, 1.0)
    harmonic = torch.digamma(mass + 1).diff(dim=-1)
    return (lost + (total[:, :-1] - rate * mass[:, :-1]) * harmonic).sum(-1) / mass[:, -1]


def weighted_augrc(confidence: Tensor, errors: Tensor, weights: Tensor) -> Tensor:
    """Return the area under the generalised risk for each row of weights `[R, M]`."""
    order = confidence.argsort(stable=True)
    starts, ends = _ties(confidence[order])
    weights = weights[:, order]
    below = _from_zero(weights.cumsum(-1))
    less_sure = (below[:, starts] + below[:, ends + 1]) / 2
    return (weights * errors[order] * less_sure).sum(-1) / below[:, -1].square()


def weighted_excess_aurc(confidence: Tensor, errors: Tensor, weights: Tensor) -> Tensor:
    """Return by how much `weighted_aurc` is above that of the best order, for each row of counts `[R, M]`."""
    excess = weighted_aurc(confidence, errors, weights) - weighted_aurc(-errors, errors, weights)
    return excess.clamp_min(0)  # no order is better than the best: what is below 0 is rounding


def _weighted_losses(confidence: object, errors: object, weights: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return confidence, losses and weights `[M]`, float64."""
    sure, losses = paired(confidence, errors, "confidence", "errors")
    if bool((losses < 0).any()):
        raise BadInput(
            f"errors is negative in row {bad_row(losses < 0)}; a loss is at least 0 (0/1 for right and wrong)"
        )
    mass = element_weights(weights, errors, len(losses), losses.device)
    # Ones that take no memory of their own.
    return sure, losses, losses.new_ones(()).expand(len(losses)) if mass is None else mass


def _ties(ordered: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each place in a sorted sequence where its run of equal values starts and ends."""
    group, sizes = ordered.unique_consecutive(return_inverse=True, return_counts=True)[1:]
    ends = sizes.cumsum(0).sub_(1)
    starts = ends.add(1).sub_(sizes)
    return starts[group], ends[group]


def _from_zero(sums: Tensor) -> Tensor:
    """Put a 0 before running sums over the last axis."""
    return torch.nn.functional.pad(sums, (1, 0))
