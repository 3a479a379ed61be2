"""Networks trained at once: each equals one trained alone by the plain loop, and none sees another's rows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesguard.benchmarks.many_networks import Chance, Loss, Stack, normal_nll, squared_error, train
from bayesguard.likelihoods import HeteroscedasticGaussian
from tests.benchmarks.plain_loop import Kept, alone

_ROWS, _FEATURES = 23, 3
_TRAINING: dict[str, Any] = {"width": 7, "batch_size": 8, "epochs": 5, "learning_rate": 0.01, "decay": 1e-3}
_RATES = torch.tensor([0.0, 0.05, 0.3], dtype=torch.float64)


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(len(_RATES), _ROWS, _FEATURES, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(len(_RATES), _ROWS, generator=generator, dtype=torch.float64)


def together(inputs: Tensor, targets: Tensor, chance: Chance, loss: Loss, **how: Any) -> Stack:
    return train(inputs, targets, chance, loss=loss, **_TRAINING, **how)


@pytest.mark.parametrize(("loss", "num_outputs", "cosine"), [(squared_error, 1, False), (normal_nll, 2, True)])
def test_each_network_is_the_one_that_the_plain_loop_trains(loss: Loss, num_outputs: int, cosine: bool) -> None:
    inputs, targets = rows()
    chance = Kept(_RATES, seed=3)
    how: dict[str, Any] = {"num_outputs": num_outputs, "cosine": cosine}
    stack = together(inputs, targets, chance, loss, **how)
    points = torch.randn(11, _FEATURES, dtype=torch.float64)
    for index in range(len(_RATES)):
        plain = alone(index, inputs[index], targets[index], chance, loss, **_TRAINING, **how)
        own = stack.hidden[index, :-1].T, stack.hidden[index, -1], stack.output[index], stack.bias[index]
        for found, expected in zip(own, plain.parameters(), strict=True):
            assert torch.allclose(found, expected, rtol=0, atol=1e-10)
        assert torch.allclose(stack.network(index).eval()(points), plain(points), rtol=0, atol=1e-10)


def test_rows_of_one_network_are_nothing_to_the_others() -> None:
    inputs, targets = rows()
    before = together(inputs, targets, Chance(_RATES, 0), squared_error)
    others, wanted = rows(1)
    inputs[1], targets[1] = others[1], wanted[1]
    after = together(inputs, targets, Chance(_RATES, 0), squared_error)
    for index, same in ((0, True), (1, False), (2, True)):
        assert torch.equal(before.hidden[index], after.hidden[index]) is same
        assert torch.equal(before.output[index], after.output[index]) is same
        assert torch.equal(before.bias[index], after.bias[index]) is same


def test_units_are_dropped_at_their_networks_rate_and_independently() -> None:
    units, steps = 1000, 200
    masks = torch.zeros(steps, len(_RATES) * units)
    for mask, places in zip(masks, Chance(_RATES, 0).dropped(units, steps), strict=True):
        mask[places] = 1.0
    counts = masks.view(steps, len(_RATES), units).sum(2).double()
    expected = units * _RATES
    error = (expected * (1 - _RATES) / steps).sqrt()
    assert ((counts.mean(0) - expected).abs() <= 4 * error).all()
    # Dropped independently, their number is binomial: its variance over steps has a relative error of sqrt(2 / steps).
    ratio = counts[:, 1:].var(0) / (expected * (1 - _RATES))[1:]
    assert ((ratio - 1).abs() < 4 * (2 / steps) ** 0.5).all()
    # Hits that are not told from drops would be off by more than that at a rate of 0.3.
    assert units * -torch.log1p(-_RATES[2]) - expected[2] > 8 * error[2]


def test_every_row_is_used_once_a_pass() -> None:
    orders = Chance(_RATES, 0).orders(_ROWS)
    assert torch.equal(orders.sort(1).values, torch.arange(_ROWS).expand(3, -1))
    assert not torch.equal(orders[0], orders[1])


def test_a_network_drops_at_its_own_rate() -> None:
    stack = together(*rows(), Chance(_RATES, 0), squared_error)
    assert [layer.p for layer in stack.network(2) if isinstance(layer, nn.Dropout)] == [pytest.approx(0.3)] * 2
    assert not any(isinstance(layer, nn.Dropout) for layer in stack.network(0))


def test_the_nll_is_that_of_the_likelihood_that_predicts() -> None:
    # Raw scales far below 0, where the smallest scale is reached, and far above.
    outputs = torch.stack([torch.linspace(-2, 2, 9), torch.linspace(-40, 40, 9)]).double().expand(3, 2, 9)
    targets = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = -HeteroscedasticGaussian().log_prob(outputs.movedim(1, 2).reshape(27, 2), targets.reshape(27))
    assert torch.allclose(normal_nll(outputs, targets).reshape(27), expected, rtol=1e-12)
