"""The one accumulator behind every binned metric: sums by bin that merge exactly."""

import math
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.metrics.functional.inputs import cached_slices, group_sums
from bayesguard.predictive.numerics import CACHED, slices

Norm = Literal["l1", "l2", "max"]
Binning = Literal["width", "mass"]

# Effective sizes of equal weights are whole numbers up to this.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class BinnedSums:
    """Sums over the scores that fall into each bin, hits and misses apart, `[2, B]`; `a + b` merges two.

    Classes come first: sums of K of them are `[K, 2, B]`. Hits and misses are kept apart, and squares of weights beside
    the weights, because with them the sums can be drawn anew (`resampled`) as if from the rows.

    Attributes:
        rows: Number of scores whose outcome is 0 and 1, int64 `[..., 2, B]`.
        sums: Sums of w, w s, w s², w², w² s and w² s², float64 `[6, ..., 2, B]`, for scores s of weight w (1 if none).
    """

    rows: Tensor
    sums: Tensor

    def __add__(self, other: "BinnedSums") -> "BinnedSums":
        return BinnedSums(self.rows + other.rows, self.sums + other.sums)

    @property
    def count(self) -> Tensor:
        """Weight of the scores in each bin, `[..., B]`: their number where there are no weights."""
        return self.sums[0].sum(-2)

    @property
    def effective_count(self) -> Tensor:
        """Kish's effective number of scores in each bin, `[..., B]`; 0 of none."""
        squares = self.sums[3].sum(-2)
        return self.count.square() / squares.where(squares > 0, 1.0)

    @property
    def score(self) -> Tensor:
        """Sum of the scores."""
        return self.sums[1].sum(-2)

    @property
    def hits(self) -> Tensor:
        """Sum of the outcomes."""
        return self.sums[0][..., 1, :]

    @property
    def score_squared(self) -> Tensor:
        """Sum of the squared scores."""
        return self.sums[2].sum(-2)

    @property
    def score_hits(self) -> Tensor:
        """Sum of the scores whose outcome came true."""
        return self.sums[1][..., 1, :]

    @classmethod
    def empty(cls, *shape: int) -> "BinnedSums":
        """Return sums of nothing, `shape` being B or K, B, on the CPU."""
        cells = (*shape[:-1], 2, shape[-1])
        return cls(
            torch.zeros(cells, dtype=torch.int64, device="cpu"),
            torch.zeros(6, *cells, dtype=torch.float64, device="cpu"),
        )

    @classmethod
    def of(
        cls, scores: Tensor, outcomes: Tensor, index: Tensor, num_bins: int, weights: Tensor | None = None
    ) -> "BinnedSums":
        """Sum scores and 0/1 outcomes `[M]` by the bins `index` `[M]`, with weights `[M]` if given."""
        cells = 2 * num_bins
        rows = index.new_zeros(cells)
        sums = torch.zeros(2 if weights is None else 6, cells, dtype=torch.float64, device=scores.device)
        for part in cached_slices(scores.unsqueeze(-1), copies=4):
            at, score = index[part] + num_bins * outcomes[part].long(), scores[part].double()
            rows += torch.bincount(at, minlength=cells)
            values: tuple[Tensor, ...] = (score, score.square())
            if weights is not None:
                weight = weights[part]
                values = tuple(w * v for w in (weight, weight.square()) for v in (torch.ones_like(score), *values))
            sums += torch.stack([group_sums(at, value, cells) for value in values])
        if weights is None:
            sums = torch.cat([rows.unsqueeze(0).double(), sums]).repeat(2, 1)
        return cls(rows.reshape(2, num_bins), sums.reshape(6, 2, num_bins))

    @classmethod
    def of_classes(cls, probs: Tensor, labels: Tensor, num_bins: int, weights: Tensor | None = None) -> "BinnedSums":
        """Sum the probabilities `[M, K]` of every class by itself over equal-width bins, `[K, 2, B]`.

        A row that sums to 1 has fewer than B scores above 1/B. Those few are binned one by one; all others are in the
        first bin, whose sums are those of whole columns. The outcome of all but one score of a row is 0.
        """
        if not len(probs):
            raise BadInput("probs has no rows; a metric needs at least one")
        # Of a row of nearly equal probabilities all may be above the first bin, and are kept with their places.
        parts = slices(len(probs), 32 * min(probs.shape[1], num_bins))
        return reduce(
            add,
            (
                cls._of_classes(probs[part], labels[part], num_bins, None if weights is None else weights[part])
                for part in parts
            ),
        )

    @classmethod
    def _of_classes(cls, probs: Tensor, labels: Tensor, num_bins: int, weights: Tensor | None) -> "BinnedSums":
        count, classes = probs.shape
        edge = _edges(num_bins, probs)[:1]
        high = torch.cat([edge, edge.new_ones(1)])[0]  # of the first bin; there is no edge if it is the only one
        powers = probs.new_ones(1, count, dtype=torch.float64)
        if weights is not None:
            powers = torch.stack([weights, weights.square()])
        first = powers.new_zeros(2, len(powers), classes)
        above = []
        for part in cached_slices(probs, copies=4):
            scores = probs[part].detach().to(torch.float64, copy=True).contiguous()
            flat = _places(scores > high)
            picked = scores.view(-1)[flat]
            above.append((flat // classes + part.start, flat % classes, picked))
            scores.view(-1).index_fill_(0, flat, 0.0)
            first[0] += scores.sum(0) if weights is None else powers[:, part] @ scores
            first[1] += scores.square_().sum(0) if weights is None else powers[:, part] @ scores.square_()
        row, column, score = (torch.cat(parts) for parts in zip(*above, strict=True))
        index = column * num_bins + bin_index(score.to(probs.dtype), num_bins, "width")
        chosen = probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        place = labels * num_bins + bin_index(chosen, num_bins, "width")

        def cells(every: Tensor, hit: Tensor, whole: Tensor) -> Tensor:
            """Sum scores above the first bin and those of the labels; `whole` is what the first bin holds, or all."""
            found = group_sums(index, every, classes * num_bins).reshape(classes, num_bins)
            hits = group_sums(place, hit, classes * num_bins).reshape(classes, num_bins)
            found[:, 0] = whole if whole.dim() else whole - found[:, 1:].sum(-1)
            return torch.stack([found - hits, hits], -2)

        chosen, sums = chosen.double(), []
        for weight, low in zip(powers, first.unbind(1), strict=True):
            at = weight[row]
            sums += [
                cells(at, weight, weight.sum()),
                cells(at * score, weight * chosen, low[0]),
                cells(at * score.square(), weight * chosen.square(), low[1]),
            ]
        if weights is None:
            return cls(sums[0].round().long(), torch.stack(sums * 2))
        ones = torch.ones_like(weights)
        return cls(cells(ones[row], ones, ones.sum()).round().long(), torch.stack(sums))

    def errors(self, norm: Norm = "l1", *, debiased: bool = False) -> Tensor:
        """Return the calibration error of each set of bins, `[...]`, float64; of "l2" its square, not clamped at 0."""
        count, size = self.count, self.effective_count
        filled = count.where(count > 0, 1.0)
        gap, rate = ((self.score - self.hits) / filled).abs(), self.hits / filled
        if norm == "max":
            return gap.where(count > 0, 0.0).amax(-1)
        values = gap if norm == "l1" else gap.square()
        if debiased:
            # One score in a bin says nothing about its own error: such a bin counts as calibrated.
            several = size > 1 + _ROUNDING
            variance = rate * (1 - rate) / (size - 1).where(several, 1.0)
            values = 2 * gap - _mean_distance(gap, variance) if norm == "l1" else values - variance
            values = values.where(several, 0.0)
        return (count / count.sum(-1, keepdim=True) * values).sum(-1)

    def error(self, norm: Norm = "l1", *, debiased: bool = False) -> Tensor:
        """Return the calibration error, 0-d float64; of classes, their mean, root mean square or largest."""
        values = self.errors(norm, debiased=debiased)
        if norm == "max":
            return values.amax()
        value = values.mean().clamp_min(0)
        return value.sqrt() if norm == "l2" else value


def _mean_distance(gap: Tensor, variance: Tensor) -> Tensor:
    """Return the mean of |gap + noise| over normal noise of mean 0."""
    spread = variance.sqrt()
    ratio = gap / spread.where(spread > 0, 1.0)
    noisy = spread * (2 / math.pi) ** 0.5 * (-ratio.square() / 2).exp() + gap * (ratio / 2**0.5).erf()
    return noisy.where(spread > 0, gap)


def check_settings(num_bins: int, binning: str, norm: str, debiased: bool) -> None:
    """Raise BadInput for settings that have no meaning."""
    check_count(num_bins, "num_bins")
    if binning not in ("width", "mass"):
        raise BadInput(f"binning must be 'width' or 'mass', got {binning!r}")
    if norm not in ("l1", "l2", "max"):
        raise BadInput(f"norm must be 'l1', 'l2' or 'max', got {norm!r}")
    if debiased and norm == "max":
        raise BadInput("debiased=True is known for norm='l1' and 'l2', got norm='max'")


def bin_index(scores: Tensor, num_bins: int, binning: Binning, weights: Tensor | None = None) -> Tensor:
    """Return the bin of every score in [0, 1], `[M]`.

    Width: bin b is (b/B, (b+1)/B], and 0 belongs to the first. Mass: cut by rank; equal scores are never split, they
    all go where the first of them goes.
    """
    if binning == "width":
        return _width_index(scores, num_bins)
    _, group, sizes = scores.unique(return_inverse=True, return_counts=True)
    if weights is not None:
        sizes = group_sums(group, weights, len(sizes))
    first_rank = sizes.cumsum(0) - sizes
    bins = (first_rank * num_bins).div(sizes.sum(), rounding_mode="floor").long()
    return bins.clamp_max(num_bins - 1)[group]


def _edges(num_bins: int, scores: Tensor) -> Tensor:
    """Return the B - 1 inner edges, float64, rounded like the scores."""
    # Edges are i/B, never a running sum, and rounded like the scores: float32 0.3 lies on the edge 3/10.
    edges = torch.arange(1, num_bins, dtype=torch.float64, device=scores.device) / num_bins
    return edges.to(scores.dtype).double()


def _width_index(scores: Tensor, num_bins: int) -> Tensor:
    if num_bins * torch.finfo(scores.dtype).eps > 0.1:  # edges closer together than the scores can be
        return torch.searchsorted(_edges(num_bins, scores), scores.detach().double().contiguous())
    parts = scores.detach().flatten().split(CACHED // 4)
    return torch.cat([_near_index(part, num_bins) for part in parts]).reshape(scores.shape)


def _near_index(scores: Tensor, num_bins: int) -> Tensor:
    # Multiplying finds the bin or the one beside it, for less than a search; comparing with its two edges tells which.
    values = scores.double()
    guess = (values * num_bins).ceil_().sub_(1).clamp_(0, num_bins - 1)
    lower = (guess / num_bins).to(scores.dtype).double()
    upper = (guess + 1).div_(num_bins).to(scores.dtype).double()
    return guess.sub_((values <= lower).double()).add_((values > upper).double()).clamp_(0, num_bins - 1).long()


@dataclass(frozen=True)
class ReliabilityBins:
    """What a reliability diagram shows, one element a bin, float64; empty bins have NaN where there is nothing to say.

    Attributes:
        lower, upper: Edges of equal-width bins; smallest and largest score of equal-mass ones.
        count: Scores in the bin, or their weight.
        confidence: Their mean.
        accuracy: Share of outcomes that came true.
        accuracy_lower, accuracy_upper: Wilson's interval of that share.
    """

    lower: Tensor
    upper: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor
    accuracy_lower: Tensor
    accuracy_upper: Tensor

    @property
    def num_filled(self) -> int:
        """The effective number of bins: those that hold scores. Ties leave some bins of equal mass empty."""
        return int((self.count > 0).sum())


def wilson_interval(hits: Tensor, count: Tensor, confidence_level: float) -> tuple[Tensor, Tensor]:
    """Return Wilson's interval of a share; NaN where nothing was counted.

    References:
        E. Wilson (1927). Probable inference, the law of succession, and statistical inference. JASA.
    """
    z = torch.special.ndtri(torch.tensor(0.5 + confidence_level / 2, dtype=torch.float64, device=hits.device))
    rate = hits / count
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (rate * (1 - rate) / count + z**2 / (4 * count**2)).sqrt()
    return (centre - half).clamp_min(0), (centre + half).clamp_max(1)


def reliability_of(sums: BinnedSums, lower: Tensor, upper: Tensor, confidence_level: float) -> ReliabilityBins:
    """Return the reliability bins of sums `[2, B]` between edges `[B]`; the intervals are of the effective counts."""
    count, size = sums.count, sums.effective_count
    rate = sums.hits / count
    return ReliabilityBins(
        lower, upper, count, sums.score / count, rate, *wilson_interval(rate * size, size, confidence_level)
    )


def _places(mask: Tensor) -> Tensor:
    """Return the flat indices of True."""
    if mask.device.type == "cpu":
        # NumPy skips the False eight at a time.
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(-1)
