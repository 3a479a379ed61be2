"""Whether an example's outputs are its own, whatever stands beside it."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor

from bayesguard.sampling.agreement import difference, first_line
from bayesguard.sampling.forward import Forward

_ROWS = 4
# They take sums over a batch to either side of a bound.
_EXTREMES = (1e4, -1e4)
# Not 0, which says in some data that there is nothing.
_SMALL = 1e-3


def mixing_of(run: Callable[[Forward], Tensor], forward: Forward) -> str:
    """Say that the outputs of an example depend on those beside it; empty where that does not show.

    In passes over the first row, and one of small numbers, beside copies of it and beside extreme ones. Real data may not show it:
    `torch.where(x.sum() > 0, a, b)` takes one way for most. Inputs without floating-point numbers show nothing.

    Args:
        run: Returns the outputs of a call, by the same masks each time.
        forward: The call. A copy of its network is run, which may keep what it sees.
    """
    try:
        network = deepcopy(forward.network, {id(parameter): parameter for parameter in forward.network.parameters()})
    except Exception as error:  # Modules fail in many ways to be copied.
        return f"whether the outputs of an example are its own cannot be tried: the network cannot be copied ({first_line(error)})"
    copies = forward.rows(torch.zeros(forward.few_rows(_ROWS), dtype=torch.long, device=forward.device))
    try:
        copies = Forward(network, copies.inputs, copies.kwargs, copies.select, copies=True)
        mixes = any(_mixes(run, rows) for rows in (copies, copies.floats(_small)))
    except Exception:  # Networks that look at their numbers refuse some of these, in ways of their own.
        return ""
    return "the outputs of an example depend on those beside it (the network mixes examples)" if mixes else ""


def _small(rows: Tensor) -> Tensor:
    return rows * _SMALL + _SMALL


def _mixes(run: Callable[[Forward], Tensor], copies: Forward) -> bool:
    want = run(copies)[:1]

    def beside(extreme: float) -> Forward:
        return copies.floats(lambda rows: torch.cat([rows[:1], rows[1:] * extreme + extreme]))

    return any(difference(run(beside(extreme))[:1], want) for extreme in _EXTREMES)
