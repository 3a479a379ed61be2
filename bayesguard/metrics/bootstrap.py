"""Resampling of examples: the same weights for every metric, so that differences are paired."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bayesguard.checks import check_count, check_level
from bayesguard.metrics.functional.inputs import group_sums
from bayesguard.metrics.scores import Mean, Scores
from bayesguard.predictive.numerics import CACHED
from bayesguard.sampling import stream

# Elements of one chunk of weights: 16 MB of float64, which memory that was used before can hold; 64 MB for eight rows.
_BUDGET, _MOST, _ROWS = 1 << 21, 1 << 23, 8
# Blocks of a jackknife: the acceleration is known to 0.65 / 200 then, less than its effect on an end shows.
_BLOCKS = 200
# Of the range in which an end of an inverted interval is looked for.
_HALVINGS = 36


def bootstrap_weights(
    num_examples: int,
    num_resamples: int,
    seed: int,
    *,
    clusters: Tensor | None = None,
    chunk_size: int | None = None,
) -> Iterator[Tensor]:
    """Yield how often each example is drawn in resamples with replacement, float64 `[r, N]` on the CPU, in chunks.

    Args:
        num_examples: N; every row sums to it, unless clusters differ in size.
        num_resamples: Rows in all.
        seed: The same seed gives the same weights, whatever the chunks.
        clusters: The cluster of each example, `[N]`, numbered 0..C-1 without gaps. C whole clusters are drawn, each with
            all its examples; single examples if None.
        chunk_size: Rows of a chunk; as many as fit in 16 MB if None, or up to eight that fit in 64 MB.

    References:
        B. Efron (1979). Bootstrap methods: another look at the jackknife. Annals of Statistics.
        A. Davison, D. Hinkley (1997). Bootstrap methods and their application. Cambridge University Press, 3.8 (clusters).

    Examples:
        >>> torch.cat(list(bootstrap_weights(5, 3, seed=0))).sum(1)
        tensor([5., 5., 5.], dtype=torch.float64)
    """
    check_count(num_examples, "num_examples")
    check_count(num_resamples, "num_resamples")
    fitting = max(1, _BUDGET // num_examples, min(_ROWS, _MOST // num_examples))
    step = fitting if chunk_size is None else check_count(chunk_size, "chunk_size")
    drawn_units = num_examples if clusters is None else int(clusters.max()) + 1
    generator = stream("cpu", seed, "bootstrap")
    for start in range(0, num_resamples, step):
        counts = _counts(min(step, num_resamples - start), drawn_units, generator).double()
        yield counts if clusters is None else counts[:, clusters]


def _counts(rows: int, units: int, generator: torch.Generator) -> Tensor:
    """Return how often each unit is drawn in as many draws as there are units, `[rows, units]`."""
    # A byte is enough: a unit is drawn 256 times in one of 256! resamples at most.
    counts = torch.zeros(rows, units, dtype=torch.uint8, device="cpu")
    one = torch.ones((), dtype=torch.uint8, device="cpu")
    # A few resamples at a time, so that draws and counts stay in the cache.
    for part in counts.split(max(1, CACHED // 2 // units)):
        drawn = torch.randint(units, part.shape, generator=generator, device="cpu")
        part.scatter_add_(1, drawn, one.expand(part.shape))
    return counts


def basic_interval(
    value: float, resampled: Tensor, confidence_level: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Return the reverse-percentile bootstrap interval, clipped to the values that there can be.

    It reflects the resampled values about the estimate. A statistic that resampling shifts upwards, as any binned
    calibration error, is thereby shifted back; a percentile interval would double the shift. Resamples without a value
    (NaN: no error to rank, no weight) are left out; infinite ones leave the upper end open.

    References:
        A. Davison, D. Hinkley (1997). Bootstrap methods and their application. Cambridge University Press, eq. 5.6.
    """
    check_level(confidence_level, "confidence_level")
    if (ends := _without_quantiles(resampled, bounds)) is not None:
        return ends
    low, high = _quantiles(resampled, (1 - confidence_level) / 2)
    return max(bounds[0], 2 * value - high), min(bounds[1], 2 * value - low)


