"""Calibration of predictions of real numbers: one factor on their scales, and a map of their cdf."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints

from bayesguard.calibration.base import Calibrator
from bayesguard.calibration.binning import size_like_saved
from bayesguard.checks import check_count, check_level
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.predictive import ContinuousPredictive, Decomposition, Predictive, quadrature
from bayesguard.predictive.components import component_cdf, gaussian_parts, parameters
from bayesguard.predictive.groups import Groups, variance_between
from bayesguard.predictive.numerics import BUDGET, as_given, wide
from bayesguard.predictive.quadrature import Panels

_BOUND = 1e4  # of a factor and its inverse: beyond it the unit of the targets is another one
_GRID = 65
_GOLDEN = (math.sqrt(5) - 1) / 2
_STEP = 1e-3  # of log factor, for the second derivative

_FAR = 1e-12  # of mass: a cdf nearer to 1 has no digits left to be told from it
_LOOSE = 1e-3  # relative error of the mass of a piece, which may be as small as _FAR
_HEAVIEST = 1e-6  # share of a moment that may lie in the outermost panel of its integral


class VarianceScaling(Calibrator):
    """Multiply the scale of every component by one factor, fitted to the likelihood of the pooled predictive.

    The factor minimises the mean of `-log sum_s w_s p(y; loc_s, factor scale_s)`, in the target's unit. Of one Gaussian
    draw it is the root mean square of `(y - loc) / scale`; otherwise it is searched between 1e-4 and 1e4 by golden
    section, on a grid first, and never scores worse than 1 on the data it was fitted to. Where the best is at a bound,
    a `CalibrationWarning` says so. The spread of the draws' locations, which is epistemic, stays what it is.

    For a `ContinuousPredictive` with components that have `loc` and `scale` (Normal, Laplace, StudentT, mixture
    densities of them), of one output or several: one factor for all.

    Attributes:
        factor: A tensor without axes; above 1 if the predictions were over-confident.
        diagnostics: `nll_before` and `nll_after` (nats, mean), `at_bound`, `num_examples`, `standard_error` (of the
            factor, by the observed information).

    References:
        Laves, Ihler, Fast, Kahrs, Ortmaier, 2020, MIDL, section 2.3; Levi, Gispan, Giladi, Fetaya, 2022, Sensors 22.

    Examples:
        >>> pred = Predictive.from_normal([0.0, 0.0], 1.0)
        >>> scaling = VarianceScaling().fit(pred, torch.tensor([2.0, -2.0]))
        >>> scaling(pred).stddev
        tensor([2., 2.])
    """

    acts_on = "draws"
    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        # float32, which every device has; the likelihood is flat to second order in the error of 1e-7.
        self.register_buffer("factor", torch.ones((), dtype=torch.float32, device="cpu"))

    def _calibrate(self, pred: Predictive) -> Predictive:
        return _scaled(_with_scales(pred), float(self.factor))

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        pred = _widened(_with_scales(pred))
        y = pred._target(targets, "targets")
        nll = _nll_of(pred, y)
        component = pred.component
        if pred.num_samples == 1 and isinstance(component, Normal):
            found = float(((y - component.loc[0]) / component.scale[0]).square().mean().sqrt())
            found = min(max(found, 1 / _BOUND), _BOUND)
        else:
            found = _search(pred, y)
        at_bound = min(found * _BOUND, _BOUND / found) < 1 + 1e-5
        if at_bound:
            _warn(
                f"the factor stopped at the bound of its range, {found:.4g}; are targets and predictions in one order "
                "and one unit, or is every target predicted exactly?"
            )
        self.factor = self.factor.new_tensor(found)
        before, after = nll(1.0), nll(float(self.factor))
        if after > before:
            self.factor, at_bound, after = self.factor.new_tensor(1.0), False, before
        self.diagnostics = {
            "nll_before": before,
            "nll_after": after,
            "at_bound": at_bound,
            "num_examples": y.numel(),
            "standard_error": _standard_error(nll, float(self.factor), y.numel()),
        }

    def extra_repr(self) -> str:
        return f"factor={float(self.factor):.4g}" if self.fitted else "not fitted"


def _with_scales(pred: Predictive) -> ContinuousPredictive:
    if isinstance(pred, ContinuousPredictive):
        names = {name.removeprefix("inner_") for name in parameters(pred.component)}
        if names >= {"loc", "scale"}:
            return pred
    kind = type(pred.component).__name__ if isinstance(pred, ContinuousPredictive) else type(pred).__name__
    raise BadType(
        f"VarianceScaling is for components with loc and scale (Normal, Laplace, StudentT), got a {kind}; "
        "for classification use TemperatureScaling, for other real predictions CDFCalibration"
    )


def _scaled(pred: ContinuousPredictive, factor: float) -> ContinuousPredictive:
    named = parameters(pred.component).items()
    scales = ("scale", "inner_scale")
    # A Python number keeps the dtype and the device.
    return pred._rebuild([value * factor if name in scales else value for name, value in named])


def _widened(pred: ContinuousPredictive) -> ContinuousPredictive:
    return pred if pred.device.type == "mps" else pred.to(torch.float64)


def _nll_of(pred: ContinuousPredictive, y: Tensor) -> Callable[[float], float]:
    return lambda factor: -float(_scaled(pred, factor).log_prob(y).mean())


def _search(pred: ContinuousPredictive, y: Tensor) -> float:
    """The factor of the smallest NLL: the deepest basin of a grid, then golden section on its logarithm.

    Evenly spaced rows are enough to tell basins apart where there are very many.
    """
    step = max(1, math.ceil(y.numel() * pred.num_samples / (BUDGET // 8)))
    sample, nll = _nll_of(pred[::step], y[::step]), _nll_of(pred, y)
    end = math.log(_BOUND)
    grid = [end * (2 * place / (_GRID - 1) - 1) for place in range(_GRID)]
    scores = [sample(math.exp(at)) for at in grid]
    best = min(range(_GRID), key=scores.__getitem__)
    lower, upper = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    left, right = upper - _GOLDEN * (upper - lower), lower + _GOLDEN * (upper - lower)
    at_left, at_right = nll(math.exp(left)), nll(math.exp(right))
    while upper - lower > 1e-8:
        if at_left <= at_right:
            upper, right, at_right = right, left, at_left
            left = upper - _GOLDEN * (upper - lower)
            at_left = nll(math.exp(left))
        else:
            lower, left, at_left = left, right, at_right
            right = lower + _GOLDEN * (upper - lower)
            at_right = nll(math.exp(right))
    return math.exp((lower + upper) / 2)


def _standard_error(nll: Callable[[float], float], factor: float, count: int) -> float:
    second = nll(factor * math.exp(_STEP)) - 2 * nll(factor) + nll(factor * math.exp(-_STEP))
    information = count * second / _STEP**2
    return factor / math.sqrt(information) if information > 0 else math.inf


def _warn(message: str) -> None:
    warnings.warn(message, CalibrationWarning, stacklevel=4)


class CDFCalibration(Calibrator):
    """Map the cdf of the pooled predictive so that its quantiles hold what they promise.

    The map R is that of the held-out PIT values `F(y)`: at the k-th smallest of n it is k / (n + 1) (equal values: the
    mean of their ranks, which is the isotonic fit), linear between, 0 at 0 and 1 at 1, with the identity mixed in as
    one example, `(n R(u) + u) / (n + 1)`, so that it increases everywhere. The result is a `RecalibratedPredictive` with
    a density, `f(y) R'(F(y))`.

    R has knots at some of those points only. With all of them its slopes would be those of single gaps between examples:
    the quantiles are hardly better, but the density costs about 0.42 nats an example, however many examples there are.
    Knots are put at `num_knots` ranks of equal distance, and in both tails at ranks 1, 2, 4, ...

    Where more than 1 % of the targets lie so far out that `F(y)` is within 1e-12 of 0 or 1, the map knows nothing of
    them but their number, and a `CalibrationWarning` says so: fit `VarianceScaling` first.

    For a `ContinuousPredictive`; all outputs share one map, which is the same for every example.

    Args:
        num_knots: Knots of equal mass; None for `2 n^(1/3)`, where the errors of a slope, by its width and by its
            number of examples, balance.

    Attributes:
        knots, levels: u and R(u) at the knots, 0 and 1 among them, each `[J]`.
        diagnostics: `nll_before` and `nll_after` (nats, mean), `num_examples`, `num_knots` (between 0 and 1), `num_far`
            (targets within 1e-12 of 0 or 1), `largest_gap` (largest |R(u) - u| over the knots).

    References:
        Kuleshov, Fenner, Ermon, 2018, ICML, algorithm 1.

    Examples:
        >>> pred = Predictive.from_normal(torch.zeros(3), 1.0)
        >>> calibration = CDFCalibration().fit(pred, torch.tensor([1.0, 2.0, 3.0]))
        >>> calibration(pred).cdf(2.0)  # the second of three: (3 * 2/4 + 0.9772) / 4
        tensor([0.6193, 0.6193, 0.6193])
    """

    acts_on = "pooled"
    knots: Tensor
    levels: Tensor

    def __init__(self, num_knots: int | None = None) -> None:
        super().__init__()
        self.num_knots = None if num_knots is None else check_count(num_knots, "num_knots")
        for name in ("knots", "levels"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64, device="cpu"))

    def _calibrate(self, pred: Predictive) -> Predictive:
        base = _with_density(pred)
        # A fitted module that was moved to float32 may have lost the difference of two knots.
        knots, levels = _strictly_increasing(self.knots, self.levels)
        return RecalibratedPredictive(base, knots, levels)

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        base = _with_density(pred)
        y = base._target(targets, "targets")
        pit = _widened(base).cdf(y).flatten()
        far = int((torch.minimum(pit, 1 - pit) < _FAR).sum())
        if far > 0.01 * len(pit):
            _warn_far(far, len(pit))
        knots, levels = _map_of(pit, self.num_knots)
        self.knots, self.levels = (each.to(self.is_fitted.device) for each in (knots, levels))
        self.diagnostics = {
            "nll_before": -float(wide(base.log_prob(targets)).mean()),
            "nll_after": -float(wide(self._calibrate(base).log_prob(targets)).mean()),
            "num_examples": len(pit),
            "num_knots": len(knots) - 2,
            "num_far": far,
            "largest_gap": float((levels - knots).abs().max()),
        }

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        size_like_saved(self, ("knots", "levels"), state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"num_knots={len(self.knots) - 2}" if self.fitted else "not fitted"


def _with_density(pred: Predictive) -> ContinuousPredictive:
    if isinstance(pred, ContinuousPredictive):
        return pred
    hint = "it was recalibrated already" if isinstance(pred, RecalibratedPredictive) else "it needs a continuous cdf"
    raise BadType(
        f"CDFCalibration is for a ContinuousPredictive, got a {type(pred).__name__}; {hint}. "
        "For classification use IsotonicCalibration or TemperatureScaling"
    )


def _map_of(pit: Tensor, num_knots: int | None) -> tuple[Tensor, Tensor]:
    """Knots and levels of the map of PIT values `[n]`, 0 and 1 among them."""
    count = len(pit)
    points, ties = pit.unique(return_counts=True)
    last = ties.cumsum(0)
    levels = (last - (ties - 1).to(pit) / 2) / (count + 1)
    rows = torch.searchsorted(last, _ranks(count, num_knots).to(last.device)).unique()
    rows = rows[torch.minimum(points[rows], 1 - points[rows]) >= _FAR]
    ends = points.new_tensor([0.0, 1.0])
    knots, levels = (torch.cat([ends[:1], each[rows], ends[1:]]) for each in (points, levels))
    return _strictly_increasing(knots, (count * levels + knots) / (count + 1))


def _ranks(count: int, num_knots: int | None) -> Tensor:
    """The ranks, among 1..count, at which there are knots: of equal distance, and doubling in the tails."""
    knots = math.ceil(2 * count ** (1 / 3)) if num_knots is None else num_knots
    if knots >= count:
        return torch.arange(1, count + 1)
    width = (count + 1) / (knots + 1)
    even = {round(place * width) for place in range(1, knots + 1)}
    tails = [2**power for power in range(count.bit_length()) if 2**power < width]
    return torch.tensor(sorted({*even, *tails, *(count + 1 - rank for rank in tails)}))


def _strictly_increasing(knots: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Without the knots after which one of the two does not increase."""
    grows = (knots.diff() > 0) & (levels.diff() > 0)
    kept = torch.cat([grows, grows.new_ones(1)])
    return knots[kept], levels[kept]


