"""Training an ensemble: `fit` beside a plain loop that trains one member after another."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks.speed.ensembles import work_of
from bayesguard.benchmarks.speed.measure import Call, Candidate, interleaved
from bayesguard.benchmarks.speed.networks import lenet, members, mlp
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row, row_of

_BATCH = 64


class _Training(NamedTuple):
    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    rows: int
    epochs: int
    must: float


TRAININGS = (
    _Training("13-50-2", partial(mlp, (13, 50, 2), 0.0), (13,), 2, 1024, 8, 0.35),
    _Training("MLP 784-64-64-10", partial(mlp, (784, 64, 64, 10), 0.0), (784,), 10, 2048, 3, 0.65),
    _Training("MLP 784-400-400-10", partial(mlp, (784, 400, 400, 10), 0.0), (784,), 10, 2048, 2, 0.9),
    _Training("LeNet", partial(lenet, 0.0), (1, 28, 28), 10, 1024, 2, 0.75),
)


def rows(settings: Settings) -> list[Row]:
    """Time the training of every kind of member at every number of members."""
    return [_training(kind, count, settings) for kind in TRAININGS for count in settings.members]


def one_after_another(networks: list[nn.Module], inputs: Tensor, targets: Tensor, epochs: int) -> None:
    """Train each network by itself with Adam, on batches shuffled anew each epoch."""
    for network in networks:
        network.train()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(inputs), device=inputs.device).split(_BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(inputs[batch]), targets[batch]).backward()
                optimizer.step()


def vmapped(networks: list[nn.Module], inputs: Tensor, targets: Tensor, epochs: int) -> dict[str, Tensor]:
    """Train stacked copies of all networks at once by `torch.vmap`, on the same batches, and return them."""
    parameters, buffers = torch.func.stack_module_state(networks)
    base = networks[0].train()

    def loss(own: dict[str, Tensor], state: dict[str, Tensor], rows: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(base, (own, state), (rows,)), labels)

    gradients = torch.vmap(torch.func.grad(loss), in_dims=(0, 0, None, None))
    # Adam works element by element: on stacked parameters it is Adam for each member.
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), device=inputs.device).split(_BATCH):
            found = gradients(
                {name: value.detach() for name, value in parameters.items()}, buffers, inputs[batch], targets[batch]
            )
            for name, value in parameters.items():
                value.grad = found[name]
            optimizer.step()
    return parameters


def _training(kind: _Training, count: int, settings: Settings) -> Row:
    number = 2 * _BATCH if settings.quick else kind.rows
    epochs = 1 if settings.quick else kind.epochs
    inputs = torch.randn(number, *kind.shape, device=settings.device)
    targets = torch.randint(kind.classes, (number,), device=settings.device)

    def ours() -> Call:
        ensemble = bg.DeepEnsemble(members(kind.make, count, settings.device))
        return lambda: ensemble.fit((inputs, targets), epochs=epochs, batch_size=_BATCH)

    def by_hand(train: Callable[[list[nn.Module], Tensor, Tensor, int], object]) -> Candidate:
        def fresh() -> Call:
            networks = members(kind.make, count, settings.device)
            return lambda: train(networks, inputs, targets, epochs)

        return Candidate(fresh, repeatable=False)

    candidates = {"ours": Candidate(ours, repeatable=False), "one after another": by_hand(one_after_another)}
    optional = ["torch.vmap by hand"] if settings.peers else []
    candidates.update({name: by_hand(vmapped) for name in optional})
    timings = interleaved(candidates, settings.repeats, settings.clock, optional=optional)
    with torch.no_grad():
        operations, moved = work_of(members(kind.make, 1, settings.device)[0], inputs[:_BATCH])
    # A step is a pass and, for the two gradients, twice as much again; its parameters are read and written.
    steps = count * epochs * number / _BATCH
    least = settings.rates.seconds(3 * steps * operations, 3 * steps * moved)
    timings.seconds["limit"] = [least] * len(timings.seconds["ours"])
    name = f"ensemble training, {kind.title}, M={count}"
    note = f"{number} rows, {epochs} epochs, batches of {_BATCH}, Adam"
    return row_of(
        timings, "training", name, "one after another", peers=optional, limit="limit", must=kind.must, note=note
    )
