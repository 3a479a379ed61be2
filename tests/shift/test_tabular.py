"""Noise on features: its size, and what it refuses."""

import pytest
import torch

from bayesguard.errors import BadInput, BadType
from bayesguard.shift import FeatureNoise
from bayesguard.shift.tabular import SHARES


@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_has_the_share_of_the_scale(severity: int) -> None:
    count, scale = 20000, torch.tensor([0.0, 1.0, 50.0], dtype=torch.float64)
    features = torch.linspace(-1, 1, 3 * count, dtype=torch.float64).view(count, 3)
    noise = FeatureNoise(severity, scale)(features) - features
    assert not noise[:, 0].any()
    variance = (SHARES[severity - 1] * scale[1:]) ** 2
    error = variance * (2 / count) ** 0.5
    assert ((noise[:, 1:].square().mean(0) - variance).abs() < 5 * error).all()
    assert ((noise[:, 1:].square().mean(0) - 1.1 * variance).abs() > 5 * error).all()


def test_repeats_itself_and_keeps_shape_dtype_and_input() -> None:
    features = torch.rand(4, 2, 3, dtype=torch.float16)
    before = features.clone()
    shift = FeatureNoise(3, torch.ones(2, 3), seed=1)
    state = torch.get_rng_state()
    shifted = shift(features)
    assert torch.equal(shifted, shift(features))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(features, before)
    assert (shifted.shape, shifted.dtype) == (features.shape, features.dtype)
    assert shift(features[:0]).shape == (0, 2, 3)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="severity must be 1, 2, 3, 4 or 5, got 6"):
        FeatureNoise(6, torch.ones(2))
    with pytest.raises(BadInput, match="scale must not be negative, got -1"):
        FeatureNoise(1, torch.tensor([1.0, -1.0]))
    with pytest.raises(BadInput, match=r"scale has shape \(2,\), but \(3,\) is needed"):
        FeatureNoise(1, torch.ones(2))(torch.zeros(4, 3))
    with pytest.raises(BadType, match=r"features must be floating point, got dtype torch\.int64"):
        FeatureNoise(1, torch.ones(2))(torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(BadInput, match="features has NaN or infinity in row 1"):
        FeatureNoise(1, torch.ones(1))(torch.tensor([[0.0], [torch.nan]]))
