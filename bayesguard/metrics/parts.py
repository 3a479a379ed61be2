"""Many class predictions, evaluated in parts whose float64 copies are small."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.metrics.registry import MetricSpec, Scores
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.numerics import BUDGET, CACHED, slices


def in_parts(
    compute: Callable[[Predictive, Tensor], Sequence[Tensor]], predictive: Predictive, targets: Tensor
) -> Sequence[Tensor]:
    """Return `compute(predictive, targets)`, tensors with the examples first, computed for some examples at a time.

    Few examples, and predictions of numbers, are computed at once.
    """
    count = len(predictive)
    if not isinstance(predictive, CategoricalPredictive | BernoulliPredictive):
        return compute(predictive, targets)
    whole: list[Tensor] = []
    for rows in slices(count, 4 * predictive.num_classes * predictive.batch_shape[1:].numel() * BUDGET // CACHED):
        if rows.stop - rows.start == count:  # what the predictive then computes it keeps for the next
            return compute(predictive, targets)
        found = compute(predictive[rows], targets[rows])
        if not whole:
            # Filled as they come: parts that wait for a concatenation keep the memory between them from being used again.
            whole = [part.new_empty((len(part) * count // rows.stop, *part.shape[1:])) for part in found]
        for tensor, part in zip(whole, found, strict=True):
            each = len(tensor) // count
            tensor[rows.start * each : rows.stop * each] = part
    return whole


def scores_of(specs: Sequence[MetricSpec], predictive: Predictive, targets: Tensor) -> list[Scores]:
    """Return what each metric needs of the examples: `spec.scores(predictive, targets)`, bit for bit."""
    latest: list[Scores] = []

    def tensors(part: Predictive, answers: Tensor) -> list[Tensor]:
        # Most ask for nothing but the probabilities, which are then computed once.
        probs = part.probs if isinstance(part, CategoricalPredictive) else part
        latest[:] = [spec.scores(probs if spec.from_probs else part, answers) for spec in specs]
        return [getattr(scores, name) for scores in latest for name in _tensor_names(scores)]

    try:
        whole = iter(in_parts(tensors, predictive, targets))
    except BadInput:
        for spec in specs:  # once more at once: the error then names the row by its place in the whole
            spec.scores(predictive, targets)
        raise
    return [_replaced(scores, {name: next(whole) for name in _tensor_names(scores)}) for scores in latest]


def _tensor_names(scores: Any) -> list[str]:
    return [field.name for field in fields(scores) if isinstance(getattr(scores, field.name), Tensor)]


def _replaced(scores: Any, tensors: dict[str, Tensor]) -> Scores:
    changed: Scores = replace(scores, **tensors)
    return changed
