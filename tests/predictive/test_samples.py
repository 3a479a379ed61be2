"""Predictives known by samples of the target."""

import math

import pytest
import torch

from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import Predictive, SamplePredictive


def test_empirical_distribution_by_hand() -> None:
    pred = Predictive.from_samples(torch.tensor([[3.0], [1.0], [2.0], [6.0]], dtype=torch.float64))
    assert pred.mean.tolist() == [3.0]
    assert pred.variance.tolist() == [3.5]
    assert float(pred.standard_error) == pytest.approx(math.sqrt(14 / 3 / 4))
    assert [float(pred.cdf(y)) for y in (0.0, 1.0, 2.5, 6.0)] == [0.0, 0.25, 0.5, 1.0]
    assert [float(pred.icdf(q)) for q in (0.0, 0.25, 0.26, 0.5, 0.75, 1.0)] == [1.0, 1.0, 2.0, 2.0, 3.0, 6.0]
    assert [float(end) for end in pred.interval(0.5)] == [1.0, 3.0]


@pytest.mark.parametrize("count", [3, 7, 10, 49])
def test_quantile_at_every_step(count: int) -> None:
    """A level of k/S belongs to sample k although the sum of k weights is off by a rounding."""
    pred = SamplePredictive(torch.arange(1.0, count + 1).unsqueeze(1))
    assert [float(pred.icdf(k / count)) for k in range(1, count + 1)] == list(range(1, count + 1))


def test_weights() -> None:
    weighted = SamplePredictive([[1.0], [5.0], [2.0]], [1, 2, 1])
    repeated = SamplePredictive([[1.0], [5.0], [5.0], [2.0]])
    for q in (0.1, 0.25, 0.4, 0.6, 1.0):
        assert torch.equal(weighted.icdf(q), repeated.icdf(q))
    assert torch.equal(weighted.cdf(2.0), repeated.cdf(2.0))
    torch.testing.assert_close(weighted.mean, repeated.mean)
    torch.testing.assert_close(weighted.variance, repeated.variance)


def test_samples_without_weight_are_no_end() -> None:
    pred = SamplePredictive([[1.0], [2.0], [5.0], [9.0]], [0, 1, 1, 0])
    assert [float(pred.icdf(q)) for q in (0.0, 1e-13, 0.5, 1.0)] == [2.0, 2.0, 2.0, 5.0]


def test_crps_of_large_numbers_keeps_its_digits() -> None:
    samples = torch.tensor([[1e9 + 1], [1e9 + 2], [1e9 + 6]], dtype=torch.float64)
    assert float(SamplePredictive(samples).crps([1e9 + 3])) == pytest.approx(1 / 3, rel=1e-12)


def test_what_samples_do_not_know() -> None:
    pred = SamplePredictive(torch.zeros(3, 2))
    with pytest.raises(BadType, match="density"):
        pred.log_prob(torch.zeros(2))
    with pytest.raises(BadType, match="density"):
        pred.entropy()
    with pytest.raises(BadInput, match="at least 2"):
        SamplePredictive(torch.zeros(1, 2)).crps(torch.zeros(2))
    assert set(pred.numpy()) == {"mean", "stddev"}


def test_many_samples_are_fast_to_score() -> None:
    """20,000 samples of 20 examples: all pairs would be 8 billion."""
    samples = torch.randn(20_000, 20, generator=torch.Generator().manual_seed(0))
    scores = SamplePredictive(samples).crps(torch.zeros(20))
    exact = (math.sqrt(2) - 1) / math.sqrt(math.pi)
    assert float((scores - exact).abs().max()) < 5 / math.sqrt(20_000)
