"""Coverage of sets against loops over rows, strata and slabs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.functional.sets import (
    _worst_windows,
    class_conditional_coverage,
    set_coverage,
    set_size,
    size_stratified_coverage,
    worst_slab_coverage,
)


def made(rows: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sets = torch.rand(rows, classes, generator=generator) < 0.6
    return sets, torch.randint(classes, (rows,), generator=generator)


def strata(groups: list[int], covered: list[bool], count: int, alpha: float) -> tuple[list[float], float, int]:
    coverage, empty = [], 0
    for g in range(count):
        inside = [c for h, c in zip(groups, covered, strict=True) if h == g]
        coverage.append(sum(inside) / len(inside) if inside else math.nan)
        empty += not inside
    return coverage, max(abs(c - (1 - alpha)) for c in coverage if not math.isnan(c)), empty


CASES: dict[str, Any] = {"rows": st.integers(1, 30), "classes": st.integers(1, 14), "seed": st.integers(0, 999)}


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_coverage_and_size_are_the_definitions(rows: int, classes: int, seed: int) -> None:
    sets, labels = made(rows, classes, seed)
    covered = [bool(sets[n, labels[n]]) for n in range(rows)]
    sizes = [sum(row) for row in sets.tolist()]
    assert set_coverage(sets, labels).item() == pytest.approx(sum(covered) / rows, abs=1e-15)
    assert set_size(sets).item() == pytest.approx(sum(sizes) / rows, abs=1e-12)
    ends = [e for e in (1, 3, 10, 100) if e < classes]
    groups = [sum(size > end for end in ends) for size in sizes]
    found = size_stratified_coverage(sets, labels, 0.1)
    coverage, gap, empty = strata(groups, covered, len(ends) + 1, 0.1)
    assert found.coverage.tolist() == pytest.approx(coverage, abs=1e-15, nan_ok=True)
    assert found.gap.item() == pytest.approx(gap, abs=1e-15)
    assert found.num_empty == empty
    assert found.rows.sum() == rows
    by_class = class_conditional_coverage(sets, labels, 0.1)
    coverage, gap, empty = strata(labels.tolist(), covered, classes, 0.1)
    assert by_class.coverage.tolist() == pytest.approx(coverage, abs=1e-15, nan_ok=True)
    assert by_class.gap.item() == pytest.approx(gap, abs=1e-15)
    assert by_class.num_empty == empty
    for part in (set_coverage(sets, labels), set_size(sets), *found[:3], *by_class[:3]):
        assert part.dtype == torch.float64


@settings(max_examples=30, deadline=None)
@given(**CASES)
def test_order_names_and_number_do_not_matter(rows: int, classes: int, seed: int) -> None:
    sets, labels = made(rows, classes, seed)
    generator = torch.Generator().manual_seed(seed)
    order, names = torch.randperm(rows, generator=generator), torch.randperm(classes, generator=generator)
    weights = torch.randint(1, 4, (rows,), generator=generator)
    index = torch.arange(rows).repeat_interleave(weights)
    others = [
        (sets[order][:, names.argsort()], names[labels[order]]),
        (sets.repeat(2, 1), labels.repeat(2)),
        (sets.unsqueeze(1), labels.unsqueeze(1)),
    ]
    for some, targets in others:
        assert set_coverage(some, targets).item() == pytest.approx(set_coverage(sets, labels).item(), abs=1e-12)
        assert set_size(some).item() == pytest.approx(set_size(sets).item(), abs=1e-12)
        for function in (size_stratified_coverage, class_conditional_coverage):
            first, second = function(sets, labels, 0.2), function(some, targets, 0.2)
            assert second.gap.item() == pytest.approx(first.gap.item(), abs=1e-12)
            assert second.num_empty == first.num_empty
    repeated = set_coverage(sets[index], labels[index]).item()
    assert set_coverage(sets, labels, weights=weights).item() == pytest.approx(repeated, abs=1e-12)
    assert set_size(sets, weights=weights).item() == pytest.approx(set_size(sets[index]).item(), abs=1e-12)
    for function in (size_stratified_coverage, class_conditional_coverage):
        ours, wanted = function(sets, labels, 0.2, weights=weights), function(sets[index], labels[index], 0.2)
        torch.testing.assert_close(ours.coverage, wanted.coverage, rtol=0, atol=1e-12, equal_nan=True)
        assert torch.equal(ours.rows, wanted.rows)


def test_empty_and_full_sets() -> None:
    nothing, everything = torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    assert set_coverage(nothing, [0, 1, 2]).item() == 0.0
    assert set_coverage(everything, [0, 1, 2]).item() == 1.0
    found = size_stratified_coverage(torch.cat([nothing, everything]), [0, 1, 2] * 2, 0.1, sizes=(0, 2))
    assert found.coverage.tolist() == pytest.approx([0.0, math.nan, 1.0], nan_ok=True)
    assert found.num_empty == 1
    assert found.gap.item() == pytest.approx(0.9)


def windows(place: list[float], covered: list[float], least: int) -> float:
    """The smallest mean over all windows that hold every row between their ends."""
    rates = []
    for low in set(place):
        for high in set(place):
            inside = [c for p, c in zip(place, covered, strict=True) if low <= p <= high]
            if len(inside) >= least:
                rates.append(math.fsum(inside) / len(inside))
    return min(rates)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=25),
    share=st.floats(0.01, 1),
)
def test_worst_window_is_the_worst_of_all(rows: list[tuple[int, bool]], share: float) -> None:
    least = max(1, math.ceil(share * len(rows)))
    place, order = torch.tensor([[float(p) for p, _ in rows]], dtype=torch.float64).sort(dim=-1, stable=True)
    covered = torch.tensor([float(c) for _, c in rows], dtype=torch.float64)[order]
    rate, start, end = _worst_windows(place, covered, torch.ones_like(covered), least)
    assert rate.item() == pytest.approx(windows(place[0].tolist(), covered[0].tolist(), least), abs=1e-15)
    first, last = int(start), int(end)
    assert last - first >= least
    assert covered[0, first:last].mean().item() == pytest.approx(rate.item(), abs=1e-15)
    assert first == 0 or place[0, first - 1] < place[0, first]
    assert last == len(rows) or place[0, last - 1] < place[0, last]


def test_windows_of_many_directions_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(40, (8, 200), generator=generator).double().sort(dim=-1).values
    covered = (torch.rand(8, 200, generator=generator) < 0.8).double()
    rates = _worst_windows(place, covered, torch.ones_like(covered), 20)[0]
    wanted = [windows(place[i].tolist(), covered[i].tolist(), 20) for i in range(8)]
    assert rates.tolist() == pytest.approx(wanted, abs=1e-15)


def slab_data(rows: int, bad: float, seed: int = 0) -> tuple[Tensor, Tensor, list[int]]:
    """Sets that hold label 0 with probability 0.9, but with `bad` where x0 + x1 is large (16% of the rows)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    chance = torch.where(x[:, 0] + x[:, 1] > math.sqrt(2), bad, 0.9)
    held = torch.rand(rows, generator=generator, dtype=torch.float64) < chance
    return x, torch.stack([held, torch.ones_like(held)], -1), [0] * rows


