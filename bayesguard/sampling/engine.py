"""The engine: S outputs of a stochastic network in one bounded-memory pass.

Four strategies give the same draws. `loop` runs the whole network once a draw and is the reference. `replay` computes
what comes before the first random call once. `vmap` batches what depends on the draw. `fold` puts the draws into the
batch. Every strategy but the loop is compared with it once, for each kind of input, before it is used.
"""

import gc
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayesguard.errors import BadInput, RandomnessWarning
from bayesguard.sampling.forward import Forward
from bayesguard.sampling.intercept import Intercept, intercepted
from bayesguard.sampling.masks import (
    BatchAxis,
    MaskCall,
    Masks,
    MaskSource,
    PassesDiffer,
    ReadyMasks,
    find_layout,
)
from bayesguard.sampling.replay import Player, Recorder, Tape
from bayesguard.sampling.streams import seeded_default_generators

Strategy = Literal["auto", "replay", "vmap", "fold", "loop"]

# Two kernels for one matrix product differ by a few roundings of its sum.
_ROUNDINGS = 2.0**10
_GROUP_BYTES = 1 << 22
_PLANNING = threading.RLock()


@dataclass(frozen=True)
class Plan:
    """What was found out about a network for one kind of input."""

    strategy: str
    reason: str
    layout: tuple[BatchAxis | None, ...] | None
    calls: tuple[MaskCall, ...]
    own_randomness: bool

    @property
    def is_random(self) -> bool:
        """Whether a pass made any random call at all."""
        return bool(self.calls) or self.own_randomness


@dataclass
class Sampler:
    """Draws outputs of a network whose dropout is switched on by interception.

    Args:
        per_example: Each example has masks of its own, instead of one mask a draw.
        p: A drop rate that replaces the network's own.
        selected: Names of the layers whose dropout is wanted; None for all.
        strategy: One of "auto", "replay", "vmap", "fold", "loop".
        memory_budget: Bytes that a group of draws may take; None for a quarter of what is free.
    """

    per_example: bool = False
    p: float | None = None
    selected: frozenset[str] | None = None
    strategy: Strategy = "auto"
    memory_budget: int | None = None
    plans: dict[Any, Plan] = field(default_factory=dict, repr=False)
    last_plan: Plan | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise BadInput(f"strategy must be one of {', '.join(get_args(Strategy))}, got {self.strategy!r}")
        if self.memory_budget is not None and self.memory_budget <= 0:
            raise BadInput(f"memory_budget must be a positive number of bytes, got {self.memory_budget}")

    def chunks(
        self, forward: Forward, *, num_samples: int, seed: int, offset: int = 0, first: int = 0
    ) -> Iterator[Tensor]:
        """Yield raw outputs `[s, N, ...]` of consecutive draws until there are `num_samples`."""
        yield from _grouped(self._each(forward, range(first, first + num_samples), seed, offset))

    def _each(self, forward: Forward, draws: Sequence[int], seed: int, offset: int) -> Iterator[Tensor]:
        """Yield what the planned strategy gives, after planning anew where the plan does not hold."""
        for attempt in range(3):
            try:
                for outputs in self._run(forward, self.plan(forward, seed), draws, seed, offset):
                    draws = draws[len(outputs) :]
                    yield outputs
                return
            except PassesDiffer as differ:
                # A drop rate has changed since the plan was made, or the control flow follows the draw.
                self._revise_plan(forward, str(differ), unshared=attempt > 0)

    def _run(self, forward: Forward, plan: Plan, draws: Sequence[int], seed: int, offset: int) -> Iterator[Tensor]:
        make = _Draws(self, forward, plan, seed, offset)
        with _compiled_code_runs_eagerly():
            yield from getattr(make, plan.strategy)(draws)

    def _revise_plan(self, forward: Forward, reason: str, *, unshared: bool) -> None:
        """Forget a plan that does not hold, or replace it by one that needs to know nothing."""
        old = self.plans.pop(forward.signature)
        if unshared:
            _warn_unshared(self, reason)
            self.plans[forward.signature] = Plan("loop", reason, None, old.calls, old.own_randomness)

    def once(self, forward: Forward, *, seed: int, draw: int = 0, offset: int = 0) -> Tensor:
        """Return the outputs `[N, ...]` of one draw: one function of the posterior."""
        plan = self.plan(forward, seed)
        with _compiled_code_runs_eagerly():
            return _Draws(self, forward, plan, seed, offset).single(draw, forward)

    def plan(self, forward: Forward, seed: int) -> Plan:
        """Return the plan for this kind of input, made at its first use."""
        with _PLANNING:
            plan = self.plans.get(forward.signature)
            if plan is None:
                with torch.no_grad(), _compiled_code_runs_eagerly():
                    plan = self.plans[forward.signature] = _make_plan(self, forward, seed)
            self.last_plan = plan
            return plan

    def masks(self, seed: int, draws: Sequence[int], layout: Any = None, offset: int = 0) -> Masks:
        """Return the masks of some draws."""
        return Masks(seed, draws, layout, per_example=self.per_example, p=self.p, offset=offset)


