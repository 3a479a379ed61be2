"""What a metric keeps of the examples, so that they can be weighted anew: many weightings in one pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesguard.metrics.functional.inputs import group_sums
from bayesguard.predictive.numerics import BUDGET, CACHED, slices

NUM_BINS = 15
# Numbers that `Together` keeps for all metrics: 256 MB.
_KEPT = 1 << 25


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

    def columns(self) -> Tensor | None:
        """Return columns `[C, N]` whose weighted sums are all that the metric needs, None if there are no such."""
        return None

    def from_sums(self, sums: Tensor, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the metric `[R]` and its signed gaps from weighted sums of `columns()` `[R, C]` and of weights `[R]`."""
        raise NotImplementedError

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
        # Expanded, so that a million ones take no memory.
        return self.resample(self.rows.new_ones(1, 1, dtype=torch.float64).expand(1, self.num_examples)).item()


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
        return self.from_sums(weights @ self.columns().T, weights.sum(-1))[0]

    def value(self) -> float:
        columns = self.columns()
        count = columns.new_full((1,), columns.shape[1])
        return self.from_sums(columns.sum(-1).unsqueeze(0), count)[0].item()

    def columns(self) -> Tensor:
        # An example without weight adds nothing, even where its value is infinite.
        if bool(self.values.sum().isfinite()):  # of each by itself, the test would take a copy
            return self.values.unsqueeze(0)
        finite = self.values.isfinite()
        return torch.stack([self.values.where(finite, 0.0), (~finite).to(self.values)])

    def from_sums(self, sums: Tensor, total: Tensor) -> tuple[Tensor, None]:
        mean = sums[:, 0] / total
        if sums.shape[1] > 1:  # with how many of the values were infinite
            mean = mean.masked_fill(sums[:, 1] > 0, torch.inf)
        return (mean.sqrt() if self.root else mean), None


@dataclass
class Binned(Scores):
    """A calibration error (l1) over `NUM_BINS` bins: gaps `score - outcome` and their bins, both `[N, L, columns]`.

    Bins are uint8, which millions of rows are kept in for less. Columns are binned each by itself, and their errors averaged.
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
        columns = self.gaps.shape[2]
        if columns > 1:  # too many to be kept for every resample
            return None
        weights = weights.to(self.gaps)
        return self.from_sums(self._sums(weights, slice(None)), weights.sum(-1))[1]

    def columns(self) -> Tensor | None:
        return self._by_row(slice(None), slice(None)) if self.gaps.shape[2] == 1 else None

    def from_sums(self, sums: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        signed = sums / (total.unsqueeze(-1) * self.gaps.shape[1])
        return signed.abs().sum(-1), signed

    def _sums(self, weights: Tensor, columns: slice) -> Tensor:
        """Return the gaps of all examples summed by column and bin, for each row of weights, `[R, columns * B]`."""
        parts = [
            weights[:, rows] @ self._by_row(columns, rows).T
            for rows in slices(self.num_examples, NUM_BINS * BUDGET // CACHED)
        ]
        return torch.stack(parts).sum(0)

    def _by_row(self, columns: slice, examples: slice) -> Tensor:
        """Return the gaps of every example summed by column and bin, `[columns * B, n]`."""
        gaps, index = self.gaps[examples, :, columns], self.index[examples, :, columns]
        rows, _, width = gaps.shape
        bins = index + torch.arange(width, device=gaps.device) * NUM_BINS
        key = bins * rows + torch.arange(rows, device=gaps.device).reshape(-1, 1, 1)
        groups = width * NUM_BINS
        return group_sums(key.flatten(), gaps.flatten(), groups * rows).reshape(groups, rows)


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
        return self.from_sums(weights @ self.below, weights.sum(-1))[1]

    def columns(self) -> Tensor:
        return self.below.T

    def from_sums(self, sums: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        signed = (sums / total.unsqueeze(-1) - self.levels) / len(self.levels)
        return signed.abs().sum(-1), signed


class Together:
    """Metrics of the same examples, weighted anew: weighted sums that any of them needs come from one product.

    Args:
        scores: What each metric keeps of the examples.
    """

    def __init__(self, scores: Sequence[Scores]) -> None:
        self.scores = scores
        kept: dict[int, Tensor] = {}
        width = 0
        for place, own in enumerate(scores):
            columns = own.columns()
            if columns is not None and (width + len(columns)) * own.num_examples <= _KEPT:
                kept[place] = columns
                width += len(columns)
        self._widths = {place: len(columns) for place, columns in kept.items()}
        self._columns = torch.cat(list(kept.values())) if kept else None

    def resample(self, weights: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Return each metric for each row of weights `[R, N]`, and its signed gaps (see `Scores`)."""
        found: dict[int, tuple[Tensor, Tensor | None]] = {}
        if self._columns is not None:
            weights = weights.to(self._columns)
            total, sums = weights.sum(-1), weights @ self._columns.T
            parts = sums.split(list(self._widths.values()), dim=-1)
            for place, part in zip(self._widths, parts, strict=True):
                found[place] = self.scores[place].from_sums(part, total)
        return [found[place] if place in found else _alone(own, weights) for place, own in enumerate(self.scores)]


def _alone(scores: Scores, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    signed = scores.signed_gaps(weights)
    return (scores.resample(weights) if signed is None else signed.abs().sum(-1)), signed