def _warn_far(count: int, total: int) -> None:
    warnings.warn(
        f"{count} of {total} targets lie so far out that their predicted cdf is 0 or 1 in float64, and the map can say "
        "nothing of how far; fit VarianceScaling first, then CDFCalibration to what it returns",
        CalibrationWarning,
        stacklevel=4,
    )


class RecalibratedPredictive(Predictive):
    """A real predictive whose cdf F was mapped to R(F), R increasing and piecewise linear.

    `cdf`, `icdf`, `interval` and `log_prob` are as exact as those of the predictive that was mapped. `mean`, `variance`,
    `crps`, `entropy` and `standard_error` are integrated numerically on panels that end at the knots, to about 1e-7
    (refused where the tails are too heavy for it, as those of Student's t with about two degrees of freedom are for the
    variance); they cost one quantile of the mixture a knot, and about 2,000 densities, for every element.

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
        base = _with_density(base)
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
        return _widened(self._base)

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

    @cached_property
    def _knot_values(self) -> Tensor:
        """Quantiles of the mixture at the knots between 0 and 1, float64 `[N, ..., J - 2]`."""
        inner = [self._wide.icdf(knot) for knot in self._knots[1:-1].tolist()]
        return torch.stack(inner, -1) if inner else wide(self._base._tensor.new_empty((*self.batch_shape, 0)))

    def _integrated(self, compute: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """`compute(integral of some examples, *values of them)` for all, in float64 and bounded memory."""

        def part(component: Distribution, ends: Tensor, *some: Tensor) -> Tensor:
            return compute(self._integral(component, ends.movedim(-1, 0), *some), *some)

        with torch.no_grad():
            cost = 2000 + 8 * len(self._knots)
            return self._wide._by_example(part, self._knot_values, *values, cost=cost)

    def _integral(self, component: Distribution, ends: Tensor, value: Tensor | None = None) -> _Integral:
        """The density on panels that end at the knots (and at `value`), fine enough that the mixture's is one in all."""
        endless = gaussian_parts(component, self.weights) is None
        for limit, doublings in quadrature._LADDER:
            # One doubling more: the map may lift what lies beyond 8 widths.
            cuts = quadrature._thinned(quadrature._all_cuts(component, doublings + 1), limit)
            points = torch.cat([cuts, ends]).sort(0).values
            panels = quadrature._evaluate(component, self.weights, points, value)
            centres = (panels.cuts[1:] + panels.cuts[:-1]).movedim(0, -1).contiguous() / 2
            place = torch.searchsorted(ends.movedim(0, -1).contiguous(), centres, right=True).movedim(-1, 0)
            mass = _by_panel(panels.density, panels)
            pieces = mass.new_zeros(len(self._slopes), *mass.shape[1:]).scatter_add(0, place, mass)
            if ((mass.sum(0) - 1).abs() < quadrature._TOLERANCE).all() and self._holds(pieces):
                # Not the slopes of the map: next to 1 a knot's quantile is known to fewer digits than its mass.
                slopes = (_column(self._levels.diff(), pieces) / pieces).gather(0, place)
                density = panels.density * slopes.unsqueeze(1)
                return _Integral(component, panels._replace(density=density), slopes, endless)
        raise BadInput(quadrature._TOO_HEAVY)

    def _holds(self, pieces: Tensor) -> bool:
        """Whether the mixture's masses `[J - 1, N, ...]` between the knots are what they should be, nearly."""
        return bool((pieces / _column(self._knots.diff(), pieces) - 1).abs().lt(_LOOSE).all())

    @cached_property
    def _moments(self) -> Tensor:
        """Mean, variance, and what shares of them lie in the outermost panels, float64 `[N, ..., 4]`."""
        return self._integrated(lambda integral: integral.moments())

    def _moment(self, which: int) -> Tensor:
        # Tails are those of the mixture up to a factor: what it does not have, the map does not give.
        given = (self._wide.mean, self._wide.variance)[which]
        known = given.isfinite()
        if (self._moments[..., 2 + which][known] > _HEAVIEST).any():
            raise BadInput(quadrature._TOO_HEAVY)
        return torch.where(known, self._moments[..., which], given).to(self.dtype)

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
        spread = self._integrated(
            lambda each: variance_between(each.influence(self.weights), self.weights, self.groups)
        )
        return self._standard_error(spread).to(self.dtype)

    def crps(self, value: object) -> Tensor:
        """Return the continuous ranked probability score of targets `[N, ...]`, in their unit; smaller is better.

        The integral of (R(F(x)) - 1{x >= y})^2, to about 1e-7 of itself.
        """
        y = self._base._target(value)
        return self._integrated(lambda integral, some: integral.crps(some), y).to(self.dtype)

    def entropy(self) -> Tensor:
        """Return the differential entropy `[N, ...]` in nats."""
        return self._integrated(lambda integral: integral.entropy()).to(self.dtype)


