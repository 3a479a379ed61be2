"""Predictive distributions: finite mixtures over posterior draws, with the decomposition of their uncertainty."""

from bayesguard.predictive.base import Decomposition as Decomposition
from bayesguard.predictive.base import Predictive as Predictive
from bayesguard.predictive.bernoulli import BernoulliPredictive as BernoulliPredictive
from bayesguard.predictive.categorical import CategoricalPredictive as CategoricalPredictive
from bayesguard.predictive.combine import Gathering as Gathering
from bayesguard.predictive.combine import Reduction as Reduction
from bayesguard.predictive.combine import concatenate as concatenate
from bayesguard.predictive.combine import mixture as mixture
from bayesguard.predictive.continuous import ContinuousPredictive as ContinuousPredictive
from bayesguard.predictive.count import CountPredictive as CountPredictive
from bayesguard.predictive.recalibrated import RecalibratedPredictive as RecalibratedPredictive
from bayesguard.predictive.samples import SamplePredictive as SamplePredictive
