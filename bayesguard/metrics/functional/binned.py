"""The one accumulator behind every binned metric: sums by bin that merge exactly."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.metrics.functional.inputs import cached_slices, group_sums
from bayesguard.predictive.numerics import CACHED

Norm = Literal["l1", "l2", "max"]
Binning = Literal["width", "mass"]


@dataclass(frozen=True)
class BinnedSums:
    """Sums over the scores that fall into each bin, `[B]`, or `[K, B]` for K classes; `a + b` merges two.

    Attributes:
        count: Number of scores, int64; their weight, float64, where there are weights.
        score: Sum of the scores, float64, as all below.
        hits: Sum of the outcomes.
        score_squared: Sum of the squared scores.
        score_hits: Sum of the scores whose outcome came true.
    """

    count: Tensor
    score: Tensor
    hits: Tensor
    score_squared: Tensor
    score_hits: Tensor

    def __add__(self, other: "BinnedSums") -> "BinnedSums":
        return BinnedSums(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the sums in the order of the attributes, to be stored or sent."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def of(
        cls, scores: Tensor, outcomes: Tensor, index: Tensor, num_bins: int, weights: Tensor | None = None
    ) -> "BinnedSums":
        """Sum scores and 0/1 outcomes `[M]` by the bins `index` `[M]`, with weights `[M]` if given."""
        count = index.new_zeros(num_bins) if weights is None else weights.new_zeros(num_bins)
        sums = torch.zeros(4, num_bins, dtype=torch.float64, device=scores.device)
        for part in cached_slices(scores.unsqueeze(-1), copies=4):
            at, score, hit = index[part], scores[part].double(), outcomes[part].double()
            parts: tuple[Tensor, ...] = (score, hit, score.square(), score * hit)
            if weights is None:
                count += torch.bincount(at, minlength=num_bins)
            else:
                count += group_sums(at, weights[part], num_bins)
                parts = tuple(weights[part] * values for values in parts)
            sums += torch.stack([group_sums(at, values, num_bins) for values in parts])
        return cls(count, *sums)

    @classmethod
    def of_classes(cls, probs: Tensor, labels: Tensor, num_bins: int, weights: Tensor | None = None) -> "BinnedSums":
        """Sum the probabilities `[M, K]` of every class by itself over equal-width bins, `[K, B]`.

        A row that sums to 1 has fewer than B scores above 1/B. Those few are binned one by one; all others are in the
        first bin, whose sums are those of whole columns. The outcome of all but one score of a row is 0.
        """
        rows, classes = probs.shape
        if not rows:
            raise BadInput("probs has no rows; a metric needs at least one")
        edge = _edges(num_bins, probs)[:1]
        high = torch.cat([edge, edge.new_ones(1)])[0]  # of the first bin; there is no edge if it is the only one
        share = probs.new_ones(rows, dtype=torch.float64) if weights is None else weights
        first = share.new_zeros(2, classes)
        above = []
        for part in cached_slices(probs, copies=4):
            scores = probs[part].detach().to(torch.float64, copy=True).contiguous()
            flat = _places(scores > high)
            picked = scores.view(-1)[flat]
            above.append((flat // classes + part.start, flat % classes, picked))
            scores.view(-1).index_fill_(0, flat, 0.0)
            first[0] += _weighted(scores, weights, part)
            first[1] += _weighted(scores.square_(), weights, part)
        row, column, score = (torch.cat(parts) for parts in zip(*above, strict=True))
        index = column * num_bins + bin_index(score.to(probs.dtype), num_bins, "width")

        def summed(values: Tensor, at: Tensor) -> Tensor:
            return group_sums(at, values, classes * num_bins).reshape(classes, num_bins)

        weight = share[row]
        count = summed(weight, index)
        count[:, 0] = share.sum() - count[:, 1:].sum(-1)
        total, squares = summed(weight * score, index), summed(weight * score.square(), index)
        total[:, 0], squares[:, 0] = first[0], first[1]
        chosen = probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        place = labels * num_bins + bin_index(chosen, num_bins, "width")
        hits, score_hits = summed(share, place), summed(share * chosen.double(), place)
        return cls(count.round().long() if weights is None else count, total, hits, squares, score_hits)

    def error(self, norm: Norm = "l1", *, debiased: bool = False) -> Tensor:
        """Return the calibration error, 0-d float64; of classes, their mean, root mean square or largest."""
        return calibration_error(self.count, self.score, self.hits, norm, debiased)


def calibration_error(count: Tensor, score: Tensor, hits: Tensor, norm: Norm, debiased: bool = False) -> Tensor:
    """Return the error of sums `[B]` or `[K, B]`: share-weighted mean gap, its root mean square, or the largest."""
    count = count.double()
    filled = count.where(count > 0, 1.0)
    gap = ((score - hits) / filled).abs()
    share = count / count.sum(-1, keepdim=True)
    if norm == "l1":
        return (share * gap).sum(-1).mean()
    if norm == "max":
        return gap.where(count > 0, 0.0).amax()
    squares = gap.square()
    if debiased:
        rate = hits / filled
        # One score in a bin says nothing about its own error: such a bin counts as calibrated.
        squares = (squares - rate * (1 - rate) / (count - 1).where(count > 1, 1.0)).where(count > 1, 0.0)
    return (share * squares).sum(-1).mean().clamp_min(0).sqrt()


def check_settings(num_bins: int, binning: str, norm: str, debiased: bool) -> None:
    """Raise BadInput for settings that have no meaning."""
    check_count(num_bins, "num_bins")
    if binning not in ("width", "mass"):
        raise BadInput(f"binning must be 'width' or 'mass', got {binning!r}")
    if norm not in ("l1", "l2", "max"):
        raise BadInput(f"norm must be 'l1', 'l2' or 'max', got {norm!r}")
    if debiased and norm != "l2":
        raise BadInput(f"debiased=True is known for norm='l2' only, got norm={norm!r}")


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


def _places(mask: Tensor) -> Tensor:
    """Return the flat indices of True."""
    if mask.device.type == "cpu":
        # NumPy skips the False eight at a time.
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(-1)


def _weighted(scores: Tensor, weights: Tensor | None, rows: slice) -> Tensor:
    return scores.sum(0) if weights is None else weights[rows] @ scores


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
