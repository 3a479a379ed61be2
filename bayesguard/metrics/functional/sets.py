"""Sets of classes that should hold the label: how often they do, overall, in strata, and where it is worst."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, check_count, check_finite, check_labels, check_level, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.functional.inputs import element_weights, group_sums, weighted_mean
from bayesguard.predictive.numerics import slices
from bayesguard.sampling import stream

# Upper ends of the strata of set sizes 0-1, 2-3, 4-10, 11-100 and above.
SIZES = (1, 3, 10, 100)


def set_coverage(sets: object, labels: object, *, weights: object = None) -> Tensor:
    """Return the share of rows whose set holds the label.

    Args:
        sets: `[N, ..., K]`, bool: whether each class is in the set.
        labels: Class labels `[N, ...]`.
        weights: How often each row counts, `[N]`; once if None.

    Returns:
        0-d float64 on the device of `sets`.

    Raises:
        BadInput: No rows or classes, labels out of range (with the row) or of another shape.
        BadType: Sets that are not bool.

    Examples:
        >>> set_coverage([[True, False], [True, True]], [1, 1]).item()
        0.5
    """
    _, covered = covered_labels(sets, labels)
    return weighted_mean(covered, element_weights(weights, labels, len(covered), covered.device))


def set_size(sets: object, *, weights: object = None) -> Tensor:
    """Return the mean number of classes in a set, 0 to K.

    Args:
        sets: `[N, ..., K]`, bool.
        weights: How often each row counts, `[N]`; once if None.

    Examples:
        >>> set_size([[True, False], [True, True]]).item()
        1.5
    """
    sizes = _checked(sets).sum(-1).double().flatten()
    return weighted_mean(sizes, element_weights(weights, sets, len(sizes), sizes.device))


class StratifiedCoverage(NamedTuple):
    """Coverage by strata of the rows; float64 but for the last.

    Attributes:
        gap: The largest `|coverage - (1 - alpha)|` over the strata that hold rows, 0-d.
        coverage: Of every stratum `[G]`; NaN where it holds no rows.
        rows: Rows of every stratum `[G]`, or their weight.
        num_empty: Strata without rows, which are left out.
    """

    gap: Tensor
    coverage: Tensor
    rows: Tensor
    num_empty: int


def size_stratified_coverage(
    sets: object, labels: object, alpha: float, *, sizes: Sequence[int] = SIZES, weights: object = None
) -> StratifiedCoverage:
    """Return coverage by the size of the set, and how far it is from `1 - alpha` at worst (SSCV); lower is better.

    Sets that are small where they should be large cover less there, though they may cover enough overall.

    Args:
        sets: `[N, ..., K]`, bool.
        labels: Class labels `[N, ...]`.
        alpha: The miscoverage that the sets were made for.
        sizes: Rising upper ends of the strata; the last stratum holds all larger sets. Ends of K and more are dropped.
        weights: How often each row counts, `[N]`; once if None.

    References:
        A. Angelopoulos, S. Bates, J. Malik, M. Jordan (2021). Uncertainty sets for image classifiers using conformal
        prediction. ICLR.

    Examples:
        >>> found = size_stratified_coverage([[True, False, False], [True, True, False]], [1, 1], alpha=0.1)
        >>> found.coverage.tolist(), round(found.gap.item(), 4), found.num_empty
        ([0.0, 1.0], 0.9, 0)
    """
    check_level(alpha, "alpha")
    whole = [check_count(size, "sizes", minimum=0) for size in sizes]
    if any(high <= low for low, high in pairwise(whole)):
        raise BadInput(f"sizes must rise, got {list(sizes)}")
    values, covered = covered_labels(sets, labels)
    ends = torch.tensor([size for size in whole if size < values.shape[-1]], dtype=torch.long, device=values.device)
    index = torch.searchsorted(ends, values.sum(-1).flatten())
    return _stratified(
        index, covered, len(ends) + 1, alpha, element_weights(weights, labels, len(covered), values.device)
    )


def class_conditional_coverage(
    sets: object, labels: object, alpha: float, *, weights: object = None
) -> StratifiedCoverage:
    """Return coverage by the true class `[K]`, and how far it is from `1 - alpha` at worst; lower is better.

    Classes that no row has are left out of the worst and counted. Arguments as for `size_stratified_coverage`.

    References:
        M. Sadinle, J. Lei, L. Wasserman (2019). Least ambiguous set-valued classifiers with bounded error levels. JASA.

    Examples:
        >>> found = class_conditional_coverage([[True, False, False], [True, True, False]], [0, 0], alpha=0.1)
        >>> found.coverage.tolist(), round(found.gap.item(), 4), found.num_empty
        ([1.0, nan, nan], 0.1, 2)
    """
    check_level(alpha, "alpha")
    values, covered = covered_labels(sets, labels)
    index = as_tensor(labels, "labels").to(values.device).long().flatten()
    per_row = element_weights(weights, labels, len(covered), values.device)
    return _stratified(index, covered, values.shape[-1], alpha, per_row)


def _stratified(
    index: Tensor, covered: Tensor, groups: int, alpha: float, weights: Tensor | None
) -> StratifiedCoverage:
    mass = torch.ones_like(covered) if weights is None else weights
    count = group_sums(index, mass, groups)
    coverage = group_sums(index, mass * covered, groups) / count
    filled = count > 0
    gap = (coverage[filled] - (1 - alpha)).abs().amax()
    return StratifiedCoverage(gap, coverage, count, int((~filled).sum()))


class SlabCoverage(NamedTuple):
    """The slab `lower <= direction . x <= upper` that covered least, and its coverage on held-out rows; float64.

    Attributes:
        coverage: Share of the held-out rows in the slab whose set holds the label, 0-d.
        share: Share of the held-out rows that lie in the slab, 0-d.
        direction: A unit vector `[D]`.
        lower, upper: The ends of the slab, 0-d.
    """

    coverage: Tensor
    share: Tensor
    direction: Tensor
    lower: Tensor
    upper: Tensor


def worst_slab_coverage(
    features: object,
    sets: object,
    labels: object,
    *,
    delta: float = 0.1,
    num_directions: int = 1000,
    held_out: float = 0.75,
    seed: int = 0,
    weights: object = None,
) -> SlabCoverage:
    """Return the coverage in the slab of feature space where it is worst; the closer to the overall one the better.

    Rows are split at random. On the first part, the slab with the lowest coverage is sought among all that hold at
    least a share `delta` of its rows, exactly in each of `num_directions` random directions; its coverage is measured on
    the part held out, where the search cannot have fitted noise. Rows of equal projection are never split. It takes
    O(N log N) time and N D multiplications a direction.

    Args:
        features: `[N, D]`, in comparable units (standardise them first).
        sets: `[N, K]`, bool.
        labels: Class labels `[N]`.
        delta: Share of the rows that a slab holds at least.
        num_directions: Directions tried.
        held_out: Share of the rows held out.
        seed: Of the split and of the directions.
        weights: How often each row counts, `[N]`; once if None. Rows are split by number, and each goes to one side with
            all its weight; copies of a row could go to both. On either side a weight counts as that many rows.

    Raises:
        BadInput: Too few rows for the split, no held-out row in the slab, NaN or infinity (with the row), shapes that
            differ, settings without meaning.

    References:
        M. Cauchois, S. Gupta, J. Duchi (2021). Knowing what you know: valid and validated confidence sets in multiclass
        and multilabel prediction. JMLR.
        Y. Romano, M. Sesia, E. Candès (2020). Classification with valid and adaptive coverage. NeurIPS (the
        split, and the defaults).

    Examples:
        >>> x = torch.linspace(-1, 1, 400).unsqueeze(-1)
        >>> sets = torch.cat([x < 0.5, torch.ones_like(x, dtype=torch.bool)], -1)  # class 0 is lost above 0.5
        >>> found = worst_slab_coverage(x, sets, [0] * 400, num_directions=2)
        >>> found.coverage.item(), set_coverage(sets, [0] * 400).item()
        (0.0, 0.75)
    """
    check_level(delta, "delta")
    check_level(held_out, "held_out")
    check_count(num_directions, "num_directions")
    generator = stream("cpu", check_count(seed, "seed", minimum=0), "worst slab")
    rows, covered, mass = _placed(features, sets, labels, weights)
    order = torch.randperm(len(rows), generator=generator, device="cpu").to(rows.device)
    test, fit = order.tensor_split([round(held_out * len(rows))])
    if not (len(test) and len(fit)):
        raise BadInput(f"features has {len(rows)} rows; held_out={held_out} leaves none on one side of the split")
    directions = torch.randn(num_directions, rows.shape[-1], generator=generator, dtype=torch.float64, device="cpu")
    directions = directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    direction, lower, upper = _worst_slab(directions.to(rows.device), rows[fit], covered[fit], mass[fit], delta)
    place = _projected(direction.unsqueeze(0), rows[test])[0]
    inside = (lower <= place) & (place <= upper)
    if not bool(inside.any()):
        raise BadInput(f"none of the {len(test)} rows held out lies in the slab; pass more rows, or a larger delta")
    share = weighted_mean(inside.double(), mass[test])
    return SlabCoverage(weighted_mean(covered[test], mass[test] * inside), share, direction, lower, upper)


def _worst_slab(
    directions: Tensor, rows: Tensor, covered: Tensor, mass: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the direction, lower and upper end of the slab that covers least."""
    least = delta * mass.sum().item() * (1 - 1e-12)  # 0.1 * 30 is above 3
    found = []
    for part in slices(len(directions), 6 * len(rows)):
        place, order = _projected(directions[part], rows).sort(dim=-1, stable=True)
        rate, start, end = _worst_windows(place, covered[order], mass[order], least)
        lower, upper = place.gather(-1, start.unsqueeze(-1)), place.gather(-1, end.unsqueeze(-1) - 1)
        found.append((rate, lower.squeeze(-1), upper.squeeze(-1)))
    rate, lower, upper = (torch.cat(parts) for parts in zip(*found, strict=True))
    best = int(rate.argmin())
    return directions[best], lower[best], upper[best]


