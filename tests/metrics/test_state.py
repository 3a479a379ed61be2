"""The state of O(bins): exact where it says so, merged in any order, and resampled as its rows would be."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesguard.errors import BadInput, CalibrationWarning
from bayesguard.metrics import functional as M
from bayesguard.metrics.bootstrap import bootstrap_weights
from bayesguard.metrics.functional.binned import BinnedSums, bin_index
from bayesguard.metrics.functional.null import _mean_deviation
from bayesguard.metrics.state import GRID, CalibrationState, by_mass, grid_edges, grid_index, resampled
from bayesguard.sampling import stream


def made(rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, outcomes that follow them badly, and weights that follow the scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = (2 * torch.randn(rows, generator=generator, dtype=torch.float64)).sigmoid()
    hits = torch.rand(rows, generator=generator, dtype=torch.float64) < scores.square()
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) + scores
    return scores.to(dtype), hits, weights


def filled(scores: Any, hits: Any, weights: Any = None, **options: Any) -> CalibrationState:
    state = CalibrationState(**options)
    state.update(scores, hits, weights)
    return state


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_width_is_the_function(dtype: torch.dtype, weighted: bool) -> None:
    scores, hits, weights = made(400, dtype=dtype)
    mass = weights if weighted else None
    state = filled(scores, hits, mass)
    for norm, debiased in (("l1", False), ("l1", True), ("l2", False), ("l2", True), ("max", False)):
        wanted = M.binary_calibration_error(scores, hits, norm=norm, debiased=debiased, weights=mass)  # type: ignore[arg-type]
        assert state.error(norm, debiased=debiased).item() == wanted.item()  # type: ignore[arg-type]
    bins = state.reliability_bins(0.9)
    probs = torch.stack([1 - scores.double(), scores.double()], -1)
    top = probs.max(-1)
    reliable = filled(top.values, top.indices == hits, mass).reliability_bins(0.9)
    wanted_bins = M.reliability_bins(probs, hits.long(), confidence_level=0.9, weights=mass)
    for ours, theirs in zip(vars(reliable).values(), vars(wanted_bins).values(), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert bins.count.sum().item() == pytest.approx(weights.sum().item() if weighted else 400)
    size = M.effective_sample_size(weights if weighted else torch.ones(400))
    assert state.effective_sample_size.item() == pytest.approx(size.item(), rel=1e-12)
    assert state.num_rows == 400


def test_state_dict_goes_round_and_is_checked() -> None:
    for binning in ("width", "mass"):
        state = filled(*made(50), binning=binning)
        copy = CalibrationState(binning=binning)
        copy.load_state_dict(state.state_dict())
        copy.update(*made(30, seed=1))
        assert state.num_rows == 50
        assert copy.num_rows == 80
        assert state.state_dict()["rows"].dtype == torch.int64
    with pytest.raises(BadInput, match="rows"):
        CalibrationState(10).load_state_dict(CalibrationState().state_dict())
    with pytest.raises(BadInput, match="sums"):
        CalibrationState().load_state_dict({"rows": CalibrationState().sums.rows})
    with pytest.raises(BadInput, match="merged"):
        CalibrationState() + CalibrationState(10)
    for call in ("error", "null", "bootstrap", "reliability_bins"):
        with pytest.raises(BadInput, match="no rows"):
            getattr(CalibrationState(), call)()
    with pytest.raises(BadInput, match="sigmoid"):
        CalibrationState().update([1.5], [1])
    with pytest.raises(BadInput, match="weights"):
        CalibrationState().update([0.5], [1], [-1.0])
    with pytest.raises(BadInput, match="num_resamples"):
        filled(*made(5)).bootstrap(0)


def test_cells_of_the_grid_hold_what_is_between_their_edges() -> None:
    edges = grid_edges()
    assert edges.shape == (GRID + 1,)
    assert bool((edges.diff() > 0).all())
    scores = torch.cat([torch.tensor([0.0, 1.0, 1e-300, 0.5]).double(), made(2000)[0] ** 3])
    cells = grid_index(scores)
    slack = 1e-15
    assert bool((edges[cells] - slack <= scores).all() and (scores <= edges[cells + 1] + slack).all())
    assert cells[:2].tolist() == [0, GRID - 1]
    assert edges.diff()[1:-1].max() < 0.002


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 300), num_bins=st.integers(1, 20), weighted=st.booleans())
def test_equal_mass_is_cut_to_within_one_cell(seed: int, rows: int, num_bins: int, weighted: bool) -> None:
    scores, hits, weights = made(rows, seed)
    mass = weights if weighted else None
    cells = grid_index(scores)
    state = filled(scores, hits, mass, num_bins=num_bins, binning="mass")
    merged, into = by_mass(state.sums, num_bins)
    torch.testing.assert_close(merged.sums.sum(-1), state.sums.sums.sum(-1), rtol=1e-12, atol=0)
    exact = bin_index(scores, num_bins, "mass", mass)
    for b in range(1, num_bins):
        moved = (into[cells] >= b) != (exact >= b)
        assert len(cells[moved].unique()) <= 1
    # Scores that stand for their cells are cut alike, and the errors are equal.
    middle = (grid_edges()[:-1] + grid_edges()[1:])[cells] / 2
    alike = filled(middle, hits, mass, num_bins=num_bins, binning="mass").error()
    wanted = M.binary_calibration_error(middle, hits, num_bins=num_bins, binning="mass", weights=mass)
    if not weighted:
        assert alike.item() == pytest.approx(wanted.item(), abs=1e-12)


def test_equal_mass_error_is_near_that_of_all_scores() -> None:
    scores, hits, weights = made(20_000)
    for mass in (None, weights):
        ours = filled(scores, hits, mass, binning="mass").error()
        wanted = M.binary_calibration_error(scores, hits, binning="mass", weights=mass)
        assert ours.item() == pytest.approx(wanted.item(), abs=0.002)
    bins = filled(scores, hits, binning="mass").reliability_bins()
    index = bin_index(scores, 15, "mass")
    lowest = torch.stack([scores[index == b].min() for b in range(15)])
    assert (bins.lower - lowest).abs().max() < 0.004
    assert bins.num_filled == 15


def by_rows(scores: Tensor, hits: Tensor, weights: Tensor, num_bins: int, norm: str, count: int) -> Tensor:
    """The bootstrap of the rows: the bins are summed anew for each resample."""
    index = bin_index(scores, num_bins, "width")
    member = torch.nn.functional.one_hot(index, num_bins).double()
    columns = torch.cat([member * (weights * v).unsqueeze(-1) for v in (torch.ones_like(scores), scores, hits)], -1)
    found = []
    for drawn in bootstrap_weights(len(scores), count, seed=11):
        mass, score, hit = (drawn @ columns).split(num_bins, -1)
        gap = ((score - hit) / mass.where(mass > 0, 1.0)).abs()
        share = mass / mass.sum(-1, keepdim=True)
        powers = {"l1": (share * gap).sum(-1), "l2": (share * gap.square()).sum(-1).sqrt(), "max": gap.amax(-1)}
        found.append(powers[norm])
    return torch.cat(found)


def spread(values: Tensor) -> tuple[float, float]:
    """Standard deviation and its standard error, from the fourth moment."""
    centred = values - values.mean()
    variance = centred.square().mean()
    error = (centred.pow(4).mean() - variance.square()).sqrt() / math.sqrt(len(values)) / (2 * variance.sqrt())
    return variance.sqrt().item(), error.item()


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_bins", [1, 15])
@pytest.mark.parametrize("rows", [60, 1000])
def test_bootstrap_of_sums_is_that_of_rows(rows: int, num_bins: int, weighted: bool, norm: Any) -> None:
    scores, hits, weights = made(rows)
    mass = weights if weighted else torch.ones_like(weights)
    wanted = by_rows(scores, hits, mass, num_bins, norm, 4000)
    state = filled(scores, hits, mass if weighted else None, num_bins=num_bins)
    found = state.bootstrap(20_000, norm=norm)
    (ours, our_error), (theirs, their_error) = spread(found), spread(wanted)
    assert abs(ours - theirs) < 5 * math.hypot(our_error, their_error)
    noise = 5 * math.hypot(ours / math.sqrt(len(found)), theirs / math.sqrt(len(wanted)))
    assert abs(found.mean() - wanted.mean()) < noise


@pytest.mark.parametrize("wrong", ["one score a cell", "weights as counts", "hits apart from bins"])
def test_what_is_left_out_of_a_state_is_seen(wrong: str) -> None:
    scores, hits, weights = made(1000)
    wanted, their_error = spread(by_rows(scores, hits, weights, 1, "l1", 4000))
    right = filled(scores, hits, weights, num_bins=1)
    for state, seen in ((right.sums, False), (spoilt(right.sums, wrong), True)):
        drawn = resampled(state, 20_000, stream("cpu", 0, "twin"))
        ours, our_error = spread(drawn.errors("l1"))
        assert (abs(ours - wanted) > 5 * math.hypot(our_error, their_error)) == seen


def spoilt(sums: BinnedSums, wrong: str) -> BinnedSums:
    """Sums that lack something: spread of scores in a cell, of weights, or the link of scores and outcomes."""
    rows, moments = sums.rows.clone(), sums.sums.clone()
    if wrong == "one score a cell":
        moments[3], moments[4] = moments[0].square() / rows, moments[0] * moments[1] / rows
        moments[5] = moments[1].square() / rows
    elif wrong == "weights as counts":
        rows, moments[3:] = moments[0].round().long(), moments[:3].clone()
    else:
        pooled = moments.sum(-2, keepdim=True) / moments[0].sum(-2, keepdim=True)
        moments[1], moments[4] = moments[0] * pooled[1], moments[3] * pooled[1]
    return BinnedSums(rows, moments)


def test_bootstrap_is_deterministic_and_debiased_where_asked() -> None:
    state = filled(*made(500))
    assert torch.equal(state.bootstrap(50, seed=3), state.bootstrap(50, seed=3))
    assert not torch.equal(state.bootstrap(50, seed=3), state.bootstrap(50, seed=4))
    assert state.bootstrap(200, norm="l2", debiased=True).mean() < state.bootstrap(200, norm="l2").mean()
    with pytest.warns(CalibrationWarning, match="worth 1.0"):
        filled([0.7] * 20, [1] * 20, [1.0] + [1e-9] * 19).bootstrap(5)
    one = filled([0.7], [1])
    torch.testing.assert_close(one.bootstrap(5), torch.full((5,), 0.3).double())
    by_class = BinnedSums.of_classes(torch.tensor([[0.5, 0.5]]), torch.tensor([0]), 15)
    with pytest.raises(BadInput, match="drawn together"):
        resampled(by_class, 5, stream("cpu", 0))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 60), chance=st.floats(0, 1))
def test_mean_deviation_is_the_sum_over_counts(size: int, chance: float) -> None:
    wanted = math.fsum(
        math.comb(size, k) * chance**k * (1 - chance) ** (size - k) * abs(k - size * chance) for k in range(size + 1)
    )
    found = _mean_deviation(*torch.tensor([size, chance], dtype=torch.float64))
    assert found.item() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("rows", [20, 200, 5000])
def test_null_of_sums_is_that_of_all_scores(rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    probs = (2 * torch.randn(rows, 10, generator=generator, dtype=torch.float64)).softmax(-1)
    exact = M.calibration_error_null(probs, num_resamples=4000)
    null = filled(probs.max(-1).values, torch.zeros(rows)).null(4000)
    assert null.mean.item() == pytest.approx(exact.mean.item(), rel=0.002)
    (ours, our_error), (theirs, their_error) = spread(null.errors), spread(exact.errors)
    assert abs(ours - theirs) < 5 * math.hypot(our_error, their_error)
    assert abs(null.errors.mean() - exact.mean) < 5 * ours / math.sqrt(4000)


def test_null_under_weights_is_that_of_drawn_outcomes() -> None:
    scores, _, weights = made(1000)
    null = filled(scores, torch.zeros(1000), weights).null(4000)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack(
        [
            M.binary_calibration_error(scores, torch.rand(1000, generator=generator).double() < scores, weights=weights)
            for _ in range(1000)
        ]
    )
    ours, theirs = spread(null.errors), spread(drawn)
    assert abs(null.mean - drawn.mean()) < 5 * theirs[0] / math.sqrt(len(drawn))
    assert abs(ours[0] - theirs[0]) < 5 * math.hypot(ours[1], theirs[1])
    unweighted = filled(scores, torch.zeros(1000)).null(10).mean
    assert abs(unweighted - drawn.mean()) > 5 * theirs[0] / math.sqrt(len(drawn))  # weights make more noise
