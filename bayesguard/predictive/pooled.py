"""What classification predictives share: the pooled class probabilities of the draws and what they disagree about."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesguard.checks import check_level
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive.base import Decomposition, Predictive, normalised_weights, to_numpy
from bayesguard.predictive.few import UNDERFLOW, are_few, pooled_of_few, tensor_of
from bayesguard.predictive.groups import Groups, variance_between
from bayesguard.predictive.numerics import BUDGET, CACHED, in_slices, slices, wide

_LOG_UNDERFLOW = math.log(UNDERFLOW)
_FAR_DOWN = -1e4  # logarithm of a probability that is zero in float64, and finite
_EVERY = slice(None)
_LONG_ROW = 256
_FEW = 1 << 10


class Moments(NamedTuple):
    """All that a classification predictive has to know of its draws once they are gone: memory O(N K)."""

    log_probs: Tensor  # [N, ..., K], of the mixture
    information: Tensor  # [N, ...], mutual information of answer and draw; kept, for a difference would lose its digits
    variance: Tensor  # [N, ..., K], of the groups' mean probabilities; with `draws_used`, that of the mixture itself
    draws_used: Tensor | None = None  # [N], where examples have different numbers of draws

    def to(self, dtype: torch.dtype) -> Moments:
        return Moments(self.log_probs.to(dtype), self.information.to(dtype), self.variance.to(dtype), self.draws_used)

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]


def entropy_of(log_probs: Tensor) -> Tensor:
    """Return the entropy over the last axis in nats; a class of probability zero adds nothing."""
    return torch.special.entr(log_probs.exp()).sum(-1)


class Mixture(NamedTuple):
    """Draws and what they pool to: probabilities and their logarithms `[S, N, ..., K]`, log-probabilities `[N, ..., K]`."""

    probs: Tensor
    log_probs: Tensor
    pooled: Tensor


def mixture_of(log_probs: Tensor, weights: Tensor) -> Mixture:
    """Return the mixture of float64 log-probabilities `[S, N, ..., K]` under weights `[S]`.

    Rows are normalised here: their sums may be off by float32 rounding.
    """
    probs = _normalised(log_probs)
    # What the rows' exponentials sum to shows in the largest of each: one exponential for each number is enough.
    totals = log_probs.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()
    return Mixture(probs, log_probs - totals, _pooled(probs, log_probs, weights))


def pooled_of(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Return the log-probabilities of the mixture alone, `[N, ..., K]`: bit for bit those of `moments_of`."""
    if log_probs.shape[0] == 1:
        return log_probs[0].log_softmax(-1)
    return _pooled(_normalised(log_probs), log_probs, weights)


def _normalised(log_probs: Tensor) -> Tensor:
    if log_probs.shape[-1] >= _LONG_ROW or log_probs.numel() < _FEW:
        return log_probs.softmax(-1)
    # torch's softmax takes three times as long as its parts on many short rows.
    probs = log_probs.exp()
    return probs / probs.sum(-1, keepdim=True)


def _pooled(probs: Tensor, log_probs: Tensor, weights: Tensor) -> Tensor:
    if are_few(log_probs) and (few := pooled_of_few(log_probs, weights)) is not None:
        return tensor_of(few, log_probs.shape[1:], log_probs.dtype)
    share = weights.view(-1, *[1] * (probs.dim() - 1))
    # For a few numbers the bookkeeping of a product takes longer than a sum.
    mean = (probs * share).sum(0) if probs.numel() < _FEW else torch.tensordot(weights, probs, dims=1)
    # On CUDA a look would wait for the device. No logarithm is positive: the sum is below every one of them.
    if not mean.is_cuda:
        pooled = mean.log()
        if pooled.sum().item() > _LOG_UNDERFLOW or mean.numel() == 0 or mean.min().item() >= UNDERFLOW:
            return pooled
    far_down = (log_probs.log_softmax(-1) + share.log()).logsumexp(0)
    return torch.where(mean < UNDERFLOW, far_down, mean.clamp_min(UNDERFLOW).log())


def moments_of(log_probs: Tensor, weights: Tensor, groups: Groups = None) -> Moments:
    """Return the moments of float64 log-probabilities `[S, N, ..., K]` under weights `[S]`."""
    if len(log_probs) == 1:
        pooled = log_probs[0].log_softmax(-1)
        return Moments(pooled, torch.zeros_like(pooled[..., 0]), torch.zeros_like(pooled))
    probs, log_probs, pooled = mixture_of(log_probs, weights)
    variance = variance_between(probs, weights, groups)
    # A class of probability zero adds nothing, however far down its logarithm is.
    expected = -torch.tensordot(weights, (probs * log_probs.clamp_min(_FAR_DOWN)).sum(-1), dims=1)
    return Moments(pooled, (entropy_of(pooled) - expected).clamp_min(0), variance)


