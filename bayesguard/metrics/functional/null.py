"""What a calibration error would be by chance alone: the same confidences, with right and wrong drawn from them."""

from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, check_count, check_finite, check_level
from bayesguard.metrics.functional.binned import BinnedSums, bin_index
from bayesguard.metrics.functional.inputs import answered
from bayesguard.sampling import stream

# Drawn errors may equal the one observed, but for how they were summed.
_ROUNDING = 1e-12


class CalibrationErrorNull(NamedTuple):
    """The expected calibration errors of a perfectly calibrated model with the same confidences, float64.

    Attributes:
        mean: Their mean, 0-d: exact, without noise of the drawing.
        errors: The error for each set of drawn answers `[R]`, in no order.
    """

    mean: Tensor
    errors: Tensor

    def quantile(self, level: float) -> Tensor:
        """Return the value below which a share `level` of the drawn errors lies, 0-d."""
        return self.errors.quantile(check_level(level, "level"))

    def p_value(self, error: object) -> Tensor:
        """Return how often chance alone gives at least `error`, 0-d: its rank among the R drawn, at least 1/(R+1)."""
        observed = as_tensor(error, "error").to(self.errors.device).double()
        check_finite(observed, "error")
        return (1 + (self.errors >= observed - _ROUNDING).sum()).double() / (1 + len(self.errors))


def calibration_error_null(
    probs: object, *, num_bins: int = 15, num_resamples: int = 1000, seed: int = 0
) -> CalibrationErrorNull:
    """Return what `expected_calibration_error` would show if the confidences were right: the floor that noise puts.

    Each answer is right with the probability that its confidence says, independently. How many of a bin are right is
    then a sum of independent draws, whose distribution is computed, to about 1e-15, by multiplying their polynomials
    in pairs; from it the mean follows, and R sets of counts are drawn. The time is O(N log^2 N), with hardly a share
    for R.

    The p-value of an observed error is exact if the rows are independent: under the hypothesis it is at most u with
    probability at most u. It sees the top label through bins; for all probabilities see `calibration_test`.

    Args:
        probs: `[N, ..., K]`, rows that sum to 1.
        num_bins: Bins of equal width, as for the error that is to be compared.
        num_resamples: R, sets of drawn answers.
        seed: Of the draws.

    Raises:
        BadInput: No rows, rows that are no distribution, settings without meaning.

    References:
        J. Bröcker, L. Smith (2007). Increasing the reliability of reliability diagrams. Weather and Forecasting
        (consistency resampling).

    Examples:
        >>> null = calibration_error_null([[0.8, 0.2]] * 100)
        >>> round(null.mean.item(), 4)
        0.0318
        >>> null.p_value(0.15).item() < 0.01  # 65 of 100 right
        True
    """
    values = as_tensor(probs, "probs")
    confidence, _ = answered(values, values.new_zeros(values.shape[:-1], dtype=torch.long))
    return null_of(confidence, num_bins=num_bins, num_resamples=num_resamples, seed=seed)


def null_of(scores: Tensor, *, num_bins: int = 15, num_resamples: int = 1000, seed: int = 0) -> CalibrationErrorNull:
    """Return the same of probabilities `[M]` with one outcome each: of confidences, or of yes."""
    check_count(num_bins, "num_bins")
    check_count(num_resamples, "num_resamples")
    generator = stream("cpu", check_count(seed, "seed", minimum=0), "calibration null")
    index = bin_index(scores, num_bins, "width")
    ordered = scores.double()[index.argsort(stable=True)]
    mean, errors = ordered.new_zeros(()), ordered.new_zeros(num_resamples)
    for chances in ordered.split(torch.bincount(index).tolist()):
        if len(chances):
            law = _law_of_hits(chances)
            gaps = (torch.arange(len(law), device=law.device) - chances.sum()).abs() / len(ordered)
            mean += law @ gaps
            errors += gaps[_drawn(law, num_resamples, generator)]
    return CalibrationErrorNull(mean, errors)


def null_of_sums(sums: BinnedSums, num_resamples: int, generator: torch.Generator) -> CalibrationErrorNull:
    """Return the null that sums `[2, B]` allow: in each bin a binomial, scaled to the exact variance of its gap.

    The number of hits of a bin is a sum of draws whose chances differ by at most the width of the bin, and that of n
    equal draws is nearly the same; without weights it is the same if the scores of a bin are equal.
    """
    count = sums.count
    filled = count.where(count > 0, 1.0)
    size, chance = sums.effective_count.round(), (sums.score / filled).clamp(0, 1)
    variance = (sums.sums[4] - sums.sums[5]).sum(-2).clamp_min(0)
    binomial = size * chance * (1 - chance)
    scale = (variance / binomial.where(binomial > 0, 1.0)).sqrt() / count.sum()
    mean = (scale * _mean_deviation(size, chance)).sum()
    shape = (num_resamples, len(count))
    hits = torch.binomial(size.cpu().expand(shape), chance.cpu().expand(shape), generator=generator).to(count.device)
    return CalibrationErrorNull(mean, (scale * (hits - size * chance).abs()).sum(-1))


def _mean_deviation(size: Tensor, chance: Tensor) -> Tensor:
    """Return the mean absolute deviation of binomial counts from their mean (de Moivre 1730)."""
    inside = (size > 0) & (chance > 0) & (chance < 1)
    n, p = size.where(inside, 1.0), chance.where(inside, 0.5)
    below = (n * p).floor().minimum(n - 1)
    ways = torch.lgamma(n + 1) - torch.lgamma(below + 1) - torch.lgamma(n - below)
    return 2 * (ways + (below + 1) * p.log() + (n - below) * torch.log1p(-p)).exp().where(inside, 0.0)


def _law_of_hits(chances: Tensor) -> Tensor:
    """Return the probabilities `[n + 1]` of 0..n hits of n independent draws that hit with `chances` `[n]`."""
    factors = torch.stack([1 - chances, chances], -1)
    while len(factors) > 1:
        if len(factors) % 2:
            never = torch.zeros_like(factors[:1])
            never[:, 0] = 1
            factors = torch.cat([factors, never])
        factors = _products(factors[::2], factors[1::2])
    return factors[0, : len(chances) + 1].clamp_min(0)


def _products(first: Tensor, second: Tensor) -> Tensor:
    """Multiply polynomials `[m, d + 1]` in pairs, to `[m, 2 d + 1]`; d is a power of two."""
    size = 2 * (first.shape[-1] - 1)
    # A transform of length 2d, half of what would hold all 2d + 1 coefficients: the last falls onto the first.
    wrapped = torch.fft.irfft(torch.fft.rfft(first, n=size) * torch.fft.rfft(second, n=size), n=size)
    top = first[:, -1:] * second[:, -1:]
    wrapped[:, :1] -= top
    return torch.cat([wrapped, top], -1)


def _drawn(law: Tensor, count: int, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu").to(law.device)
    edges = law.cumsum(-1)
    return torch.searchsorted(edges, uniform * edges[-1], right=True).clamp_max(len(law) - 1)
