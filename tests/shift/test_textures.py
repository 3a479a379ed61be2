"""Plasma against a loop over points; frost against the colours that it is made to have."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from bayesguard.shift.textures import FROSTS, frost_texture, plasma


def slow_plasma(side: int, decay: float, generator: torch.Generator) -> npt.NDArray[np.float64]:
    """Return the diamond-square fractal of one image, point by point."""
    field = np.zeros((side, side))
    step, amplitude = side, 1.0
    while step >= 2:
        half = step // 2

        def noise(count: int = side // step) -> npt.NDArray[np.float64]:
            return 2 * torch.rand(count, count, generator=generator, dtype=torch.float64).numpy() - 1

        for rows, columns, offsets in (
            (half, half, ((-half, -half), (-half, half), (half, -half), (half, half))),
            (0, half, ((-half, 0), (half, 0), (0, -half), (0, half))),
            (half, 0, ((-half, 0), (half, 0), (0, -half), (0, half))),
        ):
            wobble = noise()
            for i in range(side // step):
                for j in range(side // step):
                    y, x = i * step + rows, j * step + columns
                    corners = [field[(y + dy) % side, (x + dx) % side] for dy, dx in offsets]
                    field[y, x] = sum(corners) / 4 + amplitude * wobble[i, j]
        step, amplitude = half, amplitude / decay**2
    field -= field.min()
    return field / field.max()


@pytest.mark.parametrize(("side", "decay"), [(8, 3.0), (32, 1.75)])
def test_plasma_is_diamond_square(side: int, decay: float) -> None:
    images = torch.zeros(1, 1, side, side, dtype=torch.float64)
    wanted = slow_plasma(side, decay, torch.Generator().manual_seed(3))
    result = plasma(images, decay, torch.Generator().manual_seed(3))[0]
    np.testing.assert_allclose(result.numpy(), wanted, atol=1e-12)


def test_plasma_of_any_size_is_in_the_unit_interval_and_differs_between_images() -> None:
    result = plasma(torch.zeros(3, 1, 11, 20), 2.0, torch.Generator().manual_seed(0))
    assert result.shape == (3, 11, 20)
    assert 0 <= result.min() <= result.max() <= 1
    assert not torch.equal(result[0], result[1])


def test_frost_has_the_mean_colours_of_the_photographs() -> None:
    count = 1000
    frosts = frost_texture(torch.zeros(count, 3, 16, 16), torch.Generator().manual_seed(0))
    colours = torch.tensor([colour for colour, _, _ in FROSTS])
    error = colours.std(0) / count**0.5
    # Cutting at 1 darkens the brightest crystals of the white photographs by less than 0.005.
    assert ((frosts.mean((0, 2, 3)) - colours.mean(0)).abs() < 5 * error + 0.005).all()


def test_grey_frost_is_the_luma_of_the_coloured_one() -> None:
    coloured, grey = (
        frost_texture(torch.zeros(4, channels, 8, 8, dtype=torch.float64), torch.Generator().manual_seed(0))
        for channels in (3, 1)
    )
    luma = (coloured * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(grey, luma, atol=0.03, rtol=0)  # but for the cuts at 1, channel by channel
