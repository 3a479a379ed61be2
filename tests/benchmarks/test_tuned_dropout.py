"""The search over rates: the best scale by a grid, the right rate where one is known to be better, and no look at test rows."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesguard.benchmarks import uci
from bayesguard.benchmarks.datasets import Standardised
from bayesguard.benchmarks.many_networks import squared_error
from bayesguard.benchmarks.tuned_dropout import Kind, Search, best_scale, tuned

_KIND = Kind(uci.dropout, squared_error)
_TRAINING: dict[str, Any] = {"width": 20, "batch_size": 32, "learning_rate": 0.01}


def split(seed: int) -> Standardised:
    """A line without noise: every unit that is dropped is an error."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(80, 2)).astype(np.float32)
    targets = inputs[:, 0] - inputs[:, 1]
    return Standardised(inputs[:60], targets[:60], inputs[60:], targets[60:], target_mean=0.0, target_sd=1.0)


def nll(means: Tensor, targets: Tensor, scale: float) -> float:
    each = -0.5 * ((targets - means) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)
    return float(-(each.logsumexp(0) - math.log(len(means))).mean())


def test_the_scale_is_the_best_of_a_fine_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    means = 0.3 * torch.randn(16, 50, generator=generator, dtype=torch.float64)
    targets = 0.5 * torch.randn(50, generator=generator, dtype=torch.float64)
    value, scale = best_scale(means, targets)
    grid = [nll(means, targets, 0.01 * 1.01**step) for step in range(600)]
    assert value == pytest.approx(min(grid), abs=1e-4)
    assert scale == pytest.approx(0.01 * 1.01 ** grid.index(min(grid)), rel=0.02)


def test_one_draw_has_its_rmse_as_scale() -> None:
    means, targets = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([1.0, -1.0, 3.0, -3.0], dtype=torch.float64)
    assert best_scale(means, targets)[1] == pytest.approx(math.sqrt(5), rel=1e-3)


def test_the_better_rate_is_chosen_and_each_network_has_it() -> None:
    search = Search(rates=(0.5, 0.005, 0.9), draws=64, final_draws=8)
    found = tuned(_KIND, search, [split(0), split(1)], lambda rows: 0.0, epochs=60, **_TRAINING)
    assert [own.rate for own in found] == [0.005, 0.005]
    drops = [layer.p for layer in found[0].predictor.network.modules() if isinstance(layer, torch.nn.Dropout)]
    assert drops == [pytest.approx(0.005)] * 2


def test_nothing_is_chosen_by_test_rows() -> None:
    run = partial(tuned, _KIND, Search((0.01, 0.2), 16, 16), decay=lambda rows: 0.1 / rows, epochs=3, **_TRAINING)
    own = split(0)
    other = own._replace(test_inputs=own.test_inputs + 5, test_targets=-own.test_targets)
    (first,), (second,) = (run(splits=[part]) for part in (own, other))
    assert (first.rate, first.scale) == (second.rate, second.scale)
    inputs = torch.from_numpy(own.test_inputs)
    assert torch.equal(first.predictor(inputs).mean, second.predictor(inputs).mean)
