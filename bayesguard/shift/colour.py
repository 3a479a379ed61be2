"""Colour in [0, 1]: grey value, tints, and steps in hue, saturation and value without the conversion."""

from collections.abc import Sequence

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


def cut(values: Tensor) -> Tensor:
    """Cut values in [0, 1] downwards to multiples of 1/255; what is whole but for the last bits stays."""
    return (255 * values + 1e-4).floor() / 255


def grey(images: Tensor) -> Tensor:
    """Return the luma `[N, 1, H, W]` of images with one or three channels."""
    if images.shape[1] == 1:
        return images
    return (images * tint(LUMA, images)).sum(1, keepdim=True)


def tint(colour: Sequence[float], images: Tensor) -> Tensor:
    """Return a colour as `[C, 1, 1]`, its luma where the images are grey."""
    if images.shape[1] == 1:
        colour = [sum(weight * part for weight, part in zip(LUMA, colour, strict=True))]
    return images.new_tensor(colour)[:, None, None]


def brightness(images: Tensor, generator: torch.Generator, added: float) -> Tensor:
    """Add to the value of hue, saturation, value; of a grey image that is the grey value itself."""
    value = images.amax(1, keepdim=True)
    brighter = (value + added).clamp(max=1)
    # Hue and saturation stay where all channels keep their ratios; black has no ratios and turns grey.
    return torch.where(value > 0, images * (brighter / value), brighter)


def saturate(images: Tensor, generator: torch.Generator, factor: float, added: float) -> Tensor:
    """Map the saturation s of hue, saturation, value to clip(factor s + added).

    A grey pixel of a colour image has hue 0 by convention, so that `added` makes it red. A grey image has no
    saturation: there its grey value takes the place of s, and severities 1 and 2 darken, 3 to 5 brighten.
    """
    if images.shape[1] == 1:
        return factor * images + added
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = value - low
    away = torch.where(spread > 0, (value - images) / spread, tint((0.0, 1.0, 1.0), images))
    saturation = torch.where(value > 0, spread / value, 0)
    return value * (1 - away * (factor * saturation + added).clamp(0, 1))


def contrast(images: Tensor, generator: torch.Generator, factor: float) -> Tensor:
    """Shrink the distance from the mean of each channel of each image."""
    mean = images.mean((2, 3), keepdim=True)
    return mean + factor * (images - mean)
