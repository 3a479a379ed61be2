"""Predictives known only by samples of the target."""

from __future__ import annotations

from typing import Any, NoReturn, Self

import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributions import constraints

from bayesguard.checks import check_finite, check_level, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive.base import Predictive, normalised_weights, to_numpy, with_draws
from bayesguard.predictive.groups import Groups, variance_between
from bayesguard.predictive.numerics import as_floating, as_given, in_slices, wide


class SamplePredictive(Predictive):
    """The empirical distribution of S draws of the target itself.

    It has moments, quantiles and a CRPS, but no density; and such draws do not tell what part of their spread is in the
    data and what part in the model.

    Args:
        samples: `[S, N]` or `[S, N, D]`.
        weights: Weight of every draw `[S]`; None for equal weights.

    Raises:
        BadInput: NaN or infinity, with the row.

    Examples:
        >>> pred = SamplePredictive([[1.0], [2.0], [6.0]])
        >>> pred.icdf(0.5), pred.crps([3.0])
        (tensor([2.]), tensor([0.3333]))
    """

    def __init__(self, samples: object, weights: object = None) -> None:
        values = with_draws(as_floating(samples, "samples"), True, 1, "samples")
        check_finite(values, "samples", row_axis=1)
        self._fill(values, normalised_weights(weights, values.shape[0], values), False)

    def _fill(self, samples: Tensor, weights: Tensor, exact: bool, groups: Groups = None) -> Self:
        self._set(samples.shape[1:], weights, exact, groups)
        self.samples = samples
        return self

    def _tensors(self) -> list[Tensor]:
        return [self.samples]

    def _refill(self, like: Self, tensors: list[Tensor], weights: Tensor, exact: bool, groups: Groups) -> Self:
        return self._fill(tensors[0], weights, exact, groups)

    @property
    def support(self) -> constraints.Constraint:
        """The real line."""
        return constraints.real

    def _share(self) -> Tensor:
        return self.weights.reshape(-1, *[1] * len(self.batch_shape))

    def _by_example(self, compute: Any, *values: Tensor) -> Tensor:
        def part(rows: slice) -> Tensor:
            result: Tensor = compute(wide(self.samples[:, rows]), *(value[rows] for value in values))
            return result

        return in_slices(part, len(self), 4 * self.samples[:, :1].numel()).to(self.dtype)

    @property
    def mean(self) -> Tensor:
        """Mean of the samples, `[N, ...]`."""
        return self._by_example(lambda x: (self._share() * x).sum(0))

    @property
    def variance(self) -> Tensor:
        """Variance of the empirical distribution, `[N, ...]` (divided by S, not by S - 1)."""

        def spread(x: Tensor) -> Tensor:
            return (self._share() * (x - (self._share() * x).sum(0)).square()).sum(0)

        return self._by_example(spread)

    @property
    def standard_error(self) -> Tensor:
        """Monte-Carlo standard error of the mean, `[N, ...]`; infinite for one sample.

        It is the error between groups of draws (`groups`), if there are such.
        """
        return self._standard_error(self._by_example(lambda x: variance_between(x, self.weights, self.groups)))

    def cdf(self, value: object) -> Tensor:
        """Return the share of the samples `<= value`, a number or one for every element."""
        points = self._everywhere(value)
        return self._by_example(lambda x, y: (self._share() * (x <= y)).sum(0), points)

    def icdf(self, value: object) -> Tensor:
        """Return the smallest sample whose cdf is at least `value`, a number in [0, 1] or one for every element."""
        levels = self._everywhere(value)
        if not ((levels >= 0) & (levels <= 1)).all():
            raise BadInput("value must hold probabilities in [0, 1] for quantiles")

        def quantile(x: Tensor, q: Tensor) -> Tensor:
            ordered, order = x.sort(0)
            # The sum of S weights is off by rounding, and a level of exactly k/S belongs to sample k.
            # What has no weight is no sample, not even the smallest.
            reached = self.weights[order].cumsum(0) >= (q - 1e-12).clamp_min(torch.finfo(q.dtype).tiny)
            place = reached.to(torch.uint8).argmax(0, keepdim=True)
            return ordered.gather(0, place).squeeze(0)

        return self._by_example(quantile, levels)

    def interval(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Return the central interval that holds `1 - alpha` of the samples: its lower and upper end."""
        check_level(alpha, "alpha")
        return self.icdf(alpha / 2), self.icdf(1 - alpha / 2)

    def crps(self, value: object) -> Tensor:
        """Return the fair estimate of the CRPS of targets `[N, ...]`, in their unit.

        Unbiased for the distribution that the samples come from (it may be negative); sorting makes it O(S log S).

        Raises:
            BadInput: Fewer than two samples.

        References:
            Ferro, 2014, QJRMS, equation 3; Zamo and Naveau, 2018, Mathematical Geosciences, section 2.2.
        """
        concentration = self.weights.square().sum()
        if self.num_samples < 2 or concentration >= 1:
            raise BadInput("the fair CRPS needs at least 2 samples, got 1")
        target = as_given(value, "value").to(self.device)
        check_shape(target, self.batch_shape, "value")
        check_finite(target, "value")

        def score(x: Tensor, y: Tensor) -> Tensor:
            ordered, order = (x - y).sort(0)  # centred at the target: sums of large numbers would lose digits
            share = self.weights[order]
            before = share.cumsum(0) - share
            pairs = (share * ordered * (2 * before + share - 1)).sum(0)  # the sum over i < j of w_i w_j |x_i - x_j|
            return (share * ordered.abs()).sum(0) - pairs / (1 - concentration)

        return self._by_example(score, wide(target))

    def _everywhere(self, value: object) -> Tensor:
        tensor = as_given(value, "value").to(self.device)
        if tensor.dim():
            check_shape(tensor, self.batch_shape, "value")
        if tensor.isnan().any():
            raise BadInput("value must not be NaN")
        return wide(tensor).expand(self.batch_shape)

    def log_prob(self, value: object) -> NoReturn:
        """Samples have no density."""
        raise BadType("samples have no density; use crps() to score them, or make the predictive from_normal")

    def entropy(self) -> NoReturn:
        """Samples have no density, and so no entropy."""
        raise BadType("samples have no density, and so no entropy; use variance")

    def uncertainty(self) -> NoReturn:
        """Samples of the target do not tell noise from ignorance."""
        raise BadType(
            "aleatoric and epistemic uncertainty cannot be told apart from samples of the target; "
            "use variance for the total, or keep the draws' distributions (from_normal with draws=True)"
        )

    def numpy(self) -> dict[str, npt.NDArray[Any]]:
        """Return mean and standard deviation as NumPy arrays, by name."""
        return to_numpy({"mean": self.mean, "stddev": self.stddev})

    def _sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        total = count * len(self)
        if total == 0:
            return self.samples.new_empty((count, *self.batch_shape))
        picked = torch.multinomial(self.weights, total, replacement=True, generator=generator).reshape(count, -1)
        return self.samples.detach()[picked, torch.arange(len(self), device=self.device)]
