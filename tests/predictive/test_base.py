"""What all predictives share: indexing, moving, sampling, constructors, errors."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Laplace, MixtureSameFamily, Normal, Poisson, StudentT

from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import (
    BernoulliPredictive,
    CategoricalPredictive,
    ContinuousPredictive,
    CountPredictive,
    Predictive,
    SamplePredictive,
)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def density(*shape: int) -> Distribution:
    return MixtureSameFamily(Categorical(logits=randn(*shape, 2)), Normal(randn(*shape, 2), randn(*shape, 2).exp()))


KINDS: dict[str, Predictive] = {
    "classes": CategoricalPredictive(randn(3, 5, 4)),
    "dense classes": CategoricalPredictive(randn(3, 5, 2, 4)),
    "reduced": CategoricalPredictive(randn(3, 5, 4)).reduce(),
    "yes or no": BernoulliPredictive(randn(3, 5)),
    "labels": BernoulliPredictive(randn(3, 5, 2)),
    "labels reduced": BernoulliPredictive(randn(3, 5, 2)).reduce(),
    "normal": ContinuousPredictive(Normal(randn(3, 5), randn(3, 5).exp())),
    "outputs": ContinuousPredictive(Normal(randn(3, 5, 2), randn(3, 5, 2).exp()), [0.5, 0.3, 0.2]),
    "shared scale": ContinuousPredictive(Normal(randn(3, 5), torch.tensor(0.5))),
    "student": ContinuousPredictive(StudentT(torch.tensor(4.0), randn(3, 5), randn(3, 5).exp())),
    "laplace": ContinuousPredictive(Laplace(randn(3, 5), randn(3, 5).exp())),
    "density": ContinuousPredictive(density(3, 5)),
    "counts": CountPredictive(Poisson(randn(3, 5).exp())),
    "samples": SamplePredictive(randn(3, 5, 2)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_is_a_distribution_over_examples(kind: str) -> None:
    pred = KINDS[kind]
    assert isinstance(pred, Distribution)
    assert len(pred) == pred.batch_shape[0] == 5
    assert pred.event_shape == torch.Size()
    assert pred.num_samples == 3
    assert pred.weights.dtype == torch.float64
    assert float(pred.weights.sum()) == pytest.approx(1.0, rel=1e-15)
    assert pred.mean.shape == pred.variance.shape == pred.stddev.shape == pred.standard_error.shape
    assert type(pred).__name__ in repr(pred)
    assert "\n" not in repr(pred)


@every_kind
@pytest.mark.parametrize(
    "index",
    [
        slice(1, 3),
        slice(None, None, 2),
        slice(None, None, -1),
        [4, 0, 0],
        2,
        -1,
        np.array([1, 2]),
        [],
        torch.tensor([True, False, True, False, False]),
    ],
    ids=str,
)
def test_index_selects_examples(kind: str, index: Any) -> None:
    pred, everything = KINDS[kind], list(range(5))
    if isinstance(index, slice):
        rows = everything[index]
    elif isinstance(index, int):
        rows = [everything[index]]
    else:
        rows = np.arange(5)[np.asarray(index, dtype=None if len(index) else int)].tolist()
    part = pred[index]
    assert type(part) is type(pred)
    assert part.batch_shape == (len(rows), *pred.batch_shape[1:])
    torch.testing.assert_close(part.mean, pred.mean[rows], rtol=0, atol=0)
    torch.testing.assert_close(part.standard_error, pred.standard_error[rows], rtol=0, atol=0)


def test_index_errors() -> None:
    pred = KINDS["classes"]
    with pytest.raises(IndexError, match="example 5"):
        pred[5]
    with pytest.raises(BadType, match="examples only"):
        pred[0, 1]
    with pytest.raises(BadInput, match="5 elements"):
        pred[torch.ones(4, dtype=torch.bool)]
    with pytest.raises(BadType):
        pred[torch.zeros(2)]
    assert len(list(pred)) == 5  # iteration ends


@every_kind
def test_to_another_precision_and_numpy(kind: str) -> None:
    pred = KINDS[kind].to(torch.float64)
    assert pred.dtype == pred.mean.dtype == pred.variance.dtype == torch.float64
    torch.testing.assert_close(pred.mean.float(), KINDS[kind].mean)
    arrays = pred.numpy()
    assert all(isinstance(array, np.ndarray) and len(array) == 5 for array in arrays.values())
    with pytest.raises(BadType, match="float32 or float64"):
        pred.to(torch.bfloat16)


@every_kind
def test_samples_repeat_and_leave_the_global_state(kind: str) -> None:
    pred = KINDS[kind]
    state = torch.get_rng_state()
    first, second = pred.sample((4, 2), seed=7), pred.sample((4, 2), seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, second)
    assert first.shape == (4, 2, *pred.batch_shape)
    assert not torch.equal(first, pred.sample((4, 2), seed=8))
    assert pred.sample().shape == pred.batch_shape
    assert pred.sample(3).shape == (3, *pred.batch_shape)
    assert pred.sample((0,)).shape == (0, *pred.batch_shape)


@every_kind
def test_samples_of_both_generators_have_the_mean(kind: str) -> None:
    pred, count = KINDS[kind], 4000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unseeded = pred.sample((count,))
    for drawn in (unseeded, pred.sample((count,), seed=0)):
        if isinstance(pred, CategoricalPredictive):
            drawn = torch.nn.functional.one_hot(drawn, pred.num_classes)
        error = pred.stddev / count**0.5
        assert ((drawn.double().mean(0) - pred.mean).abs() < 5 * error + 1e-6).all()
        assert not ((drawn.double().mean(0) - (pred.mean + 0.5 * pred.stddev)).abs() < 5 * error).any()


@every_kind
def test_no_examples(kind: str) -> None:
    pred = KINDS[kind][:0]
    assert len(pred) == 0
    assert pred.mean.shape[0] == pred.variance.shape[0] == pred.sample((2,), seed=0).shape[1] == 0
    if not isinstance(pred, SamplePredictive):
        assert pred.entropy().shape == pred.uncertainty().total.shape == pred.batch_shape
    if isinstance(pred, (ContinuousPredictive, CountPredictive, SamplePredictive)):
        empty = torch.zeros(pred.batch_shape)
        assert pred.interval(0.1)[0].shape == pred.crps(empty).shape == pred.cdf(empty).shape == pred.batch_shape
    if isinstance(pred, (CategoricalPredictive, BernoulliPredictive)):
        assert pred.labels.shape == pred.batch_shape
        assert pred.prediction_set(0.1).shape == (*pred.batch_shape, pred.num_classes)


@every_kind
def test_decomposition_adds_up(kind: str) -> None:
    pred = KINDS[kind]
    if isinstance(pred, SamplePredictive):
        with pytest.raises(BadType, match="cannot be told apart"):
            pred.uncertainty()
        return
    total, aleatoric, epistemic = pred.uncertainty()
    torch.testing.assert_close(total, aleatoric + epistemic)
    assert total.shape == pred.batch_shape
    assert (aleatoric >= 0).all()
    assert (epistemic > 0).all()


@every_kind
def test_component(kind: str) -> None:
    pred = KINDS[kind]
    if isinstance(pred, SamplePredictive) or not pred.has_draws:
        with pytest.raises(BadType):
            _ = pred.component
        return
    assert pred.component.batch_shape == (3, *pred.batch_shape)
    if isinstance(pred, (ContinuousPredictive, CountPredictive)):
        mean = torch.einsum("s,s...->...", pred.weights, pred.component.mean.double())
        torch.testing.assert_close(pred.mean, mean.float())


@every_kind
def test_pickles(kind: str) -> None:
    again = pickle.loads(pickle.dumps(KINDS[kind]))
    assert torch.equal(again.mean, KINDS[kind].mean)


def test_refused_operations() -> None:
    for pred in KINDS.values():
        with pytest.raises(BadType, match="concatenate"):
            pred.expand((2,))
        with pytest.raises(BadType, match="gradients"):
            pred.rsample()


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, torch.nan, 1.0]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(BadInput, match="weights"):
        CategoricalPredictive(randn(3, 5, 4), weights)


def test_weights_are_normalised_and_weigh() -> None:
    probs = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert CategoricalPredictive(probs.log(), [3, 1]).probs[0].tolist() == pytest.approx([0.75, 0.25])
    assert ContinuousPredictive(Normal(probs, 1.0), np.array([3, 1])).mean.tolist() == [[0.75, 0.25]]
    assert CategoricalPredictive(probs.log(), [1, 0]).uncertainty().epistemic.tolist() == [0.0]


def test_exact_and_estimated_error() -> None:
    exact = [Predictive.from_probs([[0.5, 0.5]]), Predictive.from_normal([0.0], 1.0), Predictive.from_logits([0.0])]
    for pred in exact:
        assert pred.exact
        assert (pred.standard_error == 0).all()
        assert (pred[:1].standard_error == 0).all()
    one_draw = [
        Predictive.from_probs([[[0.5, 0.5]]], draws=True),
        Predictive.from_normal([[0.0]], 1.0, draws=True),
        Predictive.from_samples([[0.0]]),
    ]
    for pred in one_draw:
        assert not pred.exact
        assert (pred.standard_error == torch.inf).all()


def test_standard_error_is_the_spread_of_the_mean() -> None:
    """Over 400 repetitions of 10 draws the means spread as the standard error says, within five of its errors."""
    repetitions, draws = 400, 10
    logits = 2 * torch.randn(draws, repetitions, 3, generator=torch.Generator().manual_seed(1))
    pred = CategoricalPredictive(logits)
    variances = pred.standard_error.double().square()
    spread = pred.probs.double().var(0)
    # The variance of a variance estimate is 2 sigma^4 / (n - 1) for a Gaussian; probabilities have lighter tails.
    error = spread * (2 / (repetitions - 1)) ** 0.5 + variances.std(0) / repetitions**0.5
    assert ((variances.mean(0) - spread).abs() < 5 * error).all()
    biased = variances.mean(0) * draws  # forgetting that the mean has less variance than a draw
    assert not ((biased - spread).abs() < 5 * error).any()


def test_constructors_tell_two_kinds_of_classification_apart() -> None:
    assert isinstance(Predictive.from_probs(np.array([0.2, 0.9])), BernoulliPredictive)
    assert isinstance(Predictive.from_probs(np.array([[0.2, 0.8]])), CategoricalPredictive)
    assert isinstance(Predictive.from_logits(randn(4, 3), draws=True), BernoulliPredictive)
    assert isinstance(Predictive.from_logits(randn(4, 3, 2), draws=True), CategoricalPredictive)
    assert isinstance(BernoulliPredictive.from_probs(torch.tensor([[0.2, 0.8]])), BernoulliPredictive)


@pytest.mark.parametrize(
    "probs", [[[2.0, -1.0]], [[0.5, 0.4]], [[1.5, -0.5]], [[torch.nan, 1.0]], [[0.0, 0.0]], [3.0], [-0.1]]
)
def test_probabilities_that_are_none(probs: list[list[float]]) -> None:
    with pytest.raises(BadInput, match="row 0"):
        Predictive.from_probs(probs)


def test_row_of_bad_probabilities_among_draws() -> None:
    probs = torch.full((2, 5, 2), 0.5)
    probs[1, 3] = 0.4
    with pytest.raises(BadInput, match=r"row 3.*0\.8.*from_logits"):
        Predictive.from_probs(probs, draws=True)


def test_shapes_of_constructors() -> None:
    with pytest.raises(BadInput, match=r"\[S, N, K\]"):
        CategoricalPredictive.from_logits(torch.zeros(3, 2), draws=True)
    with pytest.raises(BadInput, match="no draws"):
        Predictive.from_logits(torch.zeros(0, 3, 2), draws=True)
    with pytest.raises(BadInput, match="scale"):
        Predictive.from_normal(torch.zeros(3), torch.ones(3, 1))
    with pytest.raises(BadInput, match=r"scale.*row 1"):
        Predictive.from_normal(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(BadInput, match=r"\[S, N\]"):
        Predictive.from_samples(torch.zeros(3))
    with pytest.raises(BadType):
        Predictive.from_probs("0.5")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_kind
def test_on_cuda(kind: str) -> None:
    here, there = KINDS[kind], KINDS[kind].to("cuda")
    target = here.sample(seed=0)
    for name in ("mean", "variance", "standard_error"):
        torch.testing.assert_close(getattr(there, name).cpu(), getattr(here, name))
    questions: list[tuple[str, object]] = [] if isinstance(here, SamplePredictive) else [("log_prob", target)]
    if isinstance(here, (ContinuousPredictive, CountPredictive, SamplePredictive)):
        questions += [("crps", target), ("cdf", target), ("icdf", 0.3)]
    for name, value in questions:
        torch.testing.assert_close(getattr(there, name)(value).cpu(), getattr(here, name)(value))
    assert there.sample((2,), seed=1).device == there[1:3].device == there.device
