"""Dropout whose rate and noise are chosen on held-out training rows: one network a split, or an ensemble.

The protocol of Gal and Ghahramani (2016, ICML), as its authors' code has it: a grid search on the last fifth of the shuffled
training rows, then the chosen network is trained again on all of them. Networks of all splits and rates train at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesguard.benchmarks.datasets import Standardised
from bayesguard.benchmarks.many_networks import Chance, Loss, Stack, train
from bayesguard.predictive import ContinuousPredictive
from bayesguard.predictor import Predictor

# More networks at once do not fit the cache of a processor core; fewer are bound by the cost of a call.
_AT_ONCE = 80


class Kind(NamedTuple):
    """What is trained and how it predicts.

    Attributes:
        predictor: From the networks of a split, the scale of the noise, the draws of a network and a seed to what predicts.
            Where a network tells its noise, the scale is a factor on that.
        loss: See `many_networks.train`.
        num_outputs: Of a network: 1 where one noise is chosen for all rows, 2 where it is told for each.
        num_members: Networks a split.
    """

    predictor: Callable[[list[nn.Module], float, int, int], Predictor]
    loss: Loss
    num_outputs: int = 1
    num_members: int = 1


@dataclass(frozen=True)
class Search:
    """What is searched, and how: draws with which it is judged, and with which it predicts in the end.

    `epochs` are those of the networks that are compared, by the size of the set; None for as many as in the end.
    """

    rates: tuple[float, ...]
    draws: int
    final_draws: int
    epochs: tuple[int, ...] | None = None


class Tuned(NamedTuple):
    """What was chosen for a split: the rate, the scale of the noise in standardised units, and the predictor with both."""

    predictor: Predictor
    rate: float
    scale: float


def tuned(
    kind: Kind,
    search: Search,
    splits: Sequence[Standardised],
    decay: Callable[[int], float],
    *,
    epochs: int,
    search_epochs: int | None = None,
    **training: Any,
) -> list[Tuned]:
    """Choose for every split by its own held-out rows, train again on all its training rows, and return what predicts.

    Args:
        kind: What is trained.
        search: What is searched.
        splits: All of one set; test rows are not looked at.
        decay: From the number of training rows to the weight decay at rate 0; times 1 - rate it is that of the networks.
        epochs: Passes over all training rows.
        search_epochs: Passes of the networks that are compared; None for `epochs`.
        training: Further arguments of `many_networks.train`.
    """
    shuffled = [_shuffled(split, number) for number, split in enumerate(splits)]
    chosen = _chosen(kind, search, shuffled, decay, epochs=search_epochs or epochs, **training)
    jobs = [(number, choice.rate) for number, choice in enumerate(chosen)]
    trained = _trained(kind, shuffled, jobs, decay, epochs=epochs, **training)
    return [
        Tuned(kind.predictor(networks, choice.scale, search.final_draws, number), choice.rate, choice.scale)
        for number, (choice, networks) in enumerate(zip(chosen, trained, strict=True))
    ]


class _Choice(NamedTuple):
    nll: float
    rate: float
    scale: float


def _chosen(
    kind: Kind,
    search: Search,
    shuffled: Sequence[tuple[Tensor, Tensor]],
    decay: Callable[[int], float],
    **training: Any,
) -> list[_Choice]:
    """Return for each split what has the lowest NLL on the last fifth of its training rows after training on the others."""
    kept = round(0.8 * len(shuffled[0][1]))
    parts = [(inputs[:kept], targets[:kept]) for inputs, targets in shuffled]
    jobs = [(number, rate) for number in range(len(shuffled)) for rate in search.rates]
    found: list[list[_Choice]] = [[] for _ in shuffled]
    for (number, rate), networks in zip(jobs, _trained(kind, parts, jobs, decay, **training), strict=True):
        inputs, targets = (part[kept:] for part in shuffled[number])
        nll, scale = _judged(kind, networks, inputs, targets, search.draws, number)
        found[number].append(_Choice(nll, rate, scale))
    return [min(own) for own in found]


def best_scale(means: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return the NLL in nats and the scale of the noise under which targets [N] are most probable, given draws [S, N].

    The likelihood is that of the equal mixture of the draws (Gal and Ghahramani 2016, eq. 8); where the published protocol
    takes the best of three precisions, this takes the best of all, between a 20th and 5 times the RMSE of the mean.
    """
    centre = float((means.mean(0) - targets).square().mean().sqrt().clamp_min(1e-6).log())
    return _best(means, torch.ones_like(means), targets, centre - 3.0, centre + 1.6)


def best_factor(means: Tensor, scales: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return the same for a factor, between a 20th and 20, on the scales [S, N] that the networks tell."""
    return _best(means, scales, targets, -3.0, 3.0)


def _best(means: Tensor, scales: Tensor, targets: Tensor, lower: float, upper: float) -> tuple[float, float]:
    """Return the NLL and the factor on the scales with the lowest one; the bounds are those of its logarithm."""
    from scipy.optimize import minimize_scalar

    def nll(log_factor: float) -> float:
        mixture = ContinuousPredictive.from_normal(means, scales * math.exp(log_factor), draws=True)
        return float(-mixture.log_prob(targets).double().mean())

    found = minimize_scalar(nll, bounds=(lower, upper), method="bounded", options={"xatol": 1e-3})
    return float(found.fun), math.exp(found.x)


def _judged(
    kind: Kind, networks: list[nn.Module], inputs: Tensor, targets: Tensor, draws: int, seed: int
) -> tuple[float, float]:
    """Return the NLL on held-out rows, by which rates are compared, and the best scale of the noise, or factor on it.

    Rates whose networks tell the noise are compared by the noise as told: a factor of its own for each would let a rate win
    whose noise is far too small, by the luck that no held-out row lies far off.
    """
    predictive = kind.predictor(networks, 1.0, draws, seed)(inputs)
    means = predictive.component.loc
    if kind.num_outputs == 1:
        return best_scale(means, targets)
    _, factor = best_factor(means, predictive.component.scale, targets)
    return float(-predictive.log_prob(targets).double().mean()), factor


def _shuffled(split: Standardised, seed: int) -> tuple[Tensor, Tensor]:
    """Return the training part in a random order: stored rows may lie in one that means something."""
    order = torch.randperm(len(split.train_targets), generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(split.train_inputs)[order], torch.from_numpy(split.train_targets)[order]


def _trained(
    kind: Kind,
    parts: Sequence[tuple[Tensor, Tensor]],
    grid: Sequence[tuple[int, float]],
    decay: Callable[[int], float],
    **training: Any,
) -> list[list[nn.Module]]:
    """Return the networks of every (part, rate)."""
    jobs = [job for job in grid for _ in range(kind.num_members)]
    networks: list[nn.Module] = []
    for start in range(0, len(jobs), _AT_ONCE):
        own = jobs[start : start + _AT_ONCE]
        inputs, targets = (torch.stack([parts[number][place] for number, _ in own]) for place in range(2))
        rates = torch.tensor([rate for _, rate in own], dtype=inputs.dtype)
        decays = decay(targets.shape[1]) * (1 - rates)
        stack: Stack = train(
            inputs,
            targets,
            Chance(rates, seed=start),
            loss=kind.loss,
            num_outputs=kind.num_outputs,
            decay=decays,
            **training,
        )
        networks += [stack.network(index) for index in range(len(own))]
    return [networks[first : first + kind.num_members] for first in range(0, len(jobs), kind.num_members)]