def merge_moments(first: Moments, second: Moments, share: float) -> Moments:
    """Return the moments of the mixture of two with weights 1 - share and share (Chan, Golub, LeVeque, 1979).

    No group of draws may be in both.
    """
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
        """Float64 log-probabilities `[S, n, ..., K]` of some of the examples, normalised to float32 rounding."""

    @abstractmethod
    def _make_component(self, draws: Tensor) -> Distribution:
        """The torch distribution of the draws."""

    # -- draws and moments

    @cached_property
    def weights(self) -> Tensor:  # type: ignore[override]
        """Equal weights, where none were given: made when somebody asks."""
        draws = self.draw_logits
        with torch.inference_mode(False):
            return normalised_weights(None, draws.shape[0], draws)

    @property
    def num_samples(self) -> int:
        """S, the number of draws in the mixture."""
        return self.weights.shape[0] if self._draws is None else self._draws.shape[0]

    def _fill(
        self, draws: Tensor | None, moments: Moments | None, weights: Tensor | None, exact: bool, groups: Groups = None
    ) -> Self:
        if draws is not None:
            batch_shape = draws.shape[1 : draws.dim() - self._num_class_axes]
        else:
            assert moments is not None
            batch_shape = moments.log_probs.shape[:-1]
        self._set(batch_shape, weights, exact, groups)
        self._draws = draws
        if moments is not None:
            self.__dict__["_moments"] = moments
        return self

    def _refill(self, like: Self, tensors: list[Tensor], weights: Tensor, exact: bool, groups: Groups) -> Self:
        if len(tensors) == 1:
            return self._fill(tensors[0], None, weights, exact, groups)
        return self._fill(None, Moments(*tensors), weights, exact, groups)

    def _tensors(self) -> list[Tensor]:
        return self._moments.tensors() if self._draws is None else [self._draws]

    def _wide_moments(self) -> Moments:
        if self._draws is None:
            if self._moments.draws_used is not None:
                raise BadInput(
                    "predictives that were drawn to a tolerance have another number of draws for each example and "
                    "cannot be mixed; predict with num_samples= instead"
                )
            return Moments(*(wide(tensor) for tensor in self._moments.tensors()))
        parts = [moments_of(self._draw_log_probs(rows), self.weights, self.groups) for rows in self._slices()]
        return (
            parts[0] if len(parts) == 1 else Moments(*map(torch.cat, zip(*(p.tensors() for p in parts), strict=True)))
        )

    def _draws_of(self, rows: slice) -> Tensor:
        return self.draw_logits if rows is _EVERY else self.draw_logits[:, rows]

    def _slices(self) -> Iterable[slice]:
        """Cut the examples so that a part's working copies are small."""
        assert self._draws is not None
        if (size := self._draws.numel()) < _FEW:
            return (_EVERY,)
        cost = 4 * size * (2 - self._num_class_axes) * BUDGET // CACHED
        return (_EVERY,) if cost <= BUDGET else slices(len(self), cost // len(self))

    @cached_property
    def _log_probs(self) -> Tensor:
        """Log-probabilities of the mixture; what the draws disagree about is left until somebody asks."""
        if self._draws is None or "_moments" in self.__dict__:
            return self._moments.log_probs
        if self._num_class_axes == 1 and (draws := self._draws).shape[0] > 1 and are_few(draws):
            # A few draws are log-probabilities as they are, and their equal weights are made for nobody.
            few = pooled_of_few(draws, self.__dict__.get("weights"))
            if few is not None:
                return tensor_of(few, draws.shape[1:], draws.dtype)
        parts = [pooled_of(self._draw_log_probs(rows), self.weights) for rows in self._slices()]
        pooled = parts[0] if len(parts) == 1 else torch.cat(parts)
        # As `to` does, in half of the time.
        return pooled.float() if self.dtype == torch.float32 else pooled.to(self.dtype)

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
        return self if self._draws is None or self.num_samples == 1 else self._rebuild(self._moments.tensors())

    @property
    def draws_used(self) -> Tensor:
        """How many draws every example's answer is made of, int64 `[N]`: S, except where `tolerance=` ended them."""
        used = None if self._draws is not None else self._moments.draws_used
        return super().draws_used if used is None else used

    @property
    def _class_errors(self) -> Tensor:
        variance, used = self._moments[2:]
        return self._standard_error(variance) if used is None else variance.sqrt()

    # -- what they answer

    @property
    def _class_probs(self) -> Tensor:
        # Normalised once more: rounding log-probabilities to float32 moves the sum of 1,000 equal classes by 2e-7.
        return self._log_probs.softmax(-1)

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
        log_probs, information = self._moments[:2]

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

        def picked(some: slice) -> Tensor:
            # Running sums of a million classes have too few digits in float32.
            return torch.multinomial(wide(rows[some]), count, replacement=True, generator=generator)

        return in_slices(picked, len(rows), rows.shape[-1]).T.reshape(count, *self.batch_shape)

    def numpy(self) -> dict[str, npt.NDArray[Any]]:
        """Return probabilities, labels, confidence and the decomposition as NumPy arrays, by name."""
        named = {"probs": self.mean, "labels": self.labels, "confidence": self.confidence}
        return to_numpy({**named, **self.uncertainty()._asdict()})
