"""How the outputs of an ensemble's members are computed: one after another, as one batched product, or under `vmap`.

For each kind of input the ways that give the loop's outputs are timed on the first input of that kind, and the fastest
is remembered. Whatever a way cannot take falls back to the loop. `vmap` is for networks that have no batched form: with
one, it makes the same products and costs its bookkeeping on top (of ten members' loop: MLP 20-64-64-3, one row, 1.15 where the
batched product takes 0.07; MLP 784-64-64-10, 64 rows, 1.11 and 0.70).
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesguard.errors import BadInput
from bayesguard.posteriors.deterministic import Deterministic
from bayesguard.predictor import Predictor
from bayesguard.sampling.agreement import difference, first_line
from bayesguard.sampling.alike import why_not_alike
from bayesguard.sampling.batched_calls import Unbatchable
from bayesguard.sampling.choice import fastest
from bayesguard.sampling.forward import select_output
from bayesguard.sampling.members import MemberBatch, check_batchable
from bayesguard.sampling.memory import bytes_between
from bayesguard.sampling.memory_order import channels_last
from bayesguard.training_setup import has_convolutions

# What differs from the loop in its last bits has to be this much faster.
_CLEARLY = 1.1
# Members that are replaced again and again are not worth stacking each time.
_MAX_STACKINGS = 8
_LARGE = 1 << 28
# Up to so many bytes the outputs of members one after another are held, and reduced at once.
_HELD = 1 << 24
# Members of this many weights together are slower under vmap, and stacking them takes memory.
_MAX_VMAPPED = 1 << 24
# Ways in which all members are computed at once.
_TOGETHER = ("batched", "vmap")


class Plan(NamedTuple):
    """Which way is used for one kind of input, and why; where it was measured, what it costs."""

    way: str
    reason: str
    seconds: float = 0.0
    plain_pass: float | None = None  # seconds of one member's pass
    memory: int = 0  # bytes beside those of one pass
    asks_members: bool = True  # a loop asks them for their answers; False where it calls their networks


class MemberOutputs:
    """Computes the outputs of members of one architecture together where that is exact and pays.

    Copies and pickles are empty: what is remembered belongs to these very members.

    Args:
        owned: The members' parameters belong to the ensemble, which may move them into one block of memory.
    """

    def __init__(self, owned: bool) -> None:
        self.owned = owned
        self.batch: MemberBatch | None = None
        self.last: Plan | None = None
        self._plans: dict[Any, Plan] = {}
        self._stackings = 0
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        return MemberOutputs, (self.owned,)

    def __call__(self, members: Sequence[Predictor], inputs: Sequence[Any], kwargs: Any) -> Tensor | None:
        """Return the outputs `[M, N, ...]`, or None where the members have to be asked one after another."""
        if kwargs or len(inputs) != 1 or not _is_plain_call(x := inputs[0]):
            return None
        outputs = self.batched(members, inputs, kwargs)
        if outputs is not None:
            return outputs
        plan = self._plan(members, x)
        try:
            if plan.way in _TOGETHER and self.batch is not None:
                return _at_once(self.batch, plan.way)(x)
            if not plan.asks_members and all(map(_is_known, members)):
                outputs = _loop(members, channels_last(x) if plan.way == "channels last" else x)
                return outputs if outputs.shape[1] == len(x) else None
        except Exception as error:  # Every network fails in its own way; the loop raises what is the matter.
            self.last = Plan("loop", first_line(error))
        return None

    def _plan(self, members: Sequence[Predictor], x: Tensor) -> Plan:
        with self._lock:
            if self.batch is not None and not (_are_of(members, self.batch) and self.batch.is_current()):
                self.batch, self._plans = None, {}
            kind = _kind(x)
            if kind not in self._plans:
                self._plans[kind] = self._make_plan(members, x)
            self.last = self._plans[kind]
            return self.last

    def batched(self, members: Sequence[Predictor], inputs: Sequence[Any], kwargs: Any) -> Tensor | None:
        """Return the outputs of members at once, if that was chosen before and the members are unchanged since."""
        if self.batch is None or kwargs or len(inputs) != 1 or not _is_plain_call(x := inputs[0]):
            return None
        plan, batch = self._plans.get(_kind(x)), self.batch
        if plan is None or plan.way not in _TOGETHER or x.is_inference():
            return None
        if not _are_of(members, batch) or not batch.is_current():
            return None
        self.last = plan
        try:
            return _at_once(batch, plan.way)(x)
        except Exception:  # As in a call.
            return None

    def _make_plan(self, members: Sequence[Predictor], x: Tensor) -> Plan:
        reasons: list[str] = []
        networks = [member.network for member in members]
        if len(members) < 2 or not all(_is_plain_member(member) for member in members):
            return Plan("loop", "members are random, or a part of their output is used")
        # This finds out as well whether a network is random in eval mode.
        want = _joined([member.draw_outputs(x) for member in members])
        if any(member._own_randomness for member in members):
            return Plan("loop", "members are random in eval mode")
        if want.nbytes > _LARGE:
            return Plan("loop", "outputs are too large to hold those of all members")
        ways: dict[str, Callable[[], Any]] = {"loop": lambda: _loop(members, x)}
        batch = self.batch
        for way in _TOGETHER:
            try:
                batch = batch or self._stack(networks, x, way)
                call = _at_once(batch, way)
                _check_equal(call(x), want)
                ways[way] = partial(call, x)
                break
            except Exception as error:
                why = first_line(error)
                # What keeps members from being stacked at all does so for both.
                if not any(reason.endswith(f": {why}") for reason in reasons):
                    reasons.append(f"{way}: {why}")
        if x.dim() == 4 and x.device.type == "cpu" and any(map(has_convolutions, networks)):
            try:
                _check_equal(_loop(members, channels_last(x)), want)
                ways["channels last"] = lambda: _loop(members, channels_last(x))
            except Exception as error:
                reasons.append(f"channels last: {first_line(error)}")
        if len(ways) == 1:
            return Plan("loop", "; ".join(reasons), asks_members=want.nbytes > _HELD)
        choice = fastest(ways, x.device)
        way = min(choice.seconds, key=lambda name: choice.seconds[name] * (1 if name == "loop" else _CLEARLY))
        if way in _TOGETHER and batch is not None and self.batch is None:
            batch.adopt()
            self.batch = batch
            self._stackings += 1
        loop = choice.seconds["loop"] / len(members)
        memory = want.nbytes
        if way in _TOGETHER:
            memory += bytes_between(networks[0], lambda: networks[0](x[:1].clone())) * len(x) * (len(members) - 1)
        asks_members = way == "loop" and want.nbytes > _HELD
        return Plan(way, f"measured: {choice}", choice.seconds[way], loop, memory, asks_members)

    def _stack(self, networks: Sequence[nn.Module], x: Tensor, way: str) -> MemberBatch:
        if not self.owned:
            raise Unbatchable("members are not copies (copy=False), and their memory is left alone")
        if self._stackings >= _MAX_STACKINGS:
            raise Unbatchable("members were replaced too often")
        if reason := why_not_alike(networks):
            raise Unbatchable(reason)
        if way == "batched":
            check_batchable(networks, x[:2])
        elif sum(parameter.numel() for network in networks for parameter in network.parameters()) > _MAX_VMAPPED:
            raise Unbatchable("members are too large")
        return MemberBatch(networks)


def _at_once(batch: MemberBatch, way: str) -> Callable[[Tensor], Tensor]:
    return batch.vmapped if way == "vmap" else batch


def _is_plain_call(x: Any) -> bool:
    """Whether nothing but plain numbers is asked for: no gradients, no casts, nobody else who watches the calls."""
    return (
        type(x) is Tensor
        and x.dim() > 1
        and x.shape[0] > 0  # len() of a tensor is code in Python
        and not torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape[1:], x.shape[0].bit_length(), x.dtype, x.device


def _is_plain_member(member: Predictor) -> bool:
    return type(member) is Deterministic and member.output is None


def _is_known(member: Predictor) -> bool:
    """Whether a member is plain, and its network was seen not to be random by itself."""
    return type(member) is Deterministic and member.output is None and member._own_randomness is False


def _are_of(members: Sequence[Predictor], batch: MemberBatch) -> bool:
    """Whether the members are still plain networks, those that were stacked, and give all of their output."""
    # An attribute that is a module takes torch ten times as long to find as an entry of its dictionary.
    if len(members) != batch.count:
        return False
    for member, network in zip(members, batch.networks, strict=True):
        if type(member) is not Deterministic or member._modules["network"] is not network or member.output is not None:
            return False
    return True


def _joined(outputs: Sequence[Tensor]) -> Tensor:
    """Return the members' outputs `[1, N, ...]` along the first axis."""
    for index, own in enumerate(outputs):
        check_same_shape(outputs[0], own, index)
    return torch.cat(list(outputs))


def check_same_shape(first: Tensor, own: Tensor, index: int) -> None:
    """Raise BadInput where draws `[S, N, ...]` of a member have another shape than those of the first one."""
    if own.shape[1:] != first.shape[1:]:
        raise BadInput(
            f"members 0 and {index} have outputs of shapes {tuple(first.shape[1:])} and {tuple(own.shape[1:])}; "
            "the members of an ensemble answer the same question, in outputs of one shape"
        )


def _loop(members: Sequence[Predictor], x: Tensor) -> Tensor:
    # A network may write over its input, and may give something else than at the first prediction.
    return torch.stack([select_output(member.network(x.clone()), None) for member in members])


def _check_equal(got: Tensor, want: Tensor) -> None:
    """Raise Unbatchable where outputs differ by more than rounding."""
    if why := difference(got, want):
        raise Unbatchable(why)
