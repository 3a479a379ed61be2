"""Prior correction: exact on a Gaussian mixture, whose true posterior under other shares is known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.calibration import PriorCorrection
from bayesguard.calibration.class_shares import most_likely_shares
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted

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


def test_held_out_data_are_where_shares_stay() -> None:
    """Also where predictions are not calibrated: EM finds the shares of the held-out data in held-out predictions."""
    x, labels = mixture(OLD, 20_000, 0)
    pred = bg.Predictive.from_logits(posterior(x, OLD).log() * 2 + torch.tensor([0.5, 0.0, -0.5]))
    correction = PriorCorrection().fit(pred, labels)
    assert torch.allclose(correction._by_em(pred.probs), correction.old, atol=1e-4)
    plain = most_likely_shares(pred.probs, correction.old, correction.old, 0)
    assert (plain - correction.old).abs().max() > 0.02  # what it would find without
    assert torch.isnan(correction.shift_p_value)
    correction.adapt(pred)
    assert torch.equal(correction.new, correction.old)
    assert correction.shift_p_value == 1
    for method in ("em", "bbse"):
        again = PriorCorrection(method, trained_shares=[0.4, 0.4, 0.2]).fit(pred, labels)
        assert torch.allclose(again.adapt(pred).new, correction.old, atol=1e-12)


@pytest.mark.parametrize("method", ["em", "bbse"])
def test_chance_moves_shares_little_and_a_shift_moves_them(method: Any) -> None:
    x, labels = mixture(OLD, 2000, 0)
    correction = PriorCorrection(method).fit(bg.Predictive.from_probs(posterior(x, OLD)), labels)
    moved, plain, stayed = [], [], 0
    for seed in range(1, 201):
        probs = posterior(mixture(OLD, 100, seed)[0], OLD)
        correction.adapt(bg.Predictive.from_probs(probs))
        moved.append(float((correction.new - correction.old).abs().sum()))
        plain.append(float((most_likely_shares(probs, OLD, OLD, 0) - correction.old).abs().sum()))
        stayed += torch.equal(correction.new, correction.old)
    # F has 2 and 2097 degrees of freedom, and is at most 1 with probability 0.63.
    assert abs(stayed / 200 - 0.63) < 4 * (0.63 * 0.37 / 200) ** 0.5
    assert sum(moved) < 0.5 * sum(plain)
    correction.adapt(bg.Predictive.from_probs(posterior(mixture(NEW, 100, 0)[0], OLD)))
    assert correction.shift_p_value < 1e-6
    assert (correction.new - NEW).abs().max() < 5 * (0.25 / 100) ** 0.5


@pytest.mark.parametrize("method", ["em", "bbse"])
def test_no_class_is_ruled_out(method: Any) -> None:
    x, labels = mixture(OLD, 2000, 0)
    correction = PriorCorrection(method).fit(bg.Predictive.from_probs(posterior(x, OLD)), labels)
    sure = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).expand(97, 3)
    correction.adapt(bg.Predictive.from_probs(sure))
    # 97 rows and three more of the shares before.
    assert bool((correction.new[1:] >= 0.03 * OLD[1:] * 0.9).all())
    assert correction.new[0] > 0.95


def test_too_few_rows_leave_shares_as_they_were() -> None:
    correction = PriorCorrection(trained_shares=[0.2, 0.3, 0.5])
    with pytest.warns(CalibrationWarning, match="pred has 2 rows, too few"):
        correction.adapt(bg.Predictive.from_probs([[0.9, 0.1, 0.0], [0.8, 0.1, 0.1]]))
    assert torch.equal(correction.new, correction.old)
    assert torch.isnan(correction.shift_p_value)


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
    wider = bg.Predictive.from_probs(torch.tensor([0.9, 0.95, 0.85, 0.2]))
    loaded.load_state_dict(correction.adapt(wider).state_dict())
    assert loaded.shift_p_value == correction.shift_p_value < 1
    assert torch.equal(loaded.adapt(wider).new, correction.new)
    assert torch.isnan(loaded.adapt_to([0.9, 0.1]).shift_p_value)


def test_several_draws_are_corrected_as_one_mixture() -> None:
    draws = torch.randn(4, 30, 3, generator=torch.Generator().manual_seed(0))
    pred = bg.Predictive.from_logits(draws, draws=True)
    labels = torch.arange(30) % 3
    got = PriorCorrection().fit(pred, labels).adapt_to(NEW)(pred).probs
    want = pred.probs * NEW * 3
    assert torch.allclose(got, (want / want.sum(-1, keepdim=True)).float(), atol=1e-6)


def test_sure_predictions_are_moved_by_the_ratio_of_shares() -> None:
    """Probabilities next to 1 are 1 in float32, and their logarithms tell."""
    odds = torch.tensor([3.0, 18.0, -18.0, 60.0, -200.0])
    correction = PriorCorrection().fit(PRED, LABELS).adapt_to([0.8, 0.2])
    for shift in (1.0, 10.0):
        moved = correction(bg.Predictive.from_logits(shift * odds))
        assert torch.allclose(moved.logits, shift * odds - math.log(4), atol=1e-4)
    unlikely = torch.tensor([[0.0, -150.0], [-2000.0, 0.0], [0.0, -torch.inf]])
    pred = bg.Predictive.from_logits(unlikely)
    assert torch.allclose(
        correction(pred).logits, pred.logits - torch.tensor([[0.0, 1.0], [-1.0, 0], [0, 1]]) * math.log(4)
    )
    sure = bg.Predictive.from_probs(torch.tensor([0.0, 1.0, 0.5]))
    assert torch.allclose(correction(sure).probs, torch.tensor([0.0, 1.0, 0.2]))
    assert correction.adapt_to([1.0, 0.0])(bg.Predictive.from_logits(odds)).probs.max() < 1e-6


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
