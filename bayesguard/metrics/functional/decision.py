"""Calibration where it is used: on the two sides of a threshold, and in the losses of the actions that are chosen."""

from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, check_finite, check_level
from bayesguard.errors import BadInput
from bayesguard.metrics.functional.decomposition import isotonic
from bayesguard.metrics.functional.inputs import answered, classified, element_weights, weighted_mean, yes_or_no
from bayesguard.predictive.numerics import in_slices

# Expected losses closer than this share of the largest loss are equal: rounding must not choose the action.
_EQUAL = 1e-12


class ThresholdCalibration(NamedTuple):
    """How far probabilities are from what came true, below a threshold and from it on; 0-d float64.

    Attributes:
        error: Mean absolute gap of the two sides, each weighed by its share: 0 if both are calibrated on average.
        gap_below: Mean probability less the share that came true, of the rows below; above 0 if they promise too much;
            NaN without rows.
        gap_above: The same of the rows at or above the threshold.
        share_above: Share of the rows at or above it.
    """

    error: Tensor
    gap_below: Tensor
    gap_above: Tensor
    share_above: Tensor


def calibration_error_at(
    probs: object, targets: object, threshold: float, *, weights: object = None
) -> ThresholdCalibration:
    """Return whether the confidence of the most probable class means what it says on both sides of a threshold.

    All that a decision "act if the confidence is at least t" depends on. It is the calibration error with two bins that
    meet at t, so few rows bias it far less than one of many bins.

    Args:
        probs: `[N, ..., K]`, rows that sum to 1. For P(y = 1) see `binary_calibration_error_at`.
        targets: Class labels `[N, ...]`.
        threshold: Strictly between 0 and 1; a confidence that equals it, in its own precision, is above.
        weights: How often each row counts, `[N]`; once if None.

    Returns:
        Tensors on the device of `probs`.

    Raises:
        BadInput: No rows, rows that are no distribution, labels out of range, a threshold outside 0..1.

    References:
        S. Zhao, M. Kim, R. Sahoo, T. Ma, S. Ermon (2021). Calibrating predictions to decisions: a novel approach to
        multi-class calibration. NeurIPS, section 3 (calibration given the action, here of two actions).

    Examples:
        >>> found = calibration_error_at([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]], [0, 1, 1], threshold=0.7)
        >>> [round(part.item(), 4) for part in found]
        [0.3667, -0.4, 0.35, 0.6667]
    """
    confidence, right = answered(probs, targets)
    return _sides(confidence, right, threshold, element_weights(weights, targets, len(right), right.device))


def binary_calibration_error_at(
    probs: object, targets: object, threshold: float, *, weights: object = None
) -> ThresholdCalibration:
    """Return whether P(y = 1) means what it says on both sides of a threshold; see `calibration_error_at`.

    Args:
        probs: Probability of yes, any shape.
        targets: 0/1 of exactly that shape.
        threshold: Strictly between 0 and 1; a probability that equals it is above.
        weights: How often each row counts, `[N]`; once if None.

    Examples:
        >>> found = binary_calibration_error_at([0.9, 0.8, 0.3], [1, 0, 0], threshold=0.5)
        >>> [round(part.item(), 4) for part in found]
        [0.3333, 0.3, 0.35, 0.6667]
    """
    scores, outcomes = yes_or_no(probs, targets)
    return _sides(scores, outcomes, threshold, element_weights(weights, targets, len(scores), scores.device))


def _sides(scores: Tensor, outcomes: Tensor, threshold: float, weights: Tensor | None) -> ThresholdCalibration:
    check_level(threshold, "threshold")
    mass = torch.ones_like(outcomes) if weights is None else weights
    shares, gaps = side_sums(scores, outcomes, threshold, mass / mass.sum())
    below, over = gaps / shares
    return ThresholdCalibration(gaps.abs().sum(), below, over, shares[1])


