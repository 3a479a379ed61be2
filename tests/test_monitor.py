"""The monitor: false alarms as rare as promised at any time, faults found, and a state that goes on."""

import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from scipy.stats import binom
from torch import Tensor

import bayesguard as bg
from bayesguard.errors import BadInput, BadType
from bayesguard.monitor import CalibrationMonitor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes(rows: int, seed: int, sharpness: float = 1.0) -> tuple[bg.Predictive, Tensor]:
    logits = 2 * torch.randn(rows, 3, generator=generator(seed))
    labels = logits.softmax(-1).multinomial(1, generator=generator(seed + 1)).squeeze(-1)
    return bg.Predictive.from_logits(sharpness * logits), labels


def numbers(rows: int, seed: int, loc: float = 0.0, scale: float = 1.0) -> tuple[bg.Predictive, Tensor]:
    y = torch.randn(rows, dtype=torch.float64, generator=generator(seed))
    return bg.Predictive.from_normal(torch.full((rows,), loc).double(), scale), y


@pytest.mark.parametrize(("claim", "data"), [("confidence", classes), ("pit", numbers)])
def test_false_alarms_at_any_time(claim: Any, data: Any) -> None:
    """Looking after every one of 2,000 examples; a test that is repeated each time would ring in most streams."""
    alpha, trials, false = 0.1, 200, 0
    for trial in range(trials):
        monitor = CalibrationMonitor(alpha, claim)
        false += monitor.update(*data(2000, 10 * trial))
    assert false <= binom.ppf(1 - 1e-6, trials, alpha)


@pytest.mark.parametrize(
    ("claim", "make", "finding"),
    [
        ("confidence", lambda seed: classes(3000, seed, 1.8), "over-confident"),
        ("confidence", lambda seed: classes(3000, seed, 0.5), "under-confident"),
        ("pit", lambda seed: numbers(3000, seed, scale=0.7), "intervals are too narrow"),
        ("pit", lambda seed: numbers(3000, seed, scale=1.5), "intervals are too wide"),
        ("pit", lambda seed: numbers(3000, seed, loc=0.3), "answers are too high"),
        ("pit", lambda seed: numbers(3000, seed, loc=-0.3), "answers are too low"),
    ],
)
def test_faults_are_found_and_named(claim: Any, make: Any, finding: str) -> None:
    for seed in range(5):
        monitor = CalibrationMonitor(0.01, claim)
        assert monitor.update(*make(100 * seed))
        assert monitor.finding() == finding
        assert 0 < int(monitor.alarm_at) < 2000


def test_a_fault_that_comes_late_is_found() -> None:
    monitor = CalibrationMonitor(0.01)
    monitor.update(*classes(20_000, 3))
    assert not monitor.alarm
    assert monitor.finding() in ("nothing against the claim", "over-confident", "under-confident")
    monitor.update(*classes(10_000, 5, 2.0))
    assert 20_000 < int(monitor.alarm_at) < 26_000


def test_batches_do_not_matter_and_states_go_on() -> None:
    pred, labels = classes(3000, 9, 1.3)
    whole, pieces = CalibrationMonitor(), CalibrationMonitor()
    whole.update(pred, labels)
    for start in range(0, 3000, 7):
        pieces.update(pred[start : start + 7], labels[start : start + 7])
        if start == 700:
            fresh = CalibrationMonitor()
            fresh.load_state_dict(load(save(pieces.state_dict())))
            CalibrationMonitor().load_state_dict({**pieces.state_dict(), "_extra_state": {"claim": "confidence"}})
            pieces = fresh
    assert torch.allclose(whole.log_wealth, pieces.log_wealth, atol=1e-9)
    assert whole.alarm_at == pieces.alarm_at
    assert whole.num_examples == pieces.num_examples == 3000
    assert sum(value.numel() for value in whole.buffers()) < 1000


def test_the_fortune_is_fair() -> None:
    """The expectation of each bet's growth under the claim is 1."""
    monitor = CalibrationMonitor(claim="pit")
    gains = monitor._gains(*numbers(200_000, 1))
    error = 5 * gains.std(0) / 200_000**0.5
    assert bool((gains.mean(0).abs() < error).all())
    assert float(gains.abs().max()) <= 1


def test_yes_or_no() -> None:
    pred = bg.Predictive.from_probs(torch.full((300,), 0.9))
    assert CalibrationMonitor().update(pred, torch.arange(300) % 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CalibrationMonitor(0.0), BadInput, "alpha"),
        (lambda: CalibrationMonitor(claim="ece"), BadInput, "claim must be"),  # type: ignore[arg-type]
        (lambda: CalibrationMonitor().update(*numbers(5, 0)), BadType, "use claim='pit'"),
        (lambda: CalibrationMonitor(claim="pit").update(*classes(5, 0)), BadType, "use claim='confidence'"),
        (lambda: CalibrationMonitor().update(classes(5, 0)[0], torch.zeros(4).long()), BadInput, "shape"),
        (
            lambda: CalibrationMonitor(claim="pit").load_state_dict(CalibrationMonitor().state_dict()),
            (BadInput, RuntimeError),
            "claim|size mismatch|is of a monitor",
        ),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_fortune_beyond_all_numbers() -> None:
    monitor = CalibrationMonitor()
    sure = bg.Predictive.from_probs(torch.tensor([0.99, 0.01]).expand(5000, 2))
    monitor.update(sure, torch.arange(5000) % 2)
    assert monitor.e_value == math.inf
    assert monitor.finding() == "over-confident"


def test_a_batch_without_examples_changes_nothing() -> None:
    monitor, (pred, y) = CalibrationMonitor(), classes(5, 0)
    monitor.update(pred, y)
    before = monitor.e_value
    assert not monitor.update(pred[:0], y[:0])
    assert (int(monitor.num_examples), monitor.e_value) == (5, before)
