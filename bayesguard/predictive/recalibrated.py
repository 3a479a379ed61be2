"""A predictive of real numbers whose cdf was mapped, as by a calibrator."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, NoReturn, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from bayesguard.checks import check_level
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive.base import Decomposition, Predictive
from bayesguard.predictive.components import component_cdf, parameters
from bayesguard.predictive.continuous import ContinuousPredictive
from bayesguard.predictive.groups import Groups, variance_between
from bayesguard.predictive.numerics import BUDGET, as_given, wide
from bayesguard.predictive.quadrature import TOO_HEAVY, Panels, panels_of

_COST = 400  # elements of an intermediate for each parameter of an example
_CLOSE = 1e-8  # of the mass between two knots, in units of all mass
_LOOSE = 1e-3  # of it in its own unit, for it may be 1e-12
_HEAVIEST = 1e-6  # share of a moment that may lie in the outermost panels of its integral


class RecalibratedPredictive(Predictive):
    """A real predictive whose cdf F was mapped to R(F), R increasing and piecewise linear.

    `cdf`, `icdf`, `interval` and `log_prob` are as exact as those of the predictive that was mapped. `mean`, `variance`,
    `crps`, `entropy` and `standard_error` are integrated numerically on panels that end at the knots: mean and CRPS to
    1e-6 of a standard deviation, the variance to 1e-5 of itself. They cost about 400 densities of the mixture for every
    element, more where draws hardly overlap (the standard error 600 cdfs besides), and are refused where the tails are
    too heavy, as those of Student's t with about two degrees of freedom are for the variance.

    The map acts on the mixture: draws are gone, and all uncertainty counts as aleatoric. `num_samples`, `weights` and
    `groups` are those of the draws that the mixture was made of.

    Args:
        base: The predictive whose cdf is mapped.
        knots: u at the ends of the pieces, `[J]`, from 0 to 1, strictly increasing.
        levels: R(u) there, `[J]`, likewise.

    Raises:
        BadInput: Knots or levels that do not increase strictly from 0 to 1, or of different lengths.
        BadType: A predictive without a continuous cdf.

    Examples:
        >>> base = Predictive.from_normal([0.0], [1.0])
        >>> pred = RecalibratedPredictive(base, [0.0, 0.5, 1.0], [0.0, 0.8, 1.0])  # four of five lie below
        >>> pred.cdf(0.0), pred.icdf(0.8).abs()
        (tensor([0.8000]), tensor([0.]))
        >>> pred.mean  # 0.8 of a half-normal below, 0.2 of one above: -0.6 sqrt(2 / pi)
        tensor([-0.4787])
    """

    def __init__(self, base: Predictive, knots: object, levels: object) -> None:
        if not isinstance(base, ContinuousPredictive):
            raise BadType(
                f"base must be a ContinuousPredictive, got a {type(base).__name__}: it needs a continuous cdf"
            )
        checked = [_check_increasing(value, name, base) for value, name in ((knots, "knots"), (levels, "levels"))]
        if len(checked[0]) != len(checked[1]):
            raise BadInput(
                f"knots has {len(checked[0])} elements and levels {len(checked[1])}; each knot needs its level"
            )
        family = [type(base.component).__name__, *parameters(base.component)]
        content = b"".join(each.cpu().numpy().tobytes() for each in checked) + " ".join(family).encode()
        self._fill(base, checked[0], checked[1], zlib.crc32(content))

    def _fill(self, base: ContinuousPredictive, knots: Tensor, levels: Tensor, mark: int) -> Self:
        self._set(base.batch_shape, base.weights, base.exact, base.groups)
        self._base, self._knots, self._levels, self._mark = base, knots, levels, mark
        self._slopes = levels.diff() / knots.diff()
        return self

    def _tensors(self) -> list[Tensor]:
        # The mark goes with every example, so that examples under different maps cannot be joined unseen.
        marks = torch.full((1, len(self)), self._mark, dtype=torch.long, device=self._base.device)
        return [*self._base._tensors(), marks]

    def _refill(self, like: Self, tensors: list[Tensor], weights: Tensor, exact: bool, groups: Groups) -> Self:
        *parts, marks = tensors
        if (marks != like._mark).any():
            raise BadInput("predictives were recalibrated by different maps; only examples under one map can be joined")
        base = like._base._rebuild(parts, weights, exact, groups)
        knots, levels = (each.to(_like(base)) for each in (like._knots, like._levels))
        return self._fill(base, knots, levels, like._mark)

    @property
    def _example_axis(self) -> int:
        return 1  # as in the predictive that was mapped

    @property
    def has_draws(self) -> bool:
        """False: the draws cannot be had, and the map is not one of draws."""
        return False

    @property
    def support(self) -> constraints.Constraint:
        """The real line."""
        return constraints.real

    # -- densities and quantiles

    @cached_property
    def _wide(self) -> ContinuousPredictive:
        return self._base.to(_like(self._base).dtype)

    def log_prob(self, value: object) -> Tensor:
        """Return the log-density of targets `[N, ...]`, in nats; at a knot, that of the piece above it.

        Raises:
            BadInput: A shape other than exactly the batch shape, NaN or infinity.
        """
        y = self._base._target(value)
        place = _piece(self._wide.cdf(y), self._knots)
        return (self._wide.log_prob(y) + self._slopes[place].log()).to(self.dtype)

    def cdf(self, value: object) -> Tensor:
        """Return P(Y <= value); `value` is a number or has the batch shape."""
        points = self._wide.cdf(self._base._everywhere(value, "value"))
        return _interpolated(points, self._knots, self._levels).to(self.dtype)

    def icdf(self, value: object) -> Tensor:
        """Return the quantile at `value`, a number in [0, 1] or one for every element, in the target's unit.

        Minus infinity at 0, infinity at 1.
        """
        return self._quantile(self._base._levels(value)).to(self.dtype)

    def _quantile(self, levels: Tensor) -> Tensor:
        limits = torch.finfo(levels.dtype)
        inner = _interpolated(levels, self._levels, self._knots).clamp(limits.tiny, 1 - limits.eps / 2)
        return self._wide.icdf(torch.where((levels == 0) | (levels == 1), levels, inner))

    def _moved(self, value: Tensor) -> Tensor:
        """Samples of the mixture `[N, ...]` as samples of this: its cdf of them is uniform."""
        levels = self._wide.cdf(value)
        limits = torch.finfo(levels.dtype)  # a sample far out has a cdf of 1 in float64, and is not infinite
        return self._quantile(levels.clamp(limits.tiny, 1 - limits.eps / 2))

    def interval(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Return the central interval that holds `1 - alpha` of the mass: its lower and upper end, each `[N, ...]`."""
        check_level(alpha, "alpha")
        return self.icdf(alpha / 2), self.icdf(1 - alpha / 2)

    def _sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        # Samples of the mixture, moved: outputs of an example keep what they have in common.
        base, step = self._wide, max(1, BUDGET // max(1, self._wide._tensor.numel()))
        parts = []
        for some in base._sample(count, generator).split(step):
            # Repeated examples: one call finds the quantiles of several samples.
            rows = torch.arange(len(self), device=self.device).repeat(len(some))
            repeated = self._rebuild([tensor[:, rows] for tensor in self._tensors()])
            parts.append(repeated._moved(some.flatten(0, 1)).reshape(some.shape))
        return torch.cat(parts).to(self.dtype) if parts else self._base._tensor.new_empty((0, *self.batch_shape))

    def joint_log_prob(self, value: object) -> NoReturn:
        """The map is one of every output by itself."""
        raise BadType("a recalibrated predictive has no joint density of several outputs; use log_prob for each")

    # -- integrals

    def _integrated(self, compute: Callable[..., Tensor], value: Tensor | None = None) -> Tensor:
        """`compute(the density on panels, *value)` for all examples, in float64 and bounded memory."""

        def part(component: Distribution, *some: Tensor) -> Tensor:
            return compute(self._mapped(component, *some), *some)

        with torch.no_grad():
            return self._wide._by_example(part, *(() if value is None else (value,)), cost=_COST)

    def _mapped(self, component: Distribution, value: Tensor | None = None) -> _Mapped:
        """The density on panels that end at the knots (and at `value`)."""
        for panels in panels_of(component, self.weights, value, lifted=True):
            points = panels.quantiles(self._knots[1:-1])
            panels = panels.split(points)
            place = panels.places_among(points)
            pieces = panels.integrals(panels.density)
            pieces = pieces.new_zeros(len(points) + 1, *pieces.shape[1:]).scatter_add(0, place, pieces)
            # The points are only near the knots, and have levels of their own.
            below = torch.tensordot(component_cdf(component, points.unsqueeze(1)).movedim(1, -1), self.weights, dims=1)
            below = torch.cat([torch.zeros_like(pieces[:1]), below.clamp(0, 1), torch.ones_like(pieces[:1])])
            if _agree(pieces, below.diff(dim=0)):
                slopes = _interpolated(below, self._knots, self._levels).diff(dim=0)
                slopes = (slopes / pieces.clamp_min(torch.finfo(pieces.dtype).tiny)).gather(0, place)
                return _Mapped(component, panels._replace(density=panels.density * slopes.unsqueeze(1)), slopes)
        raise BadInput(TOO_HEAVY)

    @cached_property
    def _moments(self) -> Tensor:
        """Mean and variance, float64 `[N, ..., 2]`; NaN where the tails are too heavy for a number."""
        return self._integrated(lambda mapped: mapped.panels.moments(_HEAVIEST))

    def _moment(self, which: int) -> Tensor:
        # Tails are those of the mixture up to a factor: what it does not have, the map does not give.
        given = (self._wide.mean, self._wide.variance)[which]
        moment = torch.where(given.isfinite(), self._moments[..., which], given)
        if (moment.isnan() & given.isfinite()).any():
            raise BadInput(TOO_HEAVY)
        return moment.to(self.dtype)

    @property
    def mean(self) -> Tensor:
        """Mean `[N, ...]`, in the target's unit."""
        return self._moment(0)

    @property
    def variance(self) -> Tensor:
        """Variance `[N, ...]`, in the target's unit squared."""
        return self._moment(1)

    def uncertainty(self) -> Decomposition:
        """Return the variance `[N, ...]` as total and aleatoric, and an epistemic part of 0: the draws are gone."""
        total = self.variance
        return Decomposition(total, total, torch.zeros_like(total))

    @property
    def standard_error(self) -> Tensor:
        """Monte-Carlo standard error of the mean, `[N, ...]`: 0 if exact, infinite for one draw.

        To first order in the error of the mixture's cdf, with the map as it is: draw s moves the mean by minus the
        integral of `R'(F) (F_s - F)`. It is the error between groups of draws (`groups`), if there are such.
        """
        if self.exact or self.num_samples == 1:
            return self._standard_error(torch.zeros(self.batch_shape, dtype=self.dtype, device=self.device))
        spread = self._integrated(lambda mapped: variance_between(self._influence(mapped), self.weights, self.groups))
        return self._standard_error(spread).to(self.dtype)

    def _influence(self, mapped: _Mapped) -> Tensor:
        """How far every draw moves the mean, `[S, N, ...]`."""
        nodes = mapped.panels.nodes
        below = component_cdf(mapped.component, nodes.flatten(0, 1).unsqueeze(1))
        gap = below - torch.tensordot(below.movedim(1, -1), self.weights, dims=1).unsqueeze(1)
        gap = gap.unflatten(0, nodes.shape[:2]).movedim(2, 0)  # [S, P, Q, N, ...]
        return -torch.stack([(mapped.panels.integrals(each) * mapped.slopes).sum(0) for each in gap])

    def crps(self, value: object) -> Tensor:
        """Return the continuous ranked probability score of targets `[N, ...]`, in their unit; smaller is better.

        The integral of (R(F(x)) - 1{x >= y})^2, to 1e-6 of a standard deviation.
        """
        y = self._base._target(value)
        return self._integrated(lambda mapped, some: mapped.panels.crps(some), y).to(self.dtype)

    def entropy(self) -> Tensor:
        """Return the differential entropy `[N, ...]` in nats."""
        return self._integrated(lambda mapped: mapped.panels.entropy()).to(self.dtype)


class _Mapped(NamedTuple):
    """A recalibrated density on panels, and the slope of its map on each."""

    component: Distribution
    panels: Panels
    slopes: Tensor  # [P, N, ...]


def _agree(pieces: Tensor, wanted: Tensor) -> bool:
    """Whether masses `[J, N, ...]` by interpolation are those by the cdf, whose last digits are lost next to 1."""
    error = (pieces - wanted).abs()
    return bool(((error < _CLOSE) & (error < _LOOSE * wanted + 1e-15)).all())


def _check_increasing(value: object, name: str, base: ContinuousPredictive) -> Tensor:
    tensor = as_given(value, name).detach().to(_like(base))
    if tensor.dim() != 1 or len(tensor) < 2:
        raise BadInput(f"{name} has shape {tuple(tensor.shape)}; it must be [J] with at least the ends 0 and 1")
    if not (tensor[0] == 0 and tensor[-1] == 1 and (tensor.diff() > 0).all()):
        raise BadInput(
            f"{name} must increase strictly from 0 to 1, got {tensor[0]:g} to {tensor[-1]:g}{_stall(tensor)}"
        )
    return tensor


def _stall(values: Tensor) -> str:
    stalls = (~(values.diff() > 0)).nonzero()
    return f", with no increase after element {int(stalls[0])}" if len(stalls) else ""


def _like(base: ContinuousPredictive) -> Tensor:
    """An empty tensor on the predictive's device, in the widest dtype there."""
    return wide(base._tensor[:0])


def _piece(x: Tensor, ends: Tensor) -> Tensor:
    """The piece of a map that holds x; at an end between two, the upper one."""
    return (torch.searchsorted(ends, x.detach().contiguous(), right=True) - 1).clamp(0, len(ends) - 2)


def _interpolated(x: Tensor, points: Tensor, values: Tensor) -> Tensor:
    place = _piece(x, points)
    share = (x - points[place]) / (points[place + 1] - points[place])
    return torch.lerp(values[place], values[place + 1], share)
