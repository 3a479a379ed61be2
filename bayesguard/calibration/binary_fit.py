"""The pooled likelihood of maps of log-odds, for many labels at once, and Newton's method for its minimum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.calibration.fitted import RIDGE, TOLERANCE, Features
from bayesguard.predictive.numerics import slices, wide

_MOST_STEPS = 200
_MOST_HALVINGS = 60
_SURE = 1e4  # log-odds of a probability that is 0 or 1 in float64, and finite


class AnswerLikelihood:
    """Mean of `-log sum_s w_s p_s(y)` over the N answers of every label, `p_s(yes) = sigmoid(x_s . numbers)`, float64.

    What is impossible in every draw is infinite whatever the map, and left out.

    Args:
        draws: Log-odds `[S, N, L]`; infinite ones are the same under every map.
        side: 1 for yes and -1 for no, `[N, L]`.
        share: How much each answer counts, `[N, L]`.
        weights: Of the draws, positive, `[S]`.
        features: Makes x `[..., P]` from finite log-odds.
    """

    def __init__(self, draws: Tensor, side: Tensor, share: Tensor, weights: Tensor, features: Features) -> None:
        self.draws, self.side, self.weights, self.features = draws, side, weights, features
        possible = torch.where(side > 0, (draws != -torch.inf).any(0), (draws != torch.inf).any(0))
        self.share = torch.where(possible, share, 0.0)
        self.count = self.share.sum(0)
        self.identity = identity_like(features(weights[:1])[0])

    def smoothed(self) -> AnswerLikelihood:
        """Return the same with Platt's targets: of each answer most is what it was, and the rest its opposite."""
        yes, no = self._chosen()
        alike = torch.where(self.side > 0, yes.sum(0), no.sum(0))
        share = self.share * (alike + 1) / (alike + 2)
        return AnswerLikelihood(
            torch.cat([self.draws, self.draws], 1),
            torch.cat([self.side, -self.side]),
            torch.cat([share, self.share - share]),
            self.weights,
            self.features,
        )

    def _chosen(self) -> tuple[Tensor, Tensor]:
        """Where the answer is yes, and where it is no, `[N, L]`."""
        return (self.share > 0) & (self.side > 0), (self.share > 0) & (self.side < 0)

    def one_sided(self) -> Tensor:
        """Whether all answers of a label are alike, `[L]`."""
        yes, no = self._chosen()
        return ~(yes.any(0) & no.any(0))

    def separable(self) -> Tensor:
        """Whether log-odds part the yes and the no of a label, in all draws together, `[L]`."""
        (least_yes, most_yes), (least_no, most_no) = (
            (
                self.draws.masked_fill(~chosen, torch.inf).amin((0, 1)),
                self.draws.masked_fill(~chosen, -torch.inf).amax((0, 1)),
            )
            for chosen in self._chosen()
        )
        apart = most_no <= least_yes
        # Beta calibration cannot turn the order round, and is not sent to infinity by answers that are.
        return apart | (most_yes <= least_no) if len(self.identity) == 2 else apart

    def nll(self, numbers: Tensor) -> Tensor:
        """Return the mean NLL of every label `[L]`, without the ridge; 0 where a label has no possible answer."""
        return self(numbers)[0] - RIDGE * (numbers - self.identity).square().sum(-1)

    def mean(self, nll: Tensor) -> float:
        """Return the mean over the answers of all labels."""
        return float((nll * self.count).sum() / self.count.sum())

    def __call__(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean NLL with the ridge `[L]`, its gradient `[L, P]` and its second derivatives `[L, P, P]`."""
        size, away = len(self.identity), numbers - self.identity
        parts = [self._terms(numbers, rows) for rows in slices(len(self.side), 4 * self.draws[:, :1].numel() * size)]
        count = self.count.clamp_min(1.0)
        value, first, second = (-torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        return (
            value / count + RIDGE * away.square().sum(-1),
            first / count[:, None] + 2 * RIDGE * away,
            second / count[:, None, None] + 2 * RIDGE * torch.eye(size).to(second),
        )

    def _terms(self, numbers: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over examples of the log of the pooled probability of their answers, and its first two derivatives."""
        part, side, share = wide(self.draws[:, rows]), self.side[rows], self.share[rows]
        sure = part.isinf()
        features = self.features(part.masked_fill(sure, 0.0)).masked_fill(sure.unsqueeze(-1), 0.0)
        odds = (features * numbers).sum(-1) + torch.where(sure, part.sign() * _SURE, 0.0)
        joint = F.logsigmoid(side * odds) + self.weights.log()[:, None, None]
        pooled = joint.logsumexp(0)
        owned = (joint - pooled).exp()  # each draw's share in the pooled probability
        slope = side * torch.sigmoid(-side * odds)
        bend = slope.square() - torch.sigmoid(odds) * torch.sigmoid(-odds)
        by_row = torch.einsum("snl,snlp->nlp", owned * slope, features)
        second = torch.einsum("snl,snlp,snlq->lpq", owned * bend * share, features, features)
        second = second - torch.einsum("nl,nlp,nlq->lpq", share, by_row, by_row)
        return (share * pooled).sum(0), torch.einsum("nl,nlp->lp", share, by_row), second


def identity_like(numbers: Tensor) -> Tensor:
    """Return the numbers that change nothing: factors 1 and bias 0."""
    identity = torch.ones_like(numbers)
    identity[..., -1] = 0.0
    return identity


class Minimum(NamedTuple):
    """Where Newton's method ended, for every label: numbers `[L, P]`, value `[L]`, gradient's norm `[L]`."""

    numbers: Tensor
    value: Tensor
    gradient_norm: Tensor
    iterations: int

    def where_positive(self) -> Minimum:
        """Return the same with an infinite value for labels of which a factor is negative."""
        allowed = (self.numbers[:, :-1] >= 0).all(-1)
        return self._replace(value=torch.where(allowed, self.value, torch.inf))

    def or_better(self, other: Minimum) -> Minimum:
        """Return for every label the one of the smaller value."""
        better = other.value < self.value
        return Minimum(
            torch.where(better[:, None], other.numbers, self.numbers),
            torch.where(better, other.value, self.value),
            torch.where(better, other.gradient_norm, self.gradient_norm),
            self.iterations + other.iterations,
        )


def newton(likelihood: AnswerLikelihood, held: Sequence[int] = ()) -> Minimum:
    """Minimise, for all labels at once, with some numbers held at 0: Newton's steps, halved until the value falls enough.

    Several draws may bend the likelihood downwards; there the step goes by the size of the curvature.
    """
    free = torch.ones_like(likelihood.identity, dtype=torch.bool)
    free[list(held)] = False
    numbers = torch.where(free, likelihood.identity, 0.0).repeat(len(likelihood.count), 1)
    value, first, second = likelihood(numbers)
    slope, iterations = torch.where(free, first, 0.0), 0
    norm = slope.norm(dim=-1)
    while iterations < _MOST_STEPS and float(norm.max()) > 1e-3 * TOLERANCE:
        iterations += 1
        step = _newton_step(second, slope, free)
        falls = (slope * step).sum(-1)
        length = torch.ones_like(falls)
        for _ in range(_MOST_HALVINGS):
            there = likelihood(numbers + length[:, None] * step)[0]
            enough = there <= value + 1e-4 * length * falls + 1e-15 * value.abs()
            if enough.all():
                break
            length = torch.where(enough, length, length / 2)
        if not enough.any():
            break
        numbers = numbers + torch.where(enough, length, 0.0)[:, None] * step
        value, first, second = likelihood(numbers)
        slope, before = torch.where(free, first, 0.0), norm
        norm = slope.norm(dim=-1)
        if float(norm.max()) <= TOLERANCE and bool((norm >= before / 2).all()):  # only rounding is left
            break
    return Minimum(numbers, value, norm, iterations)


def _newton_step(second: Tensor, slope: Tensor, free: Tensor) -> Tensor:
    both = free.unsqueeze(-1) & free
    values, vectors = torch.linalg.eigh(torch.where(both, second, torch.eye(len(free)).to(second)))
    turned = (vectors.mT @ slope.unsqueeze(-1)) / values.abs().clamp_min(RIDGE).unsqueeze(-1)
    return torch.where(free, -(vectors @ turned).squeeze(-1), 0.0)  # what is held stays there to the last digit
