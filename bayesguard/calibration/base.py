"""What every calibrator is: a map fitted on held-out predictions that makes them honest."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from bayesguard.errors import BadInput, BadType, NotFitted
from bayesguard.predictive import Predictive
from bayesguard.predictive.numerics import as_given
from bayesguard.sampling import stream


class Calibrator(nn.Module, ABC):
    """A map from predictives to predictives, fitted on predictions for held-out examples and their targets.

    What was fitted lies in buffers: it moves with `.to()` and is part of `state_dict()`.

    Attributes:
        acts_on: "draws" if the map changes every draw, and so needs them kept; "pooled" if it changes the mixture.
        needs_own_data: Whether it has to be fitted to examples that no calibrator before it was fitted to, because it
            promises a coverage: `Predictor.calibrate` then splits what it is given.
        diagnostics: What the last fit found, by name; empty before.
    """

    acts_on: ClassVar[Literal["draws", "pooled"]]
    needs_own_data: ClassVar[bool] = False
    is_fitted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("is_fitted", torch.zeros((), dtype=torch.bool, device="cpu"))
        self.diagnostics: dict[str, Any] = {}

    @abstractmethod
    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        """Fit to predictions and targets on one device, without gradients; fill the buffers and `diagnostics`."""

    @abstractmethod
    def _calibrate(self, pred: Predictive) -> Predictive:
        """Apply the fitted map."""

    @property
    def fitted(self) -> bool:
        """Whether `fit` has been called (or a fitted state loaded)."""
        return bool(self.is_fitted)

    def fit(self, pred: Predictive, targets: object) -> Self:
        """Fit on held-out predictions: examples that the network was not trained on.

        Args:
            pred: Predictions for N examples.
            targets: What was observed, one for each element of the predictive's batch shape.

        Returns:
            The calibrator itself.

        Raises:
            BadInput: No examples, or targets of another shape or outside their range (with the row).
            BadType: A predictive of a kind that this calibrator cannot work on.
        """
        if not isinstance(pred, Predictive):
            raise BadType(
                f"pred must be a Predictive, got {type(pred).__name__}; "
                "make one with Predictive.from_logits or Predictive.from_probs"
            )
        if pred.batch_shape.numel() == 0:
            raise BadInput("pred has no examples; a calibrator needs held-out examples to be fitted on")
        with torch.no_grad():
            self._fit(pred, as_given(targets, "targets").detach().to(pred.device))
            self.is_fitted = self.is_fitted.new_tensor(True)
        return self

    def forward(self, pred: Predictive) -> Predictive:
        """Return the calibrated predictive.

        Raises:
            NotFitted: The calibrator was not fitted.
        """
        if not self.fitted:
            name = type(self).__name__
            raise NotFitted(f"this {name} is not fitted; call fit(pred, targets) on held-out predictions first")
        return self._calibrate(pred)

    def __call__(self, pred: Predictive) -> Predictive:
        """Return the calibrated predictive."""
        return cast(Predictive, super().__call__(pred))


def check_order(calibrators: Sequence[Calibrator]) -> None:
    """Raise BadInput where a calibrator stands behind one whose promise it would undo."""
    for first, later in itertools.pairwise(calibrators):
        if first.needs_own_data:
            raise BadInput(
                f"{type(later).__name__} comes after {type(first).__name__}, whose coverage it would undo; put the one that "
                "promises a coverage last"
            )
        if first.acts_on == "pooled" and later.acts_on == "draws":
            raise BadInput(
                f"{type(later).__name__} acts on draws, and comes after {type(first).__name__}, which acts on their mixture; "
                "put it first"
            )


def fit_in_turn(calibrators: Sequence[Calibrator], pred: Predictive, targets: Tensor, seed: int) -> None:
    """Fit calibrators one after another; a last one that promises a coverage gets a random half for itself."""
    *first, last = calibrators
    if not first or not last.needs_own_data:
        for calibrator in calibrators:
            pred = calibrator.fit(pred, targets)(pred)
        return
    order = torch.randperm(len(pred), generator=stream("cpu", seed, "calibration")).to(pred.device)
    half = len(pred) // 2
    ours, own = order[:half], order[half:]
    if not half:
        raise BadInput(f"{len(pred)} examples cannot be shared between {len(calibrators)} calibrators")
    for calibrator in first:
        fitted = calibrator.fit(pred[ours], targets[ours.to(targets.device)])
        pred = fitted(pred)
    last.fit(pred[own], targets[own.to(targets.device)])
