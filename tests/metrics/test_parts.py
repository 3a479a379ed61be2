"""Evaluating many class predictions in parts: bit for bit what evaluating them at once gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.errors import BadInput
from bayesguard.metrics import parts
from bayesguard.metrics.parts import in_parts, scores_of
from bayesguard.metrics.registry import EVALUATION_METRICS, kind_of
from bayesguard.predictive import Predictive, categorical
from bayesguard.sampling import stream


def random(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=stream("cpu", seed, "parts"))


def cases() -> dict[str, tuple[Predictive, Tensor]]:
    labels = random(103, seed=1).gt(0).long()
    return {
        "classes": (Predictive.from_logits(random(103, 7)), 3 * labels),
        "draws": (Predictive.from_logits(random(5, 103, 7), draws=True), 3 * labels),
        "reduced": (Predictive.from_logits(random(5, 103, 7), draws=True).reduce(), 3 * labels),
        "dense": (Predictive.from_logits(random(103, 2, 7)), torch.stack([labels, 2 * labels], dim=1)),
        "binary": (Predictive.from_logits(random(103)), labels),
        "numbers": (Predictive.from_normal(random(103), 1.0), random(103, seed=2)),
    }


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of four rows of seven classes, the last one shorter."""
    monkeypatch.setattr(parts, "CACHED", 28)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", cases())
def test_scores_are_those_of_the_whole(name: str) -> None:
    predictive, targets = cases()[name]
    specs = [spec for spec in EVALUATION_METRICS.values() if kind_of(predictive) in spec.kinds]
    specs = [spec for spec in specs if name != "dense" or spec.name != "classwise_ece"]
    for spec, scores in zip(specs, scores_of(specs, predictive, targets), strict=True):
        whole: Any = spec.scores(predictive, targets)
        assert type(scores) is type(whole)
        for key, value in vars(whole).items():
            found = getattr(scores, key)
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value
        assert scores.value() == whole.value() or spec.name == "error_auroc"


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", ["classes", "draws", "dense", "binary"])
def test_evaluations_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predictive, targets = cases()[name]
    found = bg.evaluate(predictive, targets)
    monkeypatch.undo()
    whole = bg.evaluate(predictive, targets)
    assert found.results == whole.results
    assert found.risk is not None
    assert whole.risk is not None
    assert torch.equal(found.risk.risk, whole.risk.risk)
    for pair in zip(found.doubt[0], whole.doubt[0], strict=True):
        assert torch.equal(*pair)
    assert torch.equal(found.reliability[0].count, whole.reliability[0].count)


@pytest.mark.parametrize("name", ["classes", "dense", "binary"])
def test_diagrams_in_slices_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predictive, targets = cases()[name]
    predictive = Predictive.from_probs((predictive.probs * 8).round() / 8) if name == "binary" else predictive
    predictive = predictive[torch.arange(103) // 3]  # runs of ties, which slices cut
    whole = bg.evaluate(predictive, targets, num_resamples=0)
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 1600)
    monkeypatch.setattr("bayesguard.metrics.functional.selective.CACHED", 1 << 20)
    found = bg.evaluate(predictive, targets, num_resamples=0)
    assert found.risk is not None
    assert whole.risk is not None
    assert torch.equal(found.risk.risk, whole.risk.risk)
    assert torch.equal(found.risk.coverage, whole.risk.coverage)
    sums = [(found.by_class, whole.by_class), (found.reliability[0], whole.reliability[0])]
    for own, other in sums:
        for key, value in vars(other).items() if other is not None else ():
            torch.testing.assert_close(getattr(own, key), value, rtol=1e-13, atol=1e-14, equal_nan=True)


@pytest.mark.usefixtures("small_parts")
def test_a_part_that_is_misplaced_would_be_noticed() -> None:
    predictive, targets = cases()["classes"]

    def wrong(part: Predictive, answers: Tensor) -> list[Tensor]:
        return [part.log_prob(answers).flip(0)]

    assert not torch.equal(in_parts(wrong, predictive, targets)[0], predictive.log_prob(targets).flip(0))


@pytest.mark.usefixtures("small_parts")
def test_errors_name_the_row_of_the_whole() -> None:
    predictive, targets = cases()["classes"]
    targets[77] = 9
    with pytest.raises(BadInput, match="label 9 in row 77"):
        scores_of([EVALUATION_METRICS["nll"]], predictive, targets)


def test_probabilities_are_checked_and_kept_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = random(3, 50, 7).softmax(-1)
    probs[1, 4] = torch.eye(7)[2]
    whole = bg.predictive.CategoricalPredictive(probs.log())
    monkeypatch.setattr(categorical, "CACHED", 84)
    assert torch.equal(Predictive.from_probs(probs, draws=True).draw_logits, whole.draw_logits)
    slope = probs.clone().requires_grad_()
    Predictive.from_probs(slope, draws=True).draw_logits[0, 49, 0].backward()
    assert slope.grad is not None
    assert slope.grad[0, 49, 0] != 0
    for value, words in ((0.5, "row 37 does not"), (torch.nan, "infinity in row 37"), (torch.inf, "row 37")):
        bad = probs.clone()
        bad[2, 37, 3] = value
        with pytest.raises(BadInput, match=words):
            Predictive.from_probs(bad, draws=True)
    with pytest.raises(BadInput, match="probs has 1 classes"):
        Predictive.from_probs(torch.ones(4, 1))
