"""Out-of-distribution detection at thresholds: precision against recall, and false alarms at a given recall.

Scores are larger out of distribution, as for `ood_auroc`. Which side counts as positive changes both numbers, and the
literature has both; so `positive` must be said.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, check_finite, check_level
from bayesguard.errors import BadInput
from bayesguard.metrics.functional.inputs import side_weights

Positive = Literal["out", "in"]

# What summing weights may take off a share.
_ROUNDING = 1e-12


def area_under_precision_recall(
    in_scores: object, out_scores: object, *, positive: Positive, weights: Sequence[object] | None = None
) -> Tensor:
    """Return the average precision (AUPR-Out or AUPR-In), 0 to 1; higher is better.

    The sum over thresholds of precision times what recall gains there. Nothing is interpolated between thresholds,
    which would flatter, and rows of equal score pass a threshold together. Scores that say nothing get the share of
    positives among the rows, not 1/2: compare it only at equal shares, which `weights` can set.

    Args:
        in_scores: `[N]`, of in-distribution rows.
        out_scores: `[M]`, of the others; larger is further out.
        positive: "out" (AUPR-Out): rows of the largest scores are retrieved, and should be out of distribution. "in"
            (AUPR-In): those of the smallest, and they should be in distribution.
        weights: How often each row counts: a pair `([N], [M])`, either of which may be None for once.

    Returns:
        0-d float64 on the device of `in_scores`.

    Raises:
        BadInput: No rows on one side, NaN or infinity (with the row), another `positive`, weights without meaning.

    References:
        D. Hendrycks, K. Gimpel (2017). A baseline for detecting misclassified and out-of-distribution examples. ICLR
        (both sides).
        J. Davis, M. Goadrich (2006). The relationship between precision-recall and ROC curves. ICML (on interpolation).

    Examples:
        >>> area_under_precision_recall([0.1, 0.2, 0.4], [0.3], positive="out").item()
        0.5
        >>> round(area_under_precision_recall([0.1, 0.2, 0.4], [0.3], positive="in").item(), 4)
        0.9167
    """
    found, alarms = _above_thresholds(in_scores, out_scores, positive, weights)
    gained = torch.nn.functional.pad(found, (1, 0)).diff()
    # Where nothing is gained there may be nothing above the threshold either: no weight, no precision.
    precision = found / (found + alarms).where(gained > 0, 1.0)
    return (gained * precision).sum() / found[-1]


def false_positive_rate_at(
    in_scores: object,
    out_scores: object,
    true_positive_rate: float = 0.95,
    *,
    positive: Positive,
    weights: Sequence[object] | None = None,
) -> Tensor:
    """Return the share of negatives beyond the strictest threshold that finds enough positives (FPR95).

    Lower is better. The threshold is a score that occurs; rows that equal it are beyond it, and nothing is interpolated. Scores that say
    nothing have a rate of about `true_positive_rate`, and of 1 if all are equal.

    Args:
        in_scores: `[N]`, of in-distribution rows.
        out_scores: `[M]`, of the others; larger is further out.
        true_positive_rate: The share of positives to find at least, strictly between 0 and 1.
        positive: "in": a threshold that accepts 95 % of the in-distribution rows, and the share of the others that it
            accepts with them (Liang, Li, Srikant 2018). "out": a threshold that detects 95 % of the others, and the
            share of in-distribution rows that it flags with them (Hendrycks, Mazeika, Dietterich 2019).
        weights: How often each row counts: a pair `([N], [M])`, either of which may be None for once.

    Returns:
        0-d float64 on the device of `in_scores`.

    Raises:
        BadInput: No rows on one side, NaN or infinity (with the row), another `positive`, a rate outside 0..1, weights
            without meaning.

    References:
        S. Liang, Y. Li, R. Srikant (2018). Enhancing the reliability of out-of-distribution image detection in neural
        networks. ICLR.
        D. Hendrycks, M. Mazeika, T. Dietterich (2019). Deep anomaly detection with outlier exposure. ICLR.

    Examples:
        >>> false_positive_rate_at([0.1, 0.2, 0.3, 0.4], [0.35, 0.5], positive="in").item()  # accepts up to 0.4
        0.5
        >>> false_positive_rate_at([0.1, 0.2, 0.3, 0.4], [0.35, 0.5], positive="out").item()  # flags from 0.35
        0.25
    """
    check_level(true_positive_rate, "true_positive_rate")
    found, alarms = _above_thresholds(in_scores, out_scores, positive, weights)
    place = torch.searchsorted(found / found[-1], true_positive_rate - _ROUNDING)
    return alarms[place] / alarms[-1]


def check_positive(positive: Positive) -> Positive:
    """Return the side that is to be found, or raise BadInput."""
    if positive not in ("out", "in"):
        raise BadInput(f"positive must be 'out' or 'in', the side that is to be found, got {positive!r}")
    return positive


def _above_thresholds(
    in_scores: object, out_scores: object, positive: Positive, weights: Sequence[object] | None
) -> tuple[Tensor, Tensor]:
    """Return the weight of positives and of negatives at or beyond each score that occurs, the strictest first."""
    check_positive(positive)
    inside = _finite(in_scores, "in_scores")
    outside = _finite(out_scores, "out_scores").to(inside.device)
    mass = torch.cat(side_weights(weights, (in_scores, out_scores), (inside, outside)))
    scores = torch.cat([inside, outside])
    is_out = torch.arange(len(scores), device=scores.device) >= len(inside)
    order = scores.argsort(descending=positive == "out", stable=True)
    ordered, wanted = scores[order], (is_out if positive == "out" else ~is_out)[order]
    last = torch.nn.functional.pad(ordered[1:] != ordered[:-1], (0, 1), value=True)
    found, alarms = ((mass[order] * kind).cumsum(-1)[last] for kind in (wanted, ~wanted))
    return found, alarms


def _finite(scores: object, name: str) -> Tensor:
    values = as_tensor(scores, name)
    check_finite(values, name)
    if values.dim() == 0 or values.numel() == 0:
        raise BadInput(f"{name} has shape {tuple(values.shape)}; at least one row is needed on each side")
    return values.detach().double().flatten()
