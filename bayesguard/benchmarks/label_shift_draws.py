"""Draws of label shift: class shares, and test rows that have them, none of them twice."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.sampling import derive_seed

KINDS = ("none", "dirichlet", "tweak_one")


class Shift(NamedTuple):
    """How class shares are drawn: "dirichlet" with its concentration, or "tweak_one" with the share of the one class."""

    kind: str
    strength: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind} {self.strength:g}"


SHIFTS = (
    Shift("none"),
    Shift("dirichlet", 10),
    Shift("dirichlet", 1),
    Shift("dirichlet", 0.1),
    Shift("tweak_one", 0.5),
    Shift("tweak_one", 0.9),
)


def shares_of(shift: Shift, natural: Tensor, seed: int, draw: int) -> Tensor:
    """Draw class shares `[K]`, in float64.

    "tweak_one" raises class 0 in draw 0, class 1 in draw 1, and so on; the others share the rest equally.

    Args:
        shift: How.
        natural: Shares without a shift `[K]`.
        seed: Of the repetition.
        draw: Which draw.
    """
    count = len(natural)
    if shift.kind == "none":
        return natural.double()
    if shift.kind == "dirichlet":
        generator = np.random.default_rng(derive_seed(seed, "label shift, shares", str(shift), draw))
        return torch.from_numpy(generator.dirichlet(np.full(count, float(shift.strength))))
    if shift.kind != "tweak_one":
        raise BadInput(f"kind must be one of {', '.join(KINDS)}, got {shift.kind!r}")
    shares = torch.full((count,), (1 - shift.strength) / (count - 1), dtype=torch.float64)
    shares[draw % count] = shift.strength
    return shares


def counts_of(shares: Tensor, rows: int) -> Tensor:
    """Return whole numbers that sum to `rows` and are nearest to the shares (largest remainders).

    Examples:
        >>> counts_of(torch.tensor([0.5, 0.25, 0.25]), 10)
        tensor([5, 3, 2])
    """
    exact = shares.double() * rows
    counts = exact.floor().long()
    order = (exact - counts).argsort(descending=True, stable=True)
    counts[order[: rows - int(counts.sum())]] += 1
    return counts


def fitting_counts(shares: Tensor, available: Tensor, rows: int) -> Tensor:
    """Return `counts_of` the most rows, up to `rows`, for which no class needs more than there are of it.

    Raises:
        BadInput: Not even one row fits.
    """
    for number in range(rows, 0, -1):
        counts = counts_of(shares, number)
        if bool((counts <= available).all()):
            return counts
    raise BadInput(f"shares {shares.tolist()} need a class of which there are no rows ({available.tolist()})")


def resampled(labels: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Return indices of rows, so many of each class, none of them twice.

    Args:
        labels: Of all rows `[N]`.
        counts: Rows of each class `[K]`.
        generator: Draws which rows of a class.

    Raises:
        BadInput: A class with fewer rows than are asked for.
    """
    parts = []
    for label, count in enumerate(counts.tolist()):
        rows = (labels == label).nonzero()[:, 0]
        if count > len(rows):
            raise BadInput(
                f"counts asks for {count} rows of class {label}, of which there are {len(rows)}; ask for fewer"
            )
        parts.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(parts)


def total_variation(first: Tensor, second: Tensor) -> float:
    """Return half the sum of absolute differences of two distributions, from 0 to 1."""
    return float((first.double() - second.double()).abs().sum() / 2)
