"""Calibration by one number: temperature scaling."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.calibration.base import Calibrator
from bayesguard.checks import check_labels
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.bernoulli import check_answers
from bayesguard.predictive.numerics import BUDGET, slices, wide

_BOUND = math.log(100.0)  # of |log T|: nobody's logits are off by more, and beyond it a search runs away
_GRID = 33
_CHI_SQUARE_95 = 3.841458820694124  # of one degree of freedom
_MOST_STEPS = 100


class Slope(NamedTuple):
    """The mean NLL and its first two derivatives in log T."""

    nll: float
    first: float
    second: float


Objective = Callable[[float], Slope]


class TemperatureScaling(Calibrator):
    """Divide the logits of every draw by one temperature, fitted to the likelihood of the pooled predictive.

    The temperature minimises the mean of `-log sum_s w_s softmax(logits_s / T)[y]`: it makes the mixture honest, not
    its draws one by one, and so leaves the decomposition of uncertainty meaningful. It is searched between 0.01 and
    100, on a grid and then by safeguarded Newton steps in log T, and never scores worse than T = 1 on the data it was
    fitted to.
    For classification, of one class among several or of yes and no (also multi-label).

    Where no temperature is best, a `CalibrationWarning` says so: if every target is the top class of every draw, the
    likelihood would make all answers sure, and T stays 1. If several draws are given and the 95 % likelihood-ratio
    interval of T reaches down to 0, where every draw is a vote, T is the end of that interval next to 1: votes are sure
    of every error under shift. At another end of the range, T is the bound.

    Attributes:
        temperature: T, a tensor without axes; above 1 if the predictions were over-confident.
        diagnostics: `nll_before` and `nll_after` (nats, mean), `at_bound`, `num_examples`, `num_excluded` (targets that
            had probability zero at every temperature), `standard_error` (of T, by the observed information).

    References:
        Guo, Pleiss, Sun, Weinberger, 2017, ICML, section 4.2; Rahaman and Thiery, 2021, NeurIPS (pooled predictives).

    Examples:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
        >>> pred = Predictive.from_logits(logits)
        >>> scaling = TemperatureScaling().fit(pred, torch.tensor([0, 0, 1, 1]))
        >>> round(float(scaling.temperature), 3)  # three of four right: 4 / log(3)
        3.641
        >>> scaling(pred).confidence
        tensor([0.7500, 0.7500, 0.7500, 0.7500])
    """

    acts_on = "draws"
    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float32, which every device has; the likelihood is flat to second order in the error of 1e-7.
        self.register_buffer("temperature", torch.ones((), dtype=torch.float32, device="cpu"))

    def _calibrate(self, pred: Predictive) -> Predictive:
        draws = _logits(pred)
        # A Python number keeps the dtype and the device of the logits.
        return pred._rebuild([_normalised(draws / float(self.temperature), pred)])

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        logits, labels = _two_classes_at_least(pred, targets)
        logits, labels, weights = logits.flatten(1, -2), labels.flatten(), pred.weights
        if (weights == 0).any():
            logits, weights = logits[weights > 0], weights[weights > 0]
        impossible = (logits.gather(-1, labels.expand(logits.shape[:-1]).unsqueeze(-1)) == -torch.inf).all(0)[:, 0]
        if impossible.any():
            _warn(
                f"{int(impossible.sum())} of {len(labels)} targets have probability zero in every draw: no temperature "
                "changes that, and they were left out of the fit; their NLL is infinite"
            )
            logits, labels = logits[:, ~impossible], labels[~impossible]
        if not len(labels):
            raise BadInput("every target has probability zero in every draw; are the targets those of the predictions?")

        @cache  # a pass over all logits is all that fitting costs
        def objective(log_temperature: float) -> Slope:
            return _slope(logits, labels, weights, log_temperature)

        found, at_bound = _search(objective, logits, labels, weights)
        self.temperature = self.temperature.new_tensor(math.exp(found))
        before, after = objective(0.0), objective(math.log(float(self.temperature)))
        if after.nll > before.nll:  # never worse than doing nothing, not even by a rounding
            self.temperature = self.temperature.new_tensor(1.0)
            after, at_bound = before, False
        information = len(labels) * after.second
        self.diagnostics = {
            "nll_before": before.nll,
            "nll_after": after.nll,
            "at_bound": at_bound,
            "num_examples": len(labels),
            "num_excluded": int(impossible.sum()),
            "standard_error": float(self.temperature) / math.sqrt(information) if information > 0 else math.inf,
        }

    def extra_repr(self) -> str:
        return f"temperature={float(self.temperature):.4g}" if self.fitted else "not fitted"


def _logits(pred: Predictive) -> Tensor:
    """The draws of a classification predictive, or an error that says how to have them."""
    if not isinstance(pred, (CategoricalPredictive, BernoulliPredictive)):
        raise BadType(
            f"TemperatureScaling is for classification, got a {type(pred).__name__}; "
            "predictions of numbers have no logits, their scale is what can be wrong"
        )
    if not pred.has_draws:
        raise BadInput(
            f"pred was reduced, its {pred.num_samples} draws are gone, and a temperature acts on every draw; "
            "predict with keep_draws=True"
        )
    return pred.draw_logits


def _normalised(draws: Tensor, pred: Predictive) -> Tensor:
    return draws.log_softmax(-1) if isinstance(pred, CategoricalPredictive) else draws


def _two_classes_at_least(pred: Predictive, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[S, N, ..., K]` and labels `[N, ...]` of either kind of classification."""
    draws = _logits(pred)
    if isinstance(pred, CategoricalPredictive):
        return draws, check_labels(targets, pred.batch_shape, pred.num_classes)
    both = torch.stack([F.logsigmoid(-draws), F.logsigmoid(draws)], dim=-1)
    return both, check_answers(targets, pred.batch_shape, "targets")


