"""bayesguard: predictive distributions whose confidence can be believed, for any torch network."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bayesguard import calibration as calibration
from bayesguard import guides as guides
from bayesguard import layers as layers
from bayesguard import likelihoods as likelihoods
from bayesguard import metrics as metrics
from bayesguard import priors as priors
from bayesguard import shift as shift
from bayesguard.balanced import BalancedSampler as BalancedSampler
from bayesguard.errors import BadFile as BadFile
from bayesguard.errors import BadInput as BadInput
from bayesguard.errors import BadType as BadType
from bayesguard.errors import BayesguardError as BayesguardError
from bayesguard.errors import BayesguardWarning as BayesguardWarning
from bayesguard.errors import CalibrationWarning as CalibrationWarning
from bayesguard.errors import ConvergenceWarning as ConvergenceWarning
from bayesguard.errors import IdenticalDraws as IdenticalDraws
from bayesguard.errors import NotFitted as NotFitted
from bayesguard.errors import RandomnessWarning as RandomnessWarning
from bayesguard.errors import UnsupportedNetwork as UnsupportedNetwork
from bayesguard.posteriors import HMC as HMC
from bayesguard.posteriors import NUTS as NUTS
from bayesguard.posteriors import DeepEnsemble as DeepEnsemble
from bayesguard.posteriors import Deterministic as Deterministic
from bayesguard.posteriors import MCDropout as MCDropout
from bayesguard.posteriors import PyroPredictor as PyroPredictor
from bayesguard.posteriors import Variational as Variational
from bayesguard.predictive import Decomposition as Decomposition
from bayesguard.predictive import Predictive as Predictive
from bayesguard.predictor import Predictor as Predictor

if TYPE_CHECKING:
    from bayesguard import plots as plots
    from bayesguard import report as report
    from bayesguard import testing as testing
    from bayesguard.comparison import compare as compare
    from bayesguard.evaluation import evaluate as evaluate
    from bayesguard.monitor import CalibrationMonitor as CalibrationMonitor
    from bayesguard.network_features import features as features
    from bayesguard.stacking import stack as stack

__version__ = "0.1.0.dev0"

# Needed after training only, and not by everybody: loaded at first use.
_LAZY = {
    "evaluate": "evaluation",
    "features": "network_features",
    "compare": "comparison",
    "stack": "stacking",
    "CalibrationMonitor": "monitor",
    "plots": "",
    "report": "",
    "testing": "",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'bayesguard' has no attribute {name!r}")
    module = import_module(f"bayesguard.{_LAZY[name] or name}")
    return getattr(module, name) if _LAZY[name] else module


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if not name.startswith("_")), *_LAZY})
