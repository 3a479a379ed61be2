"""How many draws reach the accuracy of fifty independent ones.

The mean of S independent draws has the variance of one draw over S, which is exact; that of our draws, which are
balanced over the units, is measured over many seeds against a reference from very many draws of a plain loop.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.benchmarks.speed.measure import Spread
from bayesguard.benchmarks.speed.networks import mlp
from bayesguard.benchmarks.speed.peers import in_dropout_mode
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row
from bayesguard.sampling import seeded_default_generators

_INDEPENDENT = 50
_NUMBERS = (8, 10, 12, 14, 16, 17, 18, 20, 22, 24, 25, 28, 32)


class _Sizes(NamedTuple):
    epochs: int
    test_rows: int
    reference: int
    seeds: int


def rows(settings: Settings) -> list[Row]:
    """Train a perceptron with dropout on scikit-learn's digits, and count the draws."""
    sizes = _Sizes(3, 100, 2000, 5) if settings.quick else _Sizes(40, 300, 20_000, 100)
    predictor, inputs = _trained(sizes, settings.device)
    reference, variance = _by_loop(predictor, inputs, sizes.reference)
    errors = _errors(predictor, inputs, reference, sizes.seeds)
    wanted = variance / _INDEPENDENT
    value = needed(errors.mean(0), wanted)
    generator = np.random.default_rng(0)
    resampled = [needed(errors[generator.integers(len(errors), size=len(errors))].mean(0), wanted) for _ in range(1000)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    ratio = float(np.sqrt(errors.mean(0)[_NUMBERS.index(25)] / wanted))
    note = (
        f"MLP 64-128-128-10 on {sizes.test_rows} of scikit-learn's digits, {sizes.seeds} seeds, 95 % bootstrap interval; "
        f"the RMSE of 25 draws is {ratio:.3f} of that of 50 independent ones"
    )
    spread = Spread(value, float(low), float(high))
    return [Row("draws", "draws for the RMSE of 50 independent ones", spread, must=25, aim=17, unit="draws", note=note)]


def needed(errors: Sequence[float] | np.ndarray, wanted: float, numbers: Sequence[int] = _NUMBERS) -> float:
    """Return the first number of draws whose mean squared error is not above `wanted`.

    Where none of `numbers` is enough, the last error is carried on as one over the number of draws.
    """
    for number, error in zip(numbers, errors, strict=True):
        if error <= wanted:
            return float(number)
    return float(numbers[-1] * errors[-1] / wanted)


def _trained(sizes: _Sizes, device: torch.device) -> tuple[bg.MCDropout, Tensor]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels / 16, dtype=torch.float32, device=device)
    targets = torch.tensor(labels, device=device)
    with seeded_default_generators(torch.device("cpu"), 0, "speed digits"):
        network = mlp((64, 128, 128, 10)).to(device)
    predictor = bg.MCDropout(network)
    predictor.fit((inputs[sizes.test_rows :], targets[sizes.test_rows :]), epochs=sizes.epochs, batch_size=64)
    return predictor, inputs[: sizes.test_rows]


@torch.no_grad()
def _by_loop(predictor: bg.MCDropout, inputs: Tensor, number: int) -> tuple[Tensor, float]:
    """Return mean probabilities of a plain loop, and the variance of one draw, its mean over rows and classes."""
    network = in_dropout_mode(deepcopy(predictor.network))
    total = torch.zeros(len(inputs), 10, dtype=torch.float64, device=inputs.device)
    squares = torch.zeros_like(total)
    with seeded_default_generators(inputs.device, 0, "speed reference"):
        for _ in range(number // 50):
            # Every row has masks of its own, so copies of the rows are further independent draws.
            probs = network(inputs.repeat(50, 1)).softmax(-1).double().unflatten(0, (50, -1))
            total += probs.sum(0)
            squares += probs.square().sum(0)
    mean = total / number
    return mean, float((squares / number - mean.square()).mean()) * number / (number - 1)


def _errors(predictor: bg.MCDropout, inputs: Tensor, reference: Tensor, seeds: int) -> np.ndarray:
    """Return mean squared errors `[seeds, numbers of draws]` of the mean probabilities."""
    found = [
        [
            float((predictor(inputs, num_samples=number, seed=seed).probs.double() - reference).square().mean())
            for number in _NUMBERS
        ]
        for seed in range(seeds)
    ]
    return np.array(found)
