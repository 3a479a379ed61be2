"""The search over rates: the best scale by a grid, the right rate where one is known to be better, and no look at test rows."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayesguard import Predictive
from bayesguard.benchmarks import tuned_dropout, uci
from bayesguard.benchmarks.datasets import Standardised
from bayesguard.benchmarks.many_networks import Stack, normal_nll, squared_error
from bayesguard.benchmarks.tuned_dropout import Kind, Search, Tuned, best_factor, best_scale, tuned
from bayesguard.calibration import VarianceScaling
from tests.benchmarks.plain_loop import Kept, alone

_KIND = Kind(uci.dropout, squared_error)
_ENSEMBLE = Kind(uci.dropout_ensemble, normal_nll, num_outputs=2, num_members=3)
_TRAINING: dict[str, Any] = {"width": 20, "batch_size": 32, "learning_rate": 0.01}


def split(seed: int) -> Standardised:
    """A line without noise: every unit that is dropped is an error."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(80, 2)).astype(np.float32)
    targets = inputs[:, 0] - inputs[:, 1]
    return Standardised(inputs[:60], targets[:60], inputs[60:], targets[60:], target_mean=0.0, target_sd=1.0)


def network(rate: float, seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    hidden, output = (torch.randn(1, *shape, generator=generator) for shape in ((3, 20), (2, 20)))
    return Stack(hidden, output, torch.zeros(1, 2), torch.tensor([rate])).network(0).eval()


def nll(means: Tensor, targets: Tensor, scale: float | Tensor) -> float:
    noise = torch.as_tensor(scale, dtype=means.dtype)
    each = -0.5 * ((targets - means) / noise) ** 2 - noise.log() - 0.5 * math.log(2 * math.pi)
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


def test_the_factor_is_that_of_variance_scaling_and_no_worse_than_a_fine_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    means, targets = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((16, 50), (50,)))
    scales = 0.1 + torch.rand(16, 50, generator=generator, dtype=torch.float64)
    value, factor = best_factor(means, scales, targets)
    fitted = VarianceScaling().fit(Predictive.from_normal(means, scales, draws=True), targets)
    assert factor == pytest.approx(float(fitted.factor), rel=2e-3)
    assert value == pytest.approx(fitted.diagnostics["nll_after"], abs=1e-5)
    grid = [nll(means, targets, 0.2 * 1.01**step * scales) for step in range(400)]
    assert value == pytest.approx(min(grid), abs=1e-4)


def test_an_ensemble_predicts_with_all_draws_of_its_members_and_the_factor() -> None:
    networks: list[nn.Module] = [network(rate, seed) for seed, rate in enumerate((0.2, 0.2, 0.2))]
    inputs = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    plain, wide = (uci.dropout_ensemble(networks, factor, 40, 0)(inputs).component for factor in (1.0, 2.5))
    assert plain.loc.shape == (120, 5)
    assert torch.equal(plain.loc, wide.loc)
    assert torch.allclose(2.5 * plain.scale, wide.scale)
    assert len(plain.loc[:, 0].unique()) > 60


def test_an_ensemble_without_dropout_is_one_draw_a_member() -> None:
    networks: list[nn.Module] = [network(0.0, seed) for seed in range(3)]
    inputs = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    found = uci.dropout_ensemble(networks, 1.0, 40, 0)(inputs).component.loc
    assert torch.allclose(found, torch.stack([own(inputs)[:, 0] for own in networks]), atol=1e-6)


