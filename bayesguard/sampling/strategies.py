"""The strategies: ways to the same draws of one network on one input.

`loop` runs the whole network once a draw and is the reference. `replay` computes what comes before the first random
call once; `replay_parts` does so for some rows after the others. `compact` is replay whose layers leave dropped
channels out. `vmap` batches what depends on the draw. `fold` puts the draws into the batch, and `fold_tail` does so at
the first mask.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.sampling.compaction import Compaction, Deferred
from bayesguard.sampling.compiled import Graph, compile_pass, constants_of, graph_inputs
from bayesguard.sampling.forward import Forward
from bayesguard.sampling.independence import mixing_of
from bayesguard.sampling.intercept import Intercept, intercepted
from bayesguard.sampling.masks import BatchAxis, Block, MaskCall, Masks, MaskSource, PassesDiffer, ReadyMasks
from bayesguard.sampling.memory import free_memory, is_out_of_memory, release_memory, storages_of
from bayesguard.sampling.patterns import BLOCK
from bayesguard.sampling.replay import Player, Recorder, Tape
from bayesguard.sampling.row_parts import drawn_in_parts, rows_of_a_part
from bayesguard.sampling.streams import seeded_default_generators

# Draws that share a batch at most: beyond, nothing is gained any more.
_LARGEST_GROUP = 64
_COMPILED_GROUP = 32


@dataclass
class Settings:
    """What the user asked of the masks.

    Args:
        per_example: Each example has masks of its own, instead of one mask a draw.
        p: A drop rate that replaces the network's own.
        selected: Names of the layers whose dropout is wanted; None for all.
        balanced: Drop every unit equally often over each eight consecutive draws.
        memory_budget: Bytes that a group of draws may take; None for a quarter of what is free.
        compile: Compile a pass of many draws with `torch.compile`, where that is exact.
        graphs: Compiled passes, kept for later predictions.
    """

    per_example: bool = False
    p: float | None = None
    selected: frozenset[str] | None = None
    balanced: bool = True
    memory_budget: int | None = None
    compile: bool = False
    graphs: dict[Any, Graph] = field(default_factory=dict, repr=False)

    def masks(
        self,
        seed: int,
        draws: Sequence[int],
        layout: Sequence[BatchAxis | None] | None = None,
        offset: int = 0,
        **more: Any,
    ) -> Masks:
        """Return the masks of some draws; `more` as for `Masks`."""
        return Masks(
            seed, draws, layout, per_example=self.per_example, p=self.p, offset=offset, balanced=self.balanced, **more
        )


@dataclass(frozen=True)
class Structure:
    """What was found out about the random calls of a network for one kind of input."""

    layout: tuple[BatchAxis | None, ...] | None
    calls: tuple[MaskCall, ...]
    own_randomness: bool
    overwrites_inputs: bool = False  # every pass then needs inputs of its own
    looks_behind_dropout: bool = False  # at what a dropout in place has written over, as in training

    @property
    def is_random(self) -> bool:
        """Whether a pass made any random call at all."""
        return bool(self.calls) or self.own_randomness


class Draws:
    """The draws of one network on one input; each strategy yields outputs `[s, N, ...]` of consecutive draws."""

    def __init__(self, settings: Settings, forward: Forward, structure: Structure, seed: int, offset: int) -> None:
        self.settings, self.structure = settings, structure
        self.forward = forward.copying() if structure.overwrites_inputs else forward
        self.seed, self.offset = seed, offset
        self._is_part = False
        self._spared = storages_of(forward.network) if structure.looks_behind_dropout else None
        self.tape = Tape()
        self.calls: Sequence[MaskCall] = ()
        self._row_parts: list[Draws] = []
        self._held: dict[int, Block] = {}
        self._products: dict[int, Any] = {}

    @cached_property
    def mixing(self) -> str:
        """Say that examples depend on one another, and that what has other rows beside them is not the same; empty where not."""
        return mixing_of(partial(self.single, 0), self.forward)

    def forget(self) -> None:
        """Drop what earlier draws left: without gradients it would be constants to later ones that want them."""
        self.tape, self._products, self._row_parts = Tape(), {}, []

    def run(self, strategy: str, draws: Sequence[int]) -> Iterator[Tensor]:
        """Yield the draws by one strategy."""
        runs: dict[str, Callable[[Sequence[int]], Iterator[Tensor]]] = {
            "loop": self.loop,
            "replay": self.replay,
            "replay_parts": self.replay_parts,
            "compact": self.compact,
            "vmap": self.vmap,
            "fold": self.fold,
            "fold_tail": self.fold_tail,
            "compiled": self.compiled,
        }
        return runs[strategy](draws)

    def single(self, draw: int, forward: Forward) -> Tensor:
        """Return one whole pass: outputs `[N, ...]`."""
        masks = self._masks([draw], rows=forward.num_rows)
        return self._pass(self._intercept(masks, is_whole=forward is self.forward), draw, forward)

    def loop(self, draws: Sequence[int]) -> Iterator[Tensor]:
        for draw in draws:
            yield self._in_memory(draw).unsqueeze(0)

    def replay(self, draws: Sequence[int]) -> Iterator[Tensor]:
        return self._replayed(draws, compact=False)

    def replay_parts(self, draws: Sequence[int]) -> Iterator[Tensor]:
        if not torch.is_grad_enabled():  # a graph keeps the activations of all rows in any case
            for outputs in drawn_in_parts(self.row_parts(), draws, self.structure.layout or ()):
                draws = draws[1:]
                yield outputs
        yield from self.replay(draws)

    def row_parts(self, rows: int | None = None) -> "list[Draws]":
        """Return the draws of parts of the rows: of `rows` each, or of as many as their activations suggest."""
        if not self._row_parts:
            size = rows or rows_of_a_part(self.forward.num_rows, self._calls_with_rows())
            for part in self._parts(size):
                draws = Draws(self.settings, part, self.structure, self.seed, self.offset)
                draws._held = self._held  # the masks are the same for all rows
                draws._is_part = True
                self._row_parts.append(draws)
        return self._row_parts

    def compact(self, draws: Sequence[int]) -> Iterator[Tensor]:
        return self._replayed(draws, compact=True)

    def fold(self, draws: Sequence[int]) -> Iterator[Tensor]:
        def group(part: Sequence[int]) -> Tensor:
            mode = self._intercept(self._masks(part), is_whole=len(part) == 1)
            outputs = self._pass(mode, part[0], self.forward.repeated(len(part)))
            if mode.own_randomness or self.structure.own_randomness:
                raise PassesDiffer("the network makes random calls of its own, which follow one stream a draw")
            return outputs.unflatten(0, (len(part), -1))

        return self._grouped(draws, group)

    def fold_tail(self, draws: Sequence[int]) -> Iterator[Tensor]:
        rows = self.forward.num_rows

        def group(part: Sequence[int]) -> Tensor:
            masks = self._masks(part, late_rows=rows if len(part) > 1 else None)
            mode = self._intercept(masks, is_whole=len(part) == 1)
            outputs = self._pass(mode, part[0], self.forward.unchecked)
            random = mode.own_randomness or self.structure.own_randomness
            if random or outputs.shape[:1] != (len(part) * rows,):
                raise PassesDiffer("what it computes before its first random call does not go with folded draws")
            return outputs.unflatten(0, (len(part), -1))

        return self._grouped(draws, group)

    def vmap(self, draws: Sequence[int]) -> Iterator[Tensor]:
        calls = self._calls_with_rows()
        return self._grouped(draws, lambda part: self._vmapped(self.forward, *self._keeps(part, calls)))

    def compiled(self, draws: Sequence[int]) -> Iterator[Tensor]:
        """Yield draws of a compiled graph, which always makes as many as fit into a group."""
        calls = self._calls_with_rows()

        def group(part: Sequence[int]) -> Tensor:
            # One graph serves every group: a last one that is smaller is filled up, and cut.
            full = range(part[0], part[0] + min(self.group_size(), _COMPILED_GROUP))
            keeps = self._keeps(full, calls)
            key = (self.forward.signature, self.forward.num_rows, len(full))
            graph = self.settings.graphs.get(key)
            forward = self.forward.copied() if self.forward.copies else self.forward
            if graph is None or graph.constants != constants_of(forward):
                graph = self.settings.graphs[key] = compile_pass(self.forward, keeps, self._vmapped)
            return graph.run(graph_inputs(forward, keeps))[: len(part)]

        return self._grouped(draws, group, largest=_COMPILED_GROUP)

    # How it is done.

    def _keeps(self, draws: Sequence[int], calls: Sequence[MaskCall]) -> list[Tensor]:
        """Return the masks of some draws for every random call, `[G, ...]` each."""
        masks, layout = self._masks(draws[:1]), self.structure.layout or ()
        return [masks.keeps_of(draws, index, layout[index], call) for index, call in enumerate(calls)]

    def _vmapped(self, forward: Forward, *keeps: Tensor) -> Tensor:
        """Return outputs `[G, N, ...]` under masks `[G, ...]`, one tensor a random call."""
        calls, layout = self._calls_with_rows(), self.structure.layout or ()

        def one(*own: Tensor) -> Tensor:
            source: MaskSource = ReadyMasks(own, calls, layout, self.settings.p)
            with intercepted(self._intercept(source)):
                return forward()

        return torch.vmap(one, randomness="different")(*keeps)

    def _masks(self, draws: Sequence[int], *, rows: int | None = None, late_rows: int | None = None) -> Masks:
        rows = self.forward.num_rows if rows is None else rows
        masks = self.settings.masks(
            self.seed, draws, self.structure.layout, self.offset, rows=rows, late_rows=late_rows, held=self._held
        )
        self.calls = masks.calls
        return masks

    def _intercept(self, masks: MaskSource, *, is_whole: bool = True) -> Intercept:
        return Intercept(masks, self.settings.selected, spared=self._spared, is_whole=is_whole and not self._is_part)

    def _pass(self, mode: Intercept, draw: int, call: Callable[[], Tensor]) -> Tensor:
        """Make one pass under `mode`; a network's own random calls draw from a stream of the draw's."""
        own: AbstractContextManager[None] = nullcontext()
        if self.structure.own_randomness:
            own = seeded_default_generators(self.forward.device, self.seed, draw)
        with own, intercepted(mode):
            return call()

    def _in_memory(self, draw: int) -> Tensor:
        """Return one draw, with the examples cut into halves until they fit."""
        rows = self.forward.num_rows
        while True:
            try:
                parts = [self.single(draw, part) for part in self._parts(rows)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except RuntimeError as error:
                if isinstance(error, PassesDiffer) and rows < self.forward.num_rows:
                    raise self._does_not_fit() from error
                if not is_out_of_memory(error) or rows <= 1:
                    raise
                if self.settings.per_example or self.structure.layout is None:
                    raise self._does_not_fit() from error
                rows = -(-rows // 2)
            release_memory()

    def _parts(self, rows: int) -> list[Forward]:
        total = self.forward.num_rows
        if rows >= total:
            return [self.forward]
        return [self.forward.rows(slice(start, start + rows)) for start in range(0, total, rows)]

    def _does_not_fit(self) -> BadInput:
        return BadInput(
            f"the batch of {self.forward.num_rows} examples does not fit into memory, and its masks do not allow "
            "cutting it; pass smaller batches"
        )

    def _replayed(self, draws: Sequence[int], *, compact: bool) -> Iterator[Tensor]:
        for number, draw in enumerate(draws):
            if self.tape.changed or (number and not self.tape.complete):
                # A kept result was changed in place after the prefix: what was drawn so far is right, the tape is not.
                yield from self.loop(draws[number:])
                return
            mode = Player if self.tape.complete else Recorder
            masks = self._masks([draw])
            compaction = Compaction(masks, self._products) if compact and self._spared is None else None
            more = {"spared": self._spared, "is_whole": not self._is_part}
            try:
                player = mode(masks, self.tape, self.settings.selected, compaction, **more)
                output = self._pass(player, draw, self._for_tape())
                output = output.value() if isinstance(output, Deferred) else output
            except RuntimeError as error:
                if not isinstance(error, PassesDiffer) and not is_out_of_memory(error):
                    raise
                yield from self.loop(draws[number:])
                return
            yield output.unsqueeze(0)

    def _for_tape(self) -> Forward:
        """Return the call whose inputs all passes share: one that overwrites them does so in its recorded prefix."""
        if not self.forward.copies:
            return self.forward
        if self.tape.forward is None:
            self.tape.forward = self.forward.copied()
        return self.tape.forward

    def _calls_with_rows(self) -> list[MaskCall]:
        """The planned calls with the sizes that this batch gives them."""
        if self.structure.layout is None or self.structure.own_randomness:
            raise PassesDiffer("its random calls cannot be prepared")
        rows = self.forward.num_rows
        return [
            MaskCall(
                tuple(
                    rows * place.per_example if place is not None and axis == place.axis else size
                    for axis, size in enumerate(call.shape)
                ),
                call.rate,
                call.device,
            )
            for call, place in zip(self.structure.calls, self.structure.layout, strict=True)
        ]

    def _grouped(
        self, draws: Sequence[int], group: Callable[[Sequence[int]], Tensor], largest: int = _LARGEST_GROUP
    ) -> Iterator[Tensor]:
        """Run groups of draws, halving their size when memory runs out."""
        size, start = min(self.group_size(), largest), 0
        while start < len(draws):
            part = draws[start : start + size]
            try:
                outputs = group(part)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    yield from self.loop(draws[start:])
                    return
                size //= 2
                release_memory()
                continue
            yield outputs
            start += len(part)

    def group_size(self) -> int:
        """Draws that fit into the budget, if a pass takes what its masks and inputs suggest."""
        budget = self.settings.memory_budget or free_memory(self.forward.device) // 4
        size = int(max(1, min(_LARGEST_GROUP, budget // max(1, self.bytes_per_draw()))))
        return size // BLOCK * BLOCK if size >= BLOCK else size

    def held_bytes(self) -> int:
        """The size of what replay keeps: results before the masks, and masks."""
        tapes = [draws.tape for draws in (self, *self._row_parts)]
        return sum(tape.num_bytes for tape in tapes) + sum(block.num_bytes for block in self._held.values())

    def bytes_per_draw(self) -> int:
        """Float activations before and after each masked call, and as much again for what lies between them."""
        masked = sum(
            torch.Size(call.shape).numel() * self.forward.num_rows / (2 if place else 1)
            for call, place in zip(self.structure.calls, self.structure.layout or (), strict=False)
        )
        return int(16 * masked)
