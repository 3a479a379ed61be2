"""Calibration of pooled class probabilities by a smooth increasing function of the log-odds: spline calibration."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.calibration.class_maps import ClassMaps
from bayesguard.checks import check_count
from bayesguard.errors import CalibrationWarning
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive
from bayesguard.predictive.numerics import in_slices, wide

_PENALTIES = (1e2, 10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # the first leaves a line
_MOST_ODDS = 36.0  # log-odds at which float64 cannot tell a probability from 1
_STEPS = 100
_TOLERANCE = 1e-9  # nats that a last step is worth: the one after it would be worth about their square
_ROUNDING = 1e-14  # of the loss, in nats


class SplineCalibration(ClassMaps):
    """Replace the log-odds z of every probability by f(z), an increasing natural cubic spline fitted by likelihood.

    f minimises the mean of `-log P(y)` in nats, with P(true) = `sigmoid(f(z))`, plus `c * integral of f''(z)^2`: between
    the knots it bends no more than the answers ask for, beyond them it is a line. The larger c, the straighter f; an
    infinite one leaves a line, which is Platt's map. c is that of nine with the smallest Akaike criterion (the mean NLL
    plus the effective number of parameters over M) among those where f never falls, so that the order of probabilities
    is kept. If even the line falls, f is constant and a `CalibrationWarning` says so. The distance from doing nothing,
    averaged over the knots, costs as much as one example of M, so that there is a best f for separable answers, too.

    Several classes: each class has a function of its own, one against the rest, and the K results are divided by their
    sum, which may change their order within an example. `keep_labels=True` maps the confidence instead, the probability
    of the most probable class (one function for all classes): the others keep the ratios among themselves, and the most
    probable class stays the most probable, which holds the confidence above that of the runner-up whatever f says. Yes
    or no: `[N]` has one function, `[N, ..., L]` one for each of the L labels of the last axis.

    So that no answer is impossible or sure, the uniform distribution is mixed in as one example of the M that were fitted
    to: `(M v + 1/K) / (M + 1)`. (With `keep_labels=True` a class that the predictive rules out stays so.) The map acts
    on the mixture, and its answer has one draw: what the draws disagreed about is gone.

    Why not the splines of Gupta et al. (2021, ICLR), which fit the cumulative accuracy and take its slope: that slope may
    fall, and may leave 0 to 1.

    Args:
        num_knots: The most knots of a function, at quantiles of the log-odds; ties may leave fewer.
        keep_labels: Whether the most probable class stays the most probable.

    Attributes:
        points: Knots, log-odds `[C, P]`.
        values: f at the knots, log-odds `[C, P]`; with the knots, all of f.
        diagnostics: `nll_before` and `nll_after` (nats, mean), `num_examples`, `num_values` (knots of the function with
            the fewest), `num_one_sided` (functions that saw one outcome only).

    Raises:
        BadInput: In `fit` and the call: targets or classes that do not fit the predictions.
        BadType: Predictives of numbers.

    References:
        Lucena, 2018, arXiv:1809.07751 (splines of the log-odds by penalised logistic regression); Green and Silverman,
        1994, Nonparametric regression and generalized linear models, sections 2.1 to 2.3 and 5.3 (the penalty).

    Examples:
        >>> from bayesguard.predictive import Predictive
        >>> generator = torch.Generator().manual_seed(0)
        >>> probs = torch.rand(4000, generator=generator)
        >>> answers = torch.rand(4000, generator=generator) < probs**2
        >>> spline = SplineCalibration().fit(Predictive.from_probs(probs), answers)
        >>> bool((spline(Predictive.from_probs(probs)).probs - probs**2).abs().mean() < 0.015)
        True
    """

    num_fitted: Tensor

    def __init__(self, num_knots: int = 10, *, keep_labels: bool = False) -> None:
        super().__init__(keep_labels)
        self.num_knots = check_count(num_knots, "num_knots", minimum=2)
        self.register_buffer("num_fitted", torch.zeros((), dtype=torch.long, device="cpu"))

    def _scores(self, pred: CategoricalPredictive | BernoulliPredictive) -> Tensor:
        """Log-odds from the logits: the rounding of probabilities near 1 would tie them."""
        logits, labels = pred.logits.detach(), pred.labels

        def part(rows: slice) -> Tensor:
            odds = wide(logits[rows])
            if isinstance(pred, CategoricalPredictive):
                log_probs = odds.log_softmax(-1)
                if self.keep_labels:
                    log_probs = log_probs.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
                odds = log_probs - (-torch.expm1(log_probs)).log()
            elif self.keep_labels:
                odds = odds.abs()
            return odds.clamp(-_MOST_ODDS, _MOST_ODDS).to(pred.dtype)

        return in_slices(part, len(pred), 4 * logits[:1].numel())

    def _fit_map(self, scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        self.num_fitted = self.num_fitted.new_tensor(len(scores))
        knots = _knots(scores, self.num_knots)
        return knots, _best_values(knots, scores, hits.to(scores))

    def _with_uniform(self, values: Tensor, count: int, num_classes: int) -> Tensor:
        return values  # these are log-odds; see `_mapped`

    def _mapped(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        columns = []
        for knots, values, column in zip(self.points.to(scores), self.values.to(scores), scores.T, strict=True):
            real = knots.isfinite()
            columns.append(spline(knots[real], values[real], column).sigmoid())
        count = int(self.num_fitted)
        return (count * torch.stack(columns, -1) + 1 / int(self.num_classes)) / (count + 1)

    def extra_repr(self) -> str:
        return f"num_knots={self.num_knots}, {super().extra_repr()}"


def spline(knots: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """Return the natural cubic spline through `values` `[P]` at rising `knots` `[P]`, at `places` `[M]`; lines outside."""
    weights, curved = _parts(knots, places)
    return weights @ values + curved @ (_curvature(knots)[0] @ values)


def least_slope(knots: Tensor, values: Tensor) -> float:
    """Return the smallest slope of the natural cubic spline through `values` at `knots`, exactly."""
    width = knots.diff()
    bend = F.pad(_curvature(knots)[0] @ values, (1, 1))
    left, right = bend[:-1], bend[1:]
    start = values.diff() / width - width / 6 * (2 * left + right)
    ends = torch.cat([start, start + width * (left + right) / 2])
    # Where f'' crosses zero upwards within an interval, f' is least there.
    valley = (left < 0) & (right > 0)
    rise = (right - left).where(valley, torch.ones_like(left))
    inside = (start - left.square() * width / (2 * rise)).where(valley, torch.full_like(start, torch.inf))
    return float(torch.cat([ends, inside]).min())


def penalty_root(knots: Tensor) -> Tensor:
    """Return B `[P - 2, P]`, `|B g|^2` the integral of the squared second derivative of the spline through g.

    A root, because the sum of squares keeps its digits near a line, where the quadratic form would cancel.
    """
    bend, band = _curvature(knots)
    return torch.linalg.cholesky(band).T @ bend


def _curvature(knots: Tensor) -> tuple[Tensor, Tensor]:
    """Return `R^-1 Q^T` `[P - 2, P]`, which gives second derivatives at the inner knots, and R `[P - 2, P - 2]`."""
    width, inner = knots.diff(), max(len(knots) - 2, 0)
    divided = knots.new_zeros(len(knots), inner)
    rows = torch.arange(inner, device=knots.device)
    divided[rows, rows] = 1 / width[:inner]
    divided[rows + 2, rows] = 1 / width[1:][:inner]
    divided[rows + 1, rows] = -(1 / width[:inner] + 1 / width[1:][:inner])
    band = torch.diag((width[:inner] + width[1:][:inner]) / 3)
    if inner > 1:
        side = width[1:inner] / 6
        band = band + torch.diag(side, 1) + torch.diag(side, -1)
    return torch.linalg.solve(band, divided.T), band


def _parts(knots: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors `[M, P]` of the values at the knots and those `[M, P - 2]` of the second derivatives there."""
    at = (torch.searchsorted(knots, places.contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
    width = knots.diff()[at]
    after, before = places - knots[at], knots[at + 1] - places
    weights = places.new_zeros(len(places), len(knots))
    weights.scatter_(1, at.unsqueeze(-1), (before / width).unsqueeze(-1))
    weights.scatter_(1, at.unsqueeze(-1) + 1, (after / width).unsqueeze(-1))
    # Beyond an outermost knot the line with its slope there; its own second derivative is zero, and left out.
    left = torch.where(before < 0, -before * width, -after * before * (1 + before / width)) / 6
    right = torch.where(after < 0, -after * width, -after * before * (1 + after / width)) / 6
    curved = torch.zeros_like(weights)
    curved.scatter_(1, at.unsqueeze(-1), left.unsqueeze(-1))
    curved.scatter_(1, at.unsqueeze(-1) + 1, right.unsqueeze(-1))
    return weights, curved[:, 1:-1]


def _knots(scores: Tensor, most: int) -> Tensor:
    """Quantiles of the scores, in the middle of equal shares."""
    levels = (torch.arange(most, dtype=scores.dtype, device=scores.device) + 0.5) / most
    ordered = scores.sort().values
    knots = ordered[(levels * len(scores)).long()].unique()
    if len(knots) == 1:
        # A line, whose slope is one if all scores are equal.
        knots = torch.cat([knots, knots + 1])
    return knots


def _best_values(knots: Tensor, scores: Tensor, hits: Tensor) -> Tensor:
    """Values at the knots of the increasing spline with the best criterion."""
    weights, curved = _parts(knots, scores)
    design = weights + curved @ _curvature(knots)[0]
    root = penalty_root(knots) * (knots[-1] - knots[0]) ** 1.5  # as if the knots went from 0 to 1
    values, best, found = knots, torch.inf, None
    for penalty in _PENALTIES:
        values, criterion = penalised_fit(design, hits, penalty**0.5 * root, knots, values)
        if criterion < best and least_slope(knots, values) >= 0:
            best, found = criterion, values
    if found is not None:
        return found
    warnings.warn(
        "probabilities are lower where the answers are true, and no increasing map helps: every probability becomes "
        "their rate. Are the targets in the order of the predictions?",
        CalibrationWarning,
        stacklevel=6,
    )
    return ((hits.sum() + 0.5) / (len(hits) + 1)).logit().expand(len(knots))


def penalised_fit(design: Tensor, hits: Tensor, root: Tensor, knots: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """Return values g `[P]` at the knots of the smallest penalised NLL, and Akaike's criterion, by Newton steps.

    The NLL is the mean of that of `hits` `[M]` at log-odds `design @ g`; the penalties are `|root g|^2 / 2`, and half the
    mean squared distance of g from the knots over M.
    """
    count = len(hits)
    pull = 1 / (count * len(knots))
    ridge = root.T @ root + pull * torch.eye(len(knots), dtype=root.dtype, device=root.device)

    def objective(values: Tensor) -> tuple[float, float, Tensor]:
        odds, away = design @ values, values - knots
        nll = F.binary_cross_entropy_with_logits(odds, hits)
        cost = (root @ away).square().sum() + pull * away.square().sum()
        return float(nll), float(nll + cost / 2), odds.sigmoid()

    values = start
    nll, loss, probs = objective(values)
    for _ in range(_STEPS):
        curve = design.T @ (design * (probs * (1 - probs)).unsqueeze(-1)) / count
        slope = design.T @ (probs - hits) / count + ridge @ (values - knots)
        step = torch.linalg.solve(curve + ridge, slope)
        size = 1.0
        while size > 1e-6:
            moved = values - size * step
            after = objective(moved)
            if after[1] <= loss + _ROUNDING:
                break
            size /= 2
        else:
            break
        values, (nll, loss, probs) = moved, after
        if float(slope @ step) < _TOLERANCE:
            break
    parameters = torch.linalg.solve(curve + ridge, curve).trace()
    return values, nll + float(parameters) / count
