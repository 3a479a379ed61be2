"""How the methods of the image benchmarks are built and trained, with the settings that their papers tuned."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import bayesguard as bg
from bayesguard.benchmarks.datasets import ImageSet
from bayesguard.benchmarks.networks import MLP, LeNet, LeNet5, ResNet20, WideLeNet5
from bayesguard.errors import BadInput
from bayesguard.predictor import Predictor
from bayesguard.sampling import seeded_default_generators


class Recipe(NamedTuple):
    """Settings of a training with Adam; `rate` is that of the network's dropout, trained with by every method."""

    batch_size: int
    learning_rate: float
    rate: float
    weight_decay: float = 0.0
    cosine: bool = False


NETWORKS: dict[str, Callable[[int, int, int, float], nn.Module]] = {
    "lenet": LeNet,
    "mlp": MLP,
    "lenet5": LeNet5,
    "wide_lenet5": WideLeNet5,
    "resnet20": ResNet20,
}
METHODS = ("vanilla", "dropout", "last_layer_dropout", "variational", "ensemble")

_LENET5 = Recipe(128, 1e-3, 0.2, weight_decay=5e-4, cosine=True)
_WIDE = Recipe(256, 1e-3, 0.1)
_RESNET = Recipe(128, 1e-3, 0.1, cosine=True)
# "lenet" and "mlp": what Ovadia et al. (2019) tuned, but for the batch of 2 of the MLP's dropout, which would be 25,000 steps
# an epoch. "lenet5": the optimiser and decay of Daxberger et al. (2021), without decay for "variational", whose prior replaces it.
RECIPES: dict[str, dict[str, Recipe]] = {
    "lenet": {
        "vanilla": Recipe(1620, 1.0196e-3, 0.2854),
        "dropout": Recipe(1136, 5.026e-3, 0.3034),
        "last_layer_dropout": Recipe(2046, 6.130e-3, 0.3838),
        "variational": Recipe(2041, 2.190e-3, 0.0),
        "ensemble": Recipe(1620, 1.0196e-3, 0.2854),
    },
    "mlp": {
        "vanilla": Recipe(64, 4.638e-4, 0.2305),
        "dropout": Recipe(64, 4.638e-4, 0.1209),
        "last_layer_dropout": Recipe(2031, 5.063e-3, 0.1809),
        "variational": Recipe(2048, 3.429e-3, 0.0),
        "ensemble": Recipe(64, 4.638e-4, 0.2305),
    },
    "lenet5": dict.fromkeys(METHODS, _LENET5) | {"variational": Recipe(128, 1e-3, 0.0, cosine=True)},
    "wide_lenet5": dict.fromkeys(METHODS, _WIDE) | {"variational": _WIDE._replace(rate=0.0)},
    "resnet20": dict.fromkeys(METHODS, _RESNET),
}


def trained(
    method: str,
    network: str,
    images: ImageSet,
    *,
    seed: int,
    members: int,
    epochs: int,
    samples: int,
    device: torch.device,
) -> Predictor:
    """Build a method over a network and train it on the first part of `images`.

    Args:
        method: One of `METHODS`.
        network: One of `NETWORKS`.
        images: Trained on its `train` part.
        seed: Of the networks, the shuffling and the draws.
        members: Networks of "ensemble".
        epochs: Passes over the training data.
        samples: Draws in one prediction of "dropout", "last_layer_dropout" and "variational".
        device: Where it is trained, and stays.

    Raises:
        BadInput: An unknown method or network.
    """
    recipe = recipe_of(network, method)
    _, channels, side, _ = images.train[0].shape

    def make(_: int = 0) -> nn.Module:
        return NETWORKS[network](channels, images.num_classes, side, recipe.rate)

    predictor = _built(method, make, seed, members, samples).to(device)
    settings: dict[str, Any] = {
        "batch_size": recipe.batch_size,
        "optimizer": partial(_adam, lr=recipe.learning_rate, weight_decay=recipe.weight_decay),
    }
    if recipe.cosine:
        settings["scheduler"] = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
    predictor.fit(images.train, epochs=epochs, progress=False, **settings)
    return predictor


def recipe_of(network: str, method: str) -> Recipe:
    """Return the settings of a method's training."""
    if network not in RECIPES:
        raise BadInput(f"network must be one of {', '.join(RECIPES)}, got {network!r}")
    if method not in METHODS:
        raise BadInput(f"methods must be among {', '.join(METHODS)}, got {method!r}")
    return RECIPES[network][method]


def _adam(parameters: Any, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)


def _built(method: str, make: Callable[..., nn.Module], seed: int, members: int, samples: int) -> Predictor:
    if method == "ensemble":
        return bg.DeepEnsemble(make, num_members=members, seed=seed)
    with seeded_default_generators(torch.device("cpu"), seed, "network"):
        network = make()
    if method == "vanilla":
        return bg.Deterministic(network, seed=seed)
    if method == "variational":
        # Flipout, as in the paper. Steps of a few thousandths leave wide first deviations no time to shrink.
        return bg.Variational(network, estimator="flipout", init_scale=math.exp(-5), num_samples=samples, seed=seed)
    layers = [_last_dropout(network)] if method == "last_layer_dropout" else None
    return bg.MCDropout(network, layers=layers, num_samples=samples, seed=seed)


def _last_dropout(network: nn.Module) -> str:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Dropout)][-1]
