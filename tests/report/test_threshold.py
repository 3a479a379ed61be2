"""Counts at every setting of the slider, against a plain loop; JSON that cannot end its script."""

import json
from itertools import pairwise

import torch

import bayesguard as bg
from bayesguard.predictive import Predictive
from bayesguard.report.threshold import THRESHOLDS, counts_at, script_json
from bayesguard.results import Answers


def answers(confidence: torch.Tensor, right: torch.Tensor) -> Answers:
    return Answers(confidence, right, confidence, right, confidence)


def test_thresholds_rise_and_are_few() -> None:
    assert all(a < b for a, b in pairwise(THRESHOLDS))
    assert len(THRESHOLDS) < 500
    assert THRESHOLDS[0] == 0
    assert THRESHOLDS[-1] == 1
    assert {0.5, 0.9, 0.95, 0.99, 0.995, 0.999} <= set(THRESHOLDS)


def test_counts_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = 1 - torch.rand(700, generator=generator, dtype=torch.float64) ** 6
    right = torch.bernoulli(confidence, generator=generator)
    kept, wrong = counts_at(answers(confidence, right))
    for place, threshold in enumerate(THRESHOLDS):
        rows = [hit for c, hit in zip(confidence.tolist(), right.tolist(), strict=True) if c >= threshold]
        assert (kept[place].item(), wrong[place].item()) == (len(rows), rows.count(0))


def test_a_confidence_on_the_threshold_is_answered_in_both_dtypes() -> None:
    for dtype in (torch.float32, torch.float64):
        confidence = torch.tensor([0.95, 0.99, 0.999, 1.0, 0.3], dtype=dtype)
        kept, _ = counts_at(answers(confidence, torch.ones(5, dtype=torch.float64)))
        assert [kept[THRESHOLDS.index(value)].item() for value in (0.3, 0.95, 0.99, 0.999, 1.0)] == [5, 4, 3, 2, 1]


def test_yes_or_no_counts_by_confidence_not_by_the_probability_of_yes() -> None:
    evaluation = bg.evaluate(Predictive.from_probs([0.1, 0.9, 0.4]), torch.tensor([0, 0, 1]))
    assert evaluation.answers is not None
    kept, wrong = counts_at(evaluation.answers)
    place = THRESHOLDS.index(0.8)
    assert (kept[place].item(), wrong[place].item()) == (2, 1)


def test_json_cannot_end_its_script() -> None:
    tree = {"</script><!--": ["&", "<b>", 1.5]}
    assert not set("<>&") & set(script_json(tree))
    assert json.loads(script_json(tree)) == tree
