"""Whether the surest answers are right, and the least sure rows out of distribution: every row is kept."""

from typing import Any

from torch import Tensor

from bayesguard.checks import bad_row, check_level
from bayesguard.errors import BadInput
from bayesguard.metrics.classes.base import KeptRows
from bayesguard.metrics.functional.inputs import paired
from bayesguard.metrics.functional.ood import (
    Positive,
    area_under_precision_recall,
    check_positive,
    false_positive_rate_at,
)
from bayesguard.metrics.functional.selective import (
    area_under_generalised_risk_coverage,
    area_under_risk_coverage,
    area_under_roc,
    excess_area_under_risk_coverage,
)
from bayesguard.metrics.registry import Pred, kind_of, top


class _Ranking(KeptRows):
    """Keeps the confidence of every answer, whether it was wrong, and its weight."""

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        if kind_of(pred) not in ("categorical", "binary"):
            self._refuse(pred)
        confidence, right = (values.flatten() for values in top(pred, targets))
        self._keep(confidence, 1 - right, targets, weights)


class AreaUnderRiskCoverage(_Ranking):
    """Mean error rate over all shares of rows kept, the surest first. Weights are counts of rows."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the area, float64."""
        confidence, errors, weights = self._kept()
        return area_under_risk_coverage(confidence, errors, weights=weights)


class ExcessAreaUnderRiskCoverage(_Ranking):
    """By how much that area is above the one of the best order (E-AURC). Weights are counts of rows."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the excess, float64."""
        confidence, errors, weights = self._kept()
        return excess_area_under_risk_coverage(confidence, errors, weights=weights)


class AreaUnderGeneralisedRiskCoverage(_Ranking):
    """Probability that an answer is kept and wrong, averaged over all shares of rows kept (AUGRC)."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the area, float64."""
        confidence, errors, weights = self._kept()
        return area_under_generalised_risk_coverage(confidence, errors, weights=weights)


class ErrorAUROC(_Ranking):
    """Probability that a wrong answer is less confident than a right one; needs both kinds of answers."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the area, float64."""
        confidence, errors, weights = self._kept()
        return area_under_roc(-confidence, errors, weights=weights)


class _Outside(KeptRows):
    """Keeps the score of every row, whether it is out of distribution, and its weight.

    `update(scores, outside)` takes scores `[N]`, or a Predictive, whose score is its total uncertainty.
    """

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        score = pred if isinstance(pred, Tensor) else pred.uncertainty().total
        scores, outside = paired(score, targets, "pred", "targets")
        bad = (outside != 0) & (outside != 1)
        if bad.any():
            raise BadInput(
                f"targets has {outside[bad][0].item():g} in row {bad_row(bad)}; allowed are 0 and 1, whether the row is "
                "out of distribution"
            )
        self._keep(scores, outside, targets, weights)

    def _sides(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return the scores in and out of distribution, and the weights of both."""
        scores, outside, weights = self._kept()
        out = outside == 1
        return scores[~out], scores[out], (weights[~out], weights[out])


class OODAUROC(_Outside):
    """How well scores tell out-of-distribution rows (larger) from in-distribution ones; ties count half.

    `update(scores, outside)` takes scores `[N]`, or a Predictive, whose score is its total uncertainty, and whether
    each row is out of distribution.

    Examples:
        >>> metric = OODAUROC()
        >>> metric.update([0.1, 0.9], [False, True])
        >>> metric.compute().item()
        1.0
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the area, float64."""
        scores, outside, weights = self._kept()
        return area_under_roc(scores, outside, weights=weights)


class OODAveragePrecision(_Outside):
    """Area under precision and recall of the side `positive` ("out" or "in"); `update` as for `OODAUROC`.

    See `functional.area_under_precision_recall`.
    """

    higher_is_better = True

    def __init__(self, positive: Positive, **options: Any) -> None:
        super().__init__(**options)
        self.positive = check_positive(positive)

    def compute(self) -> Tensor:
        """Return the area, float64."""
        inside, outside, weights = self._sides()
        return area_under_precision_recall(inside, outside, positive=self.positive, weights=weights)


class OODFalsePositiveRate(_Outside):
    """Share of negatives beyond the threshold that finds `true_positive_rate` of the side `positive` (FPR95).

    See `functional.false_positive_rate_at`; `update` as for `OODAUROC`.
    """

    higher_is_better = False

    def __init__(self, positive: Positive, true_positive_rate: float = 0.95, **options: Any) -> None:
        super().__init__(**options)
        self.positive = check_positive(positive)
        self.true_positive_rate = check_level(true_positive_rate, "true_positive_rate")

    def compute(self) -> Tensor:
        """Return the rate, float64."""
        inside, outside, weights = self._sides()
        rate, side = self.true_positive_rate, self.positive
        return false_positive_rate_at(inside, outside, rate, positive=side, weights=weights)
