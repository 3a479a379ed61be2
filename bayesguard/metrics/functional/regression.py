"""Scores of real predictions: errors, intervals, and whether quantiles hold what they promise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, bad_row, check_count, check_finite, check_level, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.functional.crps import crps_of
from bayesguard.metrics.functional.inputs import element_weights, paired, weighted_mean
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, CountPredictive, Predictive

LEVELS = tuple(step / 20 for step in range(1, 20))
_ROUNDING = 1e-6  # of a cdf in float32


def root_mean_squared_error(mean: object, targets: object, *, weights: object = None) -> Tensor:
    """Return the root mean squared error over all elements, in the target's unit.

    Args:
        mean: `[N]` or `[N, D]`.
        targets: Of exactly that shape.
        weights: How often each row counts, `[N]`; once if None.

    Returns:
        0-d float64 on the device of `mean`.

    Raises:
        BadInput: No rows, shapes that differ, NaN or infinity (with the row).

    Examples:
        >>> root_mean_squared_error([0.0, 0.0], [3.0, 4.0]).item()
        3.5355339059327378
    """
    predicted, truth = paired(mean, targets, "mean", "targets")
    return _mean((predicted - truth).square(), targets, weights).sqrt()


def continuous_ranked_probability_score(pred: Predictive, targets: object, *, weights: object = None) -> Tensor:
    """Return the mean CRPS over all elements, in the target's unit; of samples, the fair estimate.

    References:
        T. Gneiting, A. Raftery (2007). Strictly proper scoring rules, prediction, and estimation. JASA, eq. 20.

    Examples:
        >>> round(continuous_ranked_probability_score(Predictive.from_normal([0.0], [1.0]), [0.0]).item(), 4)
        0.2337
    """
    _check_real(pred)
    return _mean(crps_of(pred, targets).flatten(), targets, weights)


def interval_coverage(lower: object, upper: object, targets: object, *, weights: object = None) -> Tensor:
    """Return the share of targets inside their closed intervals, which may be unbounded.

    Examples:
        >>> interval_coverage([0.0, 0.0], [1.0, 1.0], [0.5, 2.0]).item()
        0.5
    """
    low, high, truth = _bounded(lower, upper, targets)
    return _mean(((low <= truth) & (truth <= high)).double(), targets, weights)


def interval_width(lower: object, upper: object, *, weights: object = None) -> Tensor:
    """Return the mean width of the intervals, in the target's unit.

    Examples:
        >>> interval_width([0.0, 0.0], [1.0, 3.0]).item()
        2.0
    """
    low, high = _bounds(lower, upper)
    return _mean(high - low, lower, weights)


def interval_score(lower: object, upper: object, targets: object, alpha: float, *, weights: object = None) -> Tensor:
    """Return the mean interval score: width plus 2/alpha times what a target misses by; lower is better.

    References:
        T. Gneiting, A. Raftery (2007). Strictly proper scoring rules, prediction, and estimation. JASA, eq. 43.

    Examples:
        >>> interval_score([0.0], [1.0], [1.5], alpha=0.1).item()
        11.0
    """
    return _mean(interval_scores(lower, upper, targets, alpha), targets, weights)


def interval_scores(lower: object, upper: object, targets: object, alpha: float) -> Tensor:
    """Return the interval score of every element `[M]`, float64."""
    check_level(alpha, "alpha")
    low, high, truth = _bounded(lower, upper, targets)
    missed = (low - truth).clamp_min(0) + (truth - high).clamp_min(0)
    return high - low + 2 / alpha * missed


def pit(pred: Predictive, targets: object, *, seed: int = 0) -> Tensor:
    """Return the probability integral transform `F(y)` of every target, float64 in [0, 1], of the batch shape.

    Uniform if the predictions are calibrated. For counts it is randomised, `F(y) - v P(y)` with v uniform from `seed`:
    without that it is not uniform even for the truth. For S samples it lies on the grid k/S, and is uniform to 1/S.

    References:
        A. Dawid (1984). Present position and potential developments: some personal views. JRSS A.
        C. Czado, T. Gneiting, L. Held (2009). Predictive model assessment for count data. Biometrics, section 2.

    Examples:
        >>> pit(Predictive.from_normal([0.0], [1.0]), [0.0])
        tensor([0.5000], dtype=torch.float64)
    """
    _check_real(pred)
    truth = as_tensor(targets, "targets").to(pred.device)
    check_shape(truth, pred.batch_shape, "targets")
    check_finite(truth, "targets")
    values: Tensor = pred.cdf(truth).double()
    if isinstance(pred, CountPredictive):
        generator = torch.Generator("cpu").manual_seed(check_count(seed, "seed", minimum=0))
        noise = torch.rand(truth.shape, generator=generator, dtype=torch.float64, device="cpu").to(pred.device)
        values = values - noise * pred.log_prob(truth).double().exp()
    return values.clamp(0, 1)


def quantile_calibration_error(pit: object, levels: Sequence[float] = LEVELS, *, weights: object = None) -> Tensor:
    """Return the mean over levels of |share of targets at or below the quantile - level|.

    Args:
        pit: Probability integral transform of every target, in [0, 1]: what `pit(pred, targets)` returns.
        levels: Quantile levels, without 0 and 1.
        weights: How often each row counts, `[N]`; once if None.

    References:
        V. Kuleshov, N. Fenner, S. Ermon (2018). Accurate uncertainties for deep learning using calibrated regression.
        ICML, section 3 (with absolute in place of squared gaps).

    Examples:
        >>> round(quantile_calibration_error([0.5] * 4, levels=[0.25, 0.75]).item(), 4)
        0.25
    """
    values, _ = paired(pit, pit, "pit", "pit")
    bad = (values < 0) | (values > 1)
    if bool(bad.any()):
        raise BadInput(
            f"pit has {values[bad][0].item():g} in element {bad_row(bad)}; allowed is 0..1, what pit() returns"
        )
    if not len(levels):
        raise BadInput("levels is empty; pass at least one level strictly between 0 and 1")
    for level in levels:
        check_level(level, "levels")
    per_row = element_weights(weights, pit, len(values), values.device)
    below = at_or_below(values, levels)
    gaps = [weighted_mean(column, per_row) - level for column, level in zip(below.unbind(-1), levels, strict=True)]
    return torch.stack(gaps).abs().mean()


def at_or_below(pit: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
    """Return 1 where a target is at or below its quantile of each level, else 0, float64 `[..., L]`."""
    grid = torch.tensor(list(levels), dtype=torch.float64, device=pit.device)
    # A cdf of S samples is k/S up to the rounding of its sum, and levels lie on that grid.
    return (pit.unsqueeze(-1) <= grid + _ROUNDING).double()


def _mean(values: Tensor, rows: object, weights: object) -> Tensor:
    return weighted_mean(values, element_weights(weights, rows, len(values), values.device))


def _bounds(lower: object, upper: object) -> tuple[Tensor, Tensor]:
    low, high = paired(lower, upper, "lower", "upper", infinite=("lower", "upper"))
    if bool((high < low).any()):
        raise BadInput(f"upper is below lower in element {bad_row(high < low)}; swap them, or mend the interval")
    return low, high


def _bounded(lower: object, upper: object, targets: object) -> tuple[Tensor, Tensor, Tensor]:
    return *_bounds(lower, upper), paired(lower, targets, "lower", "targets", infinite=("lower",))[1]


def _check_real(pred: object) -> None:
    if not isinstance(pred, Predictive) or isinstance(pred, (CategoricalPredictive, BernoulliPredictive)):
        raise BadType(f"pred must be a Predictive of real targets or counts, got {type(pred).__name__}")
    if pred.batch_shape.numel() == 0:
        raise BadInput("pred has no rows; a metric needs at least one")
