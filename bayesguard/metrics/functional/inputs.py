"""What every metric does with what it is handed: checked, flattened, summed in float64."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bayesguard.checks import as_tensor, bad_row, check_finite, check_labels, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive.numerics import BUDGET, CACHED

# Classes from which on NumPy's argmax of a row is the faster one.
_LONG = 24
_BITS = {torch.float32: np.uint32, torch.float64: np.uint64}


def classified(probs: object, targets: object) -> tuple[Tensor, Tensor]:
    """Return probabilities `[M, K]` in their own dtype and labels `[M]` of `[N, ..., K]` and `[N, ...]`.

    Raises:
        BadInput: No rows, rows that are no distribution (with the row), or labels of another shape or out of range.
        BadType: Probabilities that are not floating point, or labels that are not integers.
    """
    values, labels = _shaped(probs, targets)
    return _inside(values.flatten(0, -2), _scan(values)), labels


def answered(probs: object, targets: object) -> tuple[Tensor, Tensor]:
    """Return what `top_label(*classified(probs, targets))` does, checks and answers in one pass over `probs`.

    The confidences are the largest probabilities, in the dtype of `probs`; which of them are right, in float64.
    """
    values, labels = _shaped(probs, targets)
    found = _by_bits(values.detach().flatten(0, -2), labels)
    if not found:
        _scan(values, labels, found)
    confidence, right = (torch.cat(parts) for parts in zip(*found, strict=True))
    return confidence.clamp_(0, 1), right.double()


def _shaped(probs: object, targets: object) -> tuple[Tensor, Tensor]:
    """Return `probs` as they are and flat labels, after checking all but the values of `probs`."""
    values = as_tensor(probs, "probs")
    if values.dim() < 2 or values.shape[-1] < 2:
        raise BadInput(
            f"probs has shape {tuple(values.shape)}; [N, K] with at least two classes is needed "
            "(for yes or no, stack [1 - p, p])"
        )
    _check_floating(values)
    labels = check_labels(as_tensor(targets, "targets").to(values.device), values.shape[:-1], values.shape[-1])
    return values, labels.flatten()


def _inside(values: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """Return values in [0, 1]: a copy only where rounding has put one outside."""
    low, high = bounds
    return values if bool((low >= 0) & (high <= 1)) else values.clamp(0, 1)


def yes_or_no(probs: object, targets: object) -> tuple[Tensor, Tensor]:
    """Return checked probabilities of yes and 0/1 outcomes, float64, both flat.

    Raises:
        BadInput: No rows, another shape, probabilities outside 0..1, targets that are neither 0 nor 1.
    """
    scores = as_tensor(probs, "probs")
    outcomes = as_tensor(targets, "targets").to(scores.device)
    check_shape(outcomes, scores.shape, "targets")
    _check_floating(scores)
    check_finite(scores, "probs")
    slack = _slack(scores)
    for name, value, bad in (
        ("probs", scores, (scores < -slack) | (scores > 1 + slack)),
        ("targets", outcomes, (outcomes != 0) & (outcomes != 1)),
    ):
        if bad.any():
            allowed = "probabilities in 0..1; pass logits through sigmoid() first" if name == "probs" else "0 and 1"
            raise BadInput(f"{name} has {value[bad][0].item():g} in row {bad_row(bad)}; allowed are {allowed}")
    return scores.flatten().clamp(0, 1), outcomes.double().flatten()


def _scan(
    probs: Tensor, labels: Tensor | None = None, found: list[tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, Tensor]:
    """Check that every row of `[N, ..., K]` is a distribution, and return the smallest and the largest value.

    They are to 1e-3, or to half a unit of bfloat16's last place. If `found` is given, the largest value of every row
    and whether its first place is the label are appended to it, slice by slice. A slice is read three times while it is
    in the cache: for the sums, the smallest, and the largest. What these sums leave in doubt is summed in float64.
    """
    rows = probs.detach().flatten(0, -2)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    sums, lows, highs = [], [], []
    for place in cached_slices(rows):
        part = rows[place]
        sums.append(part.sum(-1, dtype=dtype))
        if labels is None or found is None:
            low, high = part.aminmax()
        else:
            found.append(_answers(part, labels[place]))
            low, high = part.amin(), found[-1][0].amax()
        lows.append(low)
        highs.append(high)
    low, high, slack = torch.stack(lows).amin(), torch.stack(highs).amax(), _slack(probs)
    if not bool(_near_one(torch.cat(sums), probs) & (low >= -slack) & (high <= 1 + slack)):
        _check_rows(probs.detach())
    return low, high


def _near_one(sums: Tensor, probs: Tensor) -> Tensor:
    """Return whether sums in float32 or float64 leave no doubt that the rows of `probs` sum to 1."""
    # Rounding moves such sums by far less than half of what they may miss 1 by; NaN and infinity are not near 1.
    return ((sums - 1).abs() <= sum_slack(probs) / 2).all()


def _by_bits(rows: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return what `_answers` finds in slices of long rows `[M, K]` that are distributions; nothing if there is a doubt.

    Of numbers without a sign the larger one has the larger bits, read as a whole number, and the sign is the highest bit:
    one search of a row finds its largest value, or a negative one or -0.0 if there is any. That is a pass less than
    looking for the largest and for the smallest.
    """
    if rows.device.type != "cpu" or rows.dtype not in _BITS or rows.shape[-1] < _LONG:
        return []
    bits = rows.numpy().view(_BITS[rows.dtype])
    found, sums = [], []
    for part in cached_slices(rows):
        # The search is first: it fetches numbers into the cache faster than a sum does.
        first = torch.from_numpy(bits[part].argmax(-1))
        largest = rows[part].gather(-1, first.unsqueeze(-1)).squeeze(-1)
        found.append((largest, first == labels[part]))
        sums.append(rows[part].sum(-1))
    largest = torch.cat([values for values, _ in found])
    certain = _near_one(torch.cat(sums), rows) & ~largest.signbit().any() & (largest.amax() <= 1 + _slack(rows))
    return found if bool(certain) else []


