"""What every Bayesian layer shares: torch's own layer, run under a sample of its weights."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesguard.errors import BadInput
from bayesguard.guides import Guide, MeanFieldNormal, make_guide
from bayesguard.priors import Prior, check_prior
from bayesguard.sampling import stream
from bayesguard.sampling.estimators import Estimator, Moments, check_estimator, random_weights
from bayesguard.weights import Weights


class _Drawing(threading.local):
    """How layers of this thread draw: each call anew, at the mean, or one function of a seed."""

    def __init__(self) -> None:
        self.seed: int | None = None
        self.at_mean = False
        self.samples: dict[int, Tensor] = {}


_DRAWING = _Drawing()


class BayesianLayer(nn.Module):
    """Mixed in before a layer of torch's: its parameters become the means of a distribution.

    The layer keeps torch's parameters under torch's names, so that a state dict of the plain layer has its means. What
    describes the spread is in `posterior`. Every call draws, in training and in evaluation, unless it is made `at_mean()`
    or with a `fixed_draw(seed)`.
    """

    posterior: Guide
    prior: Prior
    estimator: Estimator

    def make_bayesian(
        self, prior: Prior | None, posterior: str, estimator: Estimator, init_scale: float, relative: bool = False
    ) -> None:
        """Give the layer, whose parameters are there, a distribution over those that require gradients."""
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if not own:
            raise BadInput(f"a {type(self).__name__} layer has no parameter that requires gradients")
        self.prior, self.estimator = check_prior(prior), check_estimator(estimator)
        self.posterior = make_guide(posterior, Weights(self, list(own)), init_scale=init_scale, relative=relative)
        if estimator != "shared" and not isinstance(self.posterior, MeanFieldNormal):
            raise BadInput(f'estimator={estimator!r} needs posterior="normal", got {posterior!r}; use "shared"')

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what torch's layer returns, under a sample of its weights."""
        if _DRAWING.at_mean:
            return super().forward(*args, **kwargs)
        weights = self.posterior.weights
        tensors = weights.tensors()
        samples = dict(zip(map(id, tensors), weights.split(self._sample()), strict=True))
        moments = None
        if self.estimator != "shared" and _DRAWING.seed is None:
            stddevs = weights.split(self.posterior.stddev())
            moments = {id(t): Moments(t, stddev) for t, stddev in zip(tensors, stddevs, strict=True)}
        with random_weights("shared" if moments is None else self.estimator, samples, moments):
            return super().forward(*args, **kwargs)

    def _sample(self) -> Tensor:
        if _DRAWING.seed is None:
            return self.posterior.draw()
        key = id(self.posterior)
        if key not in _DRAWING.samples:
            # Layers are numbered in the order in which a function first calls them: the same in every batch.
            number = len(_DRAWING.samples)
            device = self.posterior.weights.slots[0].tensor.device
            _DRAWING.samples[key] = self.posterior.draw(stream(device, _DRAWING.seed, "layer", number))
        return _DRAWING.samples[key]


@contextmanager
def at_mean() -> Iterator[None]:
    """Run Bayesian layers at the mean of their weights, in this thread."""
    before, _DRAWING.at_mean = _DRAWING.at_mean, True
    try:
        yield
    finally:
        _DRAWING.at_mean = before


@contextmanager
def fixed_draw(seed: int) -> Iterator[None]:
    """Run Bayesian layers of this thread as one function: every call in the block has the same weights.

    The same seed gives the same function, as long as layers are first called in the same order.
    """
    before = _DRAWING.seed, _DRAWING.samples
    _DRAWING.seed, _DRAWING.samples = seed, {}
    try:
        yield
    finally:
        _DRAWING.seed, _DRAWING.samples = before


def bayesian_layers(module: nn.Module) -> list[BayesianLayer]:
    """Return the Bayesian layers of a module, each once."""
    return [layer for layer in module.modules() if isinstance(layer, BayesianLayer)]


def kl_divergence(module: nn.Module) -> Tensor:
    """Return the divergence of all Bayesian layers from their priors in nats: every weight once.

    In closed form where there is one (see `guides.Guide.kl`), otherwise estimated with one sample.

    Raises:
        BadInput: The module has no Bayesian layer.

    Examples:
        >>> import torch
        >>> from bayesguard import layers
        >>> bool(layers.kl_divergence(layers.Linear(3, 2)) > 0)
        True
    """
    found = bayesian_layers(module)
    if not found:
        raise BadInput(
            "the module has no Bayesian layer; build it of bayesguard.layers, or use layers.convert(network)"
        )
    return torch.stack([layer.posterior.draw_with_kl(layer.prior)[1] for layer in found]).sum()
