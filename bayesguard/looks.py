"""Looks at numbers that lie on a device, for which the host would have to wait: put off to the end of a prediction.

A prediction checks every group of its draws, for NaN and for probabilities in place of logits. In the host's memory a look
costs nothing and is had at once. On a device each would wait until all work is done; there the conditions of all groups
are kept, and looked at once. Where one holds, the prediction is computed again with its looks in place: draws repeat
themselves, so that the error is the one that the first look would have raised.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

_Answer = TypeVar("_Answer")

_PUT_OFF: ContextVar[list[Tensor] | None] = ContextVar("put_off", default=None)


def puts_off(like: Tensor) -> bool:
    """Whether a look at numbers that lie where `like` does is put off."""
    return not like.is_cpu and _PUT_OFF.get() is not None


def found(bad: Tensor) -> bool:
    """Tell whether something is wrong, which one bool on any device says; False where the look is put off."""
    if not bad.is_cpu and (conditions := _PUT_OFF.get()) is not None:
        conditions.append(bad.detach())
        return False
    return bool(bad)


def holds(good: Tensor) -> bool:
    """Tell whether all is well, which one bool on any device says; True where the look is put off."""
    return not found(~good) if puts_off(good) else bool(good)


def number(value: Tensor, like: Tensor) -> Tensor | float:
    """Return a tensor without axes as what changes neither dtype nor device of `like` in arithmetic with it."""
    return value if puts_off(value) and value.device == like.device else float(value)


def with_one_look(answer: Callable[[], _Answer]) -> _Answer:
    """Return `answer()`, whose looks at a device are put off and had once, at its end.

    Where one of the conditions holds `answer()` is computed again and looks as it goes; it either raises, or it has the
    answer: a condition that is put off may be a suspicion only. An error that comes of going on with what is wrong is
    replaced by the one that the look in its place raises.
    """
    conditions: list[Tensor] = []
    token = _PUT_OFF.set(conditions)
    try:
        result = answer()
    except Exception:
        if not _any(conditions):
            raise
    else:
        if not _any(conditions):
            return result
        del result  # Two answers need not lie in memory at once.
    finally:
        _PUT_OFF.reset(token)
    return answer()


def _any(conditions: list[Tensor]) -> bool:
    devices: dict[torch.device, list[Tensor]] = {}
    for condition in conditions:
        devices.setdefault(condition.device, []).append(condition)
    return any(bool(torch.stack(own).any()) for own in devices.values())
