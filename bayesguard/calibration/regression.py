"""Calibration of predictions of real numbers: one factor on their scales, and a map of their cdf."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal

from bayesguard.calibration.base import Calibrator
from bayesguard.checks import check_count
from bayesguard.errors import BadType, CalibrationWarning
from bayesguard.looks import number
from bayesguard.predictive import ContinuousPredictive, Predictive, RecalibratedPredictive
from bayesguard.predictive.components import parameters
from bayesguard.predictive.numerics import BUDGET, wide

_BOUND = 1e4  # of a factor and its inverse: beyond it the unit of the targets is another one
_GRID = 65
_GOLDEN = (math.sqrt(5) - 1) / 2
_STEP = 1e-3  # of log factor, for the second derivative

_FAR = 1e-12  # of mass: a cdf nearer to 1 has no digits left to be told from it


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
        return _scaled(_with_scales(pred), number(self.factor, pred._tensor))

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


def _scaled(pred: ContinuousPredictive, factor: float | Tensor) -> ContinuousPredictive:
    named = parameters(pred.component).items()
    scales = ("scale", "inner_scale")
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
            (targets within 1e-12 of 0 or 1), `largest_gap` (largest `|R(u) - u|` over the knots).

    References:
        Kuleshov, Fenner, Ermon, 2018, ICML, algorithm 1.

    Examples:
        >>> pred = Predictive.from_normal(torch.zeros(3), 1.0)
        >>> calibration = CDFCalibration().fit(pred, torch.tensor([1.0, 2.0, 3.0]))
        >>> calibration(pred).cdf(2.0)  # the second of three: (3 * 2/4 + 0.9772) / 4
        tensor([0.6193, 0.6193, 0.6193])
    """

    acts_on = "pooled"
    sized_by_fit = ("knots", "levels")
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
