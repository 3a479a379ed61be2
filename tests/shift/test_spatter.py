"""Spatter: outlines, distances against SciPy, how much is wet, what colour it is."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from bayesguard.shift import Corruption
from bayesguard.shift.spatter import MUD, distance_to, outline


@pytest.mark.parametrize("side", [8, 32, 40])
def test_distance_is_that_of_the_shortest_moves_in_pixels_of_a_32_pixel_image(side: int) -> None:
    rim = torch.rand(3, 1, side, side, generator=torch.Generator().manual_seed(side)) < 0.03
    result = distance_to(rim, torch.float64)
    place = np.indices((side, side)).reshape(2, -1)
    for mask, distance in zip(rim[:, 0].numpy(), result[:, 0].numpy(), strict=True):
        apart = np.abs(place[:, :, None] - np.stack(mask.nonzero())[:, None])
        long, short = apart.max(0), apart.min(0)
        # Within a half-octant two kinds of moves are enough.
        lengths = np.where(
            long >= 2 * short, (long - 2 * short) + 2.1969 * short, 1.4 * (2 * short - long) + 2.1969 * (long - short)
        )
        wanted = lengths.min(1, initial=np.inf).reshape(side, side)
        np.testing.assert_allclose(distance, np.minimum(32 / side * wanted, 20), rtol=1e-6)
        if mask.any():
            euclid = 32 / side * scipy.ndimage.distance_transform_edt(~mask)
            np.testing.assert_allclose(distance, np.minimum(euclid, 20), rtol=0.025)


def test_the_outline_of_a_square_drop_is_its_rim() -> None:
    drop = torch.zeros(1, 1, 16, 16)
    drop[..., 4:11, 4:11] = 0.75
    ring = outline(drop)[0, 0]
    assert not ring[:3].any()
    assert not ring[6:9, 6:9].any()
    assert ring[5:10, 3:5].any(1).all()
    assert ring[5:10, 10:12].any(1).all()
    assert not outline(torch.full((1, 1, 8, 8), 0.75)).any()


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_as_much_is_wet_on_small_images(severity: int) -> None:
    black = torch.zeros(400, 3, 32, 32)
    small = torch.zeros(6400, 3, 8, 8)
    covered = [(Corruption("spatter", severity)(images) > 0).float().mean((1, 2, 3)) for images in (black, small)]
    # The border is wetter: there smoothing has fewer pixels to average. It is a larger part of small images.
    assert covered[0].mean().item() == pytest.approx(covered[1].mean().item(), rel=0.5)
    assert (covered[0] > 0).all()


def test_every_image_gets_a_drop() -> None:
    for severity in (1, 2, 3, 4, 5):
        shifted = Corruption("spatter", severity)(torch.zeros(300, 1, 8, 8))
        changed = (shifted.flatten(1).amax(1) > 0).float().mean()
        # A lone drop in a corner may have no lit side.
        assert changed > 0.9


def test_mud_is_brown(photos: Tensor) -> None:
    shifted = Corruption("spatter", 5)(torch.ones(8, 3, 8, 8))
    darkest = shifted.flatten(2).amin(2)
    assert (darkest <= torch.tensor([0.4, 0.35, 0.3])).all()
    assert (darkest >= torch.tensor(MUD) - 1e-6).all()
