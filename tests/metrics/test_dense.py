"""Evaluations of several labels an example, and of dense predictions: every element counts, examples stay together."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.metrics.registry import EVALUATION_METRICS, kind_of
from bayesguard.predictive import BernoulliPredictive, Predictive

N = 30
Made = Callable[[int], tuple[Predictive, Tensor]]


def multi_label(repeat: int) -> tuple[Predictive, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(N, 5, generator=generator, dtype=torch.float64)
    y = torch.bernoulli((logits / 2).sigmoid(), generator=generator).long()
    return BernoulliPredictive.from_logits(logits.repeat(1, repeat)), y.repeat(1, repeat)


def dense(repeat: int) -> tuple[Predictive, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(N, 2, 3, 4, generator=generator, dtype=torch.float64)
    y = torch.multinomial((logits / 2).softmax(-1).reshape(-1, 4), 1, generator=generator).reshape(N, 2, 3)
    return Predictive.from_logits(logits.repeat(1, repeat, 1, 1)), y.repeat(1, repeat, 1)


def flat(pred: Predictive, y: Tensor) -> tuple[Predictive, Tensor]:
    probs = pred.probs
    if isinstance(pred, BernoulliPredictive):
        return BernoulliPredictive.from_probs(probs.flatten()), y.flatten()
    return Predictive.from_probs(probs.flatten(0, -2)), y.flatten()


@pytest.mark.parametrize("made", [multi_label, dense])
def test_every_number_is_that_of_all_elements(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesguard.evaluation.NUM_RESAMPLES", 40)
    pred, y = made(1)
    names = [name for name, spec in EVALUATION_METRICS.items() if kind_of(pred) in spec.kinds]
    assert len(names) >= 14
    evaluation = bg.evaluate(pred, y, metrics=names)
    again = bg.evaluate(*flat(pred, y), metrics=names)
    for name in names:
        assert evaluation.value(name) == pytest.approx(again.value(name), rel=1e-9, abs=1e-12), name
        assert evaluation.result(name).lower <= evaluation.value(name) <= evaluation.result(name).upper
        assert evaluation.result(name).num_examples == N


@pytest.mark.parametrize("made", [multi_label, dense])
def test_copies_of_elements_tell_nothing_new(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    # Elements of an example are resampled together: four copies of each leave the interval as it is.
    monkeypatch.setattr("bayesguard.evaluation.NUM_RESAMPLES", 40)
    once, four = made(1), made(4)
    # Not those with counts in their formula, which copies move as repeated rows do.
    counting = {"aurc", "e_aurc", "debiased_ece"}
    kind = kind_of(once[0])
    names = [name for name, spec in EVALUATION_METRICS.items() if kind in spec.kinds and name not in counting]
    ours, wanted = bg.evaluate(*four, metrics=names), bg.evaluate(*once, metrics=names)
    for name in names:
        for end in ("value", "lower", "upper"):
            assert getattr(ours.result(name), end) == pytest.approx(
                getattr(wanted.result(name), end), rel=1e-9, abs=1e-12
            ), name
    apart = bg.evaluate(*flat(*four), metrics=["accuracy"]).result("accuracy")  # the twin that resamples elements
    assert apart.upper - apart.lower < 0.7 * (wanted.result("accuracy").upper - wanted.result("accuracy").lower)
