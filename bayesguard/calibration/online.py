"""Conformal prediction for streams, where examples need not be exchangeable.

I. Gibbs, E. J. Candès (2021). Adaptive conformal inference under distribution shift. NeurIPS. I. Gibbs, E. J. Candès (2024).
Conformal inference for online prediction with arbitrary distribution shifts. JMLR 25.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from bayesguard.calibration.conformal import Conformal, ConformalQuantile
from bayesguard.calibration.ranks import conformal_rank
from bayesguard.calibration.split import SplitConformal
from bayesguard.checks import check_count, check_level
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import Predictive
from bayesguard.predictive.numerics import as_given

# Of the experts among which `DynamicallyTunedConformal` chooses, those of the paper's experiments.
_STEP_SIZES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)
_HIGHEST = 1 - 1e-9  # a level of 1 has no set; this has the smallest


class OnlineConformal(nn.Module, ABC):
    """Base of what moves the level of a fitted conformal calibrator from example to example.

    What was learned lies in buffers, with the calibrator's scores: it is part of `state_dict()`.

    Args:
        conformal: A fitted calibrator of this module's family; its scores stay as they are.
        alpha: The error rate that is meant; None for the calibrator's own.

    Attributes:
        level: The level of the next set; at 0 or below it holds everything, at 1 or above nothing but the best answer.
        num_examples: How many targets were observed.
        num_misses: How many of them were not in their set.

    Raises:
        BadType: A calibrator that is not fitted, or for one alpha only.
    """

    level: Tensor
    num_examples: Tensor
    num_misses: Tensor

    def __init__(self, conformal: SplitConformal, alpha: float | None = None) -> None:
        super().__init__()
        if not isinstance(conformal, SplitConformal) or not conformal.fitted:
            raise BadType("conformal must be a fitted calibrator, as Conformal(...).fit(pred, targets)")
        if isinstance(conformal, ConformalQuantile):
            raise BadType("a ConformalQuantile is for one alpha only; use ConformalInterval, whose level can move")
        self.conformal = conformal
        self.alpha = conformal.alpha if alpha is None else check_level(alpha, "alpha")
        self.register_buffer("level", torch.tensor(self.alpha, dtype=torch.float64))
        self.register_buffer("num_examples", torch.zeros((), dtype=torch.long))
        self.register_buffer("num_misses", torch.zeros((), dtype=torch.long))

    @abstractmethod
    def _follow(self, p_value: float, covered: bool) -> None:
        """Move the level: the last answer would be in the set at every level below its p-value."""

    def answer(self, pred: Predictive) -> Any:
        """Return the set `[N, K]`, or the ends of the interval, at the level that holds now."""
        calibrated: Any = self.conformal(pred)
        classes = hasattr(calibrated, "prediction_set")
        # A level that the scores are too few for is the algorithm's wish for everything, and no reason to warn.
        scores, level = len(self.conformal.scores), float(self.level)
        if level <= 0 or conformal_rank(scores, min(level, 0.5)) > scores:
            return _everything(calibrated, classes)
        level = min(level, _HIGHEST)
        return calibrated.prediction_set(level) if classes else calibrated.interval(level)

    def run(self, pred: Predictive, targets: object) -> Tensor:
        """Answer and observe examples one after another in their order, and return which were covered, bool `[N]`.

        Examples of several targets are covered where all of them are.
        """
        covered = [self._take(p_value) for p_value in self._p_values(pred, targets)]
        return torch.tensor(covered, dtype=torch.bool, device=pred.device)

    def _take(self, p_value: float) -> bool:
        covered = min(float(self.level), _HIGHEST) < p_value
        self._count(covered)
        self._follow(p_value, covered)
        return covered

    def _count(self, covered: bool) -> None:
        self.num_examples += 1
        self.num_misses += not covered

    def _p_values(self, pred: Predictive, targets: object) -> list[float]:
        values = as_given(targets, "targets").to(pred.device)
        if len(values) != len(pred):
            raise BadInput(f"targets has {len(values)} examples, pred {len(pred)}")
        found = self.conformal.p_values(pred, values).reshape(len(pred), -1).amin(1)
        if isinstance(self.conformal, Conformal):
            # The most probable class is in every set.
            found = found.masked_fill(self.conformal._probs(pred).argmax(-1) == values, 1.0)
        return found.tolist()

    def get_extra_state(self) -> Any:
        """Return the error rate that is meant, so that a level for another one is not taken for this one's."""
        return torch.tensor(self.alpha, dtype=torch.float64, device="cpu")  # files of tensors hold nothing else

    def set_extra_state(self, state: Any) -> None:
        """Refuse the state for another error rate."""
        alpha = float(state) if isinstance(state, Tensor) else state.get("alpha")  # as older states have it
        if alpha != self.alpha:
            raise BadInput(f"the state is for alpha={alpha}, this {type(self).__name__} for {self.alpha}")

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, level={float(self.level):.4g}, {self.num_misses} misses in {self.num_examples}"


