"""What a calibrator is worth on examples that it was not fitted to: the scores of every example, before and after."""

from __future__ import annotations

from copy import deepcopy
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bayesguard.calibration.base import Calibrator, check_weights
from bayesguard.checks import bad_row, check_count, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.parts import scores_of
from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.metrics.scores import Mean
from bayesguard.predictive import Predictive
from bayesguard.predictive.numerics import as_given
from bayesguard.sampling import stream

Score = Literal["log", "brier", "crps"]
_METRICS = {"log": "nll", "brier": "brier", "crps": "crps"}


class CrossFitted(NamedTuple):
    """Proper scores of the examples of positive weight, as they are and recalibrated by the fit to the other folds.

    Attributes:
        before, after: float64 `[n]`.
        weights: float64 `[n]`, None where all count alike.
    """

    before: Tensor
    after: Tensor
    weights: Tensor | None


def cross_fitted(
    calibrator: Calibrator,
    pred: Predictive,
    targets: object,
    score: Score,
    *,
    num_folds: int,
    seed: int,
    weights: object,
) -> CrossFitted:
    """Score predictions before and after calibration, each example by a copy of the calibrator that did not see it.

    Examples without weight are as if they were not there. The calibrator that is given stays as it is.

    Raises:
        BadInput: An unknown score, fewer examples than folds, targets or weights that do not fit, a calibrator that only
            adds sets or intervals, or a recalibrated log score that is infinite (with the row).
        BadType: No calibrator, no Predictive, predictions that have no such score, or weights for a calibrator that takes none.
    """
    if not isinstance(calibrator, Calibrator):
        raise BadType(f"calibrator must be a Calibrator, got {type(calibrator).__name__}; pass TemperatureScaling()")
    if calibrator.needs_own_data:
        raise BadInput(
            f"calibrator is a {type(calibrator).__name__}, which adds sets or intervals and leaves the score as it is; "
            "pass one that changes probabilities, as TemperatureScaling()"
        )
    if not isinstance(pred, Predictive):
        raise BadType(f"pred must be a Predictive, got {type(pred).__name__}; make one with Predictive.from_probs")
    truth = as_given(targets, "targets").to(pred.device)
    before = _scores(score, pred, truth)
    own = None if weights is None else check_weights(weights, len(pred)).to(pred.device)
    kept = torch.arange(len(pred), device=pred.device) if own is None else own.nonzero().squeeze(-1)
    folds = random_folds(len(kept), num_folds, seed, what="examples of any weight").to(pred.device)
    after = torch.empty_like(before)
    for fold in range(num_folds):
        seen, held = kept[folds != fold], kept[folds == fold]
        copy = deepcopy(calibrator)
        if own is None:
            copy.fit(pred[seen], truth[seen])
        else:
            copy.fit(pred[seen], truth[seen], weights=own[seen])
        after[held] = _scores(score, copy(pred[held]), truth[held])
    infinite = after[kept] == torch.inf
    if infinite.any():
        raise BadInput(
            f"targets has an answer in row {int(kept[bad_row(infinite)])} that had probability 0 after calibration: its "
            "log score is infinite, and so is that of all; pass score='brier', or a calibrator that gives every answer "
            "some probability"
        )
    return CrossFitted(before[kept], after[kept], None if own is None else own[kept])


def random_folds(count: int, num_folds: int, seed: int, *, what: str = "rows") -> Tensor:
    """Return the fold of each of `count` examples at random, all of one size up to one example."""
    if not 2 <= check_count(num_folds, "num_folds") <= count:
        raise BadInput(f"num_folds must be between 2 and the number of {what}, {count}, got {num_folds}")
    check_count(seed, "seed", minimum=0)
    return torch.randperm(count, generator=stream("cpu", seed, "folds"), device="cpu") % num_folds


def _scores(score: Score, pred: Predictive, targets: Tensor) -> Tensor:
    """Return the score of every example, float64 `[N]`; the elements of an example are averaged."""
    if score not in _METRICS:
        raise BadInput(f"score must be one of {', '.join(map(repr, _METRICS))}; got {score!r}")
    spec = EVALUATION_METRICS[_METRICS[score]]
    check_shape(targets, pred.batch_shape, "targets")
    kept = scores_of([spec], pred, targets)[0]
    assert isinstance(kept, Mean)
    return kept.values
