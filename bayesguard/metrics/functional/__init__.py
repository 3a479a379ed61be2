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
from bayesguard.metrics.functional.decision import DecisionRegret as DecisionRegret
from bayesguard.metrics.functional.decision import ThresholdCalibration as ThresholdCalibration
from bayesguard.metrics.functional.decision import binary_calibration_error_at as binary_calibration_error_at
from bayesguard.metrics.functional.decision import calibration_error_at as calibration_error_at
from bayesguard.metrics.functional.decision import decision_regret as decision_regret
from bayesguard.metrics.functional.decomposition import ScoreDecomposition as ScoreDecomposition
from bayesguard.metrics.functional.decomposition import corp_brier_decomposition as corp_brier_decomposition
from bayesguard.metrics.functional.decomposition import corp_log_score_decomposition as corp_log_score_decomposition
from bayesguard.metrics.functional.decomposition import crps_decomposition as crps_decomposition
from bayesguard.metrics.functional.groups import GroupCalibration as GroupCalibration
from bayesguard.metrics.functional.groups import group_calibration as group_calibration
from bayesguard.metrics.functional.multivariate import UniformityTest as UniformityTest
from bayesguard.metrics.functional.multivariate import energy_score as energy_score
from bayesguard.metrics.functional.multivariate import (
    expected_normalised_calibration_error as expected_normalised_calibration_error,
)
from bayesguard.metrics.functional.multivariate import pit_uniformity_test as pit_uniformity_test
from bayesguard.metrics.functional.multivariate import variogram_score as variogram_score
from bayesguard.metrics.functional.multivariate import weighted_interval_score as weighted_interval_score
from bayesguard.metrics.functional.null import CalibrationErrorNull as CalibrationErrorNull
from bayesguard.metrics.functional.null import calibration_error_null as calibration_error_null
from bayesguard.metrics.functional.ood import area_under_precision_recall as area_under_precision_recall
from bayesguard.metrics.functional.ood import false_positive_rate_at as false_positive_rate_at
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
from bayesguard.metrics.functional.selective import (
    area_under_generalised_risk_coverage as area_under_generalised_risk_coverage,
)
from bayesguard.metrics.functional.selective import area_under_risk_coverage as area_under_risk_coverage
from bayesguard.metrics.functional.selective import area_under_roc as area_under_roc
from bayesguard.metrics.functional.selective import error_auroc as error_auroc
from bayesguard.metrics.functional.selective import excess_area_under_risk_coverage as excess_area_under_risk_coverage
from bayesguard.metrics.functional.selective import ood_auroc as ood_auroc
from bayesguard.metrics.functional.selective import risk_coverage as risk_coverage
from bayesguard.metrics.functional.sets import SlabCoverage as SlabCoverage
from bayesguard.metrics.functional.sets import StratifiedCoverage as StratifiedCoverage
from bayesguard.metrics.functional.sets import class_conditional_coverage as class_conditional_coverage
from bayesguard.metrics.functional.sets import set_coverage as set_coverage
from bayesguard.metrics.functional.sets import set_size as set_size
from bayesguard.metrics.functional.sets import size_stratified_coverage as size_stratified_coverage
from bayesguard.metrics.functional.sets import worst_slab_coverage as worst_slab_coverage
from bayesguard.metrics.functional.smooth import binary_smooth_calibration_error as binary_smooth_calibration_error
from bayesguard.metrics.functional.smooth import calibration_test as calibration_test
from bayesguard.metrics.functional.smooth import kernel_calibration_error as kernel_calibration_error
from bayesguard.metrics.functional.smooth import smooth_calibration_error as smooth_calibration_error
from bayesguard.metrics.functional.weights import effective_sample_size as effective_sample_size
