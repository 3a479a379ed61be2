"""The engine: S outputs of a stochastic network in one bounded-memory pass.

For each kind of input it finds out once which strategies give the plain loop's draws, times them on the real input,
and remembers the fastest.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bayesguard.errors import BadInput
from bayesguard.sampling.build import build_of
from bayesguard.sampling.forward import Forward
from bayesguard.sampling.masks import PassesDiffer
from bayesguard.sampling.patterns import BLOCK
from bayesguard.sampling.planning import (
    SHARING,
    Candidates,
    Plan,
    cannot_be_used,
    choose,
    find_candidates,
    warn_unshared,
)
from bayesguard.sampling.silence import silent_dropout
from bayesguard.sampling.strategies import Draws, Settings, Structure

Strategy = Literal["auto", "replay", "compact", "vmap", "fold", "fold_tail", "loop"]

_GROUP_BYTES = 1 << 19
_PLANNING = threading.RLock()


@dataclass
class Sampler(Settings):
    """Draws outputs of a network whose dropout is switched on by interception.

    Args:
        strategy: One of "auto", "replay", "compact", "vmap", "fold", "fold_tail", "loop".

    The others are those of `Settings`.
    """

    strategy: Strategy = "auto"
    plans: dict[Any, Plan] = field(default_factory=dict, repr=False)
    last_plan: Plan | None = field(default=None, repr=False)
    _candidates: dict[Any, Candidates] = field(default_factory=dict, repr=False)
    _build: Any = field(default=None, repr=False)
    _builds_itself: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise BadInput(f"strategy must be one of {', '.join(get_args(Strategy))}, got {self.strategy!r}")
        if self.memory_budget is not None and self.memory_budget <= 0:
            raise BadInput(f"memory_budget must be a positive number of bytes, got {self.memory_budget}")

    def chunks(
        self,
        forward: Forward,
        *,
        num_samples: int,
        seed: int,
        offset: int = 0,
        first: int = 0,
        chunk: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield raw outputs `[s, N, ...]` of consecutive draws until there are `num_samples`.

        Chunks end where a block of eight draws does. `chunk` is the number of draws in each, a multiple of eight;
        None to join draws until they are worth handling.
        """
        self._follow(forward.network)
        draws = range(first, first + num_samples)
        yield from _joined(self._each(forward, draws, seed, offset), first, chunk)

    def once(self, forward: Forward, *, seed: int, draw: int = 0, offset: int = 0) -> Tensor:
        """Return the outputs `[N, ...]` of one draw: one function of the posterior."""
        self._follow(forward.network)
        again = False
        while True:  # ends, since masks that nothing was planned for fit any pass
            make = Draws(self, forward, self._found(forward, seed).structure, seed, offset)
            try:
                with _compiled_code_runs_eagerly():
                    return make.single(draw, make.forward)
            except PassesDiffer as differ:
                self._revise(forward, str(differ), "loop", again=again)
                again = True

    def structure(self, forward: Forward, seed: int) -> Structure:
        """Return what is known of the random calls for this kind of input."""
        self._follow(forward.network)
        return self._found(forward, seed).structure

    @property
    def draws_per_block(self) -> int:
        """Consecutive draws that depend on one another."""
        return BLOCK if self.balanced else 1

    def _each(self, forward: Forward, draws: Sequence[int], seed: int, offset: int) -> Iterator[Tensor]:
        """Yield what the planned strategy gives, after planning anew where the plan does not hold."""
        strategy, again = "loop", False
        while True:  # ends, as in `once`
            try:
                make = Draws(self, forward, self._found(forward, seed).structure, seed, offset)
                plan = self._plan(make, len(draws))
                strategy = plan.strategy
                if torch.is_grad_enabled():
                    make.forget()
                with nullcontext() if strategy == "compiled" else _compiled_code_runs_eagerly():
                    for outputs in make.run(strategy, draws):
                        draws = draws[len(outputs) :]
                        yield outputs
                if self._builds_itself:
                    self._build = build_of(forward.network)
                return
            except PassesDiffer as differ:
                # The control flow follows the numbers.
                self._revise(forward, str(differ), strategy, again=again)
                again = True

    def _plan(self, make: Draws, num_samples: int) -> Plan:
        """Return the plan for this kind of input and this number of rows, made at its first use."""
        key = (*make.forward.signature, make.forward.num_rows.bit_length(), make.forward.row_leaves)
        with _PLANNING:
            plan = self.plans.get(key)
            if plan is None:
                candidates = self._found(make.forward, make.seed)
                eagerly = nullcontext() if candidates.compiles else _compiled_code_runs_eagerly()
                with torch.no_grad(), eagerly:
                    plan = self.plans[key] = choose(make, candidates, num_samples)
            self.last_plan = plan
            return plan

    def _found(self, forward: Forward, seed: int) -> Candidates:
        with _PLANNING:
            found = self._candidates.get(forward.signature)
            if found is None:
                with torch.no_grad(), _compiled_code_runs_eagerly():
                    found = find_candidates(self, forward, seed, self.strategy)
                self._candidates[forward.signature] = found
                build = build_of(forward.network)
                self._builds_itself |= build != self._build
                self._build = build
            return found

    def _follow(self, network: nn.Module) -> None:
        """Forget what was found out about a network that is not built as it was then."""
        with _PLANNING:
            build = build_of(network)
            if build != self._build:
                self._candidates.clear()
                self.plans.clear()
                self._build = build

    def _revise(self, forward: Forward, reason: str, strategy: str, *, again: bool) -> None:
        """Forget a plan that does not hold, or replace it by one that needs to know less."""
        with _PLANNING:
            old = self._candidates.pop(forward.signature, None)
            self.plans.clear()
            if old is None or not again:
                return
            if strategy in SHARING:  # the draws are the loop's where each is a pass of its own
                if strategy == self.strategy:
                    raise cannot_be_used(strategy, reason)
                revised = replace(old, untried=(), reason=reason)
            else:
                warn_unshared(self, reason)
                revised = Candidates(replace(old.structure, layout=None), ("loop",), reason=reason)
            self._candidates[forward.signature] = revised


def _joined(chunks: Iterator[Tensor], first: int, chunk: int | None) -> Iterator[Tensor]:
    """Join draws up to a block's end: what follows costs as much for one draw as for many."""
    held: list[Tensor] = []
    start, position = first, first
    for outputs in chunks:
        while len(outputs):
            taken, outputs = outputs[: BLOCK - position % BLOCK], outputs[BLOCK - position % BLOCK :]
            held.append(taken)
            position += len(taken)
            if position % BLOCK == 0 and _is_full(position - start, taken, chunk):
                joined = torch.cat(held)
                held, start = [], position
                del taken  # what was joined must not lie in memory twice while the caller works
                yield joined
                del joined
    if held:
        yield torch.cat(held)


def _is_full(count: int, like: Tensor, chunk: int | None) -> bool:
    if chunk is not None:
        return count >= chunk
    return count * like[:1].numel() * like.element_size() >= _GROUP_BYTES


def _compiled_code_runs_eagerly() -> AbstractContextManager[Any]:
    """Let compiled parts run as plain code: a compiled graph would hold one draw's masks as constants."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def silent_layers(sampler: Sampler, forward: Forward, seed: int) -> list[str]:
    """Return the names of dropout-like layers that run without a single random call."""
    with _PLANNING, _compiled_code_runs_eagerly():
        return silent_dropout(forward, seed, sampler.masks(seed, [0]))
