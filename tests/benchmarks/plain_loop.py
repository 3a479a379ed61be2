"""Training one network by torch's layers, autograd and Adam, from the random numbers with which many were trained at once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bayesguard.benchmarks.many_networks import Chance, Loss


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


def alone(
    index: int,
    inputs: Tensor,
    targets: Tensor,
    chance: Kept,
    loss: Loss,
    *,
    num_outputs: int,
    width: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    cosine: bool,
    decay: float,
) -> nn.Sequential:
    """Train network number `index` on its rows, inputs [N, D] and targets [N]."""
    features = inputs.shape[1]
    hidden, output = nn.Linear(features, width).double(), nn.Linear(width, num_outputs).double()
    with torch.no_grad():
        hidden.weight.copy_(chance.first[0][index].T)
        output.weight.copy_(chance.first[1][index])
        hidden.bias.zero_()
        output.bias.zero_()
    network = nn.Sequential(hidden, nn.ReLU(), output)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    masks, keep = chance.masks(index), 1 - float(chance.rates[index])
    for order in chance.passes:
        for batch in order[index].split(batch_size):
            # A row lies in memory with a 1 and its target behind the features; what hits those two is nothing.
            seen = masks[len(batch) * (features + 2)].pop(0).view(len(batch), -1)[:, :features] / keep
            between = masks[len(batch) * width].pop(0).view(len(batch), -1) / keep
            outputs = output(hidden(inputs[batch] * seen).relu() * between)
            value = loss(outputs.T.unsqueeze(0), targets[batch].unsqueeze(0)).mean()
            value = value + decay * (hidden.weight.square().sum() + output.weight.square().sum())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        if cosine:
            schedule.step()
    assert not any(masks.values())
    return network
