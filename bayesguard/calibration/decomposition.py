"""Proper scores taken apart for any number of classes, by refitting a calibrator.

E. Berta, D. Holzmüller, M. I. Jordan, F. Bach (2025). Rethinking early stopping: refine, then calibrate. arXiv 2501.19195.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bayesguard.calibration.base import Calibrator, class_columns
from bayesguard.calibration.cross_fit import cross_fitted
from bayesguard.calibration.scaling import TemperatureScaling
from bayesguard.errors import BadInput
from bayesguard.metrics.functional.decomposition import ScoreDecomposition
from bayesguard.metrics.functional.inputs import group_sums, weighted_mean
from bayesguard.predictive import Predictive
from bayesguard.predictive.numerics import as_given


def score_decomposition(
    pred: object,
    targets: object,
    *,
    calibrator: Calibrator | None = None,
    score: Literal["log", "brier"] = "log",
    num_folds: int = 5,
    seed: int = 0,
    weights: object = None,
) -> ScoreDecomposition:
    """Return the parts of the log or the Brier score of K classes, recalibrated by `calibrator` under cross-fitting.

    The score is miscalibration - discrimination + uncertainty. Every example is recalibrated by a copy of the calibrator
    that was fitted to the other folds. The score left after that is the refinement error, an upper estimate of what no
    recalibration takes away: one that only a richer calibrator could mend counts as refinement.

    - Miscalibration is the score less the refinement error. For a calibrated model it is about -p / (2 N) nats with the p
      numbers that a calibrator fits: negative, as the fit costs more than it gains. Fitted to the examples that it is
      judged on, a calibrator finds as much miscalibration where there is none.
    - Uncertainty is the score of the class frequencies of these examples, as for the CORP parts: the entropy, or
      1 - the sum of squares. It is not cross-fitted, and so finite where a class was seen once, and low by about
      (K - 1) / (2 N) nats. Discrimination is uncertainty less refinement error, and negative for a model that knows less
      than the frequencies.

    Draws of an ensemble are recalibrated as the calibrator does it: temperature scaling acts on each, and is fitted to the
    mixture.

    Args:
        pred: A Predictive of one class, or of yes or no, an example; or class probabilities `[N, K]`, or P(y = 1) `[N]`.
        targets: Labels `[N]`. Rows must be independent: near copies in other folds hide what fitting costs.
        calibrator: Is not changed; `TemperatureScaling()` if None.
        score: "log" in nats, or "brier", summed over classes (for yes or no, over both), 0 to 2.
        num_folds: Parts of the examples, drawn at random.
        seed: Of the folds.
        weights: How often each row counts, `[N]`, for calibrators that take weights; all copies of a row are in one fold.

    Raises:
        BadInput: An unknown score, fewer examples than folds, targets or weights that do not fit, a conformal calibrator, or
            a target that had probability 0 even after calibration under the log score. Before calibration it may: the score and
            miscalibration are then infinite.
        BadType: Several targets an example, numbers instead of classes, weights for a calibrator that takes none.

    Examples:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]]).repeat(50, 1)
        >>> pred = Predictive.from_logits(logits)  # three of four are right, with confidence 0.98
        >>> parts = score_decomposition(pred, torch.tensor([0, 0, 1, 1]).repeat(50))
        >>> [round(part.item(), 2) for part in parts], round(parts.score.item(), 2)
        ([0.45, 0.13, 0.69], 1.02)
    """
    if score not in ("log", "brier"):
        raise BadInput(f"score must be 'log' or 'brier', got {score!r}")
    given = pred if isinstance(pred, Predictive) else Predictive.from_probs(pred)
    own = TemperatureScaling() if calibrator is None else calibrator
    num_classes = class_columns(given, own).shape[-1]
    fitted = cross_fitted(own, given, targets, score, num_folds=num_folds, seed=seed, weights=weights)
    found, refined = (weighted_mean(values, fitted.weights) for values in (fitted.before, fitted.after))
    labels = as_given(targets, "targets").to(refined.device).long()
    uncertainty = _base_score(_shares(labels, num_classes, weights), score)
    return ScoreDecomposition(found - refined, uncertainty - refined, uncertainty)


def _shares(labels: Tensor, num_classes: int, weights: object) -> Tensor:
    mass = torch.ones_like(labels) if weights is None else as_given(weights, "weights").to(labels.device)
    counts = group_sums(labels, mass.double(), num_classes)
    return counts / counts.sum()


def _base_score(shares: Tensor, score: str) -> Tensor:
    """Return the score of class frequencies on the labels that they are of."""
    return -torch.xlogy(shares, shares).sum() if score == "log" else 1 - shares.square().sum()
