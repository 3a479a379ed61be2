"""Calibration errors without bins: SmoothECE, the kernel calibration error, and a test of calibration."""

import math

import torch
from torch import Tensor

from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.metrics.functional.inputs import answered, classified, element_weights, group_sums, yes_or_no
from bayesguard.predictive.numerics import BUDGET, slices
from bayesguard.sampling import stream

# Numbers of cosines to try: of 2^8, bandwidths from 0.011 on need no more; of 2^16, from 4.3e-5 on.
_WAVES = (1 << 8, 1 << 10, 1 << 12, 1 << 16)
# At this bandwidth times the number of cosines, the first one left out is damped to 1.6e-17.
_NARROW = 2.8
# Cells to a cosine, and terms of the series about a cell's middle: the first left out is below 0.2^10 / 10! = 3e-14.
_CELLS, _TERMS = 8, 10
# Of an error, and what the search for it stops at.
_ROUNDING = 1e-13
# Rows whose pairs give the median distance: half a million pairs.
_MEDIAN_ROWS = 1000


def smooth_calibration_error(probs: object, targets: object, *, weights: object = None) -> Tensor:
    """Return the SmoothECE of the most probable class, 0 to 1: no bins, and no bandwidth to choose.

    The gaps `right - confidence` are smoothed by a Gaussian kernel reflected at 0 and 1; the mean absolute smoothed gap
    falls with the bandwidth, and the error is that of the one bandwidth that it equals. Confidences are not rounded to
    a grid: the kernel is a cosine series, whose coefficients are found to 1e-13 for N rows in O(N), and the absolute
    value is integrated between its sign changes, to better than 1e-8 of the error. Below 4.3e-5 the error is that of the
    bandwidth 4.3e-5, which is not above the truth.

    Args:
        probs: `[N, ..., K]`, rows that sum to 1. For P(y = 1) see `binary_smooth_calibration_error`.
        targets: Class labels `[N, ...]`.
        weights: How often each row counts, `[N]`; once if None.

    Returns:
        0-d float64 on the device of `probs`.

    Raises:
        BadInput: No rows, rows that are no distribution, labels out of range.

    References:
        J. Błasiok, P. Nakkiran (2024). Smooth ECE: principled reliability diagrams via kernel smoothing. ICLR.

    Examples:
        >>> round(smooth_calibration_error([[0.9, 0.1], [0.8, 0.2]], [0, 1]).item(), 4)
        0.35
    """
    confidence, right = answered(probs, targets)
    per_row = element_weights(weights, targets, len(right), right.device)
    return _smooth_error(confidence.double(), right, per_row)


def binary_smooth_calibration_error(probs: object, targets: object, *, weights: object = None) -> Tensor:
    """Return the SmoothECE of P(y = 1), not of the top label, 0 to 1; see `smooth_calibration_error`.

    Args:
        probs: Probability of yes, any shape.
        targets: 0/1 of exactly that shape.
        weights: How often each row counts, `[N]`; once if None.

    Examples:
        >>> round(binary_smooth_calibration_error([0.9, 0.8], [1, 0]).item(), 4)
        0.35
    """
    scores, outcomes = yes_or_no(probs, targets)
    per_row = element_weights(weights, targets, len(scores), scores.device)
    return _smooth_error(scores.double(), outcomes, per_row)


def _smooth_error(scores: Tensor, outcomes: Tensor, weights: Tensor | None) -> Tensor:
    return weighted_smooth_error(scores, outcomes, (torch.ones_like(outcomes) if weights is None else weights)[None])[0]


