"""Predictives of counts; their values are compared with brute force in tests/exactness."""

import math

import pytest
import torch
from torch.distributions import Categorical, Geometric, MixtureSameFamily, Normal, Poisson

from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import CountPredictive


def counts() -> CountPredictive:
    return CountPredictive(Poisson(torch.tensor([[0.5, 3.0, 100.0], [2.0, 4.0, 200.0]], dtype=torch.float64)))


def test_decomposition_is_the_law_of_total_variance() -> None:
    total, aleatoric, epistemic = counts().uncertainty()
    assert aleatoric.tolist() == [1.25, 3.5, 150.0]  # the mean rates
    assert epistemic.tolist() == [0.5625, 0.25, 2500.0]  # the variance of the rates
    assert total.tolist() == [1.8125, 3.75, 2650.0]


def test_quantiles() -> None:
    pred = counts()
    assert pred.icdf(0.0).tolist() == [0.0, 0.0, 0.0]
    assert pred.icdf(1.0).tolist() == [torch.inf] * 3
    assert CountPredictive(Poisson(torch.tensor([[2000.0]]))).icdf(0.0).tolist() == [0.0]  # its cdf there is 0, too
    lower, upper = pred.interval(0.1)
    for end, level in ((lower, 0.05), (upper, 0.95)):
        assert (pred.cdf(end) >= level).all()
        assert ((pred.cdf(end - 1) < level) | (end == 0)).all()


def test_cdf_between_and_below_counts() -> None:
    pred = counts()
    assert torch.equal(pred.cdf(2.7), pred.cdf(2))
    assert pred.cdf(-0.1).tolist() == [0.0] * 3


def test_far_targets() -> None:
    """A distribution at a few counts, and a target far off: their distance."""
    pred = CountPredictive(Poisson(torch.tensor([[1e-9, 1e6]], dtype=torch.float64)))
    assert pred.crps([1000.0, 0.0]).tolist() == pytest.approx([1000.0, 1e6 - 1000 / math.sqrt(math.pi)], rel=1e-6)


def test_rate_zero() -> None:
    pred = CountPredictive(Poisson(torch.zeros(1, 1)))
    assert pred.icdf(0.9).tolist() == [0.0]
    assert pred.crps([0]).tolist() == [0.0]
    assert pred.entropy().tolist() == [0.0]
    assert pred.log_prob([0]).tolist() == [0.0]


def test_mixture_of_poissons_in_each_draw() -> None:
    rates = torch.tensor([[[1.0, 30.0]], [[2.0, 60.0]]], dtype=torch.float64)
    pred = CountPredictive(MixtureSameFamily(Categorical(logits=torch.zeros(2, 1, 2)), Poisson(rates)))
    flat = CountPredictive(Poisson(rates.reshape(4, 1)))
    for method, value in (("log_prob", [3.0]), ("cdf", 3.0), ("icdf", 0.4), ("crps", [3.0])):
        torch.testing.assert_close(getattr(pred, method)(value), getattr(flat, method)(value))
    torch.testing.assert_close(pred.entropy(), flat.entropy())


@pytest.mark.parametrize("bad", [-1.0, 0.5, math.nan])
def test_targets_that_are_no_counts(bad: float) -> None:
    with pytest.raises(BadInput, match="row 1"):
        counts().log_prob([1.0, bad, 2.0])


def test_components_that_will_not_do() -> None:
    with pytest.raises(BadType, match="Normal"):
        CountPredictive(Normal(torch.zeros(2, 3), 1.0))
    with pytest.raises(BadType, match="no cdf"):
        CountPredictive(Geometric(probs=torch.full((2, 3), 0.5))).cdf(1)
    with pytest.raises(BadInput, match="row 0"):
        CountPredictive(Poisson(-torch.ones(2, 3), validate_args=False))


def test_draws_that_are_far_apart_are_refused_and_not_walked_between() -> None:
    pred = CountPredictive(Poisson(torch.tensor([[1.0], [1e9]])))
    for ask in (pred.entropy, lambda: pred.crps(torch.tensor([3.0]))):
        with pytest.raises(BadInput, match="an answer spreads over 10002"):
            ask()
    assert pred.icdf(0.25).tolist() == [1.0]


def test_rows_that_are_far_apart_are_each_walked_from_their_own_first_count() -> None:
    rates = torch.tensor([[1.0, 1e8]])
    entropy = CountPredictive(Poisson(rates)).entropy()
    # Of many counts, it is that of a Gaussian of the same variance.
    assert entropy.tolist() == pytest.approx([1.3048, math.log(2 * math.pi * math.e * 1e8) / 2], abs=1e-3)
