"""Predictives of counts: 0, 1, 2, ..."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from bayesguard.checks import bad_row
from bayesguard.errors import BadInput
from bayesguard.predictive.components import component_cdf, parameters
from bayesguard.predictive.continuous import ComponentPredictive
from bayesguard.predictive.numerics import BUDGET, as_given
from bayesguard.predictive.quadrature import mixture_log_prob

_TAIL = 1e-13  # mass that sums over the counts may miss, at either end
_MOST_COUNTS = 1 << 26  # counts that are walked over for one answer: with ten draws a minute or two


class CountPredictive(ComponentPredictive):
    """The mixture over S draws of distributions of a count.

    Its uncertainty is decomposed as variance, like that of real targets: counts are numbers with a unit and an infinite
    support, and whoever predicts 1,000 plus or minus 30 wants that 30.

    Args:
        component: Torch distribution of batch shape `[S, N]` or `[S, N, D]` on the non-negative integers: `Poisson`, or
            a `MixtureSameFamily` of it.
        weights: Weight of every draw `[S]`; None for equal weights.
        exact: The draws are the whole distribution and not a random sample of it, so its Monte-Carlo error is zero.

    Raises:
        BadInput: A wrong shape, or parameters that are not finite or not allowed (with the row).
        BadType: A component that is not on the counts.

    Examples:
        >>> from torch.distributions import Poisson
        >>> pred = CountPredictive(Poisson(torch.tensor([[3.0], [5.0]])))
        >>> pred.mean, pred.variance
        (tensor([4.]), tensor([5.]))
        >>> pred.icdf(0.5)
        tensor([4.])
    """

    _support = constraints.nonnegative_integer

    def _target(self, value: object, name: str = "value") -> Tensor:
        target = super()._target(as_given(value, name), name)
        bad = (target < 0) | (target != target.floor())
        if bad.any():
            raise BadInput(f"{name} must hold counts 0, 1, 2, ..., row {bad_row(bad)} does not")
        return target

    def icdf(self, value: object) -> Tensor:
        """Return the smallest count whose cdf is at least `value`, a number in [0, 1] or one for every element.

        Counts are returned in the predictive's floating dtype; 0 at `value` 0, infinity at 1.
        """
        with torch.no_grad():
            return self._by_example(self._quantile, self._levels(value))

    def _quantile(self, part: Distribution, q: Tensor) -> Tensor:
        inner = q.clamp(torch.finfo(q.dtype).tiny, 1 - torch.finfo(q.dtype).eps)
        low = torch.full_like(q, -1.0)
        high = part.mean.amax(0).ceil() + 1
        while (self._cdf(part, high) < inner).any():
            high = torch.where(self._cdf(part, high) < inner, 2 * high, high)
        while ((high - low) > 1).any():
            middle = ((low + high) / 2).floor()
            enough = self._cdf(part, middle) >= inner
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return torch.where(q == 0, 0.0, torch.where(q == 1, torch.inf, high))

    def _range(self, part: Distribution, like: Tensor) -> tuple[Tensor, int]:
        """First count of every element that matters, and how many there are from it on."""
        first = self._quantile(part, torch.full_like(like, _TAIL))
        last = self._quantile(part, torch.full_like(like, 1 - _TAIL))
        length = int((last - first).max()) + 1 if like.numel() else 1
        if length > _MOST_COUNTS:
            raise BadInput(
                f"an answer spreads over {length} counts, more than the {_MOST_COUNTS} that entropy() and crps() sum over: "
                "look at the quantiles or samples, or model the count in a larger unit"
            )
        return first, length

    def _counts(self, part: Distribution, first: Tensor, length: int) -> Iterator[Tensor]:
        """Yield the counts of every element from its first on, `[some, ...]`, in blocks of bounded memory."""
        step = max(1, BUDGET // max(1, part.batch_shape.numel()))
        for start in range(0, length, step):
            block = torch.arange(start, min(start + step, length), dtype=first.dtype, device=first.device)
            yield first + block.reshape(-1, *[1] * first.dim())

    def crps(self, value: object) -> Tensor:
        """Return the ranked probability score of counts `[N, ...]`: the sum of (F(k) - 1{k >= y})^2 over all k.

        References:
            Czado, Gneiting, Held, 2009, Biometrics, section 3.1.
        """

        def score(part: Distribution, y: Tensor) -> Tensor:
            first, length = self._range(part, y)
            total = (first - y).clamp_min(0) + (y - first - length).clamp_min(0)
            for counts in self._counts(part, first, length):
                below = (self._share(part.mean) * self._cdf_at(part, counts)).sum(1).clamp(0, 1)
                total = total + (below - (counts >= y).to(y.dtype)).square().sum(0)
            return total

        return self._by_example(score, self._target(value))

    def _cdf_at(self, part: Distribution, counts: Tensor) -> Tensor:
        return component_cdf(part, counts.unsqueeze(1))

    def entropy(self) -> Tensor:
        """Return the entropy of the mixture `[N, ...]` in nats, summed over the counts."""

        def summed(part: Distribution) -> Tensor:
            like = next(iter(parameters(part).values())).new_zeros(part.batch_shape[1:])
            total = like
            for counts in self._counts(part, *self._range(part, like)):
                total = total + torch.special.entr(mixture_log_prob(part, self.weights, counts).exp()).sum(0)
            return total

        return self._by_example(summed)
