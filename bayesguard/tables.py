"""Predictions kept in files: NumPy archives, CSV and Parquet tables."""

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesguard.checks import as_tensor, check_finite
from bayesguard.errors import BadFile, BadInput
from bayesguard.grouping import is_missing
from bayesguard.predictive import Predictive
from bayesguard.predictive.numerics import slices, wide

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
    columns = _columns(path)
    truth = _column(columns, targets, TARGET_NAMES, path)
    if not np.size(truth):
        raise BadInput(f"{path} has no rows; there is nothing to evaluate")
    labels = None if groups is None else _groups(_column(columns, groups, (), path, as_text=True), groups, path)
    predictive = _predictive(columns, path)
    if names := _named_classes(columns, path):
        written = _column(columns, targets, TARGET_NAMES, path, as_text=True)
        # True may be written TRUE, and 1.5 as 1.50: what is no name as it is written may be one as it is read.
        truth = written if all(is_missing(name) or name in names for name in written.tolist()) else truth
    if np.asarray(truth).dtype.kind == "b" and getattr(predictive, "num_classes", 2) > 2:
        raise BadInput(
            f"{path} has targets of True and False, but {predictive.num_classes} classes; number the classes"
        )
    return predictive, _targets(truth, columns, path), labels


def _columns(path: Path) -> Columns:
    kinds: dict[str, Callable[[Path], Columns]] = {".npz": _Archive, ".csv": _Csv, ".parquet": _Parquet}
    if path.suffix not in kinds:
        raise BadFile(f"{path} is of no known kind; pass a .npz, .csv or .parquet file")
    if not path.is_file():
        raise BadFile(f"{path} does not exist")
    return kinds[path.suffix](path)


class _Archive(Mapping[str, Any]):
    """The arrays of an .npz, each read when it is asked for: what nobody needs takes no memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = self._read(lambda archive: list(archive.files))

    def _read(self, part: Callable[[Any], Any]) -> Any:
        try:
            # Pickled objects could run code: they are never read.
            with open(self.path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                return part(archive)
        except Exception as error:
            raise BadFile(
                f"{self.path} cannot be read as a NumPy archive without pickled objects: {error or type(error).__name__}"
            ) from error

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self._read(lambda archive: archive[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Csv(dict[str, Any]):
    """The columns of a .csv file, numbers where all of a column are numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(_read_csv(path))

    def text(self, name: str) -> Any:
        """Return a column as it is written: 01 is not 1, and a class or a group may be named NA, None or true."""
        frame = _pandas(".csv").read_csv(
            self.path, usecols=[name], dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig"
        )
        return frame[name].astype(object).to_numpy()


def _read_csv(path: Path) -> Columns:
    pandas = _pandas(".csv")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            names = next(lines, [])
            repeated = [name for name in names if names.count(name) > 1]
            if not names or repeated:
                raise ValueError(f"the first line names {repeated[0]!r} twice" if repeated else "it is empty")
            # pandas fills short rows with NaN, and takes the first column for row names where all rows are too long.
            for number, row in enumerate(lines, 2):
                if len(row) not in (0, len(names)):
                    raise ValueError(f"line {number} has {len(row)} fields, the first line {len(names)}")
        frame = pandas.read_csv(path, index_col=False, encoding="utf-8-sig")
    except Exception as error:
        raise BadFile(f"{path} cannot be read as csv: {error}") from error
    return {str(name): frame[name].to_numpy() for name in frame.columns}