class AdaptiveConformal(OnlineConformal):
    """Conformal sets whose level follows the errors that were made: on any stream the long-run error rate is alpha.

    After each example the level goes down by a step where the set missed, and up by a little where it did not. Whatever
    the data do, after T examples the share of misses differs from alpha by at most `(1 + step_size) / (T step_size)`
    (Gibbs and Candès, 2021, proposition 4.1).

    Args:
        conformal: A fitted calibrator of this module's family; its scores stay as they are.
        alpha: The error rate that is meant; None for the calibrator's own.
        step_size: How fast the level follows: 0.005 in the paper; more where the stream changes sooner.

    Attributes and errors: see `OnlineConformal`.

    Examples:
        >>> from bayesguard.calibration import ConformalInterval
        >>> pred = Predictive.from_normal(torch.zeros(400), 1.0)
        >>> y = torch.randn(400, generator=torch.Generator().manual_seed(0))
        >>> adaptive = AdaptiveConformal(ConformalInterval().fit(pred[:200], y[:200]), step_size=0.05)
        >>> covered = adaptive.run(pred[200:], 3 * y[200:])  # three times the noise, all at once
        >>> bool(covered[100:].float().mean() > 0.85)
        True
    """

    def __init__(self, conformal: SplitConformal, alpha: float | None = None, *, step_size: float = 0.005) -> None:
        super().__init__(conformal, alpha)
        if not step_size > 0:
            raise BadInput(f"step_size must be positive, got {step_size}")
        self.step_size = float(step_size)

    def observe(self, covered: bool) -> None:
        """Take notice of whether the last set held the answer."""
        self._count(bool(covered))
        self._follow(0.0, bool(covered))

    def _follow(self, p_value: float, covered: bool) -> None:
        self.level += self.step_size * (self.alpha - (not covered))


class DynamicallyTunedConformal(OnlineConformal):
    """Conformal sets for streams that change at unknown speed: eight adaptive ones, and a mean that trusts the best of late.

    Each expert is `AdaptiveConformal` with a step size of its own, from 0.001 to 0.128: small ones are steady while nothing
    changes, large ones follow a jump. The level is their mean, with weights that fall exponentially in the pinball loss of
    each expert's level and never vanish, so that a new best one takes over within the window.

    Over every stretch of examples, whatever the data do, the loss of the level is at most that of any expert, and
    `(log(k / sigma) + 2 sigma n) / eta + eta / 2 sum_t sum_i w_ti loss_ti^2` (k = 8 experts, n examples in the stretch): it
    is adaptive everywhere, where a fixed step size has a promise for the whole only. Each expert has the long-run error
    rate alpha exactly as `AdaptiveConformal` has; that of their mean is near it, without so sharp a bound.

    Args:
        conformal: A fitted calibrator of this module's family; its scores stay as they are.
        alpha: The error rate that is meant; None for the calibrator's own.
        window: Number of examples n over which an expert has to prove itself; `sigma = 1 / (2 n)`, and eta is the best one
            for that bound where the level is right.

    Attributes:
        levels: Of the experts `[8]`.
        weights: Of the experts `[8]`, that sum to one.

    More attributes, and errors: see `OnlineConformal`.

    References:
        Gibbs and Candès, 2024 (DtACI, with the mean of the levels).

    Examples:
        >>> from bayesguard.calibration import ConformalInterval
        >>> pred = Predictive.from_normal(torch.zeros(800), 1.0)
        >>> y = torch.randn(800, generator=torch.Generator().manual_seed(0))
        >>> tuned = DynamicallyTunedConformal(ConformalInterval().fit(pred[:200], y[:200]), window=100)
        >>> covered = tuned.run(pred[200:], 3 * y[200:])  # three times the noise, all at once
        >>> bool(covered[100:].float().mean() > 0.85)
        True
    """

    levels: Tensor
    weights: Tensor

    def __init__(self, conformal: SplitConformal, alpha: float | None = None, *, window: int = 500) -> None:
        super().__init__(conformal, alpha)
        self.window = check_count(window, "window")
        experts = len(_STEP_SIZES)
        self.register_buffer("levels", torch.full((experts,), self.alpha, dtype=torch.float64))
        self.register_buffer("weights", torch.full((experts,), 1 / experts, dtype=torch.float64))
        self.sigma = 1 / (2 * self.window)
        spread = (1 - self.alpha) ** 2 * self.alpha**3 + self.alpha**2 * (1 - self.alpha) ** 3
        self.eta = math.sqrt(3 / self.window * (math.log(2 * experts * self.window) + 1) / spread)

    def observe(self, pred: Predictive, target: object) -> bool:
        """Take notice of the answer to one example `pred`, and return whether its set held it."""
        if len(pred) != 1:
            raise BadInput(f"pred has {len(pred)} examples, but observe takes one; use run for several")
        return bool(self.run(pred, target)[0])

    def _follow(self, p_value: float, covered: bool) -> None:
        gap = p_value - self.levels
        loss = self.alpha * gap - gap.clamp_max(0)
        kept = self.weights * (-self.eta * (loss - loss.min())).exp()
        kept = kept / kept.sum()
        self.weights.copy_((1 - self.sigma) * kept + self.sigma / len(kept))
        missed = (self.levels.clamp_max(_HIGHEST) >= p_value).double()
        self.levels += self.levels.new_tensor(_STEP_SIZES) * (self.alpha - missed)
        self.level.copy_(self.weights @ self.levels)


def _everything(pred: Any, classes: bool) -> Any:
    if classes:
        return torch.ones_like(pred.prediction_set(0.5))
    ends = torch.full_like(pred.mean, torch.inf)
    return -ends, ends
