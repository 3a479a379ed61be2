"""Calibration errors: over bins, of which sums are kept, and without bins, for which all rows are."""

from typing import Any

import torch
from torch import Tensor

from bayesguard.checks import check_count, check_level
from bayesguard.errors import BadInput
from bayesguard.metrics.classes.base import KeptRows, PredictiveMetric, check_any, whole
from bayesguard.metrics.functional.binned import BinnedSums, Binning, Norm, bin_index, check_settings
from bayesguard.metrics.functional.decision import side_sums
from bayesguard.metrics.functional.decomposition import ScoreDecomposition, weighted_corp_brier
from bayesguard.metrics.functional.inputs import classified, element_weights
from bayesguard.metrics.functional.smooth import weighted_smooth_error
from bayesguard.metrics.registry import Pred, binned, class_probs, kind_of
from bayesguard.metrics.state import GRID, CalibrationState


class _Binned(PredictiveMetric):
    """Holds the tensors of a `BinnedSums`."""

    rows: Tensor
    sums: Tensor

    def _hold(self, *shape: int) -> None:
        empty = BinnedSums.empty(*shape)
        self._add_sums("rows", shape=empty.rows.shape, dtype=torch.int64)
        self._add_sums("sums", shape=empty.sums.shape)

    def _held(self) -> BinnedSums:
        check_any(self, bool(self.rows.any()))
        return BinnedSums(self.rows, self.sums)

    def _merge(self, sums: BinnedSums) -> None:
        self.rows += sums.rows.to(self.rows.device)
        self.sums += sums.sums.to(self.sums.device)


