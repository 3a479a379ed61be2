"""compare: paired differences, exact on small data, with intervals that cover."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesguard as bg
from bayesguard.comparison import Difference, compare
from bayesguard.errors import BadInput
from bayesguard.metrics.bootstrap import bootstrap_weights
from bayesguard.predictive import Predictive

LABELS = torch.tensor([0, 0, 1, 1])
A = Predictive.from_probs(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], dtype=torch.float64))
B = Predictive.from_probs(torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]], dtype=torch.float64))


def normals(seed: int, rows: int = 60) -> tuple[Predictive, Predictive, Tensor]:
    """Two predictives of standard normal targets; the second is off by 0.4."""
    targets = torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    zeros, ones = torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
    return Predictive.from_normal(zeros, ones), Predictive.from_normal(zeros + 0.4, ones), targets


def find(differences: tuple[Difference, ...], name: str, metric: str) -> Difference:
    return next(row for row in differences if (row.name, row.metric) == (name, metric))


def test_exact_differences() -> None:
    comparison = compare({"a": A, "b": B}, LABELS, metrics=["accuracy", "nll"])
    assert comparison.baseline == "a"
    row = find(comparison.differences, "b", "nll")
    assert row.value == pytest.approx(-np.log([0.6, 0.4, 0.7, 0.8]).mean())
    assert row.difference == pytest.approx(row.value + np.log([0.9, 0.8, 0.7, 0.4]).mean())
    assert find(comparison.differences, "b", "accuracy").difference == 0
    assert find(comparison.differences, "a", "nll")[3:] == (0, 0, 0, 1)


def test_other_baseline_turns_the_sign() -> None:
    first = find(compare({"a": A, "b": B}, LABELS).differences, "b", "nll")
    second = find(compare({"a": A, "b": B}, LABELS, baseline="b").differences, "a", "nll")
    assert (second.difference, second.lower, second.upper) == pytest.approx(
        (-first.difference, -first.upper, -first.lower)
    )


def test_interval_is_of_the_paired_differences() -> None:
    loss_a, loss_b = (-pred.log_prob(LABELS) for pred in (A, B))
    weights = torch.cat(list(bootstrap_weights(4, 1000, 5)))
    low, high = np.quantile((weights @ (loss_b - loss_a) / 4).numpy(), [0.05, 0.95])
    row = find(compare({"a": A, "b": B}, LABELS, confidence_level=0.9, seed=5).differences, "b", "nll")
    assert (row.lower, row.upper) == pytest.approx((2 * row.difference - high, 2 * row.difference - low))


def coverage(shrink: float) -> float:
    """Share of 300 data sets whose interval holds the true difference of the NLL, 0.4^2 / 2."""
    hits = 0
    for seed in range(300):
        first, second, targets = normals(seed)
        row = compare({"a": first, "b": second}, targets, metrics=["nll"], seed=seed).differences[-1]
        lower, upper = ((1 - shrink) * row.difference + shrink * limit for limit in (row.lower, row.upper))
        hits += lower <= 0.4**2 / 2 <= upper
    return hits / 300


# Five standard errors of a share of 300, and 0.02 for the order 1/n that the bootstrap neglects.
TOLERANCE = 5 * math.sqrt(0.95 * 0.05 / 300) + 0.02


def test_intervals_cover() -> None:
    assert abs(coverage(1.0) - 0.95) < TOLERANCE


def test_intervals_of_half_the_width_would_be_noticed() -> None:
    assert abs(coverage(0.5) - 0.95) > TOLERANCE


def test_pairing_makes_clear_what_two_intervals_do_not() -> None:
    first, second, targets = normals(0, 400)
    row = compare({"a": first, "b": second}, targets, metrics=["nll"]).differences[-1]
    alone = [bg.evaluate(pred, targets, metrics=["nll"]).result("nll") for pred in (first, second)]
    assert row.is_clear
    assert alone[1].lower < alone[0].upper


def test_seed_repeats() -> None:
    first, again, other = (compare({"a": A, "b": B}, LABELS, seed=seed).differences for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_predictors_read_the_data_themselves() -> None:
    x, y = torch.randn(20, 1), torch.arange(20) % 2
    predictors = {name: bg.Deterministic(nn.Linear(1, 2)) for name in ("a", "b")}
    direct = compare(predictors, (x, y))
    assert direct == compare(predictors, DataLoader(TensorDataset(x, y), batch_size=6))
    assert direct == compare({name: predictor.predict((x, y)) for name, predictor in predictors.items()}, y)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="two"):
        compare({"a": A}, LABELS)
    with pytest.raises(BadInput, match="'c'"):
        compare({"a": A, "b": B}, LABELS, baseline="c")
    x, y = torch.randn(40, 1), torch.arange(40) % 2
    predictors = {name: bg.Deterministic(nn.Linear(1, 2)) for name in ("a", "b")}
    once: Iterator[Any] = iter([(x, y)])
    with pytest.raises(BadInput, match="iterator"):
        compare(predictors, once)
    with pytest.raises(BadInput, match="shuffle"):
        compare(predictors, DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=torch.Generator()))


def test_json_is_strict(tmp_path: Path) -> None:
    sure = Predictive.from_probs([[1.0, 0.0]] * 4)
    comparison = compare({"a": A, "sure": sure}, LABELS, metrics=["nll"])

    def refuse(token: str) -> None:
        raise AssertionError(token)

    tree = json.loads(comparison.to_json(tmp_path / "out.json"), parse_constant=refuse)
    assert tree["baseline"] == "a"
    assert tree["differences"][1]["difference"] is None
    assert (tmp_path / "out.json").read_text() == comparison.to_json()


def test_table_marks_what_is_clear() -> None:
    first, second, targets = normals(0, 400)
    text = compare({"a": first, "b": second}, targets, metrics=["nll"]).table()
    assert "*" in text.splitlines()[3]
    assert "differences from a" in text
