"""How the engine finds out about a network: where its masks lie, which strategies are exact, which is the fastest."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bayesguard.errors import BadInput, RandomnessWarning
from bayesguard.sampling.agreement import difference, first_line
from bayesguard.sampling.choice import cost_line, memory_line, seconds_of
from bayesguard.sampling.compaction import version_of
from bayesguard.sampling.forward import Forward
from bayesguard.sampling.intercept import Intercept, intercepted
from bayesguard.sampling.masks import PassesDiffer, find_layout, whole_channels
from bayesguard.sampling.memory import is_out_of_memory, storages_of
from bayesguard.sampling.row_parts import plain_difference
from bayesguard.sampling.strategies import Draws, Settings, Structure
from bayesguard.sampling.streams import default_states, seeded_default_generators

# Whether a strategy is exact shows on few rows; what it costs only on all.
_FEW_ROWS = 4
# Above this a draw is bound by its arithmetic, and draws that share a batch gain nothing on a CPU; up to four times as
# much, a draw that takes longer than a plain pass is bound by the number of its calls all the same.
_ARITHMETIC_BOUND = 2e-3
_CALL_BOUND = 4 * _ARITHMETIC_BOUND
_DEARER_THAN_PLAIN = 1.15
_TRIED_DRAWS = 16
# What the first run of something that takes milliseconds costs over a later one, at most.
_FIRST_OVER_LATER = 1.5
# How much faster a strategy has to be than replay, which alone gives the loop's very bits.
_CLEARLY = {"replay": 1.0, "replay_parts": 1.0, "compact": 1.05, "vmap": 1.2, "fold_tail": 1.2, "fold": 1.2}
_PLAYED = ("replay", "compact", "replay_parts")
_FEWEST_FOR_COMPACT = 16
# Strategies whose draws share a batch.
SHARING = ("vmap", "fold_tail", "fold")
# Those in which other rows stand beside an example than in a plain pass.
_REGROUPING = ("fold_tail", "fold", "replay_parts")


@dataclass(frozen=True)
class Candidates:
    """The strategies to choose from.

    Attributes:
        structure: What is known of the random calls.
        exact: Strategies that were seen to give the plain loop's draws.
        untried: Strategies that share a batch between draws: tried where they may pay.
        reason: Why there are no others.
        compiles: Whether a compiled graph is wanted.
    """

    structure: Structure
    exact: tuple[str, ...]
    untried: tuple[str, ...] = ()
    reason: str = ""
    compiles: bool = False


@dataclass(frozen=True)
class Plan:
    """Which strategy is used for one kind of input, and what was measured.

    Attributes:
        strategy: The strategy.
        reason: Why.
        structure: What is known of the random calls.
        plain_pass: Seconds of one pass without masks; None where nothing was measured. Where nearly all of a
            prediction precedes the masks, it is that of the first pass with them.
        first_draw: Seconds of the first draw, where the others continue from it.
        per_draw: Seconds of a further draw by each strategy that was timed.
        memory: Bytes that are held beside those of one pass.
    """

    strategy: str
    reason: str
    structure: Structure
    plain_pass: float | None = None
    first_draw: float = 0.0
    per_draw: dict[str, float] = field(default_factory=dict)
    memory: int = 0

    def seconds(self, num_samples: int, strategy: str | None = None) -> float:
        """Return the predicted seconds of a number of draws by a strategy that was timed, or by the one chosen."""
        name = strategy or self.strategy
        return (self.first_draw if name in _PLAYED else 0.0) + num_samples * self.per_draw[name]

    def explain(self, num_samples: int) -> str:
        """Say what was chosen and why, what it costs beside plain passes, and what memory it takes."""
        lines = [f"strategy: {self.strategy}", f"  why: {self.reason or 'nothing else to choose from'}"]
        if self.plain_pass is not None:
            lines.append(cost_line(f"{num_samples} draws", self.seconds(num_samples), self.plain_pass))
        return "\n".join([*lines, memory_line(self.memory)])


def find_candidates(settings: Settings, forward: Forward, seed: int, asked: str) -> Candidates:
    """Find out where the examples lie in each random call, and which strategies are exact."""
    structure, reason = _probe(settings, forward, seed)
    if forward.num_rows == 0 or not structure.is_random:
        return Candidates(structure, ("loop",), reason=reason)
    if asked == "loop":
        return Candidates(structure, ("loop",), reason="asked for")
    size = forward.few_rows(_FEW_ROWS)
    few = forward.rows(slice(0, size)) if forward.num_rows > size else forward
    trial = Draws(settings, few, structure, seed, 0)
    try:
        want = torch.cat(list(trial.loop(range(2))))
    except PassesDiffer as differ:
        warn_unshared(settings, str(differ))
        return Candidates(replace(structure, layout=None), ("loop",), reason=str(differ))
    if asked != "auto":
        if disagreement := disagreement_of(trial, asked, want):
            raise cannot_be_used(asked, disagreement)
        return Candidates(structure, (asked,))
    found = {name: disagreement_of(trial, name, want) for name in _played(settings, forward.device, structure)}
    exact = tuple(name for name, disagreement in found.items() if not disagreement)
    shareable = structure.layout is not None and not structure.own_randomness
    reasons = [reason, *(f"{name}: {why}" for name, why in found.items() if why)]
    untried = SHARING if shareable else ()
    wanted = settings.compile and shareable
    return Candidates(structure, exact or ("loop",), untried, "; ".join(filter(None, reasons)), wanted)


def cannot_be_used(strategy: str, why: str) -> BadInput:
    """Return the error for a strategy that was asked for and is not exact."""
    return BadInput(f"strategy={strategy!r} cannot be used with this network: {why}; use strategy='auto'")


def choose(draws: Draws, candidates: Candidates, num_samples: int) -> Plan:
    """Time the candidates on the real input; what was computed before the masks stays on the draws' tape."""
    if candidates.compiles:
        compiled, why = _compiled(draws, candidates)
        if compiled is not None:
            return compiled
        candidates = replace(candidates, reason=f"compiled: {why}")
    if _is_drawn_in_parts(draws, candidates):
        why = f"in parts of {draws.row_parts()[0].forward.num_rows} rows, whose activations take less memory"
        candidates = replace(candidates, exact=("replay_parts",), untried=(), reason=why)
    names = candidates.exact
    reason = candidates.reason or ("the only strategy that is exact" if candidates.untried else "asked for")
    plan = Plan(names[0], reason, candidates.structure, memory=draws.held_bytes())
    if names[0] not in _PLAYED:
        return plan if names[0] == "loop" else replace(plan, memory=draws.group_size() * draws.bytes_per_draw())
    try:
        return _timed(draws, plan, candidates, max(2, num_samples))
    except RuntimeError as error:
        if not isinstance(error, PassesDiffer) and not is_out_of_memory(error):
            raise
        return plan


