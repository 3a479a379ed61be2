"""evaluate: exact numbers on small data, intervals that cover, shifts in pairs, groups, and results as files."""

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesguard as bg
from bayesguard.errors import BadInput, BadType
from bayesguard.evaluation import evaluate
from bayesguard.metrics.bootstrap import basic_interval, bca_interval, bootstrap_weights
from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.predictive import Predictive
from bayesguard.results import Evaluation, Result, combined_table, show
from bayesguard.sheet import Drawn

PROBS = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])


class Add:
    """A shift that adds a constant: what an object needs to be one."""

    def __init__(self, name: str, severity: float, amount: float) -> None:
        self.name, self.severity, self.amount = name, severity, amount

    def __call__(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        assert generator is not None
        return inputs + self.amount


def linear() -> bg.Predictor:
    """Logits [0, x]: class 1 where x is positive."""
    network = nn.Linear(1, 2, bias=False)
    network.weight.data = torch.tensor([[0.0], [1.0]])
    return bg.Deterministic(network)


def data(rows: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 1, generator=generator)
    return x, (x[:, 0] + torch.randn(rows, generator=generator) > 0).long()


def random_probs(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities of three classes and labels drawn from them."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(rows, 3, generator=generator, dtype=torch.float64).softmax(-1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


def test_exact_numbers() -> None:
    evaluation = evaluate(Predictive.from_probs(PROBS), LABELS)
    assert evaluation.metrics == ["accuracy", "nll", "brier", "ece"]
    assert evaluation.value("accuracy") == 0.75
    assert evaluation.value("nll") == pytest.approx(-np.log([0.9, 0.8, 0.7, 0.4]).mean())
    assert evaluation.value("brier") == pytest.approx(2 * np.square([0.1, 0.2, 0.3, 0.6]).mean())
    assert evaluation.value("ece") == pytest.approx((0.1 + 0.2 + 0.3 + 0.6) / 4)
    assert evaluation.result("accuracy").num_examples == 4
    assert all(result.lower <= result.value <= result.upper for result in evaluation.results)


def test_interval_is_the_basic_one_of_the_shared_resamples() -> None:
    probs, labels = random_probs(50, 0)
    result = evaluate(Predictive.from_probs(probs), labels, metrics=["accuracy"], seed=7).result("accuracy")
    right = (probs.argmax(-1) == labels).double()
    resampled = torch.cat([weights @ right / 50 for weights in bootstrap_weights(50, 1000, 7)])
    low, high = np.quantile(resampled.numpy(), [0.025, 0.975])
    assert (result.lower, result.upper) == pytest.approx((2 * result.value - high, 2 * result.value - low))


def test_other_intervals_on_request() -> None:
    probs, labels = random_probs(50, 0)
    pred = Predictive.from_probs(probs)
    resampled = torch.cat([w @ -pred.log_prob(labels) / 50 for w in bootstrap_weights(50, 1000, 7)])
    low, high = np.quantile(resampled.numpy(), [0.025, 0.975])
    found = {kind: evaluate(pred, labels, interval=kind, seed=7) for kind in (None, "basic", "percentile", "bca")}
    ends = {kind: evaluation.result("nll")[5:7] for kind, evaluation in found.items()}
    value = found[None].value("nll")
    assert ends["percentile"] == pytest.approx((low, high))
    assert ends["basic"] == ends[None] == pytest.approx((2 * value - high, 2 * value - low))
    left_out = (-pred.log_prob(labels).sum() + pred.log_prob(labels)) / 49
    assert ends["bca"] == pytest.approx(bca_interval(value, resampled, left_out, 0.95, (-math.inf, math.inf)))
    # Only sums of absolute gaps have a default of their own.
    off, wrong = Predictive.from_probs(probs), (labels + 1) % 3
    assert evaluate(off, wrong, interval="basic").result("ece") != evaluate(off, wrong).result("ece")
    assert found["basic"].result("brier") == found[None].result("brier")
    assert found["bca"].meta["interval"] == "bca"
    with pytest.raises(BadInput, match="interval must be"):
        evaluate(pred, labels, interval="BCa")  # type: ignore[arg-type]


def test_clusters_are_drawn_whole_in_groups_too() -> None:
    probs, labels = random_probs(40, 0)
    once = evaluate(Predictive.from_probs(probs), labels, groups=torch.arange(40) % 2)
    tripled = evaluate(
        Predictive.from_probs(probs.repeat(3, 1)),
        labels.repeat(3),
        groups=(torch.arange(40) % 2).repeat(3),
        clusters=torch.arange(40).repeat(3),
    )
    for one, three in zip(once.results, tripled.results, strict=True):
        assert three[4:7] == pytest.approx(one[4:7])
    rows = evaluate(Predictive.from_probs(probs.repeat(3, 1)), labels.repeat(3)).result("nll")
    assert rows.upper - rows.lower < 0.7 * (once.result("nll").upper - once.result("nll").lower)


def coverage(shrink: float) -> float:
    """Share of 300 data sets whose interval of the Brier score holds the true one; `shrink` makes intervals wrong."""
    truth = 1 - _expected_squares()
    hits = 0
    for seed in range(300):
        probs, labels = random_probs(100, seed + 1)
        result = evaluate(Predictive.from_probs(probs), labels, metrics=["brier"], seed=seed).result("brier")
        lower = result.value - shrink * (result.value - result.lower)
        hits += lower <= truth <= result.value + shrink * (result.upper - result.value)
    return hits / 300


def _expected_squares() -> float:
    """E sum p^2, from many draws: for labels drawn from p, the Brier score is 1 - sum p^2 in the mean."""
    generator = torch.Generator().manual_seed(0)
    return float(torch.randn(1_000_000, 3, generator=generator).softmax(-1).square().sum(-1).double().mean())


# The nominal level within 5 standard errors of a share of 300, and 0.015 for the order 1/n that the bootstrap neglects.
TOLERANCE = 5 * math.sqrt(0.95 * 0.05 / 300) + 0.015


def test_intervals_cover() -> None:
    assert abs(coverage(1.0) - 0.95) < TOLERANCE


def test_intervals_of_half_the_width_would_be_noticed() -> None:
    assert abs(coverage(0.5) - 0.95) > TOLERANCE


def test_interval_holds_its_value_and_stays_in_bounds() -> None:
    above = torch.linspace(0.03, 0.05, 1000, dtype=torch.float64)
    assert basic_interval(0.01, above, 0.95, (0.0, 1.0))[1] < 0.01
    assert Drawn(0.01, above).interval(0.95, (0.0, 1.0)) == (0.0, 0.01)
    assert all(math.isnan(limit) for limit in Drawn(math.nan, above).interval(0.95))


def test_the_nll_of_classes_is_never_below_zero_and_that_of_densities_may_be() -> None:
    sure = torch.full((50, 2), 1e-3).index_fill(1, torch.tensor(0), 1 - 1e-3)
    sure[0] = torch.tensor([0.1, 0.9])
    groups = {"half": torch.arange(50) < 25, "all": torch.ones(50, dtype=torch.bool)}
    found = evaluate(Predictive.from_probs(sure), torch.zeros(50, dtype=torch.long), metrics=["nll"], groups=groups)
    assert found.result("nll").lower == 0
    assert found.worst_group("nll").lower == 0
    narrow = Predictive.from_normal(torch.zeros(50), 0.01)
    assert evaluate(narrow, torch.zeros(50), metrics=["nll"]).result("nll").lower < -3


def test_seed_decides_and_random_state_is_untouched() -> None:
    probs, labels = random_probs(40, 1)
    before = torch.get_rng_state()
    first, again, other = (evaluate(Predictive.from_probs(probs), labels, seed=seed) for seed in (1, 1, 2))
    assert first.results == again.results
    assert first.results != other.results
    assert [r.value for r in first.results] == [r.value for r in other.results]
    assert torch.equal(before, torch.get_rng_state())


def test_confidence_level_widens() -> None:
    pred, labels = Predictive.from_probs(random_probs(80, 2)[0]), random_probs(80, 2)[1]
    narrow, wide = (evaluate(pred, labels, confidence_level=level).result("nll") for level in (0.5, 0.99))
    assert wide.lower < narrow.lower < narrow.upper < wide.upper


def test_predictor_and_its_predictions_agree_whatever_the_batches() -> None:
    x, y = data()
    predictor = linear()
    whole = evaluate(predictor, (x, y))
    assert evaluate(predictor, DataLoader(TensorDataset(x, y), batch_size=7)).results == whole.results
    assert evaluate(predictor, iter([(x[:13], y[:13]), (x[13:], y[13:])])).results == whole.results
    assert evaluate(predictor.predict((x, y)), y).results == whole.results


def test_shifts_and_their_mean() -> None:
    x, y = data()
    predictor = linear()
    shifts = [Add("up", 1, 0.5), Add("up", 2, 1.0), Add("down", 2, -2.0)]
    evaluation = evaluate(predictor, (x, y), metrics=["accuracy", "nll"], shifts=shifts)
    assert evaluation.severities == [0, 1, 2]
    for name, severity, amount in (("up", 1, 0.5), ("up", 2, 1.0), ("down", 2, -2.0)):
        direct = evaluate(predictor, (x + amount, y), metrics=["nll"]).result("nll")
        found = evaluation.result("nll", severity, name)
        assert (found.value, found.lower, found.upper) == (direct.value, direct.lower, direct.upper)
    mean = (evaluation.value("nll", 2, "up") + evaluation.value("nll", 2, "down")) / 2
    assert evaluation.value("nll", 2) == pytest.approx(mean)


def test_mean_over_shifts_resamples_the_same_examples() -> None:
    # Two shifts that do the same have as wide an interval as one; independent resamples would make it 0.7 times that.
    x, y = data()
    twins = evaluate(linear(), (x, y), metrics=["nll"], shifts=[Add("a", 1, 0.5), Add("b", 1, 0.5)])
    one, mean = twins.result("nll", 1, "a"), twins.result("nll", 1)
    assert (mean.lower, mean.upper) == pytest.approx((one.lower, one.upper))
    # Nor do pooled shifts make the reliability surer.
    single = evaluate(linear(), (x, y), metrics=["nll"], shifts=[Add("a", 1, 0.5)])
    pair, alone = twins.reliability[1], single.reliability[1]
    torch.testing.assert_close(pair.accuracy_lower, alone.accuracy_lower, equal_nan=True)
    assert torch.equal(pair.count, 2 * alone.count)


def test_suite_by_name_on_images() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    first, again = (
        evaluate(bg.Deterministic(network), (images, labels), metrics=["nll"], shifts="rotation") for _ in range(2)
    )
    assert first.results == again.results
    assert max(first.severities) == 12


def test_shifts_need_data_that_can_be_read_again_in_the_same_order() -> None:
    x, y = data()
    untouched: Iterator[Any] = iter([(x, y)])
    with pytest.raises(BadInput, match="iterator"):
        evaluate(linear(), untouched, shifts=[Add("a", 1, 0.5)])
    assert len(list(untouched)) == 1
    # A loader without a generator of its own gives the same order again, because the default one is put back.
    shuffled: DataLoader[Any] = DataLoader(
        TensorDataset(x, y), batch_size=16, shuffle=True, generator=torch.Generator()
    )
    with pytest.raises(BadInput, match="shuffle"):
        evaluate(linear(), shuffled, shifts=[Add("a", 1, 0.5)])
    with pytest.raises(BadType, match="predictor"):
        evaluate(Predictive.from_probs(PROBS), LABELS, shifts=[Add("a", 1, 0.5)])


@pytest.mark.parametrize(
    "shifts",
    [[Add("a", 1, 0), Add("a", 1, 0)], [Add("clean", 1, 0)], [Add("mean", 1, 0)], [Add("a", 0, 0)], "no such suite"],
)
def test_shifts_that_could_not_be_told_apart(shifts: Any) -> None:
    with pytest.raises(BadInput):
        evaluate(linear(), data(), shifts=shifts)


def test_shifts_that_are_none() -> None:
    with pytest.raises(BadType, match="name and a severity"):
        evaluate(linear(), data(), shifts=[nn.ReLU()])  # type: ignore[list-item]


@pytest.mark.parametrize("groups", [[7, 7, 8, 8], torch.tensor([7, 7, 8, 8]), np.array(["7", "7", "8", "8"])])
def test_groups(groups: Any) -> None:
    evaluation = evaluate(Predictive.from_probs(PROBS), LABELS, groups=groups)
    assert evaluation.result("accuracy", group="7").value == 1
    assert evaluation.result("accuracy", group="8").value == 0.5
    assert evaluation.result("accuracy", group="8").num_examples == 2
    assert evaluation.worst_group("accuracy").group == "8"
    assert evaluation.worst_group("nll").group == "8"
    assert "worst group by accuracy: 8" in evaluation.table()


def test_group_is_resampled_among_its_own() -> None:
    # Two equal examples have no spread: resampling all rows would leave them out of some of the resamples.
    rows = [0, 1, 2, 3, 3]
    result = evaluate(Predictive.from_probs(PROBS[rows]), LABELS[rows], groups=[0, 0, 0, 1, 1]).result("nll", group="1")
    assert result.value == result.lower == result.upper == pytest.approx(-math.log(0.4))


def test_groups_that_cannot_be_paired() -> None:
    with pytest.raises(BadInput, match="groups has 3"):
        evaluate(Predictive.from_probs(PROBS), LABELS, groups=[0, 0, 1])
    x, y = data()
    with pytest.raises(BadInput, match="shuffle"):
        evaluate(linear(), DataLoader(TensorDataset(x, y), shuffle=True), groups=y)
    evaluation = evaluate(Predictive.from_probs(PROBS), LABELS)
    with pytest.raises(BadInput, match="no groups"):
        evaluation.worst_group("nll")


def test_yes_or_no_is_about_the_probability_of_yes() -> None:
    evaluation = evaluate(Predictive.from_probs([0.1, 0.2, 0.9]), torch.tensor([0, 1, 1]))
    assert evaluation.value("accuracy") == pytest.approx(2 / 3)
    bins = evaluation.reliability[0]
    filled = bins.count > 0
    assert bins.confidence[filled].tolist() == pytest.approx([0.1, 0.2, 0.9])
    assert bins.accuracy[filled].tolist() == [0, 1, 1]
    right, wrong = evaluation.doubt[0]
    assert (len(right), len(wrong)) == (2, 1)


def test_numbers() -> None:
    evaluation = evaluate(Predictive.from_normal([0.0, 0.0], [1.0, 1.0]), torch.tensor([3.0, 4.0]))
    assert evaluation.value("rmse") == pytest.approx(math.sqrt(12.5))
    assert evaluation.value("coverage_90") == 0
    assert not evaluation.reliability
    assert evaluation.risk is None
    with pytest.raises(BadInput, match="no worst group"):
        evaluate(Predictive.from_normal([0.0], [1.0]), [3.0], groups=[1]).worst_group("coverage_90")


def test_risk_coverage_of_the_surest() -> None:
    risk = evaluate(Predictive.from_probs(PROBS), LABELS).risk
    assert risk is not None
    assert risk.coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.risk.tolist() == [0, 0, 0, 0.25]


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (LABELS[:, None], "shape"),
        (LABELS[:3], "shape"),
        (torch.tensor([0, 0, 1, 2]), "row 3"),
    ],
)
def test_targets_that_do_not_fit(targets: Tensor, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        evaluate(Predictive.from_probs(PROBS), targets)


def test_real_targets_are_never_broadcast_or_nan() -> None:
    pred = Predictive.from_normal([0.0, 0.0], [1.0, 1.0])
    with pytest.raises(BadInput, match="shape"):
        evaluate(pred, torch.zeros(2, 1))
    with pytest.raises(BadInput, match="row 1"):
        evaluate(pred, torch.tensor([0.0, torch.nan]))


def test_other_bad_input() -> None:
    pred = Predictive.from_probs(PROBS)
    with pytest.raises(BadInput, match="eec"):
        evaluate(pred, LABELS, metrics=["eec"])
    with pytest.raises(BadInput, match="rmse"):
        evaluate(pred, LABELS, metrics=["rmse"])
    with pytest.raises(BadInput, match="confidence_level"):
        evaluate(pred, LABELS, confidence_level=95)
    with pytest.raises(BadType, match="Deterministic"):
        evaluate(nn.Linear(1, 2), data())  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no examples"):
        evaluate(pred[:0], LABELS[:0])
    with pytest.raises(BadInput, match="severity=3"):
        evaluate(pred, LABELS).value("nll", 3)


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    pred = Predictive.from_probs([[1.0, 0.0], [0.5, 0.5]])
    evaluation = evaluate(pred, [1, 0], metrics=["nll", "accuracy"])
    assert evaluation.value("nll") == math.inf
    path = tmp_path / "out.json"
    assert evaluation.to_json(path) == path.read_text()

    def refuse(token: str) -> None:
        raise AssertionError(token)

    tree = json.loads(path.read_text(), parse_constant=refuse)
    assert tree["results"][0]["value"] is None
    assert Result(**tree["results"][1]) == evaluation.result("accuracy")
    assert tree["meta"] == evaluation.meta
    assert {"seed", "confidence_level", "bayesguard", "torch", "num_examples"} <= set(tree["meta"])


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        evaluate(Predictive.from_probs(PROBS), LABELS).to_json(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]


def test_frame() -> None:
    pytest.importorskip("pandas")
    evaluation = evaluate(Predictive.from_probs(PROBS), LABELS)
    frame = evaluation.to_frame()
    assert list(frame.columns) == list(Result._fields)
    assert frame.set_index("metric")["value"]["accuracy"] == 0.75


def test_frame_without_pandas_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install .bayesguard\[tables\]"):
        evaluate(Predictive.from_probs(PROBS), LABELS).to_frame()


def test_table_is_aligned() -> None:
    x, y = data()
    evaluation = evaluate(linear(), (x, y), metrics=["accuracy", "nll"], shifts=[Add("a", 1, 0.5)], groups=y)
    head, rule, *lines = evaluation.table().splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == ["clean", "group 0", "group 1", "severity 1"]
    assert head.index("NLL (nats)") == lines[0].index(show(evaluation.result("nll")))
    assert len(rule) == max(map(len, [head, *lines[:4]]))
    both = combined_table({"first": evaluation, "second": evaluation})
    assert both.count("severity 1") == 2
    assert both.count("first") == 1


def test_numbers_are_shown_with_enough_digits() -> None:
    def text(value: float, lower: float, upper: float) -> str:
        return show(Result("clean", 0, None, "rmse", value, lower, upper, 1))

    assert text(0.01234, 0.0, 0.03) == "0.012 [0.000, 0.030]"
    assert text(0.0001234, 0.0001, 0.0002) == "1.23e-04 [1.00e-04, 2.00e-04]"
    assert text(12345.6, 12000.0, 13000.0) == "12346 [12000, 13000]"
    assert text(math.nan, math.nan, math.nan) == "undefined"


def test_undefined_is_no_number() -> None:
    right = Predictive.from_probs([[0.9, 0.1], [0.8, 0.2]])
    result = evaluate(right, [0, 0], metrics=["error_auroc"]).result("error_auroc")
    assert math.isnan(result.value)
    assert math.isnan(result.lower)


def test_every_metric_runs_and_lies_in_its_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    probs, labels = random_probs(30, 5)
    real = torch.randn(30, generator=generator)
    samples = torch.randn(9, 30, generator=generator)
    cases: list[tuple[Predictive, Tensor]] = [
        (Predictive.from_probs(probs), labels),
        (Predictive.from_probs(probs[:, 0]), (labels == 0).long()),
        (Predictive.from_normal(real + 0.1, torch.ones(30)), real),
        (Predictive.from_samples(samples), real),
    ]
    seen: set[str] = set()
    for pred, targets in cases:
        evaluation: Evaluation = evaluate(pred, targets)
        for result in evaluation.results:
            low, high = EVALUATION_METRICS[result.metric].bounds
            assert low <= result.lower <= result.value <= result.upper <= high
        seen.update(evaluation.metrics)
    assert seen == {spec.name for spec in EVALUATION_METRICS.values() if spec.default}
