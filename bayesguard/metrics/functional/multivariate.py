"""Scores of joint predictions, of sets of quantiles, and of predicted standard deviations; a test of the PIT."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesguard.checks import as_tensor, bad_row, check_count, check_finite, check_level, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.functional.inputs import element_weights, group_sums, paired, weighted_mean
from bayesguard.metrics.functional.regression import LEVELS
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive, SamplePredictive
from bayesguard.predictive.numerics import slices

# Values up to which the exact law of the Kolmogorov-Smirnov statistic is used: powers of its matrix reach e^500. Where
# the squared statistic times their number is above 18, the p-value is below 1e-15, which 1 - cdf cannot give.
_EXACT, _FAR = 500, 18

Estimator = Literal["fair", "nrg"]


def ensemble(samples: object, targets: object) -> tuple[Tensor, Tensor]:
    """Return checked samples `[S, N, ...]` and targets `[N, ...]` in float64.

    Raises:
        BadInput: No samples or rows, shapes that differ, NaN or infinity (with the row), samples of several weights.
        BadType: A Predictive that has no samples.
    """
    values = as_tensor(_samples_of(samples), "samples").detach()
    truth = as_tensor(targets, "targets").to(values.device).detach()
    if values.dim() < 2 or values.numel() == 0:
        raise BadInput(f"samples has shape {tuple(values.shape)}; [S, N, ...] with a sample and a row is needed")
    check_shape(truth, values.shape[1:], "targets")
    check_finite(values, "samples", row_axis=1)
    check_finite(truth, "targets")
    return values.double(), truth.double()


def _samples_of(samples: object) -> object:
    if not isinstance(samples, Predictive):
        return samples
    if not isinstance(samples, SamplePredictive):
        raise BadType(
            f"samples must be a tensor or a SamplePredictive, got {type(samples).__name__}; pass pred.sample(S)"
        )
    if not bool((samples.weights == samples.weights[0]).all()):
        raise BadInput("samples has samples of several weights; all must weigh the same, as those of pred.sample(S)")
    return samples.samples


def energy_score(samples: object, targets: object, *, estimator: Estimator = "fair", weights: object = None) -> Tensor:
    """Return the mean energy score, in the target's unit: the CRPS of vectors; lower is better.

    The mean distance `|x - y|` of samples from the target less half the mean distance of two samples. "fair" takes two
    different samples, which makes it unbiased for the distribution that they come from (it may be negative); "nrg"
    takes all S^2 pairs, which scores the S samples as they are. It takes O(N S^2 D) time.

    Args:
        samples: `[S, N, D]`, or a Predictive of such samples of one weight.
        targets: `[N, D]`.
        estimator: "fair" or "nrg".
        weights: How often each row counts, `[N]`; once if None.

    Returns:
        0-d float64 on the device of `samples`.

    Raises:
        BadInput: No samples or rows, one sample with "fair", shapes that differ, NaN or infinity (with the row).

    References:
        T. Gneiting, A. Raftery (2007). Strictly proper scoring rules, prediction, and estimation. JASA, eq. 22.
        C. Ferro (2014). Fair scores for ensemble forecasts. QJRMS.

    Examples:
        >>> energy_score([[[0.0, 0.0]], [[3.0, 4.0]]], [[0.0, 0.0]]).item()
        0.0
        >>> energy_score([[[0.0, 0.0]], [[3.0, 4.0]]], [[0.0, 0.0]], estimator="nrg").item()
        1.25
    """
    scores = energy_scores(samples, targets, estimator)
    return weighted_mean(scores, element_weights(weights, targets, len(scores), scores.device))


def energy_scores(samples: object, targets: object, estimator: Estimator = "fair") -> Tensor:
    """Return the energy score of every row `[N]`, float64."""
    if estimator not in ("fair", "nrg"):
        raise BadInput(f"estimator must be 'fair' or 'nrg', got {estimator!r}")
    values, truth = _vectors(samples, targets)
    count, rows, size = values.shape
    if estimator == "fair" and count < 2:
        raise BadInput("samples holds one sample; the fair score needs two, estimator='nrg' one")
    pairs = count * (count - 1) if estimator == "fair" else count**2
    scores = []
    for part in slices(rows, count * max(count, size)):
        draws = values[:, part].transpose(0, 1).contiguous()
        near = torch.linalg.vector_norm(draws - truth[part].unsqueeze(1), dim=-1).mean(-1)
        # The quick way, by matrix products, loses all digits of close samples far from 0.
        apart = torch.cdist(draws, draws, compute_mode="donot_use_mm_for_euclid_dist").sum((-2, -1))
        scores.append(near - apart / (2 * pairs))
    return torch.cat(scores)


def variogram_score(
    samples: object, targets: object, *, p: float = 0.5, pair_weights: object = None, weights: object = None
) -> Tensor:
    """Return the mean variogram score of order p, which sees wrong correlations; lower is better.

    The sum over ordered pairs of components (i, j) of the squared difference between `|y_i - y_j|^p` and its mean
    over the samples. It does not see a shift of all components together. It takes O(N S D^2) time.

    Args:
        samples: `[S, N, D]` with D of at least 2, or a Predictive of such samples of one weight.
        targets: `[N, D]`.
        p: The order, above 0; the score's unit is the target's to the power 2p.
        pair_weights: The weight of every pair, `[D, D]`, not negative; 1 if None.
        weights: How often each row counts, `[N]`; once if None.

    Returns:
        0-d float64 on the device of `samples`.

    References:
        M. Scheuerer, T. Hamill (2015). Variogram-based proper scoring rules for probabilistic forecasts of multivariate
        quantities. Monthly Weather Review.

    Examples:
        >>> variogram_score([[[0.0, 0.0]], [[0.0, 4.0]]], [[0.0, 4.0]]).item()
        2.0
    """
    values, truth = _vectors(samples, targets)
    count, rows, size = values.shape
    if not 0 < p < math.inf:
        raise BadInput(f"p must be positive and finite, got {p}")
    if size < 2:
        raise BadInput("targets has 1 component; the variogram score compares components, so that two are needed")
    matrix = _pair_weights(pair_weights, size, truth)
    scores = []
    for part in slices(rows, count * size**2):
        spread = _differences(values[:, part], p).mean(0)
        scores.append((matrix * (_differences(truth[part], p) - spread).square()).sum((-2, -1)))
    return weighted_mean(torch.cat(scores), element_weights(weights, targets, rows, truth.device))


def _differences(values: Tensor, p: float) -> Tensor:
    return (values.unsqueeze(-1) - values.unsqueeze(-2)).abs().pow(p)


def _pair_weights(pair_weights: object, size: int, like: Tensor) -> Tensor:
    if pair_weights is None:
        return like.new_ones(size, size)
    matrix = as_tensor(pair_weights, "pair_weights").to(like.device)
    check_shape(matrix, (size, size), "pair_weights")
    check_finite(matrix, "pair_weights")
    if bool((matrix < 0).any()):
        raise BadInput(f"pair_weights is negative in row {bad_row(matrix < 0)}; weights of pairs are at least 0")
    return matrix.double()


def _vectors(samples: object, targets: object) -> tuple[Tensor, Tensor]:
    values, truth = ensemble(samples, targets)
    if values.dim() != 3:
        raise BadInput(f"samples has shape {tuple(values.shape)}; [S, N, D] is needed, vectors of D components")
    return values, truth


def weighted_interval_score(
    quantiles: object, targets: object, levels: Sequence[float] = LEVELS, *, weights: object = None
) -> Tensor:
    """Return the mean weighted interval score, in the target's unit: the CRPS, from a few quantiles.

    Levels t and 1 - t are the ends of a central interval of miscoverage alpha = 2t, whose interval score weighs
    alpha/2; the median's absolute error weighs 1/2. The sum is divided by the number of intervals, plus 1/2 if the
    median is there. It equals twice the mean pinball loss over the levels.

    Args:
        quantiles: `[L, N, ...]`, not falling along the levels, perhaps infinite; or a Predictive of real targets.
        targets: `[N, ...]`.
        levels: L rising levels, symmetric about 1/2, without 0 and 1.
        weights: How often each row counts, `[N]`; once if None.

    Raises:
        BadInput: No rows, shapes that differ, NaN, quantiles that cross (with the row), levels without meaning.

    References:
        J. Bracher, E. Ray, T. Gneiting, N. Reich (2021). Evaluating epidemic forecasts in an interval format. PLOS
        Computational Biology.

    Examples:
        >>> round(weighted_interval_score([[0.0], [1.0], [3.0]], [4.0], levels=[0.1, 0.5, 0.9]).item(), 4)
        1.8667
    """
    scores = weighted_interval_scores(quantiles, targets, levels)
    return weighted_mean(scores, element_weights(weights, targets, len(scores), scores.device))


def weighted_interval_scores(quantiles: object, targets: object, levels: Sequence[float] = LEVELS) -> Tensor:
    """Return the weighted interval score of every element `[M]`, float64."""
    grid = _symmetric(levels)
    values, truth = _quantiles_of(quantiles, targets, levels)
    crossed = (values[1:] < values[:-1]).any(0)
    if bool(crossed.any()):
        raise BadInput(f"quantiles fall from one level to the next in element {bad_row(crossed)}; sort them first")
    level, over = grid.to(truth.device).unsqueeze(-1), truth - values
    return 2 * torch.maximum(level * over, (level - 1) * over).mean(0)


def _symmetric(levels: Sequence[float]) -> Tensor:
    if not len(levels):
        raise BadInput("levels is empty; pass at least one level strictly between 0 and 1")
    grid = torch.tensor([check_level(level, "levels") for level in levels], dtype=torch.float64, device="cpu")
    if bool((grid.diff() <= 0).any()) or bool(((grid + grid.flip(0) - 1).abs() > 1e-9).any()):
        raise BadInput(f"levels must rise and be symmetric about 1/2, as 0.1, 0.5, 0.9, got {list(levels)}")
    return grid


def _quantiles_of(quantiles: object, targets: object, levels: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return quantiles `[L, M]` and targets `[M]`, float64."""
    if isinstance(quantiles, Predictive):
        if isinstance(quantiles, (CategoricalPredictive, BernoulliPredictive)):
            raise BadType(f"quantiles must be of real targets or counts, got {type(quantiles).__name__}")
        grid = torch.tensor(list(levels), dtype=torch.float64, device=quantiles.device)
        quantiles = torch.stack([quantiles.icdf(level) for level in grid])
    values = as_tensor(quantiles, "quantiles").detach()
    truth = as_tensor(targets, "targets").to(values.device).detach()
    if truth.dim() == 0 or truth.numel() == 0:
        raise BadInput(f"targets has shape {tuple(truth.shape)}; a metric needs at least one row")
    check_shape(values, (len(levels), *truth.shape), "quantiles")
    check_finite(values.masked_fill(values.isinf(), 0), "quantiles", row_axis=1)
    check_finite(truth, "targets")
    return values.double().flatten(1), truth.double().flatten()


