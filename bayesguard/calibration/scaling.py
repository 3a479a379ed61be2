"""Calibration by one number: temperature scaling."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.calibration.base import Calibrator
from bayesguard.calibration.likelihood import PooledLikelihood, minimise, picked
from bayesguard.calibration.profile import profile_end
from bayesguard.checks import check_labels
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.looks import number
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.bernoulli import check_answers
from bayesguard.predictive.numerics import BUDGET

_BOUND = 100.0  # of T and 1/T: nobody's logits are off by more, and beyond it a search runs away
_FEWEST_ROWS = 2000
_GRID = 33


class Searched(NamedTuple):
    """Where a search for 1/T ended: what to take, where the NLL is smallest, and what its user has to be told."""

    inverse: float
    best: float
    at_bound: bool = False
    warning: str | None = None


class TemperatureScaling(Calibrator):
    """Divide the logits of every draw by one temperature, fitted to the likelihood of the pooled predictive.

    The temperature minimises the mean of `-log sum_s w_s softmax(logits_s / T)[y]`: it makes the mixture honest, not
    its draws one by one, and so leaves the decomposition of uncertainty meaningful. It is searched between 0.01 and
    100, for several draws on a grid first, by safeguarded Newton steps in 1/T, and never scores worse than T = 1 on the
    data it was fitted to. Many rows are read about twice: a sample of them tells where to begin.
    For classification, of one class among several or of yes and no (also multi-label). With `weights` from
    `density_ratio` it is the temperature of the inputs that predictions are wanted for (Sugiyama et al., 2007, JMLR 8).

    Where no temperature is best, a `CalibrationWarning` says so: if every target is the top class of every draw, the
    likelihood would make all answers sure, and T stays 1. If several draws are given and the 95 % likelihood-ratio
    interval of T reaches down to 0, where every draw is a vote, T is the end of that interval next to 1: votes are sure
    of every error under shift. At another end of the range, T is the bound.

    Attributes:
        temperature: T, a tensor without axes; above 1 if the predictions were over-confident.
        diagnostics: `nll_before` and `nll_after` (nats, mean), `at_bound`, `num_examples`, `num_excluded` (targets that
            had probability zero at every temperature), `standard_error` (of T, by the observed information) and
            `profile_interval` (lower and upper end of the 95 % likelihood-ratio interval of T, within which
            `2 N (NLL(T) - min NLL) <= 3.84`; an end is 0 or inf where the data do not bound it between 0.01 and 100).
            For weighted examples N is their effective number, which is exact where weights and errors are independent.

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
        return pred._rebuild([_normalised(draws / number(self.temperature, draws), pred)])

    def _fit(self, pred: Predictive, targets: Tensor, counts: Tensor | None = None) -> None:
        logits, labels = _two_classes_at_least(pred, targets)
        if counts is not None:
            # An example of weight 0 is as if it was not there.
            some = counts > 0
            logits, labels, counts = logits[:, some], labels[some], counts[some]
            counts = counts.repeat_interleave(labels[0].numel())
        logits, labels, weights = logits.flatten(1, -2), labels.flatten(), pred.weights
        if (weights == 0).any():
            logits, weights = logits[weights > 0], weights[weights > 0]
        impossible = (picked(logits, labels) == -torch.inf).all(0)
        if impossible.any():
            _warn(
                f"{int(impossible.sum())} of {len(labels)} targets have probability zero in every draw: no temperature "
                "changes that, and they were left out of the fit; their NLL is infinite"
            )
            logits, labels = logits[:, ~impossible], labels[~impossible]
            counts = None if counts is None else counts[~impossible]
        if not len(labels):
            raise BadInput("every target has probability zero in every draw; are the targets those of the predictions?")

        likelihood = PooledLikelihood(logits, labels, weights, counts)
        found = search_inverse(likelihood)
        if found.warning:
            _warn(found.warning)
        at_bound = found.at_bound
        self.temperature = self.temperature.new_tensor(1 / found.inverse)
        inverse = 1 / float(self.temperature)
        before, after = likelihood.at_one(), likelihood.near(inverse)
        if abs(before - after.nll) < 1e-6:  # too little for sums in float32 to tell which is the smaller
            before, after = likelihood.exactly(1.0).nll, likelihood.exactly(inverse)
        if after.nll > before:  # never worse than doing nothing, not even by a rounding
            self.temperature = self.temperature.new_tensor(1.0)
            inverse, at_bound, after = 1.0, False, likelihood.exactly(1.0)
            before = after.nll
        lower, upper = (profile_end(likelihood, found.best, bound) for bound in (1 / _BOUND, _BOUND))
        # The second derivative in log T.
        information = likelihood.worth * (inverse * inverse * after.second + inverse * after.first)
        self.diagnostics = {
            "nll_before": before,
            "nll_after": after.nll,
            "at_bound": at_bound,
            "num_examples": len(labels),
            "num_excluded": int(impossible.sum()),
            "standard_error": float(self.temperature) / math.sqrt(information) if information > 0 else math.inf,
            "profile_interval": (1 / upper, 1 / lower if lower else math.inf),
        }

    _fit_weighted = _fit

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


