"""Selective prediction and risk control: the promise is kept as often as it says, and the plain choice is not."""

import math
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

import bayesguard as bg
from bayesguard.calibration.selective import (
    SelectiveClassifier,
    binomial_p_value,
    hoeffding_bentkus,
    risk_controlled_threshold,
)
from bayesguard.errors import BadInput, BadType, NotFitted

POPULATION = 200_000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(rows: int, seed: int) -> tuple[bg.Predictive, Tensor]:
    """Answers of every confidence, twice as sure as they should be."""
    logits = 3 * torch.randn(rows, 3, generator=generator(seed))
    labels = logits.softmax(-1).multinomial(1, generator=generator(seed + 1)).squeeze(-1)
    return bg.Predictive.from_logits(2 * logits), labels


def naive_threshold(pred: Any, labels: Tensor, max_error: float) -> float:
    """The lowest confidence above which the held-out error rate looks fine."""
    ranked, order = pred.confidence.sort(descending=True)
    rate = (pred.labels != labels)[order].double().cumsum(0) / torch.arange(1, len(labels) + 1)
    good = (rate <= max_error).nonzero()
    return float(ranked[good[-1]]) if len(good) else math.inf


def test_the_error_rate_is_kept_with_the_probability_that_is_promised() -> None:
    population, truth = data(POPULATION, 0)
    wrong = population.labels != truth
    confidence = population.confidence
    broken, plain, coverage, trials, delta = 0, 0, [], 200, 0.1
    for trial in range(trials):
        pred, labels = data(1000, 10 * trial + 10)
        selective = SelectiveClassifier(max_error=0.05, delta=delta).fit(pred, labels)
        coverage.append(selective.coverage)
        for threshold, name in ((selective.threshold, "ours"), (naive_threshold(pred, labels, 0.05), "plain")):
            answered = confidence >= threshold
            bad = bool(answered.any()) and float(wrong[answered].double().mean()) > 0.05
            broken, plain = broken + (bad and name == "ours"), plain + (bad and name == "plain")
    assert broken <= binom.ppf(1 - 1e-6, trials, delta)
    assert plain > binom.ppf(1 - 1e-6, trials, delta)
    assert sum(coverage) / trials > 0.3


def test_answers_are_those_above_the_threshold() -> None:
    pred, labels = data(2000, 3)
    selective = SelectiveClassifier(max_error=0.05).fit(pred, labels)
    answered, answers = selective(pred)
    assert torch.equal(answered, pred.confidence >= selective.threshold)
    assert torch.equal(answers, pred.labels)
    assert answered.double().mean().item() == pytest.approx(selective.coverage)


def test_no_threshold_at_all() -> None:
    pred, _ = data(500, 3)
    wrong = (pred.labels + 1) % 3
    selective = SelectiveClassifier(max_error=0.01).fit(pred, wrong)
    assert selective.threshold == math.inf
    assert not selective(pred).answered.any()
    assert selective.coverage == 0


def test_equal_confidences_are_answered_together() -> None:
    probs = torch.tensor([[0.9, 0.1]]).expand(1000, 2)
    labels = torch.zeros(1000, dtype=torch.long)
    labels[:10] = 1
    for order in (slice(None), torch.arange(999, -1, -1)):
        pred = bg.Predictive.from_probs(probs)
        assert SelectiveClassifier(max_error=0.05).fit(pred, labels[order]).coverage == 1.0


@pytest.mark.parametrize("delta", [None, 0.1])
def test_risk_control(delta: float | None) -> None:
    """Losses are uniform numbers above a threshold: the risk of each setting is known."""
    settings = torch.linspace(0, 1, 101, dtype=torch.float64)
    risks, alpha, trials = 1 - settings, 0.2, 400
    found, plain = [], []
    for trial in range(trials):
        draws = torch.rand(100, 1, dtype=torch.float64, generator=generator(trial))
        losses = (draws > settings).double()
        chosen = risk_controlled_threshold(losses, alpha, delta=delta)
        assert chosen is not None
        found.append(risks[chosen])
        plain.append(risks[int((losses.mean(0) <= alpha).nonzero()[0])])
    ours, theirs = torch.stack(found), torch.stack(plain)
    if delta is None:
        assert ours.mean() <= alpha + 5 * ours.std() / trials**0.5
        assert ours.mean() > alpha - 0.02
    else:
        assert (ours > alpha).sum() <= binom.ppf(1 - 1e-6, trials, delta)
        assert (theirs > alpha).sum() > binom.ppf(1 - 1e-6, trials, delta)


def test_no_setting_controls_the_risk() -> None:
    assert risk_controlled_threshold(torch.ones(50, 3), 0.1) is None
    assert risk_controlled_threshold(torch.zeros(3, 3), 0.1) is None  # too few to say so


def test_p_values() -> None:
    wrong, counts = torch.tensor([0.0, 3.0, 50.0]), torch.tensor([149.0, 200.0, 100.0])
    want = [
        sum(math.comb(int(n), k) * 0.02**k * 0.98 ** (n - k) for k in range(int(w) + 1))
        for w, n in zip(wrong, counts, strict=True)
    ]
    assert torch.allclose(binomial_p_value(wrong, counts, 0.02), torch.tensor(want, dtype=torch.float64))
    assert hoeffding_bentkus(torch.tensor(0.3), 100, 0.2) == 1
    assert 0 < hoeffding_bentkus(torch.tensor(0.1), 100, 0.2) < 0.05


PRED, LABELS = data(50, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SelectiveClassifier(max_error=0.0), BadInput, "max_error"),
        (lambda: SelectiveClassifier(delta=1.0), BadInput, "delta"),
        (lambda: SelectiveClassifier()(PRED), NotFitted, "not fitted"),
        (lambda: SelectiveClassifier().fit(PRED, LABELS + 5), BadInput, "labels must be in"),
        (lambda: SelectiveClassifier().fit(bg.Predictive.from_normal([0.0], [1.0]), [0.0]), BadType, "classification"),
        (lambda: risk_controlled_threshold(torch.tensor([[0.0, 1.0]]), 0.1), BadInput, "losses increase"),
        (lambda: risk_controlled_threshold(torch.tensor([[2.0]]), 0.1), BadInput, "between 0 and bound"),
        (lambda: risk_controlled_threshold(torch.zeros(3), 0.1), BadInput, r"\[n, L\]"),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
