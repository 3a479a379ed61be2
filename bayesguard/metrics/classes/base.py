"""What the torchmetrics classes share: what they take, and how they keep means or rows."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torchmetrics import Metric

from bayesguard.checks import as_tensor, check_level
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.functional.inputs import element_weights, weighted_mean
from bayesguard.metrics.registry import EVALUATION_METRICS, Pred, kind_of
from bayesguard.predictive import Predictive


class PredictiveMetric(Metric):
    """Base: `update(pred, targets, weights=None)` takes a Predictive, or class probabilities `[N, K]` (or P(y = 1)).

    Weights `[N]` say how much each row counts.
    """

    full_state_update = False
    is_differentiable = False

    def update(self, pred: object, targets: object, weights: object = None) -> None:
        """Add a batch of predictions and their targets, each row once or as often as `weights` `[N]` say."""
        # An array stays an array: a detour over log-probabilities would move scores off the edges of their bins.
        pred = pred if isinstance(pred, Predictive) else as_tensor(pred, "pred")
        truth = as_tensor(targets, "targets").to(pred.device)
        per_row = None if weights is None else element_weights(weights, truth, len(truth), truth.device)
        self.add(pred, truth, per_row)

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        """Add a batch; weights are float64 `[N]`."""
        raise NotImplementedError

    def _add_sums(self, *names: str, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> None:
        for name in names:
            # On the CPU whatever the default device is; `metric.to(device)` moves it.
            self.add_state(name, torch.zeros(shape, dtype=dtype, device="cpu"), dist_reduce_fx="sum")

    def _keep_apart(self, *settings: float) -> None:
        """Keep a `MetricCollection` from computing this metric from the sums of another one.

        It lets metrics share their states if those are equal after the first batch, which different means of the same
        rows may be by chance. Of states with other names it does not ask: this one says by its name what is averaged.
        """
        words = "_".join([type(self).__name__, *map(repr, settings)])
        self._add_sums("of_" + "".join(letter if letter.isalnum() else "_" for letter in words))

    def _add_lists(self, *names: str) -> None:
        for name in names:
            self.add_state(name, [], dist_reduce_fx="cat")

    def _refuse(self, pred: Pred) -> NoReturn:
        raise BadType(f"{type(self).__name__} is not for {kind_of(pred)} predictions")


class Average(PredictiveMetric):
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._add_sums("total", "count")

    def _average(self, values: Tensor, weights: Tensor | None) -> None:
        """Add values `[N, ...]` of rows of these weights."""
        flat = values.double().flatten()
        mass = element_weights(weights, values, len(flat), flat.device)
        count = len(flat) if mass is None else mass.sum()
        self.total += (weighted_mean(flat, mass) * count).to(self.total.device)
        self.count += count

    def compute(self) -> Tensor:
        """Return the mean, float64."""
        check_any(self, bool(self.count))
        return self.total / self.count


class AtLevel(Average):
    """A mean over sets or intervals of mis-coverage `alpha`."""

    def __init__(self, alpha: float = 0.1, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = check_level(alpha, "alpha")
        self._keep_apart(self.alpha)


class Registered(Average):
    """A mean over examples of what the registry's metric of this name keeps of each."""

    name: str

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._keep_apart()

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        self._average(EVALUATION_METRICS[self.name].scores(pred, targets).rows, weights)


class KeptRows(PredictiveMetric):
    """Keeps of every element two numbers and its weight, for metrics that need all of them at once."""

    scores: list[Tensor]
    outcomes: list[Tensor]
    weights: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._add_lists("scores", "outcomes", "weights")

    def _keep(self, scores: Tensor, outcomes: Tensor, targets: Tensor, weights: Tensor | None) -> None:
        """Keep what the elements of `targets` gave, both flat."""
        mass = element_weights(weights, targets, len(scores), scores.device)
        self.scores.append(scores.double())
        self.outcomes.append(outcomes.double())
        self.weights.append(torch.ones_like(scores, dtype=torch.float64) if mass is None else mass)

    def _kept(self) -> tuple[Tensor, Tensor, Tensor]:
        return whole(self, self.scores), whole(self, self.outcomes), whole(self, self.weights)


def check_any(metric: Metric, some: bool) -> None:
    if not some:
        raise BadInput(f"{type(metric).__name__} has seen no rows; call update(pred, targets) before compute()")


def whole(metric: Metric, parts: list[Tensor] | Tensor) -> Tensor:
    # torchmetrics hands a list before processes are merged, and a tensor after.
    check_any(metric, len(parts) > 0)
    return parts if isinstance(parts, Tensor) else torch.cat(parts)
