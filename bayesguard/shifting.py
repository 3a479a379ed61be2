"""Data under shifts: which ones, and how a stream of batches is passed through one of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bayesguard.data import Batch
from bayesguard.errors import BadInput, BadType
from bayesguard.results import CLEAN, MEAN
from bayesguard.sampling import stream
from bayesguard.shift import suite


class AnyShift(Protocol):
    """What a shift has to have: those of `bayesguard.shift`, or one's own."""

    @property
    def name(self) -> str:
        """What it is called in tables."""

    @property
    def severity(self) -> float:
        """Its place on the axis of its kind, above 0."""

    def __call__(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return shifted inputs of the same rows."""


def chosen_shifts(shifts: str | Sequence[AnyShift | str] | None, seed: int) -> list[AnyShift]:
    """Return shifts by the names of their suites, or the ones given, each name and severity once."""
    if shifts is None:
        return []
    if not isinstance(shifts, (str, Iterable)):
        raise BadType(
            f"shifts must be a name or a list of shifts, got {type(shifts).__name__}; put one shift into a list"
        )
    chosen: list[AnyShift] = []
    for given in [shifts] if isinstance(shifts, str) else shifts:
        chosen += suite(given, seed) if isinstance(given, str) else [given]
    seen: set[tuple[str, float]] = set()
    for shift in chosen:
        if not (callable(shift) and hasattr(shift, "name") and hasattr(shift, "severity")):
            raise BadType(
                f"shifts has a {type(shift).__name__}; a shift is callable and has a name and a severity, as "
                'bayesguard.shift.Corruption("fog", severity=3)'
            )
        if (shift.name, shift.severity) in seen or shift.name in (CLEAN, MEAN) or not shift.severity > 0:
            raise BadInput(
                f"shifts has {shift.name!r} at severity {shift.severity:g}; every shift and severity may be there once, "
                f"severities are above 0, and the names {CLEAN!r} and {MEAN!r} are taken"
            )
        seen.add((shift.name, shift.severity))
    return chosen


def shifting(shift: AnyShift, seed: int) -> Callable[[Batch, int], Batch]:
    """Shift the first input of a batch, with noise that follows its place in the data."""

    def transform(batch: Batch, offset: int) -> Batch:
        if not batch.inputs:
            raise BadInput("shifts change the first positional input, and the batches have keyword inputs only")
        first, *rest = batch.inputs
        generator = stream(first.device, seed, shift.name, repr(float(shift.severity)), offset)
        return batch._replace(inputs=(shift(first, generator=generator), *rest))

    return transform
