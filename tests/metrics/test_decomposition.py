"""Decompositions against the max-min formula of isotonic regression and loops over samples."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M
from bayesguard.metrics.functional.decomposition import (
    ScoreDecomposition,
    corp_brier_decomposition,
    corp_log_score_decomposition,
    crps_decomposition,
)
from bayesguard.predictive import Predictive

ROWS = st.lists(
    st.tuples(st.one_of(st.integers(0, 8).map(lambda i: i / 8), st.floats(0, 1)), st.integers(0, 1)),
    min_size=1,
    max_size=14,
)
SAMPLES = st.integers(1, 6).flatmap(
    lambda s: st.lists(
        st.lists(st.one_of(st.integers(-3, 3).map(float), st.floats(-5, 5)), min_size=s + 1, max_size=s + 1),
        min_size=1,
        max_size=6,
    )
)


def isotonic(rows: list[tuple[float, int]]) -> list[float]:
    """The max-min formula: the largest over starts of the smallest over ends of the mean outcome."""

    def mean(low: float, high: float) -> float:
        inside = [y for q, y in rows if low <= q <= high]
        return math.fsum(inside) / len(inside)

    values = sorted({p for p, _ in rows})
    return [max(min(mean(a, b) for b in values if b >= p) for a in values if a <= p) for p, _ in rows]


def square(p: float, y: int) -> float:
    return (p - y) ** 2


def logarithm(p: float, y: int) -> float:
    chance = p if y else 1 - p
    return -math.log(chance) if chance > 0 else math.inf


def brute(rows: list[tuple[float, int]], score: Callable[[float, int], float]) -> list[float]:
    def mean(forecasts: list[float]) -> float:
        return math.fsum(score(p, y) for p, (_, y) in zip(forecasts, rows, strict=True)) / len(rows)

    base = math.fsum(y for _, y in rows) / len(rows)
    given_score, best, constant = mean([p for p, _ in rows]), mean(isotonic(rows)), mean([base] * len(rows))
    return [given_score - best, constant - best, constant]


def values(parts: ScoreDecomposition) -> list[float]:
    assert all(part.dtype == torch.float64 and part.dim() == 0 for part in parts)
    return [part.item() for part in parts]


@settings(max_examples=100, deadline=None)
@given(rows=ROWS)
def test_binary_parts_are_the_definition_and_add_up(rows: list[tuple[float, int]]) -> None:
    probs = torch.tensor([p for p, _ in rows], dtype=torch.float64)
    outcomes = torch.tensor([y for _, y in rows])
    for function, score in ((corp_brier_decomposition, square), (corp_log_score_decomposition, logarithm)):
        parts = function(probs, outcomes)
        assert values(parts) == pytest.approx(brute(rows, score), abs=1e-12)
        total = math.fsum(score(p, y) for p, y in rows) / len(rows)
        assert parts.score.item() == pytest.approx(total, abs=1e-12)
        assert min(parts.miscalibration.item(), parts.discrimination.item()) >= 0


def test_score_is_the_one_of_the_other_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(500, generator=generator, dtype=torch.float64)
    outcomes = (torch.rand(500, generator=generator, dtype=torch.float64) < probs**2).long()
    both = torch.stack([1 - probs, probs], -1)
    brier = M.brier_score(both, outcomes).item() / 2
    assert corp_brier_decomposition(probs, outcomes).score.item() == pytest.approx(brier, abs=1e-12)
    loss = M.negative_log_likelihood(both.log(), outcomes).item()
    assert corp_log_score_decomposition(probs, outcomes).score.item() == pytest.approx(loss, abs=1e-12)


def test_recalibration_against_sklearn() -> None:
    isotonic_module = pytest.importorskip("sklearn.isotonic")
    generator = torch.Generator().manual_seed(1)
    probs = torch.randint(60, (2000,), generator=generator).double() / 60
    outcomes = (torch.rand(2000, generator=generator, dtype=torch.float64) < probs.sqrt()).double()
    fitted = torch.from_numpy(isotonic_module.IsotonicRegression().fit_transform(probs.numpy(), outcomes.numpy()))
    parts = corp_brier_decomposition(probs, outcomes)
    wanted = ((probs - outcomes).square() - (fitted - outcomes).square()).mean()
    assert parts.miscalibration.item() == pytest.approx(wanted.item(), abs=1e-12)
    # What isotonic regression gives is calibrated, and no monotone map changes what it tells apart.
    again = corp_brier_decomposition(fitted, outcomes)
    assert again.miscalibration.item() == pytest.approx(0.0, abs=1e-15)
    assert again.discrimination.item() == pytest.approx(parts.discrimination.item(), abs=1e-12)


def test_log_score_is_not_clipped() -> None:
    parts = corp_log_score_decomposition([0.0, 0.5, 1.0], [1, 0, 1])
    assert parts.miscalibration.item() == math.inf
    assert parts.score.item() == math.inf
    assert parts.discrimination.isfinite()
    perfect = corp_log_score_decomposition([0.0, 1.0], [0, 1])
    assert values(perfect) == pytest.approx([0.0, math.log(2), math.log(2)])
    assert values(corp_log_score_decomposition([0.0, 0.5], [1, 0], weights=[0, 1])) == pytest.approx(
        [math.log(2), 0, 0]
    )


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 1000))
def test_order_number_and_name_of_rows_do_not_matter(rows: list[tuple[float, int]], seed: int) -> None:
    probs = torch.tensor([p for p, _ in rows], dtype=torch.float64)
    outcomes = torch.tensor([y for _, y in rows])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator)
    weights = torch.randint(0, 3, (len(rows),), generator=generator)
    weights[0] = 1
    index = torch.arange(len(rows)).repeat_interleave(weights)
    for function in (corp_brier_decomposition, corp_log_score_decomposition):
        wanted = pytest.approx(values(function(probs, outcomes)), abs=1e-12)
        assert values(function(probs[order], outcomes[order])) == wanted
        assert values(function(probs.repeat(2), outcomes.repeat(2))) == wanted
        repeated = values(function(probs[index], outcomes[index]))
        assert values(function(probs, outcomes, weights=weights)) == pytest.approx(repeated, abs=1e-12)
    swapped = corp_brier_decomposition(1 - probs, 1 - outcomes)  # no and yes change places
    # 1 - p may round two probabilities to one.
    if len((1 - probs).unique()) == len(probs.unique()):
        assert values(swapped) == pytest.approx(values(corp_brier_decomposition(probs, outcomes)), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_lower_precision_has_the_values_of_its_numbers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    probs, outcomes = torch.rand(300, generator=generator).to(dtype), torch.arange(300) % 2
    assert values(corp_brier_decomposition(probs, outcomes)) == values(
        corp_brier_decomposition(probs.double(), outcomes)
    )
    samples, y = torch.randn(5, 60, generator=generator).to(dtype), torch.randn(60, generator=generator).to(dtype)
    assert values(crps_decomposition(samples, y)) == values(crps_decomposition(samples.double(), y.double()))


def hersbach(samples: list[list[float]], targets: list[float]) -> list[float]:
    """The parts bin by bin and row by row, S + 1 bins with the two outside all samples."""
    rows, count = len(targets), len(samples[0])
    miscalibration = potential = 0.0
    for i in range(count + 1):
        above = below = outside = 0.0
        for x, y in zip((sorted(s) for s in samples), targets, strict=True):
            if i == 0:
                below += max(0.0, x[0] - y) / rows
                outside += (y < x[0]) / rows
            elif i == count:
                above += max(0.0, y - x[-1]) / rows
                outside += (y > x[-1]) / rows
            else:
                low, high = x[i - 1], x[i]
                above += (min(max(y, low), high) - low) / rows
                below += (high - min(max(y, low), high)) / rows
        if above + below == 0:
            continue
        if i in (0, count):
            width, rate = (above + below) / outside, outside if i == 0 else 1 - outside
        else:
            width, rate = above + below, below / (above + below)
        miscalibration += width * (rate - i / count) ** 2
        potential += width * rate * (1 - rate)
    uncertainty = math.fsum(abs(a - b) for a in targets for b in targets) / (2 * rows**2)
    return [miscalibration, uncertainty - potential, uncertainty]


def crps(samples: list[float], y: float) -> float:
    count = len(samples)
    near = math.fsum(abs(x - y) for x in samples) / count
    return near - math.fsum(abs(a - b) for a in samples for b in samples) / (2 * count**2)


@settings(max_examples=100, deadline=None)
@given(rows=SAMPLES)
def test_crps_parts_are_the_definition_and_add_up(rows: list[list[float]]) -> None:
    samples, targets = [row[1:] for row in rows], [row[0] for row in rows]
    parts = crps_decomposition(torch.tensor(samples, dtype=torch.float64).t(), torch.tensor(targets).double())
    targets = torch.tensor(targets).double().tolist()  # as they were given: float32
    assert values(parts) == pytest.approx(hersbach(samples, targets), abs=1e-12)
    total = math.fsum(crps(x, y) for x, y in zip(samples, targets, strict=True)) / len(rows)
    assert parts.score.item() == pytest.approx(total, abs=1e-12)
    assert parts.miscalibration.item() >= 0


def ensembles(rows: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(rows, generator=generator, dtype=torch.float64)
    y = centre + torch.randn(rows, generator=generator, dtype=torch.float64)
    return centre + spread * torch.randn(40, rows, generator=generator, dtype=torch.float64), y


def test_crps_order_weights_shape_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, y = ensembles(40)
    generator = torch.Generator().manual_seed(2)
    parts = values(crps_decomposition(samples, y))
    order, members = torch.randperm(40, generator=generator), torch.randperm(40, generator=generator)
    wanted = pytest.approx(parts, abs=1e-12)
    assert values(crps_decomposition(samples[members][:, order], y[order])) == wanted
    assert values(crps_decomposition(samples.repeat(1, 2), y.repeat(2))) == wanted
    assert values(crps_decomposition(samples.reshape(40, 20, 2), y.reshape(20, 2))) == wanted
    assert values(crps_decomposition(Predictive.from_samples(samples), y)) == wanted
    far = crps_decomposition(samples + 1e6, y + 1e6)
    assert values(far) == pytest.approx(parts, abs=1e-8)
    weights = torch.randint(0, 4, (40,), generator=generator)
    index = torch.arange(40).repeat_interleave(weights)
    repeated = values(crps_decomposition(samples[:, index], y[index]))
    assert values(crps_decomposition(samples, y, weights=weights)) == pytest.approx(repeated, abs=1e-12)
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 1000)
    assert values(crps_decomposition(samples, y)) == wanted


def test_crps_miscalibration_sees_the_wrong_spread() -> None:
    right, wrong = (crps_decomposition(*ensembles(5000, spread)) for spread in (1.0, 0.3))
    assert right.miscalibration.item() < 0.01 * right.score.item()
    assert wrong.miscalibration.item() > 10 * right.miscalibration.item()


def test_bad_input_is_named() -> None:
    for function in (corp_brier_decomposition, corp_log_score_decomposition):
        with pytest.raises(BadInput, match=r"NaN.*row 1"):
            function([0.5, math.nan], [0, 1])
        with pytest.raises(BadInput, match="exactly"):
            function([0.5, 0.5], [[0], [1]])
        with pytest.raises(BadInput, match="at least one row"):
            function(torch.zeros(0), torch.zeros(0))
        with pytest.raises(BadInput, match="2 in row 1"):
            function([0.5, 0.5], [0, 2])
    with pytest.raises(BadInput, match=r"samples.*row 1"):
        crps_decomposition([[0.0, math.nan]], [0.0, 0.0])
    with pytest.raises(BadInput, match=r"targets.*row 1"):
        crps_decomposition([[0.0, 0.0]], [0.0, math.inf])
    with pytest.raises(BadInput, match="exactly"):
        crps_decomposition([[0.0, 0.0]], [[0.0, 0.0]])
    with pytest.raises(BadInput, match="a sample and a row"):
        crps_decomposition(torch.zeros(0, 2), [0.0, 0.0])
    with pytest.raises(BadType, match=r"SamplePredictive.*sample\(S\)"):
        crps_decomposition(Predictive.from_normal([0.0], [1.0]), [0.0])
