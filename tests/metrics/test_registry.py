"""What `evaluate` calls: every metric equals its function, and its resamples equal those of repeated examples."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Poisson

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M
from bayesguard.metrics.bootstrap import basic_interval, bootstrap_weights
from bayesguard.metrics.registry import EVALUATION_METRICS, kind_of, specs_for
from bayesguard.metrics.scores import Mean
from bayesguard.predictive import CategoricalPredictive, CountPredictive, Predictive

N = 40


def case(kind: str, outputs: tuple[int, ...] = ()) -> tuple[Predictive, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (N, *outputs)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if kind == "categorical":
        probs = torch.randn(*shape, 4, generator=generator, dtype=torch.float64).softmax(-1)
        return Predictive.from_probs(probs), torch.randint(4, shape, generator=generator)
    if kind == "binary":
        pred = type(Predictive.from_probs([0.5])).from_logits(noise)
        return pred, torch.randint(2, shape, generator=generator)
    if kind == "continuous":
        return Predictive.from_normal(noise, torch.ones(shape, dtype=torch.float64)), noise * 1.5
    if kind == "count":
        rate = noise.exp()
        return CountPredictive(Poisson(rate.unsqueeze(0))), torch.poisson(rate, generator=generator)
    return Predictive.from_samples(noise + torch.randn(20, *shape, generator=generator, dtype=torch.float64)), noise


KINDS = ("categorical", "binary", "continuous", "count", "samples")
SHAPES = [(), (3,), (2, 2)]
APPLICABLE = [
    (name, kind, outputs)
    for name, spec in EVALUATION_METRICS.items()
    for kind in KINDS
    for outputs in SHAPES
    if kind in spec.kinds and (name != "energy_score" or outputs == (3,))
]


def two(pred: Any) -> Tensor:
    """Class probabilities, of yes or no too."""
    probs: Tensor = pred.probs
    return probs if isinstance(pred, CategoricalPredictive) else torch.stack([1 - probs, probs], -1)


def ranked(function: Any) -> Any:
    def value(pred: Any, y: Tensor, w: Any) -> Tensor:
        confidence, label = two(pred).max(-1)
        area: Tensor = function(confidence, (label != y).double(), weights=w)
        return area

    return value


def promised(of_labels: Any, of_yes: Any, **options: Any) -> Any:
    def value(pred: Any, y: Tensor, w: Any) -> Tensor:
        function = of_labels if isinstance(pred, CategoricalPredictive) else of_yes
        error: Tensor = function(pred.probs, y, weights=w, **options)
        return error

    return value


# The metric by its function: of predictions, targets and how often each example counts.
FUNCTIONS: dict[str, Any] = {
    "accuracy": lambda p, y, w: M.accuracy(two(p), y, weights=w),
    "nll": lambda p, y, w: M.negative_log_likelihood(p, y, weights=w),
    "brier": lambda p, y, w: M.brier_score(two(p), y, weights=w),
    "ece": promised(M.expected_calibration_error, M.binary_calibration_error),
    "classwise_ece": lambda p, y, w: M.classwise_calibration_error(p.probs, y, weights=w),
    "aurc": ranked(M.area_under_risk_coverage),
    "error_auroc": lambda p, y, w: M.error_auroc(two(p), y, weights=w),
    "e_aurc": ranked(M.excess_area_under_risk_coverage),
    "augrc": ranked(M.area_under_generalised_risk_coverage),
    "smooth_ece": promised(M.smooth_calibration_error, M.binary_smooth_calibration_error),
    "debiased_ece": promised(M.expected_calibration_error, M.binary_calibration_error, norm="l2", debiased=True),
    "mce": promised(M.expected_calibration_error, M.binary_calibration_error, norm="max"),
    "brier_miscalibration": lambda p, y, w: M.corp_brier_decomposition(p.probs, y, weights=w).miscalibration,
    "brier_discrimination": lambda p, y, w: M.corp_brier_decomposition(p.probs, y, weights=w).discrimination,
    "set_coverage_90": lambda p, y, w: M.set_coverage(p.prediction_set(0.1), y, weights=w),
    "set_size_90": lambda p, y, w: M.set_size(p.prediction_set(0.1), weights=w),
    "rmse": lambda p, y, w: M.root_mean_squared_error(p.mean, y, weights=w),
    "crps": lambda p, y, w: M.continuous_ranked_probability_score(p, y, weights=w),
    "coverage_90": lambda p, y, w: M.interval_coverage(p.interval(0.1)[0], p.interval(0.1)[1], y, weights=w),
    "width_90": lambda p, y, w: M.interval_width(*p.interval(0.1), weights=w),
    "quantile_error": lambda p, y, w: M.quantile_calibration_error(M.pit(p, y), weights=w),
    "interval_score_90": lambda p, y, w: M.interval_score(p.interval(0.1)[0], p.interval(0.1)[1], y, 0.1, weights=w),
    "wis": lambda p, y, w: M.weighted_interval_score(p, y, weights=w),
    "ence": lambda p, y, w: M.expected_normalised_calibration_error(p.mean, p.variance.sqrt(), y, weights=w),
    "energy_score": lambda p, y, w: M.energy_score(p, y, weights=w),
}


def test_every_metric_has_its_function() -> None:
    assert set(FUNCTIONS) == set(EVALUATION_METRICS)


@pytest.mark.parametrize(("name", "kind", "outputs"), APPLICABLE)
def test_resamples_are_the_function_and_repeated_examples(name: str, kind: str, outputs: tuple[int, ...]) -> None:
    pred, targets = case(kind, outputs)
    spec, function = EVALUATION_METRICS[name], FUNCTIONS[name]
    state = spec.scores(pred, targets)
    assert state.num_examples == N
    assert state.value() == pytest.approx(function(pred, targets, None).item(), rel=1e-12, abs=1e-12)
    assert spec.bounds[0] <= state.value() <= spec.bounds[1]
    weights = next(bootstrap_weights(N, 3, seed=0))
    ours = state.resample(weights)
    assert ours.shape == (3,)
    assert ours.dtype == torch.float64
    for row, value in zip(weights, ours, strict=True):
        if name != "debiased_ece":  # whose weights are importances: ten copies of a row are not ten rows
            assert value.item() == pytest.approx(function(pred, targets, row).item(), rel=1e-12, abs=1e-12)
        index = torch.arange(N).repeat_interleave(row.long())
        if (name, kind) in (("quantile_error", "count"), ("ence", "samples")):
            continue  # repeated rows would be randomised anew; the last bit of a variance depends on the other rows
        again = function(pred[index], targets[index], None).item()
        assert value.item() == pytest.approx(again, rel=1e-12, abs=1e-12)
    assert state.resample(torch.zeros(2, N)).isnan().all()


@pytest.mark.parametrize(("name", "kind", "outputs"), APPLICABLE)
def test_chunks_of_weights_and_elements_are_the_whole(
    name: str, kind: str, outputs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = EVALUATION_METRICS[name].scores(*case(kind, outputs))
    weights = next(bootstrap_weights(N, 4, seed=0))
    whole = state.resample(weights)
    for part in ("scores", "functional.smooth"):
        monkeypatch.setattr(f"bayesguard.metrics.{part}.BUDGET", 1)
    torch.testing.assert_close(state.resample(weights), whole, rtol=1e-12, atol=1e-14)


def test_the_energy_score_is_of_vectors() -> None:
    for outputs in ((), (2, 2)):
        with pytest.raises(BadInput, match=r"\[S, N, D\] is needed"):
            EVALUATION_METRICS["energy_score"].scores(*case("samples", outputs))


def test_ence_needs_a_spread() -> None:
    with pytest.raises(BadInput, match="above 0"):
        EVALUATION_METRICS["ence"].scores(Predictive.from_samples(torch.ones(5, 3)), torch.zeros(3))


def test_classwise_in_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    pred, targets = case("categorical")
    state = EVALUATION_METRICS["classwise_ece"].scores(pred, targets)
    whole = state.value()
    monkeypatch.setattr("bayesguard.metrics.scores.BUDGET", 1)
    assert state.value() == pytest.approx(whole, abs=1e-14)


def test_an_infinite_value_counts_only_with_weight() -> None:
    state = Mean(torch.tensor([math.inf, 1.0, 2.0], dtype=torch.float64))
    weights = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert state.resample(weights).tolist() == [1.5, math.inf]
    assert state.value() == math.inf


def test_what_has_no_value_is_nan() -> None:
    state = EVALUATION_METRICS["error_auroc"].scores(
        Predictive.from_probs([[0.9, 0.1], [0.8, 0.2]]), torch.zeros(2).long()
    )
    assert math.isnan(state.value())
    state = EVALUATION_METRICS["accuracy"].scores(Predictive.from_probs([[0.9, 0.1]]), torch.zeros(1).long())
    assert state.resample(torch.zeros(1, 1)).isnan().all()


def test_defaults_and_refusals() -> None:
    names = {kind: [spec.name for spec in specs_for(case(kind)[0])] for kind in KINDS}
    assert names["categorical"] == names["binary"] == ["accuracy", "nll", "brier", "ece"]
    real = ["rmse", "crps", "coverage_90", "width_90", "quantile_error"]
    assert names["continuous"] == names["count"] == ["nll", *real]
    assert names["samples"] == real
    assert [kind_of(case(kind)[0]) for kind in KINDS] == list(KINDS)
    pred, y = case("continuous")
    with pytest.raises(BadInput, match=r"'ece'.*rmse"):
        specs_for(pred, ["ece"])
    with pytest.raises(BadType, match="categorical"):
        EVALUATION_METRICS["ece"].scores(pred, y)
    for name in ("rmse", "nll", "crps", "coverage_90", "width_90", "quantile_error"):
        spec = EVALUATION_METRICS[name]
        with pytest.raises(BadInput, match="exactly"):
            spec.scores(pred, y.unsqueeze(-1))
        with pytest.raises(BadInput, match="row 3"):
            spec.scores(pred, y.index_fill(0, torch.tensor([3]), math.nan))
        with pytest.raises(BadInput, match="no examples"):
            spec.scores(pred[:0], y[:0])


def test_weights_are_multinomial_whatever_the_chunks() -> None:
    whole = torch.cat(list(bootstrap_weights(30, 400, seed=3)))
    parts = torch.cat(list(bootstrap_weights(30, 400, seed=3, chunk_size=7)))
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, torch.cat(list(bootstrap_weights(30, 400, seed=4))))
    assert bool((whole.sum(1) == 30).all())
    # A count is binomial (30, 1/30): its variance is 29/30; 5 standard errors of a variance from 12,000 of them.
    fourth = (whole - 1).pow(4).mean().item()
    variance = (whole - 1).square().mean().item()
    assert abs(variance - 29 / 30) < 5 * math.sqrt((fourth - variance**2) / 12_000)
    permuted = torch.ones(400, 30)  # without replacement every count is 1
    assert abs((permuted - 1).square().mean().item() - 29 / 30) > 0.5


def test_the_callers_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    list(bootstrap_weights(10, 10, seed=0))
    assert torch.equal(before, torch.get_rng_state())


def test_bootstrap_spread_is_the_standard_error() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    resampled = torch.cat([Mean(values).resample(w) for w in bootstrap_weights(400, 2000, seed=0)])
    wanted = values.std(correction=0).item() / 20
    # The standard error of a standard deviation from 2,000 nearly normal values is sd / sqrt(4,000).
    assert abs(resampled.std().item() - wanted) < 5 * wanted / math.sqrt(4000)
    halved = torch.cat([Mean(values[:200]).resample(w) for w in bootstrap_weights(200, 2000, seed=0)])
    assert abs(halved.std().item() - wanted) > 5 * wanted / math.sqrt(4000)


def test_basic_interval_reflects_and_knows_what_has_no_value() -> None:
    resampled = torch.arange(101, dtype=torch.float64)
    assert basic_interval(50, resampled, 0.9, (-1e9, 1e9)) == (5.0, 95.0)
    assert basic_interval(40, resampled, 0.9, (0.0, 60.0)) == (0.0, 60.0)
    with_nan = torch.cat([resampled, torch.tensor([math.nan] * 5, dtype=torch.float64)])
    assert basic_interval(50, with_nan, 0.9, (-1e9, 1e9)) == (5.0, 95.0)
    with_inf = torch.cat([resampled, torch.tensor([math.inf], dtype=torch.float64)])
    assert basic_interval(50, with_inf, 0.9, (-1e9, math.inf)) == (0.0, math.inf)
    assert basic_interval(50, with_nan[-5:], 0.9, (0.0, 1.0)) == (0.0, 1.0)


def test_resampling_is_one_product_not_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # Counted, not timed: one matrix product for every 15 bins and chunk of weights.
    products = 0
    matmul = torch.Tensor.__matmul__

    def counted(a: Any, b: Any) -> Any:
        nonlocal products
        products += 1
        return matmul(a, b)

    pred, targets = case("categorical")
    state = EVALUATION_METRICS["ece"].scores(pred, targets)
    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    state.resample(next(bootstrap_weights(N, 500, seed=0)))
    assert products == 1