def side_sums(scores: Tensor, outcomes: Tensor, threshold: float, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mass below a threshold and from it on `[2]`, and the sums of mass times `score - outcome` there `[2]`."""
    above = scores >= torch.tensor(threshold, dtype=scores.dtype, device=scores.device)
    sides = torch.stack([~above, above]).double()
    return sides @ mass, sides @ (mass * (scores.double() - outcomes))


class DecisionRegret(NamedTuple):
    """Mean losses of decisions; 0-d float64, in the unit of the losses.

    Attributes:
        promised: What the probabilities say that the actions chosen by them will cost.
        realised: What these actions did cost.
        recalibrated: What the actions would have cost that recalibrated probabilities choose.
        best_fixed: What the one action would have cost that is best for all rows.
    """

    promised: Tensor
    realised: Tensor
    recalibrated: Tensor
    best_fixed: Tensor

    @property
    def gap(self) -> Tensor:
        """Realised less promised: above 0 if decisions cost more than the probabilities said."""
        return self.realised - self.promised

    @property
    def regret(self) -> Tensor:
        """Realised less recalibrated: what miscalibration costs whoever has these losses; not negative."""
        return self.realised - self.recalibrated

    @property
    def fixed_regret(self) -> Tensor:
        """Realised less best fixed: above 0 if the probabilities are worse than none at all for these losses."""
        return self.realised - self.best_fixed


def decision_regret(probs: object, targets: object, losses: object, *, weights: object = None) -> DecisionRegret:
    """Return what it costs to act on the probabilities as if they were right.

    In every row the action of the smallest expected loss is chosen, the first of equals. Recalibrated probabilities are
    fitted to the same rows: of two classes the isotonic regression of the outcomes, whose actions cost least among all
    that do not fall in P(class 1); of more, the class frequencies of the rows for which one action was chosen, so that
    each action is replaced by the best one for its rows. Fitting to the same rows makes the regret of few rows too large.

    Args:
        probs: `[N, ..., K]`, rows that sum to 1; for P(y = 1) stack `[1 - p, p]`.
        targets: Class labels `[N, ...]`.
        losses: What each action costs if each class is true, `[A, K]`; negative for a gain.
        weights: How often each row counts, `[N]`; once if None.

    Returns:
        Tensors on the device of `probs`.

    Raises:
        BadInput: No rows, rows that are no distribution, labels out of range, losses of another number of classes, NaN
            or infinity in them (with the row).

    References:
        S. Zhao, M. Kim, R. Sahoo, T. Ma, S. Ermon (2021). Calibrating predictions to decisions: a novel approach to
        multi-class calibration. NeurIPS (the gap, definition 2).
        B. Kleinberg, R. Paes Leme, J. Schneider, Y. Teng (2023). U-calibration: forecasting for an unknown agent. COLT
        (the regret against one action; U-calibration is its largest over all losses).
        T. Dimitriadis, T. Gneiting, A. Jordan (2021). Stable reliability diagrams for probabilistic classifiers. PNAS
        (isotonic regression is the best monotone forecast under every proper score, as a decision's loss is one).

    Examples:
        >>> probs = [[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]
        >>> costs = decision_regret(probs, [1, 0, 1], losses=[[0.0, 1.0], [1.0, 0.0]])
        >>> [round(part.item(), 4) for part in costs], round(costs.regret.item(), 4)
        ([0.3, 0.3333, 0.0, 0.3333], 0.3333)
    """
    values, labels = classified(probs, targets)
    table = as_tensor(losses, "losses").to(values.device)
    if table.dim() != 2 or table.shape[1] != values.shape[1] or not len(table):
        raise BadInput(
            f"losses has shape {tuple(table.shape)}; [A, {values.shape[1]}] is needed, a row for each action and a "
            "column for each class"
        )
    check_finite(table, "losses")
    table = table.double()
    mass = element_weights(weights, targets, len(labels), labels.device)
    if mass is not None:
        kept = mass > 0
        values, labels, mass = values[kept], labels[kept], mass[kept]
    chosen = _actions(values, table)
    outcomes = table.t()[labels]  # [M, A]: what each action would have cost
    promised = in_slices(
        lambda part: (values[part].double() * table[chosen[part]]).sum(-1), len(values), values.shape[1]
    )

    def mean(cost: Tensor) -> Tensor:
        return weighted_mean(cost, mass)

    def cost_of(actions: Tensor) -> Tensor:
        return mean(outcomes.gather(-1, actions.unsqueeze(-1)).squeeze(-1))

    if values.shape[1] == 2:
        rate = isotonic(values[:, 1], labels.double(), mass)
        better = _actions(torch.stack([1 - rate, rate], -1), table)
    else:
        better = _replacements(chosen, outcomes, mass)[chosen]
    fixed = torch.stack([mean(column) for column in outcomes.unbind(-1)]).amin()
    return DecisionRegret(mean(promised), cost_of(chosen), cost_of(better), fixed)


def _actions(probs: Tensor, losses: Tensor) -> Tensor:
    """Return for each row the first action of the smallest expected loss."""
    slack = _EQUAL * losses.abs().amax()

    def first(part: slice) -> Tensor:
        expected = probs[part].double() @ losses.t()
        return (expected <= expected.amin(-1, keepdim=True) + slack).int().argmax(-1)

    return in_slices(first, len(probs), probs.shape[1] + 2 * len(losses))


def _replacements(chosen: Tensor, outcomes: Tensor, mass: Tensor | None) -> Tensor:
    """Return for each action that was chosen the one that would have cost its rows least."""
    actions = outcomes.shape[1]
    weighted = outcomes if mass is None else mass.unsqueeze(-1) * outcomes
    was = torch.nn.functional.one_hot(chosen, actions).double()
    return (was.t() @ weighted).argmin(-1)
