"""Resampling of examples: the same weights for every metric, so that differences are paired."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bayesguard.checks import check_count, check_level
from bayesguard.sampling import stream

# Elements of one chunk of weights: 64 MB of float64.
_BUDGET = 1 << 23


def bootstrap_weights(
    num_examples: int, num_resamples: int, seed: int, *, chunk_size: int | None = None
) -> Iterator[Tensor]:
    """Yield how often each example is drawn in resamples with replacement, float64 `[r, N]` on the CPU, in chunks.

    Args:
        num_examples: N; every row sums to it.
        num_resamples: Rows in all.
        seed: The same seed gives the same weights, whatever the chunks.
        chunk_size: Rows of a chunk; as many as fit in 64 MB if None.

    References:
        B. Efron (1979). Bootstrap methods: another look at the jackknife. Annals of Statistics.

    Examples:
        >>> torch.cat(list(bootstrap_weights(5, 3, seed=0))).sum(1)
        tensor([5., 5., 5.], dtype=torch.float64)
    """
    check_count(num_examples, "num_examples")
    check_count(num_resamples, "num_resamples")
    step = max(1, _BUDGET // num_examples) if chunk_size is None else check_count(chunk_size, "chunk_size")
    generator = stream("cpu", seed, "bootstrap")
    for start in range(0, num_resamples, step):
        rows = min(step, num_resamples - start)
        drawn = torch.randint(num_examples, (rows, num_examples), generator=generator, device="cpu")
        # One flat count of (resample, example) pairs: whole numbers add up exactly in any order.
        flat = drawn + torch.arange(rows, device="cpu").unsqueeze(-1) * num_examples
        yield torch.bincount(flat.flatten(), minlength=rows * num_examples).reshape(rows, num_examples).double()


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
    known = resampled[~resampled.isnan()]
    finite = known[known.isfinite()]
    if not len(finite):
        return bounds
    if len(finite) < len(known):
        return float(finite.min()), bounds[1]
    tail = (1 - confidence_level) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=known.dtype, device=known.device)
    low, high = torch.quantile(known, levels).tolist()
    return max(bounds[0], 2 * value - high), min(bounds[1], 2 * value - low)
