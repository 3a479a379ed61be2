"""Prediction under autocast to bfloat16, beside the same in float32 and the plain loops in both."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.benchmarks.speed.dropout import DEMANDS, loop, passes_of_loop
from bayesguard.benchmarks.speed.ensembles import ENSEMBLES, Ensemble, built
from bayesguard.benchmarks.speed.ensembles import loop as loop_over_members
from bayesguard.benchmarks.speed.measure import Candidate, calling, interleaved
from bayesguard.benchmarks.speed.networks import subject
from bayesguard.benchmarks.speed.peers import in_dropout_mode
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row, row_of


def rows(settings: Settings) -> list[Row]:
    """Time MC dropout on every network, and the large ensembles."""
    with torch.no_grad():
        dropouts = [_dropout(key, settings) for key in DEMANDS]
        large = [kind for kind in ENSEMBLES if kind.inputs[0] > 1]
        return [*dropouts, *(_ensemble(kind, count, settings) for kind in large for count in settings.members)]


def in_half(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Return a call that runs under autocast to bfloat16."""

    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return call()

    return run


def _dropout(key: str, settings: Settings) -> Row:
    chosen, number = subject(key, settings.device, quick=settings.quick), settings.main_samples
    network, inputs = chosen.network, chosen.inputs
    predictor = bg.MCDropout(network, num_samples=number)
    passes = passes_of_loop(network, inputs, settings)(number)
    naive, scale = in_dropout_mode(deepcopy(network)), number / passes

    def plain() -> Tensor:
        return loop(naive, inputs, passes)

    title = f"bfloat16, MC dropout, {chosen.title}, S={number}"
    return _row(title, lambda: predictor(inputs).probs, plain, scale, settings, lambda: predictor.strategy)


def _ensemble(kind: Ensemble, count: int, settings: Settings) -> Row:
    networks, inputs = built(kind, count, settings)
    ensemble = bg.DeepEnsemble(networks)

    def plain() -> Tensor:
        return loop_over_members(networks, inputs)

    title = f"bfloat16, ensemble prediction, {kind.title}, N={len(inputs)}, M={count}"
    return _row(title, lambda: ensemble(inputs).probs, plain, 1.0, settings, lambda: ensemble.strategy, kind.must, 0.5)


def _row(
    title: str,
    ours: Callable[[], Tensor],
    plain: Callable[[], Tensor],
    scale: float,
    settings: Settings,
    strategy: Callable[[], str],
    must: float | None = None,
    aim: float | None = None,
) -> Row:
    half = in_half(ours, settings.device)
    candidates: dict[str, Candidate] = {
        "ours": calling(half),
        "ours in float32": calling(ours),
        "loop in float32": calling(plain, scale),
        "loop in bfloat16": calling(in_half(plain, settings.device), scale),
    }
    timings = interleaved(candidates, settings.repeats, settings.clock)
    apart = float((ours() - half()).abs().max())  # the strategy that is said is then that of half precision
    single = timings.ratio("ours in float32", "loop in float32").median
    note = f"ours in float32 {single:.3g}; probabilities at most {apart:.2g} from those; {strategy()}"
    peers = ["loop in bfloat16"]
    return row_of(timings, "bfloat16", title, "loop in float32", peers=peers, note=note, must=must, aim=aim)
