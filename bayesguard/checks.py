"""Checks of what users hand in: bad input gets an error that names it, and never becomes a number."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.looks import found

Array = Tensor | npt.NDArray[np.generic]


def as_tensor(value: object, name: str) -> Tensor:
    """Return `value` as a tensor without changing it; NumPy arrays, sequences and numbers are accepted."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise BadType(f"{name} must hold numbers, got an array of dtype {value.dtype}")
        # Read-only memory would make torch warn, and a negative stride is refused: both need a copy.
        return torch.from_numpy(np.array(value, order="C", copy=not value.flags.writeable or None))
    if isinstance(value, (int, float, Sequence)) and not isinstance(value, (str, bytes)):
        return torch.as_tensor(value)
    raise BadType(f"{name} must be a tensor or a NumPy array, got {type(value).__name__}")


def bad_row(bad: Tensor) -> int:
    """Return the index along the first axis of the first True of a boolean tensor."""
    rows = bad.reshape(bad.shape[0], -1).any(dim=1) if bad.dim() else bad.reshape(1)
    return int(rows.nonzero()[0])


def check_finite(value: Tensor, name: str, *, allow_negative_infinity: bool = False, row_axis: int = 0) -> None:
    """Raise BadInput naming the first row with NaN or infinity; -inf may be allowed, as for masked logits."""
    if not value.is_floating_point():
        return
    bad = value.isnan() | (value == torch.inf)
    if not allow_negative_infinity:
        bad |= value == -torch.inf
    if found(bad.any()):
        row = bad_row(bad.movedim(row_axis, 0) if bad.dim() else bad)
        allowed = "finite numbers or -inf (a masked class)" if allow_negative_infinity else "finite numbers"
        raise BadInput(f"{name} has NaN or infinity in row {row}; only {allowed} are allowed")


def check_labels(targets: Tensor, shape: Sequence[int], num_classes: int, name: str = "targets") -> Tensor:
    """Return integer class labels as int64 after checking dtype, shape and range."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise BadType(
            f"{name} must be integer class labels, got dtype {targets.dtype}; "
            "for one-hot or soft targets pass the class index: targets.argmax(-1)"
        )
    check_shape(targets, shape, name)
    # int8 and uint8 would overflow in the comparison with a large class count.
    labels = targets.long()
    low, high = torch.stack(labels.aminmax()).tolist() if labels.numel() else (0, 0)
    if low < 0 or high >= num_classes:
        bad = (labels < 0) | (labels >= num_classes)
        row = bad_row(bad)
        value = int(labels.reshape(labels.shape[0], -1)[row][bad.reshape(labels.shape[0], -1)[row]][0])
        raise BadInput(
            f"{name} has label {value} in row {row}; labels must be in 0..{num_classes - 1}. "
            "Drop rows that are to be ignored before the call"
        )
    return labels


def check_shape(value: Tensor, shape: Sequence[int], name: str) -> None:
    """Raise BadInput unless `value` has exactly this shape; (N, 1) against (N,) would broadcast to N x N."""
    if tuple(value.shape) != tuple(shape):
        raise BadInput(
            f"{name} has shape {tuple(value.shape)}, but {tuple(shape)} is needed; "
            "shapes must match exactly, nothing is broadcast"
        )


def check_level(value: float, name: str) -> float:
    """Return a probability strictly between 0 and 1, or raise BadInput."""
    if not 0.0 < float(value) < 1.0:
        raise BadInput(f"{name} must be strictly between 0 and 1, got {value}")
    return float(value)


def check_count(value: int, name: str, *, minimum: int = 1) -> int:
    """Return an integer of at least `minimum`, or raise."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise BadType(f"{name} must be an integer, got {type(value).__name__}")
    if value < minimum:
        raise BadInput(f"{name} must be at least {minimum}, got {value}")
    return int(value)
