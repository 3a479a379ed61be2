"""Predictives whose sets or intervals have a guarantee: all else is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.predictive.base import Predictive, _example_index
from bayesguard.predictive.bernoulli import BernoulliPredictive
from bayesguard.predictive.categorical import CategoricalPredictive
from bayesguard.predictive.continuous import ContinuousPredictive
from bayesguard.predictive.count import CountPredictive
from bayesguard.predictive.groups import Groups
from bayesguard.predictive.recalibrated import RecalibratedPredictive
from bayesguard.predictive.samples import SamplePredictive

# (predictive, alpha, what belongs to each row) -> set, or ends of the interval
Answer = Callable[[Predictive, float, "RowValues"], Any]
RowValues = dict[str, Tensor]


class Guaranteed(Predictive):
    """Mixed in before a kind of predictive: sets and intervals come from a rule that was fitted on held-out data.

    Attributes:
        answer: `(predictive, alpha, rows)` to the set, or to the ends of the interval.
        alpha: The mis-coverage that is meant where none is said.
        rows: Values for each example that the rule needs, `[N]` by name: groups, weights.
    """

    answer: Answer
    alpha: float
    rows: RowValues

    def _refill(self, like: Self, tensors: list[Tensor], weights: Tensor, exact: bool, groups: Groups) -> Self:
        new: Self = super()._refill(like, tensors, weights, exact, groups)  # type: ignore[safe-super]
        return new._follow(like.answer, like.alpha, like.rows)

    def _follow(self, answer: Answer, alpha: float, rows: RowValues) -> Self:
        self.answer, self.alpha, self.rows = answer, alpha, rows
        return self

    def __getitem__(self, index: object) -> Self:
        chosen = _example_index(index, len(self), self.device)
        new = super().__getitem__(index)
        new.rows = {name: values[chosen] for name, values in self.rows.items()}
        return new

    def to(self, *args: Any, **kwargs: Any) -> Self:
        new = super().to(*args, **kwargs)
        new.rows = {name: values.to(new.device) for name, values in self.rows.items()}
        return new

    def _answered(self, alpha: float | None) -> Any:
        if any(len(values) != len(self) for values in self.rows.values()):
            raise BadInput("predictives with groups or weights of their own cannot be joined; calibrate after joining")
        with torch.no_grad():
            return self.answer(self, self.alpha if alpha is None else alpha, self.rows)


class _WithSets(Guaranteed):
    def prediction_set(self, alpha: float | None = None) -> Tensor:
        """Return the classes that can be the answer, bool `[N, K]`, with the guarantee of the calibrator.

        Args:
            alpha: Mis-coverage; None for the calibrator's own.
        """
        members: Tensor = self._answered(alpha)
        return members


class _WithIntervals(Guaranteed):
    def interval(self, alpha: float | None = None) -> tuple[Tensor, Tensor]:
        """Return the lower and upper ends `[N, ...]` of an interval with the guarantee of the calibrator.

        Args:
            alpha: Mis-coverage; None for the calibrator's own.
        """
        lower, upper = self._answered(alpha)
        return lower, upper


class GuaranteedCategorical(_WithSets, CategoricalPredictive):
    """One of K classes, its sets with a guarantee."""


class GuaranteedBernoulli(_WithSets, BernoulliPredictive):
    """Yes or no, its sets with a guarantee."""


class GuaranteedContinuous(_WithIntervals, ContinuousPredictive):
    """A real target, its intervals with a guarantee."""


class GuaranteedCount(_WithIntervals, CountPredictive):
    """A count, its intervals with a guarantee."""


class GuaranteedRecalibrated(_WithIntervals, RecalibratedPredictive):
    """A real target whose cdf was mapped, its intervals with a guarantee."""


class GuaranteedSamples(_WithIntervals, SamplePredictive):
    """Samples of a real target, its intervals with a guarantee."""


_KINDS: dict[type[Predictive], type[Guaranteed]] = {
    CategoricalPredictive: GuaranteedCategorical,
    BernoulliPredictive: GuaranteedBernoulli,
    ContinuousPredictive: GuaranteedContinuous,
    CountPredictive: GuaranteedCount,
    RecalibratedPredictive: GuaranteedRecalibrated,
    SamplePredictive: GuaranteedSamples,
}


def guaranteed(pred: Predictive, answer: Answer, alpha: float, rows: RowValues | None = None) -> Predictive:
    """Return the predictive with another rule for its sets or intervals.

    Raises:
        BadType: A predictive that has neither.
    """
    plain = next((base for base in _KINDS if isinstance(pred, base)), None)
    if plain is None:
        raise BadType(f"a {type(pred).__name__} has neither sets nor intervals that could be given a guarantee")
    kind = _KINDS[plain]
    new: Any = kind.__new__(kind)
    # By the parent's own way, since `pred` has no rule yet.
    plain._refill(new, pred, pred._tensors(), pred.weights, pred.exact, pred.groups)
    new._follow(answer, alpha, rows or {})
    return new
