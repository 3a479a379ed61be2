"""Calibrators: maps fitted on held-out predictions that make a predictive honest."""

from bayesguard.calibration.base import Calibrator as Calibrator
from bayesguard.calibration.conformal import Conformal as Conformal
from bayesguard.calibration.conformal import ConformalInterval as ConformalInterval
from bayesguard.calibration.conformal import ConformalQuantile as ConformalQuantile
from bayesguard.calibration.ranks import conformal_quantile as conformal_quantile
from bayesguard.calibration.scaling import TemperatureScaling as TemperatureScaling
