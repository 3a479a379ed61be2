"""What predictions for unlabelled data say about class shares, and whether they say that these have changed.

M. Saerens, P. Latinne, C. Decaestecker (2002). Adjusting the outputs of a classifier to new a priori probabilities.
Neural Computation 14. Z. C. Lipton, Y.-X. Wang, A. J. Smola (2018). Detecting and correcting for label shift with black
box predictors. ICML.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.errors import BadInput, CalibrationWarning

_MAX_STEPS = 10_000
_STEADY = 1e-10
# Confusion so near to singular that shares are guesses.
_MAX_CONDITION = 1e4
# Directions of predictions whose variance is rounding, relative to the largest.
_ROUNDING = 1e-10


class MeanTest(NamedTuple):
    """Whether two means of predictions are of one distribution.

    Attributes:
        ratio: Hotelling's statistic by its expectation, about 1 where nothing has changed.
        p_value: Probability of a larger one where nothing has changed.
    """

    ratio: float
    p_value: float


def most_likely_shares(probs: Tensor, reference: Tensor, centre: Tensor, strength: float) -> Tensor:
    """Return the shares of the largest posterior density, by expectation maximisation (Saerens et al., 2002, eq. 2.8).

    That is the maximum of `sum_i log sum_y probs[i, y] s[y] / reference[y] + strength sum_y centre[y] log s[y]`: the prior
    is a Dirichlet distribution whose mode is `centre`, and counts as `strength` rows more.

    Args:
        probs: Predictions `[N, K]`, float64.
        reference: Shares that they are made for `[K]`, positive.
        centre: Mode of the prior `[K]`, positive.
        strength: Of the prior, in rows; 0 for maximum likelihood.
    """
    ratio = torch.ones_like(reference)
    for _ in range(_MAX_STEPS):
        joint = probs * ratio
        counts = (joint / joint.sum(-1, keepdim=True)).sum(0)
        shares = (counts + strength * centre) / (len(probs) + strength)
        step = (shares / reference - ratio).abs().max()
        ratio = shares / reference
        if step < _STEADY:
            return shares
    warnings.warn(
        f"the shares still move after {_MAX_STEPS} steps of expectation maximisation; more unlabelled data are needed",
        CalibrationWarning,
        stacklevel=4,
    )
    return shares


def confused_shares(mean: Tensor, confusion: Tensor) -> Tensor:
    """Return shares that mix the columns of `confusion` to the mean prediction `[K]` (Lipton et al., 2018, eq. 3).

    Args:
        mean: Of the new predictions `[K]`.
        confusion: Mean held-out prediction for each true class `[K, K]`, columns for classes.

    Raises:
        BadInput: Columns that are nearly dependent.
    """
    from scipy.optimize import nnls

    condition = float(torch.linalg.cond(confusion))
    if not condition < _MAX_CONDITION:
        raise BadInput(
            f"the held-out confusion is nearly singular (condition {condition:.3g}): predictions do not tell all classes "
            'apart, and their shares cannot be found; use method="em", or a better predictor'
        )
    found = torch.as_tensor(nnls(confusion.cpu().numpy(), mean.cpu().numpy())[0]).to(mean)
    return found / found.sum()


def mean_test(probs: Tensor, mean: Tensor, scatter: Tensor, count: int) -> MeanTest | None:
    """Test whether predictions have the mean of others: Hotelling's T² of all classes but one, by the law of F.

    Rows that are independent and alike are all it takes: probabilities that are not calibrated are so in both.

    Args:
        probs: Predictions `[N, K]`, float64.
        mean: Of the others `[K]`.
        scatter: Sum of the outer products of the others' distances from `mean` `[K, K]`.
        count: How many they are; 0 where their mean is known.

    Returns:
        The test; None of too few rows, or of predictions that are all alike.
    """
    from scipy.special import fdtrc

    rows, others = len(probs), probs.shape[1] - 1
    free = rows - 1 + max(0, count - 1)
    if free < others:
        return None
    centred = probs[:, :-1] - probs[:, :-1].mean(0)
    values, vectors = torch.linalg.eigh((centred.T @ centred + scatter[:-1, :-1]) / free)
    kept = values > _ROUNDING * values[-1]
    size = int(kept.sum())
    if not size:
        return None
    beside = free - size + 1
    along = (probs.mean(0) - mean)[:-1] @ vectors[:, kept]
    distance = float((along.square() / values[kept]).sum())
    ratio = distance / (1 / rows + (1 / count if count else 0.0)) * beside / (free * size)
    return MeanTest(ratio, float(fdtrc(size, beside, ratio)))