class _Parquet(Mapping[str, Any]):
    """The columns of a .parquet file, each read when it is asked for, a batch of rows at a time."""

    def __init__(self, path: Path) -> None:
        _pandas(".parquet")
        from pyarrow.parquet import ParquetFile

        self.path = path
        try:
            self.file = ParquetFile(path)
        except Exception as error:
            raise BadFile(f"{path} cannot be read as parquet: {error}") from error
        self.names = list(self.file.schema_arrow.names)

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        try:
            return self.file.read(columns=[name]).column(0).to_pandas().to_numpy()
        except Exception as error:
            raise BadFile(f"{self.path} cannot be read as parquet: {error}") from error

    def matrix(self, names: list[str]) -> Any:
        """Return columns of numbers side by side, `[N, K]`; a missing value is NaN."""
        kinds = [_number_type(self.file.schema_arrow.field(name).type, name, self.path) for name in names]
        values = np.empty((self.file.metadata.num_rows, len(names)), dtype=np.result_type(*kinds))
        start = 0
        try:
            for batch in self.file.iter_batches(batch_size=1 << 16, columns=names):
                for place, name in enumerate(names):
                    values[start : start + len(batch), place] = batch.column(name).to_numpy(zero_copy_only=False)
                start += len(batch)
        except Exception as error:
            raise BadFile(f"{self.path} cannot be read as parquet: {error}") from error
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _number_type(kind: Any, name: str, path: Path) -> Any:
    """Return float32 or float64 for an arrow type of numbers; whole numbers may be missing, and are float64."""
    from pyarrow import types

    if types.is_floating(kind):
        return np.float64 if types.is_float64(kind) else np.float32
    if types.is_integer(kind) or types.is_boolean(kind):
        return np.float64
    raise BadInput(f"{path} has something other than numbers in {name!r}")


def _pandas(suffix: str) -> Any:
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{suffix} files need pandas and pyarrow: pip install "bayesguard[tables]"') from error
    return pandas


def _groups(labels: Any, name: str, path: Path) -> Any:
    """Return group labels; a row without one would silently be a group of its own."""
    missing = [row for row, label in enumerate(labels.tolist()) if is_missing(label)]
    if missing:
        raise BadInput(f"{path} has no group label {name!r} in row {missing[0]}")
    return labels


def _column(columns: Columns, name: str | None, usual: tuple[str, ...], path: Path, *, as_text: bool = False) -> Any:
    for candidate in (name,) if name is not None else usual:
        if candidate in columns:
            return columns.text(candidate) if as_text and isinstance(columns, _Csv) else columns[candidate]
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
    values = _numbers(columns, kind, path) if kind in ("probs", "logits") else _matrix(columns, classes[kind], path)
    if kind not in ("logits", "logit_"):
        return Predictive.from_probs(values, draws=values.dim() == 3)
    if values.dim() > 1 and _are_distributions(values):
        raise BadInput(
            f"{path} has logits that are probabilities: all rows are in [0, 1] and sum to 1; name them probs, or p0, p1, "
            "... (if logits they are, subtract 1 from all of them, which changes nothing)"
        )
    return Predictive.from_logits(values, draws=values.dim() == 3)


def _are_distributions(values: Tensor) -> bool:
    """Return whether all rows are probabilities; most logits show in the first slice that they are not."""
    rows = values.reshape(-1, values.shape[-1])
    parts = (wide(rows[part]) for part in slices(len(rows), 4 * rows.shape[-1]))
    return all(bool((part >= 0).all() & ((part.sum(-1) - 1).abs() <= 1e-3).all()) for part in parts)


def _matrix(columns: Columns, names: list[str], path: Path) -> Tensor:
    """Return columns side by side `[N, K]`, in the widest dtype that there is among them."""
    if isinstance(columns, _Parquet):
        return as_tensor(columns.matrix(names), names[0])
    values = [_numbers(columns, name, path) for name in names]
    return torch.stack([column.double() for column in values], dim=-1)


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


def _named_classes(columns: Columns, path: Path) -> list[str]:
    """Return the names of the classes (`cat` for the column `prob_cat`); nothing where they are numbered."""
    for kind in _PATTERNS:
        names = [name.removeprefix(kind) for name in _class_columns(columns, kind, path)]
        if names and not all(name.isdecimal() for name in names):
            return names
    return []


def _class_numbers(truth: Any, columns: Columns, path: Path) -> Any:
    """Return targets given as names of classes as numbers; others as they are."""
    values, names = np.asarray(truth), _named_classes(columns, path)
    if not names:
        return values
    numbers = {name: number for number, name in enumerate(names)}
    for row, value in enumerate(values.tolist()):
        if is_missing(value):
            raise BadInput(f"{path} has no target in row {row}; the classes are {', '.join(names)}")
        if str(value) not in numbers:
            raise BadInput(f"{path} has the target {str(value)!r}; the classes are {', '.join(names)}")
    return np.array([numbers[str(value)] for value in values.tolist()])


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
