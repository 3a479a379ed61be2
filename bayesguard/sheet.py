"""The cells of an evaluation: each metric of each set of predictions, resampled together, with its interval."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bayesguard.metrics.bootstrap import (
    basic_interval,
    bca_interval,
    bootstrap_weights,
    critical_value,
    inverted_interval,
    jackknife,
    largest,
    percentile_interval,
    standardised,
)
from bayesguard.metrics.parts import scores_of
from bayesguard.metrics.registry import MetricSpec, Scores
from bayesguard.metrics.scores import Together
from bayesguard.predictive import Predictive
from bayesguard.results import CLEAN, MEAN, Result
from bayesguard.sampling import derive_seed

NUM_RESAMPLES = 1000
Interval = Literal["basic", "percentile", "bca"]


class Cell(NamedTuple):
    """What is kept of one metric of one set of predictions."""

    shift: str
    severity: float
    group: str | None
    spec: MetricSpec
    scores: Scores


class Drawn(NamedTuple):
    """A number with what tells its interval.

    `resampled` are its values over resamples `[R]`, `gaps` `[M]` and their values over resamples `[R, M]` those of a sum
    of absolute gaps, `left_out` the values of a jackknife `[G]`.
    """

    value: float
    resampled: Tensor
    gaps: tuple[Tensor, Tensor] | None = None
    left_out: Tensor | None = None

    def interval(
        self, level: float, bounds: tuple[float, float] = (-math.inf, math.inf), kind: Interval | None = None
    ) -> tuple[float, float]:
        """Return the interval, widened where it would miss the number itself; NaN for one that is undefined."""
        if math.isnan(self.value) or not len(self.resampled):
            return math.nan, math.nan
        if kind is None and self.gaps is not None:
            lower, upper = inverted_interval(*self.gaps, level, bounds)
        elif kind == "percentile":
            lower, upper = percentile_interval(self.resampled, level, bounds)
        elif kind == "bca" and self.left_out is not None:
            lower, upper = bca_interval(self.value, self.resampled, self.left_out, level, bounds)
        else:
            lower, upper = basic_interval(self.value, self.resampled, level, bounds)
        return min(lower, self.value), max(upper, self.value)


def mean_of(parts: Sequence[Drawn]) -> Drawn:
    """Return the mean of numbers for which the same examples were resampled."""
    gaps = left_out = None
    if all(part.gaps is not None for part in parts):
        kept = [part.gaps for part in parts if part.gaps is not None]
        gaps = torch.cat([own for own, _ in kept]) / len(kept), torch.cat([again for _, again in kept], -1) / len(kept)
    if all(part.left_out is not None for part in parts):
        left_out = torch.stack([part.left_out for part in parts if part.left_out is not None]).mean(0)
    value = sum(part.value for part in parts) / len(parts)
    return Drawn(value, torch.stack([part.resampled for part in parts]).mean(0), gaps, left_out)


class Sheet:
    """The cells of an evaluation, resampled together at the end."""

    def __init__(
        self,
        confidence_level: float,
        seed: int,
        kind: Interval | None,
        clusters: Tensor | None,
        *,
        num_resamples: int = NUM_RESAMPLES,
        progress: bool | None = None,
    ) -> None:
        self.confidence_level, self.seed, self.kind, self.clusters = confidence_level, seed, kind, clusters
        self.num_resamples, self.progress = num_resamples, progress
        self.cells: list[Cell] = []
        self._clusters_of: dict[str | None, Tensor | None] = {None: clusters}

    def add(
        self, shift: str, severity: float, predictive: Predictive, targets: Tensor, specs: Sequence[MetricSpec]
    ) -> None:
        """Keep what the metrics need of some predictions."""
        for spec, scores in zip(specs, scores_of(specs, predictive, targets), strict=True):
            self.cells.append(Cell(shift, severity, None, spec, scores))

    def add_group(
        self, name: str, rows: Tensor, predictive: Predictive, targets: Tensor, specs: Sequence[MetricSpec]
    ) -> None:
        """Keep what the metrics need of a group's `rows`, numbers of examples, of the clean data."""
        own, truth = predictive[rows], targets[rows]
        if self.clusters is not None:
            self._clusters_of[name] = self.clusters[rows].unique(return_inverse=True)[1]
        for spec, scores in zip(specs, scores_of(specs, own, truth), strict=True):
            self.cells.append(Cell(CLEAN, 0, name, spec, scores))

    def results(self) -> tuple[tuple[Result, ...], tuple[Result, ...]]:
        """Return every cell's number and the means over the shifts of each severity; and groups with joint intervals."""
        drawn = self.drawn()
        own = [self._result(cell, number) for cell, number in zip(self.cells, drawn, strict=True)]
        return (*own, *self._means(drawn)), self._joint(drawn, own)

    def drawn(self) -> list[Drawn]:
        """Return every cell resampled; the examples of a group are resampled among themselves."""
        from tqdm import tqdm

        if not self.num_resamples:
            nothing = torch.empty(0, dtype=torch.float64, device="cpu")
            return [Drawn(cell.scores.value(), nothing) for cell in self.cells]
        values: list[list[Tensor]] = [[] for _ in self.cells]
        gaps: list[list[Tensor]] = [[] for _ in self.cells]
        groups = dict.fromkeys(cell.group for cell in self.cells)
        total = len(groups) * self.num_resamples
        # Without a delay every short evaluation would flash a bar.
        with tqdm(total=total, desc="bootstrap", leave=False, delay=2, disable=not self.progress) as bar:
            for group in groups:
                places = [place for place, cell in enumerate(self.cells) if cell.group == group]
                together = Together([self.cells[place].scores for place in places])
                for weights in self._weights(group, self.cells[places[0]].scores.num_examples):
                    for place, (again, signed) in zip(places, together.resample(weights), strict=True):
                        values[place].append(again)
                        if signed is not None:
                            gaps[place].append(signed)
                    bar.update(len(weights))
        return [
            self._number(cell, torch.cat(again), torch.cat(signed) if signed else None)
            for cell, again, signed in zip(self.cells, values, gaps, strict=True)
        ]

    def _weights(self, group: str | None, count: int) -> Iterator[Tensor]:
        seed = self.seed if group is None else derive_seed(self.seed, "group", group)
        return bootstrap_weights(count, self.num_resamples, seed, clusters=self._clusters_of.get(group))

    def _number(self, cell: Cell, resampled: Tensor, signed: Tensor | None) -> Drawn:
        own = cell.scores.signed_gaps(torch.ones(1, cell.scores.num_examples, dtype=torch.float64, device="cpu"))
        gaps = None if own is None or signed is None else (own[0], signed)
        left_out = jackknife(cell.scores, self._clusters_of.get(cell.group)) if self.kind == "bca" else None
        return Drawn(cell.scores.value(), resampled, gaps, left_out)

    def _means(self, drawn: Sequence[Drawn]) -> list[Result]:
        together: dict[tuple[float, str], list[int]] = {}
        for index, cell in enumerate(self.cells):
            if cell.shift != CLEAN:
                together.setdefault((cell.severity, cell.spec.name), []).append(index)
        return [
            self._result(
                self.cells[places[0]]._replace(shift=MEAN, severity=severity),
                mean_of([drawn[place] for place in places]),
            )
            for (severity, _), places in sorted(together.items())
        ]

    def _result(self, cell: Cell, number: Drawn) -> Result:
        count = cell.scores.num_examples
        clusters = self._clusters_of.get(cell.group)
        limits = number.interval(self.confidence_level, cell.spec.bounds, self.kind)
        if count == 1 or (clusters is not None and not clusters.any()):
            limits = math.nan, math.nan  # One example drawn again and again does not vary; that says nothing of others.
        return Result(cell.shift, cell.severity, cell.group, cell.spec.name, number.value, *limits, count)

    def _joint(self, drawn: Sequence[Drawn], own: Sequence[Result]) -> tuple[Result, ...]:
        """Return the groups' numbers with intervals that hold for all groups of a metric at once.

        Each group's own interval is stretched about its number by what the largest of all groups' deviations, in standard
        errors, asks for instead of that of one. Groups are resampled apart: where they overlap, that is cautious (Šidák).
        """
        quantile = float(torch.special.ndtri(torch.tensor(0.5 + self.confidence_level / 2, dtype=torch.float64)))
        joint: list[Result] = []
        if not self.num_resamples:
            return tuple(result for result in own if result.group is not None)
        for name in dict.fromkeys(result.metric for result in own):
            places = [place for place, r in enumerate(own) if r.metric == name and r.group is not None]
            if not places:
                continue
            standard = standardised(torch.stack([drawn[place].resampled for place in places], -1))
            stretch = max(1.0, critical_value(largest(standard), self.confidence_level) / quantile)
            joint += [_stretched(own[place], stretch, self.cells[place].spec.bounds) for place in places]
        return tuple(joint)


def _stretched(result: Result, factor: float, bounds: tuple[float, float]) -> Result:
    value, lower, upper = result.value, result.lower, result.upper
    if not math.isfinite(value) or math.isnan(lower):
        return result
    low, high = value - factor * (value - lower), value + factor * (upper - value)
    return result._replace(lower=max(bounds[0], low), upper=min(bounds[1], high))
