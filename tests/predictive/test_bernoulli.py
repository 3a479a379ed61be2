"""Predictives of yes or no."""

import math

import numpy as np
import pytest
import torch

from bayesguard.errors import BadInput
from bayesguard.predictive import BernoulliPredictive, Predictive


def odds() -> torch.Tensor:
    return 3 * torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0))


def test_attributes() -> None:
    pred = BernoulliPredictive(odds())
    expected = odds().sigmoid().mean(0)
    torch.testing.assert_close(pred.probs, expected)
    torch.testing.assert_close(pred.logits, expected.logit())
    torch.testing.assert_close(pred.variance, expected * (1 - expected))
    torch.testing.assert_close(pred.confidence, torch.maximum(expected, 1 - expected))
    assert torch.equal(pred.labels, (expected > 0.5).long())
    assert torch.equal(pred.draw_logits, odds())
    assert pred.enumerate_support().shape == (2, 5, 2)
    assert pred.batch_shape == (5, 2)


def test_reduced_answers_the_same() -> None:
    pred = BernoulliPredictive(odds())
    reduced = pred.reduce()
    assert torch.equal(pred.probs, reduced.probs)
    assert torch.equal(pred.logits, reduced.logits)
    assert torch.equal(pred.standard_error, reduced.standard_error)
    assert torch.equal(torch.stack(pred.uncertainty()), torch.stack(reduced.uncertainty()))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.float32, np.float64, np.bool_])
def test_answers_of_every_dtype(dtype: type[np.generic]) -> None:
    found = Predictive.from_probs([0.25, 0.25]).log_prob(np.array([1, 0]).astype(dtype))
    torch.testing.assert_close(found, torch.tensor([math.log(0.25), math.log(0.75)]))


def test_answers_that_are_none() -> None:
    for answers in ([0.5, 1.0], [2, 0], [-1, 0], [float("nan"), 0.0]):
        with pytest.raises(BadInput, match="row 0"):
            Predictive.from_probs([0.25, 0.25]).log_prob(answers)


def test_certain_probabilities() -> None:
    pred = Predictive.from_probs([0.0, 1.0])
    assert pred.mean.tolist() == [0.0, 1.0]
    assert pred.entropy().tolist() == [0.0, 0.0]
    assert pred.log_prob([0, 1]).tolist() == [0.0, 0.0]
    assert pred.log_prob([1, 0]).tolist() == [-torch.inf, -torch.inf]


def test_very_sure_answers_keep_their_digits() -> None:
    pred = BernoulliPredictive(torch.tensor([[-60.0]], dtype=torch.float64))
    assert float(pred.probs) == pytest.approx(math.exp(-60), rel=1e-12)
    assert float(pred.log_prob([1])) == pytest.approx(-60, rel=1e-12)
    assert float(pred.logits) == pytest.approx(-60, rel=1e-12)


def test_set_of_no_and_yes() -> None:
    pred = BernoulliPredictive.from_probs([[0.95, 0.5], [0.05, 0.2]])
    expected = [[[False, True], [True, True]], [[True, False], [True, True]]]
    assert pred.prediction_set(0.1).tolist() == expected
