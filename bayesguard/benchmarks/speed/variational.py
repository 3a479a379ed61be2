"""Variational inference: a training step beside a plain one, and a prediction of S draws beside S plain passes."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks.networks import ResNet20
from bayesguard.benchmarks.speed.bayesian_peers import BAYESIAN, Bayesian
from bayesguard.benchmarks.speed.dropout import passes_of_loop
from bayesguard.benchmarks.speed.measure import Call, Candidate, calling, interleaved
from bayesguard.benchmarks.speed.networks import lenet, members, mlp
from bayesguard.benchmarks.speed.peers import collect, quiet
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row, row_of
from bayesguard.errors import BayesguardError

_BATCH = 128
_NUM_DATA = 50_000
# The number of draws that the demands are about.
_DRAWS = 20


class _Kind(NamedTuple):
    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    must: float
    aim: float


KINDS = (
    _Kind("MLP 784-400-400-10", partial(mlp, (784, 400, 400, 10), 0.0), (784,), 2.0, 1.5),
    _Kind("LeNet", partial(lenet, 0.0), (1, 28, 28), 1.1, 0.77),
    _Kind("ResNet-20", partial(ResNet20, 3, 10, 32, 0.0), (3, 32, 32), 1.05, 0.66),
)


def rows(settings: Settings) -> list[Row]:
    """Time training steps of every network, and predictions at every number of draws."""
    numbers = sorted({_DRAWS, *settings.samples})
    return [
        row
        for kind in KINDS
        for row in (_training(kind, settings), *(_prediction(kind, number, settings) for number in numbers))
    ]


def _data(kind: _Kind, settings: Settings) -> tuple[Tensor, Tensor]:
    number = 16 if settings.quick else _BATCH
    inputs = torch.randn(number, *kind.shape, device=settings.device)
    return inputs, torch.randint(10, (number,), device=settings.device)


def _network(kind: _Kind, settings: Settings) -> nn.Module:
    return members(kind.make, 1, settings.device)[0]


def _training(kind: _Kind, settings: Settings) -> Row:
    inputs, targets = _data(kind, settings)
    network = _network(kind, settings)
    # As `fit` trains it: kernels and images in channels-last order.
    predictor = bg.Variational(network.to(memory_format=torch.channels_last)).train()  # type: ignore[call-overload]
    images = inputs.to(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs
    peers = collect(BAYESIAN, _network(kind, settings), say=settings.say) if settings.peers else {}
    plain = _network(kind, settings).train()
    candidates = {
        "ours": _step(predictor, lambda: predictor.loss(images, targets, num_data=_NUM_DATA)),
        "plain step": _step(plain, lambda: nn.functional.cross_entropy(plain(inputs), targets)),
        **{name: quiet(_step_of(peer, inputs, targets)) for name, peer in peers.items()},
    }
    timings = interleaved(
        {name: calling(call) for name, call in candidates.items()}, settings.repeats, settings.clock, optional=peers
    )
    name = f"variational training step, {kind.title}, N={len(inputs)}"
    note = "all weights random, shared samples, fused Adam for all; ours in channels-last order, as `fit` trains"
    return row_of(
        timings, "variational", name, "plain step", peers=list(peers), must=kind.must, aim=kind.aim, note=note
    )


def _step(module: nn.Module, loss: Callable[[], Tensor]) -> Call:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _step_of(peer: Bayesian, inputs: Tensor, targets: Tensor) -> Call:
    peer.network.to(inputs.device).train()
    return _step(peer.network, lambda: peer.loss(inputs, targets, _NUM_DATA))


@torch.no_grad()
def _prediction(kind: _Kind, number: int, settings: Settings) -> Row:
    inputs, _ = _data(kind, settings)
    network = _network(kind, settings)
    predictor = bg.Variational(network, num_samples=number)
    _check(predictor, inputs)
    is_main = number == _DRAWS
    peers = collect(BAYESIAN, network, say=settings.say) if settings.peers and is_main else {}
    passes = passes_of_loop(network.eval(), inputs, settings)(number)

    def averaged(module: nn.Module) -> Candidate:
        module.to(inputs.device).eval()

        def call() -> Tensor:
            with torch.no_grad():
                return torch.stack([module(inputs).softmax(-1) for _ in range(passes)]).mean(0)

        return calling(quiet(call), number / passes)

    candidates = {
        "ours": calling(lambda: predictor(inputs).probs),
        "plain passes": averaged(network),
        **{name: averaged(peer.network) for name, peer in peers.items()},
    }
    timings = interleaved(candidates, settings.repeats, settings.clock, optional=peers)
    name = f"variational prediction, {kind.title}, N={len(inputs)}, S={number}"
    scaled = f"; the plain passes and the others are {passes}, scaled to {number}" if passes < number else ""
    must, aim = (1.2, 1.0) if is_main else (None, None)
    return row_of(
        timings,
        "variational",
        name,
        "plain passes",
        peers=list(peers),
        must=must,
        aim=aim,
        note=f"draws of the weights are kept between batches; {predictor.strategy}{scaled}",
    )


def _check(predictor: bg.Variational, inputs: Tensor) -> None:
    """Raise where a draw is not the network under its weights."""
    outputs = predictor.draw_outputs(inputs, num_samples=2)
    weights = predictor.weight_draws(2)
    second = {name: value[1] for name, value in weights.items()}
    want = torch.func.functional_call(predictor.network, second, (inputs,))
    if not torch.allclose(outputs[1], want, rtol=1e-3, atol=1e-4):
        raise BayesguardError("a draw is not the network under its sample of the weights")