def expected_normalised_calibration_error(
    mean: object, scale: object, targets: object, *, num_bins: int = 15, weights: object = None
) -> Tensor:
    """Return the mean over bins of `|RMV - RMSE| / RMV` (ENCE): whether large predicted errors are large.

    Elements are cut by rank of the predicted standard deviation into bins of equal mass, where equal ones are never
    split. RMV is the root mean predicted variance of a bin, RMSE its root mean squared error; bins that hold elements
    count alike. It has no unit and no upper bound; few elements to a bin bias it upwards.

    Args:
        mean: `[N]` or `[N, D]`.
        scale: Predicted standard deviations of exactly that shape, above 0.
        targets: Of exactly that shape.
        num_bins: Bins B.
        weights: How often each row counts, `[N]`; once if None.

    Returns:
        0-d float64 on the device of `mean`.

    Raises:
        BadInput: No rows, shapes that differ, NaN or infinity (with the row), a scale that is not positive.

    References:
        D. Levi, L. Gispan, N. Giladi, E. Fetaya (2022). Evaluating and calibrating uncertainty prediction in regression
        tasks. Sensors.

    Examples:
        >>> expected_normalised_calibration_error([0.0, 0.0], [1.0, 2.0], [1.0, -3.0], num_bins=2).item()
        0.25
    """
    check_count(num_bins, "num_bins")
    sigma, squares = spread_and_error(mean, scale, targets)
    per_row = element_weights(weights, targets, len(sigma), sigma.device)
    mass = torch.ones_like(sigma) if per_row is None else per_row
    return weighted_ence(sigma, squares, mass.unsqueeze(0), num_bins)[0]


