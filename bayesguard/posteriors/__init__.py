"""One approximation of the posterior a file."""

from bayesguard.posteriors.deterministic import Deterministic as Deterministic
from bayesguard.posteriors.dropout import MCDropout as MCDropout
from bayesguard.posteriors.ensemble import DeepEnsemble as DeepEnsemble
from bayesguard.posteriors.nuts import HMC as HMC
from bayesguard.posteriors.nuts import NUTS as NUTS
from bayesguard.posteriors.pyro_predictor import PyroPredictor as PyroPredictor
from bayesguard.posteriors.variational import Variational as Variational

# Found here by the contract suite, so that a new method cannot be forgotten.
_METHODS = (Deterministic, MCDropout, DeepEnsemble, Variational, NUTS, HMC, PyroPredictor)
REGISTRY = {cls.__name__: cls for cls in _METHODS}
