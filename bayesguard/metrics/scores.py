"""What a metric keeps of the examples, so that they can be weighted anew: many weightings in one pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesguard.metrics.functional.inputs import group_sums
from bayesguard.predictive.numerics import BUDGET, CACHED, slices

NUM_BINS = 15


class Scores(ABC):
    """What a metric keeps of N examples, float64, so that they can be weighted anew."""

    @abstractmethod
    def resample(self, weights: Tensor) -> Tensor:
        """Return the metric for each row of example weights `[R, N]` (counts), float64 `[R]`.

        NaN where the metric has no value: no weight at all, or nothing but right answers to rank.
        """

    def signed_gaps(self, weights: Tensor) -> Tensor | None:
        """Return gaps `[R, M]` whose absolute values add up to the metric, None if it is no such sum."""
        return None

    @property
    @abstractmethod
    def rows(self) -> Tensor:
        """A tensor that is kept, `[N, ...]`: it tells N and the device."""

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.rows)

    def value(self) -> float:
        """Return the metric of the examples as they are."""
        return self.resample(self.rows.new_ones(1, self.num_examples, dtype=torch.float64)).item()


@dataclass
class Mean(Scores):
    """A mean of per-example values `[N]`, or `root` of it."""

    values: Tensor
    root: bool = False

    @property
    def rows(self) -> Tensor:
        return self.values

    def resample(self, weights: Tensor) -> Tensor:
        weights = weights.to(self.values)
        # An example without weight adds nothing, even where its value is infinite.
        finite = self.values.isfinite()
        total = weights @ self.values.where(finite, 0.0)
        if not bool(finite.all()):
            total = total.masked_fill((weights[:, ~finite] > 0).any(-1), torch.inf)
        mean = total / weights.sum(-1)
        return mean.sqrt() if self.root else mean


@dataclass
class Binned(Scores):
    """A calibration error (l1) over `NUM_BINS` bins: gaps `score - outcome` and their bins, both `[N, L, columns]`.

    Columns are binned each by itself, and their errors averaged.
    """

    gaps: Tensor
    index: Tensor

    @property
    def rows(self) -> Tensor:
        return self.gaps

    def resample(self, weights: Tensor) -> Tensor:
        weights = weights.to(self.gaps)
        _, elements, columns = self.gaps.shape
        step = max(1, BUDGET // (self.num_examples * NUM_BINS))
        total = weights.new_zeros(len(weights))
        for start in range(0, columns, step):
            # The share of a bin times its gap is its summed gap over all weight: no counts are needed.
            total += self._sums(weights, slice(start, start + step)).abs().sum(-1)
        return total / (weights.sum(-1) * elements * columns)

    def signed_gaps(self, weights: Tensor) -> Tensor | None:
        _, elements, columns = self.gaps.shape
        if columns > 1:  # too many to be kept for every resample
            return None
        weights = weights.to(self.gaps)
        return self._sums(weights, slice(None)) / (weights.sum(-1, keepdim=True) * elements)

    def _sums(self, weights: Tensor, columns: slice) -> Tensor:
        """Return the gaps of all examples summed by column and bin, for each row of weights, `[R, columns * B]`."""
        parts = [
            weights[:, rows] @ self._by_row(columns, rows)
            for rows in slices(self.num_examples, NUM_BINS * BUDGET // CACHED)
        ]
        return torch.stack(parts).sum(0)

    def _by_row(self, columns: slice, examples: slice) -> Tensor:
        """Return the gaps of every example summed by column and bin, `[n, columns * B]`."""
        gaps, index = self.gaps[examples, :, columns], self.index[examples, :, columns]
        rows, _, width = gaps.shape
        bins = width * NUM_BINS
        column = torch.arange(width, device=gaps.device) * NUM_BINS
        key = index + column + torch.arange(rows, device=gaps.device).reshape(-1, 1, 1) * bins
        return group_sums(key.flatten(), gaps.flatten(), rows * bins).reshape(rows, bins)


@dataclass
class Pairs(Scores):
    """A metric of two values of every element, both `[N, L]`, by a function of both and of their weights.

    Attributes:
        first, second: Confidences and losses, or scores and outcomes.
        function: Takes both `[M]` and weights `[R, M]`, returns `[R]`.
    """

    first: Tensor
    second: Tensor
    function: Callable[[Tensor, Tensor, Tensor], Tensor]

    @property
    def rows(self) -> Tensor:
        return self.first

    def resample(self, weights: Tensor) -> Tensor:
        width = self.first.shape[1]
        first, second = self.first.flatten(), self.second.flatten()
        parts = [
            self.function(first, second, part.to(second).repeat_interleave(width, dim=1))
            for part in weights.split(max(1, BUDGET // len(first)))
        ]
        return torch.cat(parts)


@dataclass
class Levels(Scores):
    """Quantile calibration: for each example and level the share of its targets at or below the quantile `[N, L]`."""

    below: Tensor
    levels: Tensor

    @property
    def rows(self) -> Tensor:
        return self.below

    def resample(self, weights: Tensor) -> Tensor:
        return self.signed_gaps(weights).abs().sum(-1)

    def signed_gaps(self, weights: Tensor) -> Tensor:
        weights = weights.to(self.below)
        return (weights @ self.below / weights.sum(-1, keepdim=True) - self.levels) / len(self.levels)
