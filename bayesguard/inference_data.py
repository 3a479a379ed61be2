"""The bridge to ArviZ: draws, pointwise log-likelihoods and data of any predictor."""

from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayesguard.checks import check_labels
from bayesguard.data import is_one_shot
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import CategoricalPredictive, Predictive
from bayesguard.predictive.bernoulli import check_answers
from bayesguard.predictive.components import component_log_prob, widened
from bayesguard.predictive.continuous import ComponentPredictive
from bayesguard.predictive.numerics import wide
from bayesguard.sampling import seeded_default_generators

if TYPE_CHECKING:
    from bayesguard.predictor import Predictor

Arrays = dict[str, npt.NDArray[Any]]

# A posterior of more numbers than this is a checkpoint, not something to look at.
_MAX_NUMBERS = 50_000_000


def to_inference_data(
    predictor: "Predictor",
    data: Any,
    *,
    num_samples: int | None = None,
    seed: int | None = None,
    weights: bool = True,
    prior: bool = False,
    batch_size: int | None = None,
) -> Any:
    """Return what ArviZ works on: an `InferenceData` of ArviZ 0.x, a `DataTree` of ArviZ 1.x.

    Args:
        predictor: Any predictor.
        data: Inputs and targets, as in `predict_with_targets`; its N examples are what is asked about.
        num_samples: Draws; None for the predictor's own number.
        seed: Seed of the draws; None for the predictor's own.
        weights: Whether the sampled weights are a group, where the method has them.
        prior: Whether to draw from the prior, too, for prior predictive checks; for methods with a prior over weights.
        batch_size: Rows a batch, where `data` is a pair of arrays.

    Returns:
        Groups `posterior` (`prediction`: the mean of the target, or the probabilities of its classes, under each draw
        `[chain, draw, N, ...]`, and weights by name `[chain, draw, *shape]` where the method samples weights),
        `posterior_predictive` (`y`: a sample of the target for each draw, `[chain, draw, N, ...]`), `log_likelihood` (`y`:
        log densities in nats for each draw, float64) and `observed_data` (`y`); with `prior` also `prior_predictive` (`y`). A chain is a Markov chain, or a member of
        an ensemble; other methods have one.

    Raises:
        BadInput: A calibrator that acts on the mixture: then draws have no densities of their own. More weights than fit.
            Draws with weights that differ. Targets of another shape than the answers, or that cannot be.
        BadType: A predictive without draws.

    Examples:
        >>> import torch, bayesguard as bg
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 3))
        >>> idata = to_inference_data(bg.MCDropout(network), (torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])))
        >>> idata["log_likelihood"]["y"].shape  # one chain of 32 draws
        (1, 32, 6)
    """
    _check_calibrators(predictor)
    seed = predictor._seed(seed)
    predictive, targets = predictor.predict_with_targets(
        data, num_samples=num_samples, seed=seed, batch_size=batch_size, keep_draws=True
    )
    if not predictive.has_draws:
        raise BadType(f"the draws of a {type(predictor).__name__} were not kept, and ArviZ is about draws")
    _check_weights(predictive)
    component = predictive.component
    chains = _chains(predictor, predictive.num_samples)

    def by_chain(values: Tensor) -> npt.NDArray[Any]:
        return values.detach().cpu().reshape(chains, -1, *values.shape[1:]).numpy()

    log_prob = _log_prob(predictive, targets)
    with seeded_default_generators(torch.device("cpu"), seed, "posterior predictive"):
        samples = component.sample()
    groups: dict[str, Arrays] = {
        "posterior_predictive": {"y": by_chain(samples)},
        "log_likelihood": {"y": by_chain(log_prob)},
        "observed_data": {"y": targets.cpu().numpy()},
    }
    groups["posterior"] = {"prediction": by_chain(_prediction(component))}
    if prior:
        groups["prior_predictive"] = {"y": _prior_samples(predictor, data, batch_size, predictive.num_samples, seed)}
    if weights and (named := _weights(predictor, predictive.num_samples, seed)):
        groups["posterior"] |= {name.replace(".", "_"): by_chain(values) for name, values in named.items()}
    return _from_groups(groups)


