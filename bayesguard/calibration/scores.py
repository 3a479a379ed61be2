"""Conformity scores of classes: how strange each answer would be, from the probabilities alone.

Equally probable classes have equal scores, so that the order of the classes changes nothing.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.predictive.numerics import BUDGET, CACHED, in_slices, wide

ClassScore = Literal["lac", "aps", "raps", "saps"]
_Whole = TypeVar("_Whole", Tensor, npt.NDArray[np.int64])

# Odd constants of splitmix64 (Steele, Lea, Flood, 2014, OOPSLA), as signed integers.
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def check_class_score(score: object) -> ClassScore:
    """Return the name of a score, or raise BadInput."""
    if score not in get_args(ClassScore):
        raise BadInput(f"score must be one of {', '.join(map(repr, get_args(ClassScore)))}, got {score!r}")
    return score  # type: ignore[return-value]


def class_scores(probs: Tensor, score: ClassScore, *, penalty: float, free_ranks: int, seed: int | None) -> Tensor:
    """Return the score of every class, float64 `[N, K]`.

    Args:
        probs: `[N, K]`.
        score: "lac": 1 - p (Sadinle, Lei, Wasserman, 2019, JASA). "aps": the mass of all classes that are at least as
            probable (Romano, Sesia, Candès, 2020, NeurIPS, eq. 8). "raps": that, and `penalty` for every rank beyond
            `free_ranks` (Angelopoulos et al., 2021, ICLR, eq. 4). "saps": the largest probability, and `penalty` for
            every rank beyond the first (Huang et al., 2024, ICML, eq. 8).
        penalty: See above.
        free_ranks: See above.
        seed: Of the share of an answer's own mass that is left out, which makes coverage exact; None to leave out none.
    """

    def of(rows: slice) -> Tensor:
        part = probs[rows]
        if score == "lac":
            return 1 - wide(part)
        ordered, order = part.sort(dim=-1, descending=True)
        ordered = wide(ordered)
        scores = _scores(_masses(ordered), ordered[:, :1], _share(part, seed), score, penalty, free_ranks)
        return torch.empty_like(scores).scatter_(-1, order, scores)

    return in_slices(of, len(probs), 8 * probs.shape[1])


def label_scores(
    probs: Tensor, labels: Tensor, score: ClassScore, *, penalty: float, free_ranks: int, seed: int | None
) -> Tensor:
    """Return the score of one class an example, float64 `[N]`: what `class_scores` says of it, without sorting.

    Args:
        probs: `[N, K]`.
        labels: int64 `[N]`.
        score: As for `class_scores`, like all that follow.
        penalty: See there.
        free_ranks: See there.
        seed: See there.
    """

    probs = probs.detach()

    def of(rows: slice) -> Tensor:
        part = probs[rows]
        own = part.gather(-1, labels[rows].unsqueeze(-1))
        if score == "lac":
            return 1 - wide(own[:, 0])
        masses = _own_masses(part, own, score, seed is not None)
        top = wide(part.amax(-1, keepdim=True)) if score == "saps" else masses.rank
        return _scores(masses, top, _share(part, seed), score, penalty, free_ranks)[:, 0]

    return in_slices(of, len(probs), probs.shape[1] * BUDGET // CACHED)


def _own_masses(probs: Tensor, own: Tensor, score: ClassScore, is_shared: bool) -> _Masses:
    """What a score needs to know of one class `[N, 1]`; what it does not need is zero.

    Comparisons are written as floats: products with bools, and their sums, would have to convert them first.
    """
    unused = wide(torch.zeros_like(own))
    if score == "saps":
        return _Masses(unused, unused, _sum(torch.ge(probs, own, out=torch.empty_like(probs))))
    if not is_shared:  # what is equally probable counts in full, like what is more probable
        held = torch.ge(probs, own, out=torch.empty_like(probs))
        rank = _sum(held) if score == "raps" else unused
        return _Masses(_sum(held.mul_(probs)), unused, rank)
    equal = torch.eq(probs, own, out=torch.empty_like(probs))
    tied = _sum(equal)
    held = torch.gt(probs, own, out=equal)
    rank = _sum(held) + tied if score == "raps" else unused
    return _Masses(_sum(held.mul_(probs)), wide(own) * tied, rank)


def _sum(values: Tensor) -> Tensor:
    return wide(values).sum(-1, keepdim=True)


class _Masses(NamedTuple):
    """For each class the mass of more probable ones, that of equally probable ones, and its rank from 1."""

    above: Tensor
    tied: Tensor
    rank: Tensor


def _scores(
    masses: _Masses, top: Tensor, share: Tensor | float, score: ClassScore, penalty: float, free_ranks: int
) -> Tensor:
    above, tied, rank = masses
    if score == "saps":
        return torch.where(rank == 1, share * top, top + (rank - 2 + share) * penalty)
    scores = above + share * tied
    return scores + penalty * (rank - free_ranks).clamp_min(0) if score == "raps" else scores


def _share(probs: Tensor, seed: int | None) -> Tensor | float:
    """The share of an answer's own mass that counts, `[N, 1]`: all of it, or a random one for each example."""
    return 1.0 if seed is None else row_uniforms(probs, seed).unsqueeze(-1)


def _masses(ordered: Tensor) -> _Masses:
    places = torch.arange(ordered.shape[1], device=ordered.device).expand_as(ordered)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # Of a run of equal probabilities, the place of its first and of its last.
    first = torch.where(starts, places, 0).cummax(-1).values
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:]
    last = torch.where(ends, places, ordered.shape[1]).flip(-1).cummin(-1).values.flip(-1)
    mass = torch.nn.functional.pad(ordered.cumsum(-1), (1, 0))
    above = mass.gather(-1, first)
    return _Masses(above, mass.gather(-1, last + 1) - above, (last + 1).to(ordered.dtype))


def row_uniforms(probs: Tensor, seed: int) -> Tensor:
    """Return a number in (0, 1) for each row `[N]`: a hash of the row's float32 values, in any order, and the seed.

    The same example has the same number in every batch. Any function of a row alone keeps examples exchangeable, so that
    coverage does not rest on the quality of the hash.
    """
    bits = probs.detach().float().contiguous().view(torch.int32)
    # NumPy can shift unsigned numbers, and needs a third of the time.
    mixed = _hash(bits.numpy().astype(np.int64), seed) if bits.device.type == "cpu" else _hash(bits.long(), seed)
    whole = torch.as_tensor(mixed)
    return ((whole >> 11) & ((1 << 53) - 1)).double().add_(0.5) / float(1 << 53)


def _hash(values: _Whole, seed: int) -> _Whole:
    """One int64 for each row `[N, K]`, whatever the order in it; `values` are overwritten."""
    values += seed
    return _mix(_mix(values).sum(-1))


def _mix(value: _Whole) -> _Whole:
    for shift, odd in ((30, _FIRST), (27, _SECOND)):
        value ^= _shifted(value, shift)
        value *= odd
    value ^= _shifted(value, 31)
    return value


def _shifted(value: _Whole, shift: int) -> _Whole:
    """Shift to the right as if the numbers had no sign, which torch cannot: there it is masked away."""
    if isinstance(value, Tensor):
        return (value >> shift).bitwise_and_((1 << (64 - shift)) - 1)
    return (value.view(np.uint64) >> np.uint64(shift)).view(np.int64)
