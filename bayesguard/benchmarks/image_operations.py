"""Operations on batches of images `[N, C, H, W]` in [0, 1] for augmentation, each image with a strength of its own.

The operations and their largest strengths are those of the published AugMix and RandAugment, which work on 8-bit images with
Pillow; here they are exact to the bit where those are tables of values (equalize, posterize, solarize), and to rounding elsewhere.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample

# (images, strengths [n] in [0, 1], signs [n] of -1 or 1) -> images
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


def applied(
    images: Tensor, kinds: Tensor, levels: Tensor, operations: Sequence[Operation], generator: Generator
) -> Tensor:
    """Return each image under the operation whose place `kinds` names `[N]`, of strength `levels` `[N]`, its sign drawn."""
    signs = 2 * torch.randint(2, (len(images),), generator=generator, device=images.device).to(images) - 1
    result = images.clone()
    for place, operation in enumerate(operations):
        rows = (kinds == place).nonzero().squeeze(1)
        if len(rows):
            result[rows] = operation(images[rows], levels[rows].to(images), signs[rows])
    return result


def identity(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Leave the images as they are."""
    return images


def autocontrast(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Stretch each channel to the whole range; one of a single value stays."""
    low, high = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    flat = high == low
    return torch.where(flat, images, (images - low) / torch.where(flat, 1.0, high - low))


def equalize(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Spread the 256 values of each channel evenly, by Pillow's table."""
    values = _eight_bit(images).flatten(2).long()
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(2, keepdim=True))
    step = (counts.sum(2, keepdim=True) - last) // 255
    below = counts.cumsum(2) - counts
    table = ((step // 2 + below) // step.clamp_min(1)).clamp_max(255)
    spread = torch.where(step == 0, values, table.gather(2, values))
    return (spread.to(images) / 255).view_as(images)


def posterize(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Keep the 4 highest of 8 bits, at the largest strength none."""
    unit = 2 ** (4 + _whole(levels, 4))
    return (_eight_bit(images) / unit).floor() * unit / 255


def solarize(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Invert values from a threshold on."""
    values = _eight_bit(images)
    return torch.where(values < 256 - _whole(levels, 256), values, 255 - values) / 255


def rotate(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Rotate about the centre by up to 30 degrees."""
    angle = signs * _whole(levels, 30).flatten() * math.pi / 180
    height, width = images.shape[-2:]
    cos, sin, nil = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _warped(images, [cos, -sin * height / width, nil, sin * width / height, cos, nil])


def shear_x(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Move each row to the side by up to 0.3 of its distance from the top."""
    slope, (height, width) = 0.3 * levels * signs, images.shape[-2:]
    one, nil = torch.ones_like(slope), torch.zeros_like(slope)
    return _warped(images, [one, slope * height / width, slope * height / width, nil, one, nil])


def shear_y(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Move each column up or down by up to 0.3 of its distance from the left."""
    slope, (height, width) = 0.3 * levels * signs, images.shape[-2:]
    one, nil = torch.ones_like(slope), torch.zeros_like(slope)
    return _warped(images, [one, nil, nil, slope * width / height, one, slope * width / height])


def translate_x(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Move to the side by up to a third of the width, in whole pixels."""
    width = images.shape[-1]
    pixels = signs * _whole(levels, width / 3).flatten()
    one, nil = torch.ones_like(pixels), torch.zeros_like(pixels)
    return _warped(images, [one, nil, 2 * pixels / width, nil, one, nil])


def translate_y(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Move up or down by up to a third of the height, in whole pixels."""
    height = images.shape[-2]
    pixels = signs * _whole(levels, height / 3).flatten()
    one, nil = torch.ones_like(pixels), torch.zeros_like(pixels)
    return _warped(images, [one, nil, nil, nil, one, 2 * pixels / height])


def brightness(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Multiply by 1 plus or minus up to 0.9."""
    return _blended(torch.zeros_like(images), images, levels * signs)


def contrast(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Stretch or squeeze values about the image's mean grey."""
    mean = (_grey(images) * 255).mean((-3, -2, -1), keepdim=True).round() / 255
    return _blended(mean.expand_as(images), images, levels * signs)


def colour(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Move away from grey or towards it."""
    return _blended(_grey(images).expand_as(images), images, levels * signs)


def sharpness(images: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Move away from the smoothed image or towards it; the border stays."""
    kernel = images.new_tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]).view(1, 1, 3, 3) / 13
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = conv2d(images.flatten(0, 1).unsqueeze(1), kernel).view_as(images[..., 1:-1, 1:-1])
    return _blended(smooth, images, levels * signs)


AUGMIX: tuple[Operation, ...] = (
    autocontrast,
    equalize,
    posterize,
    rotate,
    solarize,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)
RANDAUGMENT: tuple[Operation, ...] = (identity, *AUGMIX, brightness, contrast, colour, sharpness)


def _eight_bit(images: Tensor) -> Tensor:
    return (images * 255).round()


def _whole(levels: Tensor, largest: float) -> Tensor:
    """Strengths as whole numbers up to `largest`, `[n, 1, 1, 1]`."""
    return (levels * largest).floor().view(-1, 1, 1, 1)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _blended(origin: Tensor, images: Tensor, strengths: Tensor) -> Tensor:
    """Go from an origin to the images, and by 0.9 of the strength further, or less far."""
    factor = 1 + 0.9 * strengths.view(-1, 1, 1, 1)
    return (origin + factor * (images - origin)).clamp(0, 1)


def _warped(images: Tensor, entries: list[Tensor]) -> Tensor:
    """Look each pixel up where a 2 x 3 matrix says, in coordinates from -1 to 1; zeros outside."""
    theta = torch.stack(entries, -1).view(-1, 2, 3)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False).clamp(0, 1)
