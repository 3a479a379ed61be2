"""Kish's effective sample size."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesguard.errors import BadInput
from bayesguard.metrics import functional as M


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), scale=st.sampled_from([1e-200, 0.3, 1e200]))
def test_is_the_definition_and_has_no_scale(weights: list[float], scale: float) -> None:
    wanted = math.fsum(weights) ** 2 / math.fsum(w * w for w in weights)
    for values in (weights, [scale * w for w in weights]):
        found = M.effective_sample_size(torch.tensor(values, dtype=torch.float64))
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(wanted, rel=1e-12)
    assert 1 - 1e-9 <= wanted <= len(weights) + 1e-9


def test_is_what_a_weighted_mean_is_worth() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, generator=generator, dtype=torch.float64).square()
    means = torch.randn(20_000, 50, generator=generator, dtype=torch.float64) @ (weights / weights.sum())
    size = M.effective_sample_size(weights).item()
    tolerance = 5 * math.sqrt(2 / len(means))
    assert abs(means.var().item() * size - 1) < tolerance
    assert abs(means.var().item() * 50 - 1) > tolerance  # it is not worth all rows


def test_bad_weights_are_named() -> None:
    for bad in ([], 1.0, [[1.0]], [0.0, 0.0], [1.0, -1.0], [1.0, math.nan]):
        with pytest.raises(BadInput, match="weights"):
            M.effective_sample_size(bad)
