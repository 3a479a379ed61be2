"""Adaptive conformal inference: the bound of the paper on streams of every kind."""

from typing import Any

import pytest
import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.calibration import Conformal, ConformalInterval, ConformalQuantile
from bayesguard.calibration.online import AdaptiveConformal
from bayesguard.errors import BadInput, BadType


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fitted(score: Any = "normalised") -> ConformalInterval:
    y = torch.randn(300, generator=generator(0))
    return ConformalInterval(score).fit(bg.Predictive.from_normal(torch.zeros(300), 1.0), y)


STREAMS: dict[str, Tensor] = {
    "calm": torch.ones(3000),
    "a jump": torch.cat([torch.ones(1500), torch.full((1500,), 4.0)]),
    "a drift": torch.linspace(0.3, 4, 3000),
    "hostile": torch.where(torch.arange(3000) % 2 == 0, 0.0, 1e6),
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("step_size", [0.005, 0.05])
def test_the_long_run_error_rate_whatever_the_data_do(stream: str, step_size: float) -> None:
    y = STREAMS[stream] * torch.randn(3000, generator=generator(1))
    pred = bg.Predictive.from_normal(torch.zeros(3000), 1.0)
    adaptive = AdaptiveConformal(fitted(), step_size=step_size)
    covered = adaptive.run(pred, y)
    misses = 1 - covered.double().mean().item()
    assert abs(misses - 0.1) <= (1 + step_size) / (3000 * step_size)
    assert adaptive.num_misses == int((~covered).sum())
    lower, upper = fitted()(pred).interval()
    fixed = 1 - ((lower <= y) & (y <= upper)).double().mean().item()
    if stream != "calm":
        assert abs(fixed - 0.1) > (1 + 0.05) / (3000 * 0.05)


def test_classes() -> None:
    logits = 2 * torch.randn(1200, 4, generator=generator(2))
    labels = (0.3 * logits).softmax(-1).multinomial(1, generator=generator(3)).squeeze(-1)
    pred = bg.Predictive.from_logits(logits)
    easy = logits.softmax(-1).multinomial(1, generator=generator(4)).squeeze(-1)
    adaptive = AdaptiveConformal(Conformal("aps").fit(pred[:200], easy[:200]), step_size=0.02)
    covered = adaptive.run(pred[200:], labels[200:])
    assert abs(1 - covered.double().mean().item() - 0.1) <= 1.02 / (1000 * 0.02)


def test_levels_beyond_their_range() -> None:
    adaptive = AdaptiveConformal(fitted(), step_size=0.5)
    adaptive.observe(False)
    lower, upper = adaptive.answer(bg.Predictive.from_normal([0.0], [1.0]))
    assert upper.isinf().all()
    assert lower.isinf().all()
    for _ in range(40):
        adaptive.observe(True)
    assert adaptive.level > 1
    lower, upper = adaptive.answer(bg.Predictive.from_normal([0.0], [1.0]))
    assert upper - lower < 0.1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AdaptiveConformal(ConformalInterval()), BadType, "must be a fitted"),
        (lambda: AdaptiveConformal(fitted(), step_size=0.0), BadInput, "step_size"),
        (lambda: AdaptiveConformal(fitted(), alpha=2.0), BadInput, "alpha"),
        (
            lambda: AdaptiveConformal(fitted()).run(bg.Predictive.from_normal([0.0], [1.0]), torch.zeros(2)),
            BadInput,
            "targets has 2 examples",
        ),
        (
            lambda: AdaptiveConformal(
                ConformalQuantile().fit(bg.Predictive.from_normal(torch.zeros(50), 1.0), torch.randn(50))
            ),
            BadType,
            "one alpha only",
        ),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
