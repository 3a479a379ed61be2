"""The torchmetrics classes: equal to the functions however the rows are split, sent, stored or typed."""

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Poisson
from torchmetrics import Metric

from bayesguard import metrics
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M
from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.metrics.state import CalibrationState
from bayesguard.predictive import CountPredictive, Predictive

N = 120
Case = tuple[Callable[[], Metric], Callable[[Any, Tensor], Tensor], str]


def categorical() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(N, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    return probs, torch.randint(4, (N,), generator=generator)


def real() -> tuple[Predictive, Tensor]:
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return Predictive.from_normal(loc, loc.abs() + 0.5), loc + torch.randn(loc.shape, generator=generator)


def vectors() -> tuple[Predictive, Tensor]:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(6, N, 2, generator=generator, dtype=torch.float64)
    return Predictive.from_samples(samples), torch.randn(N, 2, generator=generator, dtype=torch.float64)


def sets(probs: Tensor, alpha: float) -> Tensor:
    return Predictive.from_probs(probs).prediction_set(alpha)


def sides(scores: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    return scores[~outside], scores[outside]


def top(probs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return probs.max(-1).values, (probs.argmax(-1) != y).double()


CASES: dict[str, Case] = {
    "accuracy": (metrics.Accuracy, M.accuracy, "classes"),
    "nll": (metrics.NegativeLogLikelihood, lambda p, y: M.negative_log_likelihood(p.log(), y), "classes"),
    "brier": (metrics.BrierScore, M.brier_score, "classes"),
    "ece": (metrics.ExpectedCalibrationError, M.expected_calibration_error, "classes"),
    "ece l2": (
        lambda: metrics.ExpectedCalibrationError(norm="l2", debiased=True),
        lambda p, y: M.expected_calibration_error(p, y, norm="l2", debiased=True),
        "classes",
    ),
    "ece mass": (
        lambda: metrics.ExpectedCalibrationError(10, binning="mass"),
        lambda p, y: M.expected_calibration_error(p, y, num_bins=10, binning="mass"),
        "classes",
    ),
    "classwise": (lambda: metrics.ClasswiseCalibrationError(4), M.classwise_calibration_error, "classes"),
    "aurc": (metrics.AreaUnderRiskCoverage, lambda p, y: M.area_under_risk_coverage(*top(p, y)), "classes"),
    "error auroc": (metrics.ErrorAUROC, M.error_auroc, "classes"),
    "ood auroc": (metrics.OODAUROC, M.area_under_roc, "scores"),
    "rmse": (metrics.RootMeanSquaredError, lambda p, y: M.root_mean_squared_error(p.mean, y), "real"),
    "crps": (metrics.ContinuousRankedProbabilityScore, M.continuous_ranked_probability_score, "real"),
    "real nll": (metrics.NegativeLogLikelihood, M.negative_log_likelihood, "real"),
    "coverage": (
        lambda: metrics.IntervalCoverage(0.2),
        lambda p, y: M.interval_coverage(p.interval(0.2)[0], p.interval(0.2)[1], y),
        "real",
    ),
    "width": (metrics.IntervalWidth, lambda p, y: M.interval_width(*p.interval(0.1)), "real"),
    "quantiles": (
        metrics.QuantileCalibrationError,
        lambda p, y: M.quantile_calibration_error(M.pit(p, y)),
        "real",
    ),
    "e-aurc": (
        metrics.ExcessAreaUnderRiskCoverage,
        lambda p, y: M.excess_area_under_risk_coverage(*top(p, y)),
        "classes",
    ),
    "augrc": (
        metrics.AreaUnderGeneralisedRiskCoverage,
        lambda p, y: M.area_under_generalised_risk_coverage(*top(p, y)),
        "classes",
    ),
    "smooth": (metrics.SmoothCalibrationError, M.smooth_calibration_error, "classes"),
    "at": (
        lambda: metrics.CalibrationErrorAt(0.6),
        lambda p, y: M.calibration_error_at(p, y, 0.6).error,
        "classes",
    ),
    "set coverage": (
        lambda: metrics.SetCoverage(0.3),
        lambda p, y: M.set_coverage(sets(p, 0.3), y),
        "classes",
    ),
    "set size": (lambda: metrics.SetSize(0.3), lambda p, y: M.set_size(sets(p, 0.3)), "classes"),
    "miscalibration": (
        metrics.BrierMiscalibration,
        lambda p, y: M.corp_brier_decomposition(p, y).miscalibration,
        "binary",
    ),
    "discrimination": (
        metrics.BrierDiscrimination,
        lambda p, y: M.corp_brier_decomposition(p, y).discrimination,
        "binary",
    ),
    "binary at": (
        lambda: metrics.CalibrationErrorAt(0.3),
        lambda p, y: M.binary_calibration_error_at(p, y, 0.3).error,
        "binary",
    ),
    "binary smooth": (metrics.SmoothCalibrationError, M.binary_smooth_calibration_error, "binary"),
    "ood precision": (
        lambda: metrics.OODAveragePrecision("out"),
        lambda p, y: M.area_under_precision_recall(*sides(p, y), positive="out"),
        "scores",
    ),
    "ood false positives": (
        lambda: metrics.OODFalsePositiveRate("in", 0.8),
        lambda p, y: M.false_positive_rate_at(*sides(p, y), 0.8, positive="in"),
        "scores",
    ),
    "interval score": (
        lambda: metrics.IntervalScore(0.2),
        lambda p, y: M.interval_score(*p.interval(0.2), y, 0.2),
        "real",
    ),
    "wis": (metrics.WeightedIntervalScore, M.weighted_interval_score, "real"),
    "ence": (
        lambda: metrics.ExpectedNormalisedCalibrationError(5),
        lambda p, y: M.expected_normalised_calibration_error(p.mean, p.stddev, y, num_bins=5),
        "real",
    ),
    "energy": (metrics.EnergyScore, M.energy_score, "vectors"),
    "variogram": (lambda: metrics.VariogramScore(1.0), lambda p, y: M.variogram_score(p, y, p=1.0), "vectors"),
}


def inputs(kind: str) -> tuple[Any, Tensor]:
    if kind == "real":
        return real()
    if kind == "vectors":
        return vectors()
    probs, y = categorical()
    if kind == "binary":
        return probs[:, 0], (y == 0).long()
    return (probs, y) if kind == "classes" else (probs[:, 0], y == 0)


def fed(name: str, sizes: list[int]) -> Metric:
    metric = CASES[name][0]()
    pred, y = inputs(CASES[name][2])
    start = 0
    for size in sizes:
        metric.update(pred[start : start + size], y[start : start + size])
        start += size
    return metric


@pytest.mark.parametrize("name", CASES)
def test_any_split_is_one_shot_and_the_function(name: str) -> None:
    wanted = CASES[name][1](*inputs(CASES[name][2])).item()
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 5):
        cuts = (torch.randperm(N - 1, generator=generator)[: count - 1] + 1).sort().values.tolist()
        bounds = [0, *cuts, N]
        metric = fed(name, [b - a for a, b in pairwise(bounds)])
        value = metric.compute()
        assert value.dtype == torch.float64
        assert value.dim() == 0
        assert value.item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_pickle_clone_and_reset(name: str) -> None:
    metric = fed(name, [50, 70])
    wanted = metric.compute().item()
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert copy.compute().item() == wanted
    pred, y = inputs(CASES[name][2])
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(BadInput, match="no rows"):
        metric.compute()
    metric.update(pred, y)
    assert metric.compute().item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_forward_gives_the_value_of_the_batch(name: str) -> None:
    metric = fed(name, [80])
    pred, y = inputs(CASES[name][2])
    batch = metric(pred[80:], y[80:])
    assert batch.item() == pytest.approx(CASES[name][1](pred[80:], y[80:]).item(), abs=1e-12)
    assert metric.compute().item() == pytest.approx(CASES[name][1](pred, y).item(), abs=1e-12)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2] == "classes"])
