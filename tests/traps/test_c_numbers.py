"""Traps of aggregation and numbers."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal, Poisson, StudentT

from bayesguard.errors import BadInput
from bayesguard.predictive import (
    BernoulliPredictive,
    CategoricalPredictive,
    ContinuousPredictive,
    CountPredictive,
    Predictive,
    SamplePredictive,
    mixture,
)


def test_c1_one_draw() -> None:
    for pred in (
        Predictive.from_normal(torch.zeros(1, 3), torch.ones(1, 3), draws=True),
        Predictive.from_logits(torch.zeros(1, 3, 2), draws=True),
    ):
        assert pred.uncertainty().epistemic.tolist() == [0.0] * 3
        assert pred.variance.isfinite().all()
        assert (pred.standard_error == torch.inf).all()  # one draw says nothing about its error: not 0, and not NaN
    assert Predictive.from_samples(torch.zeros(1, 3)).variance.tolist() == [0.0] * 3


def test_c2_probability_zero() -> None:
    for pred in (Predictive.from_probs([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]), Predictive.from_probs([1.0, 0.5])):
        torch.testing.assert_close(torch.stack(pred.uncertainty())[:2], torch.tensor([0.0, math.log(2)]).expand(2, 2))
        assert pred.uncertainty().epistemic.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_c3_mutual_information_is_not_negative(dtype: torch.dtype) -> None:
    logits = 5 * torch.randn(200, 10, generator=torch.Generator().manual_seed(0), dtype=dtype)
    nearly = logits + 1e-6 * torch.randn(8, 200, 10, generator=torch.Generator().manual_seed(1), dtype=dtype)
    for draws in (logits.expand(8, 200, 10), nearly):
        for pred in (Predictive.from_logits(draws, draws=True), Predictive.from_logits(draws, draws=True).reduce()):
            total, aleatoric, epistemic = pred.uncertainty()
            assert (epistemic >= 0).all()
            assert (aleatoric >= 0).all()
            torch.testing.assert_close(total, aleatoric + epistemic, rtol=4 * torch.finfo(dtype).eps, atol=0.0)
            assert (epistemic < 1e-6).all()


def test_c4_pooling_in_log_space() -> None:
    logits = torch.tensor([[[0.0, -180.0]], [[0.0, -181.0]]])
    expected = math.log((math.exp(-180) + math.exp(-181)) / 2)
    pred = CategoricalPredictive(logits)
    assert float(pred.log_prob([1])) == pytest.approx(expected, rel=1e-6)
    assert logits.softmax(-1).mean(0)[0, 1].log() == -torch.inf  # the trap
    assert float(BernoulliPredictive(logits[..., 1]).log_prob([1])) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_c5_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    logits = torch.randn(3, 50, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        pred = CategoricalPredictive(logits)
        probs, total = pred.probs, pred.uncertainty().total
    assert probs.dtype == total.dtype == torch.float32
    assert float((probs.double().sum(-1) - 1).abs().max()) < 1e-6
    torch.testing.assert_close(probs, logits.double().softmax(-1).mean(0).float())


def test_c6_variance_far_from_zero() -> None:
    loc = torch.tensor([[10000.0], [10001.0], [10002.0]])
    pred = ContinuousPredictive(Normal(loc, 1.0))
    assert float(pred.uncertainty().epistemic) == pytest.approx(2 / 3, rel=1e-6)
    assert float(SamplePredictive(loc).variance) == pytest.approx(2 / 3, rel=1e-6)
    assert float(loc.square().mean() - loc.mean().square()) != pytest.approx(2 / 3, rel=0.01)  # the trap


def test_c7_probabilities_are_averaged_not_logits() -> None:
    logits = torch.tensor([[[5.0, 0.0]], [[-1.0, 0.0]]])
    p = (1 / (1 + math.exp(-5)) + 1 / (1 + math.exp(1))) / 2
    assert float(CategoricalPredictive(logits).probs[0, 0]) == pytest.approx(p, abs=1e-6)  # 0.63
    assert float(logits.mean(0).softmax(-1)[0, 0]) == pytest.approx(0.88, abs=0.01)  # the trap
    members = [Predictive.from_logits(draw) for draw in logits]
    assert float(mixture(members).mean[0, 0]) == pytest.approx(p, abs=1e-6)


def everything(count: int = 4) -> list[tuple[Predictive, Tensor]]:
    """A predictive of each kind, with targets."""
    ones = torch.ones(2, count)
    logits = torch.zeros(2, count, 3)
    density = MixtureSameFamily(Categorical(logits=logits), Normal(logits, torch.ones_like(logits)))
    return [
        (CategoricalPredictive(logits), torch.zeros(count, dtype=torch.long)),
        (CategoricalPredictive(logits).reduce(), torch.zeros(count, dtype=torch.long)),
        (BernoulliPredictive(ones), torch.ones(count)),
        (ContinuousPredictive(Normal(ones, ones)), torch.ones(count)),
        (ContinuousPredictive(StudentT(4 * ones, ones, ones)), torch.ones(count)),
        (ContinuousPredictive(density), torch.ones(count)),
        (CountPredictive(Poisson(ones)), torch.ones(count)),
        (SamplePredictive(ones), torch.ones(count)),
    ]


@pytest.mark.parametrize("place", range(8))
def test_c8_shapes_must_match_exactly(place: int) -> None:
    pred, targets = everything()[place]
    methods = [name for name in ("log_prob", "crps", "cdf") if hasattr(type(pred), name)]
    if isinstance(pred, SamplePredictive):
        methods.remove("log_prob")
    for wrong in (targets[:, None], targets[None], targets[:1], targets[:-1]):
        for name in methods:
            if name == "cdf" and isinstance(pred, (CategoricalPredictive, BernoulliPredictive)):
                continue  # torch's own, which is not implemented
            with pytest.raises(BadInput, match="shape"):
                getattr(pred, name)(wrong)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_c9_rows_that_are_not_finite_are_named(bad: float) -> None:
    values = torch.zeros(2, 5, 3)
    values[1, 3, 2] = bad
    for make in (CategoricalPredictive, BernoulliPredictive, SamplePredictive):
        with pytest.raises(BadInput, match="row 3"):
            make(values)
    with pytest.raises(BadInput, match="row 3"):
        Predictive.from_normal(values, 1.0, draws=True)
    with pytest.raises(BadInput, match="row 3"):
        CountPredictive(Poisson(values, validate_args=False))
    with pytest.raises(BadInput, match="row 3"):
        Predictive.from_probs(values, draws=True)


def test_c9_every_class_masked() -> None:
    logits = torch.zeros(2, 5, 3)
    logits[1, 4] = -torch.inf
    with pytest.raises(BadInput, match="row 4"):
        CategoricalPredictive(logits)


def use(kinds: list[tuple[Predictive, Tensor]]) -> None:
    for pred, targets in kinds:
        repr(pred)
        assert pred.sample((2,), seed=0).device.type == "cpu"
        for index in (1, slice(0, 2), slice(None, None, -1), [0, 1], [True, False, True, False]):
            assert pred[index].mean.device.type == "cpu"
        assert pred.standard_error.device.type == "cpu"
        for name in ("crps", "cdf"):
            if isinstance(pred, (ContinuousPredictive, CountPredictive, SamplePredictive)):
                assert getattr(pred, name)(targets).dtype == torch.float32
        if isinstance(pred, (ContinuousPredictive, CountPredictive)):
            assert pred.interval(0.1)[0].dtype == torch.float32
        if isinstance(pred, (CategoricalPredictive, BernoulliPredictive)):
            assert pred.prediction_set(0.1).device.type == "cpu"
        if not isinstance(pred, SamplePredictive):
            assert pred.entropy().dtype == pred.log_prob(targets).dtype == torch.float32


def test_c10_default_dtype() -> None:
    made = everything()
    torch.set_default_dtype(torch.float64)
    try:
        use(made)
    finally:
        torch.set_default_dtype(torch.float32)


def test_c10_default_device() -> None:
    made = everything()
    with torch.device("meta"):
        use(made)
        assert Predictive.from_probs([[0.7, 0.2, 0.1]]).mean.device.type == "cpu"
