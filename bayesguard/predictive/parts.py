"""A prediction as it comes: predictives over some of the draws each, and the one predictive that they make."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from bayesguard.predictive.base import Predictive
from bayesguard.predictive.combine import Reduction, mixture
from bayesguard.predictive.pooled import PooledPredictive


class Part(NamedTuple):
    """A predictive over some of the draws, and the share of the whole mixture that these draws carry.

    Parts of one member of an ensemble, which follow one another, have its number: its draws are alike, and count as
    one where the Monte-Carlo error is told.
    """

    predictive: Predictive
    share: float
    member: int | None = None


def collect(parts: Iterable[Part], keep: bool) -> Predictive:
    """Return one predictive of all draws, kept or reduced as they come; those of one member are one group."""
    members = [_collect_member(run, keep) for _, run in itertools.groupby(parts, key=lambda part: part.member)]
    predictive = _mixed(members, "members")
    return predictive if keep else predictive.reduce()


def _collect_member(parts: Iterator[Part], keep: bool) -> Part:
    first = next(parts)
    if keep or not isinstance(first.predictive, PooledPredictive):
        every = [first, *parts]
        return Part(_mixed(every, "within"), sum(part.share for part in every))
    reduction, total = Reduction(), 0.0
    for part in itertools.chain([first], parts):
        reduction.update(part.predictive, part.share)
        total += part.share
    return Part(reduction.result(), total)


def _mixed(parts: list[Part], groups: Literal["within", "members"]) -> Predictive:
    if len(parts) == 1:
        return parts[0].predictive
    return mixture([part.predictive for part in parts], [part.share for part in parts], groups=groups)
