"""Predictives of real numbers: mixtures of Gaussians, Student's t, mixture densities."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, reduce
from typing import Self

import torch
from torch import Tensor
from torch.distributions import Distribution, MixtureSameFamily, Normal, constraints

from bayesguard.checks import check_finite, check_level, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive.base import Decomposition, Predictive, normalised_weights, with_draws
from bayesguard.predictive.components import (
    check_parameters,
    component_cdf,
    component_log_prob,
    gaussian_parts,
    location_and_scale,
    map_parameters,
    parameters,
    rebuild,
    sample_component,
    widened,
)
from bayesguard.predictive.groups import Groups, variance_between
from bayesguard.predictive.numerics import as_floating, as_given, in_slices, wide
from bayesguard.predictive.quadrature import mixture_log_prob, quadrature_crps, quadrature_entropy
from bayesguard.predictive.roots import bracket, find_root


class ComponentPredictive(Predictive):
    """A mixture over draws of univariate torch distributions: what real and counted targets share."""

    _support: constraints.Constraint
    _component: Distribution

    def __init__(self, component: Distribution, weights: object = None, *, exact: bool = False) -> None:
        if not isinstance(component, Distribution):
            raise BadType(f"component must be a torch distribution, got {type(component).__name__}")
        if len(component.batch_shape) < 2 or component.batch_shape[0] == 0:
            raise BadInput(
                f"component has batch shape {tuple(component.batch_shape)}; it must be [S, N, ...] with S >= 1: "
                "draws first, then examples"
            )
        self._check_support(component)
        dtype = reduce(torch.promote_types, (value.dtype for value in parameters(component).values()), torch.float32)
        component = map_parameters(component, lambda value: value.to(dtype))
        check_parameters(component)
        weights = normalised_weights(weights, component.batch_shape[0], next(iter(parameters(component).values())))
        self._fill(component, weights, exact)

    def _check_support(self, component: Distribution) -> None:
        inner = component.component_distribution if isinstance(component, MixtureSameFamily) else component
        if inner.support is not self._support:
            raise BadType(
                f"a component of {type(inner).__name__} has support {inner.support}, but {type(self).__name__} "
                f"needs {self._support}"
            )

    def _fill(self, component: Distribution, weights: Tensor, exact: bool, groups: Groups = None) -> Self:
        self._set(component.batch_shape[1:], weights, exact, groups)
        self._component = component
        return self

    def _tensors(self) -> list[Tensor]:
        return list(parameters(self._component).values())

    def _refill(self, like: Self, tensors: list[Tensor], weights: Tensor, exact: bool, groups: Groups) -> Self:
        component = rebuild(like._component, dict(zip(parameters(like._component), tensors, strict=True)))
        return self._fill(component, weights, exact, groups)

    @property
    def component(self) -> Distribution:
        """The S distributions that are mixed, as one torch distribution of batch shape `[S, N, ...]`."""
        return self._component

    @property
    def support(self) -> constraints.Constraint:
        """The values a target may have."""
        return self._support

    # -- moments

    def _share(self, like: Tensor) -> Tensor:
        return self.weights.reshape(-1, *[1] * (like.dim() - 1))

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, mean of the components' variances, variance of their means, in float64."""
        component = widened(self._component)
        means, variances = component.mean, component.variance
        share = self._share(means)
        mean = (share * means).sum(0)
        # The deviations, not the squares, are summed: E[x^2] - E[x]^2 has no digits left far from zero.
        return mean, (share * variances).sum(0), (share * (means - mean).square()).sum(0)

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture, `[N, ...]`, in the target's unit."""
        return self._moments[0].to(self.dtype)

    @property
    def variance(self) -> Tensor:
        """Variance of the mixture (law of total variance), `[N, ...]`, in the target's unit squared."""
        return self.uncertainty().total

    def uncertainty(self) -> Decomposition:
        """Return variance, expected variance and variance of the means `[N, ...]`; see `Decomposition`."""
        _, aleatoric, epistemic = self._moments
        return Decomposition(*(part.to(self.dtype) for part in (aleatoric + epistemic, aleatoric, epistemic)))

    @property
    def standard_error(self) -> Tensor:
        """Monte-Carlo standard error of the mean, `[N, ...]`: 0 if exact, infinite for one draw.

        It is the error between groups of draws (`groups`), if there are such.
        """
        variance = self._moments[2]
        if self.groups is not None:
            variance = variance_between(widened(self._component).mean, self.weights, self.groups)
        return self._standard_error(variance).to(self.dtype)

    # -- densities and quantiles

    def _by_example(self, compute: Callable[..., Tensor], *values: Tensor, cost: int = 1) -> Tensor:
        """Apply `compute(component of some examples, *values of them)` in float64, within bounded memory."""
        component = widened(self._component)
        each = sum(value[:, :1].numel() for value in parameters(component).values())

        def part(rows: slice) -> Tensor:
            selected = map_parameters(component, lambda value: value[:, rows])
            return compute(selected, *(value[rows] for value in values))

        return in_slices(part, len(self), each * cost).to(self.dtype)

    def _target(self, value: object, name: str = "value") -> Tensor:
        target = as_given(value, name).to(self.device)
        check_shape(target, self.batch_shape, name)
        check_finite(target, name)
        return wide(target)

    def _everywhere(self, value: object, name: str) -> Tensor:
        """A number, or one for each element, as float64 of the batch shape."""
        tensor = as_given(value, name).to(self.device)
        if tensor.dim():
            check_shape(tensor, self.batch_shape, name)
        return wide(tensor).expand(self.batch_shape)

    def log_prob(self, value: object) -> Tensor:
        """Return the log-density (for counts, log-probability) of targets `[N, ...]`, in nats, for every element.

        Raises:
            BadInput: A shape other than exactly the batch shape, NaN or infinity.
        """
        return self._by_example(
            lambda part, y: mixture_log_prob(part, self.weights, y.unsqueeze(0))[0], self._target(value)
        )

    def joint_log_prob(self, value: object) -> Tensor:
        """Return the joint log-density `[N]` of all outputs of an example, in nats.

        Outputs are independent within a draw, and dependent in the mixture: the sum over outputs is inside the draws.
        """

        def joint(part: Distribution, y: Tensor) -> Tensor:
            within = component_log_prob(part, y.unsqueeze(0)).reshape(self.num_samples, y.shape[0], -1).sum(-1)
            return (within + self.weights.log().unsqueeze(-1)).logsumexp(0)

        return self._by_example(joint, self._target(value))

    def _cdf(self, part: Distribution, y: Tensor) -> Tensor:
        return (self._share(part.mean) * component_cdf(part, y.unsqueeze(0))).sum(0).clamp(0, 1)

    def cdf(self, value: object) -> Tensor:
        """Return P(Y <= value), the mean of the draws' cdfs; `value` is a number or has the batch shape."""
        points = self._everywhere(value, "value")
        if points.isnan().any():
            raise BadInput("value must not be NaN")
        return self._by_example(self._cdf, points)

    def _levels(self, value: object) -> Tensor:
        levels = self._everywhere(value, "value")
        if not ((levels >= 0) & (levels <= 1)).all():
            raise BadInput("value must hold probabilities in [0, 1] for quantiles")
        return levels

    def icdf(self, value: object) -> Tensor:
        """Return the quantile at `value`, a number in [0, 1] or one for every element, in the target's unit."""
        raise NotImplementedError

    def interval(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Return the central interval that holds `1 - alpha` of the mass: its lower and upper end, each `[N, ...]`."""
        check_level(alpha, "alpha")
        return self.icdf(alpha / 2), self.icdf(1 - alpha / 2)

    def _sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        # One draw for all outputs of an example: their marginals are the mixture's, and so is their joint distribution.
        total = count * len(self)
        if total == 0:
            return self._tensor.new_empty((count, *self.batch_shape))
        picked = torch.multinomial(self.weights, total, replacement=True, generator=generator).reshape(count, -1)
        rows = torch.arange(len(self), device=self.device)
        chosen = map_parameters(self._component, lambda value: value.detach()[picked, rows])
        return sample_component(chosen, generator)


class ContinuousPredictive(ComponentPredictive):
    """The mixture over S draws of distributions of a real number; parameters are never averaged.

    Args:
        component: Torch distribution of batch shape `[S, N]` or `[S, N, D]` on the real line: `Normal`, `StudentT`,
            `Laplace`, a `MixtureSameFamily` of them, or any other with parameters as attributes.
        weights: Weight of every draw `[S]`; None for equal weights.
        exact: The draws are the whole distribution and not a random sample of it, so its Monte-Carlo error is zero.

    Raises:
        BadInput: A wrong shape, or parameters that are not finite or not allowed (with the row).
        BadType: A component that is not univariate or not on the real line.

    Examples:
        >>> pred = ContinuousPredictive(Normal(torch.tensor([[0.0], [2.0]]), 1.0))
        >>> pred.mean, pred.uncertainty().epistemic
        (tensor([1.]), tensor([1.]))
        >>> lower, upper = pred.interval(0.1)
    """

    _support = constraints.real

    @staticmethod
    def from_normal(loc: object, scale: object, draws: bool = False) -> ContinuousPredictive:
        """Make a Gaussian predictive from `loc` and `scale`, `[N]` or `[N, D]`, with `draws=True` a leading S."""
        mean = with_draws(as_floating(loc, "loc"), draws, 1, "loc")
        width = as_floating(scale, "scale").to(mean.device)
        if width.dim():
            width = with_draws(width, draws, 1, "scale")
            check_shape(width, mean.shape, "scale")
        return ContinuousPredictive(Normal(mean, width.expand(mean.shape), validate_args=False), exact=not draws)

    def icdf(self, value: object) -> Tensor:
        """Return the quantile at `value`, a number in [0, 1] or one for every element, in the target's unit.

        The root of the mixture's cdf, to about 1e-12 relative in float64; minus infinity at 0, infinity at 1.
        """

        def quantile(part: Distribution, q: Tensor) -> Tensor:
            inner = q.clamp(torch.finfo(q.dtype).tiny, 1 - torch.finfo(q.dtype).eps)
            centre, width = location_and_scale(part)
            axes = (0, -1) if centre.dim() > q.dim() + 1 else (0,)

            def excess(x: Tensor) -> Tensor:
                return self._cdf(part, x) - inner

            ends = bracket(excess, (centre - width).amin(axes), (centre + width).amax(axes))
            root = find_root(excess, *ends)
            return torch.where(q == 0, -torch.inf, torch.where(q == 1, torch.inf, root))

        with torch.no_grad():
            return self._by_example(quantile, self._levels(value))

    def crps(self, value: object) -> Tensor:
        """Return the continuous ranked probability score of targets `[N, ...]`, in their unit; smaller is better.

        Exact for mixtures of Gaussians (and mixture densities of them); otherwise integrated numerically to about 1e-8.

        References:
            Gneiting and Raftery, 2007, JASA, equation 21; Grimit, Gneiting, Berrocal, Johnson, 2006, QJRMS, equation 5.
        """
        y = self._target(value)
        if gaussian_parts(self._component, self.weights) is not None:
            return self._by_example(self._gaussian_crps, y)
        return self._by_example(lambda part, x: quadrature_crps(part, self.weights, x), y, cost=2000)

    def _gaussian_crps(self, part: Distribution, y: Tensor) -> Tensor:
        parts = gaussian_parts(part, self.weights)
        assert parts is not None
        share, loc, scale = parts
        spread = share.square() * scale / math.sqrt(math.pi)
        score = (share * expected_distance(y - loc, scale)).sum(0) - spread.sum(0)
        for i in range(loc.shape[0] - 1):  # pairs, a row at a time: memory stays that of the parameters
            both = torch.hypot(scale[i], scale[i + 1 :])
            score = score - (share[i] * share[i + 1 :] * expected_distance(loc[i] - loc[i + 1 :], both)).sum(0)
        return score

    def entropy(self) -> Tensor:
        """Return the differential entropy `[N, ...]` in nats: closed form for one draw, else integrated to 1e-7."""
        if self.num_samples == 1 and not isinstance(self._component, MixtureSameFamily):
            return self._by_example(lambda part: part.entropy()[0])
        return self._by_example(lambda part: quadrature_entropy(part, self.weights), cost=2000)


def expected_distance(offset: Tensor, scale: Tensor) -> Tensor:
    """Return E|offset + scale Z| for a standard Gaussian Z."""
    z = offset / scale
    return offset * torch.special.erf(z / math.sqrt(2)) + scale * math.sqrt(2 / math.pi) * (-z.square() / 2).exp()
