"""Dropout masks as pure functions of (seed, draw, call): one draw is one function, whatever the batch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bayesguard.errors import BayesguardError
from bayesguard.sampling.patterns import BLOCK, dropped_bits, is_balanced, quantised

_BITS = torch.tensor([1 << position for position in range(BLOCK)], dtype=torch.uint8)
# Masks of fewer units are unpacked for all draws of a block at once, 32 KiB each; larger ones draw by draw.
_SMALL = 1 << 10
# A mask this many times smaller than what it is applied to is made a factor first.
_MUCH_SMALLER = 4
# Units of a large mask that become floats at a time: 512 KiB, which stay in the cache.
_SLICE = 1 << 17


class PassesDiffer(BayesguardError, RuntimeError):
    """Two passes through the same network made different random calls, so no plan can be made for it."""


class BatchAxis(NamedTuple):
    """Where the examples lie in one random call's tensor of `dims` axes: `axis` has size N * `per_example`."""

    axis: int
    per_example: int
    dims: int


class MaskCall(NamedTuple):
    """One random call of a pass: the mask's shape, its drop rate and its device."""

    shape: tuple[int, ...]
    rate: float
    device: torch.device


class Channels(NamedTuple):
    """A mask that keeps or drops whole channels: the same for every example and every place within one."""

    axis: int
    kept: Tensor  # indices of the kept channels
    factors: Callable[[torch.dtype], Tensor]  # [B, C]: 0 or 1 / (1 - rate) for every draw of the block
    position: int  # of this draw in its block
    block: int
    scale: float