def test_predictives_and_probabilities_agree(name: str) -> None:
    probs, y = categorical()
    metric = CASES[name][0]()
    metric.update(Predictive.from_probs(probs), y)
    assert metric.compute().item() == pytest.approx(fed(name, [N]).compute().item(), abs=1e-9)


def test_yes_or_no() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(N, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (N,), generator=generator)
    two = torch.stack([1 - p, p], -1)
    wanted: dict[Callable[[], Metric], Tensor] = {
        metrics.Accuracy: M.accuracy(two, y),
        metrics.NegativeLogLikelihood: M.negative_log_likelihood(two.log(), y),
        metrics.BrierScore: M.brier_score(two, y),
        metrics.ExpectedCalibrationError: M.binary_calibration_error(p, y),
        metrics.ErrorAUROC: M.error_auroc(two, y),
        metrics.AreaUnderRiskCoverage: M.area_under_risk_coverage(*top(two, y)),
    }
    for make, value in wanted.items():
        for pred in (p, Predictive.from_probs(p)):
            metric = make()
            metric.update(pred, y)
            assert metric.compute().item() == pytest.approx(value.item(), abs=1e-9), make
    with pytest.raises(BadType, match="binary"):
        metrics.ClasswiseCalibrationError(2).update(p, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_has_the_values_of_its_probabilities(dtype: torch.dtype) -> None:
    probs, y = categorical()
    rounded = probs.to(dtype)
    for name in ("accuracy", "brier", "aurc", "error auroc"):
        metric = CASES[name][0]()
        metric.update(rounded, y)
        confidence, label = rounded.double().max(-1)
        exact = {
            "accuracy": (label == y).double().mean(),
            "brier": (rounded.double() - torch.nn.functional.one_hot(y, 4)).square().sum(-1).mean(),
            "aurc": M.area_under_risk_coverage(confidence, (label != y).double()),
            "error auroc": M.area_under_roc(-confidence, label != y),
        }[name]
        assert metric.compute().item() == pytest.approx(exact.item(), abs=1e-12), name
    ece = metrics.ExpectedCalibrationError()
    ece.update(rounded, y)
    assert ece.compute().item() == M.expected_calibration_error(rounded, y).item()
    nll = metrics.NegativeLogLikelihood()
    nll.update(rounded, y)
    picked = -rounded.double()[torch.arange(N), y].log().mean()
    assert nll.compute().item() == pytest.approx(picked.item(), abs=1e-12)


def test_ood_scores_of_predictives_are_their_uncertainty() -> None:
    sure, unsure = Predictive.from_probs([[0.9, 0.1]] * 3), Predictive.from_probs([[0.6, 0.4]] * 2)
    metric = metrics.OODAUROC()
    metric.update(sure, torch.zeros(3))
    metric.update(unsure, torch.ones(2))
    assert metric.compute().item() == 1.0


def test_counts_use_the_randomised_transform() -> None:
    pred = CountPredictive(Poisson(torch.full((1, 500), 2.0)))
    y = torch.poisson(torch.full((500,), 2.0), generator=torch.Generator().manual_seed(0))
    metric = metrics.QuantileCalibrationError()
    metric.update(pred, y)
    assert metric.compute().item() == M.quantile_calibration_error(M.pit(pred, y)).item()


def test_an_infinite_loss_stays_infinite() -> None:
    metric = metrics.NegativeLogLikelihood()
    metric.update([[1.0, 0.0]], [1])
    metric.update([[0.5, 0.5]], [1])
    assert metric.compute().item() == math.inf


def test_bad_input_is_named() -> None:
    pred, y = real()
    with pytest.raises(BadType, match="accuracy is for categorical"):
        metrics.Accuracy().update(pred, y)
    with pytest.raises(BadType, match="IntervalCoverage is not for categorical"):
        metrics.IntervalCoverage().update([[0.5, 0.5]], [0])
    with pytest.raises(BadType, match="QuantileCalibrationError is not for categorical"):
        metrics.QuantileCalibrationError().update([[0.5, 0.5]], [0])
    with pytest.raises(BadInput, match="exactly"):
        metrics.IntervalCoverage().update(pred, y[:, 0])
    with pytest.raises(BadInput, match="made for 3"):
        metrics.ClasswiseCalibrationError(3).update([[0.5, 0.5]], [0])
    with pytest.raises(BadInput, match="alpha"):
        metrics.IntervalWidth(0.0)
    for cls in (metrics.SetSize, metrics.IntervalScore):
        with pytest.raises(BadInput, match="alpha"):
            cls(1.0)
    with pytest.raises(BadType, match="SetCoverage is not for continuous"):
        metrics.SetCoverage().update(pred, y)
    with pytest.raises(BadType, match="BrierMiscalibration is not for categorical"):
        metrics.BrierMiscalibration().update([[0.5, 0.5]], [0])
    for make in (metrics.SmoothCalibrationError, lambda: metrics.CalibrationErrorAt(0.5)):
        with pytest.raises(BadType, match="is not for continuous"):
            make().update(pred, y)
    for regression in (metrics.VariogramScore, metrics.ExpectedNormalisedCalibrationError, metrics.IntervalScore):
        with pytest.raises(BadType, match="is not for categorical"):
            regression().update([[0.5, 0.5]], [0])
    with pytest.raises(BadInput, match="threshold"):
        metrics.CalibrationErrorAt(1.5)
    with pytest.raises(BadInput, match="p must be positive"):
        metrics.VariogramScore(0.0)
    with pytest.raises(BadInput, match="positive must be"):
        metrics.OODAveragePrecision("both")
    with pytest.raises(BadInput, match="true_positive_rate"):
        metrics.OODFalsePositiveRate("in", 1.0)
    with pytest.raises(BadInput, match="targets has 2 in row 1"):
        metrics.OODAUROC().update([0.1, 0.2], [0, 2])
    with pytest.raises(BadInput, match="exactly"):
        metrics.SetSize().update([[0.5, 0.5]], [0, 1])
    with pytest.raises(BadInput, match="debiased"):
        metrics.ExpectedCalibrationError(norm="max", debiased=True)
    with pytest.raises(BadInput, match="softmax"):
        metrics.NegativeLogLikelihood().update([[3.0, -1.0]], [0])
    with pytest.raises(BadInput, match="exact=False"):
        _ = metrics.ExpectedCalibrationError(binning="mass").state
    for bad in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]):
        with pytest.raises(BadInput, match="weights"):
            metrics.Accuracy().update([[0.5, 0.5]] * 2, [0, 0], bad)


