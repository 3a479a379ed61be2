"""How networks for CIFAR-10 are trained, and every method built from them.

The recipe: stochastic gradient descent with Nesterov momentum, a learning rate that rises for a twentieth of the epochs and
falls along a cosine to zero, batches of 256 that are mirrored and cut at random on the device, with the channels of images
last in memory. On CUDA under autocast to bfloat16.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import bayesguard as bg
from bayesguard.benchmarks.augmented import AUGMENTATIONS, Augmentation, training_batches
from bayesguard.benchmarks.datasets import ImageSet, Part
from bayesguard.benchmarks.residual import NETWORKS
from bayesguard.predictor import Predictor
from bayesguard.sampling import derive_seed, seeded_default_generators

EPOCHS = 80
BATCH_SIZE = 256
LEARNING_RATE = 0.2
WEIGHT_DECAY = 5e-4
# Of the variational methods, for whose weights the prior stands in the place of weight decay.
ADAM_LEARNING_RATE = 1e-3
AUGMENT = "flip_crop"
# The rates that Ovadia et al. (2019) tuned for CIFAR-10.
DROPOUT, LAST_LAYER_DROPOUT = 0.055, 0.32
_DRAWS_OF_MEMBER = 16


def warm_cosine(epoch: int, epochs: int) -> float:
    """Return the factor on the learning rate in an epoch, counted from 0.

    Examples:
        >>> [round(warm_cosine(epoch, 40), 3) for epoch in (0, 1, 2, 21, 39)]
        [0.333, 0.667, 1.0, 0.5, 0.002]
    """
    rising = epochs // 20
    if epoch < rising:
        return (epoch + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (epoch - rising) / (epochs - rising)))


def fit(
    predictor: Predictor,
    part: Part,
    *,
    epochs: int,
    device: torch.device,
    augment: Augmentation = AUGMENTATIONS[AUGMENT],
    adam: bool = False,
    precision: str | None = None,
) -> None:
    """Train a predictor by the recipe; with `adam` by Adam in place of stochastic gradient descent.

    `precision` is that of `Predictor.fit`; None for bfloat16 on CUDA and float32 elsewhere.
    """
    predictor.to(device)
    images, labels = (tensor.to(device) for tensor in part)
    optimizer: Callable[..., Optimizer] = (
        partial(torch.optim.Adam, lr=ADAM_LEARNING_RATE)
        if adam
        else partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    )
    with training_batches(predictor, images, labels, BATCH_SIZE, augment, channels_last=True) as batches:
        predictor.fit(
            batches,
            epochs=epochs,
            optimizer=optimizer,
            scheduler=partial(LambdaLR, lr_lambda=partial(warm_cosine, epochs=epochs)),
            precision=precision or ("bfloat16" if device.type == "cuda" else None),
        )


@dataclass(frozen=True)
class Plan:
    """What a method is built from: the network, the data, and how much of everything."""

    network: str
    images: ImageSet
    device: torch.device
    seed: int
    epochs: int
    members: int
    draws: int
    augment: str = AUGMENT
    precision: str | None = None

    def make(self, seed: int, rate: float = 0.0, head_rate: float = 0.0) -> nn.Module:
        """Return the network from a start of its own."""
        _, channels, side, _ = self.images.train[0].shape
        with seeded_default_generators(torch.device("cpu"), seed, "network"):
            network = NETWORKS[self.network](channels, self.images.num_classes, side, rate=rate, head_rate=head_rate)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def fit(self, predictor: Predictor, *, augment: str | None = None, adam: bool = False) -> Predictor:
        """Train a predictor and return it."""
        # Without batch normalisation so large a learning rate diverges.
        adam = adam or self.network == "small_cnn"
        self._fit(predictor, self.epochs, augment or self.augment, adam)
        return predictor

    def fit_last_layer(self, predictor: Predictor, *, augment: str) -> Predictor:
        """Train what is left to train of a trained network, for an eighth of the epochs, and return the predictor."""
        self._fit(predictor, max(1, self.epochs // 8), augment, adam=True)
        return predictor

    def _fit(self, predictor: Predictor, epochs: int, augment: str, adam: bool) -> None:
        fit(
            predictor,
            self.images.train,
            epochs=epochs,
            device=self.device,
            augment=AUGMENTATIONS[augment],
            adam=adam,
            precision=self.precision,
        )


def deterministic(plan: Plan) -> Predictor:
    """One network."""
    return plan.fit(bg.Deterministic(plan.make(plan.seed), seed=plan.seed))


def mc_dropout(plan: Plan) -> Predictor:
    """One network with dropout in every block and before the last layer, left on."""
    network = plan.make(plan.seed, DROPOUT, DROPOUT)
    return plan.fit(bg.MCDropout(network, num_samples=plan.draws, seed=plan.seed))


def last_layer_dropout(plan: Plan) -> Predictor:
    """One network with dropout before the last layer only, left on."""
    network = plan.make(plan.seed, 0.0, LAST_LAYER_DROPOUT)
    return plan.fit(bg.MCDropout(network, num_samples=plan.draws, seed=plan.seed))


def deep_ensemble(plan: Plan) -> Predictor:
    """Networks from different starts."""
    return plan.fit(bg.DeepEnsemble(plan.make, num_members=plan.members, seed=plan.seed))


def variational(plan: Plan) -> Predictor:
    """A normal distribution over every weight."""
    network = plan.make(plan.seed)
    return plan.fit(
        bg.Variational(network, estimator="flipout", num_samples=plan.draws, seed=plan.seed),
        adam=True,
    )


def last_layer_variational(plan: Plan) -> Predictor:
    """A normal distribution over the weights of the last layer; the others are trained with it."""
    network = plan.make(plan.seed)
    return plan.fit(
        bg.Variational(network, subset_of_weights="last_layer", num_samples=plan.draws, seed=plan.seed),
        adam=True,
    )


def dropout_ensemble(plan: Plan) -> Predictor:
    """Networks from different starts, each with its dropout left on."""
    seeds = [derive_seed(plan.seed, "member", index) for index in range(plan.members)]
    members = [
        bg.MCDropout(plan.make(seed, DROPOUT, DROPOUT), num_samples=min(_DRAWS_OF_MEMBER, plan.draws), seed=seed)
        for seed in seeds
    ]
    return plan.fit(bg.DeepEnsemble(members, seed=plan.seed, copy=False))


def augmix_last_layer(plan: Plan) -> Predictor:
    """A network trained with AugMix, then a normal distribution over the weights of its last layer alone."""
    trained = plan.fit(bg.Deterministic(plan.make(plan.seed), seed=plan.seed), augment="augmix")
    network = trained.network
    predictor = bg.Variational(
        network,
        subset_of_weights="last_layer",
        relative=True,
        init_scale=0.1,
        num_samples=plan.draws,
        seed=plan.seed,
    )
    last = {id(tensor) for tensor in predictor.weights.tensors()}
    for parameter in predictor.network.parameters():
        parameter.requires_grad_(id(parameter) in last)
    return plan.fit_last_layer(predictor, augment="augmix")


class Method(NamedTuple):
    """A method: its name in tables, what builds and trains it, and its names in the published tables.

    `shift_aware` ones are calibrated by `ShiftAwareScaling` as well, on kinds of shift that are not the tested ones. The
    augmentation of training may be chosen but for those that are `augmented` in their own way.
    """

    label: str
    build: Callable[[Plan], Predictor]
    ovadia: str | None = None
    baselines: str | None = None
    shift_aware: bool = False
    augmented: bool = False


METHODS: dict[str, Method] = {
    "deterministic": Method("Deterministic", deterministic, "vanilla", "deterministic"),
    "mc_dropout": Method("MC dropout", mc_dropout, "dropout", "dropout"),
    "last_layer_dropout": Method("MC dropout, last layer", last_layer_dropout, "last_layer_dropout"),
    "deep_ensemble": Method("Deep ensemble", deep_ensemble, "ensemble", "ensemble"),
    "variational": Method("Variational", variational, "variational", "variational"),
    "last_layer_variational": Method("Variational, last layer", last_layer_variational, "last_layer_variational"),
    "dropout_ensemble": Method("Ensemble with dropout", dropout_ensemble, shift_aware=True),
    "augmix_last_layer": Method("AugMix, variational last layer", augmix_last_layer, shift_aware=True, augmented=True),
}
