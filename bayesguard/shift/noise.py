"""Noise: each value of each channel by itself, so that no length scales with the image."""

import torch
from torch import Generator, Tensor


def _normal(images: Tensor, generator: Generator) -> Tensor:
    return torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)


def _uniform(images: Tensor, generator: Generator) -> Tensor:
    return torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)


def gaussian_noise(images: Tensor, generator: Generator, deviation: float) -> Tensor:
    """Add Gaussian noise, as in low light."""
    return images + deviation * _normal(images, generator)


def shot_noise(images: Tensor, generator: Generator, photons: float) -> Tensor:
    """Count photons: Poisson with mean `photons` times the value, divided by `photons`."""
    return torch.poisson(images * photons, generator=generator) / photons


def impulse_noise(images: Tensor, generator: Generator, share: float) -> Tensor:
    """Replace a share of the values by 0 or 1 with equal odds (salt and pepper).

    The shares are small: at severity 1 every second grey image of 8 pixels has no value replaced.
    """
    hit = _uniform(images, generator) < share
    salt = (_uniform(images, generator) < 0.5).to(images)
    return torch.where(hit, salt, images)


def speckle_noise(images: Tensor, generator: Generator, deviation: float) -> Tensor:
    """Add Gaussian noise in proportion to the value."""
    return images + images * deviation * _normal(images, generator)
