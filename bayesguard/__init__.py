"""bayesguard: predictive distributions whose confidence can be believed, for any torch network."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from bayesguard import calibration as calibration
    from bayesguard import guides as guides
    from bayesguard import layers as layers
    from bayesguard import likelihoods as likelihoods
    from bayesguard import metrics as metrics
    from bayesguard import plots as plots
    from bayesguard import posteriors as posteriors
    from bayesguard import predictive as predictive
    from bayesguard import priors as priors
    from bayesguard import report as report
    from bayesguard import sampling as sampling
    from bayesguard import shift as shift
    from bayesguard import testing as testing
    from bayesguard.balanced import BalancedSampler as BalancedSampler
    from bayesguard.comparison import compare as compare
    from bayesguard.evaluation import evaluate as evaluate
    from bayesguard.monitor import CalibrationMonitor as CalibrationMonitor
    from bayesguard.network_features import features as features
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
    from bayesguard.stacking import stack as stack

__version__ = "0.1.0.dev0"

# Where the other names live, loaded at their first use: whoever wants a metric does not wait for the predictors.
_MODULES = (
    *("calibration", "guides", "layers", "likelihoods", "metrics", "plots", "posteriors", "predictive", "priors"),
    *("report", "sampling", "shift", "testing"),
)
_NAMES = {
    **dict.fromkeys(
        ("HMC", "NUTS", "DeepEnsemble", "Deterministic", "MCDropout", "PyroPredictor", "Variational"), "posteriors"
    ),
    "BalancedSampler": "balanced",
    "CalibrationMonitor": "monitor",
    "Decomposition": "predictive",
    "Predictive": "predictive",
    "Predictor": "predictor",
    "compare": "comparison",
    "evaluate": "evaluation",
    "features": "network_features",
    "stack": "stacking",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":  # what `import *` asks for
        return __dir__()
    if name in _MODULES:
        return import_module(f"bayesguard.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'bayesguard' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"bayesguard.{_NAMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    own = {name for name in globals() if not name.startswith("_")} - {"import_module", "TYPE_CHECKING", "Any"}
    return sorted({*own, *_MODULES, *_NAMES})
