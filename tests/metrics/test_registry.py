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
from bayesguard.metrics.registry import EVALUATION_METRICS, Mean, kind_of, specs_for
from bayesguard.predictive import CountPredictive, Predictive

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
APPLICABLE = [(name, kind) for name, spec in EVALUATION_METRICS.items() for kind in KINDS if kind in spec.kinds]


@pytest.mark.parametrize("outputs", [(), (3,)])
@pytest.mark.parametrize(("name", "kind"), APPLICABLE)
def test_resamples_are_repeated_examples(name: str, kind: str, outputs: tuple[int, ...]) -> None:
    if name == "classwise_ece" and outputs:
        pytest.skip("for one target an example")
    pred, targets = case(kind, outputs)
    spec = EVALUATION_METRICS[name]
    state = spec.scores(pred, targets)
    assert state.num_examples == N
    weights = next(bootstrap_weights(N, 3, seed=0))
    ours = state.resample(weights)
    assert ours.shape == (3,)
    assert ours.dtype == torch.float64
    for row, value in zip(weights, ours, strict=True):
        index = torch.arange(N).repeat_interleave(row.long())
        if kind == "count" and name == "quantile_error":
            continue  # repeated rows would be randomised anew
        again = spec.scores(pred[index], targets[index]).value()
        assert value.item() == pytest.approx(again, abs=1e-9)
    assert spec.bounds[0] <= state.value() <= spec.bounds[1]


@pytest.mark.parametrize("outputs", [(), (3,)])
def test_values_are_those_of_the_functions(outputs: tuple[int, ...]) -> None:
    pred, y = case("categorical", outputs)
    probs, logs = pred.probs, pred.logits
    confidence, label = probs.flatten(0, -2).max(-1)
    wanted = {
        "accuracy": M.accuracy(probs, y),
        "nll": M.negative_log_likelihood(logs, y),
        "brier": M.brier_score(probs, y),
        "ece": M.expected_calibration_error(probs, y),
        "aurc": M.area_under_risk_coverage(confidence, (label != y.flatten()).double()),
        "error_auroc": M.error_auroc(probs, y),
    }
    if not outputs:
        wanted["classwise_ece"] = M.classwise_calibration_error(probs, y)
    check(pred, y, wanted)
    pred, y = case("binary", outputs)
    two = torch.stack([1 - pred.probs, pred.probs], -1)
    check(
        pred,
        y,
        {
            "accuracy": M.accuracy(two, y),
            "nll": M.negative_log_likelihood(two.log(), y),
            "brier": M.brier_score(two, y),
            "ece": M.binary_calibration_error(pred.probs, y),
            "error_auroc": M.error_auroc(two, y),
        },
    )
    pred, y = case("continuous", outputs)
    check(
        pred,
        y,
        {
            "rmse": M.root_mean_squared_error(pred.mean, y),
            "nll": M.negative_log_likelihood(pred, y),
            "crps": M.continuous_ranked_probability_score(pred, y),
            "coverage_90": M.interval_coverage(pred.interval(0.1)[0], pred.interval(0.1)[1], y),
            "width_90": M.interval_width(*pred.interval(0.1)),
            "quantile_error": M.quantile_calibration_error(M.pit(pred, y)),
        },
    )


def check(pred: Predictive, targets: Tensor, wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        ours = EVALUATION_METRICS[name].scores(pred, targets).value()
        assert ours == pytest.approx(value.item(), abs=1e-9), name


def test_classwise_in_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    pred, targets = case("categorical")
    state = EVALUATION_METRICS["classwise_ece"].scores(pred, targets)
    whole = state.value()
    monkeypatch.setattr("bayesguard.metrics.registry.BUDGET", 1)
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
