"""The metrics as torchmetrics classes: updated batch by batch, merged over processes, float64 inside."""

from bayesguard.metrics.classes.calibration import BrierDiscrimination as BrierDiscrimination
from bayesguard.metrics.classes.calibration import BrierMiscalibration as BrierMiscalibration
from bayesguard.metrics.classes.calibration import CalibrationErrorAt as CalibrationErrorAt
from bayesguard.metrics.classes.calibration import ClasswiseCalibrationError as ClasswiseCalibrationError
from bayesguard.metrics.classes.calibration import ExpectedCalibrationError as ExpectedCalibrationError
from bayesguard.metrics.classes.calibration import SmoothCalibrationError as SmoothCalibrationError
from bayesguard.metrics.classes.classification import Accuracy as Accuracy
from bayesguard.metrics.classes.classification import BrierScore as BrierScore
from bayesguard.metrics.classes.classification import NegativeLogLikelihood as NegativeLogLikelihood
from bayesguard.metrics.classes.classification import SetCoverage as SetCoverage
from bayesguard.metrics.classes.classification import SetSize as SetSize
from bayesguard.metrics.classes.ranking import OODAUROC as OODAUROC
from bayesguard.metrics.classes.ranking import AreaUnderGeneralisedRiskCoverage as AreaUnderGeneralisedRiskCoverage
from bayesguard.metrics.classes.ranking import AreaUnderRiskCoverage as AreaUnderRiskCoverage
from bayesguard.metrics.classes.ranking import ErrorAUROC as ErrorAUROC
from bayesguard.metrics.classes.ranking import ExcessAreaUnderRiskCoverage as ExcessAreaUnderRiskCoverage
from bayesguard.metrics.classes.ranking import OODAveragePrecision as OODAveragePrecision
from bayesguard.metrics.classes.ranking import OODFalsePositiveRate as OODFalsePositiveRate
from bayesguard.metrics.classes.regression import ContinuousRankedProbabilityScore as ContinuousRankedProbabilityScore
from bayesguard.metrics.classes.regression import EnergyScore as EnergyScore
from bayesguard.metrics.classes.regression import (
    ExpectedNormalisedCalibrationError as ExpectedNormalisedCalibrationError,
)
from bayesguard.metrics.classes.regression import IntervalCoverage as IntervalCoverage
from bayesguard.metrics.classes.regression import IntervalScore as IntervalScore
from bayesguard.metrics.classes.regression import IntervalWidth as IntervalWidth
from bayesguard.metrics.classes.regression import QuantileCalibrationError as QuantileCalibrationError
from bayesguard.metrics.classes.regression import RootMeanSquaredError as RootMeanSquaredError
from bayesguard.metrics.classes.regression import VariogramScore as VariogramScore
from bayesguard.metrics.classes.regression import WeightedIntervalScore as WeightedIntervalScore
