"""Pixelation against Pillow, elastic deformation against SciPy."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image
from torch import Tensor

from bayesguard.shift import Corruption
from bayesguard.shift.digital import affine, elastic_transform
from bayesguard.shift.resample import pixel_grid


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("side", [8, 32, 45])
def test_pixelate_is_pillows_box(photos: Tensor, severity: int, side: int) -> None:
    image = (255 * photos.repeat(1, 1, 2, 2)[0, 0, :side, :32]).round().byte().numpy()
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    original = Image.fromarray(image)
    small = original.resize((int(32 * share), int(side * share)), Image.Resampling.BOX)
    wanted = np.asarray(small.resize(original.size, Image.Resampling.BOX)).astype(float)
    result = Corruption("pixelate", severity)(torch.from_numpy(image / 255)[None, None])
    # Pillow rounds to whole levels after each of two axes.
    assert np.abs(255 * result[0, 0].numpy() - wanted).max() <= 1.01


@pytest.mark.parametrize("side", [8, 32])
def test_the_affine_map_takes_moved_points_back(side: int) -> None:
    images = torch.zeros(3, 1, side, side, dtype=torch.float64)
    jitter = 0.08 * side
    positions = affine(images, torch.Generator().manual_seed(0), jitter, *pixel_grid(images))
    noise = torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reach = side * 10 / 32
    corners = torch.tensor([[reach, reach], [reach, -reach], [-reach, -reach]], dtype=torch.float64)
    moved = corners + jitter * (2 * noise - 1)
    for example in range(3):
        # The map is affine: read its three coefficients per axis off the grid, then apply it to the points.
        for axis, position in ((0, positions[1][example]), (1, positions[0][example])):
            slope_x, slope_y = position[0, 1] - position[0, 0], position[1, 0] - position[0, 0]
            centre = position[0, 0] + side // 2 * (slope_x + slope_y) - side // 2
            back = slope_x * moved[example, :, 0] + slope_y * moved[example, :, 1] + centre
            torch.testing.assert_close(back, corners[:, axis])


def test_elastic_transform_looks_up_the_displaced_pixels(photos: Tensor) -> None:
    image = photos[:1, :1].double()
    result = elastic_transform(image, torch.Generator().manual_seed(2), 0.1, 0.03, 0.0)[0, 0].numpy()
    same = torch.Generator().manual_seed(2)
    torch.rand(1, 3, 2, generator=same, dtype=torch.float64)
    noise = 2 * torch.rand(2, 1, 32, 32, generator=same, dtype=torch.float64)[:, 0].numpy() - 1
    moves = [3.2 * scipy.ndimage.gaussian_filter(part, 0.96, mode="reflect", truncate=3.0) for part in noise]
    where = np.mgrid[:32, :32] + np.stack(moves)
    wanted = scipy.ndimage.map_coordinates(image[0, 0].numpy(), where, order=1, mode="mirror")
    np.testing.assert_allclose(result, wanted, atol=1e-10)


def test_elastic_transform_without_jitter_or_strength_is_the_identity(photos: Tensor) -> None:
    result = elastic_transform(photos, torch.Generator().manual_seed(0), 0, 0, 0.0)
    torch.testing.assert_close(result, photos, atol=1e-4, rtol=0)
