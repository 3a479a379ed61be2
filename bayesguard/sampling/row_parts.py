"""A draw over parts of the rows, one after another: where activations are large it holds those of a part only."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bayesguard.sampling.agreement import difference
from bayesguard.sampling.forward import Forward
from bayesguard.sampling.masks import BatchAxis, MaskCall

# The largest masked activation of a part: small enough to count little beside a pass, large enough that calls count
# little beside their arithmetic.
_PART_BYTES = 2 << 20
_FEWEST_ROWS = 16

Layout = Sequence[BatchAxis | None]


class Part(Protocol):
    """The draws of one part of the rows."""

    calls: Sequence[MaskCall]  # of the latest pass

    def replay(self, draws: Sequence[int]) -> Iterator[Tensor]: ...


def rows_of_a_part(num_rows: int, calls: Sequence[MaskCall]) -> int:
    """Return how many rows to draw at a time: all of them where their masked activations are small.

    Args:
        num_rows: Rows of the batch.
        calls: Its random calls.
    """
    largest = 4 * max((torch.Size(call.shape).numel() for call in calls), default=0)
    parts = max(1, min(-(-largest // _PART_BYTES), num_rows // _FEWEST_ROWS))
    return -(-num_rows // parts)


def plain_difference(forward: Forward, parts: Sequence[Forward]) -> str:
    """Say how passes without masks over the parts differ from the one over all rows; empty where they do not."""
    try:
        return difference(torch.cat([part() for part in parts]), forward())
    except Exception as error:  # networks have many ways to say that they cannot be given fewer rows
        return f"{type(error).__name__}: {error}"


def drawn_in_parts(parts: Sequence[Part], draws: Sequence[int], layout: Layout) -> Iterator[Tensor]:
    """Yield draws `[1, N, ...]` part by part; end early where the masks of the parts would not be the same."""
    runs = [part.replay(draws) for part in parts]
    for _ in draws:
        outputs = [next(run) for run in runs]
        masks = {_of_any_rows(part.calls, layout) for part in parts}
        if len(masks) > 1 or len({output.shape[2:] for output in outputs}) > 1:
            return
        yield torch.cat(outputs, dim=1)
        del outputs  # what was joined must not lie in memory twice while the caller works


def _of_any_rows(calls: Sequence[MaskCall], layout: Layout) -> tuple[tuple[object, ...], ...]:
    """Return what must be the same in every part: shapes of the masks of one example, and their rates."""
    return tuple(
        (*(size for axis, size in enumerate(call.shape) if place is None or axis != place.axis), call.rate)
        for call, place in zip(calls, layout, strict=False)
    )
