"""Colours against the standard library's colorsys and against the formulas."""

import colorsys

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesguard.shift import SEVERITIES, Corruption
from bayesguard.shift.colour import grey


def test_grey_is_the_luma() -> None:
    colour = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1)
    assert grey(colour).item() == pytest.approx(0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6)
    assert grey(colour[:, :1]).item() == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["brightness", "saturate"])
@pytest.mark.parametrize("severity", range(1, 6))
def test_brightness_and_saturate_go_through_hue_saturation_value(photos: Tensor, name: str, severity: int) -> None:
    images = photos[:1, :, :8, :8].double().clone()
    images[0, :, 0, :3] = torch.tensor([[0.0, 0.5, 1.0]])  # black, grey, white
    result = Corruption(name, severity)(images)[0].flatten(1).T
    row = SEVERITIES[name][severity - 1]
    for rgb, shifted in zip(images[0].flatten(1).T.tolist(), result.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        if isinstance(row, tuple):
            s = min(max(s * row[0] + row[1], 0), 1)
        else:
            v = min(v + row, 1)
        assert shifted == pytest.approx(colorsys.hsv_to_rgb(h, s, v), abs=1e-12)


def test_grey_images_brighten_and_saturate_by_their_value(digits: Tensor) -> None:
    torch.testing.assert_close(Corruption("brightness", 2)(digits), (digits + 0.1).clamp(max=1))
    torch.testing.assert_close(Corruption("saturate", 5)(digits), (2.5 * digits + 0.2).clamp(max=1))


@pytest.mark.parametrize("severity", range(1, 6))
def test_contrast_shrinks_to_the_mean_of_each_channel(photos: Tensor, severity: int) -> None:
    factor = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    images = photos[:3].double()
    result = Corruption("contrast", severity)(images)
    mean = images.numpy().mean((2, 3), keepdims=True)
    np.testing.assert_allclose(result.numpy(), (images.numpy() - mean) * factor + mean, atol=1e-12)
