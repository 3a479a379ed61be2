"""Checks of what users hand in: bad input gets an error that names it, and never becomes a number."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

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
            way = _to_numbers(value.dtype.kind)
            raise BadType(f"{name} must hold numbers, got an array of dtype {value.dtype}{way}")
        if value.dtype == np.longdouble and value.dtype != np.float64:
            raise BadType(
                f"{name} has dtype {value.dtype}, which torch does not know; convert it, as by .astype(float)"
            )
        # Read-only memory would make torch warn, a negative stride and another machine's order of bytes are refused: all
        # need a copy.
        native = value.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(value, dtype=native, order="C", copy=not value.flags.writeable or None))
    if isinstance(value, (int, float, Sequence)) and not isinstance(value, (str, bytes)):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadType(f"{name} must hold numbers, in rows of one length; torch says: {error}") from error
    way = "; convert it, as by .to_numpy()" if hasattr(value, "to_numpy") else ""
    raise BadType(f"{name} must be a tensor or a NumPy array, got {type(value).__name__}{way}")


def _to_numbers(kind: str) -> str:
    """Say how an array of such a kind becomes one of numbers."""
    if kind in "US":
        return "; names of classes become numbers by numpy.unique(names, return_inverse=True)[1]"
    return "; convert it, as by .astype(float) or .astype(int)" if kind == "O" else ""


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
    one_hot = tuple(targets.shape) == (*shape, num_classes)
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        way = "targets.argmax(-1) for one-hot or soft targets" if one_hot else "targets.long() for class numbers"
        raise BadType(
            f"{name} must be integer class labels, got dtype {targets.dtype}; pass {way}; targets that are real numbers "
            "need a likelihood of their own, as likelihoods.Gaussian()"
        )
    if one_hot:
        raise BadInput(
            f"{name} has shape {tuple(targets.shape)}, but {tuple(shape)} is needed; for one-hot targets pass the class "
            "index: targets.argmax(-1)"
        )
    check_shape(targets, shape, name)
    # int8 and uint8 would overflow in the comparison with a large class count.
    labels = targets.long()
    low, high = torch.stack(labels.aminmax()).tolist() if labels.numel() else (0, 0)
    if low < 0 or high >= num_classes:
        bad = (labels < 0) | (labels >= num_classes)
        row = bad_row(bad)
        value = int(labels.reshape(labels.shape[0], -1)[row][bad.reshape(labels.shape[0], -1)[row]][0])
        way = "Drop rows that are to be ignored before the call"
        if low == 1 and high == num_classes:
            way = "If labels start at 1, subtract 1 from all"
        raise BadInput(f"{name} has label {value} in row {row}; labels must be in 0..{num_classes - 1}. {way}")
    return labels


def check_shape(value: Tensor, shape: Sequence[int], name: str) -> None:
    """Raise BadInput unless `value` has exactly this shape; (N, 1) against (N,) would broadcast to N x N."""
    if tuple(value.shape) != tuple(shape):
        raise BadInput(
            f"{name} has shape {tuple(value.shape)}, but {tuple(shape)} is needed; "
            f"shapes must match exactly, nothing is broadcast{to_shape(value.shape, shape, name)}"
        )


def to_shape(given: Sequence[int], needed: Sequence[int], name: str) -> str:
    """Say how one shape becomes another where an axis of length one is all they differ in; nothing otherwise."""
    if (*needed, 1) == tuple(given):
        return f": pass {name}.squeeze(-1)"
    return f": pass {name}.unsqueeze(-1)" if (*given, 1) == tuple(needed) else ""


def check_level(value: float, name: str) -> float:
    """Return a probability strictly between 0 and 1, or raise."""
    level = check_number(value, name)
    if not 0.0 < level < 1.0:
        raise BadInput(f"{name} must be strictly between 0 and 1, got {value}")
    return level


def check_positive(value: float, name: str) -> float:
    """Return a positive finite number, or raise."""
    number = check_number(value, name)
    if not 0.0 < number < math.inf:
        raise BadInput(f"{name} must be a positive number, got {value}")
    return number


def check_number(value: object, name: str) -> float:
    """Return a number, or raise: what float() makes of text or of True is seldom what was meant."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype != torch.bool:
        return float(value)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise BadType(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise where a file cannot be written, for want of its folder or because it is one: before the work, not after it."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; name a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: there is no folder {target.parent}; make it first")


def check_count(value: int, name: str, *, minimum: int = 1) -> int:
    """Return an integer of at least `minimum`, or raise."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise BadType(f"{name} must be an integer, got {type(value).__name__}")
    if value < minimum:
        raise BadInput(f"{name} must be at least {minimum}, got {value}")
    return int(value)
