"""Blurs against SciPy and against loops."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from bayesguard.shift import SEVERITIES, Corruption
from bayesguard.shift.blur import disk_kernel, gaussian_kernel, glass_blur, narrowed, smooth_noise, streak

Array = npt.NDArray[np.float64]


def parameters(name: str, severity: int) -> tuple[float, ...]:
    row = SEVERITIES[name][severity - 1]
    return row if isinstance(row, tuple) else (row,)


def deviation(kernel: Array) -> float:
    """Return the standard deviation of a kernel along its first axis."""
    weights = kernel.reshape(len(kernel), -1).sum(1)
    return math.sqrt((weights * (np.arange(len(kernel)) - len(kernel) // 2) ** 2).sum())


@pytest.mark.parametrize("severity", range(1, 6))
def test_gaussian_blur_is_scipys(photos: Tensor, severity: int) -> None:
    images = photos[:4].double()
    (sigma,) = parameters("gaussian_blur", severity)
    wanted = scipy.ndimage.gaussian_filter(images.numpy(), sigma, mode="nearest", truncate=4.0, axes=(2, 3))
    np.testing.assert_allclose(Corruption("gaussian_blur", severity)(images).numpy(), wanted, atol=1e-12)


def test_gaussian_blur_of_a_larger_image_is_wider(photos: Tensor) -> None:
    images = photos[:1].double().repeat(1, 1, 2, 3)
    wanted = scipy.ndimage.gaussian_filter(images.numpy(), 2 * 0.6, mode="nearest", truncate=4.0, axes=(2, 3))
    np.testing.assert_allclose(Corruption("gaussian_blur", 2)(images).numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("scale", [0.25, 0.4, 0.875, 1.0])
def test_on_small_images_the_deviation_of_a_kernel_scales_with_the_side(scale: float) -> None:
    assert deviation(gaussian_kernel(0.7, scale)) == pytest.approx(scale * deviation(gaussian_kernel(0.7, 1.0)))
    disk = disk_kernel(1.5, 0.1, 1)
    assert deviation(narrowed(disk, scale)) == pytest.approx(scale * deviation(disk))
    assert narrowed(disk, scale).sum() == pytest.approx(1.0)


def test_smoothed_noise_varies_as_much_on_every_size() -> None:
    def response(side: int) -> float:
        point = torch.zeros(side, side, dtype=torch.float64)
        point[side // 2, side // 2] = 1
        return smooth_noise(point, 0.8).square().sum().item()

    assert response(32) == pytest.approx(float((gaussian_kernel(0.8, 1.0) ** 2).sum() ** 2))
    assert response(8) == pytest.approx(response(32))
    assert response(128) == pytest.approx(response(32))


@pytest.mark.parametrize("severity", range(1, 6))
def test_defocus_blur_is_the_correlation_with_a_smoothed_disk(photos: Tensor, severity: int) -> None:
    images = photos[:2].double()
    radius, antialias = parameters("defocus_blur", severity)
    disk = np.array([[float(x * x + y * y <= radius**2) for x in range(-4, 5)] for y in range(-4, 5)])
    side = math.exp(-0.5 / antialias**2)
    smoothing = np.array([side, 1, side]) / (1 + 2 * side)
    kernel = scipy.ndimage.correlate(disk / disk.sum(), np.outer(smoothing, smoothing), mode="constant")
    wanted = scipy.ndimage.correlate(images.numpy(), kernel[None, None], mode="mirror")
    np.testing.assert_allclose(Corruption("defocus_blur", severity)(images).numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("severity", range(1, 6))
def test_glass_blur_is_the_published_loop_over_pixels(photos: Tensor, severity: int) -> None:
    images = photos[:2].double()
    sigma, delta, passes = parameters("glass_blur", severity)
    result = glass_blur(images, torch.Generator().manual_seed(1), sigma, delta, passes)
    generator = torch.Generator().manual_seed(1)
    wanted = scipy.ndimage.gaussian_filter(images.numpy(), sigma, axes=(2, 3), mode="nearest")
    wanted = np.floor(255 * wanted + 1e-4) / 255
    for _ in range(int(passes)):
        down, right = (torch.randint(-1, 1, (2, 32, 32), generator=generator).numpy() for _ in range(2))
        torch.rand(2, 32, 32, dtype=torch.float64, generator=generator)
        for example, image in enumerate(wanted.transpose(0, 2, 3, 1)):
            for h in range(31, 1, -1):
                for w in range(31, 1, -1):
                    y, x = h + down[example, h, w], w + right[example, h, w]
                    # Views on both sides, as published: the second assignment reads what the first has written.
                    image[h, w], image[y, x] = image[y, x], image[h, w]
    wanted = scipy.ndimage.gaussian_filter(wanted, sigma, axes=(2, 3), mode="nearest")
    np.testing.assert_allclose(result.numpy(), wanted, atol=1e-12)


def test_glass_blur_of_a_small_image_moves_the_share_of_pixels_that_the_side_says() -> None:
    images = torch.arange(64.0, dtype=torch.float64).view(1, 1, 8, 8).expand(2000, 1, 8, 8)
    moved = glass_blur(images, torch.Generator().manual_seed(0), 0.0, 1, 1) != images
    expected = 0.25 * 0.75  # a quarter of the pixels move, and of four places one is where they are
    inside = moved[..., 2:, 2:].double()
    error = (expected * (1 - expected) / inside.numel()) ** 0.5
    assert abs(inside.mean().item() - expected) < 5 * error
    assert abs(inside.mean().item() - 0.75) > 5 * error
    assert not moved[..., :2, :].any()
    assert not moved[..., :2].any()


@pytest.mark.parametrize(("radius", "sigma"), [(6, 1.0), (9, 2.5), (14, 12.0)])
def test_streak_is_the_loop_over_taps(photos: Tensor, slow: type[Any], radius: float, sigma: float) -> None:
    images = photos[:3].double()
    angles = torch.tensor([-2.2, 0.3, 0.7], dtype=torch.float64)
    result = streak(images, angles, radius, sigma)
    for example, angle in enumerate(angles.tolist()):
        for channel in range(3):
            wanted = slow.streak(images[example, channel].numpy(), angle, radius, sigma)
            np.testing.assert_allclose(result[example, channel].numpy(), wanted, atol=2e-3)


def test_streak_of_a_small_image_is_interpolated() -> None:
    ramp = torch.arange(8.0, dtype=torch.float64).div(8).expand(1, 1, 8, 8)
    dragged = streak(ramp, torch.zeros(1, dtype=torch.float64), 6, 1.0)
    weights = np.exp(-0.5 * np.arange(13) ** 2)
    shift = 0.25 * (weights * np.arange(13)).sum() / weights.sum()
    np.testing.assert_allclose((dragged - ramp)[0, 0, :, :5].numpy(), shift / 8, rtol=1e-3)


def test_motion_blur_gives_each_image_its_own_angle(photos: Tensor) -> None:
    same = photos[:1].expand(4, -1, -1, -1)
    blurred = Corruption("motion_blur", 5)(same)
    assert all(not torch.equal(blurred[0], other) for other in blurred[1:])


@pytest.mark.parametrize("severity", range(1, 6))
def test_zoom_blur_is_the_mean_of_scipys_zooms(photos: Tensor, slow: type[Any], severity: int) -> None:
    images = photos[:1].double()
    limit = (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1]
    zooms = np.arange(1, limit, 0.01)  # as published, whatever the rounding makes of the end
    result = Corruption("zoom_blur", severity)(images)[0].numpy()
    for channel, image in zip(result, images[0].numpy(), strict=True):
        wanted = (image + sum(slow.zoom(image, zoom) for zoom in zooms)) / (len(zooms) + 1)
        np.testing.assert_allclose(channel, wanted, atol=1e-10)
