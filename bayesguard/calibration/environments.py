"""Data of one environment, undisturbed or perturbed: the signs of a shift in predictions for it, and how temperatures fit it."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.calibration.likelihood import PooledLikelihood, minimise
from bayesguard.errors import BadType, CalibrationWarning
from bayesguard.metrics.bootstrap import bootstrap_weights
from bayesguard.metrics.functional.calibration import expected_calibration_error
from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.predictive import CategoricalPredictive, Predictive
from bayesguard.predictive.numerics import wide

LOG_BOUND = math.log(20.0)
NUM_SIGNS = 3
NUM_STATISTICS = 2 * NUM_SIGNS + 1
_RESAMPLES = 200


class Group(NamedTuple):
    """One environment: pooled log-probabilities `[n, K]`, labels `[n]`, signs `[n, 3]`."""

    log_probs: Tensor
    labels: Tensor
    signs: Tensor


def pooled_log_probs(pred: Predictive) -> Tensor:
    if not isinstance(pred, CategoricalPredictive) or len(pred.batch_shape) != 1:
        raise BadType(
            f"ShiftAwareScaling is for one class of several an example, got a {type(pred).__name__} of batch shape "
            f"{tuple(pred.batch_shape)}"
        )
    return wide(pred.logits).log_softmax(-1)


def signs_of(pred: Predictive, log_probs: Tensor) -> Tensor:
    """What tells of a shift: entropy (of 1 at most), square root of the mutual information, and the margin."""
    total, _, epistemic = pred.uncertainty()
    first, second = log_probs.topk(2, dim=-1).values.unbind(-1)
    margin = (first - second).clamp_max(20.0) / 20
    return torch.stack([wide(total) / math.log(log_probs.shape[1]), wide(epistemic).sqrt(), margin.sqrt()], dim=-1)


def statistics_of(signs: Tensor, log_probs: Tensor) -> Tensor:
    """What tells of a set: mean and spread of the signs, and how evenly its answers use the classes `[7]`."""
    shares = log_probs.exp().mean(0)
    evenness = -torch.special.xlogy(shares, shares).sum() / math.log(len(shares))
    return torch.cat([signs.mean(0), signs.std(0), evenness.reshape(1)])


def row_weights(found: Sequence[Group], share: float) -> Tensor:
    """Weights of all rows, of sum 1: undisturbed ones together `share` times as much as all perturbed ones together."""
    parts = [share] + [1 / (len(found) - 1)] * (len(found) - 1)
    each = [g.log_probs.new_full((len(g.labels),), part / len(g.labels)) for g, part in zip(found, parts, strict=True)]
    return torch.cat(each) / (1 + share)


def checked_accuracies(found: Sequence[Group]) -> dict[str, float]:
    """Accuracy on undisturbed and on the worst perturbed data, with a warning where the latter is far above chance."""
    clean, *perturbed = (float((group.log_probs.argmax(-1) == group.labels).double().mean()) for group in found)
    chance = float(found[0].labels.bincount().max()) / len(found[0].labels)
    if min(perturbed) > (clean + chance) / 2:
        warnings.warn(
            f"the strongest perturbation leaves an accuracy of {min(perturbed):.3f}, of {clean:.3f} undisturbed and {chance:.3f} "
            "by chance: what ShiftAwareScaling learns from is too mild, and it may sharpen answers under stronger shifts; add "
            'perturbations that take the content away, for images shifts=("images", "content")',
            CalibrationWarning,
            stacklevel=5,
        )
    return {"clean_accuracy": clean, "lowest_accuracy": min(perturbed)}


def best_temperature(group: Group) -> float:
    """The single temperature of the smallest NLL."""
    one_draw = PooledLikelihood(group.log_probs.unsqueeze(0), group.labels, group.log_probs.new_ones(1))
    return 1 / minimise(one_draw, math.exp(-LOG_BOUND), math.exp(LOG_BOUND))


def _scaled(group: Group, temperatures: Tensor) -> Tensor:
    return (group.log_probs / temperatures.unsqueeze(-1)).softmax(-1)


def error_at(group: Group, temperatures: Tensor) -> float:
    return float(expected_calibration_error(_scaled(group, temperatures), group.labels))


def mean_error(groups: Sequence[Group], temperatures: Callable[[Group], Tensor]) -> float:
    return sum(error_at(group, temperatures(group)) for group in groups) / len(groups)


def error_and_bound(group: Group, temperatures: Tensor, seed: int) -> tuple[float, float]:
    """Calibration error, and the 97.5 % quantile of it over resampled examples."""
    scores = EVALUATION_METRICS["ece"].scores(_scaled(group, temperatures), group.labels)
    resampled = torch.cat([scores.resample(part) for part in bootstrap_weights(len(group.labels), _RESAMPLES, seed)])
    return scores.value(), float(resampled.quantile(0.975))
