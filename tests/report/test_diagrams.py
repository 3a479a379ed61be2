"""Diagrams hold the evaluation's numbers: marks lie where the values are, and texts tell them."""

import re

import pytest
import torch

import bayesguard as bg
from bayesguard.predictive import Predictive
from bayesguard.report import diagrams, parts
from bayesguard.report.svg import Frame, ticks
from bayesguard.results import Evaluation, show


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(600, 3, generator=generator, dtype=torch.float64)
    labels = logits.softmax(-1).multinomial(1, generator=generator).squeeze(-1)
    return bg.evaluate(Predictive.from_logits(logits), labels, groups=["a"] * 200 + ["b"] * 400)


def tips(markup: str) -> list[str]:
    return re.findall(r'<g class="pt"><title>(.*?)</title>', markup, re.DOTALL)


def test_reliability_marks_lie_where_the_bins_say(evaluation: Evaluation) -> None:
    bins = evaluation.reliability[0]
    markup = diagrams.reliability({"clean": bins}, "confidence", "accuracy")
    marks = re.findall(r'<circle class="mark s0" cx="(.*?)" cy="(.*?)"', markup)[: bins.num_filled]
    frame = Frame(44, 350, 24, 264, (0, 1), (0, 1))
    filled = bins.count > 0
    for (x, y), confidence, accuracy in zip(
        marks, bins.confidence[filled].tolist(), bins.accuracy[filled].tolist(), strict=True
    ):
        assert (float(x), float(y)) == pytest.approx((frame.x(confidence), frame.y(accuracy)), abs=0.051)
    for tip, count, lower in zip(
        tips(markup), bins.count[filled].tolist(), bins.accuracy_lower[filled].tolist(), strict=True
    ):
        assert f"[{lower:.3f}, " in tip
        assert f"{count:,.0f} answers" in tip


def test_histograms_count_every_answer(evaluation: Evaluation) -> None:
    assert evaluation.answers is not None
    right = evaluation.answers.right == 1
    sides = {"right": evaluation.answers.confidence[right], "wrong": evaluation.answers.confidence[~right]}
    markup = diagrams.histograms(sides, "confidence", "title", (0.0, 1.0))
    for name, values in sides.items():
        counts = [int(re.findall(r"([\d,]+) answers", tip)[0]) for tip in tips(markup) if tip.startswith(name)]
        assert sum(counts) == len(values)
        assert f"{name} ({len(values)})" in markup


def test_severity_lines_tell_values_with_intervals(evaluation: Evaluation) -> None:
    markup = diagrams.against_severity({"one": bg.evaluate(*_shifted(), shifts=[_Double()])}, "nll")
    assert len(tips(markup)) == 2
    found = bg.evaluate(*_shifted(), shifts=[_Double()])
    assert [show(found.result("nll", severity)) for severity in (0, 1)] == [tip.split(": ")[1] for tip in tips(markup)]


def test_classes_and_groups_have_their_own_numbers(evaluation: Evaluation) -> None:
    assert evaluation.by_class is not None
    assert evaluation.answers is not None
    shares = evaluation.by_class.hits.sum(-1) / 600
    table = parts.classes({"one": evaluation})
    for k in range(3):
        assert re.search(rf"class {k}</th><td>{shares[k].item():.1%}</td>", table)
    rows = parts.groups({"one": evaluation})
    for name, part in (("a", slice(0, 200)), ("b", slice(200, 600))):
        accuracy = evaluation.answers.right[part].mean().item()
        assert f"group {name}</th><td>{part.stop - part.start}</td><td>{accuracy:.1%}</td>" in rows
        assert evaluation.by_group[name].score.sum() == pytest.approx(evaluation.answers.promised[part].sum())


def test_class_sums_give_the_classwise_error(evaluation: Evaluation) -> None:
    assert evaluation.by_class is not None
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(600, 3, generator=generator, dtype=torch.float64)
    labels = logits.softmax(-1).multinomial(1, generator=generator).squeeze(-1)
    direct = bg.evaluate(Predictive.from_logits(logits), labels, metrics=["classwise_ece"]).value("classwise_ece")
    assert evaluation.by_class.error().item() == pytest.approx(direct, abs=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.11, 0.11, [-0.1, -0.05, 0, 0.05, 0.1]), (0, 7, [0, 2, 4, 6]), (3, 3, [3])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


class _Double:
    name, severity = "double", 1.0

    def __call__(self, inputs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return 2 * inputs


def _shifted() -> tuple[bg.Deterministic, tuple[torch.Tensor, torch.Tensor]]:
    network = torch.nn.Linear(2, 2)
    network.weight.data, network.bias.data = torch.eye(2), torch.zeros(2)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    return bg.Deterministic(network), (x, x.argmax(-1))