def _answers(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest value of every row `[m, K]`, and whether the label is the first place that has it."""
    if rows.device.type == "cpu" and rows.dtype in _BITS and rows.shape[-1] >= _LONG:
        # NumPy's search uses the vector unit; that of torch takes six times as long.
        first = torch.from_numpy(rows.numpy().argmax(-1))
        return rows.gather(-1, first.unsqueeze(-1)).squeeze(-1), first == labels
    largest = rows.amax(-1)
    right = rows.gather(-1, labels.unsqueeze(-1)).squeeze(-1) == largest
    # Only values of at most one half can be equal; what rounding may add to that is allowed for.
    most = (1 + sum_slack(rows) + rows.shape[-1] * _slack(rows)) / 2
    doubtful = (right & (largest <= most)).nonzero().squeeze(-1)
    if len(doubtful):
        right[doubtful] = rows[doubtful].max(-1).indices == labels[doubtful]
    return largest, right


def _check_rows(probs: Tensor) -> None:
    """Raise BadInput unless every row is a distribution, by sums in float64."""
    check_finite(probs, "probs")
    sums, slack = probs.sum(-1, dtype=torch.float64), _slack(probs)
    bad = (probs < -slack).any(-1) | (probs > 1 + slack).any(-1) | ((sums - 1).abs() > sum_slack(probs))
    if bad.any():
        raise BadInput(
            f"probs is no distribution in row {bad_row(bad)}, which sums to {sums[bad][0].item():g}: values must "
            "lie in 0..1 and sum to 1; pass logits through softmax(-1) first"
        )


def sum_slack(values: Tensor) -> float:
    """Return by how much a row of probabilities may miss 1: what rounding to its dtype can do, and 1e-3 at least."""
    return max(1e-3, torch.finfo(values.dtype).eps / 2)


def paired(
    first: object, second: object, name: str, other: str, *, infinite: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Return two tensors of exactly one shape as flat float64; those not named in `infinite` must be finite."""
    a = as_tensor(first, name)
    b = as_tensor(second, other).to(a.device)
    if a.dim() == 0 or a.numel() == 0:
        raise BadInput(f"{name} has shape {tuple(a.shape)}; a metric needs at least one row")
    check_shape(b, a.shape, other)
    for value, label in ((a, name), (b, other)):
        # Intervals may be unbounded; NaN is nothing.
        check_finite(value.masked_fill(value.isinf(), 0) if label in infinite else value, label)
    return a.double().flatten(), b.double().flatten()


def top_label(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return confidence `[M]` of the most probable class and whether it is right, float64 `[M]`."""
    confidence, predicted = probs.max(-1)
    return confidence, (predicted == labels).double()


def element_weights(weights: object, like: object, count: int, device: torch.device) -> Tensor | None:
    """Return the weight of each of `count` elements, float64, from weights `[N]` of the N rows of `like`."""
    if weights is None:
        return None
    rows = len(as_tensor(like, "targets"))
    values = as_tensor(weights, "weights").to(device)
    check_shape(values, (rows,), "weights")
    check_finite(values, "weights")
    if bool((values < 0).any()) or not bool((values > 0).any()):
        raise BadInput("weights must not be negative, and not all zero")
    return values.double().repeat_interleave(count // rows)


def side_weights(
    weights: Sequence[object] | None, sides: tuple[object, object], scores: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Return the weight of each row of in-distribution and of other scores, float64, from a pair of weights."""
    if weights is None:
        return [torch.ones_like(values) for values in scores]
    if not isinstance(weights, (tuple, list)) or len(weights) != 2:
        raise BadType(f"weights must be a pair, of in_scores and of out_scores, got {type(weights).__name__}")
    device = scores[0].device
    given = (element_weights(w, side, len(s), device) for w, side, s in zip(weights, sides, scores, strict=True))
    return [torch.ones_like(s) if w is None else w for w, s in zip(given, scores, strict=True)]


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean of float64 `values` `[M]`; an infinite value without weight adds nothing."""
    if weights is None:
        return values.mean()
    return (weights * values.where(weights > 0, 0.0)).sum() / weights.sum()


def group_sums(index: Tensor, values: Tensor, groups: int) -> Tensor:
    """Return sums of float64 `values` by group, the same on every run."""
    if values.device.type == "cpu":
        return torch.bincount(index, weights=values, minlength=groups).double()  # of nothing, whole numbers come back
    # Weighted counts and scatter_add sum by atomics there, in any order; this sorts first.
    return values.new_zeros(groups).index_put_((index,), values, accumulate=True)


def cached_slices(rows: Tensor, copies: int = 1) -> Iterator[slice]:
    """Cut rows `[M, K]` into slices that stay in the cache of a CPU with `copies` of them, or of bounded memory."""
    elements = min(BUDGET, CACHED) // copies if rows.device.type == "cpu" else BUDGET
    step = max(1, elements // max(1, rows.shape[-1]))
    return (slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step))


def _slack(values: Tensor) -> float:
    # A softmax or an exp may end a few units of the last place above 1.
    return max(1e-6, torch.finfo(values.dtype).eps)


def _check_floating(values: Tensor) -> None:
    if values.numel() == 0:
        raise BadInput(f"probs has shape {tuple(values.shape)}; a metric needs at least one row")
    if not values.is_floating_point():
        raise BadType(f"probs must be floating point, got {values.dtype}; labels are no probabilities")
