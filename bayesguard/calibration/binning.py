"""Calibration of pooled class probabilities by maps without a formula: histogram binning and isotonic regression."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bayesguard.calibration.class_maps import ClassMaps, step_values
from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive
from bayesguard.predictive.numerics import wide


class HistogramBinning(ClassMaps):
    """Replace every probability by how often answers with a probability in its bin came true.

    Several classes: each class has bins of its own, one against the rest, and the K results are divided by their sum.
    `keep_labels=True` bins the confidence instead, the probability of the most probable class (one map for all
    classes): the others keep the ratios among themselves, and the most probable class stays the most probable, which
    holds the confidence above that of the runner-up whatever the bin says. Yes or no: `[N]` has one map, `[N, ..., L]`
    one for each of the L labels of the last axis.

    The value of a bin with h of n answers true is `(h + m) / (n + 1)`: its mean prediction m (of an empty bin, its
    centre) counts as one example. Then the uniform distribution is mixed in as one example of the M that were fitted to,
    `(M v + 1/K) / (M + 1)`, so that a class without held-out examples keeps a probability above zero. (With
    `keep_labels=True` a class that the predictive rules out stays so.)

    The map acts on the mixture, and its answer has one draw: what the draws disagreed about is gone, the epistemic
    uncertainty is 0. The Monte-Carlo error of what came in is not carried over: `standard_error` is infinite, unless
    that was exact.

    Args:
        num_bins: The most bins a map may have; ties may leave fewer of equal mass.
        binning: "mass": about equally many examples a bin, cut by rank, equal probabilities never apart, edges midway
            between neighbours. "width": bin b is (b/B, (b+1)/B], and 0 belongs to the first.
        keep_labels: Whether the most probable class stays the most probable.

    Attributes:
        diagnostics: `nll_before` and `nll_after` (nats, mean), `num_examples`, `num_values` (bins of the map with the
            fewest), `num_one_sided` (maps that saw one outcome only).

    References:
        Zadrozny and Elkan, 2001, ICML; Guo, Pleiss, Sun, Weinberger, 2017, ICML, sections 4.1 and 4.2.

    Examples:
        >>> from bayesguard.predictive import Predictive
        >>> pred = Predictive.from_probs([0.8, 0.8, 0.8, 0.8, 0.3, 0.3])
        >>> binning = HistogramBinning(num_bins=2).fit(pred, torch.tensor([1, 1, 0, 0, 0, 1]))
        >>> binning(Predictive.from_probs([0.9, 0.1])).probs  # (2 + 0.8) / 5 and (1 + 0.3) / 3, mixed with 1/2
        tensor([0.5514, 0.4429])
    """

    def __init__(
        self, num_bins: int = 15, binning: Literal["mass", "width"] = "mass", *, keep_labels: bool = False
    ) -> None:
        super().__init__(keep_labels)
        self.num_bins = check_count(num_bins, "num_bins")
        if binning not in ("mass", "width"):
            raise BadInput(f"binning must be 'mass' or 'width', got {binning!r}")
        self.binning = binning

    def _fit_map(self, scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        if self.binning == "mass":
            edges = _equal_mass_edges(scores, self.num_bins)
        else:
            edges = torch.arange(1, self.num_bins, dtype=scores.dtype, device=scores.device) / self.num_bins
        place = torch.searchsorted(edges, scores)
        count, true, total = (
            scores.new_zeros(len(edges) + 1).index_add_(0, place, each.to(scores.dtype))
            for each in (torch.ones_like(scores), hits, scores)
        )
        ends = torch.cat([scores.new_zeros(1), edges, scores.new_ones(1)])
        prediction = torch.where(count > 0, total / count.clamp_min(1), (ends[1:] + ends[:-1]) / 2)
        return edges, (true + prediction) / (count + 1)

    def _problem(self, pred: CategoricalPredictive | BernoulliPredictive, targets: Tensor) -> tuple[Tensor, Tensor]:
        scores, hits = super()._problem(pred, targets)
        return (_off_edges(scores, self.num_bins, pred.dtype) if self.binning == "width" else scores), hits

    def _mapped(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        if self.binning == "width":
            scores = _off_edges(scores, self.num_bins, dtype)
        return step_values(self.points, self.values, scores)

    def extra_repr(self) -> str:
        return f"num_bins={self.num_bins}, binning={self.binning!r}, {super().extra_repr()}"


class IsotonicCalibration(ClassMaps):
    """Replace every probability by an increasing function of itself, fitted by least squares to what came true.

    The function is that of pool-adjacent-violators: constant on blocks, linear between them, and constant beyond the
    smallest and the largest probability that it was fitted to. Several classes: each class has a function of its own,
    one against the rest, and the K results are divided by their sum. `keep_labels=True` maps the confidence instead,
    the probability of the most probable class (one map for all classes): the others keep the ratios among themselves,
    and the most probable class stays the most probable, which holds the confidence above that of the runner-up whatever
    the map says. Yes or no: `[N]` has one map, `[N, ..., L]` one for each of the L labels of the last axis.

    The outermost blocks are usually 0 and 1. So that no answer is impossible or sure, the uniform distribution is mixed
    in as one example of the M that were fitted to: `(M v + 1/K) / (M + 1)`. (With `keep_labels=True` a class that the
    predictive rules out stays so.)

    The map acts on the mixture, and its answer has one draw: what the draws disagreed about is gone, the epistemic
    uncertainty is 0. The Monte-Carlo error of what came in is not carried over: `standard_error` is infinite, unless
    that was exact.

    Args:
        keep_labels: Whether the most probable class stays the most probable.

    Attributes:
        diagnostics: `nll_before` and `nll_after` (nats, mean), `num_examples`, `num_values` (points of the map with the
            fewest), `num_one_sided` (maps that saw one outcome only).

    References:
        Zadrozny and Elkan, 2002, KDD (section 4: several classes).

    Examples:
        >>> from bayesguard.predictive import Predictive
        >>> pred = Predictive.from_probs([0.1, 0.2, 0.6, 0.7, 0.9])
        >>> isotonic = IsotonicCalibration().fit(pred, torch.tensor([0, 1, 0, 1, 1]))
        >>> isotonic(pred).probs  # 0, 1/2, 1/2, 1, 1, mixed with 1/2
        tensor([0.0833, 0.5000, 0.5000, 0.9167, 0.9167])
    """

    def __init__(self, *, keep_labels: bool = False) -> None:
        super().__init__(keep_labels)

    def _fit_map(self, scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(out_of_bounds="clip").fit(scores.cpu().numpy(), hits.cpu().double().numpy())
        points, values = (torch.from_numpy(each).to(scores) for each in (fitted.X_thresholds_, fitted.y_thresholds_))
        # One point is not enough to interpolate between: equal scores, one value.
        return (points, values) if len(points) > 1 else (torch.cat([points, points + 1]), values.repeat(2))

    def _mapped(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        points, values, rows = self.points.to(scores), self.values.to(scores), scores.T.contiguous()
        place = (torch.searchsorted(points, rows, right=True) - 1).clamp(0, points.shape[1] - 2)
        left, right = points.gather(1, place), points.gather(1, place + 1)
        share = ((rows - left) / (right - left)).clamp(0, 1)  # 0 where the next point is infinity
        return torch.lerp(values.gather(1, place), values.gather(1, place + 1), share).T


def _equal_mass_edges(scores: Tensor, num_bins: int) -> Tensor:
    distinct, counts = scores.unique(return_counts=True)
    return edges_between(distinct, counts, num_bins)


def edges_between(distinct: Tensor, counts: Tensor, num_bins: int) -> Tensor:
    """Edges of bins of about equally many scores, rising with their counts; equal ones go where the middle one goes."""
    middle_rank = counts.cumsum(0) - counts.to(distinct) / 2
    bins = (middle_rank * num_bins / counts.sum()).floor()
    last = bins[1:] != bins[:-1]
    below, above = distinct[:-1][last], distinct[1:][last]
    middle = below + (above - below) / 2
    return torch.where(middle < above, middle, below)  # between neighbouring floats there is no middle


def _off_edges(scores: Tensor, num_bins: int, dtype: torch.dtype) -> Tensor:
    """Scores in float64, exactly on an edge b/B where only the rounding of `dtype` keeps them from it.

    A probability of 3/10 may come out of its logarithm above that, and would miss the bin that it closes.
    """
    values = wide(scores)
    edge = (values * num_bins).round() / num_bins
    return torch.where((values - edge).abs() <= 8 * torch.finfo(dtype).eps, edge, values)
