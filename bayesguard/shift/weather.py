"""Weather: snow, frost and fog, whose grain grows with the image."""

import torch
from torch import Generator, Tensor

from bayesguard.shift.base import image_scale
from bayesguard.shift.blur import random_angle, streak
from bayesguard.shift.colour import cut, grey
from bayesguard.shift.resample import separable, zoom_matrix
from bayesguard.shift.textures import frost_texture, plasma


def snow(
    images: Tensor,
    generator: Generator,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: float,
    sigma: float,
    weight: float,
) -> Tensor:
    """Whiten the image and add falling flakes: thresholded noise, zoomed, streaked, and again upside down.

    The zoom is multiplied by the image's scale, but flakes are one pixel at least.
    """
    shape = (len(images), 1, *images.shape[-2:])
    noise = torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype)
    size = max(zoom * image_scale(images), 1.0)
    flakes = separable(mean + deviation * noise, *(zoom_matrix(n, size, n) for n in images.shape[-2:]))
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    # The published script keeps flakes in 8 bits, cut downwards before and after the streaks: two levels in two layers.
    flakes = cut(flakes)
    flakes = cut(streak(flakes, random_angle(images, generator, -135, -45), radius, sigma))
    whitened = torch.maximum(images, 1.5 * grey(images) + 0.5)
    return weight * images + (1 - weight) * whitened + flakes + flakes.rot90(2, (2, 3))


def frost(images: Tensor, generator: Generator, image_weight: float, frost_weight: float) -> Tensor:
    """Add frost. The published script crops photographs, here a procedural texture takes their place.

    The texture has the mean colours and the contrasts of those photographs, not their crystals.
    """
    return image_weight * images + frost_weight * frost_texture(images, generator)


def fog(images: Tensor, generator: Generator, thickness: float, decay: float) -> Tensor:
    """Add a plasma fractal and rescale to the image's own maximum."""
    peak = images.amax((1, 2, 3), keepdim=True)
    return (images + thickness * plasma(images, decay, generator)[:, None]) * peak / (peak + thickness)