def _prior_samples(
    predictor: "Predictor", data: Any, batch_size: int | None, num_samples: int, seed: int
) -> npt.NDArray[Any]:
    """Return targets under weights from the prior, of one chain: `[1, draw, N, ...]`."""
    answer = getattr(predictor, "prior_predictive", None)
    if answer is None:
        raise BadInput(f"prior=True needs a prior over weights, which a {type(predictor).__name__} does not have")
    if is_one_shot(data):
        raise BadInput("prior=True reads the data twice, and they can be read once only; hand in a loader or arrays")
    samples: list[Tensor] = []
    for batch in predictor._batches(data, batch_size):
        pred = answer(*batch.inputs, num_samples=num_samples, seed=seed, **batch.kwargs)
        with seeded_default_generators(torch.device("cpu"), seed, "prior predictive", len(samples)):
            samples.append(pred.component.sample().cpu())
    return torch.cat(samples, dim=1).unsqueeze(0).numpy()


def _check_calibrators(predictor: "Predictor") -> None:
    pooled = [type(c).__name__ for c in predictor.calibrators if getattr(c, "acts_on", "draws") == "pooled"]
    if pooled:
        raise BadInput(
            f"{', '.join(pooled)} acts on the mixture of all draws, so that no draw has a density of its own; call "
            "predictor.forget_calibration(), or calibrate with a method that acts on draws"
        )


def _chains(predictor: "Predictor", num_samples: int) -> int:
    chains = predictor.num_chains
    if num_samples % chains:
        raise BadInput(f"{num_samples} draws cannot be {chains} chains of one length; choose a multiple of {chains}")
    return chains


def _weights(predictor: "Predictor", num_samples: int, seed: int) -> dict[str, Tensor]:
    named = predictor.weight_draws(num_samples, seed)
    numbers = sum(values.numel() for values in named.values())
    if numbers > _MAX_NUMBERS:
        raise BadInput(
            f"the posterior has {numbers:,} numbers ({num_samples} draws); pass weights=False, fewer num_samples=, or give "
            "the predictor a smaller subset_of_weights="
        )
    return named


def _prediction(component: Any) -> Tensor:
    """What each draw predicts, in which chains can be compared whatever their weights are."""
    if isinstance(component, torch.distributions.Categorical):
        return component.probs
    mean: Tensor = component.mean
    return mean


def _check_weights(predictive: Predictive) -> None:
    weights = predictive.weights
    if not torch.allclose(weights, weights.mean(), rtol=1e-6, atol=0):
        raise BadInput(
            "draws have weights that differ, and ArviZ counts every draw as one; hand in the predictors one by one"
        )


def _log_prob(predictive: Predictive, targets: Tensor) -> Tensor:
    """Return the log density of every target under each draw, float64 `[S, N, ...]`; shapes must match exactly."""
    shape = predictive.batch_shape
    if isinstance(predictive, CategoricalPredictive):
        return predictive.component.log_prob(check_labels(targets, shape, predictive.num_classes)).double()
    if isinstance(predictive, ComponentPredictive):
        targets = predictive._target(targets, "targets")
    else:
        targets = wide(check_answers(targets, shape, "targets"))
    return component_log_prob(widened(predictive.component), targets).double()


def _from_groups(groups: dict[str, Arrays]) -> Any:
    arviz: Any = import_module("arviz")
    observed = groups["observed_data"]["y"]
    axes = ["observation", *(f"output_{k}" for k in range(1, observed.ndim))]
    coords = {"observation": np.arange(len(observed))}
    inner = groups["posterior"]["prediction"].ndim - 2
    # The same axes as the target's, and one of classes where there are some.
    dims = {"y": axes, "prediction": [*axes, "class"][:inner]}
    # ArviZ 1.x takes the groups as one mapping, and returns a DataTree; it has the name InferenceData, too.
    if "posterior" in signature(arviz.from_dict).parameters:
        return arviz.from_dict(**groups, coords=coords, dims=dims)
    return arviz.from_dict(groups, coords=coords, dims=dims)
