"""Scores of the tables: of classes, and of counts that were predicted by their logarithms."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesguard.benchmarks.tabular_data import Target
from bayesguard.metrics.functional import brier_score, expected_calibration_error
from bayesguard.predictive import ContinuousPredictive, Predictive

CLASS_METRICS = ("accuracy", "nll", "brier", "ece")
COUNT_METRICS = ("rmse", "nll", "crps", "coverage_90", "width_90")
Score = Callable[[slice | Tensor], dict[str, float]]


def class_scores(pred: Predictive, y: Tensor) -> dict[str, float]:
    """Accuracy, NLL in nats, Brier score (both classes summed, 0 to 2) and calibration error (15 bins of equal width)."""
    probs = pred.probs.double()
    return {
        "accuracy": float((probs.argmax(-1) == y).double().mean()),
        "nll": -float(pred.log_prob(y).double().mean()),
        "brier": float(brier_score(probs, y)),
        "ece": float(expected_calibration_error(probs, y)),
    }


class Counts:
    """A mixture of normal distributions of the logarithm of one more than a count, in the unit of the count.

    1 + y is then a mixture of log-normal distributions, whose moments, density and CRPS are known in closed form.

    Args:
        pred: The answers for standardised logarithms.
        target: How these were made.
    """

    def __init__(self, pred: Predictive, target: Target) -> None:
        assert isinstance(pred, ContinuousPredictive)
        self.pred, self.target = pred, target
        component: Any = pred.component
        self.loc = target.mean + target.deviation * component.loc.double()
        self.scale = target.deviation * component.scale.double()
        self.share = pred.weights.double().reshape(-1, 1)

    @property
    def mean(self) -> Tensor:
        """Expected counts `[N]`."""
        return (self.share * self._means()).sum(0) - 1

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density at counts y `[N]`, per unit of the count: that of the logarithm, less log(1 + y)."""
        logs = y.double().log1p()
        parts = torch.distributions.Normal(self.loc, self.scale).log_prob(logs)
        return (parts + self.share.log()).logsumexp(0) - logs

    def interval(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Ends of the central interval `[N]`: quantiles go with a rising map."""
        lower, upper = self.pred.interval(alpha)
        return self.counts(lower), self.counts(upper)

    def counts(self, standardised: Tensor) -> Tensor:
        """Return standardised logarithms in the unit of the count."""
        return (self.target.mean + self.target.deviation * standardised.double()).expm1()

    def crps(self, y: Tensor) -> Tensor:
        """CRPS of counts `[N]`: E|Y - y| - E|Y - Y'| / 2, each term in closed form."""
        means, logs = self._means(), y.double().log1p()
        z = (logs - self.loc) / self.scale
        distance = (1 + y.double()) * (2 * _phi(z) - 1) + means * (1 - 2 * _phi(z - self.scale))
        score = (self.share * distance).sum(0)
        for i in range(len(self.loc)):
            score = score - 0.5 * self.share[i] * (self.share * self._apart(i, means)).sum(0)
        return score

    def _apart(self, i: int, means: Tensor) -> Tensor:
        """Expected distance of component i from each one, all independent: twice the larger's mean, less both means."""
        both = torch.hypot(self.scale[i], self.scale)
        gap = self.loc[i] - self.loc
        larger = means[i] * _phi((gap + self.scale[i].square()) / both)
        larger = larger + means * _phi((self.scale.square() - gap) / both)
        return 2 * larger - means[i] - means

    def _means(self) -> Tensor:
        return (self.loc + self.scale.square() / 2).exp()


def count_scores(answers: Counts, y: Tensor) -> Score:
    """Return what gives RMSE, NLL, CRPS and the coverage and width of 90 % intervals of some rows, in hires."""
    lower, upper = answers.interval(0.1)
    errors = (answers.mean - y).square()
    nll, crps = -answers.log_prob(y), answers.crps(y)
    inside, width = ((lower <= y) & (y <= upper)).double(), upper - lower
    return lambda rows: {
        "rmse": math.sqrt(float(errors[rows].mean())),
        "nll": float(nll[rows].mean()),
        "crps": float(crps[rows].mean()),
        "coverage_90": float(inside[rows].mean()),
        "width_90": float(width[rows].mean()),
    }


def _phi(z: Tensor) -> Tensor:
    return torch.special.ndtr(z)