def search_inverse(likelihood: PooledLikelihood) -> Searched:
    """Return 1/T of the smallest pooled NLL, or what is taken instead where none is best."""
    if likelihood.separable():
        return Searched(
            1.0,
            _BOUND,
            True,
            "every target is the top class of every draw, so the likelihood favours ever lower temperatures and none "
            "is best; T stays 1. More held-out examples, with mistakes among them, are needed",
        )

    best = minimise(likelihood, *_basin(likelihood, _FEWEST_ROWS))
    if likelihood.num_draws > 1 and likelihood.near(best).nll > likelihood.at_one():
        # The sample was misleading: its basin is not that of all rows.
        best = minimise(likelihood, *_basin(likelihood, likelihood.num_examples))
    # On the way to a bound the likelihood may become flat to the last digit, and the search stop before it is there.
    here = likelihood.near(best)
    if best * best * here.second + best * here.first < 1e-9 and likelihood(_BOUND).nll <= here.nll + 1e-14:
        best = _BOUND
    # Draws that sharpen to votes fit along a flat valley that goes on for ever, and are sure of every error under shift.
    if likelihood.num_draws > 1 and best > 1 and profile_end(likelihood, best, _BOUND) == math.inf:
        mildest = max(profile_end(likelihood, best, 1 / _BOUND), 1.0)
        return Searched(
            mildest,
            best,
            True,
            f"the {likelihood.num_examples} targets cannot tell the best temperature from 0, where every draw is a "
            f"vote; taken is {1 / mildest:.4g}, the mildest that they cannot tell from the best. More held-out examples "
            "are needed",
        )
    if min(best * _BOUND, _BOUND / best) >= 1 + 1e-6:
        return Searched(best, best)
    reason = (
        "either the predictions know nothing of the targets (are the two in the same order?), "
        "or the logits are too large by more than 100"
        if best < 1
        else "the logits are too small by more than 100 (are they logits?)"
    )
    return Searched(best, best, True, f"the temperature stopped at the bound of its range, {1 / best:.4g}; {reason}")


def _basin(likelihood: PooledLikelihood, fewest_rows: int) -> tuple[float, float]:
    """An interval of 1/T with the smallest NLL inside.

    With one draw the NLL is convex in 1/T: the whole range will do. With several it may have several minima, and a grid
    finds the deepest; evenly spaced rows are enough to tell them apart where there are very many. A few rows are not: if
    all are answered right, the lowest temperature looks best.
    """
    if likelihood.num_draws == 1:
        return 1 / _BOUND, _BOUND
    row = likelihood.num_draws * likelihood.num_classes
    sample = likelihood.sample(max(BUDGET // 8, fewest_rows * row))
    grid = [_BOUND ** (2 * place / (_GRID - 1) - 1) for place in range(_GRID)]
    scores = [sample(at).nll for at in grid]
    best = min(range(_GRID), key=scores.__getitem__)
    return grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]


def _warn(message: str) -> None:
    warnings.warn(message, CalibrationWarning, stacklevel=4)
