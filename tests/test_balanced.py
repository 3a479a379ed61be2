"""Balanced rows, and the correction: exact on a Gaussian mixture, whose posterior under any shares is known."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bayesguard as bg
from bayesguard import BalancedSampler
from bayesguard.calibration import PriorCorrection
from bayesguard.errors import BadInput, BadType, NotFitted

CENTRES = torch.tensor([[0.0, 0.0], [1.5, 0.0], [0.0, 1.5]], dtype=torch.float64)
SHARES = torch.tensor([0.8, 0.15, 0.05], dtype=torch.float64)


def mixture(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = SHARES.multinomial(rows, replacement=True, generator=generator)
    return CENTRES[labels] + torch.randn(rows, 2, dtype=torch.float64, generator=generator), labels


def posterior(x: Tensor, shares: Tensor) -> Tensor:
    return (shares.log() - (x.unsqueeze(1) - CENTRES).square().sum(-1) / 2).softmax(-1)


def test_every_class_has_the_same_share() -> None:
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 11)
    sampler = BalancedSampler(labels.numpy(), seed=3)
    rows = torch.tensor(list(sampler))
    assert len(rows) == len(sampler) == 101
    assert sorted(labels[rows].bincount().tolist()) == [33, 34, 34]
    seen = rows.bincount(minlength=101)
    for own in (seen[:70], seen[70:90], seen[90:]):  # none again before all have come
        assert int(own.max() - own.min()) <= 1
    assert seen[:70].max() == 1
    assert not torch.equal(labels[rows], labels[rows].sort().values)


def test_a_function_of_seed_and_epoch() -> None:
    labels, before = torch.arange(60) % 4 // 2, torch.get_rng_state()
    sampler = BalancedSampler(labels)
    first = list(sampler)
    assert list(sampler) == first == list(BalancedSampler(labels))
    assert list(BalancedSampler(labels, seed=1)) != first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_groups() -> None:
    groups = torch.tensor([5] * 80 + [-1] * 20)
    sampler = BalancedSampler(torch.arange(100) % 2, groups=groups)
    assert int((groups[list(sampler)] == 5).sum()) == 50
    with pytest.raises(BadInput, match="no correction undoes it"):
        sampler.prior_correction()


def test_the_correction_is_exact() -> None:
    x, labels = mixture(20_000, 0)
    correction = BalancedSampler(labels).prior_correction()
    true = labels.bincount().double() / len(labels)
    x = x[:500]
    equal = torch.full((3,), 1 / 3, dtype=torch.float64)
    pred = bg.Predictive.from_probs(posterior(x, equal))
    torch.testing.assert_close(correction(pred).probs, posterior(x, true), atol=1e-10, rtol=0)
    assert not torch.allclose(pred.probs, posterior(x, true), atol=0.1)


def test_the_correction_can_be_fitted_again() -> None:
    """`calibrate` fits what it is given: held-out rows say the true shares, and never those of the training."""
    x, labels = mixture(5000, 1)
    equal = torch.full((3,), 1 / 3, dtype=torch.float64)
    pred = bg.Predictive.from_probs(posterior(x, equal))
    correction = BalancedSampler(torch.arange(30) % 3).prior_correction().fit(pred, labels)
    true = labels.bincount().double() / len(labels)
    torch.testing.assert_close(correction(pred).probs, posterior(x, true), atol=1e-10, rtol=0)
    unaware = PriorCorrection().fit(pred, labels)
    assert torch.allclose(unaware(pred).probs, pred.probs)
    assert not torch.allclose(unaware(pred).probs, posterior(x, true), atol=0.1)
    found = PriorCorrection(trained_shares=equal).adapt(pred).new  # no labels at all
    assert torch.allclose(found, SHARES, atol=5 * (0.25 / 5000) ** 0.5 * 2.5)
    other = PriorCorrection()
    other.load_state_dict(correction.state_dict())
    assert torch.equal(other(pred).probs, correction(pred).probs)


def bias(pred: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of probability less answer of each class, and its standard error."""
    away = pred.probs.double() - torch.nn.functional.one_hot(labels, 3)
    return away.mean(0), away.std(0) / len(labels) ** 0.5


def test_a_trained_regression_is_calibrated_with_it_and_not_without() -> None:
    x, labels = mixture(6000, 2)
    x = x.float()
    sampler = BalancedSampler(labels)
    predictor = bg.Deterministic(torch.nn.Linear(2, 3), seed=0)
    loader = DataLoader(TensorDataset(x, labels), batch_size=500, sampler=sampler)
    predictor.fit(loader, epochs=40, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    new, truth = mixture(20_000, 3)
    pred = predictor.predict(new.float())
    away, error = bias(sampler.prior_correction()(pred), truth)
    # What was learnt has errors too: of the log-odds of a class against the rest, three numbers from n_k rows and the rest.
    exact, counts = posterior(new, SHARES), labels.bincount()
    of_log_odds = (3 * (1 / counts + 1 / (6000 - counts))).sqrt()
    learnt = (exact * (1 - exact)).mean(0) * of_log_odds
    tolerance = 5 * (error.square() + learnt.square()).sqrt()
    assert bool((away.abs() < tolerance).all())
    uncorrected, _ = bias(pred, truth)
    assert bool((uncorrected.abs() > tolerance).any())
    ece = bg.metrics.functional.expected_calibration_error
    # No bin of the largest probability is further off than all classes together may be.
    assert ece(sampler.prior_correction()(pred).probs, truth) < tolerance.max() < ece(pred.probs, truth)


def test_training_tells_the_epoch() -> None:
    told: list[int] = []

    class Telling(BalancedSampler):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)
            super().set_epoch(epoch)

    x, labels = mixture(60, 4)
    loader = DataLoader(TensorDataset(x.float(), labels), batch_size=20, sampler=Telling(torch.arange(60) % 3))
    bg.Deterministic(torch.nn.Linear(2, 3)).fit(loader, epochs=3)
    assert told == [1, 2, 3]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BalancedSampler(torch.zeros(5)), BadType, "integer class labels"),
        (lambda: BalancedSampler(torch.zeros(5, 2).long()), BadInput, r"labels must be \[N\]"),
        (lambda: BalancedSampler([0, 2, 2]), BadInput, "no row of class 1"),
        (lambda: BalancedSampler([0, -1, 1]), BadInput, "label -1"),
        (lambda: BalancedSampler([0, 0, 0]), BadInput, "labels has one value only"),
        (lambda: BalancedSampler([0, 1], groups=[0, 0]), BadInput, "groups has one value only"),
        (lambda: BalancedSampler([0, 1], groups=[0.0, 1.0]), BadType, "groups must be integers"),
        (lambda: BalancedSampler([0, 1], groups=[0, 1, 2]), BadInput, "groups has shape"),
        (lambda: BalancedSampler([0, 1]).set_epoch(-1), BadInput, "epoch must be"),
        (lambda: PriorCorrection(trained_shares=[0.5, 0.6]), BadInput, "trained_shares must be 0 or more and sum to 1"),
        (lambda: PriorCorrection(trained_shares=[1.0, 0.0]), BadInput, "trained_shares must be positive"),
        (
            lambda: PriorCorrection("bbse", trained_shares=[0.5, 0.5]).adapt(bg.Predictive.from_probs([[0.5, 0.5]])),
            NotFitted,
            "needs the confusion",
        ),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
