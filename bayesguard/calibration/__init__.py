"""Calibrators: maps fitted on held-out predictions that make a predictive honest."""

from bayesguard.calibration.base import Calibrator as Calibrator
from bayesguard.calibration.scaling import TemperatureScaling as TemperatureScaling
