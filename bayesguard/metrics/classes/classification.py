"""Means of class predictions: right answers, proper scores, and sets of classes."""

from torch import Tensor

from bayesguard.checks import check_shape
from bayesguard.metrics.classes.base import AtLevel, Registered
from bayesguard.metrics.functional.sets import covered_labels
from bayesguard.metrics.registry import Pred, kind_of, labels_of, sets_of


class Accuracy(Registered):
    """Share of right answers.

    Examples:
        >>> metric = Accuracy()
        >>> metric.update([[0.9, 0.1], [0.4, 0.6]], [0, 0])
        >>> metric.compute().item()
        0.5
    """

    name = "accuracy"
    higher_is_better = True


class NegativeLogLikelihood(Registered):
    """Mean negative log-likelihood in nats (of each element, where examples have several targets)."""

    name = "nll"
    higher_is_better = False


class BrierScore(Registered):
    """Brier score, summed over classes (for yes or no, over both): 0 to 2."""

    name = "brier"
    higher_is_better = False


class _Sets(AtLevel):
    def _sets(self, pred: Pred) -> Tensor:
        if kind_of(pred) not in ("categorical", "binary"):
            self._refuse(pred)
        return sets_of(pred, self.alpha)


class SetCoverage(_Sets):
    """Share of labels in the prediction sets of mis-coverage `alpha`: those of a guaranteed Predictive, or of largest classes.

    Examples:
        >>> metric = SetCoverage(alpha=0.2)
        >>> metric.update([[0.9, 0.1], [0.6, 0.4]], [1, 1])
        >>> metric.compute().item()
        0.5
    """

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        covered = covered_labels(self._sets(pred), labels_of(pred, targets))[1]
        self._average(covered.reshape(targets.shape), weights)


class SetSize(_Sets):
    """Mean number of classes in the prediction sets of mis-coverage `alpha`."""

    higher_is_better = False

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        sizes = self._sets(pred).sum(-1)
        check_shape(targets, sizes.shape, "targets")
        self._average(sizes, weights)