class ExpectedCalibrationError(_Binned):
    """Calibration error of the most probable class; of P(y = 1) for yes-or-no predictions.

    Arguments as for `functional.expected_calibration_error`. Equal-width bins keep 14 numbers a bin, and are exact.
    Equal mass needs all confidences, and keeps them; with `exact=False` it keeps 14 numbers for each of 4096 cells
    instead, and cuts to within one cell (see `CalibrationState`).

    Examples:
        >>> metric = ExpectedCalibrationError()
        >>> metric.update([[0.9, 0.1]], [0])
        >>> metric.update([[0.8, 0.2]], [1])
        >>> round(metric.compute().item(), 4)
        0.45
        >>> metric.state.bootstrap(1000).shape
        torch.Size([1000])
    """

    higher_is_better = False
    scores: list[Tensor]
    outcomes: list[Tensor]
    weights: list[Tensor]

    def __init__(
        self,
        num_bins: int = 15,
        binning: Binning = "width",
        norm: Norm = "l1",
        debiased: bool = False,
        exact: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_settings(num_bins, binning, norm, debiased)
        self.num_bins, self.binning, self.norm, self.debiased = num_bins, binning, norm, debiased
        self.keeps_rows = exact and binning == "mass"
        if self.keeps_rows:
            self._add_lists("scores", "outcomes", "weights")
        else:
            self._hold(num_bins if binning == "width" else GRID)

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        scores, outcomes = binned(pred, targets)
        mass = element_weights(weights, targets, len(scores), scores.device)
        if self.keeps_rows:
            self.scores.append(scores.double())
            self.outcomes.append(outcomes)
            self.weights.append(torch.ones_like(outcomes) if mass is None else mass)
        else:
            batch = CalibrationState(self.num_bins, self.binning)
            batch.add(scores, outcomes, mass)
            self._merge(batch.sums)

    @property
    def state(self) -> CalibrationState:
        """The sums so far, of this process: for intervals, a null, reliability bins and the effective sample size."""
        if self.keeps_rows:
            raise BadInput("ExpectedCalibrationError(binning='mass') keeps rows, not sums; make it with exact=False")
        state = CalibrationState(self.num_bins, self.binning)
        state.sums = self._held()
        return state

    def compute(self) -> Tensor:
        """Return the error, float64."""
        if not self.keeps_rows:
            return self.state.error(self.norm, debiased=self.debiased)
        scores, outcomes, weights = (whole(self, parts) for parts in (self.scores, self.outcomes, self.weights))
        index = bin_index(scores, self.num_bins, "mass", weights)
        return BinnedSums.of(scores, outcomes, index, self.num_bins, weights).error(self.norm, debiased=self.debiased)


class ClasswiseCalibrationError(_Binned):
    """Mean over classes of the binary calibration error of each class's probability, over equal-width bins.

    Arguments as for `functional.classwise_calibration_error`, and the number of classes. Keeps 14 K B numbers.
    """

    higher_is_better = False

    def __init__(
        self, num_classes: int, num_bins: int = 15, norm: Norm = "l1", debiased: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        check_settings(num_bins, "width", norm, debiased)
        self.num_classes = check_count(num_classes, "num_classes", minimum=2)
        self.num_bins, self.norm, self.debiased = num_bins, norm, debiased
        self._hold(num_classes, num_bins)

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        if kind_of(pred) != "categorical":
            self._refuse(pred)
        values, labels = classified(class_probs(pred), targets)
        mass = element_weights(weights, targets, len(labels), labels.device)
        if values.shape[-1] != self.num_classes:
            raise BadInput(f"pred has {values.shape[-1]} classes, but the metric was made for {self.num_classes}")
        self._merge(BinnedSums.of_classes(values, labels, self.num_bins, mass))

    def compute(self) -> Tensor:
        """Return the error, float64."""
        return self._held().error(self.norm, debiased=self.debiased)


class CalibrationErrorAt(PredictiveMetric):
    """Calibration error with two bins that meet at a threshold: of the most probable class, or of P(y = 1).

    Arguments as for `functional.calibration_error_at`. Keeps four numbers.
    """

    higher_is_better = False
    mass: Tensor
    gaps: Tensor

    def __init__(self, threshold: float, **options: Any) -> None:
        super().__init__(**options)
        self.threshold = check_level(threshold, "threshold")
        self._add_sums("mass", "gaps", shape=(2,))
        self._keep_apart(self.threshold)

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        if kind_of(pred) not in ("categorical", "binary"):
            self._refuse(pred)
        scores, outcomes = binned(pred, targets)
        own = element_weights(weights, targets, len(scores), scores.device)
        own = torch.ones_like(outcomes) if own is None else own
        mass, gaps = side_sums(scores, outcomes, self.threshold, own)
        self.mass += mass.to(self.mass.device)
        self.gaps += gaps.to(self.gaps.device)

    def compute(self) -> Tensor:
        """Return the error, float64."""
        check_any(self, bool(self.mass.any()))
        return self.gaps.abs().sum() / self.mass.sum()


class SmoothCalibrationError(KeptRows):
    """SmoothECE of the most probable class; of P(y = 1) for yes-or-no predictions."""

    higher_is_better = False

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        if kind_of(pred) not in ("categorical", "binary"):
            self._refuse(pred)
        self._keep(*binned(pred, targets), targets, weights)

    def compute(self) -> Tensor:
        """Return the error, float64."""
        scores, outcomes, weights = self._kept()
        return weighted_smooth_error(scores, outcomes, weights.unsqueeze(0))[0]


class _CorpBrier(KeptRows):
    """Keeps P(y = 1) and y."""

    def add(self, pred: Pred, targets: Tensor, weights: Tensor | None) -> None:
        if kind_of(pred) != "binary":
            self._refuse(pred)
        self._keep(*binned(pred, targets), targets, weights)

    def _parts(self) -> ScoreDecomposition:
        scores, outcomes, weights = self._kept()
        return weighted_corp_brier(scores, outcomes, weights.unsqueeze(0))


class BrierMiscalibration(_CorpBrier):
    """Miscalibration of the mean squared error of P(y = 1) (CORP), half of what both answers would have."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """Return the part, float64."""
        return self._parts().miscalibration[0]


class BrierDiscrimination(_CorpBrier):
    """Discrimination of the mean squared error of P(y = 1) (CORP), half of what both answers would have."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the part, float64."""
        return self._parts().discrimination[0]