def test_worst_slab_finds_the_slab() -> None:
    x, sets, labels = slab_data(4000, bad=0.2)
    found = worst_slab_coverage(x, sets, labels, num_directions=300)
    assert found.coverage.item() < 0.45
    assert set_coverage(sets, labels).item() > 0.75
    along = found.direction.double() @ torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64) / math.sqrt(2)
    assert abs(along.item()) > 0.9
    assert found.share.item() == pytest.approx(0.1, abs=0.06)


def test_worst_slab_is_unbiased_where_nothing_is_wrong() -> None:
    values = np.array(
        [
            worst_slab_coverage(*slab_data(400, bad=0.9, seed=seed), num_directions=50, seed=seed).coverage.item()
            for seed in range(60)
        ]
    )
    tolerance = 5 * values.std() / math.sqrt(60)
    assert abs(values.mean() - 0.9) < tolerance
    # The slab is chosen to be the worst of the rows it is sought on: there its coverage is far too low.
    x, sets, _ = slab_data(400, bad=0.9)
    place, order = x[:100].t().contiguous().sort(dim=-1)
    sought = _worst_windows(place, sets[:100, 0].double()[order], torch.ones_like(place), 10)[0]
    assert sought.min().item() < 0.9 - tolerance


def test_worst_slab_is_what_it_says_and_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    x, sets, labels = slab_data(600, bad=0.5)
    state = torch.get_rng_state()
    found = worst_slab_coverage(x, sets, labels, num_directions=40, seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert found.direction.norm().item() == pytest.approx(1.0)
    assert all(part.dtype == torch.float64 for part in found)
    for again in (
        worst_slab_coverage(x.numpy(), sets, labels, num_directions=40, seed=7),
        worst_slab_coverage(torch.cat([x, torch.zeros(600, 0)], -1), sets, labels, num_directions=40, seed=7),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    names = worst_slab_coverage(x, sets.flip(-1), [1] * 600, num_directions=40, seed=7)
    assert torch.equal(names.coverage, found.coverage)
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 2000)
    sliced = worst_slab_coverage(x, sets, labels, num_directions=40, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(found, sliced, strict=True))
    other = worst_slab_coverage(x, sets, labels, num_directions=40, seed=8)
    assert not torch.equal(other.direction, found.direction)


def test_worst_slab_of_equal_rows_is_everything() -> None:
    sets = torch.stack([torch.arange(40) % 2 == 0, torch.ones(40, dtype=torch.bool)], -1)
    x = torch.full((40, 7), 0.1)
    found = worst_slab_coverage(x, sets, [0] * 40, num_directions=5)
    assert found.share.item() == 1.0
    assert worst_slab_coverage(x.half(), sets, [0] * 40, num_directions=5).coverage == found.coverage


def test_bad_input_is_named() -> None:
    sets, labels = made(4, 3)
    with pytest.raises(BadType, match=r"bool.*int64"):
        set_coverage(sets.long(), labels)
    with pytest.raises(BadType, match="bool"):
        set_size(sets.float())
    with pytest.raises(BadInput, match="at least one row"):
        set_size(sets[:0])
    with pytest.raises(BadInput, match=r"labels.*exactly"):
        set_coverage(sets, labels.unsqueeze(-1))
    with pytest.raises(BadInput, match="label 3 in row 0"):
        class_conditional_coverage(sets, torch.full((4,), 3), 0.1)
    with pytest.raises(BadType, match="labels must be integer"):
        size_stratified_coverage(sets, labels.float(), 0.1)
    with pytest.raises(BadInput, match="alpha"):
        size_stratified_coverage(sets, labels, 0.0)
    with pytest.raises(BadInput, match="alpha"):
        class_conditional_coverage(sets, labels, 1.0)
    with pytest.raises(BadInput, match="sizes must rise"):
        size_stratified_coverage(sets, labels, 0.1, sizes=(2, 2))
    with pytest.raises(BadType, match="sizes must be an integer"):
        size_stratified_coverage(sets, labels, 0.1, sizes=(0.5,))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="weights"):
        set_coverage(sets, labels, weights=[1.0])
    x = torch.zeros(4, 2)
    with pytest.raises(BadInput, match="features has NaN or infinity in row 1"):
        worst_slab_coverage([[0.0], [math.nan], [0.0], [0.0]], sets, labels)
    with pytest.raises(BadInput, match="exactly"):
        worst_slab_coverage(x[:3], sets, labels)
    with pytest.raises(BadInput, match=r"\[N, D\]"):
        worst_slab_coverage(x[:, 0], sets, labels)
    with pytest.raises(BadInput, match="leaves none"):
        worst_slab_coverage(x[:1], sets[:1], labels[:1])
    with pytest.raises(BadInput, match="lies in the slab"):
        worst_slab_coverage(torch.arange(4.0).unsqueeze(-1), sets, labels, held_out=0.25, delta=0.01)
    for name, value in (("delta", 0.0), ("held_out", 1.0), ("num_directions", 0), ("seed", -1)):
        some: dict[str, Any] = {name: value}
        with pytest.raises(BadInput, match=name):
            worst_slab_coverage(x, sets, labels, **some)
