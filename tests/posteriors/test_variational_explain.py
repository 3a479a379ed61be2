"""What draws of weights cost and what memory they take is told where ways were timed; seconds and bytes by hand."""

from typing import Any

import pytest
import torch
from torch import nn

import bayesguard as bg
from bayesguard.posteriors import weight_outputs
from bayesguard.sampling.choice import Choice

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
WEIGHTS = 4 * 8 + 8 + 8 * 3 + 3
HEAD = 8 * 3 + 3
MADE_OF = 2  # a mean and a scale of each weight, which the weights of draws were made of
OUTPUTS = 8 * 40 * 3  # of a group of eight draws


def predictor_of(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], plain_pass: float = 2e-3, **options: Any
) -> bg.Variational:
    """A predictor whose ways, for eight draws, and whose plain pass (2 ms) have known times."""

    def fastest(candidates: dict[str, Any], device: torch.device) -> Choice:
        return Choice(min(seconds, key=lambda way: seconds[way]), seconds)

    passes = []

    def seconds_of(call: Any, device: torch.device) -> float:
        passes.append(call())
        assert len(passes) == 1  # one plain pass, once for each kind of input
        assert torch.equal(passes[0], network(X))
        return plain_pass

    monkeypatch.setattr(weight_outputs, "fastest", fastest)
    monkeypatch.setattr(weight_outputs, "seconds_of", seconds_of)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return bg.Variational(network, init_scale=0.1, num_samples=32, **options)


def explained(predictor: bg.Variational) -> list[str]:
    assert predictor.explain() == "strategy: not used yet"
    for _ in range(2):
        predictor(X)
    first, *others = predictor.explain().splitlines()
    assert first == f"strategy: {predictor.strategy}"
    return others


def lines(passes: float, numbers: int) -> list[str]:
    return [
        f"  cost: 32 draws take the time of {passes:.3g} plain passes (one takes 2 ms)",
        f"  memory: {4 * numbers / 2**20:.3g} MiB beside that of one pass",
    ]


def test_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen milliseconds for eight draws: a plain pass for each."""
    predictor = predictor_of(monkeypatch, {"loop": 16e-3, "vectorised": 17e-3})
    assert explained(predictor) == lines(32, OUTPUTS + (32 + MADE_OF) * WEIGHTS)


def test_draws_at_once_hold_what_lies_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four milliseconds for eight draws; seven draws more than one hold a layer's input and output, 8 numbers a row."""
    predictor = predictor_of(monkeypatch, {"loop": 16e-3, "vectorised": 4e-3})
    assert explained(predictor) == lines(8, OUTPUTS + 7 * 2 * 8 * 40 + (32 + MADE_OF) * WEIGHTS)


def test_shared_features_are_computed_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four milliseconds for eight draws are a plain pass of two, and two for the heads: 2 + 4 * 2 for 32 draws."""
    predictor = predictor_of(monkeypatch, {"loop": 16e-3, "shared features": 4e-3}, subset_of_weights="last_layer")
    assert explained(predictor) == lines(5, OUTPUTS + (32 + MADE_OF) * HEAD)


@pytest.mark.parametrize(
    ("seconds", "passes"), [({"loop": 16e-3, "vectorised": 17e-3}, 32), ({"loop": 24e-3, "vectorised": 2e-3}, 4)]
)
def test_a_pass_that_was_interrupted_is_no_measure(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], passes: float
) -> None:
    """It takes no longer than a draw of the loop, nor than eight draws of the fastest way."""
    predictor = predictor_of(monkeypatch, seconds, plain_pass=1.0)
    assert explained(predictor)[0] == lines(passes, 0)[0]


def test_no_more_weights_are_told_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_outputs, "_CACHE_BYTES", 4 * 20 * WEIGHTS)
    predictor = predictor_of(monkeypatch, {"loop": 16e-3, "vectorised": 17e-3})
    assert explained(predictor) == lines(32, OUTPUTS + (20 + MADE_OF) * WEIGHTS)
    held = sum(flats.numel() for flats in predictor._outputs._cache.values())
    assert held <= 20 * WEIGHTS


def test_a_point_has_nothing_to_choose_from() -> None:
    predictor = bg.Variational(nn.Linear(4, 3), guide="delta")
    predictor(X)
    assert predictor.explain() == "strategy: loop (one draw at a time)"


def test_measured_numbers_are_told() -> None:
    predictor = bg.Variational(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), init_scale=0.1)
    predictor(X)
    _, cost, memory = predictor.explain().splitlines()
    assert cost.startswith("  cost: 32 draws take the time of ")
    assert memory.endswith(" MiB beside that of one pass")
