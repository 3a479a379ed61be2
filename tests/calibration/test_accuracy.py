"""Which calibrators keep the most probable class, as the table in docs/calibration.md says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesguard import calibration
from bayesguard.predictive import CategoricalPredictive, Predictive

GROUPS = torch.arange(1000) % 2 == 0


def classes(seed: int, draws: int = 1) -> tuple[CategoricalPredictive, Tensor]:
    """Too sure, and wrong about the last class and in every second row."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1000, 4, generator=generator)
    bent = logits + torch.tensor([0.0, 0.0, 0.0, 1.0]) + GROUPS.unsqueeze(-1) * torch.tensor([1.0, 0.0, 0.0, 0.0])
    targets = bent.softmax(-1).multinomial(1, generator=generator)[:, 0]
    return CategoricalPredictive(3 * logits + torch.randn(draws, 1000, 4, generator=generator)), targets


def answers(seed: int, draws: int = 1) -> tuple[Predictive, Tensor]:
    """Too sure, and says no too often."""
    pred, targets = classes(seed, draws)
    return Predictive.from_logits(pred.draw_logits[..., 0] - pred.draw_logits[..., 1], draws=True), targets != 1


def prior(method: Any = "em") -> Any:
    class Corrected(calibration.PriorCorrection):
        def _fit(self, pred: Predictive, targets: Tensor) -> None:
            super()._fit(pred, targets)
            shares = torch.arange(1, len(self.old) + 1).double()
            self.new = shares / shares.sum()

    return Corrected(method)


def shift_aware(mode: Any) -> Any:
    class Aware(calibration.ShiftAwareScaling):
        def fit(self, pred: Predictive, targets: Any, **more: Any) -> Any:
            worse = [torch.randn(1000, 4, generator=torch.Generator().manual_seed(k)) for k in (7, 8)]
            logits = torch.cat([pred.logits, *(pred.logits + 2 * each for each in worse)])
            environments = torch.arange(3).repeat_interleave(1000)
            super().fit(Predictive.from_logits(logits), targets.repeat(3), environments=environments)
            return self.adapt(pred) if self.can_adapt else self

    return Aware(mode)


c = calibration
KEEPS: dict[str, tuple[Callable[[], Any], Any]] = {
    "TemperatureScaling, classes": (c.TemperatureScaling, classes),
    "TemperatureScaling, yes or no": (c.TemperatureScaling, answers),
    "HistogramBinning(keep_labels)": (lambda: c.HistogramBinning(keep_labels=True), classes),
    "IsotonicCalibration(keep_labels)": (lambda: c.IsotonicCalibration(keep_labels=True), classes),
    "BBQ(keep_labels)": (lambda: c.BBQ(keep_labels=True), classes),
    "SplineCalibration(keep_labels)": (lambda: c.SplineCalibration(keep_labels=True), classes),
    "HistogramBinning(keep_labels), yes or no": (lambda: c.HistogramBinning(keep_labels=True), answers),
    "IsotonicCalibration(keep_labels), yes or no": (lambda: c.IsotonicCalibration(keep_labels=True), answers),
    "BBQ(keep_labels), yes or no": (lambda: c.BBQ(keep_labels=True), answers),
    "SplineCalibration(keep_labels), yes or no": (lambda: c.SplineCalibration(keep_labels=True), answers),
    "ShiftAwareScaling, point": (lambda: shift_aware("point"), classes),
    "ShiftAwareScaling, set": (lambda: shift_aware("set"), classes),
    "Conformal": (c.Conformal, classes),
}
CHANGES: dict[str, tuple[Callable[[], Any], Any]] = {
    "VectorScaling": (c.VectorScaling, classes),
    "MatrixScaling": (c.MatrixScaling, classes),
    "DirichletCalibration": (c.DirichletCalibration, classes),
    "StructuredScaling": (c.StructuredScaling, classes),
    "PlattScaling": (c.PlattScaling, answers),
    "BetaCalibration": (c.BetaCalibration, answers),
    "HistogramBinning": (c.HistogramBinning, classes),
    "IsotonicCalibration": (c.IsotonicCalibration, classes),
    "BBQ": (c.BBQ, classes),
    "SplineCalibration": (c.SplineCalibration, classes),
    "SplineCalibration, yes or no": (c.SplineCalibration, answers),
    "PriorCorrection": (prior, classes),
    "Multicalibration": (c.Multicalibration, classes),
}
REGRESSION = {
    "CDFCalibration",
    "ConformalDistribution",
    "VarianceScaling",
    "ConformalInterval",
    "ConformalQuantile",
    "AdaptiveConformal",
}


def labels_before_and_after(make: Callable[[], Any], data: Any, draws: int = 1) -> tuple[Tensor, Tensor]:
    (pred, targets), (new, _) = data(0, draws), data(1, draws)
    calibrator = make()
    more = {"groups": GROUPS[:, None]} if isinstance(calibrator, calibration.Multicalibration) else {}
    calibrator.fit(pred, targets, **more)
    return new.labels, calibrator(new, **more).labels


@pytest.mark.parametrize("name", KEEPS)
def test_keeps_every_label(name: str) -> None:
    before, after = labels_before_and_after(*KEEPS[name])
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", [name for name in KEEPS if not name.startswith("Temperature")])
def test_keeps_every_label_of_a_mixture(name: str) -> None:
    before, after = labels_before_and_after(*KEEPS[name], draws=3)
    assert torch.equal(before, after)


def test_a_temperature_may_change_the_label_of_a_mixture() -> None:
    before, after = labels_before_and_after(calibration.TemperatureScaling, classes, draws=3)
    assert 0 < (before != after).double().mean() < 0.1


@pytest.mark.parametrize("name", CHANGES)
def test_may_change_a_label(name: str) -> None:
    before, after = labels_before_and_after(*CHANGES[name])
    assert (before != after).any()


def test_the_table_is_complete() -> None:
    named = {name.split("(")[0].split(",")[0] for name in (*KEEPS, *CHANGES)}
    calibrators = {
        name
        for name, value in vars(calibration).items()
        if isinstance(value, type) and issubclass(value, calibration.Calibrator) and name != "Calibrator"
    }
    assert calibrators - REGRESSION == named
