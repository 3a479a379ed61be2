"""The torchmetrics classes: equal to the functions however the rows are split, sent, stored or typed."""

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Poisson
from torchmetrics import Metric, MetricCollection

from bayesguard import metrics
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M
from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.metrics.state import CalibrationState
from bayesguard.predictive import CountPredictive, Predictive
from tests.metrics.class_cases import CASES, REGISTERED, WEIGHTED, N, categorical, inputs, real, top


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
        metrics.OODAveragePrecision("both")  # type: ignore[arg-type]
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


@pytest.mark.parametrize(
    ("make", "pred", "first", "then"),
    [
        (
            lambda: {"50": metrics.IntervalCoverage(0.5), "90": metrics.IntervalCoverage(0.1)},
            Predictive.from_normal(torch.zeros(4), torch.ones(4)),
            torch.zeros(4),
            torch.tensor([1.0, 1.5, -1.0, 3.0]),
        ),
        (
            lambda: {"right": metrics.Accuracy(), "held": metrics.SetCoverage(0.01)},
            Predictive.from_probs([[0.6, 0.4]] * 4),
            torch.zeros(4, dtype=torch.long),
            torch.tensor([0, 1, 1, 1]),
        ),
        (
            lambda: {"60": metrics.CalibrationErrorAt(0.6), "80": metrics.CalibrationErrorAt(0.8)},
            Predictive.from_probs([[0.9, 0.1]] * 2 + [[0.55, 0.45], [0.7, 0.3]]),
            None,
            torch.tensor([0, 0, 1, 1]),
        ),
    ],
)
def test_metrics_of_a_collection_do_not_share_a_mean(
    make: Callable[[], dict[str, Metric]], pred: Predictive, first: Tensor | None, then: Tensor
) -> None:
    """Their states are equal after the first batch, by chance; a collection then computes both from one."""
    together, alone = MetricCollection(dict(make())), make()
    for update in (together.update, *(metric.update for metric in alone.values())):
        if first is None:
            update(pred[:2], then[:2])
        else:
            update(pred, first)
        update(pred, then)
    wanted = {name: metric.compute().item() for name, metric in alone.items()}
    assert len(set(wanted.values())) == 2
    assert {name: value.item() for name, value in together.compute().items()} == wanted


def test_metrics_of_the_same_rows_share_them() -> None:
    together = MetricCollection([metrics.AreaUnderRiskCoverage(), metrics.ErrorAUROC()])
    together.update(*categorical())
    assert len(together.compute_groups) == 1


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.bool, torch.uint8])
def test_yes_or_no_of_any_dtype_in_sets(dtype: torch.dtype) -> None:
    probs = torch.tensor([0.95, 0.6, 0.02])
    metric = metrics.SetCoverage()
    metric.update(probs, torch.tensor([0, 1, 0]).to(dtype))
    assert metric.compute().item() == pytest.approx(2 / 3)
    scores = EVALUATION_METRICS["set_coverage_90"].scores(
        Predictive.from_probs(probs), torch.tensor([0, 1, 0]).to(dtype)
    )
    assert scores.value() == pytest.approx(2 / 3)