WEIGHTED: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "accuracy": lambda p, y, w: M.accuracy(p, y, weights=w),
    "nll": lambda p, y, w: M.negative_log_likelihood(p.log(), y, weights=w),
    "brier": lambda p, y, w: M.brier_score(p, y, weights=w),
    "ece": lambda p, y, w: M.expected_calibration_error(p, y, weights=w),
    "ece l2": lambda p, y, w: M.expected_calibration_error(p, y, norm="l2", debiased=True, weights=w),
    "ece mass": lambda p, y, w: M.expected_calibration_error(p, y, num_bins=10, binning="mass", weights=w),
    "classwise": lambda p, y, w: M.classwise_calibration_error(p, y, weights=w),
    "aurc": lambda p, y, w: M.area_under_risk_coverage(*top(p, y), weights=w),
    "error auroc": lambda p, y, w: M.error_auroc(p, y, weights=w),
    "ood auroc": lambda p, y, w: M.area_under_roc(p, y, weights=w),
    "rmse": lambda p, y, w: M.root_mean_squared_error(p.mean, y, weights=w),
    "crps": lambda p, y, w: M.continuous_ranked_probability_score(p, y, weights=w),
    "real nll": lambda p, y, w: (w @ -p.log_prob(y).mean(-1)) / w.sum(),
    "coverage": lambda p, y, w: M.interval_coverage(p.interval(0.2)[0], p.interval(0.2)[1], y, weights=w),
    "width": lambda p, y, w: M.interval_width(p.interval(0.1)[0], p.interval(0.1)[1], weights=w),
    "quantiles": lambda p, y, w: M.quantile_calibration_error(M.pit(p, y), weights=w),
    "e-aurc": lambda p, y, w: M.excess_area_under_risk_coverage(*top(p, y), weights=w),
    "augrc": lambda p, y, w: M.area_under_generalised_risk_coverage(*top(p, y), weights=w),
    "smooth": lambda p, y, w: M.smooth_calibration_error(p, y, weights=w),
    "at": lambda p, y, w: M.calibration_error_at(p, y, 0.6, weights=w).error,
    "set coverage": lambda p, y, w: M.set_coverage(sets(p, 0.3), y, weights=w),
    "set size": lambda p, y, w: M.set_size(sets(p, 0.3), weights=w),
    "miscalibration": lambda p, y, w: M.corp_brier_decomposition(p, y, weights=w).miscalibration,
    "discrimination": lambda p, y, w: M.corp_brier_decomposition(p, y, weights=w).discrimination,
    "binary at": lambda p, y, w: M.binary_calibration_error_at(p, y, 0.3, weights=w).error,
    "binary smooth": lambda p, y, w: M.binary_smooth_calibration_error(p, y, weights=w),
    "ood precision": lambda p, y, w: M.area_under_precision_recall(*sides(p, y), positive="out", weights=(w[~y], w[y])),
    "ood false positives": lambda p, y, w: M.false_positive_rate_at(
        *sides(p, y), 0.8, positive="in", weights=(w[~y], w[y])
    ),
    "interval score": lambda p, y, w: M.interval_score(*p.interval(0.2), y, 0.2, weights=w),
    "wis": lambda p, y, w: M.weighted_interval_score(p, y, weights=w),
    "ence": lambda p, y, w: M.expected_normalised_calibration_error(p.mean, p.stddev, y, num_bins=5, weights=w),
    "energy": lambda p, y, w: M.energy_score(p, y, weights=w),
    "variogram": lambda p, y, w: M.variogram_score(p, y, p=1.0, weights=w),
}

