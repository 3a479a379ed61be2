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


# Unlike B's, its losses add up to the same in few resamples: ties would be parted by rounding.
C = Predictive.from_probs(torch.tensor([[0.55, 0.45], [0.37, 0.63], [0.33, 0.67], [0.23, 0.77]], dtype=torch.float64))


def expected(column: int, law: list[int], level: float) -> tuple[float, float, float]:
    """Interval and p-value of C's difference in the loss of a column, by the largest of the columns of `law`."""
    losses = [
        (-C.log_prob(LABELS) + A.log_prob(LABELS)).numpy(),
        2 * ((1 - C.probs[range(4), LABELS]) ** 2 - (1 - A.probs[range(4), LABELS]) ** 2).numpy(),
    ]
    weights = torch.cat(list(bootstrap_weights(4, 1000, 5))).numpy()
    again = np.stack([weights @ loss / 4 for loss in losses], -1)
    errors = again.std(0)
    largest = np.sort(np.abs((again - again.mean(0)) / errors)[:, law].max(-1))
    centre = 2 * losses[column].mean() - again[:, column].mean()
    half = largest[math.ceil(level * 1001) - 1] * errors[column]
    p_value = (1 + (largest >= abs(centre) / errors[column]).sum()) / 1001
    return centre - half, centre + half, p_value


def test_intervals_and_p_values_are_of_the_paired_differences() -> None:
    for correction, law in (("max_t", [0, 1]), (None, [0])):
        found = compare(
            {"a": A, "b": C},
            LABELS,
            metrics=["nll", "brier"],
            correction=correction,  # type: ignore[arg-type]
            confidence_level=0.9,
            seed=5,
        )
        row = find(found.differences, "b", "nll")
        assert (row.lower, row.upper, row.p_value) == pytest.approx(expected(0, law, 0.9))
        row = find(found.differences, "b", "brier")
        assert (row.lower, row.upper, row.p_value) == pytest.approx(expected(1, law if correction else [1], 0.9))


def equals(seed: int) -> tuple[dict[str, Predictive], Tensor]:
    """A baseline and 20 predictors of standard normal targets, off by 0.3 either way at random: none is better."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(200, generator=generator, dtype=torch.float64)
    off = 0.6 * torch.randint(2, (21, 200), generator=generator).double() - 0.3
    return {str(k): Predictive.from_normal(off[k], torch.ones(200).double()) for k in range(21)}, targets


def test_nothing_is_clear_among_equals_and_without_a_correction_much_is() -> None:
    corrected = plain = 0.0
    for seed in range(60):
        predictors, targets = equals(seed)
        for correction in ("max_t", None):
            found = compare(predictors, targets, metrics=["nll"], correction=correction, seed=seed)
            clear = any(row.is_clear for row in found.differences)
            assert clear == any(row.p_value <= 0.05 for row in found.differences)
            if correction is None:
                plain += clear / 60
            else:
                corrected += clear / 60
    # The family-wise error within five standard errors of a share of 60. Twenty tests by themselves err far more often.
    bound = 0.05 + 5 * math.sqrt(0.05 * 0.95 / 60)
    assert corrected < bound
    assert plain > bound


def test_a_true_difference_among_equals_is_found() -> None:
    predictors, targets = equals(0)
    predictors["far"] = Predictive.from_normal(torch.full((200,), 0.6).double(), torch.ones(200).double())
    differences = compare(predictors, targets, metrics=["nll", "rmse"]).differences
    assert [row.name for row in differences if row.is_clear] == ["far", "far"]


def test_the_same_predictor_twice_differs_in_nothing() -> None:
    again = Predictive.from_probs(A.probs.clone())
    for row in compare({"a": A, "b": again}, LABELS).differences:
        assert row[3:] == (0, 0, 0, 1)
        assert not row.is_clear


def test_an_infinite_difference_is_in_no_family() -> None:
    sure = Predictive.from_probs([[1.0, 0.0]] * 4)
    with_it = compare({"a": A, "b": B, "sure": sure}, LABELS, metrics=["nll"])
    row = find(with_it.differences, "sure", "nll")
    assert row.difference == math.inf
    assert math.isnan(row.p_value)
    assert not row.is_clear
    assert find(with_it.differences, "b", "nll") == compare({"a": A, "b": B}, LABELS, metrics=["nll"]).differences[1]


def test_clusters_are_drawn_whole() -> None:
    first, second, targets = normals(0, 60)
    copies = [Predictive.from_normal(pred.mean.repeat(4), pred.stddev.repeat(4)) for pred in (first, second)]
    predictors = dict(zip("ab", copies, strict=True))
    once = compare({"a": first, "b": second}, targets, metrics=["nll"]).differences[1]
    whole = compare(predictors, targets.repeat(4), metrics=["nll"], clusters=torch.arange(60).repeat(4)).differences[1]
    rows = compare(predictors, targets.repeat(4), metrics=["nll"]).differences[1]
    # Four copies of every row say nothing new.
    assert whole == pytest.approx(once)
    assert rows.upper - rows.lower < 0.6 * (once.upper - once.lower)


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
    with pytest.raises(BadInput, match="correction must be"):
        compare({"a": A, "b": B}, LABELS, correction="holm")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="clusters has 2"):
        compare({"a": A, "b": B}, LABELS, clusters=[0, 1])
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
    assert "hold for all at once" in text


def test_one_example_tells_no_difference() -> None:
    """Its resamples are all the same, so that any difference would be clear."""
    predictors = {name: bg.Deterministic(nn.Linear(4, 3)) for name in ("a", "b")}
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    with pytest.raises(BadInput, match="one example only"):
        compare(predictors, (x[:1], y[:1]))
    compare(predictors, (x, y))


@pytest.mark.parametrize("names", [("normal", "draws"), ("draws", "normal")])
def test_of_different_numbers_what_both_have(names: tuple[str, str]) -> None:
    normal, _, y = normals(0)
    draws = Predictive.from_samples(torch.randn(20, len(y), generator=torch.Generator().manual_seed(1)))
    both = {"normal": normal, "draws": draws}
    comparison = compare({name: both[name] for name in names}, y)
    assert {row.metric for row in comparison.differences} >= {"rmse", "crps"}
    assert "nll" not in {row.metric for row in comparison.differences}
    assert comparison.table()


def test_classes_and_numbers_are_not_compared() -> None:
    with pytest.raises(BadInput, match="'a': categorical, 'b': continuous"):
        compare({"a": A, "b": Predictive.from_normal(torch.zeros(4), torch.ones(4))}, LABELS)
