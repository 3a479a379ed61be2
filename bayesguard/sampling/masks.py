"""Dropout masks as pure functions of (seed, draw, call): one draw is one function, whatever the batch."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bayesguard.errors import BayesguardError
from bayesguard.sampling.streams import stream


class PassesDiffer(BayesguardError, RuntimeError):
    """Two passes through the same network made different random calls, so no plan can be made for it."""


class BatchAxis(NamedTuple):
    """Where the examples lie in one random call's tensor: `axis` has size N * `per_example`."""

    axis: int
    per_example: int


class MaskCall(NamedTuple):
    """One random call of a pass: the mask's shape, its drop rate and its device."""

    shape: tuple[int, ...]
    rate: float
    device: torch.device


class MaskSource(Protocol):
    """Where the intercepted calls get their masks from."""

    calls: list[MaskCall]

    def rate(self, p: float, *, module: bool) -> float:
        """Return the drop rate to use where the network says `p`."""

    def keep(self, shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
        """Return a boolean tensor that broadcasts to `shape`: True where a unit is kept."""


class Masks:
    """The masks of a group of draws through one pass.

    Args:
        seed: The predictor's seed.
        draws: Indices of the draws. More than one: the batch holds the examples once per draw, draw by draw.
        layout: For each random call where its examples lie, or None for a mask of the full shape.
        per_example: Each example has masks of its own, instead of one mask a draw.
        p: A drop rate that replaces the network's own.
        offset: Index of the batch's first example, which keeps per-example masks of later batches apart.
    """

    def __init__(
        self,
        seed: int,
        draws: Sequence[int],
        layout: Sequence[BatchAxis | None] | None = None,
        *,
        per_example: bool = False,
        p: float | None = None,
        offset: int = 0,
    ) -> None:
        self.seed, self.draws, self.layout = seed, draws, layout
        self.per_example, self.p, self.offset = per_example, p, offset
        self.calls: list[MaskCall] = []

    def rate(self, p: float, *, module: bool) -> float:
        # A rate of one's own switches on a Dropout(0.0), but not an attention or a recurrent layer without dropout.
        return self.p if self.p is not None and (module or p > 0) else p

    def keep(self, shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
        call = MaskCall(tuple(shape), rate, device)
        place = self._place(len(self.calls), call)
        keeps = [self.keep_of(draw, len(self.calls), place, call) for draw in self.draws]
        self.calls.append(call)
        return spread(torch.stack(keeps), place, call.shape) if len(keeps) > 1 else _tile(keeps[0], place, shape)

    def _place(self, index: int, call: MaskCall) -> BatchAxis | None:
        if self.layout is None:
            return None
        if index >= len(self.layout):
            raise PassesDiffer("the network made more random calls than in the pass that planned them")
        place = self.layout[index]
        if len(self.draws) > 1 and place is None:
            raise PassesDiffer("a random call has no axis of examples, so draws cannot share a batch")
        return place

    def keep_of(self, draw: int, index: int, place: BatchAxis | None, call: MaskCall) -> Tensor:
        """Return the mask of one draw for call number `index`, of size 1 (or its units) along the examples."""
        shape = list(call.shape)
        path: tuple[int, ...] = (draw, index)
        if place is not None and self.per_example:
            shape[place.axis] //= len(self.draws)
            path = (draw, index, self.offset)
        elif place is not None:
            shape[place.axis] = place.per_example
        generator = stream(call.device, self.seed, *path)
        # One rule for every device: a float uniform per unit, compared with the rate.
        return torch.rand(shape, generator=generator, device=call.device) >= call.rate


class ReadyMasks:
    """Masks made beforehand, one tensor a call, handed out in order (inside `vmap` each is a slice)."""

    def __init__(
        self,
        keeps: Sequence[Tensor],
        plan: Sequence[MaskCall],
        layout: Sequence[BatchAxis | None],
        p: float | None,
    ) -> None:
        self.keeps, self.plan, self.layout, self.p = keeps, plan, layout, p
        self.calls: list[MaskCall] = []

    def rate(self, p: float, *, module: bool) -> float:
        return self.p if self.p is not None and (module or p > 0) else p

    def keep(self, shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
        index, call = len(self.calls), MaskCall(tuple(shape), rate, device)
        if index >= len(self.plan) or self.plan[index] != call:
            raise PassesDiffer("a random call differs from the pass that planned it")
        self.calls.append(call)
        return _tile(self.keeps[index], self.layout[index], shape)


def spread(keeps: Tensor, place: BatchAxis | None, shape: Sequence[int]) -> Tensor:
    """Lay masks `[G, ...]` of G draws along the axis of examples, whose order is draw, example, unit."""
    if place is None:
        raise PassesDiffer("a random call has no axis of examples, so draws cannot share a batch")
    axis = place.axis
    keeps = keeps.movedim(0, axis)
    repeats = shape[axis] // (keeps.shape[axis] * keeps.shape[axis + 1])
    keeps = keeps.unsqueeze(axis + 1)
    sizes = [-1] * keeps.dim()
    sizes[axis + 1] = repeats
    return keeps.expand(sizes).flatten(axis, axis + 2)


def _tile(keep: Tensor, place: BatchAxis | None, shape: Sequence[int]) -> Tensor:
    """Repeat one draw's mask over the examples, where broadcasting does not do it."""
    if place is None or keep.shape[place.axis] in (1, shape[place.axis]):
        return keep
    repeats = [1] * keep.dim()
    repeats[place.axis] = shape[place.axis] // keep.shape[place.axis]
    return keep.repeat(repeats)


def find_layout(two: Sequence[MaskCall], three: Sequence[MaskCall]) -> tuple[BatchAxis | None, ...]:
    """Tell where the examples lie in each random call, from a pass over two rows and one over three.

    Raises:
        PassesDiffer: The passes made different calls, or a size follows the rows in no simple way.
    """
    if len(two) != len(three):
        raise PassesDiffer(f"{len(two)} random calls with two rows, {len(three)} with three")
    return tuple(_batch_axis(a.shape, b.shape) for a, b in zip(two, three, strict=True))


def _batch_axis(two: tuple[int, ...], three: tuple[int, ...]) -> BatchAxis | None:
    if len(two) != len(three):
        raise PassesDiffer(f"a random call has shape {two} with two rows and {three} with three")
    moved = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if not moved:
        return None
    if len(moved) > 1 or 3 * two[moved[0]] != 2 * three[moved[0]]:
        raise PassesDiffer(f"a random call has shape {two} with two rows and {three} with three")
    return BatchAxis(moved[0], two[moved[0]] // 2)
