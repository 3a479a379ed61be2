"""Weights of every function: whole numbers are repeated rows, equal ones are none, and zeros are dropped rows."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.metrics import functional as M
from bayesguard.metrics.functional.sets import _worst_slab
from bayesguard.predictive import Predictive

N, K = 40, 4
COSTS = [[0.0, 1.0, 2.0, 1.5], [1.0, 0.0, 1.0, 2.0], [0.6, 0.5, 0.4, 0.3]]


def made() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(N, K, generator=generator, dtype=torch.float64)
    logits[::3] = logits[1]  # ties
    x = torch.randn(N, generator=generator, dtype=torch.float64)
    return {
        "probs": logits.softmax(-1),
        "y": torch.randint(K, (N,), generator=generator),
        "sets": torch.rand(N, K, generator=generator) < 0.6,
        "yes": (x.sigmoid() * 20).round() / 20,
        "hit": torch.randint(2, (N,), generator=generator),
        "loss": torch.randint(4, (N,), generator=generator).double(),
        "x": x,
        "sigma": (x.exp() * 4).ceil() / 4,
        "truth": torch.randn(N, generator=generator, dtype=torch.float64),
        "draws": torch.randn(N, 7, 2, generator=generator, dtype=torch.float64),
        "vectors": torch.randn(N, 2, generator=generator, dtype=torch.float64),
    }


def draws(d: dict[str, Tensor]) -> Tensor:
    return d["draws"].transpose(0, 1).contiguous()


def bins(found: M.ReliabilityBins) -> tuple[Tensor, Tensor]:
    return found.confidence, found.accuracy


# Of data and weights.
FUNCTIONS: dict[str, Callable[[dict[str, Tensor], Any], Any]] = {
    "accuracy": lambda d, w: M.accuracy(d["probs"], d["y"], weights=w),
    "negative_log_likelihood": lambda d, w: M.negative_log_likelihood(d["probs"].log(), d["y"], weights=w),
    "brier_score": lambda d, w: M.brier_score(d["probs"], d["y"], weights=w),
    "brier_decomposition": lambda d, w: M.brier_decomposition(d["probs"], d["y"], weights=w),
    "corp_brier_decomposition": lambda d, w: M.corp_brier_decomposition(d["yes"], d["hit"], weights=w),
    "corp_log_score_decomposition": lambda d, w: M.corp_log_score_decomposition(d["yes"], d["hit"], weights=w),
    "crps_decomposition": lambda d, w: M.crps_decomposition(draws(d)[..., 0], d["truth"], weights=w),
    "expected_calibration_error": lambda d, w: M.expected_calibration_error(d["probs"], d["y"], weights=w),
    "classwise_calibration_error": lambda d, w: M.classwise_calibration_error(d["probs"], d["y"], weights=w),
    "binary_calibration_error": lambda d, w: M.binary_calibration_error(d["yes"], d["hit"], weights=w),
    "reliability_bins": lambda d, w: bins(M.reliability_bins(d["probs"], d["y"], weights=w)),
    "smooth_calibration_error": lambda d, w: M.smooth_calibration_error(d["probs"], d["y"], weights=w),
    "binary_smooth_calibration_error": lambda d, w: M.binary_smooth_calibration_error(d["yes"], d["hit"], weights=w),
    "kernel_calibration_error": lambda d, w: M.kernel_calibration_error(d["probs"], d["y"], weights=w),
    "area_under_risk_coverage": lambda d, w: M.area_under_risk_coverage(d["yes"], d["loss"], weights=w),
    "excess_area_under_risk_coverage": lambda d, w: M.excess_area_under_risk_coverage(d["yes"], d["loss"], weights=w),
    "area_under_generalised_risk_coverage": lambda d, w: M.area_under_generalised_risk_coverage(
        d["yes"], d["loss"], weights=w
    ),
    "area_under_roc": lambda d, w: M.area_under_roc(d["yes"], d["hit"], weights=w),
    "error_auroc": lambda d, w: M.error_auroc(d["probs"], d["y"], weights=w),
    "ood_auroc": lambda d, w: M.ood_auroc(d["yes"], d["yes"].square(), weights=None if w is None else (w, w)),
    "area_under_precision_recall": lambda d, w: M.area_under_precision_recall(
        d["yes"], d["yes"].square(), positive="out", weights=None if w is None else (w, w)
    ),
    "false_positive_rate_at": lambda d, w: M.false_positive_rate_at(
        d["x"], d["truth"], true_positive_rate=0.5, positive="out", weights=None if w is None else (w, w)
    ),
    "calibration_error_at": lambda d, w: M.calibration_error_at(d["probs"], d["y"], 0.4, weights=w),
    "binary_calibration_error_at": lambda d, w: M.binary_calibration_error_at(d["yes"], d["hit"], 0.4, weights=w),
    "decision_regret": lambda d, w: M.decision_regret(d["probs"], d["y"], COSTS, weights=w),
    "set_coverage": lambda d, w: M.set_coverage(d["sets"], d["y"], weights=w),
    "set_size": lambda d, w: M.set_size(d["sets"], weights=w),
    "size_stratified_coverage": lambda d, w: M.size_stratified_coverage(d["sets"], d["y"], 0.1, weights=w)[:2],
    "class_conditional_coverage": lambda d, w: M.class_conditional_coverage(d["sets"], d["y"], 0.1, weights=w)[:2],
    "root_mean_squared_error": lambda d, w: M.root_mean_squared_error(d["x"], d["truth"], weights=w),
    "continuous_ranked_probability_score": lambda d, w: M.continuous_ranked_probability_score(
        Predictive.from_normal(d["x"], d["sigma"]), d["truth"], weights=w
    ),
    "interval_coverage": lambda d, w: M.interval_coverage(d["x"] - 1, d["x"] + 1, d["truth"], weights=w),
    "interval_width": lambda d, w: M.interval_width(d["x"], d["x"] + d["sigma"], weights=w),
    "interval_score": lambda d, w: M.interval_score(d["x"] - 1, d["x"] + 1, d["truth"], 0.1, weights=w),
    "quantile_calibration_error": lambda d, w: M.quantile_calibration_error(d["yes"], weights=w),
    "energy_score": lambda d, w: M.energy_score(draws(d), d["vectors"], weights=w),
    "variogram_score": lambda d, w: M.variogram_score(draws(d), d["vectors"], weights=w),
    "weighted_interval_score": lambda d, w: M.weighted_interval_score(
        draws(d)[..., 0].sort(0).values[:3], d["truth"], [0.1, 0.5, 0.9], weights=w
    ),
    "expected_normalised_calibration_error": lambda d, w: M.expected_normalised_calibration_error(
        d["x"], d["sigma"], d["truth"], num_bins=5, weights=w
    ),
}
# Counts: two of every row are not one of every row.
COUNTS = {"area_under_risk_coverage", "excess_area_under_risk_coverage", "kernel_calibration_error"}
# Not one number of all rows; tested below.
OTHERS = {"risk_coverage", "worst_slab_coverage", "effective_sample_size"}
# Tests, nulls and exact intervals, whose law is that of independent rows that count alike; the transform is of each row.
WITHOUT = {"calibration_test", "pit_uniformity_test", "calibration_error_null", "pit", "group_calibration"}


def numbers(found: Any) -> Tensor:
    return torch.stack([found]) if isinstance(found, Tensor) else torch.cat([part.flatten() for part in found])


def rows(index: Tensor) -> dict[str, Tensor]:
    return {name: values[index] for name, values in made().items()}


def same(ours: Any, wanted: Any) -> None:
    torch.testing.assert_close(numbers(ours), numbers(wanted), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_every_function_has_weights_or_a_reason() -> None:
    functions = {name for name, value in vars(M).items() if inspect.isfunction(value)}
    weighted = {name for name in functions if "weights" in inspect.signature(getattr(M, name)).parameters}
    assert set(FUNCTIONS) | OTHERS == weighted
    assert functions - weighted == WITHOUT


@pytest.mark.parametrize("name", FUNCTIONS)
def test_whole_numbers_are_repeated_rows(name: str) -> None:
    counts = torch.randint(4, (N,), generator=torch.Generator().manual_seed(0))
    again = torch.arange(N).repeat_interleave(counts)
    ours = FUNCTIONS[name](made(), counts)
    same(ours, FUNCTIONS[name](rows(again), None))
    assert not torch.allclose(numbers(ours), numbers(FUNCTIONS[name](made(), None)), equal_nan=True, atol=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equal_weights_are_none(name: str) -> None:
    wanted = FUNCTIONS[name](made(), None)
    for weight in (1.0,) if name in COUNTS else (1.0, 0.3, 7.0):
        same(FUNCTIONS[name](made(), torch.full((N,), weight, dtype=torch.float64)), wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_of_weight_zero_are_dropped_rows(name: str) -> None:
    weights = 3 * torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[1::4] = 0
    kept = weights.nonzero().squeeze(-1)
    same(FUNCTIONS[name](made(), weights), FUNCTIONS[name](rows(kept), weights[kept]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_weights_without_meaning_are_named(name: str) -> None:
    for bad in (torch.zeros(N), -torch.ones(N), torch.full((N,), float("nan")), torch.ones(N + 1)):
        with pytest.raises(BadInput, match="weights"):
            FUNCTIONS[name](made(), bad)


def test_risk_and_coverage_has_the_points_of_repeated_rows() -> None:
    d = made()
    counts = torch.randint(4, (N,), generator=torch.Generator().manual_seed(0))
    again = rows(torch.arange(N).repeat_interleave(counts))
    ours, wanted = M.risk_coverage(d["yes"], d["loss"], weights=counts), M.risk_coverage(again["yes"], again["loss"])
    place = (ours.coverage * len(again["yes"])).round().long() - 1
    assert len(ours.coverage) == int((counts > 0).sum())
    same(ours.coverage, wanted.coverage[place])
    same(ours.risk, wanted.risk[place])
    for weight in (1.0, 0.3):
        same(M.risk_coverage(d["yes"], d["loss"], weights=[weight] * N), M.risk_coverage(d["yes"], d["loss"]))
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[::4] = 0
    kept = weights.nonzero().squeeze(-1)
    curve = M.risk_coverage(d["yes"], d["loss"], weights=weights)
    same(curve, M.risk_coverage(d["yes"][kept], d["loss"][kept], weights=weights[kept]))
    same(curve, M.risk_coverage(d["yes"].flip(0), d["loss"].flip(0), weights=weights.flip(0)))


def test_worst_slab() -> None:
    d = made()
    x = torch.stack([d["x"], d["truth"]], -1)
    directions = torch.nn.functional.normalize(d["vectors"], dim=-1)
    covered = d["sets"].gather(-1, d["y"].unsqueeze(-1)).squeeze(-1).double()
    counts = torch.randint(1, 4, (N,), generator=torch.Generator().manual_seed(0))
    again = torch.arange(N).repeat_interleave(counts)
    found = _worst_slab(directions, x, covered, counts.double(), 0.3)
    ones = torch.ones(len(again), dtype=torch.float64)
    same(found, _worst_slab(directions, x[again], covered[again], ones, 0.3))
    assert found[1] != _worst_slab(directions, x, covered, torch.ones(N, dtype=torch.float64), 0.3)[1]
    # The split goes by rows: what it leaves out and what it does not see make no difference.
    plain = M.worst_slab_coverage(x, d["sets"], d["y"], num_directions=20, delta=0.3)
    same(M.worst_slab_coverage(x, d["sets"], d["y"], num_directions=20, delta=0.3, weights=[0.3] * N), plain)
    counts[1::4] = 0
    kept = counts.nonzero().squeeze(-1)
    same(
        M.worst_slab_coverage(x, d["sets"], d["y"], num_directions=20, delta=0.3, weights=counts),
        M.worst_slab_coverage(
            x[kept], d["sets"][kept], d["y"][kept], num_directions=20, delta=0.3, weights=counts[kept]
        ),
    )
    inside = M.worst_slab_coverage(x, d["sets"], d["y"], num_directions=20, delta=0.3, weights=counts)
    assert 0 <= inside.coverage <= 1
    assert 0 < inside.share <= 1


@pytest.mark.parametrize("many", [20, 60])
def test_bandwidth_of_repeated_rows(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Below and above the number of rows up to which all pairs give the median distance.
    monkeypatch.setitem(M.kernel_calibration_error.__globals__, "_MEDIAN_ROWS", many)
    d = made()
    counts = torch.randint(4, (N,), generator=torch.Generator().manual_seed(0))
    again = rows(torch.arange(N).repeat_interleave(counts))
    ours = M.kernel_calibration_error(d["probs"], d["y"], weights=counts)
    same(ours, M.kernel_calibration_error(again["probs"], again["y"]))
    with pytest.raises(BadInput, match="weights sum to 1;"):
        M.kernel_calibration_error(d["probs"], d["y"], weights=torch.full((N,), 1 / N))
