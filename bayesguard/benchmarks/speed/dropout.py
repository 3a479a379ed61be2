"""MC dropout: prediction beside the naive loop, the first call beside a later one, and what watching the calls costs."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from math import ceil
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks.speed.measure import Call, Candidate, calling, interleaved
from bayesguard.benchmarks.speed.networks import Subject, subject
from bayesguard.benchmarks.speed.peers import DROPOUT, Draws, collect, in_dropout_mode, quiet, spread_of_draws
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row, row_of
from bayesguard.sampling import Strategy

# Loops that would take longer are timed with fewer passes, three at least.
_LOOP_SECONDS = 2.0
# Peers whose draws vary by another factor than the loop's, further than this from 1, do another job.
_SPREAD = 0.4
# From here on the row says so.
_NOTED = 0.07


class Demand(NamedTuple):
    """What a ratio may be, and what would be good."""

    masks: Literal["shared", "per_example"]
    baseline: str
    must: float
    aim: float


DEMANDS = {
    "resnet18": (Demand("shared", "one pass", 1.10, 0.8),),
    "lenet": (Demand("shared", "loop", 0.06, 0.05),),
    "mlp": (Demand("per_example", "loop", 0.45, 0.40), Demand("shared", "loop", 0.25, 0.17)),
    "transformer": (Demand("shared", "loop", 0.9, 0.7),),
    "lstm": (Demand("shared", "loop", 0.9, 0.7),),
}


def rows(key: str, settings: Settings) -> list[Row]:
    """Time one network: every demand at every number of draws, and the first call."""
    chosen = subject(key, settings.device, quick=settings.quick)
    with torch.no_grad():
        passes = passes_of_loop(chosen.network, chosen.inputs, settings)
        found = [
            _prediction(chosen, demand, number, passes(number), settings)
            for demand in DEMANDS[key]
            for number in settings.samples
        ]
        return [*found, _first_call(chosen, settings)]


def loop(network: nn.Module, inputs: Tensor, passes: int) -> Tensor:
    """Return mean probabilities the way people write it: dropout in training mode, one pass a draw."""
    return sum((network(inputs).softmax(-1) for _ in range(passes)), torch.zeros((), device=inputs.device)) / passes


def passes_of_loop(network: nn.Module, inputs: Tensor, settings: Settings) -> Callable[[int], int]:
    """Return how many of so many passes a loop is timed with: all, or those that fit into two seconds."""
    once = interleaved({"pass": calling(lambda: network(inputs))}, 1, settings.clock).of("pass").median

    def passes(number: int) -> int:
        return min(number, max(3, ceil(_LOOP_SECONDS / once)))

    return passes


def _prediction(chosen: Subject, demand: Demand, number: int, passes: int, settings: Settings) -> Row:
    network, inputs = chosen.network, chosen.inputs
    predictor = bg.MCDropout(network, masks=demand.masks, num_samples=number)
    naive = in_dropout_mode(deepcopy(network))
    is_main = number == settings.main_samples
    with_peers = settings.peers and is_main and demand is DEMANDS[chosen.key][-1]
    notes: list[str] = []
    peers = _same_job(chosen, naive, passes, settings, notes) if with_peers else {}
    features = chosen.before(inputs)
    scale = number / passes
    candidates = {
        "ours": calling(lambda: predictor(inputs).probs),
        "loop": calling(lambda: loop(naive, inputs, passes), scale),
        "one pass": calling(lambda: network(inputs)),
        "before": calling(lambda: chosen.before(inputs)),
        "after": calling(lambda: chosen.after(features)),
        **{name: calling(quiet(_drawing(draw, passes)), scale) for name, draw in peers.items()},
    }
    timings = interleaved(candidates, settings.repeats, settings.clock, optional=peers)
    for name, reason in timings.skipped.items():
        settings.say(f"skipped {name} for {chosen.title}: {reason}")
    timings.combined("limit", {"before": 1, "after": number})
    notes.insert(0, predictor.strategy)
    if passes < number:
        notes.append(f"the loop and the others are timed with {passes} draws and scaled to {number}")
    masks = f", masks {demand.masks}" if len(DEMANDS[chosen.key]) > 1 else ""
    demanded = {"must": demand.must, "aim": demand.aim} if is_main else {}
    return row_of(
        timings,
        chosen.key,
        f"MC dropout, {chosen.title}, S={number}{masks}",
        demand.baseline,
        peers=list(peers),
        limit="limit",
        note="; ".join(notes),
        **demanded,
    )


def _first_call(chosen: Subject, settings: Settings) -> Row:
    number = settings.main_samples

    def fresh() -> Call:
        predictor = bg.MCDropout(chosen.network, num_samples=number)
        return lambda: predictor(chosen.inputs).probs

    used = bg.MCDropout(chosen.network, num_samples=number)
    candidates = {
        "ours": Candidate(fresh, repeatable=False),
        "a later call": calling(lambda: used(chosen.inputs).probs),
    }
    timings = interleaved(candidates, settings.repeats, settings.clock)
    name = f"first call, MC dropout, {chosen.title}, S={number}"
    return row_of(timings, chosen.key, name, "a later call", must=3.0, aim=2.0)


def overhead(settings: Settings) -> list[Row]:
    """A draw of a network of sixty small modules beside its plain pass in eval mode: as chosen, and in the plain loop."""
    modules = [module for _ in range(20) for module in (nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.1))]
    network = nn.Sequential(*modules).to(settings.device).eval()
    inputs = torch.randn(32, 256, device=settings.device)
    # Masks are made for eight draws at a time, so that one draw alone would pay for eight.
    number = 48
    name = f"one of {number} draws, 60 modules (20 x Linear(256), ReLU, Dropout), N=32"
    strategies: tuple[tuple[Strategy, str], ...] = (("auto", name), ("loop", "the same, draw by draw"))
    found = []
    for strategy, title in strategies:
        predictor = bg.MCDropout(network, strategy=strategy)
        candidates = {
            "ours": calling(partial(predictor.draw_outputs, inputs, num_samples=number), 1 / number),
            "one pass": calling(lambda: network(inputs)),
        }
        with torch.no_grad():
            timings = interleaved(candidates, max(settings.repeats, 9), settings.clock)
        found.append(row_of(timings, "overhead", title, "one pass", must=1.3, aim=1.15, note=predictor.strategy))
    return found


def _same_job(chosen: Subject, naive: nn.Module, passes: int, settings: Settings, notes: list[str]) -> dict[str, Draws]:
    """Return the peers whose draws vary as those of the loop do: in the others some of the dropout never fires."""
    count = max(3, min(passes, 8))
    usual = spread_of_draws(torch.stack([naive(chosen.inputs) for _ in range(count)]))
    kept: dict[str, Draws] = {}
    for name, draw in collect(DROPOUT, chosen.network, chosen.inputs, say=settings.say).items():
        try:
            spread = spread_of_draws(quiet(partial(draw, count))())
        except Exception as error:
            reason = f"it failed with {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        else:
            if abs(spread / usual - 1) < _SPREAD:
                kept[name] = draw
                if abs(spread / usual - 1) > _NOTED:
                    notes.append(f"the draws of {name} vary {spread / usual:.2g} times as much as the loop's")
                continue
            reason = f"its draws vary {spread / usual:.2g} times as much as those of the loop"
        settings.say(f"skipped {name} for {chosen.title}: {reason}")
    return kept


def _drawing(draw: Draws, passes: int) -> Call:
    return lambda: draw(passes).softmax(-1).mean(0)
