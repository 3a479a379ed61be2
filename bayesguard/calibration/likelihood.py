"""The likelihood of pooled draws as a function of one inverse temperature, and its minimum."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.metrics.functional.weights import effective_sample_size
from bayesguard.predictive.numerics import BUDGET, CACHED, slices, wide

# Logits of which fewer are there are read in float64: it costs nothing there, and there are few rows to average over.
SMALL = 1 << 20
_MOST_STEPS = 100


class Slope(NamedTuple):
    """The mean NLL at one inverse temperature b = 1/T, and its first two derivatives in b."""

    nll: float
    first: float
    second: float


class PooledLikelihood:
    """Mean of `-log sum_s w_s softmax(b logits_s)[y]` over N examples, for any b; every b is computed once.

    Many logits are read in their own dtype, in slices that stay in the cache, and never copied as a whole; sums over
    examples are in float64. Rounding moves the optimum by far less than 1e-6 of itself.

    Args:
        logits: Log-probabilities of every draw, `[S, N, K]`; -inf masks a class.
        labels: `[N]`.
        weights: Of the draws, positive, `[S]`.
        shares: How much each example counts, positive, `[N]`; None for all alike. The mean is weighted by them.

    Attributes:
        worth: How many equal examples they are worth: N, or Kish's effective size.
        many: Whether there are so many logits that a pass over them costs something.
    """

    def __init__(self, logits: Tensor, labels: Tensor, weights: Tensor, shares: Tensor | None = None) -> None:
        self.logits, self.labels, self.weights = logits, labels, weights
        self.shares = None if shares is None else wide(shares) / wide(shares).mean()
        self.worth = float(len(labels)) if shares is None else float(effective_sample_size(shares))
        self.num_draws, self.num_examples, self.num_classes = logits.shape
        self._top, self._picked = wide(logits.amax(-1)), wide(picked(logits, labels))
        self._log_weights = wide(weights).log().unsqueeze(-1)
        self._seen: dict[float, Slope] = {}
        # Relative steps of b that an expansion to third order may bridge: its error is of fourth order in them.
        self.many = logits.numel() > SMALL
        self.reach = 5e-4 if self.many else 1e-6
        # A class of probability 0 adds nothing, but 0 * inf is NaN.
        self._masked = bool(logits.amin() == -torch.inf)

    def __call__(self, inverse: float) -> Slope:
        """Return the mean NLL and its derivatives at 1/T: one pass over the logits, or none."""
        if inverse not in self._seen:
            self._seen[inverse] = self._slope(inverse, in_float64=not self.many)
        return self._seen[inverse]

    def exactly(self, inverse: float) -> Slope:
        """Return the same with all sums in float64."""
        return self._slope(inverse, in_float64=True) if self.many else self(inverse)

    def at_one(self) -> float:
        """Return the mean NLL at T = 1: of draws that are normalised it needs the targets' logits only."""
        return -float(self._counted((self._picked + self._log_weights).logsumexp(0)).mean())

    def near(self, inverse: float) -> Slope:
        """Return the same by Taylor's formula from the nearest b that was computed, if it is within reach."""
        at = min(self._seen, key=lambda seen: abs(seen - inverse), default=inverse)
        step = inverse - at
        if step == 0 or len(self._seen) < 2 or abs(step) > self.reach * at:
            return self(inverse)
        here, third = self._seen[at], self.third(at)
        return Slope(
            here.nll + step * (here.first + step * (here.second / 2 + step * third / 6)),
            here.first + step * (here.second + step * third / 2),
            here.second + step * third,
        )

    def third(self, inverse: float) -> float:
        """Return the third derivative, a difference of second ones between two neighbours; NaN if there is one only."""
        if len(self._seen) < 2:
            return math.nan
        at, other = sorted(self._seen, key=lambda seen: abs(seen - inverse))[:2]
        return (self._seen[at].second - self._seen[other].second) / (at - other)

    def separable(self) -> bool:
        """Whether every target is the one top class of every draw."""
        if bool((self._picked < self._top).any()):
            return False
        for rows in slices(self.num_examples, self.logits[:, :1].numel()):
            part, chosen = self.logits[:, rows], _spread(self.labels[rows], self.num_draws)
            if bool((part.scatter(-1, chosen, -torch.inf).amax(-1) == self._top[:, rows]).any()):
                return False  # two classes share the top
        return True

    def sample(self, elements: int) -> PooledLikelihood:
        """Return the likelihood of evenly spaced rows, as many as have about `elements` logits; itself if it has fewer."""
        most = max(1, elements // (self.num_draws * self.num_classes))
        step = -(-self.num_examples // most)
        if step == 1:
            return self
        shares = None if self.shares is None else self.shares[::step]
        return PooledLikelihood(self.logits[:, ::step].contiguous(), self.labels[::step], self.weights, shares)

    def _counted(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        return values if self.shares is None else values * self.shares[rows]

    def _slope(self, inverse: float, in_float64: bool) -> Slope:
        sums = torch.zeros(3, dtype=self._top.dtype, device=self.logits.device)
        cost = self.num_draws * self.num_classes
        if self.logits.device.type == "cpu":
            cost *= max(1, BUDGET // CACHED)
        buffers: tuple[Tensor, Tensor] | None = None
        for rows in slices(self.num_examples, cost):
            part = wide(self.logits[:, rows]) if in_float64 else self.logits[:, rows]
            if self._masked:
                part = part.clamp_min(-1e30)
            if buffers is None or buffers[0].shape != part.shape:
                buffers = torch.empty_like(part), torch.empty_like(part)
            sums += torch.stack(
                [self._counted(term, rows).sum() for term in self._terms(part, rows, inverse, *buffers)]
            )
        nll, first, second = (-sums / self.num_examples).tolist()
        return Slope(nll, first, second)

    def _terms(
        self, logits: Tensor, rows: slice, inverse: float, product: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the pooled probability of every label `[n]`, and its derivatives in 1/T."""
        torch.mul(logits, inverse, out=product)
        torch.softmax(product, -1, out=probs)
        top, chosen = self._top[:, rows], self._picked[:, rows]
        # The largest probability tells the normaliser, to the last digit also where the label's own is 0.
        normaliser = inverse * top - wide(probs.amax(-1)).log()
        torch.mul(probs, logits, out=product)
        mean = wide(product.sum(-1))
        variance = wide(product.mul_(logits).sum(-1)) - mean.square()
        joint = inverse * chosen - normaliser + self._log_weights
        pooled = joint.logsumexp(0)
        share = (joint - pooled).exp()
        slope = torch.where(share > 0, chosen - mean, 0.0)
        first = (share * slope).sum(0)
        second = (share * (slope.square() - variance)).sum(0) - first.square()
        return pooled, first, second


def minimise(likelihood: PooledLikelihood, lower: float, upper: float) -> float:
    """Return the inverse temperature of a minimum between two; for one draw the NLL is convex, and it is the minimum.

    Newton's method on the slope, kept inside a shrinking bracket, which is halved (in logarithms) where a step would
    leave it or the last one has not halved the slope. A sample of many rows gives the start, so that about two passes
    over all of them are left.
    """
    least, most = lower, upper
    sample = likelihood.sample(max(SMALL, likelihood.logits.numel() // 16))
    if sample is likelihood:
        at = 1.0 if lower < 1 < upper else math.sqrt(lower * upper)
    else:
        at = min(max(minimise(sample, lower, upper), lower), upper)
    before = math.inf
    for _ in range(_MOST_STEPS):
        here = likelihood(at)
        falls = here.first < 0
        if here.first == 0 or (at == most and falls) or (at == least and not falls):
            return at
        lower, upper = (at, upper) if falls else (lower, at)
        step = -here.first / here.second if here.second > 0 else math.nan
        last = _last_step(likelihood, at, step)
        if last is not None and lower <= at + last <= upper:
            return at + last
        following = at + step
        if not lower < following < upper:
            end = upper if falls else lower
            # The end itself, where nothing is known of it and it is near, may be the minimum.
            following = end if end in (least, most) and upper < 4 * lower else math.sqrt(lower * upper)
        elif abs(here.first) > before / 2:
            following = math.sqrt(lower * upper)
        if abs(following - at) < 1e-9 * at:
            return following
        at, before = following, abs(here.first)
    return at


def _last_step(likelihood: PooledLikelihood, at: float, step: float) -> float | None:
    """Return Newton's step with the correction of third order, if nothing larger than rounding is left after it.

    The third derivative is the difference of the last two second ones: it tells how far Newton's step will miss.
    """
    if abs(step) < 1e-8 * at:
        return step
    if not abs(step) < likelihood.reach * at:
        return None
    correction = -likelihood.third(at) / likelihood(at).second * step * step / 2
    return step + correction if abs(correction) < 1e-6 * at else None


def picked(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits of the labels, `[S, N]`."""
    return logits.gather(-1, _spread(labels, len(logits))).squeeze(-1)


def _spread(labels: Tensor, draws: int) -> Tensor:
    return labels.expand(draws, -1).unsqueeze(-1)
