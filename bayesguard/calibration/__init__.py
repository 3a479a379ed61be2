"""Calibrators: maps fitted on held-out predictions that make a predictive honest."""

from bayesguard.calibration.base import Calibrator as Calibrator
from bayesguard.calibration.binary import BetaCalibration as BetaCalibration
from bayesguard.calibration.binary import PlattScaling as PlattScaling
from bayesguard.calibration.binning import HistogramBinning as HistogramBinning
from bayesguard.calibration.binning import IsotonicCalibration as IsotonicCalibration
from bayesguard.calibration.conformal import Conformal as Conformal
from bayesguard.calibration.conformal import ConformalInterval as ConformalInterval
from bayesguard.calibration.conformal import ConformalQuantile as ConformalQuantile
from bayesguard.calibration.density_ratio import DensityRatio as DensityRatio
from bayesguard.calibration.density_ratio import density_ratio as density_ratio
from bayesguard.calibration.label_shift import PriorCorrection as PriorCorrection
from bayesguard.calibration.linear import DirichletCalibration as DirichletCalibration
from bayesguard.calibration.linear import MatrixScaling as MatrixScaling
from bayesguard.calibration.linear import VectorScaling as VectorScaling
from bayesguard.calibration.online import AdaptiveConformal as AdaptiveConformal
from bayesguard.calibration.ranks import conformal_quantile as conformal_quantile
from bayesguard.calibration.regression import CDFCalibration as CDFCalibration
from bayesguard.calibration.regression import VarianceScaling as VarianceScaling
from bayesguard.calibration.scaling import TemperatureScaling as TemperatureScaling
from bayesguard.calibration.selective import SelectiveClassifier as SelectiveClassifier
from bayesguard.calibration.selective import risk_controlled_threshold as risk_controlled_threshold
from bayesguard.calibration.shift_aware import ShiftAwareScaling as ShiftAwareScaling
