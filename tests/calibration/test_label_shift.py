"""Prior correction: exact on a Gaussian mixture, whose true posterior under other shares is known."""

from typing import Any

import pytest
import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.calibration import PriorCorrection
from bayesguard.errors import BadInput, BadType, NotFitted

CENTRES = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
OLD = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
NEW = torch.tensor([0.7, 0.25, 0.05], dtype=torch.float64)


def mixture(shares: Tensor, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = shares.multinomial(rows, replacement=True, generator=generator)
    return CENTRES[labels] + torch.randn(rows, 2, dtype=torch.float64, generator=generator), labels


def posterior(x: Tensor, shares: Tensor) -> Tensor:
    return (shares.log() - (x.unsqueeze(1) - CENTRES).square().sum(-1) / 2).softmax(-1)


@pytest.mark.parametrize("method", ["em", "bbse"])
def test_shares_are_found_and_the_posterior_is_exact(method: Any) -> None:
    x, labels = mixture(OLD, 20_000, 0)
    correction = PriorCorrection(method).fit(bg.Predictive.from_probs(posterior(x, OLD)), labels)
    new, _ = mixture(NEW, 20_000, 1)
    pred = bg.Predictive.from_probs(posterior(new, OLD))
    assert torch.equal(correction(pred).labels, pred.labels)  # nothing is known of the new data yet
    correction.adapt(pred)
    # Two binomial errors, of the shares here and of the held-out ones, and what the overlap of classes adds.
    assert torch.allclose(correction.new, NEW, atol=5 * (0.25 / 20_000) ** 0.5 * 2.5)
    known = correction.adapt_to(NEW)
    exact = posterior(new, NEW)
    ours = known(pred).probs
    assert torch.allclose(ours, exact, atol=0.02)  # the old shares are those of a sample
    assert not torch.allclose(pred.probs, exact, atol=0.02)


def test_with_exact_old_shares_the_correction_is_exact() -> None:
    x, _ = mixture(OLD, 100, 0)
    labels = torch.tensor([0] * 20 + [1] * 30 + [2] * 50)
    correction = PriorCorrection().fit(bg.Predictive.from_probs(posterior(x, OLD)), labels).adapt_to(NEW)
    new, _ = mixture(NEW, 50, 1)
    assert torch.allclose(
        correction(bg.Predictive.from_probs(posterior(new, OLD))).probs, posterior(new, NEW), atol=1e-12
    )


def test_expectation_maximisation_is_the_maximum_of_the_likelihood() -> None:
    x, labels = mixture(OLD, 2000, 0)
    new, _ = mixture(NEW, 500, 1)
    probs = posterior(new, OLD)
    correction = PriorCorrection().fit(bg.Predictive.from_probs(posterior(x, OLD)), labels)
    found = correction.adapt(bg.Predictive.from_probs(probs)).new
    ratio = probs / correction.old

    def score(shares: Tensor) -> float:
        return float((ratio @ shares).log().mean())

    for direction in torch.eye(3, dtype=torch.float64):
        assert score(found) >= score(0.99 * found + 0.01 * direction) - 1e-12


def test_balanced_training_is_undone() -> None:
    """A network trained on balanced batches is right again for the shares that there are."""
    x, labels = mixture(torch.full((3,), 1 / 3).double(), 3000, 2)
    correction = PriorCorrection().fit(bg.Predictive.from_probs(posterior(x, torch.full((3,), 1 / 3).double())), labels)
    correction.adapt_to(OLD)
    new, truth = mixture(OLD, 20_000, 3)
    pred = bg.Predictive.from_probs(posterior(new, torch.full((3,), 1 / 3).double()))
    assert correction(pred).log_prob(truth).mean() > pred.log_prob(truth).mean() + 0.01


def test_yes_or_no_and_a_state() -> None:
    pred = bg.Predictive.from_probs(torch.tensor([0.8, 0.3, 0.6, 0.1]))
    correction = PriorCorrection().fit(pred, torch.tensor([1, 0, 1, 0])).adapt_to([0.9, 0.1])
    want = (0.8 * 0.1) / (0.8 * 0.1 + 0.2 * 0.9)
    assert correction(pred).probs[0].item() == pytest.approx(want, rel=1e-6)
    loaded = PriorCorrection()
    loaded.load_state_dict(correction.state_dict())
    assert torch.equal(loaded(pred).probs, correction(pred).probs)


def test_several_draws_are_corrected_as_one_mixture() -> None:
    draws = torch.randn(4, 30, 3, generator=torch.Generator().manual_seed(0))
    pred = bg.Predictive.from_logits(draws, draws=True)
    labels = torch.arange(30) % 3
    got = PriorCorrection().fit(pred, labels).adapt_to(NEW)(pred).probs
    want = pred.probs * NEW * 3
    assert torch.allclose(got, (want / want.sum(-1, keepdim=True)).float(), atol=1e-6)


PRED = bg.Predictive.from_probs(torch.tensor([[0.6, 0.4], [0.2, 0.8]]))
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PriorCorrection("ml"), BadInput, "method must be"),  # type: ignore[arg-type]
        (lambda: PriorCorrection().fit(PRED, torch.zeros(2).long()), BadInput, "class 1 has no held-out example"),
        (lambda: PriorCorrection().adapt(PRED), NotFitted, "not fitted"),
        (lambda: PriorCorrection().fit(PRED, LABELS).adapt_to([0.5, 0.6]), BadInput, "sum to 1"),
        (lambda: PriorCorrection().fit(PRED, LABELS).adapt_to([1.0]), BadInput, "shape"),
        (
            lambda: PriorCorrection().fit(PRED, LABELS).adapt(bg.Predictive.from_probs([[0.2, 0.3, 0.5]])),
            BadInput,
            "3 classes",
        ),
        (
            lambda: PriorCorrection("bbse").fit(bg.Predictive.from_probs([[0.5, 0.5]] * 2), LABELS).adapt(PRED),
            BadInput,
            "nearly singular",
        ),
        (lambda: PriorCorrection().fit(bg.Predictive.from_normal([0.0], [1.0]), [0.0]), BadType, "one class"),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
