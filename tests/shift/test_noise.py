"""Moments of the noises, within five standard errors; each tolerance rejects a noise that is a little wrong."""

import pytest
import torch
from torch import Tensor

from bayesguard.shift import SEVERITIES, Corruption, noise

VALUE = 0.5
IMAGES = torch.full((64, 3, 32, 32), VALUE, dtype=torch.float64)
COUNT = IMAGES.numel()


def variance_error(values: Tensor, variance: float, fourth: float | None = None) -> float:
    """Return how many standard errors the variance around VALUE is away; `fourth` central moment, or Gaussian."""
    fourth = 3 * variance**2 if fourth is None else fourth
    observed = (values - VALUE).pow(2).mean().item()
    return abs(observed - variance) / ((fourth - variance**2) / COUNT) ** 0.5


def mean_error(values: Tensor, mean: float, variance: float) -> float:
    return float(abs(values.mean().item() - mean) / (variance / COUNT) ** 0.5)


@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize("name", ["gaussian_noise", "speckle_noise"])
def test_gaussian_noises_have_the_mean_and_variance_of_the_table(name: str, severity: int) -> None:
    deviation = SEVERITIES[name][severity - 1]
    assert isinstance(deviation, float)
    variance = (deviation * (VALUE if name == "speckle_noise" else 1.0)) ** 2
    values = Corruption(name, severity)(IMAGES)
    assert mean_error(values, VALUE, variance) < 5
    assert variance_error(values, variance) < 5


def test_a_deviation_that_is_two_percent_wrong_would_be_noticed() -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = noise.gaussian_noise(IMAGES, generator, 0.98 * 0.1)
    assert variance_error(wrong, 0.1**2) > 5


@pytest.mark.parametrize("severity", [1, 5])
def test_shot_noise_counts_photons(severity: int) -> None:
    photons = SEVERITIES["shot_noise"][severity - 1]
    assert isinstance(photons, int)
    values = Corruption("shot_noise", severity)(IMAGES)
    rate = VALUE * photons
    variance, fourth = rate / photons**2, rate * (1 + 3 * rate) / photons**4
    assert mean_error(values, VALUE, variance) < 5
    assert variance_error(values, variance, fourth) < 5
    torch.testing.assert_close((values * photons).round(), values * photons)


def test_shot_noise_with_a_tenth_more_photons_would_be_noticed() -> None:
    wrong = noise.shot_noise(IMAGES, torch.Generator().manual_seed(0), 55)
    rate = VALUE * 50
    assert variance_error(wrong, rate / 50**2, rate * (1 + 3 * rate) / 50**4) > 5


@pytest.mark.parametrize("severity", [1, 5])
def test_impulse_noise_replaces_its_share_by_black_and_white(severity: int) -> None:
    share = SEVERITIES["impulse_noise"][severity - 1]
    assert isinstance(share, float)
    values = Corruption("impulse_noise", severity)(IMAGES)
    hit = (values != VALUE).double()
    assert abs(hit.mean().item() - share) < 5 * (share * (1 - share) / COUNT) ** 0.5
    assert abs(hit.mean().item() - 1.2 * share) > 5 * (share * (1 - share) / COUNT) ** 0.5
    struck = values[values != VALUE]
    assert set(struck.unique().tolist()) == {0.0, 1.0}
    assert abs(struck.mean().item() - 0.5) < 5 * 0.5 / len(struck) ** 0.5


def test_speckle_noise_leaves_black_alone() -> None:
    black = torch.zeros(2, 1, 8, 8)
    assert torch.equal(Corruption("speckle_noise", 5)(black), black)
