"""Networks trained at once: each equals one trained alone by the plain loop, and none sees another's rows."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesguard.benchmarks.many_networks import Chance, Loss, Stack, squared_error, train

_ROWS, _FEATURES, _WIDTH, _BATCH, _EPOCHS, _DECAY = 23, 3, 7, 8, 5, 1e-3
_RATES = torch.tensor([0.0, 0.05, 0.3], dtype=torch.float64)


class Kept(Chance):
    """Keeps what was drawn."""

    def __init__(self, rates: Tensor, seed: int) -> None:
        super().__init__(rates, seed)
        self.first: list[Tensor] = []
        self.passes: list[Tensor] = []
        self.hits: list[tuple[int, Tensor]] = []

    def uniform(self, *shape: int, limit: float) -> Tensor:
        self.first.append(super().uniform(*shape, limit=limit))
        return self.first[-1].clone()

    def orders(self, num_rows: int) -> Tensor:
        self.passes.append(super().orders(num_rows))
        return self.passes[-1]

    def dropped(self, num_units: int, steps: int) -> Sequence[Tensor]:
        found = super().dropped(num_units, steps)
        self.hits += [(num_units, places) for places in found]
        return found

    def masks(self, network: int) -> dict[int, list[Tensor]]:
        """Return for each number of units the masks of one network, in the order of the steps."""
        found: dict[int, list[Tensor]] = {}
        for units, places in self.hits:
            mask = torch.ones(len(self.rates) * units, dtype=torch.float64)
            mask[places] = 0.0
            found.setdefault(units, []).append(mask.view(-1, units)[network])
        return found


def negative_log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    scale = F.softplus(outputs[:, 1])
    return ((outputs[:, 0] - targets) / scale).square() / 2 + scale.log()


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(len(_RATES), _ROWS, _FEATURES, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(len(_RATES), _ROWS, generator=generator, dtype=torch.float64)


def together(inputs: Tensor, targets: Tensor, chance: Chance, loss: Loss, num_outputs: int, cosine: bool) -> Stack:
    return train(
        inputs, targets, chance, loss=loss, num_outputs=num_outputs, width=_WIDTH, epochs=_EPOCHS, batch_size=_BATCH,
        learning_rate=0.01, cosine=cosine, decay=_DECAY,
    )  # fmt: skip


def alone(
    index: int, inputs: Tensor, targets: Tensor, chance: Kept, loss: Loss, num_outputs: int, cosine: bool
) -> nn.Sequential:
    """Train one network with torch's layers, autograd and Adam from the same random numbers."""
    hidden, output = nn.Linear(_FEATURES, _WIDTH).double(), nn.Linear(_WIDTH, num_outputs).double()
    with torch.no_grad():
        hidden.weight.copy_(chance.first[0][index].T)
        output.weight.copy_(chance.first[1][index])
        hidden.bias.zero_()
        output.bias.zero_()
    network = nn.Sequential(hidden, nn.ReLU(), output)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS)
    masks, keep = chance.masks(index), 1 - float(chance.rates[index])
    for order in chance.passes:
        for batch in order[index].split(_BATCH):
            # A row lies in memory with a 1 and its target behind the features; what hits those two is nothing.
            seen = masks[len(batch) * (_FEATURES + 2)].pop(0).view(len(batch), -1)[:, :_FEATURES] / keep
            between = masks[len(batch) * _WIDTH].pop(0).view(len(batch), -1) / keep
            outputs = output(hidden(inputs[index, batch] * seen).relu() * between)
            value = loss(outputs.T.unsqueeze(0), targets[index, batch].unsqueeze(0)).mean()
            value = value + _DECAY * (hidden.weight.square().sum() + output.weight.square().sum())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        if cosine:
            schedule.step()
    assert not any(masks.values())
    return network


@pytest.mark.parametrize(
    ("loss", "num_outputs", "cosine"), [(squared_error, 1, False), (negative_log_likelihood, 2, True)]
)
def test_each_network_is_the_one_that_the_plain_loop_trains(loss: Loss, num_outputs: int, cosine: bool) -> None:
    inputs, targets = rows()
    chance = Kept(_RATES, seed=3)
    stack = together(inputs, targets, chance, loss, num_outputs, cosine)
    points = torch.randn(11, _FEATURES, dtype=torch.float64)
    for index in range(len(_RATES)):
        plain = alone(index, inputs, targets, chance, loss, num_outputs, cosine)
        own = stack.hidden[index, :-1].T, stack.hidden[index, -1], stack.output[index], stack.bias[index]
        for found, expected in zip(own, plain.parameters(), strict=True):
            assert torch.allclose(found, expected, rtol=0, atol=1e-10)
        assert torch.allclose(stack.network(index).eval()(points), plain(points), rtol=0, atol=1e-10)


def test_rows_of_one_network_are_nothing_to_the_others() -> None:
    inputs, targets = rows()
    before = together(inputs, targets, Chance(_RATES, 0), squared_error, 1, False)
    others, wanted = rows(1)
    inputs[1], targets[1] = others[1], wanted[1]
    after = together(inputs, targets, Chance(_RATES, 0), squared_error, 1, False)
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
    stack = together(*rows(), Chance(_RATES, 0), squared_error, 1, False)
    assert [layer.p for layer in stack.network(2) if isinstance(layer, nn.Dropout)] == [pytest.approx(0.3)] * 2
    assert not any(isinstance(layer, nn.Dropout) for layer in stack.network(0))
