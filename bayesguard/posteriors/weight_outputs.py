"""A network's outputs under many samples of its weights: in a loop, in pairs, vectorised, or from shared features.

The ways that give the loop's outputs are timed once for each kind of input, and the fastest is remembered.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from bayesguard.errors import IdenticalDraws, UnsupportedNetwork
from bayesguard.layers import at_mean
from bayesguard.sampling import Forward
from bayesguard.sampling.agreement import difference, first_line
from bayesguard.sampling.choice import Choice, cost_line, fastest, memory_line, seconds_of
from bayesguard.sampling.memory import bytes_between
from bayesguard.sampling.mirrored import MirroredPairs, Place
from bayesguard.sampling.random_weights import RandomWeights
from bayesguard.sampling.same_numbers import copies, same_numbers
from bayesguard.weights import Weights

_DRAWS_PER_CHUNK = 8
_CACHE_BYTES = 1 << 28
# A vectorised pass of this many weights at once is never the faster one, and only takes memory.
_MAX_VECTORISED = 1 << 24


class Plan(NamedTuple):
    """Which way is used for one kind of input, and why; where it was measured, what it costs."""

    way: str
    reason: str
    plain_pass: float | None = None  # seconds of a pass at the mean
    once: float = 0.0  # seconds of what all draws of a call share
    per_draw: float = 0.0  # seconds of a draw, its weights given
    memory: int = 0  # bytes beside those of one pass

    def explain(self, num_samples: int, weights: int) -> str:
        """Say what draws cost beside plain passes, and what memory they take with bytes of weights that are kept."""
        if self.plain_pass is None:
            return ""
        seconds = self.once + num_samples * self.per_draw
        return f"\n{cost_line(f'{num_samples} draws', seconds, self.plain_pass)}\n{memory_line(self.memory + weights)}"


class WeightOutputs:
    """Computes outputs `[s, N, ...]` of a network under `s` samples of its weights.

    Copies and pickles are empty: what is remembered belongs to these very weights.

    Args:
        weights: The random weights of the network.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.last: Plan | None = None
        self._plans: dict[Any, Plan] = {}
        self._cache: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._made_of: list[Tensor] = []

    def __reduce__(self) -> Any:
        return WeightOutputs, (self.weights,)

    @property
    def strategy(self) -> str:
        """How the last outputs were computed, and why so."""
        return "not used yet" if self.last is None else f"{self.last.way} ({self.last.reason})"

    def keep_draws_of(self, tensors: Sequence[Tensor]) -> None:
        """Forget the weights of draws that were made of other numbers than these."""
        if not self._made_of or not same_numbers(self._made_of, tensors):
            # A new one: another thread may be looking at the old.
            self._cache = OrderedDict()
            self._made_of = copies(tensors)

    def remembered(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return the weights of some draws, made once for all batches while they fit into 256 MiB."""
        flats = self._cache.get(key)
        if flats is None:
            flats = make()
            while self._cache and sum(held.nbytes for held in (flats, *self._cache.values())) > _CACHE_BYTES:
                self._cache.popitem(last=False)
            if flats.nbytes <= _CACHE_BYTES:
                self._cache[key] = flats
        return flats

    def kept_bytes(self, num_samples: int) -> int:
        """Return the bytes of the weights of draws that are remembered, and of what they were made of."""
        each = sum(tensor.nbytes for tensor in self.weights.tensors())
        draws = each * num_samples
        held = draws if draws <= _CACHE_BYTES else max(_CACHE_BYTES, each * _DRAWS_PER_CHUNK)
        return held + sum(tensor.nbytes for tensor in self._made_of)

    def chunks(
        self,
        forward: Forward,
        flats: Callable[[range], Tensor],
        draws: range,
        draws_per_chunk: int | None = None,
        *,
        mirrored: bool = False,
    ) -> Iterator[Tensor]:
        """Yield the outputs of consecutive draws.

        Args:
            forward: The network's call.
            flats: The weights `[s, P]` of consecutive draws by their numbers.
            draws: Numbers of the draws.
            draws_per_chunk: The most draws in a chunk; None for eight.
            mirrored: Whether the weights of draws 2k and 2k + 1 lie mirrored about the parameters.

        Raises:
            BadInput: The network's parameters are others than those of the weights.
            IdenticalDraws: No call of the network takes a random weight.
        """
        self.weights.check_in(forward.network)
        # Every draw starts from what was given, whatever the network writes over.
        forward = forward.copying()
        step = min(draws_per_chunk or _DRAWS_PER_CHUNK, _DRAWS_PER_CHUNK)
        mirrored = mirrored and draws.start % 2 == 0 and step % 2 == 0
        run: Callable[[Tensor], Tensor] | None = None
        for start in range(draws.start, draws.stop, step):
            own = flats(range(start, min(start + step, draws.stop)))
            run = run or self._planned(forward, own, mirrored)
            yield run(own)

    def _planned(self, forward: Forward, flats: Tensor, mirrored: bool) -> Callable[[Tensor], Tensor]:
        """Return the way that was chosen as a function; where it fails, since the network was changed, the loop's."""
        key = (forward.signature, forward.num_rows.bit_length(), len(flats), mirrored)
        if key not in self._plans:
            self._plans[key] = self._make_plan(forward, flats, mirrored)
        plan = self.last = self._plans[key]
        run: Callable[[Tensor], Tensor] | None = None

        def guarded(flats: Tensor) -> Tensor:
            nonlocal run
            try:
                run = run or self._way(plan.way, forward)
                return run(flats)
            except Exception as error:
                if plan.way == "loop":
                    raise
                run = self._way("loop", forward)
                outputs = run(flats)  # What is the matter with the inputs is raised here.
                self.last = self._plans[key] = Plan("loop", f"{plan.way}: {first_line(error)}")
                return outputs

        return guarded

    def _way(self, way: str, forward: Forward) -> Callable[[Tensor], Tensor]:
        """Return the outputs `[s, N, ...]` of draws `[s, P]` as a function, which may remember what draws share."""
        if way == "vectorised":
            return torch.vmap(lambda flat: self.once(forward, flat))
        if way == "shared features":
            head = head_of(forward, self.weights)
            if head is None:
                raise UnsupportedNetwork("the output is no longer the last layer's alone")
            return torch.vmap(lambda flat: self.once(head, flat))
        if way == "mirrored pairs":
            return partial(self._paired, forward, shared := forward.copied(), MirroredPairs(shared.tensors()))
        return lambda flats: torch.stack([self.once(forward, flat) for flat in flats])

    def _paired(self, forward: Forward, shared: Forward, pairs: MirroredPairs, flats: Tensor) -> Tensor:
        outputs = []
        for number, flat in enumerate(flats):
            place: Place = "second" if number % 2 else "first" if number + 1 < len(flats) else "alone"
            outputs.append(self.once(shared, flat, pairs, place))
        if not same_numbers([*forward.tensors()], [*shared.tensors()]):
            raise UnsupportedNetwork("the network writes over its inputs")
        if not pairs.used:
            raise UnsupportedNetwork("no layer with random weights takes the inputs themselves")
        return torch.stack(outputs)

    def once(
        self, forward: Forward, flat: Tensor, pairs: MirroredPairs | None = None, place: Place = "alone"
    ) -> Tensor:
        """Return the outputs under one sample `[P]`."""
        samples = dict(zip(map(id, self.weights.tensors()), self.weights.split(flat), strict=True))
        handlers = None if pairs is None else pairs.handlers(samples, place)
        with at_mean(), RandomWeights(samples, handlers) as mode:
            outputs = forward()
        if not mode.used and forward.num_rows:
            raise IdenticalDraws(
                "no call of the network takes one of its random weights, so every draw would be the same: a compiled "
                "network hides its calls (hand in the original), or the chosen weights are not used in its forward"
            )
        return outputs

    def _make_plan(self, forward: Forward, flats: Tensor, mirrored: bool) -> Plan:
        want = self._way("loop", forward)(flats)
        if len(flats) == 1 or forward.num_rows == 0:
            return Plan("loop", "one draw at a time")
        ways: dict[str, Callable[[], Tensor]] = {"loop": lambda: self._way("loop", forward)(flats)}
        reasons = []
        for way in self._candidates(forward, flats, mirrored):
            try:
                why = difference(self._way(way, forward)(flats), want)
            except Exception as error:  # Every network refuses in its own way; the loop goes on.
                why = first_line(error)
            if why:
                reasons.append(f"{way}: {why}")
            else:
                ways[way] = lambda way=way: self._way(way, forward)(flats)  # type: ignore[misc]
        if len(ways) == 1:
            return Plan("loop", "; ".join(reasons) or "the only way that is exact")
        return self._measured(forward, fastest(ways, flats.device), len(flats), want.nbytes)

    def _measured(self, forward: Forward, choice: Choice, draws: int, outputs: int) -> Plan:
        """Return the plan of the winner, with what it costs."""
        way, memory = choice.winner, outputs
        if way == "vectorised":
            row = forward.rows(slice(0, 1))
            memory += bytes_between(forward.network, lambda: _at_mean(row)) * forward.num_rows * (draws - 1)
        # One pass is timed, and may be interrupted; every way makes one at least, and the loop one a draw.
        timed = seconds_of(lambda: _at_mean(forward), forward.device)
        plain_pass = min(timed, choice.seconds["loop"] / draws, choice.seconds[way])
        # The features of all draws come of one pass a call.
        once = plain_pass if way == "shared features" else 0.0
        per_draw = (choice.seconds[way] - once) / draws
        return Plan(way, f"measured: {choice}", plain_pass, once, per_draw, memory)

    def _candidates(self, forward: Forward, flats: Tensor, mirrored: bool) -> list[str]:
        found = []
        if head_of(forward, self.weights) is not None:
            found.append("shared features")
        if mirrored:
            found.append("mirrored pairs")
        if flats.numel() <= _MAX_VECTORISED:
            found.append("vectorised")
        return found


def _at_mean(forward: Forward) -> Tensor:
    with at_mean():
        return forward()


def head_of(forward: Forward, weights: Weights) -> Forward | None:
    """Return the call of the last layer alone on its features, where that is all that the random weights are in.

    The output of the network has to be the layer's own output, the very tensor.
    """
    owners = {id(slot.owner): slot.owner for slot in weights.slots}
    if len(owners) != 1:
        return None
    layer = next(iter(owners.values()))
    # The features are what its hooks have made of them, and would go through them again.
    if layer._forward_pre_hooks or module_hooks._global_forward_pre_hooks:
        return None
    calls: list[tuple[Any, Any, Any]] = []
    hook = layer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    try:
        outputs = _at_mean(forward)
    finally:
        hook.remove()
    if len(calls) != 1 or calls[0][2] is not outputs or not isinstance(layer, nn.Linear):
        return None
    args, kwargs, _ = calls[0]
    head = Forward(layer, args, kwargs, None)
    return head if head.num_rows == forward.num_rows else None
