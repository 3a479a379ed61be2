"""Many small networks trained at once: each on its own rows, in its own order, with its own dropout masks and its own rates.

A network of one hidden layer of 50 units takes microseconds a step, of which most is not arithmetic. Here B of them take their
steps as batched matrix products over stacked weights. Nothing of one network enters another.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


class Stack(NamedTuple):
    """Weights of B networks of one hidden layer of rectified units, with dropout before both layers.

    Attributes:
        hidden: [B, D + 1, H], the last row for the biases.
        output: [B, C, H].
        bias: [B, C].
        rates: [B], of dropout.
    """

    hidden: Tensor
    output: Tensor
    bias: Tensor
    rates: Tensor

    def network(self, index: int) -> nn.Sequential:
        """Return one of them as a module, [N, D] to [N, C]; a rate of 0 has no dropout layers."""
        rate, (rows, width), outputs = float(self.rates[index]), self.hidden.shape[1:], self.output.shape[1]
        first, last = (nn.Linear(*shape, dtype=self.hidden.dtype) for shape in ((rows - 1, width), (width, outputs)))
        with torch.no_grad():
            first.weight.copy_(self.hidden[index, :-1].T)
            first.bias.copy_(self.hidden[index, -1])
            last.weight.copy_(self.output[index])
            last.bias.copy_(self.bias[index])
        before, between = ([nn.Dropout(rate)] if rate else [] for _ in range(2))
        return nn.Sequential(*before, first, nn.ReLU(), *between, last)


class Chance:
    """What is random in training B networks: their first weights, the orders of their rows, and the units they drop."""

    def __init__(self, rates: Tensor, seed: int) -> None:
        """Take the dropout rates [B], each at least 0 and below 1."""
        self.rates = rates
        self.generator = torch.Generator().manual_seed(seed)
        self._hits = -torch.log1p(-rates.double())

    def uniform(self, *shape: int, limit: float) -> Tensor:
        """Return numbers from a uniform law on (-limit, limit)."""
        return torch.rand(shape, generator=self.generator, dtype=self.rates.dtype).mul_(2 * limit).sub_(limit)

    def orders(self, num_rows: int) -> Tensor:
        """Return a random order of the rows for each network, [B, N]."""
        return torch.stack([torch.randperm(num_rows, generator=self.generator) for _ in self.rates])

    def dropped(self, num_units: int, steps: int) -> Sequence[Tensor]:
        """Return which units are dropped in each of some steps, as places in a flat [B * U]; some come more than once.

        A Poisson number of hits a network, of mean -log(1 - rate) a unit, each on a unit chosen at random: every unit is
        then missed with probability 1 - rate, independently of all others, and few random numbers are needed.
        """
        counts = torch.poisson((self._hits * num_units).expand(steps, -1), generator=self.generator).long()
        starts = torch.arange(0, counts.shape[1] * num_units, num_units).expand(steps, -1)
        places = torch.repeat_interleave(starts.reshape(-1), counts.view(-1))
        places += torch.randint(num_units, places.shape, generator=self.generator)
        return places.split(counts.sum(1).tolist())


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the squared error of each example, [B, N], of outputs [B, 1, N]."""
    return (outputs[:, 0] - targets).square()


