"""Blurs. Lengths are in pixels of a 32-pixel image and are multiplied by the image's scale."""

import math

import numpy as np
import torch
from torch import Generator, Tensor

from bayesguard.shift.base import image_scale
from bayesguard.shift.colour import cut
from bayesguard.shift.resample import (
    Array,
    Border,
    correlate,
    filter_matrix,
    lookup,
    pixel_grid,
    separable,
    zoom_matrix,
)


def narrowed(kernel: Array, scale: float) -> Array:
    """Return the kernel for an image `scale` times 32 pixels, from one that was made at `max(scale, 1)`.

    A kernel much narrower than a pixel cannot be sampled on the pixel grid. On a smaller image the kernel of
    the table is mixed with the identity, with weight `scale`^2: its standard deviation is multiplied by
    `scale` exactly, and however small the image is, the kernel still blurs it.
    """
    weight = min(scale, 1.0) ** 2
    mixed = weight * kernel
    mixed[tuple(n // 2 for n in kernel.shape)] += 1 - weight
    return mixed


def gaussian_kernel(sigma: float, scale: float, truncate: float = 4.0) -> Array:
    """Return a sampled Gaussian of `sigma` pixels of a 32-pixel image, cut at `truncate` deviations."""
    width = sigma * max(scale, 1.0)
    radius = int(truncate * width + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(width, 1e-6)) ** 2)
    return narrowed(kernel / kernel.sum(), scale)


def smooth(images: Tensor, sigma: float, border: Border = "nearest", truncate: float = 4.0) -> Tensor:
    """Return `images [..., H, W]` blurred by a Gaussian of `sigma` pixels of a 32-pixel image."""
    kernel = gaussian_kernel(sigma, image_scale(images), truncate)
    height, width = images.shape[-2:]
    return separable(images, filter_matrix(kernel, height, border), filter_matrix(kernel, width, border))


def smooth_noise(noise: Tensor, sigma: float, border: Border = "nearest", truncate: float = 4.0) -> Tensor:
    """Return smoothed white noise `[..., H, W]` that varies as much as it would on a 32-pixel image."""
    published, own = (gaussian_kernel(sigma, scale, truncate) for scale in (1.0, image_scale(noise)))
    return smooth(noise, sigma, border, truncate) * float(np.sum(published**2) / np.sum(own**2))


def gaussian_blur(images: Tensor, generator: Generator, sigma: float) -> Tensor:
    """Blur by a Gaussian, cut at four standard deviations, with the edge pixels repeated outside."""
    return smooth(images, sigma)


def disk_kernel(radius: float, antialias: float, reach: int) -> Array:
    """Return a disk of pixels, smoothed by a Gaussian of standard deviation `antialias` cut at `reach`."""
    half = math.ceil(radius) + 2 * reach  # room for the smoothing not to see the border
    square = np.arange(-half, half + 1) ** 2
    disk = (square[:, None] + square <= radius**2).astype(float)
    smoothing = np.exp(-0.5 * (np.arange(-reach, reach + 1) / antialias) ** 2)
    rows = filter_matrix(smoothing / smoothing.sum(), len(square), "mirror")
    return np.asarray(rows @ (disk / disk.sum()) @ rows.T)


def defocus_blur(images: Tensor, generator: Generator, radius: float, antialias: float) -> Tensor:
    """Blur by a disk, as a lens out of focus; below severity 4 the disk is a pixel, antialiasing blurs."""
    scale = image_scale(images)
    stretch = max(scale, 1.0)
    kernel = disk_kernel(radius * stretch, antialias * stretch, reach=round(stretch))
    return correlate(images, narrowed(kernel, scale), "mirror")


def glass_blur(images: Tensor, generator: Generator, sigma: float, delta: float, passes: float) -> Tensor:
    """Blur, give pixels the value of a random neighbour up and to the left, and blur again: frosted glass.

    The published script sets out to swap neighbours, but its swap goes through NumPy views and copies
    instead: pixel (h, w) takes the value at (h + dy, w + dx), with dy and dx in {-delta, ..., delta - 1}, and
    nothing goes back. The published files have that, and so has this. Rows and columns up to `delta` stay.
    Between the first blur and the moves the script has 8 bits, and so has this.
    On images under 32 pixels, where no displacement is shorter than a pixel, a pixel moves with probability
    `scale`, so that the mean displacement is multiplied by it.
    """
    scale = image_scale(images)
    count, channels, height, width = images.shape
    reach = max(1, round(delta * scale))
    rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
    inside = ((rows > reach) & (rows <= height - reach))[:, None] & (columns > reach) & (columns <= width - reach)
    home = rows[:, None] * width + columns
    shape = (count, height, width)
    shifted = cut(smooth(images, sigma))
    for _ in range(int(passes)):
        down, right = (torch.randint(-reach, reach, shape, generator=generator, device=images.device) for _ in range(2))
        moves = torch.rand(shape, generator=generator, device=images.device, dtype=images.dtype) < scale
        source = torch.where(inside & moves, home + down * width + right, home)
        index = source.view(count, 1, -1).expand(-1, channels, -1)
        shifted = shifted.flatten(2).gather(2, index).view_as(images)
    return smooth(shifted, sigma)


def streak(images: Tensor, angle: Tensor, radius: float, sigma: float) -> Tensor:
    """Return images dragged along `angle [N]`, in radians from the right downwards, by half a Gaussian.

    The half-Gaussian has `2 radius + 1` taps, rounded to whole pixels as ImageMagick does it; on images under
    32 pixels, to whole pixels of a 32-pixel image, and interpolated. The edge pixels are repeated outside.
    """
    scale = image_scale(images)
    stretch, step = max(scale, 1.0), min(scale, 1.0)
    weights = np.exp(-0.5 * (np.arange(2 * math.ceil(radius * stretch) + 1) / (sigma * stretch)) ** 2)
    # Far taps weigh nothing: the radius is several standard deviations at most severities.
    weights = weights[weights > 1e-4] / weights[weights > 1e-4].sum()
    rows, columns = pixel_grid(images)
    directions = angle.sin()[:, None, None], angle.cos()[:, None, None]
    shape = (len(images), *images.shape[-2:])
    dragged = torch.zeros_like(images)
    for tap, weight in enumerate(weights.tolist()):
        down, right = (step * (tap * part - 0.5).ceil() for part in directions)
        dragged += weight * lookup(images, (rows + down).expand(shape), (columns + right).expand(shape), "nearest")
    return dragged


def random_angle(images: Tensor, generator: Generator, low: float, high: float) -> Tensor:
    """Return an angle in radians for each image, uniform between two angles in degrees."""
    share = torch.rand(len(images), generator=generator, device=images.device, dtype=images.dtype)
    return torch.deg2rad(low + (high - low) * share)


def motion_blur(images: Tensor, generator: Generator, radius: float, sigma: float) -> Tensor:
    """Drag each image along a random angle within 45 degrees of the horizontal."""
    return streak(images, random_angle(images, generator, -45, 45), radius, sigma)


def zoom_blur(images: Tensor, generator: Generator, largest: float) -> Tensor:
    """Average the image, counted twice, with itself zoomed up to `largest` in steps of 0.01.

    Zooms have no length: on other sizes than 32 pixels the same maps apply to the sides of the image.
    """
    total = images.clone()
    # The last bits matter, because zooms are rounded to whole pixels: 1.25 of 26 pixels are 32 or 33.
    zooms = np.arange(1, largest + 0.005, 0.01).tolist()
    for zoom in zooms:
        total += separable(images, *(zoom_matrix(n, zoom, 32) for n in images.shape[-2:]))
    return total / (len(zooms) + 1)
