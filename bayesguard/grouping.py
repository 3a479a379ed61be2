"""Groups and clusters of examples, however they are told: labels, masks, a function or a column of the inputs."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesguard.checks import bad_row
from bayesguard.data import Batch
from bayesguard.errors import BadInput, BadType


class Grouping:
    """The groups of `evaluate`: those told as labels or masks, and those that have to be read off the inputs."""

    def __init__(self, groups: Any) -> None:
        self._named: dict[str, Any] = dict(groups) if isinstance(groups, Mapping) else {"": groups}
        if not self._named:
            raise BadInput("groups is empty; name a grouping at least, or leave groups out")
        self._readers = {name: reader for name, given in self._named.items() if (reader := _reader(given)) is not None}
        self._read: dict[str, dict[int, list[Any]]] = {name: {} for name in self._readers}

    @property
    def needs_inputs(self) -> bool:
        """Whether the inputs have to be seen."""
        return bool(self._readers)

    @property
    def needs_order(self) -> bool:
        """Whether rows were told by their place."""
        return len(self._readers) < len(self._named)

    def read(self, batch: Batch, offset: int) -> Batch:
        """Note what the inputs of a batch say, and return it as it is."""
        for name, reader in self._readers.items():
            values = _listed(reader(batch))
            if len(values) != batch.num_rows:
                raise BadInput(f"groups returned {len(values)} labels for a batch of {batch.num_rows} examples")
            self._read[name][offset] = values
        return batch

    def rows(self, count: int) -> list[tuple[str, Tensor]]:
        """Return the name of each group and the numbers of its examples, int64."""
        found: list[tuple[str, Tensor]] = []
        for name, given in self._named.items():
            if name in self._readers:
                given = [value for _, part in sorted(self._read[name].items()) for value in part]
                if isinstance(self._named[name], tuple):
                    given = _quantile_labels(given, self._named[name][1])
            found += _members(name, given, count)
        names = [name for name, _ in found]
        if len(set(names)) < len(names):
            raise BadInput(f"groups has two groups of one name among {', '.join(names)}; rename one")
        return found


def cluster_index(clusters: object, count: int) -> Tensor:
    """Return the number of each example's cluster, 0..C-1, int64 `[N]` on the CPU.

    Raises:
        BadInput: Another number of labels than examples, an example without a label, or fewer than two clusters.
    """
    given = _listed(clusters)
    if len(given) != count:
        raise BadInput(f"clusters has {len(given)} labels for {count} examples; one label an example is needed")
    for row, label in enumerate(given):
        if is_missing(label):  # All such would be one cluster.
            raise BadInput(f"clusters has no label in row {row}; name one, which may be its own, or drop the row")
    labels = [str(label) for label in given]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    if len(numbers) < 2:
        raise BadInput("clusters has one cluster only; from one nothing can be told about others")
    return torch.tensor([numbers[label] for label in labels], device="cpu")


def _reader(given: Any) -> Callable[[Batch], Any] | None:
    """Return what reads labels, or the values of a column, off a batch; None if they were given."""
    if callable(given) and not isinstance(given, Tensor):
        return lambda batch: given(*batch.inputs, **batch.kwargs)
    column, *rest = given if isinstance(given, tuple) and len(given) == 2 else (given,)
    if isinstance(column, bool) or not isinstance(column, (int, np.integer)):
        return None
    if rest and (isinstance(rest[0], bool) or not isinstance(rest[0], (int, np.integer)) or rest[0] < 2):
        raise BadInput(
            f"groups has {given!r}; a pair is (column, number of quantile bins), with two bins at least. Labels of two "
            "examples go into a list"
        )
    return lambda batch: _column(batch, int(column))


def _column(batch: Batch, column: int) -> Any:
    inputs = batch.inputs[0] if batch.inputs else None
    if not isinstance(inputs, Tensor) or inputs.dim() != 2:
        raise BadInput("groups by a column need tabular inputs [N, D]; pass a function of the inputs instead")
    if not -inputs.shape[1] <= column < inputs.shape[1]:
        raise BadInput(f"groups has column {column}; the inputs have columns 0..{inputs.shape[1] - 1}")
    return inputs[:, column]


def _listed(values: Any) -> list[Any]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise BadType(f"labels must be an array or a list with one for each example, got {type(values).__name__}")
    return list(values)


def is_missing(label: Any) -> bool:
    """Return whether a label is None or NaN, or what pandas has for them."""
    try:
        return label is None or bool(label != label)
    except TypeError:  # pandas.NA is neither equal to itself nor not
        return True


def _quantile_labels(values: list[float], bins: int) -> list[str]:
    """Return the quantile bin of each value, named by its range; equal values are never parted."""
    column = torch.tensor(values, dtype=torch.float64, device="cpu")
    if not bool(column.isfinite().all()):
        raise BadInput(
            f"groups by quantiles need numbers, but the column has NaN or infinity in row {bad_row(~column.isfinite())}"
        )
    ordered = column.sort().values
    places = torch.arange(1, bins, device="cpu") * len(ordered) // bins
    edges = ordered[(places - 1).clamp_min(0)].unique()
    index = torch.searchsorted(edges, column)  # bin b is (edge b-1, edge b]
    ends = [float(ordered[0]), *edges.tolist(), float(ordered[-1])]
    width = len(str(bins))
    # Numbered, so that the order of the names is that of the values.
    names = [
        f"{number + 1:0{width}}: {'(' if number else '['}{low:.4g}, {high:.4g}]"
        for number, (low, high) in enumerate(pairwise(ends))
    ]
    return [names[at] for at in index.tolist()]


def _members(name: str, given: Any, count: int) -> list[tuple[str, Tensor]]:
    values = _listed(given)
    if len(values) != count:
        raise BadInput(
            f"groups{f'[{name!r}]' if name else ''} has {len(values)} labels for {count} examples; "
            "one label an example is needed"
        )
    if name and all(isinstance(value, (bool, np.bool_)) for value in values):
        if not any(values):
            raise BadInput(f"groups[{name!r}] is a mask without an example; leave the group out")
        return [(name, torch.tensor(values, device="cpu").nonzero().squeeze(-1))]
    rows: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        if is_missing(value):  # It would be a group of its own, which nobody named.
            raise BadInput(
                f"groups{f'[{name!r}]' if name else ''} has no label in row {row}; name one, or drop the row"
            )
        rows.setdefault(str(value), []).append(row)
    return [(f"{name}={label}" if name else label, torch.tensor(rows[label], device="cpu")) for label in sorted(rows)]
