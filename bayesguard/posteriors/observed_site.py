"""The observed site of a Pyro program, read as a likelihood: whatever distribution it has becomes the predictive."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, MixtureSameFamily

from bayesguard import likelihoods
from bayesguard.errors import BadInput, BadType, NotFitted
from bayesguard.predictive import ContinuousPredictive, CountPredictive, Predictive
from bayesguard.predictive.components import parameters, rebuild


class ObservedSite(likelihoods.Likelihood):
    """The likelihood that a program states itself.

    Its raw outputs are the logits of classes or labels; of other families the parameters, stacked on a last axis in the
    order of `names`.

    Attributes:
        names: The parameters that the last axis holds.
    """

    def __init__(self) -> None:
        super().__init__()
        # In a list, so that a prediction adds no submodule.
        self._family: list[likelihoods.Likelihood | Distribution] = []
        self.names: tuple[str, ...] = ()

    def outputs_of(self, site: Any) -> Tensor:
        """Return the raw outputs `[N, ...]` that stand for a site's distribution, and remember its family.

        Raises:
            BadType: A distribution that no predictive can be made of.
        """
        distribution = _univariate(site)
        if isinstance(distribution, (Categorical, Bernoulli)):
            classes = isinstance(distribution, Categorical)
            self._family = [likelihoods.Categorical() if classes else likelihoods.Bernoulli()]
            logits: Tensor = distribution.logits
            return logits
        distribution = _plain(distribution)
        named = parameters(distribution)
        # Values stay out of it: of one program there is one family.
        self.names = tuple(named)
        self._family = [rebuild(distribution, {name: value.detach()[..., :0] for name, value in named.items()})]
        return torch.stack(list(named.values()), dim=-1)

    @property
    def family(self) -> likelihoods.Likelihood | Distribution:
        """What stands for the distribution: a likelihood for classes and labels, otherwise one of its kind.

        Raises:
            NotFitted: The program has not been run yet.
        """
        if not self._family:
            raise NotFitted("the program has not been run yet, so that its observed site is not known; predict first")
        return self._family[0]

    def distribution(self, outputs: Tensor) -> Distribution:
        if isinstance(self.family, likelihoods.Likelihood):
            return self.family.distribution(outputs)
        values = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
        return rebuild(self.family, dict(zip(self.names, values.unbind(-1), strict=True)))

    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if isinstance(self.family, likelihoods.Likelihood):
            return self.family.check_targets(outputs, targets)
        return targets.to(self.distribution(outputs).mean.dtype)

    def predictive(self, outputs: Tensor, weights: Tensor | None = None, *, exact: bool = False) -> Predictive:
        if isinstance(self.family, likelihoods.Likelihood):
            return self.family.predictive(outputs, weights, exact=exact)
        component = self.distribution(outputs)
        counts = getattr(component.support, "is_discrete", False)
        kind = CountPredictive if counts else ContinuousPredictive
        return kind(component, weights, exact=exact)


def _univariate(distribution: Any) -> Distribution:
    """The distribution of single targets: without declared event axes and masks."""
    while type(distribution).__name__ in ("Independent", "MaskedDistribution"):
        distribution = distribution.base_dist
    if type(distribution).__name__ == "Delta":
        raise BadType("the observed site is a Delta: a point has no likelihood; observe a distribution around it")
    if distribution.event_shape:
        raise BadType(
            f"the observed site is a {type(distribution).__name__} over {tuple(distribution.event_shape)} numbers at once; "
            "predictives are of single targets: observe Categorical, Bernoulli, Normal, StudentT, Poisson, ..., with "
            ".to_event() where there are several"
        )
    if not distribution.batch_shape:
        raise BadInput("the observed site has no axis of examples; put it in a plate over the rows of the inputs")
    own: Distribution = distribution
    return own


def _plain(distribution: Any) -> Any:
    """The torch distribution that one of Pyro's extends, so that predictives do not depend on Pyro."""
    from pyro.distributions.torch_distribution import TorchDistributionMixin

    if isinstance(distribution, MixtureSameFamily):
        mixing = Categorical(logits=distribution.mixture_distribution.logits, validate_args=False)
        return MixtureSameFamily(mixing, _plain(distribution.component_distribution), validate_args=False)
    kind: Any = next(kind for kind in type(distribution).__mro__ if not issubclass(kind, TorchDistributionMixin))
    return kind(**parameters(distribution), validate_args=False)
