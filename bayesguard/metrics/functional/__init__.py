"""Metrics as functions of plain tensors or arrays; sums in float64, 0-d results."""

from bayesguard.metrics.functional.binned import BinnedSums as BinnedSums
from bayesguard.metrics.functional.binned import ReliabilityBins as ReliabilityBins
from bayesguard.metrics.functional.calibration import binary_calibration_error as binary_calibration_error
from bayesguard.metrics.functional.calibration import classwise_calibration_error as classwise_calibration_error
from bayesguard.metrics.functional.calibration import expected_calibration_error as expected_calibration_error
from bayesguard.metrics.functional.calibration import reliability_bins as reliability_bins
from bayesguard.metrics.functional.classification import BrierDecomposition as BrierDecomposition
from bayesguard.metrics.functional.classification import accuracy as accuracy
from bayesguard.metrics.functional.classification import brier_decomposition as brier_decomposition
from bayesguard.metrics.functional.classification import brier_score as brier_score
from bayesguard.metrics.functional.classification import negative_log_likelihood as negative_log_likelihood
from bayesguard.metrics.functional.regression import (
    continuous_ranked_probability_score as continuous_ranked_probability_score,
)
from bayesguard.metrics.functional.regression import interval_coverage as interval_coverage
from bayesguard.metrics.functional.regression import interval_score as interval_score
from bayesguard.metrics.functional.regression import interval_width as interval_width
from bayesguard.metrics.functional.regression import pit as pit
from bayesguard.metrics.functional.regression import quantile_calibration_error as quantile_calibration_error
from bayesguard.metrics.functional.regression import root_mean_squared_error as root_mean_squared_error
from bayesguard.metrics.functional.selective import RiskCoverage as RiskCoverage
from bayesguard.metrics.functional.selective import area_under_risk_coverage as area_under_risk_coverage
from bayesguard.metrics.functional.selective import area_under_roc as area_under_roc
from bayesguard.metrics.functional.selective import error_auroc as error_auroc
from bayesguard.metrics.functional.selective import ood_auroc as ood_auroc
from bayesguard.metrics.functional.selective import risk_coverage as risk_coverage
