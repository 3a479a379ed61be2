"""Draws until the Monte-Carlo error is small enough, for each example by itself."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.checks import check_count
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import Predictive
from bayesguard.predictive.base import normalised_weights
from bayesguard.predictive.pooled import Moments, PooledPredictive, merge_moments
from bayesguard.sampling import Forward

# Draws `count` times from draw number `first` on: predictives over consecutive blocks.
Draw = Callable[[Forward, int, int], Iterator[Predictive]]

_FEWEST = 8
# Whoever stops by an estimated error stops where the estimate is low by chance. With these the root-mean-square error of
# the examples that stopped was within the tolerance on simulated networks (tests/exactness/test_adaptive.py).
_PRIOR = 4  # degrees of freedom that the error of independent draws counts for beside those found between blocks
_INFLATION = 16  # of independent draws' squared error, over their number
_SAME = 1e-20  # variance below which probabilities are the same but for rounding


class Stopping(NamedTuple):
    """When an example has draws enough: `standard_error` of all its classes within `tolerance`, or `most` draws."""

    tolerance: float
    most: int
    block: int  # draws that depend on one another

    @property
    def step(self) -> int:
        """Draws between two looks: whole blocks."""
        return _FEWEST if self.block == 1 else self.block


def check_stopping(tolerance: float, max_samples: int | None, num_samples: int, block: int) -> Stopping:
    """Return when to stop, with `max_samples` four times `num_samples` where it is not given, or raise."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise BadType(f"tolerance must be a number, got {type(tolerance).__name__}")
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise BadInput(
            f"tolerance must be a positive number, a standard error of probabilities as 0.01, got {tolerance}"
        )
    fewest = Stopping(tolerance, 0, block).step
    if max_samples is None:
        return Stopping(float(tolerance), max(fewest, 4 * num_samples), block)
    most = check_count(max_samples, "max_samples")
    if most < fewest:
        raise BadInput(f"max_samples must be at least {fewest}, the draws that an error is first told from, got {most}")
    return Stopping(float(tolerance), most, block)


def draw_until(forward: Forward, draw: Draw, stopping: Stopping, *, drop_rows: bool) -> Predictive:
    """Return a reduced predictive whose examples have as many draws each as the tolerance needs.

    An example's answer is made of its own first draws, and does not depend on the other examples. With `drop_rows`,
    rows that are done leave the batch when fewer than half of it are left.
    """
    stream = draw(forward, 0, stopping.most)
    chunk = _classes(next(stream))
    tally = _Tally.of(chunk, stopping.block)
    if not tally.varies:
        for _ in draw(forward, 0, tally.draws):  # all draws seen, a method may find that its masks reach nothing
            pass
    answers = _room_for(tally.moments, chunk.dtype)
    rows = torch.arange(forward.num_rows, device=answers.log_probs.device)
    open_rows = torch.ones_like(rows, dtype=torch.bool)
    while True:
        error = tally.squared_error()
        done = open_rows & (error.flatten(1).amax(1) <= stopping.tolerance**2)
        if tally.draws >= stopping.most:
            done = open_rows
        _write(answers, rows, done, tally, error)
        open_rows = open_rows & ~done
        left = int(open_rows.sum())
        if not left:
            weights = normalised_weights(None, stopping.most, answers.log_probs)
            return chunk._rebuild(answers.tensors(), weights, exact=False)
        if drop_rows and 2 * left < len(rows):
            rows, tally, forward = rows[open_rows], tally.rows(open_rows), forward.rows(open_rows.nonzero()[:, 0])
            open_rows = open_rows[open_rows]
            stream = draw(forward, tally.draws, stopping.most - tally.draws)
        try:
            tally.add(_classes(next(stream)))
        except BadInput as error:
            error.add_note(f"rows are counted among the {len(rows)} of the batch that were still being drawn")
            raise


class _Tally:
    """The draws so far of the rows of a batch, which all have the same number of them."""

    def __init__(self, moments: Moments, between: Tensor, draws: int, block: int) -> None:
        self.moments = moments  # with the variance of the draws, whatever their groups
        self.between = between  # the variance of the blocks' means
        self.draws, self.block = draws, block

    @classmethod
    def of(cls, chunk: PooledPredictive, block: int) -> "_Tally":
        moments = _ungrouped(chunk)
        between = moments.variance if block == 1 else torch.zeros_like(moments.variance)
        return cls(moments, between, chunk.num_samples, block)

    def add(self, chunk: PooledPredictive) -> None:
        """Add further draws: one block of them, or fewer at the end."""
        new = _Tally.of(chunk, self.block)
        self.draws += new.draws
        share = new.draws / self.draws
        apart = (self.moments.log_probs.exp() - new.moments.log_probs.exp()).square() * (share * (1 - share))
        self.between = (1 - share) * self.between + share * new.between + apart
        self.moments = merge_moments(self.moments, new.moments, share)

    def rows(self, index: Tensor) -> "_Tally":
        """Return the draws of some of the rows."""
        moments = Moments(*(tensor[index] for tensor in self.moments.tensors()))
        return _Tally(moments, self.between[index], self.draws, self.block)

    @property
    def varies(self) -> bool:
        """Whether any two draws differ at all."""
        variance = self.moments.variance
        return not variance.numel() or float(variance.max()) > _SAME

    def squared_error(self) -> Tensor:
        """Return the squared standard error of every class probability, `[n, ..., K]`.

        The error between blocks, of few degrees of freedom, is shrunk towards that of as many independent draws, which is
        an upper bound on average. Where draws are independent there is no such bound, and their own error is inflated.
        """
        independent = self.moments.variance / (self.draws - 1)
        if self.block == 1:
            return independent * (1 + _INFLATION / (self.draws - 1))
        freedom = -(-self.draws // self.block) - 1
        found = self.between / max(1, freedom)
        return (_PRIOR * independent + freedom * found) / (_PRIOR + freedom)


def _room_for(moments: Moments, dtype: torch.dtype) -> Moments:
    log_probs, information, variance = (torch.empty_like(tensor, dtype=dtype) for tensor in moments.tensors())
    used = torch.zeros(len(log_probs), dtype=torch.long, device=log_probs.device)
    return Moments(log_probs, information, variance, used)


def _write(answers: Moments, rows: Tensor, done: Tensor, tally: _Tally, error: Tensor) -> None:
    """Write the answers of the rows that are done, numbered among all examples by `rows`."""
    used = torch.full((len(done),), tally.draws, device=done.device)
    values = [tally.moments.log_probs, tally.moments.information, error, used]
    for answer, value in zip(answers.tensors(), values, strict=True):
        answer[rows[done]] = value[done].to(answer.dtype)


def _classes(predictive: Predictive) -> PooledPredictive:
    if not isinstance(predictive, PooledPredictive):
        raise BadInput(
            f"tolerance is a standard error of probabilities, and a {type(predictive).__name__} has none: the error of "
            "a number has the target's unit, and its quantiles need all draws; predict with num_samples= and look at "
            "standard_error"
        )
    return predictive


def _ungrouped(chunk: PooledPredictive) -> Moments:
    return chunk.with_groups(None)._wide_moments() if chunk.groups is not None else chunk._wide_moments()
