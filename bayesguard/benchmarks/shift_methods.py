"""The methods of the shift benchmark, from a factory of networks; others than CIFAR-10's, which are in `recipes`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

import bayesguard as bg
from bayesguard.benchmarks.augmentation import augmix
from bayesguard.benchmarks.networks import seeded
from bayesguard.predictor import Predictor
from bayesguard.sampling import derive_seed

Make = Callable[[int], nn.Module]
# Trains a predictor; where it is told `augment=`, on images that are augmented so.
Fit = Callable[..., object]

_DRAWS, _MEMBERS, _DRAWS_OF_MEMBER = 32, 5, 8
# Of the first deviations: the few hundred steps of a small set leave wider ones no time to shrink.
_SCALE = math.exp(-5)


def deterministic(make: Make, seed: int, fit: Fit) -> Predictor:
    """One trained network."""
    predictor = bg.Deterministic(seeded(make, seed), seed=seed)
    fit(predictor)
    return predictor


def mc_dropout(make: Make, seed: int, fit: Fit) -> Predictor:
    """The same network with its dropout left on."""
    predictor = bg.MCDropout(seeded(make, seed), num_samples=_DRAWS, seed=seed)
    fit(predictor)
    return predictor


def deep_ensemble(make: Make, seed: int, fit: Fit) -> Predictor:
    """Five networks from five starts."""
    predictor = bg.DeepEnsemble(make, num_members=_MEMBERS, seed=seed)
    fit(predictor)
    return predictor


def variational(make: Make, seed: int, fit: Fit) -> Predictor:
    """A normal distribution over every weight."""
    predictor = _variational(make, seed, estimator="flipout")
    fit(predictor)
    return predictor


def last_layer_variational(make: Make, seed: int, fit: Fit) -> Predictor:
    """A normal distribution over the weights of the last layer; the others are trained with it."""
    predictor = _variational(make, seed, subset_of_weights="last_layer")
    fit(predictor)
    return predictor


def dropout_ensemble(make: Make, seed: int, fit: Fit) -> Predictor:
    """Five networks from five starts, each with its dropout left on."""
    seeds = [derive_seed(seed, "member", index) for index in range(_MEMBERS)]
    members = [bg.MCDropout(seeded(make, own), num_samples=_DRAWS_OF_MEMBER, seed=own) for own in seeds]
    predictor = bg.DeepEnsemble(members, seed=seed, copy=False)
    fit(predictor)
    return predictor


def augmix_last_layer(make: Make, seed: int, fit: Fit) -> Predictor:
    """A network trained with AugMix, with a normal distribution over the weights of its last layer."""
    predictor = _variational(make, seed, subset_of_weights="last_layer")
    fit(predictor, augment=augmix)
    return predictor


class Method(NamedTuple):
    """A method: its name in tables, what builds and trains it, and whether it is calibrated by `ShiftAwareScaling`, too."""

    label: str
    build: Callable[[Make, int, Fit], Predictor]
    shift_aware: bool = False


METHODS: dict[str, Method] = {
    "deterministic": Method("Deterministic", deterministic),
    "mc_dropout": Method("MCDropout", mc_dropout),
    "deep_ensemble": Method("DeepEnsemble", deep_ensemble),
    "variational": Method("Variational", variational),
    "last_layer_variational": Method("Variational, last layer", last_layer_variational),
    "dropout_ensemble": Method("DeepEnsemble of MCDropout", dropout_ensemble, shift_aware=True),
    "augmix_last_layer": Method("AugMix, variational last layer", augmix_last_layer, shift_aware=True),
}


def _variational(make: Make, seed: int, **options: Any) -> bg.Variational:
    network = _without_dropout(seeded(make, seed))
    return bg.Variational(network, init_scale=_SCALE, num_samples=_DRAWS, seed=seed, **options)


def _without_dropout(network: nn.Module) -> nn.Module:
    """The noise of these methods is that of the weights; dropout beside it would be counted twice."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network