def _search(objective: Objective, logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[float, bool]:
    """Return log T of the smallest pooled NLL, and whether it lies at a bound; T = 1 for separable data."""
    if _separable(logits, labels):
        _warn(
            "every target is the top class of every draw, so the likelihood favours ever lower temperatures and none "
            "is best; T stays 1. More held-out examples, with mistakes among them, are needed"
        )
        return 0.0, True

    lower, upper = _basin(logits, labels, weights)
    best = _minimise(objective, lower, upper)
    # On the way to a bound the likelihood may become flat to the last digit, and the search stop before it is there.
    here = objective(best)
    if here.second < 1e-9 and objective(-_BOUND).nll <= here.nll + 1e-14:
        best = -_BOUND
    at_bound = min(best + _BOUND, _BOUND - best) < 1e-6
    most = objective(best).nll + _CHI_SQUARE_95 / (2 * len(labels))
    if logits.shape[0] > 1 and best < 0 and objective(-_BOUND).nll <= most:
        at_bound, best = True, _mildest(objective, best, most)
        _warn(
            f"the {len(labels)} targets cannot tell the best temperature from 0, where every draw is a vote; taken is "
            f"{math.exp(best):.4g}, the mildest that they cannot tell from the best. More held-out examples are needed"
        )
    elif at_bound:
        reason = (
            "either the predictions know nothing of the targets (are the two in the same order?), "
            "or the logits are too large by more than 100"
            if best > 0
            else "the logits are too small by more than 100 (are they logits?)"
        )
        _warn(f"the temperature stopped at the bound of its range, {math.exp(best):.4g}; {reason}")
    return best, at_bound


def _separable(logits: Tensor, labels: Tensor) -> bool:
    chosen = labels.expand(logits.shape[:-1]).unsqueeze(-1)
    others = logits.scatter(-1, chosen, -torch.inf).amax(-1)
    return bool((logits.gather(-1, chosen).squeeze(-1) > others).all())


def _basin(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[float, float]:
    """An interval of log T with the smallest NLL inside.

    With one draw the NLL is convex in 1/T: the whole range will do. With several it may have several minima, and a grid
    finds the deepest; evenly spaced rows are enough to tell them apart where there are very many.
    """
    if logits.shape[0] == 1:
        return -_BOUND, _BOUND
    most = max(1, BUDGET // (8 * logits[:, :1].numel()))
    step = -(-len(labels) // most)
    rows, their = logits[:, ::step], labels[::step]
    grid = [_BOUND * (2 * place / (_GRID - 1) - 1) for place in range(_GRID)]
    scores = [_slope(rows, their, weights, at).nll for at in grid]
    best = min(range(_GRID), key=scores.__getitem__)
    return grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]


def _minimise(objective: Objective, lower: float, upper: float) -> float:
    """Newton's method on the slope, kept inside a shrinking bracket, halving it where Newton would leave."""
    at = min(max(0.0, lower), upper) if lower < 0 < upper else (lower + upper) / 2
    for _ in range(_MOST_STEPS):
        here = objective(at)
        if here.first == 0:
            return at
        lower, upper = (lower, at) if here.first > 0 else (at, upper)
        step = at - here.first / here.second if here.second > 0 else math.nan
        following = step if lower < step < upper else (lower + upper) / 2
        if abs(following - at) < 1e-8 or upper - lower < 1e-8:
            return following
        at = following
    return at


def _mildest(objective: Objective, best: float, most: float) -> float:
    """Return the log T nearest to 0 whose NLL is `most` at most.

    Draws that sharpen to votes fit along a flat valley that goes on for ever, and are sure of every error under shift.
    """
    lower, upper = best, 0.0
    if objective(upper).nll <= most:
        return upper
    while upper - lower > 1e-6:
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if objective(middle).nll <= most else (lower, middle)
    return lower


def _slope(logits: Tensor, labels: Tensor, weights: Tensor, log_temperature: float) -> Slope:
    """The mean pooled NLL at T and its derivatives in log T; sums in float64, over slices of the examples."""
    inverse = math.exp(-log_temperature)
    sums = [0.0, 0.0, 0.0]
    for rows in slices(len(labels), 4 * logits[:, :1].numel()):
        parts = _terms(wide(logits[:, rows]), labels[rows], weights.log().unsqueeze(-1), inverse)
        sums = [total + float(part.sum()) for total, part in zip(sums, parts, strict=True)]
    nll, by_inverse, by_inverse_twice = (-total / len(labels) for total in sums)
    # T = 1 / b and u = log T: d/du = -b d/db.
    return Slope(nll, -inverse * by_inverse, inverse * inverse * by_inverse_twice + inverse * by_inverse)


def _terms(logits: Tensor, labels: Tensor, log_weights: Tensor, inverse: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the pooled probability of every label, and its derivatives in the inverse temperature."""
    # From the largest logit down; a masked class (-inf) has weight 0, and must not make 0 * inf.
    below = (logits - logits.amax(-1, keepdim=True)).clamp_min(-1e30)
    mass = (below * inverse).exp()
    total = mass.sum(-1)
    mean = torch.einsum("snk,snk->sn", mass, below) / total
    variance = torch.einsum("snk,snk->sn", mass.mul_(below), below) / total - mean.square()
    picked = below.gather(-1, labels.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    joint = picked * inverse - total.log() + log_weights
    pooled = joint.logsumexp(0)
    share = (joint - pooled).exp()
    slope = torch.where(share > 0, picked - mean, 0.0)
    first = (share * slope).sum(0)
    second = (share * (slope.square() - variance)).sum(0) - first.square()
    return pooled, first, second


def _warn(message: str) -> None:
    warnings.warn(message, CalibrationWarning, stacklevel=5)
