"""Metrics: `functional` for plain tensors, `CalibrationState` for streams, and torchmetrics classes, which are loaded at first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bayesguard.metrics import functional as functional
from bayesguard.metrics.state import CalibrationState as CalibrationState

if TYPE_CHECKING:
    from bayesguard.metrics.classes import OODAUROC as OODAUROC
    from bayesguard.metrics.classes import Accuracy as Accuracy
    from bayesguard.metrics.classes import AreaUnderGeneralisedRiskCoverage as AreaUnderGeneralisedRiskCoverage
    from bayesguard.metrics.classes import AreaUnderRiskCoverage as AreaUnderRiskCoverage
    from bayesguard.metrics.classes import BrierDiscrimination as BrierDiscrimination
    from bayesguard.metrics.classes import BrierMiscalibration as BrierMiscalibration
    from bayesguard.metrics.classes import BrierScore as BrierScore
    from bayesguard.metrics.classes import CalibrationErrorAt as CalibrationErrorAt
    from bayesguard.metrics.classes import ClasswiseCalibrationError as ClasswiseCalibrationError
    from bayesguard.metrics.classes import ContinuousRankedProbabilityScore as ContinuousRankedProbabilityScore
    from bayesguard.metrics.classes import EnergyScore as EnergyScore
    from bayesguard.metrics.classes import ErrorAUROC as ErrorAUROC
    from bayesguard.metrics.classes import ExcessAreaUnderRiskCoverage as ExcessAreaUnderRiskCoverage
    from bayesguard.metrics.classes import ExpectedCalibrationError as ExpectedCalibrationError
    from bayesguard.metrics.classes import ExpectedNormalisedCalibrationError as ExpectedNormalisedCalibrationError
    from bayesguard.metrics.classes import IntervalCoverage as IntervalCoverage
    from bayesguard.metrics.classes import IntervalScore as IntervalScore
    from bayesguard.metrics.classes import IntervalWidth as IntervalWidth
    from bayesguard.metrics.classes import NegativeLogLikelihood as NegativeLogLikelihood
    from bayesguard.metrics.classes import OODAveragePrecision as OODAveragePrecision
    from bayesguard.metrics.classes import OODFalsePositiveRate as OODFalsePositiveRate
    from bayesguard.metrics.classes import QuantileCalibrationError as QuantileCalibrationError
    from bayesguard.metrics.classes import RootMeanSquaredError as RootMeanSquaredError
    from bayesguard.metrics.classes import SetCoverage as SetCoverage
    from bayesguard.metrics.classes import SetSize as SetSize
    from bayesguard.metrics.classes import SmoothCalibrationError as SmoothCalibrationError
    from bayesguard.metrics.classes import VariogramScore as VariogramScore
    from bayesguard.metrics.classes import WeightedIntervalScore as WeightedIntervalScore

_CLASSES = (
    "Accuracy",
    "AreaUnderGeneralisedRiskCoverage",
    "AreaUnderRiskCoverage",
    "BrierDiscrimination",
    "BrierMiscalibration",
    "BrierScore",
    "CalibrationErrorAt",
    "ClasswiseCalibrationError",
    "ContinuousRankedProbabilityScore",
    "EnergyScore",
    "ErrorAUROC",
    "ExcessAreaUnderRiskCoverage",
    "ExpectedCalibrationError",
    "ExpectedNormalisedCalibrationError",
    "IntervalCoverage",
    "IntervalScore",
    "IntervalWidth",
    "NegativeLogLikelihood",
    "OODAUROC",
    "OODAveragePrecision",
    "OODFalsePositiveRate",
    "QuantileCalibrationError",
    "RootMeanSquaredError",
    "SetCoverage",
    "SetSize",
    "SmoothCalibrationError",
    "VariogramScore",
    "WeightedIntervalScore",
)


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module 'bayesguard.metrics' has no attribute {name!r}")
    # torchmetrics takes seconds to import, and only people who stream need it.
    return getattr(import_module("bayesguard.metrics.classes"), name)


def __dir__() -> list[str]:
    return ["CalibrationState", "functional", *_CLASSES]