def weighted_smooth_error(scores: Tensor, outcomes: Tensor, weights: Tensor) -> Tensor:
    """Return the SmoothECE for each row of weights `[R, M]`."""
    scores = scores.double()
    masses = weights / weights.sum(-1, keepdim=True) * (outcomes - scores)
    errors = masses.new_zeros(len(masses))
    left = torch.arange(len(masses), device=masses.device)
    for num_waves in _WAVES:
        if not len(left):
            break
        narrowest = _NARROW / num_waves
        for rows in left.split(max(1, BUDGET // max(len(scores), 4 * _CELLS * num_waves))):
            waves = _cosines(scores, masses[rows], num_waves)
            errors[rows] = _smoothed(waves, waves.new_full((len(rows),), narrowest))
            wide = errors[rows] >= narrowest
            if bool(wide.any()):
                errors[rows[wide]] = _fixed_point(waves[wide], narrowest)
        left = left[errors[left] < narrowest]
    return errors


def _cosines(scores: Tensor, masses: Tensor, num_waves: int) -> Tensor:
    """Return the sums of mass times cos(pi k score), k = 0..`num_waves`, for each row of masses `[R, M]`."""
    cells = _CELLS * num_waves
    place = (scores * cells).round()
    offset = scores * cells - place
    many = len(masses) * (cells + 1)
    index = (place.long() + torch.arange(len(masses), device=scores.device).unsqueeze(-1) * (cells + 1)).flatten()
    turn = -1j * math.pi / cells * torch.arange(num_waves + 1, dtype=torch.float64, device=scores.device)
    factor = torch.ones_like(turn)
    total = turn.new_zeros(len(masses), num_waves + 1)
    for term in range(_TERMS):
        sums = group_sums(index, masses.flatten(), many).reshape(-1, cells + 1)
        total += factor * torch.fft.rfft(sums, n=2 * cells)[:, : num_waves + 1]
        factor, masses = factor * turn / (term + 1), masses * offset
    return total.real


def _smoothed(waves: Tensor, bandwidth: Tensor) -> Tensor:
    """Return the integral over 0..1 of the absolute smoothed gap, for each row of waves and bandwidth `[R]`."""
    # The Gaussian kernel reflected at 0 and 1 is 1 + 2 sum over k of exp(-(pi k bandwidth)^2 / 2) cos(pi k s) cos(pi k t).
    cells = _CELLS * (waves.shape[-1] - 1)
    frequency = math.pi * torch.arange(waves.shape[-1], dtype=torch.float64, device=waves.device)
    damped = waves * (-(frequency * bandwidth.unsqueeze(-1)).square() / 2).exp()
    value = torch.fft.irfft(damped + 0j, n=2 * cells)[:, : cells + 1] * 2 * cells
    sines = -1j * damped / frequency.clamp_min(1)
    sines[:, 0] = 0
    step = (torch.fft.irfft(sines, n=2 * cells)[:, : cells + 1] * 2 * cells).diff() + damped[:, :1] / cells
    left, right = value[:, :-1], value[:, 1:]
    # Where the sign changes within a cell; its integral up to there is Hermite's cubic, of fourth order.
    at = torch.where(left * right < 0, left / (left - right), 0.0)
    ends = left * (at**3 - 2 * at**2 + at) + right * (at**3 - at**2)
    before = step * (3 * at**2 - 2 * at**3) + ends / cells
    return (before.abs() + (step - before).abs()).sum(-1)


def _fixed_point(waves: Tensor, narrowest: float) -> Tensor:
    """Return for each row of waves the error that equals its bandwidth, which is at least `narrowest`."""
    low = point = waves.new_full((len(waves),), narrowest)
    high, gap = torch.ones_like(point), _smoothed(waves, point) - point
    guess, found = low + gap / 2, torch.empty_like(point)
    index = torch.arange(len(waves), device=waves.device)
    while True:
        done = (gap.abs() <= _ROUNDING) | (high - low <= _ROUNDING)
        found[index[done]] = (point + gap)[done]
        if bool(done.all()):
            return found
        rows = (waves, low, high, point, gap, guess, index)
        waves, low, high, before, last, point, index = (values[~done] for values in rows)
        gap = _smoothed(waves, point) - point
        # The gap falls at least as fast as the bandwidth grows: it bounds how far away the fixed point is.
        low, high = torch.maximum(low, point + gap.clamp_max(0)), torch.minimum(high, point + gap.clamp_min(0))
        guess = torch.where(gap != last, point - gap * (point - before) / (gap - last), low)
        guess = guess.where((low < guess) & (guess < high), (low + high) / 2)


def kernel_calibration_error(
    probs: object, targets: object, *, bandwidth: float | None = None, weights: object = None
) -> Tensor:
    """Return the unbiased squared kernel calibration error (SKCE) of all class probabilities together.

    The mean over pairs of different rows of `k(p, q) (e_y - p) . (e_z - q)`, with the kernel
    `k(p, q) = exp(-|p - q|_TV / bandwidth)` times the identity; `|p - q|_TV` is half the sum of absolute differences.
    Its mean is 0 if every probability is calibrated given the whole row, and otherwise above; the estimate may be
    negative. It takes O(N^2 K) time.

    Args:
        probs: `[N, ..., K]`, rows that sum to 1; for P(y = 1) stack `[1 - p, p]`.
        targets: Class labels `[N, ...]`.
        bandwidth: The median distance of pairs if None, of 1,000 rows evenly spaced by their sum of squares if there
            are more; the mean distance if the median is 0.
        weights: How often each row counts, `[N]`; once if None. They are counts, as of repeated rows, whose copies are
            different rows: a row of weight w is paired w (w - 1) times with itself.

    Returns:
        0-d float64 on the device of `probs`.

    Raises:
        BadInput: Fewer than two rows, weights that sum to less than 2, rows that are no distribution, labels out of
            range, a bandwidth that is not positive.

    References:
        D. Widmann, F. Lindsten, D. Zachariah (2019). Calibration tests in multi-class classification: a unifying
        framework. NeurIPS, table 1 (the unbiased quadratic estimator).

    Examples:
        >>> round(kernel_calibration_error([[0.9, 0.1], [0.8, 0.2]], [0, 1], bandwidth=1.0).item(), 4)
        -0.1448
    """
    rows, labels, mass, width = _kernel_input(probs, targets, bandwidth, weights)
    gaps = (-rows).scatter_add(-1, labels.unsqueeze(-1), torch.ones_like(rows[:, :1]))
    total, weighted = -(mass @ gaps.square()).sum(), mass.unsqueeze(-1) * gaps  # no row is paired with itself
    for part in slices(len(rows), len(rows)):
        total += (_kernel(rows[part], rows, width) * (weighted[part] @ weighted.t())).sum()
    return total / (mass.sum() * (mass.sum() - 1))


def calibration_test(
    probs: object,
    targets: object,
    seed: int = 0,
    *,
    num_resamples: int = 199,
    block_size: int = 500,
    bandwidth: float | None = None,
) -> Tensor:
    """Return the p-value of the hypothesis that the probabilities are calibrated, by consistency resampling.

    If they are, labels drawn from the probabilities are as good as the true ones. The p-value is the rank of the kernel
    calibration error of the true labels among those of `num_resamples` sets of drawn labels: exact for every number
    of rows, uniform on 1/(R+1), ..., 1 if the rows are independent and calibrated; no normal limit is used. Only pairs
    within blocks of `block_size` shuffled rows count, which makes it O(N) and costs power, not validity. There are no
    weights: labels are drawn for each row by itself, and rows of other weights than 1 stand for no such draws.

    Args:
        probs: `[N, ..., K]`, rows that sum to 1.
        targets: Class labels `[N, ...]`.
        seed: Of the shuffling and of the drawn labels.
        num_resamples: R; no p-value is below 1/(R+1).
        block_size: Rows of a block, at most; at least 2.
        bandwidth: As for `kernel_calibration_error`.

    Returns:
        0-d float64 on the device of `probs`.

    Raises:
        BadInput: Fewer than two rows, rows that are no distribution, labels out of range, settings without meaning.

    References:
        D. Widmann, F. Lindsten, D. Zachariah (2019). Calibration tests in multi-class classification: a unifying
        framework. NeurIPS (the statistic, and its use within blocks).
        J. Bröcker, L. Smith (2007). Increasing the reliability of reliability diagrams. Weather and Forecasting
        (consistency resampling).

    Examples:
        >>> calibration_test([[0.9, 0.1]] * 40, [0, 1] * 20).item()
        0.005
    """
    generator = stream("cpu", check_count(seed, "seed", minimum=0), "calibration test")
    check_count(num_resamples, "num_resamples")
    rows, labels, _, width = _kernel_input(probs, targets, bandwidth)
    order = torch.randperm(len(rows), generator=generator, device="cpu")
    totals = rows.new_zeros(1 + num_resamples)
    for block in order.tensor_split(math.ceil(len(rows) / check_count(block_size, "block_size", minimum=2))):
        part = block.to(rows.device)
        drawn = _drawn_labels(rows[part], num_resamples, generator)
        totals += _pair_sums(rows[part], torch.cat([labels[part].unsqueeze(0), drawn]), width)
    return (totals >= totals[0]).sum().double() / len(totals)


def _kernel_input(
    probs: object, targets: object, bandwidth: float | None, weights: object = None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return probabilities, labels and weights of the rows that have weight, and the bandwidth."""
    values, labels = classified(probs, targets)
    if len(values) < 2:
        raise BadInput("probs has 1 row; pairs of rows are compared, so that at least two are needed")
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise BadInput(f"bandwidth must be positive and finite, or None for the median distance, got {bandwidth}")
    rows = values.detach().double()
    mass = element_weights(weights, targets, len(rows), rows.device)
    if mass is None:
        mass = torch.ones_like(rows[:, 0])
    elif mass.sum() < 2:
        raise BadInput(
            f"weights sum to {mass.sum().item():g}; they say how often each row counts, and two rows are needed"
        )
    rows, labels, mass = (part[mass > 0] for part in (rows, labels, mass))
    return rows, labels, mass, _median_distance(rows, mass) if bandwidth is None else float(bandwidth)


def _median_distance(rows: Tensor, mass: Tensor) -> float:
    if max(len(rows), mass.sum().item()) > _MEDIAN_ROWS:
        # Neither the order of the rows nor that of the classes matters.
        order = rows.square().sum(-1).argsort(stable=True)
        upto = mass[order].cumsum(0)
        rank = (torch.arange(_MEDIAN_ROWS, dtype=torch.float64, device=rows.device) * upto[-1] / _MEDIAN_ROWS).floor()
        rows = rows[order[torch.searchsorted(upto, rank, right=True).clamp_max(len(rows) - 1)]]
        mass = torch.ones_like(rows[:, 0])
    first, second = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    # Copies of a row are pairs at no distance.
    apart = torch.cat([torch.pdist(rows, p=1) / 2, rows.new_zeros(1)])
    pairs = torch.cat([mass[first] * mass[second], (mass * (mass - 1)).sum().clamp_min(0).unsqueeze(0) / 2])
    apart, order = apart.sort()
    upto = pairs[order].cumsum(0)
    middle = (upto[-1] - 1) / 2
    places = torch.stack([middle.floor(), middle.ceil()]).clamp_min(0)
    width = apart[torch.searchsorted(upto, places, right=True).clamp_max(len(apart) - 1)].mean().item()
    width = width or (apart @ pairs[order] / upto[-1]).item()
    return width or 1.0  # all rows are alike, and the kernel is 1 at any bandwidth


def _kernel(some: Tensor, rows: Tensor, width: float) -> Tensor:
    return (torch.cdist(some, rows, p=1) / (-2 * width)).exp()


def _drawn_labels(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return labels `[count, M]` drawn from the probabilities `[M, K]`."""
    uniform = torch.rand(len(rows), count, generator=generator, dtype=torch.float64, device="cpu").to(rows.device)
    edges = rows.cumsum(-1)
    drawn = torch.searchsorted(edges, uniform * edges[:, -1:], right=True)
    return drawn.clamp_max(rows.shape[-1] - 1).t()


def _pair_sums(rows: Tensor, labels: Tensor, width: float) -> Tensor:
    """Return the sum over ordered pairs of different rows for each set of labels `[R, M]`."""
    kernel = _kernel(rows, rows, width)
    smoothed = kernel @ rows
    # (e_y - p) . (e_z - q) = [y = z] - p_z - q_y + p . q: only the first needs all pairs for every set of labels.
    alike = torch.stack([(kernel * (some.unsqueeze(-1) == some)).sum() for some in labels])
    crossed = smoothed.gather(-1, labels.t()).sum(0)
    own = len(rows) - 2 * rows.gather(-1, labels.t()).sum(0) + rows.square().sum()
    return alike - 2 * crossed + (smoothed * rows).sum() - own