def _played(settings: Settings, device: torch.device, structure: Structure) -> tuple[str, ...]:
    places = structure.layout or ()
    drops_channels = any(
        whole_channels(call, place) is not None for call, place in zip(structure.calls, places, strict=False)
    )
    # Picking kept channels out needs their indices on the host, which a GPU would have to be waited for.
    is_plain = not (settings.per_example or structure.own_randomness or structure.looks_behind_dropout)
    compacts = drops_channels and is_plain and device.type == "cpu"
    return ("replay", "compact") if compacts else ("replay",)


def _is_drawn_in_parts(draws: Draws, candidates: Candidates) -> bool:
    """Tell whether draws are large enough to be made of some rows after the others, and the same.

    That no row looks at another shows on all of them, in passes that take no more memory than a plain one; that their
    masks go with them, on few.
    """
    played = candidates.exact == ("replay",) and candidates.untried and not draws.settings.per_example
    if not played or draws.forward.device.type != "cpu" or len(draws.row_parts()) == 1:
        return False
    if plain_difference(draws.forward, [part.forward for part in draws.row_parts()]):
        return False
    size = draws.forward.few_rows(_FEW_ROWS)
    few = Draws(draws.settings, draws.forward.rows(slice(0, size)), draws.structure, draws.seed, 0)
    few.row_parts(-(-size // 2))
    return not disagreement_of(few, "replay_parts", torch.cat(list(few.loop(range(2)))))


def _timed(draws: Draws, plan: Plan, candidates: Candidates, samples: int) -> Plan:
    first = _seconds(draws, candidates.exact[0], [0])
    # Picking weights out costs the same for one row as for a thousand.
    few = draws.forward.num_rows < _FEWEST_FOR_COMPACT
    played = candidates.exact[:1] if few else candidates.exact
    per_draw = {name: min(_seconds(draws, name, [draw]) for draw in (1, 2)) for name in played}
    each = min(per_draw.values())
    plain = _plain_seconds(draws) if first < _CALL_BOUND or samples * each > 2 * first else first
    first = min(first, plain + each)  # the very first pass may have waited for memory, or for its turn
    if _sharing_may_pay(draws, first, each, plain, samples):
        per_draw |= _shared_batches(draws, candidates, first, samples, first + samples * each)
    plan = replace(plan, plain_pass=plain, first_draw=first, per_draw=per_draw)

    def total(name: str) -> float:
        return plan.seconds(samples, name)

    best = min(per_draw, key=lambda name: total(name) * _CLEARLY[name])
    times = ", ".join(f"{name} {1000 * total(name):.3g} ms" for name in sorted(per_draw, key=total))
    memory = draws.held_bytes() if best in _PLAYED else draws.group_size() * draws.bytes_per_draw()
    why = "; ".join(filter(None, [f"measured for {samples} draws: {times}", candidates.reason]))
    return replace(plan, strategy=best, reason=why, memory=memory)


def _compiled(draws: Draws, candidates: Candidates) -> tuple[Plan | None, str]:
    """Compile the pass on the real input, and return its plan where it gives the plain loop's draws."""
    want = torch.cat(list(draws.loop(range(2))))
    if why := disagreement_of(draws, "compiled", want, any_error=True):
        return None, why
    seconds = _seconds(draws, "compiled", range(32)) / 32
    memory = draws.group_size() * draws.bytes_per_draw()
    per_draw = {"compiled": seconds}
    return Plan("compiled", "asked for", candidates.structure, _plain_seconds(draws), 0.0, per_draw, memory), ""


def _sharing_may_pay(draws: Draws, whole: float, each: float, plain: float, samples: int) -> bool:
    """Tell whether draws are bound by their calls, and make up most of the prediction: then they may share a batch."""
    if draws.forward.device.type != "cpu":
        return True
    bound_by_calls = each < _ARITHMETIC_BOUND or _DEARER_THAN_PLAIN * plain < each < _CALL_BOUND
    return bound_by_calls and samples * each > whole / 4


def _shared_batches(
    draws: Draws, candidates: Candidates, whole: float, samples: int, played: float
) -> dict[str, float]:
    """Return the seconds a draw of the strategies that share a batch, of those that are exact.

    `whole` are the seconds of a first draw, and `played` those of all draws one after another.
    """
    tried = range(min(samples, _TRIED_DRAWS, draws.group_size()))
    want = torch.cat(list(draws.run(candidates.exact[0], range(2))))
    per_draw = {}
    for name in candidates.untried:
        # fold repeats what comes before the masks as well.
        if name == "fold" and draws.forward.device.type == "cpu" and whole > _ARITHMETIC_BOUND:
            continue
        seconds, disagreement = _checked_seconds(draws, name, tried, want)
        if disagreement:
            continue
        if not _is_hopeless(seconds, len(tried), samples, played, draws.forward.device):
            seconds = _seconds(draws, name, tried)
        per_draw[name] = seconds / len(tried)
    return per_draw


def _checked_seconds(draws: Draws, name: str, numbers: Sequence[int], want: Tensor) -> tuple[float, str]:
    """Return the seconds of some draws, made for the first time, and how they differ from `want`."""
    found: list[str] = []

    def check() -> None:
        found.append(disagreement_of(draws, name, want, numbers))

    return seconds_of(check, draws.forward.device), found[0]


def _is_hopeless(seconds: float, tried: int, samples: int, played: float, device: torch.device) -> bool:
    """Tell whether what some draws took at the very first time is too much for a second one to change the choice."""
    takes_time = device.type == "cpu" and seconds > _CALL_BOUND
    return takes_time and seconds / tried * samples > _FIRST_OVER_LATER * played


def _seconds(draws: Draws, name: str, numbers: Sequence[int]) -> float:
    return seconds_of(lambda: list(draws.run(name, numbers)), draws.forward.device)


def _plain_seconds(draws: Draws) -> float:
    device = draws.forward.device
    with seeded_default_generators(device, draws.seed, "plain"):  # the network may be random without a mask
        once = seconds_of(draws.forward, device)
        # A short pass takes two or three times as long when it is made for the first time.
        return once if once > _CALL_BOUND else min(once, *(seconds_of(draws.forward, device) for _ in range(2)))


def _probe(settings: Settings, forward: Forward, seed: int) -> tuple[Structure, str]:
    """Run the network on the first row twice and three times over, and compare its random calls."""
    if forward.num_rows == 0:
        return Structure(None, (), False), "no examples"
    two, three = (_TrialPass(settings, forward, seed, copies) for copies in (2, 3))
    looks = two.drops_in_place and _looks_behind_dropout(settings, forward, seed)
    found = Structure(
        None,
        tuple(two.calls),
        three.own_randomness,
        overwrites_inputs=two.overwrites_inputs or looks,
        looks_behind_dropout=looks,
    )
    try:
        return replace(found, layout=find_layout(two.calls, three.calls)), ""
    except PassesDiffer as differ:
        warn_unshared(settings, str(differ))
        return found, str(differ)


class _TrialPass:
    """What one pass over copies of the first row shows."""

    def __init__(
        self, settings: Settings, forward: Forward, seed: int, copies: int, spared: frozenset[int] | None = None
    ) -> None:
        index = torch.zeros(copies, dtype=torch.long, device=forward.device)
        given = forward.rows(index)
        own = given.copied()
        masks = settings.masks(seed, [0])
        mode = Intercept(masks, settings.selected, spared=spared)
        with seeded_default_generators(forward.device, seed, 0):
            before = default_states(forward.device)
            with intercepted(mode), _what_was_tried(copies):
                self.outputs = own()
            drew = not all(map(torch.equal, before, default_states(forward.device)))
        self.calls, self.drops_in_place = masks.calls, mode.drops_in_place
        # Not every random call is known by its name.
        self.own_randomness = mode.own_randomness or drew
        pairs = zip(given.tensors(), own.tensors(), strict=True)
        self.overwrites_inputs = any(version_of(now) or not torch.equal(then, now) for then, now in pairs)


@contextmanager
def _what_was_tried(copies: int) -> Iterator[None]:
    """Add to an error of the network why it was called on other rows than were given."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"bayesguard called the network on {copies} copies of the first example, to see where its masks lie; inputs with "
            "as many entries along their first axis as there are examples were taken for one entry an example"
        )
        raise


def _looks_behind_dropout(settings: Settings, forward: Forward, seed: int) -> bool:
    """Tell whether it matters that a dropout in place writes over its input: whether that is looked at again."""
    plain = _TrialPass(settings, forward, seed, 2)
    try:
        in_place = _TrialPass(settings, forward, seed, 2, spared=storages_of(forward.network))
    except RuntimeError:  # over what cannot be written, as in training
        return False
    return bool(difference(in_place.outputs, plain.outputs))


def warn_unshared(settings: Settings, reason: str) -> None:
    """Warn that the examples of a draw cannot have the same masks."""
    if not settings.per_example:
        warnings.warn(
            f"masks cannot be shared by the examples of a draw ({reason}): every example gets its own",
            RandomnessWarning,
            stacklevel=2,
        )


def disagreement_of(
    draws: Draws, strategy: str, want: Tensor, numbers: Sequence[int] = range(2), *, any_error: bool = False
) -> str:
    """Say how the first of a strategy's draws differ from `want`, the plain loop's; empty when they do not.

    `numbers` are the draws to make, from 0 on and at least those of `want`.
    """
    if strategy in _REGROUPING and draws.mixing:
        return draws.mixing
    try:
        got = torch.cat(list(draws.run(strategy, numbers)))[: len(want)]
    except PassesDiffer as differ:
        return str(differ)
    except Exception as error:
        # Compilers fail in ways of their own; of everything else, only torch's errors are expected here.
        if not (any_error or isinstance(error, RuntimeError)):
            raise
        if is_out_of_memory(error):
            return "it does not fit into memory"
        return f"{type(error).__name__}: {first_line(error)}"
    found = difference(got, want)
    # Of the right form and with other numbers: what these networks do.
    return f"{found} (the network mixes examples, or keeps a state)" if "differ from" in found else found
