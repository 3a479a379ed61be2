"""Calibration of pooled class probabilities by an average over binnings: Bayesian binning into quantiles (BBQ)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayesguard.calibration.binning import edges_between
from bayesguard.calibration.class_maps import ClassMaps, step_values

_PRIOR_EXAMPLES = 2.0  # N' of the paper, spread over the bins of a binning
_RANGE = 10.0  # C of the paper: from the cube root of M divided by it to the cube root times it
_MOST_BINS = 200


class BBQ(ClassMaps):
    """Replace every probability by its rate in bins of equal mass, averaged over many numbers of bins by their evidence.

    A binning into B bins says that answers in bin b are true at a rate of their own, whose prior is
    Beta(2 m / B, 2 (1 - m) / B) with m the middle of the bin. The data then have the probability

        prod_b B(a_b + h_b, c_b + n_b - h_b) / B(a_b, c_b),    B the beta function,

    for h_b true of n_b answers, and the bin's rate is `(h_b + a_b) / (n_b + a_b + c_b)`. Binnings weigh as much as the
    data are probable under them; B runs over the whole numbers from a tenth of the cube root of the M examples to ten
    times that (at most 200), and binnings that ties make equal count once.

    Several classes: each class has an average of its own, one against the rest, and the K results are divided by their
    sum. `keep_labels=True` maps the confidence instead, and the most probable class stays the most probable; see
    `HistogramBinning`, also for yes or no and for several labels. As there, the uniform distribution is mixed in as one
    example of the M, and the map acts on the mixture: what the draws disagreed about is gone.

    Args:
        keep_labels: Whether the most probable class stays the most probable.

    Attributes:
        diagnostics: `nll_before` and `nll_after` (nats, mean), `num_examples`, `num_values` (steps of the map with the
            fewest), `num_one_sided` (maps that saw one outcome only).

    Raises:
        BadInput: In `fit` and the call: targets or classes that do not fit the predictions.
        BadType: Predictives of numbers.

    References:
        Naeini, Cooper, Hauskrecht, 2015, AAAI, equations 1 to 4, with its N' = 2 and C = 10.

    Examples:
        >>> from bayesguard.predictive import Predictive
        >>> generator = torch.Generator().manual_seed(0)
        >>> probs = torch.rand(4000, generator=generator)
        >>> answers = torch.rand(4000, generator=generator) < probs**2
        >>> bbq = BBQ().fit(Predictive.from_probs(probs), answers)
        >>> bool((bbq(Predictive.from_probs(probs)).probs - probs**2).abs().mean() < 0.05)
        True
    """

    def __init__(self, *, keep_labels: bool = False) -> None:
        super().__init__(keep_labels)

    def _fit_map(self, scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        root = len(scores) ** (1 / 3)
        most = min(math.ceil(_RANGE * root), _MOST_BINS)
        least = min(max(math.floor(root / _RANGE), 1), most)
        distinct, counts = scores.unique(return_counts=True)
        binnings: dict[tuple[float, ...], Tensor] = {}
        for bins in range(least, most + 1):
            edges = edges_between(distinct, counts, bins)
            binnings.setdefault(tuple(edges.tolist()), edges)
        ordered, order = scores.sort()
        hits_below = torch.cat([scores.new_zeros(1), hits[order].to(scores).cumsum(0)])
        rates, evidence = zip(*(binned(edges, ordered, hits_below) for edges in binnings.values()), strict=True)
        weights = torch.stack(evidence).softmax(0)
        points = torch.cat(list(binnings.values())).unique()
        # One step between two neighbouring edges of any binning; infinity stands for all above the last.
        ends = torch.cat([points, points.new_tensor([torch.inf])]).unsqueeze(-1)
        steps = [
            step_values(edges.unsqueeze(0), rate.unsqueeze(0), ends)[:, 0]
            for edges, rate in zip(binnings.values(), rates, strict=True)
        ]
        return points, weights @ torch.stack(steps)

    def _mapped(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        return step_values(self.points, self.values, scores)


def binned(edges: Tensor, ordered: Tensor, hits_below: Tensor) -> tuple[Tensor, Tensor]:
    """Return the posterior mean rate of each bin `[B]`, and the log marginal likelihood (nats) of the binning.

    Args:
        edges: Between the bins, `[B - 1]`, rising, each closing the bin below it.
        ordered: Rising probabilities, float64 `[M]`.
        hits_below: How many of the first 0, 1, ... M came true, `[M + 1]`.
    """
    count, bins = len(ordered), len(edges) + 1
    inner = torch.searchsorted(ordered, edges, right=True)
    ranks = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), count)])
    ends = torch.cat([edges.new_zeros(1), edges, edges.new_ones(1)])
    middle = ((ends[1:] + ends[:-1]) / 2).clamp(1e-12, 1 - 1e-12)
    true, false = _PRIOR_EXAMPLES / bins * middle, _PRIOR_EXAMPLES / bins * (1 - middle)
    hit = hits_below[ranks].diff()
    more_true, more_false = true + hit, false + (ranks.diff() - hit)
    evidence = (_log_beta(more_true, more_false) - _log_beta(true, false)).sum()
    return more_true / (more_true + more_false), evidence


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
