"""Masks drop each unit with its rate in every draw, and equally often over eight draws."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bayesguard.sampling.patterns import BLOCK, _table, dropped_bits, quantised

CPU = torch.device("cpu")
RATES = [0.05, 0.1, 0.25, 0.3, 0.5, 0.77, 0.9]


def bits(rate: float, units: int, block: int = 0, *, balanced: bool = True) -> Tensor:
    """Whether each unit is dropped, `[8, units]` (or `[1, units]`)."""
    packed = dropped_bits((units,), quantised(rate), CPU, 3, (block, 0), balanced=balanced)
    count = BLOCK if balanced else 1
    return torch.stack([(packed >> bit) & 1 for bit in range(count)]).double()


@given(st.floats(2**-8, 1 - 2**-8))
def test_every_draw_drops_exactly_the_quantised_share_of_the_patterns(rate: float) -> None:
    """No sampling: of the 65,536 equally probable patterns the right number drops in each of the eight draws."""
    rate = quantised(rate)
    table = _table.__wrapped__(rate)
    assert len(table) == 2**16
    assert {int(((table >> bit) & 1).sum()) for bit in range(BLOCK)} == {round(rate * 2**16)}


@pytest.mark.parametrize("rate", RATES)
def test_over_a_block_every_unit_is_dropped_equally_often(rate: float) -> None:
    times = bits(rate, 5000).sum(dim=0)
    assert set(times.tolist()) <= {math.floor(8 * quantised(rate)), math.floor(8 * quantised(rate)) + 1}


def test_quantised_rates_are_near_and_extreme_ones_are_left_alone() -> None:
    assert quantised(0.5) == 0.5
    assert abs(quantised(0.1) - 0.1) <= 2**-17
    assert [quantised(rate) for rate in (0.0, 1e-6, 1.0, 1 - 1e-6)] == [0.0, 1e-6, 1.0, 1 - 1e-6]


def independent(rate: float, units: int) -> Tensor:
    return bits(rate, units)


def all_units_alike(rate: float, units: int) -> Tensor:
    """The twin: balanced over the draws, but within a draw all units share one fate."""
    return bits(rate, 1).expand(-1, units)


def worst_z(make: Callable[[float, int], Tensor], rate: float) -> float:
    """How far a draw is from independent Bernoulli units, in standard errors: its share, its neighbouring pairs."""
    units, rate = 200_000, quantised(rate)
    dropped = make(rate, units)
    share = (dropped.mean(dim=1) - rate) / math.sqrt(rate * (1 - rate) / units)
    both = (dropped[:, 1:] * dropped[:, :-1]).mean(dim=1)
    # Pairs of neighbours overlap; the variance of their mean is at most three times that of independent pairs.
    pairs = (both - rate**2) / math.sqrt(3 * rate**2 * (1 - rate**2) / units)
    return float(torch.cat([share, pairs]).abs().max())


@pytest.mark.parametrize("rate", RATES)
def test_within_a_draw_units_are_independent_with_the_right_rate(rate: float) -> None:
    assert worst_z(independent, rate) < 5
    assert worst_z(lambda rate, units: bits(rate, units, balanced=False), rate) < 5


def test_rare_drops_have_their_rate() -> None:
    rate, units = 0.001, 1_000_000
    dropped = dropped_bits((units,), rate, CPU, 0, (0, 0), balanced=True)
    assert set(dropped.unique().tolist()) == {0, 1}
    assert abs(float(dropped.double().mean()) - rate) < 5 * math.sqrt(rate / units)


def test_units_that_share_their_fate_are_caught() -> None:
    assert worst_z(all_units_alike, 0.5) > 5


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_blocks_are_independent_and_draws_of_a_block_are_not(rate: float) -> None:
    """Across blocks the drops of a unit do not correlate; within one they do, by -1 / 7 where 8 p is whole."""
    units = 200_000
    one, other = bits(rate, units, 0), bits(rate, units, 1)
    variance = rate * (1 - rate)

    def correlation(a: Tensor, b: Tensor) -> float:
        return float(((a - rate) * (b - rate)).mean() / variance)

    assert abs(correlation(one[0], other[0])) < 5 / math.sqrt(units)
    assert abs(correlation(one[0], one[1]) + 1 / 7) < 5 / math.sqrt(units)


def test_bits_repeat_themselves_and_differ_between_places() -> None:
    def drawn(seed: int, path: tuple[int, ...]) -> bytes:
        return dropped_bits((64,), 0.5, CPU, seed, path, balanced=True).numpy().tobytes()

    assert drawn(1, (0, 0)) == drawn(1, (0, 0))
    assert len({drawn(1, (0, 0)), drawn(2, (0, 0)), drawn(1, (1, 0)), drawn(1, (0, 1))}) == 4
    assert np.frombuffer(drawn(1, (0, 0)), np.uint8).shape == (64,)
