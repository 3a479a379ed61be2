"""Traps F1 to F6, and C10 for metrics."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesguard import metrics
from bayesguard.errors import BadInput
from bayesguard.metrics import functional as M
from bayesguard.metrics.bootstrap import bootstrap_weights
from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.predictive import Predictive

FUNCTIONS: tuple[Callable[[Any, Any], Tensor], ...] = (
    M.accuracy,
    M.brier_score,
    M.expected_calibration_error,
    M.classwise_calibration_error,
    lambda p, y: M.negative_log_likelihood(p.log(), y),
    lambda p, y: M.brier_decomposition(p, y).within_bin,
    lambda p, y: M.reliability_bins(p, y).accuracy_upper.nan_to_num().sum(),
    lambda p, y: M.expected_calibration_error(p, y, binning="mass"),
    lambda p, y: M.reliability_bins(p, y, binning="mass").lower.nan_to_num().sum(),
    M.error_auroc,
    lambda p, y: M.area_under_risk_coverage(p.amax(-1), (p.argmax(-1) != y).double()),
    lambda p, y: M.ood_auroc(p[:9, 0], p[9:, 0]),
    lambda p, y: M.root_mean_squared_error(p[:, 0], y.to(p.dtype)),
    lambda p, y: M.interval_score(p[:, 0] - 1, p[:, 0] + 1, p[:, 1], 0.1),
    lambda p, y: M.quantile_calibration_error(p[:, 0]),
)


def made(device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    probs = torch.randn(50, 3, generator=generator, dtype=torch.float64, device="cpu").softmax(-1)
    return probs.to(device), torch.randint(3, (50,), generator=generator, device="cpu").to(device)


def test_f1_confidence_one_and_zero_are_in_the_outer_bins() -> None:
    probs = torch.tensor([[1.0, 0.0], [0.95, 0.05]], dtype=torch.float64)
    # Mean confidence 0.975, half of them right: a phantom bin for 1.0 would give 0.525.
    assert M.expected_calibration_error(probs, [1, 0]).item() == pytest.approx(0.475)
    bins = M.reliability_bins(probs, [1, 0])
    assert bins.count.sum() == 2
    assert len(bins.count) == 15
    assert M.binary_calibration_error([0.0, 0.0], [0, 1]).item() == 0.5
    assert M.classwise_calibration_error(probs, [1, 0]).item() == pytest.approx(0.475)


def test_f1_float32_scores_on_an_edge_are_below_it() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        scores = torch.tensor([0.3, 0.25], dtype=dtype)
        # 0.3 closes (0.2, 0.3], which holds 0.25 too: one bin, |mean - 1/2|; two would give more.
        one = M.binary_calibration_error(scores, [0, 1], num_bins=10).item()
        assert one == pytest.approx(abs(scores.double().mean().item() - 0.5))
        metric = metrics.ExpectedCalibrationError(num_bins=10)
        metric.update(scores, [0, 1])
        assert metric.compute().item() == pytest.approx(one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_f2_sums_are_float64_whatever_the_input(dtype: torch.dtype) -> None:
    p = torch.full((300_000,), 0.9).to(dtype)
    wanted = abs(p[0].double().item() - 0.5)
    y = torch.arange(300_000) % 2
    assert M.binary_calibration_error(p, y).item() == pytest.approx(wanted, abs=1e-9)
    metric = metrics.ExpectedCalibrationError()
    for part in (slice(0, 100_000), slice(100_000, None)):
        metric.update(p[part], y[part])
    assert metric.compute().item() == pytest.approx(wanted, abs=1e-9)
    naive = p.cumsum(0, dtype=dtype)[-1].double().item() / 300_000 - 0.5
    assert not abs(naive - wanted) < 1e-9


@pytest.mark.parametrize("index", range(10))
def test_f3_nan_is_refused_with_its_row(index: int) -> None:
    probs, targets = made()
    probs[7, 1] = torch.nan
    with pytest.raises(BadInput, match=r"NaN.*row 7"):
        FUNCTIONS[index](probs, targets)


def test_f3_classes_refuse_nan() -> None:
    probs, targets = made()
    probs[7, 1] = torch.nan
    for metric in (metrics.Accuracy(), metrics.BrierScore(), metrics.ExpectedCalibrationError(), metrics.ErrorAUROC()):
        with pytest.raises(BadInput, match=r"NaN.*row 7"):
            metric.update(probs, targets)


@pytest.mark.parametrize("index", range(len(FUNCTIONS)))
def test_f4_empty_is_refused_and_results_are_float64(index: int) -> None:
    probs, targets = made()
    value = FUNCTIONS[index](probs, targets)
    assert value.dtype == torch.float64
    assert value.dim() == 0
    with pytest.raises(BadInput):
        FUNCTIONS[index](probs[:0], targets[:0])


def test_f4_no_error_is_a_float64_zero() -> None:
    for value in (
        M.expected_calibration_error([[1.0, 0.0]], [0]),
        M.brier_score([[1.0, 0.0]], [0]),
        M.root_mean_squared_error([1.0], [1.0]),
        M.area_under_risk_coverage([1.0], [0.0]),
    ):
        assert value.item() == 0.0
        assert value.dtype == torch.float64


def test_f5_binary_and_top_label_errors_have_their_own_names() -> None:
    p = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64)
    y = torch.tensor([0, 1, 1])
    two = torch.stack([1 - p, p], -1)
    # Of P(y = 1): bins {.1, .1} and {.8}; of the top label: bins {.9, .9} and {.8}, right 1 of 2 and 1 of 1.
    assert M.binary_calibration_error(p, y).item() == pytest.approx((2 * 0.4 + 0.2) / 3)
    assert M.expected_calibration_error(two, y).item() == pytest.approx((2 * 0.4 + 0.2) / 3)
    y = torch.tensor([0, 0, 0])
    assert M.binary_calibration_error(p, y).item() == pytest.approx((2 * 0.1 + 0.8) / 3)
    p = torch.tensor([0.35, 0.65], dtype=torch.float64)
    two = torch.stack([1 - p, p], -1)
    # Both have confidence .65, but P(y = 1) differs: the two definitions part.
    assert M.expected_calibration_error(two, [0, 0]).item() == pytest.approx(0.15)
    assert M.binary_calibration_error(p, [0, 0]).item() == pytest.approx(0.5)


@pytest.mark.parametrize("index", range(len(FUNCTIONS)))
def test_f6_deterministic_algorithms_are_enough(index: int) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            values = {FUNCTIONS[index](*made(device)).item() for _ in range(5)}
            assert len(values) == 1
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("index", range(len(FUNCTIONS)))
def test_f6_a_gpu_gives_the_same_bits_every_time(index: int) -> None:
    probs = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)).softmax(-1).cuda()
    targets = torch.randint(3, (200_000,), generator=torch.Generator().manual_seed(1)).cuda()
    values = [FUNCTIONS[index](probs, targets) for _ in range(5)]
    assert all(value.is_cuda for value in values)
    assert len({value.item() for value in values}) == 1
    assert values[0].item() == pytest.approx(FUNCTIONS[index](probs.cpu(), targets.cpu()).item(), abs=1e-9)


def everything() -> list[float]:
    """Every metric, as function, state, resample and class."""
    probs, targets = made()
    values = [function(probs, targets).item() for function in FUNCTIONS]
    pred = Predictive.from_probs(probs)
    loc = probs[:, 0]
    normal, y = Predictive.from_normal(loc, torch.ones_like(loc)), probs[:, 1] * 2
    values += [M.continuous_ranked_probability_score(normal, y).item(), M.pit(normal, y).sum().item()]
    samples = Predictive.from_samples(torch.stack([probs - 0.1, probs, probs * 2]))
    yes = Predictive.from_probs(loc)
    of_kind: dict[str, tuple[Predictive, Tensor]] = {
        "categorical": (pred, targets),
        "binary": (yes, targets.clamp_max(1)),
        "continuous": (normal, y),
        "samples": (samples, probs.flip(-1)),
    }
    weights = next(bootstrap_weights(50, 2, seed=0))
    for spec in EVALUATION_METRICS.values():
        state = spec.scores(*next(of_kind[kind] for kind in spec.kinds))
        values += [state.value(), *state.resample(weights).tolist()]
    for metric in (
        metrics.Accuracy(),
        metrics.ExpectedCalibrationError(),
        metrics.ExpectedCalibrationError(binning="mass"),
        metrics.ClasswiseCalibrationError(3),
        metrics.ErrorAUROC(),
    ):
        metric.update(probs, targets)
        values.append(metric.compute().item())
    quantiles = metrics.QuantileCalibrationError()
    quantiles.update(normal, y)
    return [*values, quantiles.compute().item()]


def test_c10_defaults_of_device_and_dtype_change_nothing() -> None:
    wanted = everything()
    with torch.device("meta"):
        assert everything() == wanted
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert everything() == wanted
    finally:
        torch.set_default_dtype(before)