# The class of every metric of the registry, made with what the registry's name says.
REGISTERED: dict[str, Callable[[], Metric]] = {
    "accuracy": metrics.Accuracy,
    "nll": metrics.NegativeLogLikelihood,
    "brier": metrics.BrierScore,
    "ece": metrics.ExpectedCalibrationError,
    "classwise_ece": lambda: metrics.ClasswiseCalibrationError(4),
    "aurc": metrics.AreaUnderRiskCoverage,
    "error_auroc": metrics.ErrorAUROC,
    "e_aurc": metrics.ExcessAreaUnderRiskCoverage,
    "augrc": metrics.AreaUnderGeneralisedRiskCoverage,
    "smooth_ece": metrics.SmoothCalibrationError,
    "debiased_ece": lambda: metrics.ExpectedCalibrationError(norm="l2", debiased=True),
    "mce": lambda: metrics.ExpectedCalibrationError(norm="max"),
    "brier_miscalibration": metrics.BrierMiscalibration,
    "brier_discrimination": metrics.BrierDiscrimination,
    "set_coverage_90": metrics.SetCoverage,
    "set_size_90": metrics.SetSize,
    "rmse": metrics.RootMeanSquaredError,
    "crps": metrics.ContinuousRankedProbabilityScore,
    "coverage_90": metrics.IntervalCoverage,
    "width_90": metrics.IntervalWidth,
    "quantile_error": metrics.QuantileCalibrationError,
    "interval_score_90": metrics.IntervalScore,
    "wis": metrics.WeightedIntervalScore,
    "ence": metrics.ExpectedNormalisedCalibrationError,
    "energy_score": metrics.EnergyScore,
}


