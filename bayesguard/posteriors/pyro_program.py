"""A network with a prior over its weights as a Pyro program, and posteriors of weights as Pyro guides."""

from copy import copy, deepcopy
from functools import cache
from itertools import count
from types import new_class
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.guides import Delta, FullNormal, LowRankNormal, MeanFieldNormal
from bayesguard.layers import at_mean, bayesian_layers
from bayesguard.likelihoods import Likelihood
from bayesguard.sampling import Forward
from bayesguard.sampling.random_weights import RandomWeights
from bayesguard.weights import Weights

if TYPE_CHECKING:
    from bayesguard.posteriors.weight_predictor import WeightPredictor

_NUMBERS = count()


class NetworkProgram(nn.Module):
    """A Pyro model: `model(*inputs, targets=None)`, with a sample site for each random parameter, named as it is.

    The observed site is "obs", in a plate "examples" that scales a batch to the whole data. Everything else that is
    trained is a parameter of Pyro's, so that `pyro.infer.SVI` trains it. Made by `pyro_model(num_data)`.

    Args:
        predictor: A predictor with a prior over weights; its network is copied.
        num_data: Rows of the whole training set.
    """

    target_argument = "targets"

    def __init__(self, predictor: "WeightPredictor", num_data: int) -> None:
        super().__init__()
        self.num_data = check_count(num_data, "num_data")
        self.network, self.likelihood, self.prior = deepcopy((predictor.network, predictor.likelihood, predictor.prior))
        self.output = predictor.output
        self.weights = Weights(self.network, predictor.weights.names)
        for tensor in self.weights.tensors():
            tensor.requires_grad_(False)  # It stands for the sample, and is never used itself.
        for layer in bayesian_layers(self.network):
            layer.posterior.requires_grad_(False)
        # Two programs in one parameter store must not share parameters (Pyro issue 2912).
        self.name = f"bayesguard_{next(_NUMBERS)}"

    def forward(self, *inputs: Any, targets: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the raw outputs `[N, ...]` under one sample of the weights."""
        import pyro

        _register(self)
        samples = {}
        for name, tensor in self.weights.named().items():
            site = as_pyro(self.prior.distribution(name, tensor)).to_event(tensor.dim())
            samples[id(tensor)] = pyro.sample(name, site)
        with at_mean(), RandomWeights(samples):
            outputs = Forward(self.network, inputs, kwargs, self.output, copies=True)()
        component = _observed(self.likelihood, outputs)
        rows = len(outputs)
        if targets is None:
            plate = pyro.plate("examples", rows, dim=-1)
        else:
            targets = self.likelihood.check_targets(outputs, targets)
            plate = self._batch(rows, outputs.device)
        with plate:
            pyro.sample("obs", component.to_event(len(component.batch_shape) - 1), obs=targets)
        return outputs

    def _batch(self, rows: int, device: torch.device) -> Any:
        import pyro

        if rows > self.num_data:
            raise BadInput(f"the batch has {rows} rows, and the program was made for num_data={self.num_data}")
        return pyro.plate("examples", self.num_data, subsample=torch.arange(rows, device=device), dim=-1)


class WeightGuide(nn.Module):
    """A Pyro guide: a posterior of weights from `bayesguard.guides`, with the sites of `NetworkProgram`.

    Independent Gaussians are a site for each tensor, so that Pyro's closed-form divergences apply. Other families draw all
    weights at one auxiliary site, "_weights".

    Args:
        predictor: A fitted or new `Variational`; its guide and network are copied.

    Raises:
        BadInput: A family without a density that Pyro could use.
    """

    def __init__(self, predictor: Any) -> None:
        super().__init__()
        self.network, self.family = deepcopy((predictor.network, predictor.guide))
        if not isinstance(self.family, (MeanFieldNormal, LowRankNormal, FullNormal, Delta)):
            raise BadInput(
                f"a {type(self.family).__name__} posterior has no Pyro guide; choose guide='normal', 'low_rank', 'full' or "
                "'delta', or one of pyro.infer.autoguide over the program of pyro_model(num_data)"
            )
        random = set(map(id, self.family.weights.tensors()))
        for parameter in self.network.parameters():
            parameter.requires_grad_(id(parameter) in random)
        self.name = f"bayesguard_{next(_NUMBERS)}"

    def forward(self, *inputs: Any, targets: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Return a sample of the weights by name."""
        import pyro
        import pyro.distributions

        distributions: Any = pyro.distributions
        _register(self)
        weights = self.family.weights
        if isinstance(self.family, MeanFieldNormal):
            stddevs = weights.unflatten(self.family.stddev())
            means = weights.named()
            return {
                name: pyro.sample(name, distributions.Normal(means[name], stddevs[name]).to_event(means[name].dim()))
                for name in weights.names
            }
        flat = self._joint()
        return {
            name: pyro.sample(name, distributions.Delta(part, event_dim=part.dim()))
            for name, part in weights.unflatten(flat).items()
        }

    def _joint(self) -> Tensor:
        import pyro
        import pyro.distributions as distributions

        family, mean = self.family, self.family.weights.flatten()
        if isinstance(family, Delta):
            return mean
        joint: Any
        if isinstance(family, LowRankNormal):
            joint = as_pyro(family.distribution())
        else:
            joint = distributions.MultivariateNormal(mean, scale_tril=family._factor())
        flat: Tensor = pyro.sample("_weights", joint, infer={"is_auxiliary": True})
        return flat


def parameters_for_store(program: NetworkProgram | WeightGuide) -> dict[str, Tensor]:
    """Return what a program trains, by the names under which it registers it in Pyro's store."""
    return {f"{program.name}.{name}": p for name, p in program.named_parameters() if p.requires_grad}


def _register(program: NetworkProgram | WeightGuide) -> None:
    import pyro

    for name, parameter in parameters_for_store(program).items():
        pyro.param(name, parameter)


def as_pyro(distribution: Distribution) -> Any:
    """Return the distribution with the methods that Pyro's sample sites need; it stays of its torch class."""
    made = copy(distribution)
    kind: Any = type(distribution)
    made.__class__ = _with_pyro(kind)
    return made


def _observed(likelihood: Likelihood, outputs: Tensor) -> Any:
    """Return the distribution of the targets for Pyro, with the likelihood's own density.

    Torch's loses digits, and the gradient of a Poisson rate that underflows.
    """
    made = as_pyro(likelihood.distribution(outputs))
    made.likelihood, made.outputs = likelihood, outputs
    made.__class__ = _of_likelihood(made.__class__)
    return made


@cache
def _with_pyro(kind: Any) -> Any:
    from pyro.distributions.torch_distribution import TorchDistributionMixin

    return new_class(kind.__name__, (kind, TorchDistributionMixin))


@cache
def _of_likelihood(kind: Any) -> Any:
    def log_prob(self: Any, value: Tensor) -> Any:
        return self.likelihood._density(self.outputs, value)

    def expand(self: Any, batch_shape: Any, _instance: Any = None) -> Any:
        # Pyro expands to the shape of its plates, mostly the one that it has; in another it is torch's own.
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        plain = copy(self)
        plain.__class__ = kind
        return plain.expand(batch_shape, _instance)

    return new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(log_prob=log_prob, expand=expand))