def _grouped(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Join small chunks: what follows costs as much for one draw as for many."""
    group: list[Tensor] = []
    for outputs in chunks:
        group.append(outputs)
        if sum(part.numel() * part.element_size() for part in group) >= _GROUP_BYTES:
            yield torch.cat(group)
            group = []
    if group:
        yield torch.cat(group)


def _make_plan(sampler: Sampler, forward: Forward, seed: int) -> Plan:
    """Find out where the examples lie in each random call, and which strategy is exact."""
    layout, calls, own_randomness, reason = _probe(sampler, forward, seed)
    loop = Plan("loop", reason, layout, calls, own_randomness)
    if forward.num_rows == 0 or not loop.is_random:
        return loop
    asked = sampler.strategy
    candidates = {"auto": ["fold", "replay"] if forward.device.type == "cuda" else ["replay"], "loop": []}
    for name in candidates.get(asked, [asked]):
        plan = Plan(name, "equal to the plain loop on two draws", layout, calls, own_randomness)
        reason = _disagreement(sampler, forward, plan, seed)
        if not reason:
            return plan
        if asked != "auto":
            raise BadInput(f"strategy={asked!r} cannot be used with this network: {reason}; use strategy='auto'")
    return Plan("loop", reason or "asked for", layout, calls, own_randomness)


def _probe(
    sampler: Sampler, forward: Forward, seed: int
) -> tuple[tuple[BatchAxis | None, ...] | None, tuple[MaskCall, ...], bool, str]:
    """Run the network on the first row twice and three times over, and compare its random calls."""
    if forward.num_rows == 0:
        return None, (), False, "no examples"
    passes = []
    for copies in (2, 3):
        index = torch.zeros(copies, dtype=torch.long, device=forward.device)
        masks = sampler.masks(seed, [0])
        mode = Intercept(masks, sampler.selected)
        with seeded_default_generators(forward.device, seed, 0), intercepted(mode):
            forward.rows(index)()
        passes.append(masks.calls)
    try:
        return find_layout(*passes), tuple(passes[0]), mode.own_randomness, ""
    except PassesDiffer as differ:
        _warn_unshared(sampler, str(differ))
        return None, tuple(passes[0]), mode.own_randomness, str(differ)


def _warn_unshared(sampler: Sampler, reason: str) -> None:
    if not sampler.per_example:
        warnings.warn(
            f"masks cannot be shared by the examples of a draw ({reason}): every example gets its own",
            RandomnessWarning,
            stacklevel=2,
        )


def _disagreement(sampler: Sampler, forward: Forward, plan: Plan, seed: int) -> str:
    """Say how a strategy's first two draws differ from the plain loop's; empty when they do not."""
    make = _Draws(sampler, forward, plan, seed, 0)
    try:
        want = torch.stack([make.single(draw, forward) for draw in range(2)])
        got = torch.cat(list(getattr(make, plan.strategy)(range(2))))
    except PassesDiffer as differ:
        return str(differ)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return "it does not fit into memory"
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if got.shape != want.shape:
        return f"it gives outputs of shape {tuple(got.shape)} where the loop gives {tuple(want.shape)}"
    scale = want.abs().amax().float().nan_to_num(posinf=1.0).item()
    tolerance = _ROUNDINGS * torch.finfo(want.dtype).eps * scale
    if not torch.allclose(got, want, rtol=0, atol=tolerance, equal_nan=True):
        return "its draws differ from the plain loop's (the network mixes examples, or keeps a state)"
    return ""


class _Draws:
    """The strategies, for one network, its inputs and its plan."""

    def __init__(self, sampler: Sampler, forward: Forward, plan: Plan, seed: int, offset: int) -> None:
        self.sampler, self.forward, self.plan, self.seed, self.offset = sampler, forward, plan, seed, offset

    def masks(self, draws: Sequence[int]) -> Masks:
        return self.sampler.masks(self.seed, draws, self.plan.layout, self.offset)

    def run(self, mode: Intercept, draw: int, call: Callable[[], Tensor]) -> Tensor:
        """Make one pass under `mode`; a network's own random calls draw from a stream of the draw's."""
        own: AbstractContextManager[None] = nullcontext()
        if self.plan.own_randomness:
            own = seeded_default_generators(self.forward.device, self.seed, draw)
        with own, intercepted(mode):
            return call()

    def single(self, draw: int, forward: Forward) -> Tensor:
        return self.run(Intercept(self.masks([draw]), self.sampler.selected), draw, forward)

    def loop(self, draws: Sequence[int]) -> Iterator[Tensor]:
        for draw in draws:
            yield self.in_memory(draw).unsqueeze(0)

    def in_memory(self, draw: int) -> Tensor:
        """Return one draw, with the examples cut into halves until they fit."""
        rows = self.forward.num_rows
        while True:
            try:
                parts = [self.single(draw, part) for part in self._parts(rows)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except RuntimeError as error:
                if not is_out_of_memory(error) or rows <= 1:
                    raise
                self._check_cutting(error)
                rows = -(-rows // 2)
            release_memory()

    def _parts(self, rows: int) -> list[Forward]:
        total = self.forward.num_rows
        if rows >= total:
            return [self.forward]
        return [self.forward.rows(slice(start, start + rows)) for start in range(0, total, rows)]

    def _check_cutting(self, error: RuntimeError) -> None:
        if self.sampler.per_example or self.plan.layout is None:
            raise BadInput(
                f"the batch of {self.forward.num_rows} examples does not fit into memory, and its masks do not allow "
                "cutting it; pass smaller batches"
            ) from error

    def replay(self, draws: Sequence[int]) -> Iterator[Tensor]:
        tape = Tape()
        for number, draw in enumerate(draws):
            if number and (not tape.complete or tape.changed):
                # A kept result was changed in place after the prefix: what was drawn so far is right, the tape is not.
                yield from self.loop(draws[number:])
                return
            mode = Player if number else Recorder
            try:
                output = self.run(mode(self.masks([draw]), tape, self.sampler.selected), draw, self.forward)
            except RuntimeError as error:
                if not isinstance(error, PassesDiffer) and not is_out_of_memory(error):
                    raise
                yield from self.loop(draws[number:])
                return
            yield output.unsqueeze(0)

    def fold(self, draws: Sequence[int]) -> Iterator[Tensor]:
        def group(part: Sequence[int]) -> Tensor:
            mode = Intercept(self.masks(part), self.sampler.selected)
            outputs = self.run(mode, part[0], self.forward.repeated(len(part)))
            if mode.own_randomness:
                raise PassesDiffer("the network makes random calls of its own, which follow one stream a draw")
            return outputs.unflatten(0, (len(part), -1))

        return self._grouped(draws, group)

    def vmap(self, draws: Sequence[int]) -> Iterator[Tensor]:
        layout = self.plan.layout
        if layout is None or self.plan.own_randomness:
            raise PassesDiffer("its random calls cannot be prepared")
        calls = self._calls_with_rows()

        def group(part: Sequence[int]) -> Tensor:
            keeps = [self._stacked(part, index, call) for index, call in enumerate(calls)]

            def one(*own: Tensor) -> Tensor:
                source: MaskSource = ReadyMasks(own, calls, layout, self.sampler.p)
                with intercepted(Intercept(source, self.sampler.selected)):
                    return self.forward()

            return torch.vmap(one, randomness="different")(*keeps)

        return self._grouped(draws, group)

    def _calls_with_rows(self) -> list[MaskCall]:
        """The planned calls with the sizes that this batch gives them."""
        layout = self.plan.layout or ()
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
            for call, place in zip(self.plan.calls, layout, strict=True)
        ]

    def _stacked(self, draws: Sequence[int], index: int, call: MaskCall) -> Tensor:
        place = self.plan.layout[index] if self.plan.layout else None
        return torch.stack([self.masks([draw]).keep_of(draw, index, place, call) for draw in draws])

    def _grouped(self, draws: Sequence[int], group: Callable[[Sequence[int]], Tensor]) -> Iterator[Tensor]:
        """Run groups of draws, halving their size when memory runs out."""
        size, start = self._group_size(), 0
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

    def _group_size(self) -> int:
        """Draws that fit into the budget, if a pass takes what its masks and inputs suggest."""
        layout = self.plan.layout or ()
        masked = sum(
            _size(call.shape) * self.forward.num_rows / (2 if place else 1)
            for call, place in zip(self.plan.calls, layout, strict=False)
        )
        budget = self.sampler.memory_budget or free_memory(self.forward.device) // 4
        # Float activations before and after each masked call, and as much again for what lies between them.
        return int(max(1, min(64, budget // max(1, int(16 * masked)))))


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device (2 GiB where nobody can tell)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2 << 30


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an out-of-memory error of any device from others."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give freed blocks back before the next try."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _compiled_code_runs_eagerly() -> AbstractContextManager[Any]:
    """Let compiled parts run as plain code: a compiled graph would hold one draw's masks as constants."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def silent_dropout(sampler: Sampler, forward: Forward, seed: int) -> list[str]:
    """Return the names of dropout-like layers that run without a single random call."""
    masks = sampler.masks(seed, [0])
    thread = threading.get_ident()
    silent: dict[str, bool] = {}
    started: dict[str, int] = {}

    def watch(name: str, module: nn.Module) -> list[RemovableHandle]:
        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                started[name] = len(masks.calls)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                silent[name] = silent.get(name, True) and len(masks.calls) == started[name]

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    with _PLANNING, _compiled_code_runs_eagerly(), seeded_default_generators(forward.device, seed, 0):
        hooks = [
            hook
            for name, module in forward.network.named_modules()
            if _is_dropout_like(module)
            for hook in watch(name, module)
        ]
        try:
            with torch.no_grad(), intercepted(Intercept(masks)):
                forward.rows(slice(0, 2))()
        finally:
            for hook in hooks:
                hook.remove()
    return [name for name, quiet in silent.items() if quiet]


def _is_dropout_like(module: nn.Module) -> bool:
    rate = getattr(module, "p", getattr(module, "drop_prob", None))
    return "drop" in type(module).__name__.lower() and isinstance(rate, float) and rate > 0
