"""Predictions kept in files: NumPy archives, CSV and Parquet tables."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesguard.checks import as_tensor, check_finite
from bayesguard.errors import BadFile, BadInput
from bayesguard.predictive import Predictive

TARGET_NAMES = ("targets", "labels", "y", "target", "label")
Columns = Mapping[str, Any]
_KINDS = ("probs", "logits", "loc+scale", "samples")
_PATTERNS = {"p": r"p\d+", "prob_": r"prob_.+", "logit_": r"logit_.+"}


def read_predictions(
    path: str | Path, targets: str | None = None, groups: str | None = None
) -> tuple[Predictive, Tensor, Any]:
    """Return the predictive, the targets and the group labels (or None) of a file.

    An `.npz` holds `probs` or `logits` (`[N, K]`, or `[S, N, K]` for a mixture over S draws), `loc` and `scale` (`[N]`),
    or `samples` (`[S, N]`), and the targets. Tables have a column for each class, or the columns loc and scale. Columns of
    classes are named p0, p1, ..., prob_0, prob_1, ... or logit_0, logit_1, ..., or by the classes: prob_cat, prob_dog, and
    then the targets are the names.

    Args:
        path: A .npz, .csv or .parquet file.
        targets: Name of the targets; None for one of `targets`, `labels`, `y`, `target`, `label`.
        groups: Name of the group labels; None for no groups.

    Raises:
        BadFile: The file cannot be read, or is of no known kind.
        BadInput: Something is missing in it; the message says what there is.
    """
    path = Path(path)
    columns = _read_npz(path) if path.suffix == ".npz" else _read_table(path)
    truth = _column(columns, targets, TARGET_NAMES, path)
    labels = None if groups is None else _column(columns, groups, (), path)
    return _predictive(columns, path), _targets(truth, columns, path), labels


def _read_npz(path: Path) -> Columns:
    try:
        # Pickled objects could run code: they are never read.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise BadFile(f"{path} does not exist") from None
    except Exception as error:
        raise BadFile(f"{path} cannot be read as a NumPy archive without pickled objects: {error}") from error


def _read_table(path: Path) -> Columns:
    if path.suffix not in (".csv", ".parquet"):
        raise BadFile(f"{path} is of no known kind; pass a .npz, .csv or .parquet file")
    if not path.is_file():
        raise BadFile(f"{path} does not exist")
    try:
        import pandas
    except ImportError as error:
        raise ImportError(f'{path.suffix} files need pandas: pip install "bayesguard[tables]"') from error
    try:
        frame = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_parquet(path)
    except Exception as error:
        raise BadFile(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    return {str(name): frame[name].to_numpy() for name in frame.columns}


def _column(columns: Columns, name: str | None, usual: tuple[str, ...], path: Path) -> Any:
    for candidate in (name,) if name is not None else usual:
        if candidate in columns:
            return columns[candidate]
    wanted = repr(name) if name is not None else f"targets (any of {', '.join(usual)}; --targets names another)"
    raise BadInput(f"{path} has no {wanted}; it has {', '.join(columns) or 'nothing'}")


def _predictive(columns: Columns, path: Path) -> Predictive:
    """Return the one kind of prediction that the file holds."""
    found = [name for name in _KINDS if all(part in columns for part in name.split("+"))]
    classes = {kind: _class_columns(columns, kind, path) for kind in _PATTERNS}
    found += [kind for kind, names in classes.items() if names]
    if len(found) != 1:
        raise BadInput(
            f"{path} has {'several kinds of predictions (' + ', '.join(found) + ')' if found else 'no predictions'}; one "
            "is needed: arrays probs, logits, loc and scale, or samples, or columns p0, p1, ... (prob_NAME, logit_NAME); "
            f"it has {', '.join(columns) or 'nothing'}"
        )
    kind = found[0]
    if kind == "loc+scale":
        return Predictive.from_normal(_numbers(columns, "loc", path), _numbers(columns, "scale", path))
    if kind == "samples":
        return Predictive.from_samples(_numbers(columns, "samples", path))
    make = Predictive.from_logits if kind in ("logits", "logit_") else Predictive.from_probs
    if kind in ("probs", "logits"):
        values = _numbers(columns, kind, path)
        return make(values, draws=values.dim() == 3)
    return make(torch.stack([_numbers(columns, name, path).double() for name in classes[kind]], dim=-1))


def _numbers(columns: Columns, name: str, path: Path) -> Tensor:
    values = np.asarray(columns[name])
    if values.dtype.kind not in "biuf":
        raise BadInput(f"{path} has something other than numbers in {name!r}")
    return as_tensor(values, name)


def _class_columns(columns: Columns, kind: str, path: Path) -> list[str]:
    """Return the columns of the classes, by number where they are numbered, whatever their order in the file."""
    names = [name for name in columns if re.fullmatch(_PATTERNS[kind], name)]
    suffixes = [name.removeprefix(kind) for name in names]
    if not all(suffix.isdecimal() for suffix in suffixes):
        return names
    ordered = sorted(names, key=lambda name: int(name.removeprefix(kind)))
    if sorted(map(int, suffixes)) != list(range(len(names))):
        raise BadInput(
            f"{path} has the columns {', '.join(ordered)}; classes must be numbered 0, 1, 2, ... without a gap"
        )
    return ordered


def _class_numbers(truth: Any, columns: Columns, path: Path) -> Any:
    """Return targets given as class names (`cat` for the column `prob_cat`) as numbers; others as they are."""
    values = np.asarray(truth)
    for kind in _PATTERNS:
        names = [name.removeprefix(kind) for name in _class_columns(columns, kind, path)]
        if not names or all(name.isdecimal() for name in names):
            continue
        numbers = {name: number for number, name in enumerate(names)}
        unknown = [str(value) for value in values.tolist() if str(value) not in numbers]
        if unknown:
            raise BadInput(f"{path} has the target {unknown[0]!r}; the classes are {', '.join(names)}")
        return np.array([numbers[str(value)] for value in values.tolist()])
    return values


def _targets(truth: Any, columns: Columns, path: Path) -> Tensor:
    """Return targets, and give class labels that a table kept as floats their integers back."""
    values = _class_numbers(truth, columns, path)
    if values.dtype.kind not in "biuf":
        raise BadInput(
            f"{path} has targets that are neither numbers nor names of classes, such as {values.tolist()[0]!r}"
        )
    targets = as_tensor(values, "targets")
    check_finite(targets, "targets")
    whole = not targets.is_floating_point() or bool((targets == targets.round()).all())
    return targets.long() if whole and not ("loc" in columns or "samples" in columns) else targets
