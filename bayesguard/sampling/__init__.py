"""The engine: S outputs of a stochastic network in one bounded-memory pass."""

from bayesguard.sampling.engine import Sampler as Sampler
from bayesguard.sampling.engine import Strategy as Strategy
from bayesguard.sampling.engine import silent_layers as silent_layers
from bayesguard.sampling.forward import Forward as Forward
from bayesguard.sampling.forward import Select as Select
from bayesguard.sampling.forward import own_network as own_network
from bayesguard.sampling.forward import select_output as select_output
from bayesguard.sampling.memory import free_memory as free_memory
from bayesguard.sampling.planning import Plan as Plan
from bayesguard.sampling.strategies import Structure as Structure
from bayesguard.sampling.streams import derive_seed as derive_seed
from bayesguard.sampling.streams import seeded_default_generators as seeded_default_generators
from bayesguard.sampling.streams import stream as stream
