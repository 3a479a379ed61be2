"""The kernels that read their input once, against loops and against the plain formulas in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.metrics import functional as M
from bayesguard.metrics.functional import inputs
from bayesguard.metrics.functional.binned import BinnedSums, bin_index
from bayesguard.metrics.functional.crps import crps_of
from bayesguard.predictive import Predictive, SamplePredictive
from bayesguard.predictive.numerics import CACHED

SHAPES = [(1, 2), (37, 3), (300, 40), (5, 5000), (4, 300_000)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def made(rows: int, classes: int, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    logits = scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(-1).to(dtype), torch.randint(classes, (rows,), generator=generator)


def sums_one_by_one(probs: Tensor, labels: Tensor, num_bins: int, weights: Tensor) -> Tensor:
    """Count, score, hits, squares and score of hits of each class and bin: the definition, one number at a time."""
    edges = [(torch.tensor(b / num_bins, dtype=torch.float64)).to(probs.dtype).item() for b in range(1, num_bins)]
    sums = torch.zeros(5, probs.shape[1], num_bins, dtype=torch.float64)
    for values, label, weight in zip(probs, labels.tolist(), weights.tolist(), strict=True):
        for k, score in enumerate(values.tolist()):
            hit = float(k == label)
            at = sum(score > edge for edge in edges)
            sums[:, k, at] += weight * torch.tensor([1.0, score, hit, score * score, score * hit], dtype=torch.float64)
    return sums


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_are_those_of_a_search(shape: tuple[int, int], dtype: torch.dtype) -> None:
    probs, labels = made(*shape, dtype)
    confidence, right = inputs.answered(probs, labels)
    for row in range(len(probs)):
        values = probs[row].tolist()
        first = values.index(max(values))
        assert confidence[row].item() == min(values[first], 1.0)
        assert right[row].item() == float(first == labels[row])
    pair = inputs.top_label(*inputs.classified(probs, labels))
    assert torch.equal(confidence, pair[0])
    assert torch.equal(right, pair[1])


@pytest.mark.parametrize("classes", [2, 8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_equals_is_the_answer(classes: int, dtype: torch.dtype) -> None:
    probs = torch.full((classes, classes), 1 / classes, dtype=dtype)
    _, right = inputs.answered(probs, torch.arange(classes))
    assert right.tolist() == [1.0] + [0.0] * (classes - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [0.0, -0.0, -1e-7])
def test_signs_and_ties_in_long_rows(monkeypatch: pytest.MonkeyPatch, sign: float, dtype: torch.dtype) -> None:
    monkeypatch.setattr(inputs, "CACHED", 120)  # three rows
    probs, _ = made(9, 40, dtype)
    probs[:, 20] = 0
    probs /= probs.sum(-1, keepdim=True)
    probs[2] = 1 / 39  # ties, with a sign between them
    probs[3] = 0
    probs[3, [3, 35]] = 0.5
    probs[1:, 20] = sign
    first = [row.index(max(row)) for row in probs.tolist()]
    for wide in (probs, probs.T.contiguous().T, probs.clone().requires_grad_()):
        for shift in (0, 1):
            confidence, right = inputs.answered(wide, (torch.tensor(first) + shift) % 40)
            assert confidence.tolist() == [max(row) for row in probs.tolist()]
            assert right.tolist() == [1.0 - shift] * 9


@pytest.mark.parametrize("column", [0, 39])
@pytest.mark.parametrize("row", [0, 2, 3, 8])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (math.nan, "NaN or infinity in row {row}"),
        (math.inf, "NaN or infinity in row {row}"),
        (-math.inf, "NaN or infinity in row {row}"),
        (-0.0001, "no distribution in row {row}"),
        (0.5, "no distribution in row {row}"),
    ],
)
def test_no_slice_hides_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, wrong: float, message: str, row: int, column: int
) -> None:
    monkeypatch.setattr(inputs, "CACHED", 120)  # three rows
    probs, labels = made(9, 40)
    probs[row] = 1 / 40
    if wrong == -0.0001:  # with the right sum
        probs[row, 20] += probs[row, column] - wrong
        probs[row, column] = wrong
    else:
        probs[row, column] += wrong
    functions: list[Any] = [
        M.accuracy,
        M.expected_calibration_error,
        M.classwise_calibration_error,
        M.brier_score,
        M.error_auroc,
    ]
    for function in functions:
        with pytest.raises(BadInput, match=message.format(row=row)):
            function(probs, labels)


def test_the_limit_of_a_sum_is_one_thousandth_as_before() -> None:
    for miss, refused in ((0.0009, False), (-0.0009, False), (0.0011, True), (-0.0011, True)):
        probs = torch.full((3, 1000), 0.001, dtype=torch.float64)
        probs[1] *= 1 + miss
        if refused:
            with pytest.raises(BadInput, match="row 1"):
                M.accuracy(probs.float(), [0, 0, 0])
            with pytest.raises(BadInput, match=r"row 1.*log_softmax"):
                M.negative_log_likelihood(probs.log().float(), [0, 0, 0])
        else:
            assert M.accuracy(probs.float(), [0, 0, 0]).item() == 1.0
            M.negative_log_likelihood(probs.log().float(), [0, 0, 0])


def test_values_that_rounding_put_outside_are_clamped() -> None:
    probs = torch.tensor([[1 + 5e-7, -5e-7], [0.5, 0.5]], dtype=torch.float64)
    before = probs.clone()
    assert M.classwise_calibration_error(probs, [0, 0]).item() == pytest.approx(0.25, abs=1e-12)
    confidence, _ = inputs.answered(probs, torch.tensor([0, 0]))
    assert confidence.tolist() == [1.0, 0.5]
    assert torch.equal(probs, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bins", [1, 2, 15, 40])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(60, 2), (40, 5), (12, 60)])
def test_sums_of_classes_are_the_definition(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], weighted: bool, num_bins: int, dtype: torch.dtype
) -> None:
    probs, labels = made(*shape, dtype)
    probs[::4] = (probs[::4].double() * num_bins).round().div(num_bins).to(dtype)  # scores on the edges
    probs = probs.clamp(0, 1)
    before = probs.clone()
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(len(probs), generator=generator, dtype=torch.float64) if weighted else None
    wanted = sums_one_by_one(probs, labels, num_bins, torch.ones(len(probs)) if weights is None else weights)
    for cached in (CACHED, 7 * shape[1]):
        monkeypatch.setattr(inputs, "CACHED", cached)
        found = BinnedSums.of_classes(probs, labels, num_bins, weights)
        for name, theirs in zip(("count", "score", "hits", "score_squared", "score_hits"), wanted, strict=True):
            torch.testing.assert_close(getattr(found, name), theirs, rtol=0, atol=1e-12)
        for k in range(shape[1]):  # every class by itself is what one column gives
            column = bin_index(probs[:, k].contiguous(), num_bins, "width")
            one = BinnedSums.of(probs[:, k], labels == k, column, num_bins, weights)
            assert torch.equal(found.rows[k], one.rows)
            torch.testing.assert_close(found.sums[:, k], one.sums, rtol=0, atol=1e-12)
    assert torch.equal(probs, before)


def test_sums_of_classes_where_none_lies_above_the_first_bin() -> None:
    probs = torch.full((6, 50), 0.02)
    found = BinnedSums.of_classes(probs, torch.arange(6), 15)
    assert found.score.dtype == torch.float64
    assert found.score[:, 0].tolist() == pytest.approx([6 * probs[0, 0].item()] * 50, abs=1e-12)
    assert found.count.sum(0).tolist() == [300] + [0] * 14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bins", [1, 2, 3, 7, 15, 100, 1000, 100_000])
def test_bins_by_multiplication_are_those_of_a_search(num_bins: int, dtype: torch.dtype) -> None:
    edges = torch.arange(num_bins + 1, dtype=torch.float64)[:: max(1, num_bins // 1000)].div(num_bins).to(dtype)
    generator = torch.Generator().manual_seed(0)
    beside = [edges.nextafter(torch.full_like(edges, to)) for to in (0.0, 1.0)] if dtype != torch.float16 else []
    scores = torch.cat([torch.rand(500, generator=generator, dtype=torch.float64).to(dtype), edges, *beside])
    inner = (torch.arange(1, num_bins, dtype=torch.float64) / num_bins).to(dtype).double()
    assert torch.equal(bin_index(scores, num_bins, "width"), torch.searchsorted(inner, scores.double()))


@pytest.mark.parametrize("shape", [(37, 3), (300, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_brier_score_is_the_definition(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    probs, labels = made(*shape, dtype)
    wanted = (probs.double() - torch.nn.functional.one_hot(labels, shape[1])).square().sum(-1).mean().item()
    monkeypatch.setattr(inputs, "CACHED", 5 * shape[1])
    assert M.brier_score(probs, labels).item() == pytest.approx(wanted, rel=1e-14)


def crps_by_pairs(samples: Tensor, targets: Tensor) -> Tensor:
    """Mean distance from the target, less half the mean distance of two different samples."""
    x, y = samples.double(), targets.double()
    count = len(x)
    pairs = (x.unsqueeze(0) - x.unsqueeze(1)).abs().sum((0, 1)) / (count * (count - 1))
    return (x - y).abs().mean(0) - pairs / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 1), (7, 40), (50, 6, 2)])
def test_crps_of_samples_is_that_of_all_pairs(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(shape, generator=generator, dtype=dtype) + 1e3
    samples[0] = samples[-1]  # a tie
    targets = torch.randn(shape[1:], generator=generator, dtype=dtype) + 1e3
    before = samples.clone()
    pred = SamplePredictive(samples)
    monkeypatch.setattr("bayesguard.metrics.functional.crps.CACHED", 3 * shape[0])
    found = crps_of(pred, targets)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, crps_by_pairs(samples, targets), rtol=0, atol=1e-10)
    weighted = SamplePredictive(samples, [1.0 + 1e-13 * s for s in range(shape[0])])  # the slow path
    torch.testing.assert_close(
        found, crps_of(weighted, targets), rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-4
    )
    assert M.continuous_ranked_probability_score(pred, targets).item() == pytest.approx(found.mean().item(), rel=1e-14)
    assert torch.equal(samples, before)


def test_crps_of_samples_refuses_what_it_did() -> None:
    pred = Predictive.from_samples(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(BadInput, match="shape"):
        crps_of(pred, torch.zeros(4, 1))
    with pytest.raises(BadInput, match="row 2"):
        crps_of(pred, torch.tensor([0.0, 0.0, math.nan, 0.0]))
    with pytest.raises(BadInput, match="2 samples"):
        crps_of(Predictive.from_samples(torch.zeros(1, 4)), torch.zeros(4))


@pytest.mark.parametrize("ties", [False, True])
def test_risk_and_coverage_by_one_sort(ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randperm(400, generator=generator).double() / 400
    if ties:
        confidence[confidence == confidence.min()] = confidence.median()
    losses = torch.rand(400, generator=generator, dtype=torch.float64)
    curve = M.risk_coverage(confidence, losses)
    for k in (1, 7, 250, 400):
        # Rows surer than the k-th, and of its equals an even share.
        last = confidence.sort(descending=True).values[k - 1]
        above, equal = confidence > last, confidence == last
        kept = losses[above].sum() + losses[equal].mean() * (k - above.sum())
        assert curve.risk[k - 1].item() == pytest.approx((kept / k).item(), rel=1e-12)