def spread_and_error(mean: object, scale: object, targets: object) -> tuple[Tensor, Tensor]:
    """Return predicted standard deviations and squared errors `[M]`, float64, after checking them."""
    predicted, truth = paired(mean, targets, "mean", "targets")
    sigma = paired(mean, scale, "mean", "scale")[1]
    if bool((sigma <= 0).any()):
        raise BadInput(
            f"scale has {sigma[sigma <= 0][0].item():g} in element {bad_row(sigma <= 0)}; "
            "a standard deviation is above 0"
        )
    return sigma, (predicted - truth).square()


def weighted_ence(sigma: Tensor, squares: Tensor, weights: Tensor, num_bins: int = 15) -> Tensor:
    """Return the ENCE for each row of weights `[R, M]`, which also move the edges of the bins."""
    values, group = sigma.unique(return_inverse=True)
    offset = torch.arange(len(weights), device=sigma.device).unsqueeze(-1)
    sizes = _sums_by(group + offset * len(values), weights, len(values))
    before = sizes.cumsum(-1) - sizes
    # As `bin_index` cuts one row of weights by rank: what is equal goes where the first of it goes.
    bins = (before * num_bins).div(weights.sum(-1, keepdim=True), rounding_mode="floor")
    index = bins.nan_to_num().long().clamp_max(num_bins - 1)[:, group] + offset * num_bins
    mass, variance, square = (
        _sums_by(index, part, num_bins) for part in (weights, weights * sigma.square(), weights * squares)
    )
    filled = mass > 0
    gaps = (1 - (square / variance.where(filled, 1.0)).sqrt()).abs().where(filled, 0.0)
    return gaps.sum(-1) / filled.sum(-1)