def _worst_windows(place: Tensor, covered: Tensor, mass: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each row of sorted places `[R, M]` the rate, start and end of the window that covers least.

    Of all windows of at least the mass `least` that split no equal places, by Dinkelbach's method: a window covers less
    than the best rate so far just if its sum of (covered - rate) is negative, and the window of the smallest such sum is
    found in one pass. The rates fall until none is better.
    """
    hits = torch.nn.functional.pad((covered * mass).cumsum(-1), (1, 0))
    total = torch.nn.functional.pad(mass.cumsum(-1), (1, 0))
    cut = torch.nn.functional.pad(place[:, 1:] != place[:, :-1], (1, 1), value=True)
    # The last place where a window can start that has the mass by its end.
    latest = torch.searchsorted(total, total - least, right=True) - 1
    can_end = cut & (latest >= 0)
    latest = latest.clamp_min(0)
    start, end = torch.zeros_like(latest[:, :1]), torch.full_like(latest[:, :1], place.shape[-1])
    rate = hits[:, -1:] / total[:, -1:]
    while True:
        excess = hits - rate * total
        before, at = excess.where(cut, -torch.inf).cummax(-1)
        last = (excess - before.gather(-1, latest)).where(can_end, torch.inf).argmin(-1, keepdim=True)
        first = at.gather(-1, latest.gather(-1, last))
        found = (hits.gather(-1, last) - hits.gather(-1, first)) / (total.gather(-1, last) - total.gather(-1, first))
        better = found < rate
        if not bool(better.any()):
            return rate.squeeze(-1), start.squeeze(-1), end.squeeze(-1)
        rate, start, end = found.where(better, rate), first.where(better, start), last.where(better, end)


def _projected(directions: Tensor, rows: Tensor) -> Tensor:
    """Return the places `[R, M]` of rows `[M, D]` along directions `[R, D]`; equal rows have equal ones."""
    total = rows.new_zeros(len(directions), len(rows))
    # A matrix product may round equal rows differently, by where they lie in its blocks.
    for part, column in zip(directions.t(), rows.t(), strict=True):
        total += part.unsqueeze(-1) * column
    return total


def _checked(sets: object) -> Tensor:
    values = as_tensor(sets, "sets")
    if values.dtype != torch.bool:
        raise BadType(f"sets must be bool, whether each class is in the set, got dtype {values.dtype}")
    if values.dim() < 2 or values.numel() == 0:
        raise BadInput(f"sets has shape {tuple(values.shape)}; [N, K] with at least one row is needed")
    return values


def covered_labels(sets: object, labels: object) -> tuple[Tensor, Tensor]:
    """Return the sets, and whether each holds its label, flat float64."""
    values = _checked(sets)
    truth = check_labels(as_tensor(labels, "labels").to(values.device), values.shape[:-1], values.shape[-1], "labels")
    return values, values.gather(-1, truth.unsqueeze(-1)).double().flatten()


def _placed(features: object, sets: object, labels: object, weights: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return features `[M, D]`, whether each set holds its label, and the weights, of the rows that have weight."""
    values, covered = covered_labels(sets, labels)
    rows = as_tensor(features, "features").to(values.device)
    if rows.dim() != 2 or rows.numel() == 0:
        raise BadInput(f"features has shape {tuple(rows.shape)}; [N, D] with at least one row is needed")
    check_shape(values[..., 0], rows.shape[:1], "sets without its last axis")
    check_finite(rows, "features")
    mass = element_weights(weights, labels, len(covered), covered.device)
    if mass is None:
        return rows.detach().double(), covered, torch.ones_like(covered)
    kept = mass > 0
    return rows.detach().double()[kept], covered[kept], mass[kept]