class _Integral(NamedTuple):
    """A recalibrated density on panels, and the slope of its map on each."""

    component: Distribution
    panels: Panels
    slopes: Tensor  # [P, N, ...]
    endless: bool  # whether the tails may go on beyond the panels

    @property
    def nodes(self) -> Tensor:
        """Where the density is known, `[P, Q, N, ...]`."""
        cuts, half = self.panels.cuts, self.panels.half_widths
        places = half.new_tensor(quadrature._rule()[0]).reshape(1, -1, *[1] * (half.dim() - 1))
        return (cuts[:-1] + half).unsqueeze(1) + half.unsqueeze(1) * places

    def by_panel(self, integrand: Tensor) -> Tensor:
        return _by_panel(integrand, self.panels)

    def over(self, value: Tensor) -> Tensor:
        """The expectation of `value` `[P, Q, N, ...]`."""
        return self.by_panel(value * self.panels.density).sum(0)

    def moments(self) -> Tensor:
        """Mean, variance, and the shares of their integrals in the outermost panels, on a last axis."""
        # From the middle, not from 0: an error of the mass would move a mean that is far from 0.
        middle = self.panels.cuts[len(self.panels.cuts) // 2]
        offset = self.nodes - middle
        shift = self.over(offset)
        parts = [self.by_panel(value * self.panels.density) for value in (offset.abs(), (offset - shift).square())]
        outermost = [self.outermost(part[0] + part[-1], part.sum(0)) for part in parts]
        return torch.stack([middle + shift, parts[1].sum(0), *outermost], -1)

    def outermost(self, part: Tensor, total: Tensor) -> Tensor:
        """The share of the outermost panels, as a measure of what lies beyond them."""
        return part / total if self.endless else torch.zeros_like(total)

    def entropy(self) -> Tensor:
        return self.by_panel(torch.special.entr(self.panels.density)).sum(0)

    def influence(self, weights: Tensor) -> Tensor:
        """How far every draw moves the mean, `[S, N, ...]`."""
        nodes = self.nodes
        below = component_cdf(self.component, nodes.flatten(0, 1).unsqueeze(1))
        gap = below - torch.tensordot(below.movedim(1, -1), weights, dims=1).unsqueeze(1)
        gap = gap.unflatten(0, nodes.shape[:2]).movedim(2, 0)  # [S, P, Q, N, ...]
        return -torch.stack([(self.by_panel(each) * self.slopes).sum(0) for each in gap])

    def crps(self, value: Tensor) -> Tensor:
        """Score targets `[N, ...]` at which a panel ends, as `quadrature_crps` does."""
        cuts, half, density = self.panels
        running = density.new_tensor(quadrature._rule()[2])
        inside = torch.einsum("ij,pj...->pi...", running, density) * half.unsqueeze(1)
        mass = self.by_panel(density)
        # Each tail is summed from its own end: one minus the other would be lost on the wide panels.
        below = (mass.cumsum(0) - mass).unsqueeze(1) + inside
        above = mass.flip(0).cumsum(0).flip(0).unsqueeze(1) - inside
        left = (cuts[1:] <= value).unsqueeze(1)
        scores = self.by_panel(torch.where(left, below, above).square())
        ends = torch.where(left[0, 0], scores[0], 0.0) + torch.where(left[-1, 0], 0.0, scores[-1])
        if (self.outermost(ends, scores.sum(0)) > quadrature._TOLERANCE).any():
            raise BadInput(quadrature._TOO_HEAVY)
        return scores.sum(0)


def _by_panel(integrand: Tensor, panels: Panels) -> Tensor:
    """The integrals `[P, ...]` over the panels of what is `[P, Q, ...]` at their nodes."""
    gauss = integrand.new_tensor(quadrature._rule()[1])
    return torch.einsum("i,pi...->p...", gauss, integrand) * panels.half_widths


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))


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