def test_rates_are_compared_by_the_noise_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate whose noise is told right wins over one that is better only after its factor; the factor is that of the winner."""
    inputs, targets = torch.zeros(200, 2), torch.randn(200, generator=torch.Generator().manual_seed(0))

    def told(networks: list[nn.Module], factor: float, draws: int, seed: int) -> Any:
        # At rate 0.5 the error is large and told right; at 0.9 it is small, but told a 10th of what it is.
        (rate,) = (layer.p for layer in networks[0].modules() if isinstance(layer, nn.Dropout))
        mean, scale = (0.5 * targets, 0.9) if rate == 0.5 else (targets + 0.05, 0.005)
        return lambda rows: Predictive.from_normal(mean[-40:].unsqueeze(0), scale * factor, draws=True)

    def trained(kind: Kind, parts: Any, jobs: Any, decay: Any, **training: Any) -> Any:
        return [[nn.Sequential(nn.Dropout(rate))] for _, rate in jobs]

    monkeypatch.setattr(tuned_dropout, "_trained", trained)
    monkeypatch.setattr(tuned_dropout, "_shuffled", lambda split, seed: (inputs, targets))
    (found,) = tuned(
        Kind(told, normal_nll, num_outputs=2), Search((0.5, 0.9), 1, 1), [split(0)], lambda rows: 0.0, epochs=1
    )
    assert found.rate == 0.5
    right = float((0.5 * targets[-40:]).square().mean().sqrt()) / 0.9
    assert found.scale == pytest.approx(right, rel=2e-3)


def peeking(kind: Kind, search: Search, splits: list[Standardised], **how: Any) -> list[Tuned]:
    """Search with the test rows among the training ones, which must be found out."""
    return tuned(kind, search, [own._replace(train_inputs=np.concatenate([own.train_inputs, own.test_inputs]),
                                             train_targets=np.concatenate([own.train_targets, own.test_targets]))
                                for own in splits], **how)  # fmt: skip


def check_test_rows_choose_nothing(search: Callable[..., list[Tuned]], kind: Kind) -> None:
    run = partial(search, kind, Search((0.02, 0.2), 64, 64), decay=lambda rows: 0.1 / rows, epochs=3, **_TRAINING)
    own = split(0)
    other = own._replace(test_inputs=own.test_inputs + 5, test_targets=-own.test_targets)
    (first,), (second,) = (run(splits=[part]) for part in (own, other))
    assert (first.rate, first.scale) == (second.rate, second.scale)
    inputs = torch.from_numpy(own.test_inputs)
    assert torch.equal(first.predictor(inputs).mean, second.predictor(inputs).mean)


@pytest.mark.parametrize("kind", [_KIND, _ENSEMBLE])
def test_nothing_is_chosen_by_test_rows(kind: Kind) -> None:
    check_test_rows_choose_nothing(tuned, kind)
    with pytest.raises(AssertionError):
        check_test_rows_choose_nothing(peeking, kind)


def test_members_of_every_split_and_rate_are_those_of_plain_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Kept] = []

    class Seen(Kept):
        def __init__(self, rates: Tensor, seed: int) -> None:
            super().__init__(rates, seed)
            made.append(self)

    monkeypatch.setattr(tuned_dropout, "Chance", Seen)
    # Four networks at once: members of one ensemble may lie in two groups.
    monkeypatch.setattr(tuned_dropout, "_AT_ONCE", 4)
    parts = [(torch.from_numpy(own.train_inputs).double(), torch.from_numpy(own.train_targets).double())
             for own in (split(0), split(1))]  # fmt: skip
    jobs = [(number, rate) for number in range(2) for rate in (0.0, 0.3)]
    how: dict[str, Any] = {"width": 7, "batch_size": 16, "learning_rate": 0.01, "epochs": 4, "cosine": True}
    found = tuned_dropout._trained(_ENSEMBLE, parts, jobs, lambda rows: 0.1 / rows, **how)
    points = torch.randn(11, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert [len(own) for own in found] == [3] * 4
    for place in range(12):
        number, rate = jobs[place // 3]
        chance = made[place // 4]
        assert float(chance.rates[place % 4]) == rate
        plain = alone(
            place % 4, *parts[number], chance, normal_nll, num_outputs=2, decay=(1 - rate) * 0.1 / 60, **how
        )  # fmt: skip
        own = found[place // 3][place % 3]
        assert torch.allclose(own.eval()(points), plain(points), rtol=0, atol=1e-10)
    assert len({float(own(points).detach().sum()) for members in found for own in members}) == 12
