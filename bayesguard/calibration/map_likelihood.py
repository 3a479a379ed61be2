"""The pooled likelihood of a linear map of the logits of K classes, with its gradient and its curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.calibration.fitted import Features
from bayesguard.calibration.likelihood import picked
from bayesguard.predictive.numerics import BUDGET, CACHED, slices

_KEPT = 8  # times BUDGET: of so many numbers float64 copies are kept

Part = tuple[Tensor, Tensor, Tensor]  # features, masks and labels of some examples
Curved = tuple[Tensor, Tensor, Tensor, Tensor]  # features, probabilities, shares of the draws and labels


def mapped(features: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    """Return `A x + b` for a matrix A `[K, K]`, or a diagonal `[K]`."""
    return (features * factors if factors.dim() == 1 else features @ factors.T) + bias


class MapLikelihood:
    """Mean of `-log sum_s w_s softmax(A x_s + b)[y]` over N examples, in float64, as a function of A and b.

    Args:
        logits: Log-probabilities of every draw, `[S, N, K]`; -inf masks a class.
        labels: `[N]`.
        weights: Of the draws, positive, `[S]`.
        features: Makes x from logits.
    """

    def __init__(self, logits: Tensor, labels: Tensor, weights: Tensor, features: Features) -> None:
        self.logits, self.labels, self.weights, self.features = logits, labels, weights, features
        self.num_classes = logits.shape[-1]
        self.counts = labels.bincount(minlength=self.num_classes)
        self._kept = list(self._made()) if logits.numel() <= _KEPT * BUDGET else None

    def select(self, rows: Tensor) -> MapLikelihood:
        """Return the same of some of the examples."""
        return MapLikelihood(self.logits[:, rows], self.labels[rows], self.weights, self.features)

    def _made(self) -> Iterator[Part]:
        for rows in slices(len(self.labels), self.logits[:, :1].numel() * BUDGET // CACHED):
            part = self.logits[:, rows]
            yield self.features(part), part == -torch.inf, self.labels[rows]

    def _parts(self) -> Iterator[Part]:
        yield from self._made() if self._kept is None else self._kept

    def nll_of_rows(self, factors: Tensor, bias: Tensor) -> Tensor:
        """Return the NLL of every example, `[N]`."""
        return torch.cat([-self._shares(part, factors, bias)[0] for part in self._parts()])

    def nll(self, factors: Tensor, bias: Tensor) -> float:
        """Return the mean NLL."""
        return float(self.nll_of_rows(factors, bias).mean())

    def errors(self, factors: Tensor, bias: Tensor) -> Tensor:
        """Return for every class the mean distance between its pooled probability and 1 or 0, what it was, `[K]`."""
        total = torch.zeros_like(bias)
        for part in self._parts():
            probs = torch.tensordot(self.weights, self._shares(part, factors, bias)[2].exp_(), dims=1)
            total += (probs - F.one_hot(part[2], self.num_classes)).abs().sum(0)
        return total / len(self.labels)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the pooled means of x xᵀ `[K, K]` and of x `[K]`."""
        square = self.weights.new_zeros(self.num_classes, self.num_classes)
        mean = self.weights.new_zeros(self.num_classes)
        for features, _, _ in self._parts():
            flat = (features * self.weights.sqrt()[:, None, None]).flatten(0, 1)
            square += flat.T @ flat
            mean += torch.tensordot(self.weights, features.sum(1), dims=1)
        return square / len(self.labels), mean / len(self.labels)

    def __call__(self, factors: Tensor, bias: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the mean NLL, and its derivatives in factors and bias."""
        total, by_factors, by_bias = self.weights.new_zeros(()), torch.zeros_like(factors), torch.zeros_like(bias)
        for part in self._parts():
            features, _, labels = part
            pooled, share, log_probs = self._shares(part, factors, bias)
            total -= pooled.sum()
            slope = log_probs.exp_()
            slope[:, torch.arange(len(labels), device=labels.device), labels] -= 1
            slope *= share.unsqueeze(-1)
            for sums, added in zip((by_factors, by_bias), _pulled(slope, features, factors.dim() == 1), strict=True):
                sums += added
        count = len(self.labels)
        return float(total) / count, by_factors / count, by_bias / count

    def curvature(self, factors: Tensor, bias: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return a function of a direction (of factors, of bias): the Hessian of the mean NLL at a map times it."""

        def made() -> Iterator[Curved]:
            for part in self._parts():
                _, share, log_probs = self._shares(part, factors, bias)
                yield part[0], log_probs.exp_(), share.unsqueeze(-1), part[2]

        kept = None if self._kept is None else list(made())

        def product(by_factors: Tensor, by_bias: Tensor) -> tuple[Tensor, Tensor]:
            sums = [torch.zeros_like(by_factors), torch.zeros_like(by_bias)]
            for features, probs, share, labels in made() if kept is None else kept:
                slope = _curved(mapped(features, by_factors, by_bias), probs, share, labels)
                for total, added in zip(sums, _pulled(slope, features, by_factors.dim() == 1), strict=True):
                    total += added
            return sums[0] / len(self.labels), sums[1] / len(self.labels)

        return product

    def _shares(self, part: Part, factors: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the pooled probability of every label `[n]`, each draw's share in it, and all log-probabilities."""
        features, masked, labels = part
        log_probs = mapped(features, factors, bias).masked_fill_(masked, -torch.inf).log_softmax(-1)
        joint = picked(log_probs, labels) + self.weights.log().unsqueeze(-1)
        pooled = joint.logsumexp(0)
        return pooled, (joint - pooled).exp(), log_probs


def _curved(moved: Tensor, probs: Tensor, share: Tensor, labels: Tensor) -> Tensor:
    """Return the Hessian in the logits `[S, n, K]` of the NLL of every example, times a change of them (overwritten)."""
    mean = (probs * moved).sum(-1, keepdim=True)
    own = moved.gather(-1, labels[None, :, None].expand(len(moved), -1, 1)) if len(moved) > 1 else mean
    slope = moved.sub_(mean).mul_(probs).mul_(share)
    if len(moved) > 1:
        # Draws that explain the label better gain in weight: minus the covariance of their slopes.
        gap = mean - own
        gap = share * (gap - (share * gap).sum(0))
        slope -= gap * probs
        slope.scatter_add_(-1, labels[None, :, None].expand_as(gap), gap)
    return slope


def _pulled(slope: Tensor, features: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """Return sums of derivatives in the map, of factors and of bias, from those in the logits `[S, n, K]`."""
    slope, features = slope.flatten(0, 1), features.flatten(0, 1)
    return (slope * features).sum(0) if diagonal else slope.T @ features, slope.sum(0)