def _sums_by(index: Tensor, values: Tensor, groups: int) -> Tensor:
    return group_sums(index.flatten(), values.flatten(), len(values) * groups).reshape(-1, groups)


class UniformityTest(NamedTuple):
    """A test of uniformity; 0-d float64.

    Attributes:
        statistic: The largest distance between the empirical cdf and that of the uniform law.
        p_value: How often uniform values are at least as far from it.
    """

    statistic: Tensor
    p_value: Tensor


def pit_uniformity_test(pit: object) -> UniformityTest:
    """Return the Kolmogorov-Smirnov test that PIT values are uniform, as those of calibrated predictions are.

    The p-value is exact to 1e-12 for up to 500 values; above, it is that of Kolmogorov's limit at Vrbik's corrected
    statistic, within 5e-5. Values must be independent and continuous: for counts randomise, as `pit` does; those of S
    samples lie on a grid, which looks uniform only while 1/S is far below 1/sqrt(M). There are no weights: the law of the
    statistic is that of independent values that count alike, which copies and weighted values are not.

    Args:
        pit: Probability integral transform of every target, any shape, in [0, 1]: what `pit(pred, targets)` returns.

    Raises:
        BadInput: No values, NaN (with the row), values outside 0..1.

    References:
        G. Marsaglia, W. Tsang, J. Wang (2003). Evaluating Kolmogorov's distribution. Journal of Statistical Software.
        J. Vrbik (2020). Deriving CDF of Kolmogorov-Smirnov test statistic. Applied Mathematics.

    Examples:
        >>> test = pit_uniformity_test([0.1, 0.3, 0.5, 0.7, 0.9])
        >>> round(test.statistic.item(), 4), round(test.p_value.item(), 4)
        (0.1, 1.0)
    """
    values, _ = paired(pit, pit, "pit", "pit")
    bad = (values < 0) | (values > 1)
    if bool(bad.any()):
        raise BadInput(
            f"pit has {values[bad][0].item():g} in element {bad_row(bad)}; allowed is 0..1, what pit() returns"
        )
    count = len(values)
    ordered = values.sort().values
    steps = torch.arange(count + 1, dtype=torch.float64, device=values.device) / count
    statistic = torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).amax()
    distance = math.sqrt(count) * statistic.item()
    if count <= _EXACT and distance**2 < _FAR:
        p_value = _exact_tail(count, statistic.item())
    else:
        p_value = _limit_tail(distance + 1 / (6 * math.sqrt(count)) + (distance - 1) / (4 * count))
    return UniformityTest(statistic, values.new_tensor(min(max(p_value, 0.0), 1.0)))


def _exact_tail(count: int, statistic: float) -> float:
    """Return the probability that the statistic of `count` uniform values is above `statistic`."""
    place = math.ceil(count * statistic)
    size, rest = 2 * place - 1, place - count * statistic
    power = np.subtract.outer(np.arange(size), np.arange(size)) + 1
    matrix = (power >= 0).astype(np.float64)
    matrix[:, 0] -= rest ** np.arange(1, size + 1)
    matrix[-1] -= rest ** np.arange(size, 0, -1)
    matrix[-1, 0] += max(0.0, 2 * rest - 1) ** size
    matrix *= np.array([math.exp(-math.lgamma(i + 1)) for i in range(size + 1)])[power.clip(0)]
    entry = np.linalg.matrix_power(matrix, count)[place - 1, place - 1]
    return 1 - float(entry) * math.exp(math.lgamma(count + 1) - count * math.log(count))


def _limit_tail(distance: float) -> float:
    """Return the probability that the limit of sqrt(n) times the statistic is above `distance`."""
    if distance < 1:  # one of two series for the same function: each converges at once on its side
        odd = (math.exp(-(((2 * k - 1) * math.pi / distance) ** 2) / 8) for k in range(1, 4))
        return 1 - math.sqrt(2 * math.pi) / distance * math.fsum(odd)
    return 2 * math.fsum((-1) ** (k - 1) * math.exp(-2 * (k * distance) ** 2) for k in range(1, 6))