def test_every_metric_of_the_registry_has_a_class() -> None:
    assert set(REGISTERED) == set(EVALUATION_METRICS)
    made = {type(make()) for make in REGISTERED.values()} | {type(case[0]()) for case in CASES.values()}
    assert {name for name in dir(metrics) if name[0].isupper()} == {cls.__name__ for cls in made} | {"CalibrationState"}


@pytest.mark.parametrize("name", REGISTERED)
def test_any_merge_has_the_value_of_the_registry(name: str) -> None:
    spec = EVALUATION_METRICS[name]
    for kind in spec.kinds:
        if kind == "count":
            continue
        pred, y = inputs({"categorical": "classes", "continuous": "real", "samples": "vectors"}.get(kind, kind))
        if name == "nll" and kind == "continuous":
            wanted = -pred.log_prob(y).mean().item()
        else:
            wanted = spec.scores(pred, y).value()
        parts = [slice(0, 30), slice(30, 41), slice(41, N)]
        for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
            first, *others = [REGISTERED[name]() for _ in order]
            for metric, part in zip((first, *others), order, strict=True):
                metric.update(pred[parts[part]], y[parts[part]])
            for metric in others:
                first.merge_state(metric)
            assert first.compute().item() == pytest.approx(wanted, abs=1e-12), kind


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_are_those_of_the_function(name: str) -> None:
    pred, y = inputs(CASES[name][2])
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    weights[::7] = 0
    metric = CASES[name][0]()
    for rows in (slice(0, 50), slice(50, N)):
        metric.update(pred[rows], y[rows], weights[rows])
    wanted = WEIGHTED[name](pred, y, weights)
    assert metric.compute().item() == pytest.approx(wanted.item(), abs=1e-12)
    assert metric.compute().item() != pytest.approx(fed(name, [N]).compute().item(), abs=1e-6)


def test_a_row_without_weight_adds_no_infinity() -> None:
    metric = metrics.NegativeLogLikelihood()
    metric.update([[1.0, 0.0], [0.5, 0.5]], [1, 1], [0.0, 2.0])
    assert metric.compute().item() == pytest.approx(math.log(2), abs=1e-12)


def test_the_state_of_a_metric_is_that_of_its_scores() -> None:
    probs, y = categorical()
    for binning in ("width", "mass"):
        metric = metrics.ExpectedCalibrationError(10, binning=binning, exact=False)
        metric.update(probs[:50], y[:50])
        metric.update(probs[50:], y[50:])
        state = CalibrationState(10, binning)
        state.update(probs.max(-1).values, probs.argmax(-1) == y)
        assert metric.compute().item() == pytest.approx(state.error().item(), abs=1e-12)
        torch.testing.assert_close(metric.state.bootstrap(20, seed=1), state.bootstrap(20, seed=1))


def test_torchmetrics_is_loaded_at_first_use_only() -> None:
    code = (
        "import sys, bayesguard.metrics as m; assert 'torchmetrics' not in sys.modules; "
        "assert 'Accuracy' in dir(m) and 'functional' in dir(m); assert 'torchmetrics' not in sys.modules; "
        "m.Accuracy(); assert 'torchmetrics' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="Precision"):
        _ = metrics.Precision
