"""What classification predictives share: the pooled class probabilities of the draws and what they disagree about."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesguard.checks import check_level
from bayesguard.errors import BadType
from bayesguard.predictive.base import Decomposition, Predictive, to_numpy
from bayesguard.predictive.numerics import in_slices, slices, wide


class Moments(NamedTuple):
    """All that a classification predictive has to know of its draws once they are gone: memory O(N K)."""

    log_probs: Tensor  # [N, ..., K], of the mixture
    information: Tensor  # [N, ...], mutual information of answer and draw; kept, for a difference would lose its digits
    variance: Tensor  # [N, ..., K], of the draws' probabilities

    def to(self, dtype: torch.dtype) -> Moments:
        return Moments(*(tensor.to(dtype) for tensor in self))


def entropy_of(log_probs: Tensor) -> Tensor:
    """Return the entropy over the last axis in nats; a class of probability zero adds nothing."""
    return torch.special.entr(log_probs.exp()).sum(-1)


def moments_of(log_probs: Tensor, weights: Tensor) -> Moments:
    """Return the moments of normalised float64 log-probabilities `[S, N, ..., K]` under weights `[S]`."""
    share = weights.reshape(-1, *[1] * (log_probs.dim() - 1))
    pooled = (log_probs + share.log()).logsumexp(0)
    probs = log_probs.exp()
    variance = (share * (probs - (share * probs).sum(0)).square()).sum(0)
    expected = (share[..., 0] * entropy_of(log_probs)).sum(0)
    return Moments(pooled, (entropy_of(pooled) - expected).clamp_min(0), variance)


def merge_moments(first: Moments, second: Moments, share: float) -> Moments:
    """Return the moments of the mixture of two with weights 1 - share and share (Chan, Golub, LeVeque, 1979)."""
    rest = 1 - share
    pooled = torch.logaddexp(first.log_probs + math.log(rest), second.log_probs + math.log(share))
    between = (first.log_probs.exp() - second.log_probs.exp()).square() * (share * rest)
    expected = rest * (entropy_of(first.log_probs) - first.information)
    expected = expected + share * (entropy_of(second.log_probs) - second.information)
    variance = rest * first.variance + share * second.variance + between
    return Moments(pooled, (entropy_of(pooled) - expected).clamp_min(0), variance)


class PooledPredictive(Predictive):
    """A mixture over draws of distributions on K classes, with its draws or reduced to their moments."""

    _draws: Tensor | None
    _num_class_axes: int  # axes of `_draws` behind the batch shape

    # -- what each kind says

    @abstractmethod
    def _draw_log_probs(self, rows: slice) -> Tensor:
        """Normalised float64 log-probabilities `[S, n, ..., K]` of some of the examples."""

    @abstractmethod
    def _make_component(self, draws: Tensor) -> Distribution:
        """The torch distribution of the draws."""

    # -- draws and moments

    def _fill(self, draws: Tensor | None, moments: Moments | None, weights: Tensor, exact: bool) -> Self:
        if draws is not None:
            batch_shape = draws.shape[1 : draws.dim() - self._num_class_axes]
        else:
            assert moments is not None
            batch_shape = moments.log_probs.shape[:-1]
        self._set(batch_shape, weights, exact)
        self._draws = draws
        if moments is not None:
            self.__dict__["_moments"] = moments
        return self

    def _rebuild(self, tensors: list[Tensor], weights: Tensor | None = None, exact: bool | None = None) -> Self:
        weights = self.weights if weights is None else weights
        exact = self.exact if exact is None else exact
        new = type(self).__new__(type(self))
        if len(tensors) == 1:
            return new._fill(tensors[0], None, weights, exact)
        return new._fill(None, Moments(*tensors), weights, exact)

    def _tensors(self) -> list[Tensor]:
        return list(self._moments) if self._draws is None else [self._draws]

    def _wide_moments(self) -> Moments:
        if self._draws is None:
            return Moments(*(wide(tensor) for tensor in self._moments))
        cost = 4 * self._draws[:, :1].numel() * (2 - self._num_class_axes)
        parts = [moments_of(self._draw_log_probs(rows), self.weights) for rows in slices(len(self), cost)]
        return Moments(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    @cached_property
    def _moments(self) -> Moments:
        return self._wide_moments().to(self.dtype)

    @property
    def has_draws(self) -> bool:
        """Whether the draws are kept."""
        return self._draws is not None

    @property
    def draw_logits(self) -> Tensor:
        """The draws: log-probabilities `[S, N, ..., K]` of classes, or raw logits `[S, N, ...]` of yes or no."""
        if self._draws is None:
            raise BadType("this predictive was reduced and has no draws; predict again with keep_draws=True")
        return self._draws

    @property
    def component(self) -> Distribution:
        """The S distributions that are mixed, as one torch distribution of batch shape `[S, N, ...]`."""
        return self._make_component(self.draw_logits)

    def reduce(self) -> Self:
        """Return the predictive without its draws: pooled probabilities, decomposition, Monte-Carlo error.

        Memory is O(N K) instead of O(S N K). A single draw is kept, since it takes no more.
        """
        return self if self._draws is None or self.num_samples == 1 else self._rebuild(list(self._moments))

    # -- what they answer

    @property
    def _class_probs(self) -> Tensor:
        # Normalised once more: rounding log-probabilities to float32 moves the sum of 1,000 equal classes by 2e-7.
        return self._moments.log_probs.softmax(-1)

    @property
    def labels(self) -> Tensor:
        """The most probable class `[N, ...]`; the first of equals."""
        return self._class_probs.argmax(-1)

    @property
    def confidence(self) -> Tensor:
        """The probability of the most probable class, `[N, ...]`."""
        return self._class_probs.amax(-1)

    def entropy(self) -> Tensor:
        """Return the entropy of the mixture `[N, ...]` in nats."""
        return self.uncertainty().total

    def uncertainty(self) -> Decomposition:
        """Return entropy, expected entropy and mutual information `[N, ...]` in nats; see `Decomposition`."""
        log_probs, information, _ = self._moments

        def total(rows: slice) -> Tensor:
            return entropy_of(wide(log_probs[rows]).log_softmax(-1))

        entropy = in_slices(total, len(self), log_probs[:1].numel())
        epistemic = torch.minimum(wide(information), entropy)
        return Decomposition(*(part.to(self.dtype) for part in (entropy, entropy - epistemic, epistemic)))

    def prediction_set(self, alpha: float) -> Tensor:
        """Return the smallest set of classes whose probabilities sum to at least `1 - alpha`.

        The sum may miss `1 - alpha` by the rounding of the probabilities (a few units in their last place). Of equally
        probable classes those with the smaller index come first.

        Args:
            alpha: Mis-coverage, strictly between 0 and 1.

        Returns:
            Membership `[N, ..., K]`, bool; for yes or no K = 2, first "no". A set is never empty.
        """
        level = 1 - check_level(alpha, "alpha") - 8 * torch.finfo(self.dtype).eps
        probs = self._class_probs

        def members(rows: slice) -> Tensor:
            mass, order = wide(probs[rows]).sort(dim=-1, descending=True, stable=True)
            chosen = mass.cumsum(-1) - mass < level
            chosen[..., 0] = True
            return torch.zeros_like(chosen).scatter_(-1, order, chosen)

        return in_slices(members, len(self), 4 * probs[:1].numel())

    def _sample_classes(self, count: int, generator: torch.Generator | None) -> Tensor:
        probs = self._class_probs
        if count == 0 or self.batch_shape.numel() == 0:
            return probs.new_empty((count, *self.batch_shape), dtype=torch.long)
        rows = probs.detach().reshape(-1, probs.shape[-1])
        picked = torch.multinomial(rows, count, replacement=True, generator=generator)
        return picked.T.reshape(count, *self.batch_shape)

    def numpy(self) -> dict[str, npt.NDArray[Any]]:
        """Return probabilities, labels, confidence and the decomposition as NumPy arrays, by name."""
        named = {"probs": self.mean, "labels": self.labels, "confidence": self.confidence}
        return to_numpy({**named, **self.uncertainty()._asdict()})