def percentile_interval(resampled: Tensor, confidence_level: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the quantiles of the resampled values; NaN and infinity as for `basic_interval`.

    References:
        B. Efron (1979). Bootstrap methods: another look at the jackknife. Annals of Statistics.
    """
    check_level(confidence_level, "confidence_level")
    if (ends := _without_quantiles(resampled, bounds)) is not None:
        return ends
    low, high = _quantiles(resampled, (1 - confidence_level) / 2)
    return max(bounds[0], low), min(bounds[1], high)


def bca_interval(
    value: float, resampled: Tensor, left_out: Tensor, confidence_level: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Return the bias-corrected and accelerated interval; NaN and infinity as for `basic_interval`.

    Args:
        value: The estimate.
        resampled: Its values over resamples, `[R]`.
        left_out: Its values with one example, cluster or block left out (`jackknife`), which tell the acceleration.
        confidence_level: Of the interval.
        bounds: Smallest and largest value there can be.

    References:
        B. Efron (1987). Better bootstrap confidence intervals. JASA.
        T. DiCiccio, B. Efron (1996). Bootstrap confidence intervals. Statistical Science, eq. 2.3 and 6.6.
    """
    check_level(confidence_level, "confidence_level")
    if (ends := _without_quantiles(resampled, bounds)) is not None:
        return ends
    known, influence = resampled[~resampled.isnan()], left_out[left_out.isfinite()]
    influence = influence.mean() - influence
    spread = influence.square().sum().sqrt()
    skew = influence.pow(3).sum() / (6 * spread**3) if spread > 0 else spread
    below = ((known < value).double().mean() + (known <= value).double().mean()) / 2
    # A share of none or all of the resamples is known to half of one only.
    centre = torch.special.ndtri(below.clamp(0.5 / len(known), 1 - 0.5 / len(known)))
    tail = (1 - confidence_level) / 2
    ends = centre + torch.special.ndtri(known.new_tensor([tail, 1 - tail], device=known.device))
    levels = torch.special.ndtr(centre + ends / (1 - skew * ends))
    low, high = torch.quantile(known, levels).tolist()
    return max(bounds[0], low), min(bounds[1], high)


def inverted_interval(
    gaps: Tensor, resampled: Tensor, confidence_level: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Return the sums of true absolute gaps `sum |g|` at which the estimated one would not be unlikely.

    Noise adds to every absolute gap, the more the smaller the gap is, so that an interval that moves the noise as it is
    about the estimated gaps covers too seldom, and a sum of 0 less than half of the time. Here the gaps behind the noise are
    moved with the candidate: for each sum t they are those of that sum nearest to the estimated ones, measured in standard errors
    (every gap shrunk or stretched by a multiple of its variance), and t belongs to the interval if the estimate lies
    between the tails of the sum that these gaps have under the noise. The lower end is above 0 no more often than the
    level promises where all gaps are 0.

    Args:
        gaps: Signed gaps, `[M]`; the estimate is the sum of their absolute values.
        resampled: The gaps over resamples, `[R, M]`.
        confidence_level: Of the interval.
        bounds: Smallest and largest value there can be.

    References:
        C. Chuang, T. Lai (2000). Hybrid resampling methods for confidence intervals. Statistica Sinica, section 2.
    """
    check_level(confidence_level, "confidence_level")
    noise = resampled[~resampled.isnan().any(-1)] - gaps
    if len(noise) < 2:
        return bounds
    variance = noise.var(0)
    # What does not vary but by rounding cannot be moved either.
    variance = variance.where(variance > 1e-24, 0.0)
    value = gaps.abs().sum()
    if not bool((variance > 0).any()):
        return float(value), float(value)
    tail = (1 - confidence_level) / 2

    def moved(shrinkage: float) -> Tensor:
        size = (gaps.abs() - shrinkage * variance).clamp_min(0)
        return size.where(gaps >= 0, -size)

    def end(level: float, low: float, high: float) -> float:
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            larger = ((moved(middle) + noise).abs().sum(-1) > value).sum()
            low, high = (middle, high) if larger > (1 - level) * len(noise) else (low, middle)
        return float(moved(high).abs().sum())

    # A little more than what takes the last gap to 0, which rounding would leave just above.
    most = float((gaps.abs() / variance)[variance > 0].max()) * (1 + 1e-9)
    # Stretched by the largest sums of noise, the gaps have an estimate above the given one but for the tail.
    least = -float(torch.quantile(noise.abs().sum(-1), 1 - tail) / variance.sum())
    lower, upper = end(1 - tail, 0.0, most), end(tail, least, most)
    return max(bounds[0], lower), min(bounds[1], upper)


def jackknife(scores: Scores, clusters: Tensor | None = None) -> Tensor:
    """Return a metric with each of at most 200 blocks of examples left out, `[G]`; means leave out each by itself.

    Args:
        scores: What the metric keeps of N examples.
        clusters: The cluster of each example, `[N]`, numbered from 0: clusters are then left out whole.

    References:
        J. Shao, C. Wu (1989). A general theory for jackknife variance estimation. Annals of Statistics (blocks).
    """
    units = torch.arange(scores.num_examples, device="cpu") if clusters is None else clusters
    count = int(units.max()) + 1
    if isinstance(scores, Mean):
        sizes = torch.bincount(units, minlength=count).to(scores.values)
        sums = group_sums(units.to(scores.values.device), scores.values, count)
        mean = (scores.values.sum() - sums) / (len(units) - sizes)
        return mean.sqrt() if scores.root else mean
    # Units go to blocks in turn, so that an order in the data does not become one of the blocks.
    block, blocks = units % _BLOCKS, torch.arange(min(count, _BLOCKS), device="cpu").unsqueeze(-1)
    step = max(1, _BUDGET // len(units))
    return torch.cat([scores.resample((block != part).double()) for part in blocks.split(step)])


def standardised(resampled: Tensor) -> Tensor:
    """Return resampled values `[R, H]` less their means, in standard deviations; 0 for what does not vary or is NaN."""
    known = resampled.isfinite()
    centred = resampled - resampled.where(known, 0.0).sum(0) / known.sum(0)
    spread = (centred.where(known, 0.0).square().sum(0) / known.sum(0)).sqrt()
    varies = known & (spread > 1e-12 * resampled.abs().where(known, 0.0).amax(0))
    return (centred / spread).where(varies, 0.0)


def largest(standard: Tensor) -> Tensor:
    """Return the largest absolute value of each resample, `[R, H]` -> `[R]`: the law of the max-|t| statistic.

    References:
        J. Romano, M. Wolf (2005). Exact and approximate stepdown methods for multiple hypothesis testing. JASA.
    """
    return standard.abs().amax(-1)


def critical_value(statistics: Tensor, confidence_level: float) -> float:
    """Return what a statistic has to be above so that its p-value, counted over resamples, is 1 - level at most."""
    rank = math.ceil(round(confidence_level * (len(statistics) + 1), 9))
    return float(statistics.kthvalue(rank).values) if rank <= len(statistics) else math.inf


def _without_quantiles(resampled: Tensor, bounds: tuple[float, float]) -> tuple[float, float] | None:
    """Return all there can be where no resample has a value, and an open end where some are infinite; else None."""
    known = resampled[~resampled.isnan()]
    finite = known[known.isfinite()]
    if not len(finite):
        return bounds
    return (float(finite.min()), bounds[1]) if len(finite) < len(known) else None


def _quantiles(resampled: Tensor, tail: float) -> tuple[float, float]:
    known = resampled[~resampled.isnan()]
    low, high = torch.quantile(known, known.new_tensor([tail, 1 - tail])).tolist()
    return low, high
