"""Mixtures of predictives, their concatenation, and reduction online."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.distributions import Laplace, Normal, Poisson, StudentT

from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import (
    BernoulliPredictive,
    CategoricalPredictive,
    ContinuousPredictive,
    CountPredictive,
    Gathering,
    Predictive,
    Reduction,
    SamplePredictive,
    concatenate,
    mixture,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kinds(draws: int, count: int, seed: int) -> list[Predictive]:
    one, several = randn(draws, count, seed=seed), randn(draws, count, 3, seed=seed)
    return [
        CategoricalPredictive(several),
        BernoulliPredictive(one),
        ContinuousPredictive(Normal(one, one.exp())),
        ContinuousPredictive(StudentT(torch.tensor(4.0).double(), one, one.exp())),
        CountPredictive(Poisson(one.exp())),
        SamplePredictive(several),
    ]


@pytest.mark.parametrize("kind", range(6))
def test_members_of_a_mixture_weigh_the_same_whatever_their_draws(kind: int) -> None:
    few, many = kinds(2, 4, 0)[kind], kinds(7, 4, 1)[kind]
    pred = mixture([few, many])
    assert type(pred) is type(few)
    assert pred.num_samples == 9
    torch.testing.assert_close(pred.mean, (few.mean + many.mean) / 2)
    weighted = mixture([few, many], [1, 3])
    torch.testing.assert_close(weighted.mean, few.mean / 4 + 3 * many.mean / 4)
    assert torch.equal(mixture([few, many], [0, 1]).mean, many.mean)
    assert not pred.exact


def test_nested_mixtures() -> None:
    parts = [kinds(2, 4, seed)[0] for seed in range(4)]
    flat = mixture(parts)
    nested = mixture([mixture(parts[:2]), mixture(parts[2:])])
    torch.testing.assert_close(flat.mean, nested.mean)
    torch.testing.assert_close(torch.stack(flat.uncertainty()), torch.stack(nested.uncertainty()))


def test_mixture_of_different_weights_of_draws() -> None:
    first = CategoricalPredictive(randn(2, 4, 3), [0.9, 0.1])
    second = CategoricalPredictive(randn(1, 4, 3, seed=1))
    assert mixture([first, second]).weights.tolist() == pytest.approx([0.45, 0.05, 0.5])


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("weights", [None, [1, 4, 2]])
def test_mixture_of_reduced(kind: int, weights: list[int] | None) -> None:
    parts = [kinds(draws, 4, draws)[kind] for draws in (2, 3, 5)]
    whole, reduced = mixture(parts, weights), mixture([part.reduce() for part in parts], weights)
    assert not reduced.has_draws
    torch.testing.assert_close(whole.mean, reduced.mean)
    torch.testing.assert_close(torch.stack(whole.uncertainty()), torch.stack(reduced.uncertainty()))
    torch.testing.assert_close(whole.standard_error, reduced.standard_error)
    torch.testing.assert_close(mixture([parts[0].reduce(), parts[1]]).mean, mixture(parts[:2]).mean)


@pytest.mark.parametrize("kind", range(6))
def test_concatenation_undoes_cutting(kind: int) -> None:
    pred = kinds(3, 7, 0)[kind]
    again = concatenate([pred[:2], pred[2:2], pred[2:6], pred[6:]])
    assert torch.equal(again.mean, pred.mean)
    assert torch.equal(again.standard_error, pred.standard_error)
    assert len(again) == 7


def test_concatenation_of_exact_and_reduced() -> None:
    exact = Predictive.from_normal([0.0], 1.0)
    assert concatenate([exact, exact]).exact
    pred = kinds(3, 4, 0)[0]
    reduced = concatenate([pred[:2].reduce(), pred[2:]])
    assert not reduced.has_draws
    torch.testing.assert_close(torch.stack(reduced.uncertainty()), torch.stack(pred.uncertainty()))


def test_what_cannot_be_joined() -> None:
    classes, binary, normal, student, _, _ = kinds(2, 4, 0)
    for join in (mixture, concatenate):
        with pytest.raises(BadInput, match="empty"):
            join([])
        with pytest.raises(BadType, match="one kind"):
            join([classes, binary])
        with pytest.raises(BadType, match="one family"):
            join([normal, student])
        with pytest.raises(BadType, match="one family"):
            join([classes, CategoricalPredictive(randn(2, 4, 5))])
    with pytest.raises(BadType, match="Laplace"):
        mixture([normal, ContinuousPredictive(Laplace(randn(2, 4), 1.0))])
    with pytest.raises(BadInput, match="same examples"):
        mixture([classes, classes[:2]])
    with pytest.raises(BadInput, match="draws"):
        concatenate([classes, kinds(3, 4, 0)[0]])
    with pytest.raises(BadInput, match="more than the examples"):
        concatenate([SamplePredictive(randn(2, 4, 3)), SamplePredictive(randn(2, 4))])


@pytest.mark.parametrize("kind", [0, 1])
def test_reduction_online_is_reduction_at_once(kind: int) -> None:
    pred = kinds(20, 6, 0)[kind]
    draws = pred.draw_logits if isinstance(pred, (CategoricalPredictive, BernoulliPredictive)) else torch.empty(0)
    reduction = Reduction()
    for chunk in draws.split([1, 7, 7, 5]):
        reduction.update(type(pred)(chunk))
    found = reduction.result()
    assert not found.has_draws
    assert torch.equal(found.weights, pred.weights)
    torch.testing.assert_close(found.mean, pred.mean)
    torch.testing.assert_close(found.standard_error, pred.standard_error)
    torch.testing.assert_close(torch.stack(found.uncertainty()), torch.stack(pred.uncertainty()))


def test_reduction_keeps_no_draws_of_its_chunks() -> None:
    chunks = [Predictive.from_logits(logits, draws=True) for logits in torch.randn(3, 4, 5, 3, dtype=torch.float64)]
    kept = [weakref.ref(chunk.draw_logits) for chunk in chunks]
    whole = mixture(chunks).reduce()
    reduction = Reduction()
    while chunks:
        reduction.update(chunks.pop(0))
    assert all(draws() is None for draws in kept)
    got = reduction.result()
    assert isinstance(got, CategoricalPredictive)
    assert isinstance(whole, CategoricalPredictive)
    for name in ("probs", "standard_error"):
        torch.testing.assert_close(getattr(got, name), getattr(whole, name), rtol=1e-10, atol=1e-12)


def test_reduction_keeps_small_epistemic_uncertainty_in_float32() -> None:
    logits = (randn(1, 5, 4) + 1e-4 * randn(8, 5, 4, seed=1)).float()
    reduction = Reduction()
    for chunk in logits.split(2):
        reduction.update(CategoricalPredictive(chunk))
    exact = CategoricalPredictive(logits.double()).uncertainty().epistemic
    assert float(exact.max()) < 1e-7
    torch.testing.assert_close(reduction.result().uncertainty().epistemic.double(), exact, rtol=1e-2, atol=1e-11)


def test_reduction_of_masked_classes() -> None:
    logits = randn(4, 5, 3).index_fill(-1, torch.tensor([1]), -torch.inf)
    reduction = Reduction()
    for chunk in logits.split(2):
        reduction.update(CategoricalPredictive(chunk))
    assert reduction.result().mean[:, 1].tolist() == [0.0] * 5
    torch.testing.assert_close(reduction.result().mean, CategoricalPredictive(logits).mean)


def test_reduction_of_one_draw_and_of_none() -> None:
    reduction = Reduction()
    with pytest.raises(BadInput, match="no draws"):
        reduction.result()
    reduction.update(Predictive.from_logits(randn(5, 3)))
    assert reduction.result().has_draws
    assert reduction.result().exact
    with pytest.raises(BadInput, match="same examples"):
        reduction.update(Predictive.from_logits(randn(4, 3)))
    with pytest.raises(BadInput, match="weight"):
        reduction.update(Predictive.from_logits(randn(5, 3)), weight=0.0)
    with pytest.raises(BadType, match="classification"):
        reduction.update(Predictive.from_normal([0.0], 1.0))


def test_reduction_with_weights() -> None:
    first, second = CategoricalPredictive(randn(2, 5, 3)), CategoricalPredictive(randn(3, 5, 3, seed=1))
    reduction = Reduction()
    reduction.update(first, weight=1.0)
    reduction.update(second, weight=3.0)
    torch.testing.assert_close(reduction.result().mean, mixture([first, second], [1, 3]).mean)


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("rows", [None, 0, 3, 7, 9])
def test_gathering_is_concatenation_whatever_number_of_rows_was_told(kind: int, rows: int | None) -> None:
    pred = kinds(3, 7, 0)[kind]
    for whole in (pred, pred.reduce()):
        gathering = Gathering(rows, "cpu")
        for part in (whole[:2], whole[2:2], whole[2:6], whole[6:]):
            gathering.add(part)
        found = gathering.result()
        assert torch.equal(found.mean, whole.mean)
        assert torch.equal(found.standard_error, whole.standard_error)
        assert found.has_draws == whole.has_draws


def test_gathering_writes_into_one_place() -> None:
    gathering = Gathering(6)
    pred = kinds(3, 6, 0)[0].reduce()
    gathering.add(pred[:4])
    place = gathering._whole[0].data_ptr()
    gathering.add(pred[4:])
    assert gathering.result()._tensors()[0].data_ptr() == place


def test_gathering_nothing_and_what_differs() -> None:
    gathering = Gathering()
    with pytest.raises(BadInput, match="nothing was added"):
        gathering.result()
    gathering.add(kinds(2, 4, 0)[0])
    with pytest.raises(BadInput, match="draws"):
        gathering.add(kinds(3, 4, 0)[0])
    with pytest.raises(BadInput, match="were reduced"):
        gathering.add(kinds(2, 4, 0)[0].reduce())


def test_no_examples_at_all() -> None:
    pred = kinds(2, 4, 0)[0][:0]
    assert len(concatenate([pred, pred])) == 0


def test_weights_that_differ_by_a_rounding_are_the_same_draws() -> None:
    first, second = (CategoricalPredictive(randn(3, 2, 3), [1, 1, 1 + extra]) for extra in (0.0, 1e-15))
    assert len(concatenate([first, second])) == 4
    with pytest.raises(BadInput, match="draws"):
        concatenate([first, CategoricalPredictive(randn(3, 2, 3), [1, 1, 1.001])])
