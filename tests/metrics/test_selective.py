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
