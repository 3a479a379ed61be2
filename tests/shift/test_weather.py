"""Snow, frost and fog against slow references that draw the same random numbers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesguard.shift import SEVERITIES
from bayesguard.shift.textures import frost_texture, plasma
from bayesguard.shift.weather import fog, frost, snow


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("severity", range(1, 6))
def test_snow_is_what_the_published_steps_give(photos: Tensor, slow: type[Any], severity: int) -> None:
    images = photos[:2].double()
    row = SEVERITIES["snow"][severity - 1]
    assert isinstance(row, tuple)
    mean, deviation, zoom, threshold, radius, sigma, weight = row
    result = snow(images, generator(), *row).clamp(0, 1).numpy()
    same = generator()
    noise = torch.randn(2, 1, 32, 32, generator=same, dtype=torch.float64)[:, 0].numpy()
    degrees = -135 + 90 * torch.rand(2, generator=same, dtype=torch.float64).numpy()
    for image, flakes, angle, shifted in zip(images.numpy(), noise, np.radians(degrees), result, strict=True):
        layer = slow.zoom(mean + deviation * flakes, zoom)
        layer = np.uint8(255 * np.where(layer < threshold, 0, layer).clip(0, 1)) / 255
        layer = np.floor(255 * slow.streak(layer, angle, radius, sigma) + 1e-6) / 255
        white = 1.5 * np.tensordot([0.299, 0.587, 0.114], image, 1) + 0.5
        wanted = weight * image + (1 - weight) * np.maximum(image, white) + layer + layer[::-1, ::-1]
        np.testing.assert_allclose(shifted, wanted.clip(0, 1), atol=1e-2)


def test_frost_is_a_weighted_sum(photos: Tensor) -> None:
    wanted = 0.75 * photos + 0.45 * frost_texture(photos, generator())
    torch.testing.assert_close(frost(photos, generator(), 0.75, 0.45), wanted)


def test_fog_keeps_the_maximum_of_each_image(photos: Tensor) -> None:
    dark = photos / 2
    result = fog(dark, generator(), 1.5, 1.75)
    peak = dark.flatten(1).amax(1)[:, None, None, None]
    torch.testing.assert_close(result, (dark + 1.5 * plasma(dark, 1.75, generator())[:, None]) * peak / (peak + 1.5))
    assert (result <= peak + 1e-6).all()


def test_fog_leaves_black_images_black() -> None:
    assert not fog(torch.zeros(2, 1, 8, 8), generator(), 1.0, 2.0).any()
