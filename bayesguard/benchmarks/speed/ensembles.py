"""Deep ensembles: prediction beside a loop over the members."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks.speed.measure import calling, interleaved
from bayesguard.benchmarks.speed.networks import lenet, members, mlp
from bayesguard.benchmarks.speed.peers import ENSEMBLE, collect, quiet
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row, row_of
from bayesguard.errors import BayesguardError


class Ensemble(NamedTuple):
    """Members of one architecture, the shape of their inputs, and what the ratio to a loop may be."""

    title: str
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    must: float


ENSEMBLES = (
    Ensemble("MLP 20-64-64-3", partial(mlp, (20, 64, 64, 3), 0.0), (1, 20), 0.5),
    Ensemble("MLP 784-1024-1024-10", partial(mlp, rate=0.0), (512, 784), 1.0),
    Ensemble("LeNet", partial(lenet, 0.0), (512, 1, 28, 28), 1.0),
)


def rows(settings: Settings) -> list[Row]:
    """Time prediction of every ensemble at every number of members."""
    with torch.no_grad():
        return [_prediction(kind, count, settings) for kind in ENSEMBLES for count in settings.members]


def work_of(network: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """Return the floating-point operations of one pass, and the bytes of its parameters, inputs and outputs."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        outputs = network(inputs)
    values = sum(parameter.numel() for parameter in network.parameters()) + inputs.numel() + outputs.numel()
    return float(counter.get_total_flops()), 4.0 * values


def loop(networks: list[nn.Module], inputs: Tensor) -> Tensor:
    """Return mean probabilities of the members, one after another."""
    return torch.stack([network(inputs).softmax(-1) for network in networks]).mean(0)


def built(kind: Ensemble, count: int, settings: Settings) -> tuple[list[nn.Module], Tensor]:
    """Return the members, and the inputs that they are timed on."""
    networks = members(kind.make, count, settings.device)
    rows, *shape = kind.inputs
    rows = min(rows, 32) if settings.quick else rows
    return networks, torch.randn(rows, *shape, device=settings.device)


def _prediction(kind: Ensemble, count: int, settings: Settings) -> Row:
    networks, inputs = built(kind, count, settings)
    ensemble = bg.DeepEnsemble(networks)
    if not torch.allclose(ensemble(inputs).probs, loop(networks, inputs), rtol=1e-4, atol=1e-6):
        raise BayesguardError(f"the ensemble of {kind.title} does not predict what a loop over its members does")
    peers = collect(ENSEMBLE, networks, inputs, say=settings.say) if settings.peers else {}
    candidates = {
        "ours": calling(lambda: ensemble(inputs).probs),
        "loop": calling(lambda: loop(networks, inputs)),
        **{name: calling(quiet(call)) for name, call in peers.items()},
    }
    timings = interleaved(candidates, settings.repeats, settings.clock, optional=peers)
    operations, moved = work_of(networks[0], inputs)
    timings.seconds["limit"] = [settings.rates.seconds(count * operations, count * moved)] * len(
        timings.seconds["ours"]
    )
    return row_of(
        timings,
        "ensemble",
        f"ensemble prediction, {kind.title}, N={len(inputs)}, M={count}",
        "loop",
        peers=list(peers),
        limit="limit",
        must=kind.must,
        note=ensemble.strategy,
    )