def normal_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the NLL of each example in nats, [B, N], as `likelihoods.HeteroscedasticGaussian` reads outputs [B, 2, N]."""
    location, scale = outputs[:, 0], F.softplus(outputs[:, 1]).clamp_min(1e-6)
    return ((targets - location) / scale).square() / 2 + scale.log() + math.log(2 * math.pi) / 2


def train(
    inputs: Tensor,
    targets: Tensor,
    chance: Chance,
    *,
    loss: Loss = squared_error,
    num_outputs: int = 1,
    width: int = 50,
    epochs: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    cosine: bool = False,
    decay: Tensor | float = 0.0,
) -> Stack:
    """Train B networks with Adam from Glorot's uniform law, and return their weights.

    Args:
        inputs: [B, N, D].
        targets: [B, N].
        chance: The rates and the source of all randomness; `inputs` have the dtype of its rates.
        loss: From outputs [B, C, M] and targets [B, M] to [B, M]; each network's mean of it is what that network minimises.
        num_outputs: C.
        width: Hidden units.
        epochs: Passes over the rows; the last batch of a pass is smaller where the rows do not come out even.
        batch_size: Rows a step.
        learning_rate: Adam's, the first one where it falls.
        cosine: Whether it falls to 0 by a half cosine, epoch by epoch.
        decay: Added to each loss times the sum of the squared weights (not of the biases); a number, or [B].
    """
    (count, num_rows, features), rates = inputs.shape, chance.rates
    packed, stack = _first_weights(chance, features, width, num_outputs)
    weights = nn.Parameter(packed)
    weights.grad = torch.zeros_like(packed)
    gradients = _views(weights.grad, features, width, num_outputs, rates)
    decays = (
        2
        * torch.as_tensor(decay, dtype=rates.dtype).expand(count).unsqueeze(1)
        * _is_weight(features, width, num_outputs)
    )
    optimizer = torch.optim.Adam([weights], lr=learning_rate, fused=True)
    # A row is its features, a 1 for the bias, and its target, so that a batch is gathered once.
    table = torch.cat([inputs, torch.ones_like(targets).unsqueeze(2), targets.unsqueeze(2)], 2).flatten(0, 1)
    starts = torch.arange(0, count * num_rows, num_rows).unsqueeze(1)
    decayed = bool(decays.any())
    memory = torch.empty(count * min(batch_size, num_rows) * width, dtype=rates.dtype)
    for epoch in range(epochs):
        if cosine:
            optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        batches = (chance.orders(num_rows) + starts).split(batch_size, 1)
        dropped = _dropped(chance, [batch.shape[1] for batch in batches], (features + 2, width))
        for places, (inputs_dropped, units_dropped) in zip(batches, dropped, strict=True):
            rows = table.index_select(0, places.reshape(-1))
            expected = rows[:, -1].view(count, -1).clone()
            rows.view(-1).index_fill_(0, inputs_dropped, 0.0)
            rows[:, -2] = 1.0
            seen = rows.view(count, -1, features + 2)[..., :-1]
            _gradients(seen, expected, units_dropped, stack, gradients, loss, memory)
            if decayed:
                weights.grad.addcmul_(packed, decays)
            optimizer.step()
    return stack


def _dropped(chance: Chance, sizes: Sequence[int], units: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Return what is dropped of the two layers in each batch of a pass; all batches but the last have one size."""
    found: list[tuple[Tensor, Tensor]] = []
    for size, steps in ((sizes[0], len(sizes) - 1), (sizes[-1], 1)):
        before, between = (chance.dropped(size * number, steps) for number in units)
        found += zip(before, between, strict=True)
    return found


def _gradients(
    inputs: Tensor, targets: Tensor, dropped: Tensor, stack: Stack, gradients: Stack, loss: Loss, memory: Tensor
) -> None:
    """Write the gradients of every network's mean loss over its rows: inputs [B, M, D + 1], targets [B, M].

    Units are rectified, so what a unit gives is its input times 0 or 1; the sums over examples that the gradients of both
    layers need are therefore one batched product, of the inputs weighted by the losses' slopes with those zeros and ones.
    """
    (count, batch, columns), width = inputs.shape, stack.hidden.shape[2]
    kept = (1 / (1 - stack.rates)).view(count, 1, 1)
    scale = kept.repeat(1, columns, 1)
    scale[:, -1] = 1.0
    hidden, output = stack.hidden * scale, stack.output * kept
    units = torch.bmm(inputs, hidden, out=memory[: count * batch * width].view(count, batch, width)).relu_()
    units.view(-1).index_fill_(0, dropped, 0.0)
    outputs = torch.baddbmm(stack.bias.unsqueeze(2), output, units.transpose(1, 2)).requires_grad_()
    (slopes,) = torch.autograd.grad(loss(outputs, targets).mean(1).sum(), outputs)
    weighted = (slopes.transpose(1, 2).unsqueeze(3) * inputs.unsqueeze(2)).flatten(2)
    sums = torch.bmm(weighted.transpose(1, 2), units.sign_()).view(count, -1, columns, width)
    torch.mul((sums * output.unsqueeze(2)).sum(1), scale, out=gradients.hidden)
    torch.mul((sums * hidden.unsqueeze(1)).sum(2), kept, out=gradients.output)
    torch.sum(slopes, 2, out=gradients.bias)


def _first_weights(chance: Chance, features: int, width: int, num_outputs: int) -> tuple[Tensor, Stack]:
    """Return the weights of all networks in one tensor [B, P], and as they are seen in it."""
    count = len(chance.rates)
    size = (features + 1) * width + num_outputs * width + num_outputs
    packed = torch.zeros(count, size, dtype=chance.rates.dtype)
    stack = _views(packed, features, width, num_outputs, chance.rates)
    stack.hidden[:, :-1] = chance.uniform(count, features, width, limit=math.sqrt(6 / (features + width)))
    stack.output.copy_(chance.uniform(count, num_outputs, width, limit=math.sqrt(6 / (width + num_outputs))))
    return packed, stack


def _views(packed: Tensor, features: int, width: int, num_outputs: int, rates: Tensor) -> Stack:
    hidden, output, bias = packed.split([(features + 1) * width, num_outputs * width, num_outputs], 1)
    return Stack(hidden.unflatten(1, (features + 1, width)), output.unflatten(1, (num_outputs, width)), bias, rates)


def _is_weight(features: int, width: int, num_outputs: int) -> Tensor:
    """Return [P], 1 for weights and 0 for biases."""
    weights = torch.ones((features + 1) * width + num_outputs * width + num_outputs)
    weights[features * width : (features + 1) * width] = 0.0
    weights[-num_outputs:] = 0.0
    return weights
