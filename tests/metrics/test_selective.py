"""Ranking metrics against scikit-learn and loops over all orders."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from bayesguard.errors import BadInput
from bayesguard.metrics import functional as M
from bayesguard.metrics.functional.selective import weighted_aurc, weighted_roc

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=6)


def all_orders(rows: list[tuple[int, int]]) -> list[float]:
    """The mean risk at every coverage over all orders that put the surest first."""
    curves = []
    for order in itertools.permutations(rows):
        if all(a[0] >= b[0] for a, b in itertools.pairwise(order)):
            lost = list(itertools.accumulate(error for _, error in order))
            curves.append([total / (k + 1) for k, total in enumerate(lost)])
    return [math.fsum(column) / len(curves) for column in zip(*curves, strict=True)]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_aurc_is_the_mean_over_the_orders_of_ties(rows: list[tuple[int, int]]) -> None:
    confidence, errors = [r[0] / 4 for r in rows], [float(r[1]) for r in rows]
    wanted = all_orders(rows)
    curve = M.risk_coverage(confidence, errors)
    torch.testing.assert_close(curve.risk, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)
    area = M.area_under_risk_coverage(confidence, errors)
    assert area.item() == pytest.approx(math.fsum(wanted) / len(wanted), abs=1e-12)
    assert area.dtype == torch.float64


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, data=st.data())
def test_weighted_areas_are_those_of_repeated_rows(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)).filter(any))
    scores = torch.tensor([r[0] for r in rows], dtype=torch.float64)
    errors = torch.tensor([r[1] for r in rows], dtype=torch.float64)
    weights = torch.tensor([counts, [1] * len(rows)], dtype=torch.float64)
    index = torch.arange(len(rows)).repeat_interleave(weights[0].long())
    ours = weighted_aurc(scores, errors, weights)
    wanted = torch.stack(
        [M.area_under_risk_coverage(scores[index], errors[index]), M.area_under_risk_coverage(scores, errors)]
    )
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    area = weighted_roc(scores, errors, weights)
    for value, some in ((area[0], index), (area[1], torch.arange(len(rows)))):
        if len(set(errors[some].tolist())) == 2:
            assert value.item() == pytest.approx(roc_auc_score(errors[some], scores[some]), abs=1e-12)
        else:
            assert value.isnan()


def test_risk_of_any_loss_and_of_everything() -> None:
    curve = M.risk_coverage([0.9, 0.1, 0.5], [2.0, 1.0, 3.0])
    assert curve.risk.tolist() == [2.0, 2.5, 2.0]
    assert curve.coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert M.area_under_risk_coverage([0.5, 0.5], [0.0, 0.0]).item() == 0.0


def repeated(rows: list[tuple[int, int]], data: st.DataObject) -> tuple[list[int], torch.Tensor]:
    """How often each row counts, and the rows repeated that often."""
    counts = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)).filter(any))
    return counts, torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))


LOSSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(rows=LOSSES)
def test_excess_area_is_what_the_best_order_would_save(rows: list[tuple[int, int]]) -> None:
    confidence, losses = [float(r[0]) for r in rows], [float(r[1]) for r in rows]
    areas = []
    for order in itertools.permutations(losses):
        kept = list(itertools.accumulate(order))
        areas.append(math.fsum(total / (k + 1) for k, total in enumerate(kept)) / len(kept))
    excess = M.excess_area_under_risk_coverage(confidence, losses)
    ours = math.fsum(all_orders(rows)) / len(rows)
    assert excess.item() == pytest.approx(ours - min(areas), abs=1e-12)
    assert excess.dtype == torch.float64
    assert 0 <= excess.item() <= max(areas) - min(areas) + 1e-12
    best = M.excess_area_under_risk_coverage([-loss for loss in losses], losses)
    assert best.item() == pytest.approx(0.0, abs=1e-14)


@settings(max_examples=60, deadline=None)
@given(rows=LOSSES)
def test_generalised_area_is_the_trapezoid_from_no_coverage(rows: list[tuple[int, int]]) -> None:
    confidence, losses = [float(r[0]) for r in rows], [float(r[1]) for r in rows]
    # The generalised risk at k of N rows is the risk times k / N; its mean over the orders of ties is linear in them.
    curve = [0.0, *(risk * (k + 1) / len(rows) for k, risk in enumerate(all_orders(rows)))]
    wanted = math.fsum((a + b) / 2 for a, b in itertools.pairwise(curve)) / len(rows)
    area = M.area_under_generalised_risk_coverage(confidence, losses)
    assert area.item() == pytest.approx(wanted, abs=1e-12)
    assert area.dtype == torch.float64
    pairs = [loss * ((a > b) + (a == b) / 2) for (a, loss), (b, _) in itertools.product(rows, rows)]
    assert area.item() == pytest.approx(math.fsum(pairs) / len(rows) ** 2, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, data=st.data())
def test_new_areas_with_weights_are_those_of_repeated_rows(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    counts, index = repeated(rows, data)
    confidence, losses = (torch.tensor([r[i] for r in rows], dtype=torch.float64) for i in (0, 1))
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    weights = torch.tensor(counts)
    for metric in (M.excess_area_under_risk_coverage, M.area_under_generalised_risk_coverage):
        wanted = pytest.approx(metric(confidence[index], losses[index]).item(), abs=1e-12)
        assert metric(confidence, losses, weights=weights).item() == wanted
        assert metric(confidence[order], losses[order], weights=weights[order]).item() == wanted
        # Only the order of confidences counts, and the area grows with the loss.
        assert metric(confidence.exp(), losses, weights=weights).item() == wanted
        tripled = metric(confidence, 3 * losses, weights=weights).item()
        assert tripled == pytest.approx(3 * metric(confidence, losses, weights=weights).item(), abs=1e-12)
    # Shares of pairs do not change when all weights do.
    area = M.area_under_generalised_risk_coverage(confidence, losses, weights=0.1 * weights.double())
    assert area.item() == pytest.approx(
        M.area_under_generalised_risk_coverage(confidence[index], losses[index]).item(), abs=1e-12
    )


def test_generalised_area_by_error_rate_and_auroc() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randint(30, (1000,), generator=generator).double()
    errors = (torch.rand(1000, generator=generator) * 40 > confidence).double()
    rate, auroc = errors.mean().item(), roc_auc_score(errors, -confidence)
    closed = (1 - auroc) * rate * (1 - rate) + rate**2 / 2
    area = M.area_under_generalised_risk_coverage(confidence, errors).item()
    assert area == pytest.approx(closed, abs=1e-12)
    assert M.area_under_generalised_risk_coverage([0.5] * 1000, errors).item() == pytest.approx(rate / 2, abs=1e-12)
    assert M.area_under_generalised_risk_coverage(-errors, errors).item() == pytest.approx(rate**2 / 2, abs=1e-12)
    worst = M.area_under_generalised_risk_coverage(errors, errors).item()
    assert worst == pytest.approx(rate - rate**2 / 2, abs=1e-12)


def test_excess_area_of_many_rows_is_the_area_less_its_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(100_000, generator=generator, dtype=torch.float64)
    errors = (torch.rand(100_000, generator=generator, dtype=torch.float64) > confidence).double()
    rate = errors.mean().item()
    area = M.area_under_risk_coverage(confidence, errors).item()
    limit = rate + (1 - rate) * math.log(1 - rate)
    excess = M.excess_area_under_risk_coverage(confidence, errors).item()
    assert excess == pytest.approx(area - limit, abs=1e-5)
    best = M.area_under_risk_coverage(-errors, errors).item()
    assert excess == pytest.approx(area - best, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_new_areas_in_lower_precision(dtype: torch.dtype) -> None:
    confidence = torch.rand(300, generator=torch.Generator().manual_seed(0)).to(dtype)
    errors = torch.arange(300) % 3 == 0
    for metric in (M.excess_area_under_risk_coverage, M.area_under_generalised_risk_coverage):
        assert metric(confidence, errors).item() == metric(confidence.double(), errors).item()


def test_roc_against_sklearn() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(20, (500,), generator=generator).float() / 20
    labels = torch.rand(500, generator=generator) < scores
    assert M.area_under_roc(scores, labels).item() == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    inside, outside = scores[~labels], scores[labels]
    assert M.ood_auroc(inside, outside).item() == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert M.ood_auroc(outside, inside).item() == pytest.approx(1 - roc_auc_score(labels, scores), abs=1e-12)


def test_error_auroc_against_sklearn() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(300, 4, generator=generator).softmax(-1)
    targets = torch.randint(4, (300,), generator=generator)
    confidence, label = probs.max(-1)
    theirs = roc_auc_score(label != targets, -confidence)
    assert M.error_auroc(probs, targets).item() == pytest.approx(theirs, abs=1e-12)


def test_ties_count_half() -> None:
    assert M.ood_auroc([0.5] * 3, [0.5] * 5).item() == 0.5


def test_bad_input_is_named() -> None:
    with pytest.raises(BadInput, match="both kinds"):
        M.error_auroc([[0.9, 0.1]], [0])
    with pytest.raises(BadInput, match="out_scores"):
        M.ood_auroc([0.1], [])
    with pytest.raises(BadInput, match=r"in_scores.*row 1"):
        M.ood_auroc([0.1, math.nan], [0.2])
    with pytest.raises(BadInput, match="2 in row 1"):
        M.area_under_roc([0.1, 0.2], [0, 2])
    with pytest.raises(BadInput, match="negative in row 0"):
        M.risk_coverage([0.1], [-1.0])
    with pytest.raises(BadInput, match="exactly"):
        M.risk_coverage([0.1, 0.2], [[0.0], [1.0]])
    for metric in (M.excess_area_under_risk_coverage, M.area_under_generalised_risk_coverage):
        with pytest.raises(BadInput, match="negative in row 1"):
            metric([0.1, 0.2], [0.0, -1.0])
        with pytest.raises(BadInput, match=r"NaN.*row 1"):
            metric([0.1, math.nan], [0.0, 1.0])
        with pytest.raises(BadInput, match=r"weights has shape \(1,\)"):
            metric([0.1, 0.2], [0.0, 1.0], weights=[1.0])
        with pytest.raises(BadInput, match="not all zero"):
            metric([0.1, 0.2], [0.0, 1.0], weights=[0.0, 0.0])
        with pytest.raises(BadInput, match="at least one row"):
            metric([], [])
