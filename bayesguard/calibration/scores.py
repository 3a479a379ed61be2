"""Conformity scores of classes: how strange each answer would be, from the probabilities alone.

Equally probable classes have equal scores, so that the order of the classes changes nothing.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.predictive.numerics import slices, wide

ClassScore = Literal["lac", "aps", "raps", "saps"]

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
    parts = [
        _scores(wide(probs[rows]), score, penalty, free_ranks, seed) for rows in slices(len(probs), 8 * probs.shape[1])
    ]
    return torch.cat(parts)


def _scores(probs: Tensor, score: ClassScore, penalty: float, free_ranks: int, seed: int | None) -> Tensor:
    if score == "lac":
        return 1 - probs
    above, tied, rank = _masses(probs)
    # The share of its own mass that counts: all of it, or a random one for each example.
    share = torch.ones_like(probs[:, :1]) if seed is None else row_uniforms(probs, seed).unsqueeze(-1)
    if score == "saps":
        top = probs.amax(-1, keepdim=True)
        return torch.where(rank == 1, share * top, top + (rank - 2 + share) * penalty)
    scores = above + share * tied
    return scores + penalty * (rank - free_ranks).clamp_min(0) if score == "raps" else scores


def _masses(probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each class the mass of more probable ones, that of equally probable ones, and its rank from 1."""
    ordered, order = probs.sort(dim=-1, descending=True)
    places = torch.arange(probs.shape[1], device=probs.device).expand_as(probs)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # Of a run of equal probabilities, the place of its first and of its last.
    first = torch.where(starts, places, 0).cummax(-1).values
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:]
    last = torch.where(ends, places, probs.shape[1]).flip(-1).cummin(-1).values.flip(-1)
    mass = torch.nn.functional.pad(ordered.cumsum(-1), (1, 0))
    above = mass.gather(-1, first)
    tied = mass.gather(-1, last + 1) - above
    back = order.argsort(-1)
    return above.gather(-1, back), tied.gather(-1, back), (last + 1).gather(-1, back).to(probs.dtype)


def row_uniforms(probs: Tensor, seed: int) -> Tensor:
    """Return a number in (0, 1) for each row `[N]`: a hash of the row's float32 values, in any order, and the seed.

    The same example has the same number in every batch. Any function of a row alone keeps examples exchangeable, so that
    coverage does not rest on the quality of the hash.
    """
    bits = probs.float().contiguous().view(torch.int32).long()
    mixed = _mix(_mix(bits + seed).sum(-1))
    return ((mixed >> 11) & ((1 << 53) - 1)).double().add_(0.5) / float(1 << 53)


def _mix(value: Tensor) -> Tensor:
    # Logical shifts: the sign is masked away.
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * _FIRST
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * _SECOND
    return value ^ ((value >> 31) & ((1 << 33) - 1))