class MaskSource(Protocol):
    """Where the intercepted calls get their masks from."""

    calls: list[MaskCall]

    @property
    def can_overwrite(self) -> bool:
        """Whether `multiply` can write over its input, so that work in place pays at all."""

    @property
    def is_spread(self) -> bool:
        """Whether the batch is spread over the draws by now, where it ever will be."""

    def rate(self, p: float, *, module: bool) -> float:
        """Return the drop rate to use where the network says `p`."""

    def keep(self, shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
        """Return a boolean tensor that broadcasts to `shape`: True where a unit is kept."""

    def multiply(self, input: Tensor, rate: float, shape: Sequence[int], *, overwrite: bool = False) -> Tensor:
        """Return `input` with the dropped units zero and the kept ones divided by 1 - rate.

        With `overwrite` the result may lie where `input` did, which nobody else may hold.
        """


class Masks:
    """The masks of a group of draws through one pass.

    Args:
        seed: The predictor's seed.
        draws: Indices of the draws. More than one: the batch holds the examples once per draw, draw by draw.
        layout: For each random call where its examples lie, or None for a mask of the full shape.
        per_example: Each example has masks of its own, instead of one mask a draw.
        p: A drop rate that replaces the network's own.
        offset: Index of the batch's first example, which keeps per-example masks of later batches apart.
        balanced: Drop every unit equally often over each eight consecutive draws.
        rows: Rows of the batch, once for all its draws, which calls have to agree with; None where nobody knows.
        late_rows: Rows of the batch as long as it holds the examples once for all draws: the first mask then spreads
            it over the draws.
        held: The blocks in use, shared by the passes of one run, so that each is made once.
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
        balanced: bool = True,
        rows: int | None = None,
        late_rows: int | None = None,
        held: "dict[int, Block] | None" = None,
    ) -> None:
        self.rows, self.late_rows = rows, late_rows
        self.seed, self.draws, self.layout = seed, draws, layout
        self.per_example, self.p, self.offset, self.balanced = per_example, p, offset, balanced
        self.calls: list[MaskCall] = []
        self._held: dict[int, Block] = {} if held is None else held

    @property
    def can_overwrite(self) -> bool:
        return not torch.is_grad_enabled()

    @property
    def is_spread(self) -> bool:
        return self.late_rows is None or bool(self.calls)

    def rate(self, p: float, *, module: bool) -> float:
        return asked_rate(self.p, p, module=module)

    def keep(self, shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
        place, index = self._next(shape, rate, device)
        call = self.calls[-1]
        if len(self.draws) > 1:
            if place is not None and shape[place.axis] == (self.late_rows or 0) * place.per_example:
                raise PassesDiffer("its first random call is inside a kernel, which does not spread over the draws")
            return spread(self.keeps_of(self.draws, index, place, call), place, call.shape)
        return _tile(self._block(self.draws[0], index, place, call).keep(self.draws[0]), place, shape)

    def multiply(self, input: Tensor, rate: float, shape: Sequence[int], *, overwrite: bool = False) -> Tensor:
        overwrite = overwrite and self.can_overwrite
        product = torch.Tensor.mul_ if overwrite else torch.mul
        ready = self._held.get(len(self.calls))
        if ready is not None and ready.call is not None and len(self.draws) == 1:
            factor = ready.ready_factor(self.draws[0], input, rate, shape)
            if factor is not None:
                self.calls.append(ready.call)
                return product(input, factor)
        if self.late_rows is not None:
            spread_out = self._spread_over_draws(input, rate, shape)
            if spread_out is not None:
                return spread_out
        if rate == 1 or len(self.draws) > 1:
            return _multiplied(input, self.keep(shape, rate, input.device), rate)
        place, index = self._next(shape, rate, input.device)
        draw = self.draws[0]
        block = self._block(draw, index, place, self.calls[-1])
        if block.is_small:
            factor = block.factors(input.dtype)[block.position(draw)]
            tiled = _tile(factor, place, shape)
            if tiled is factor and self.late_rows is None:
                block.call = self.calls[-1]
            return product(input, tiled)
        if block.num_units * _MUCH_SMALLER <= input.numel() or input.dtype not in (torch.float32, torch.float64):
            return product(input, _tile(block.keep(draw).to(input.dtype) * block.scale, place, shape))
        # A byte that is 0 or a power of two, which the scale takes back exactly, is cheaper than a boolean.
        kept, scale = block.kept_byte(draw)
        if kept.shape == input.shape and not torch.is_grad_enabled():
            return _multiplied_by_bytes(input, kept, scale, input if overwrite else torch.empty_like(input))
        return product(input, _tile(kept, place, shape)).mul_(scale)

    def channels(self, shape: Sequence[int], rate: float, device: torch.device) -> Channels | None:
        """Return the next mask if it drops whole channels; None, with no call counted, if it does not."""
        place, index = self._place(len(self.calls), shape), len(self.calls)
        call = MaskCall(tuple(shape), rate, device)
        axis = whole_channels(call, place)
        if axis is None or len(self.draws) > 1 or self.per_example:
            return None
        self.calls.append(call)
        draw = self.draws[0]
        block = self._block(draw, index, place, call)
        kept = block.kept_channels(draw)

        def factors(dtype: torch.dtype) -> Tensor:
            return block.factors(dtype).reshape(-1, shape[axis])

        return Channels(axis, kept, factors, block.position(draw), block.number, 1 / (1 - rate))

    def keeps_of(self, draws: Sequence[int], index: int, place: BatchAxis | None, call: MaskCall) -> Tensor:
        """Return masks `[G, ...]` of consecutive draws for call number `index`, as `keep` has them before tiling."""
        parts = []
        while draws:
            block = self._block(draws[0], index, place, call)
            positions = range(block.position(draws[0]), block.num_draws)[: len(draws)]
            parts.append(block.keeps(positions))
            draws = draws[len(positions) :]
        return torch.cat(parts)

    def _spread_over_draws(self, input: Tensor, rate: float, shape: Sequence[int]) -> Tensor | None:
        """Return a batch that still is the same for all draws under the masks of each; None if it is not any more."""
        place = self._place(len(self.calls), shape)
        if place is None or place.per_example > 1 or shape[place.axis] != self.late_rows:
            return None
        wide = list(shape)
        wide[place.axis] *= len(self.draws)
        self._next(wide, rate, input.device)
        keeps = self.keeps_of(self.draws, len(self.calls) - 1, place, self.calls[-1]).movedim(0, place.axis)
        return _multiplied(input.unsqueeze(place.axis), keeps, rate).flatten(place.axis, place.axis + 1)

    def _next(self, shape: Sequence[int], rate: float, device: torch.device) -> tuple[BatchAxis | None, int]:
        index = len(self.calls)
        place = self._place(index, shape)
        self.calls.append(MaskCall(tuple(shape), rate, device))
        return place, index

    def _place(self, index: int, shape: Sequence[int]) -> BatchAxis | None:
        if self.layout is None:
            return None
        if index >= len(self.layout):
            raise PassesDiffer("the network made more random calls than in the pass that planned them")
        place = self.layout[index]
        if len(self.draws) > 1 and place is None:
            raise PassesDiffer("a random call has no axis of examples, so draws cannot share a batch")
        if place is not None and self.rows is not None and not self._has_rows_at(place, shape):
            raise PassesDiffer("a random call has another shape than in the pass that planned it")
        return place

    def _has_rows_at(self, place: BatchAxis, shape: Sequence[int]) -> bool:
        """Tell whether the examples lie where they are said to: another call of the network may have taken the place."""
        assert self.rows is not None
        if len(shape) != place.dims:
            return False
        size = shape[place.axis]
        return size in (len(self.draws) * self.rows * place.per_example, (self.late_rows or -1) * place.per_example)

    def _block(self, draw: int, index: int, place: BatchAxis | None, call: MaskCall) -> "Block":
        shape = list(call.shape)
        if place is not None and self.per_example:
            shape[place.axis] //= len(self.draws)
        elif place is not None:
            shape[place.axis] = place.per_example
        balanced = is_balanced(call.rate, self.balanced)
        number = draw // BLOCK if balanced else draw
        key = (number, tuple(shape), call.rate, call.device)
        held = self._held.get(index)
        if held is None or held.key != key:
            path = (number, index, self.offset) if place is not None and self.per_example else (number, index)
            bits = dropped_bits(tuple(shape), call.rate, call.device, self.seed, path, balanced=balanced)
            held = self._held[index] = Block(key, bits, call.rate, balanced)
        return held


class Block:
    """The masks of one random call for the draws of one block: a byte for every unit."""

    def __init__(
        self, key: tuple[int, tuple[int, ...], float, torch.device], bits: Tensor, rate: float, balanced: bool
    ) -> None:
        self.key, self.number, self.scale, self.balanced = key, key[0], 1 / (1 - rate) if rate < 1 else 0.0, balanced
        self._kept = bits.bitwise_not_()
        self._factors: dict[torch.dtype, Tensor] = {}
        self._single: dict[torch.dtype, tuple[Tensor, ...]] = {}
        # The call of one draw by itself whose factors broadcast as they are; None as long as there was none.
        self.call: MaskCall | None = None
        self._channels: dict[int, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """The size of the masks as they are held."""
        return sum(part.numel() * part.element_size() for part in (self._kept, *self._factors.values()))

    @property
    def num_units(self) -> int:
        return self._kept.numel()

    @property
    def is_small(self) -> bool:
        return self.num_units <= _SMALL

    def position(self, draw: int) -> int:
        return draw % BLOCK if self.balanced else 0

    @property
    def num_draws(self) -> int:
        return BLOCK if self.balanced else 1

    def keeps(self, positions: range) -> Tensor:
        """Return the masks of some draws of the block, `[G, ...]`."""
        # A copy to a device is waited for, unless told otherwise.
        bits = _BITS[positions.start : positions.stop].to(self._kept.device, non_blocking=True)
        return (self._kept & bits.view(-1, *[1] * self._kept.dim())) != 0

    def keep(self, draw: int) -> Tensor:
        return (self._kept & (1 << self.position(draw))) != 0

    def factors(self, dtype: torch.dtype) -> Tensor:
        """Return what to multiply with in every draw of the block, `[B, ...]`."""
        if dtype not in self._factors:
            self._factors[dtype] = self.keeps(range(self.num_draws)).to(dtype) * self.scale
        return self._factors[dtype]

    def ready_factor(self, draw: int, input: Tensor, rate: float, shape: Sequence[int]) -> Tensor | None:
        """Return a draw's factors if `call` is to be made again, for a draw of this block; None if it is another call."""
        if (draw // BLOCK if self.balanced else draw) != self.number or self.call != (shape, rate, input.device):
            return None
        single = self._single.get(input.dtype)
        if single is None:
            single = self._single[input.dtype] = self.factors(input.dtype).unbind()
        return single[self.position(draw)]

    def kept_byte(self, draw: int) -> tuple[Tensor, float]:
        """Return bytes that are 0 where a unit is dropped, and the factor that makes the others the scale."""
        bit = 1 << self.position(draw)
        return self._kept & bit, self.scale / bit

    def kept_channels(self, draw: int) -> Tensor:
        position = self.position(draw)
        if position not in self._channels:
            self._channels[position] = self.keep(draw).flatten().nonzero().squeeze(1)
        return self._channels[position]


def whole_channels(call: MaskCall, place: BatchAxis | None) -> int | None:
    """Return the axis along which a shared mask keeps or drops; None where it is not one axis, or drops too little.

    Below a rate of 0.1, leaving out what is dropped does not pay for picking the rest out.
    """
    if place is None or place.per_example > 1 or not 0.1 <= call.rate < 1:
        return None
    wide = [axis for axis, size in enumerate(call.shape) if size > 1 and axis != place.axis]
    return wide[0] if len(wide) == 1 else None


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

    @property
    def can_overwrite(self) -> bool:
        return False  # inside `vmap` a mask has an axis that its input need not have

    @property
    def is_spread(self) -> bool:
        return True

    def rate(self, p: float, *, module: bool) -> float:
        return asked_rate(self.p, p, module=module)

    def keep(self, shape: Sequence[int], rate: float, device: torch.device) -> Tensor:
        index, call = len(self.calls), MaskCall(tuple(shape), rate, device)
        if index >= len(self.plan) or self.plan[index] != call:
            raise PassesDiffer("a random call differs from the pass that planned it")
        self.calls.append(call)
        return _tile(self.keeps[index], self.layout[index], shape)

    def multiply(self, input: Tensor, rate: float, shape: Sequence[int], *, overwrite: bool = False) -> Tensor:
        return _multiplied(input, self.keep(shape, rate, input.device), rate)


def asked_rate(own: float | None, p: float, *, module: bool) -> float:
    """Return the drop rate to use where the network says `p` and the user `own`, as masks can have it."""
    # A rate of one's own switches on a Dropout(0.0), but not an attention or a recurrent layer without dropout.
    rate = own if own is not None and (module or p > 0) else p
    # What is no rate is refused where it is used, with the number that the network gave.
    return quantised(rate) if 0 <= rate <= 1 else rate


def _multiplied(input: Tensor, keep: Tensor, rate: float) -> Tensor:
    factor = keep.to(input.dtype)
    return input * (factor if rate == 1 else factor * (1 / (1 - rate)))


def _multiplied_by_bytes(input: Tensor, kept: Tensor, scale: float, result: Tensor) -> Tensor:
    """Return `input * kept * scale` slice by slice: torch makes floats of all the bytes that it is given at once."""
    rows = max(1, _SLICE * len(input) // max(1, input.numel()))
    for start in range(0, len(input), rows):
        part = slice(start, start + rows)
        torch.mul(input[part], kept[part], out=result[part]).mul_(scale)
    return result


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
    return BatchAxis(moved[0], two[moved[0]] // 2, len(two))
