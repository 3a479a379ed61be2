"""What must not change a metric: the order of rows and classes, repetition, constants in logits, dtype, batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayesguard import metrics
from bayesguard.metrics import functional as M
from bayesguard.metrics.state import CalibrationState

Function = Callable[..., Tensor]


def with_options(function: Function, **options: Any) -> Function:
    return lambda *rows, **more: function(*rows, **options, **more)


# Values that hang on rows alone, not on how many independent ones there are.
VALUES: dict[str, Function] = {
    "accuracy": M.accuracy,
    "nll": lambda p, y, **more: M.negative_log_likelihood(p.log(), y, **more),
    "brier": M.brier_score,
    "ece": M.expected_calibration_error,
    "ece l2": with_options(M.expected_calibration_error, norm="l2"),
    "ece max": with_options(M.expected_calibration_error, norm="max", num_bins=7),
    "ece mass": with_options(M.expected_calibration_error, binning="mass", num_bins=4),
    "classwise": M.classwise_calibration_error,
    "classwise mass": with_options(M.classwise_calibration_error, binning="mass", num_bins=4),
}
DEBIASED: dict[str, Function] = {
    f"{name} debiased {norm}": with_options(function, norm=norm, debiased=True)
    for name, function in (("ece", M.expected_calibration_error), ("classwise", M.classwise_calibration_error))
    for norm in ("l1", "l2")
}
ALL = VALUES | DEBIASED
SIZES = {"rows": st.integers(1, 40), "classes": st.integers(2, 6), "seed": st.integers(0, 10_000)}


def made(rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (rows,), generator=generator), generator


def check(function: Function, one: tuple[Any, ...], other: tuple[Any, ...], **more: Any) -> None:
    assert function(*other, **more).item() == pytest.approx(function(*one).item(), abs=1e-9)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=15, deadline=None)
@given(**SIZES)
def test_order_of_rows_and_of_classes_and_constants_in_logits(name: str, rows: int, classes: int, seed: int) -> None:
    logits, y, generator = made(rows, classes, seed)
    probs = logits.softmax(-1)
    order = torch.randperm(rows, generator=generator)
    check(ALL[name], (probs, y), (probs[order], y[order]))
    place = torch.randperm(classes, generator=generator)
    check(ALL[name], (probs, y), (probs[:, place], place.argsort()[y]))
    constants = 5 * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    check(ALL[name], (probs, y), ((logits + constants).softmax(-1), y))


@pytest.mark.parametrize("name", VALUES)
@settings(max_examples=15, deadline=None)
@given(**SIZES)
def test_repeated_rows_are_weights(name: str, rows: int, classes: int, seed: int) -> None:
    logits, y, generator = made(rows, classes, seed)
    probs = logits.softmax(-1)
    check(VALUES[name], (probs, y), (torch.cat([probs, probs]), torch.cat([y, y])))
    check(VALUES[name], (probs, y), (probs, y), weights=[2.0] * rows)
    times = torch.randint(0, 3, (rows,), generator=generator)
    times[0] = 1
    repeated = torch.arange(rows).repeat_interleave(times)
    check(VALUES[name], (probs[repeated], y[repeated]), (probs, y), weights=times)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=15, deadline=None)
@given(**SIZES)
def test_the_dtype_of_equal_values(name: str, rows: int, classes: int, seed: int) -> None:
    logits, y, _ = made(rows, classes, seed)
    probs = logits.softmax(-1).float()
    function = (lambda p, y: M.negative_log_likelihood(p.double().log(), y)) if name == "nll" else ALL[name]
    check(function, (probs, y), (probs.double(), y))


@pytest.mark.parametrize("binning", ["width", "mass"])
@pytest.mark.parametrize("weighted", [False, True])
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=4), order=st.randoms(use_true_random=False), seed=st.integers(0, 999))
def test_states_merge_in_any_order_of_any_split(
    binning: Any, weighted: bool, cuts: list[int], order: Any, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, weights = torch.rand(2, 40, generator=generator, dtype=torch.float64)
    hits = torch.rand(40, generator=generator, dtype=torch.float64) < scores
    whole = CalibrationState(7, binning)
    whole.update(scores, hits, weights if weighted else None)
    states = [CalibrationState(7, binning)]
    for some in torch.tensor_split(torch.arange(40), sorted(cuts)):
        if len(some):
            part = CalibrationState(7, binning)
            part.update(scores[some], hits[some], weights[some] if weighted else None)
            states.append(part)
    while len(states) > 1:  # any two of them, either way round
        order.shuffle(states)
        states.append(states.pop() + states.pop())
    merged = states[0]
    assert torch.equal(merged.sums.rows, whole.sums.rows)
    torch.testing.assert_close(merged.sums.sums, whole.sums.sums, rtol=1e-13, atol=1e-13)
    for norm in ("l1", "l2", "max"):
        assert merged.error(norm).item() == pytest.approx(whole.error(norm).item(), abs=1e-12)
    assert merged.null(5).mean.item() == pytest.approx(whole.null(5).mean.item(), abs=1e-12)


@settings(max_examples=10, deadline=None)
@given(**SIZES)
def test_a_metric_does_not_see_how_rows_came(rows: int, classes: int, seed: int) -> None:
    logits, y, generator = made(rows, classes, seed)
    probs, weights = logits.softmax(-1), torch.rand(rows, generator=generator) + 0.1
    cut = rows // 2
    for make in (
        metrics.ExpectedCalibrationError,
        lambda: metrics.ExpectedCalibrationError(binning="mass", exact=False),
        lambda: metrics.ClasswiseCalibrationError(classes),
        metrics.BrierScore,
    ):
        whole, parts = make(), make()
        whole.update(probs, y, weights)
        for part in (slice(cut, rows), slice(0, cut)):
            if part.stop > part.start:
                parts.update(probs[part], y[part], weights[part])
        assert parts.compute().item() == pytest.approx(whole.compute().item(), abs=1e-12)
