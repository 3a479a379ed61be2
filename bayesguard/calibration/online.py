"""Conformal prediction for streams, where examples need not be exchangeable.

I. Gibbs, E. J. Candès (2021). Adaptive conformal inference under distribution shift. NeurIPS.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bayesguard.calibration.conformal import ConformalQuantile
from bayesguard.calibration.ranks import conformal_rank
from bayesguard.calibration.split import SplitConformal
from bayesguard.checks import check_level
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import Predictive
from bayesguard.predictive.numerics import as_given


class AdaptiveConformal:
    """Conformal sets whose level follows the errors that were made: on any stream the long-run error rate is alpha.

    After each example the level goes down by a step where the set missed, and up by a little where it did not. Whatever
    the data do, after T examples the share of misses differs from alpha by at most `(1 + step_size) / (T step_size)`
    (Gibbs and Candès, 2021, proposition 4.1).

    Args:
        conformal: A fitted calibrator of this module's family; its scores stay as they are.
        alpha: The error rate that is meant; None for the calibrator's own.
        step_size: How fast the level follows: 0.005 in the paper; more where the stream changes sooner.

    Attributes:
        level: The level of the next set; at 0 or below it holds everything, at 1 or above nothing but the best answer.
        num_examples: How many targets were observed.
        num_misses: How many of them were not in their set.

    Raises:
        BadType: A calibrator that is not fitted, or for one alpha only.

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
        if not isinstance(conformal, SplitConformal) or not conformal.fitted:
            raise BadType("conformal must be a fitted calibrator, as Conformal(...).fit(pred, targets)")
        if isinstance(conformal, ConformalQuantile):
            raise BadType("a ConformalQuantile is for one alpha only; use ConformalInterval, whose level can move")
        if not step_size > 0:
            raise BadInput(f"step_size must be positive, got {step_size}")
        self.conformal, self.step_size = conformal, float(step_size)
        self.alpha = conformal.alpha if alpha is None else check_level(alpha, "alpha")
        self.level = self.alpha
        self.num_examples = self.num_misses = 0

    def answer(self, pred: Predictive) -> Any:
        """Return the set `[N, K]`, or the ends of the interval, at the level that holds now."""
        calibrated: Any = self.conformal(pred)
        classes = hasattr(calibrated, "prediction_set")
        # A level that the scores are too few for is the algorithm's wish for everything, and no reason to warn.
        scores = len(self.conformal.scores)
        if self.level <= 0 or conformal_rank(scores, min(self.level, 0.5)) > scores:
            return _everything(calibrated, classes)
        level = min(self.level, 1 - 1e-9)
        return calibrated.prediction_set(level) if classes else calibrated.interval(level)

    def observe(self, covered: bool) -> None:
        """Take notice of whether the last set held the answer."""
        self.num_examples += 1
        self.num_misses += not covered
        self.level += self.step_size * (self.alpha - (not covered))

    def run(self, pred: Predictive, targets: object) -> Tensor:
        """Answer and observe examples one after another in their order, and return which were covered, bool `[N]`."""
        values = as_given(targets, "targets").to(pred.device)
        if len(values) != len(pred):
            raise BadInput(f"targets has {len(values)} examples, pred {len(pred)}")
        covered = []
        for row in range(len(pred)):
            answer = self.answer(pred[row])
            held = _holds(answer, values[row : row + 1])
            self.observe(held)
            covered.append(held)
        return torch.tensor(covered, dtype=torch.bool, device=pred.device)

    def __repr__(self) -> str:
        return (
            f"AdaptiveConformal(alpha={self.alpha}, level={self.level:.4g}, {self.num_misses} misses in "
            f"{self.num_examples})"
        )


def _everything(pred: Any, classes: bool) -> Any:
    if classes:
        return torch.ones_like(pred.prediction_set(0.5))
    ends = torch.full_like(pred.mean, torch.inf)
    return -ends, ends


def _holds(answer: Any, targets: Tensor) -> bool:
    if isinstance(answer, Tensor):
        return bool(answer.gather(-1, targets.long().unsqueeze(-1)).all())
    lower, upper = answer
    return bool(((lower <= targets) & (targets <= upper)).all())
