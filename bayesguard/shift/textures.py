"""Random textures, one per image: plasma for fog, and frost made from plasma."""

import torch
from torch import Generator, Tensor

from bayesguard.shift.colour import tint

# Mean colour, standard deviation within a crop and of the crops' means, of the five photographs that the
# published script draws from, as it crops them; the photographs themselves are not part of this package.
FROSTS: tuple[tuple[tuple[float, float, float], float, float], ...] = (
    ((0.301, 0.581, 0.646), 0.061, 0.043),
    ((0.778, 0.796, 0.832), 0.071, 0.035),
    ((0.778, 0.796, 0.832), 0.071, 0.035),
    ((0.563, 0.621, 0.671), 0.103, 0.040),
    ((0.403, 0.448, 0.494), 0.134, 0.063),
)


def plasma(images: Tensor, decay: float, generator: Generator) -> Tensor:
    """Return a plasma fractal `[N, H, W]` in [0, 1] for each image, by the diamond-square algorithm.

    It wraps around at a power of two that holds the image. Amplitudes fall by `decay` squared from one
    octave to the next, as in the published script.

    References:
        Fournier, Fussell and Carpenter (1982), Computer rendering of stochastic models, CACM 25(6).
    """
    height, width = images.shape[-2:]
    side = 1 << (max(height, width) - 1).bit_length()
    field = images.new_zeros(len(images), side, side)
    step, amplitude = side, 1.0
    while step >= 2:
        half = step // 2

        def midpoint(total: Tensor, amplitude: float = amplitude) -> Tensor:
            noise = torch.rand(total.shape, generator=generator, device=total.device, dtype=total.dtype)
            return total / 4 + amplitude * (2 * noise - 1)

        corners = field[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        field[:, half::step, half::step] = midpoint(pairs + pairs.roll(-1, 2))
        centres = field[:, half::step, half::step]
        across = centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        down = centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        field[:, ::step, half::step] = midpoint(across)
        field[:, half::step, ::step] = midpoint(down)
        step, amplitude = half, amplitude / decay**2
    field -= field.amin((1, 2), keepdim=True)
    field /= field.amax((1, 2), keepdim=True)
    return field[:, :height, :width]


def frost_texture(images: Tensor, generator: Generator) -> Tensor:
    """Return a frost `[N, C, H, W]` for each image: ridges of a rough plasma, bright on a tinted ground.

    The ground's colour, which is a little brighter or darker from crop to crop, and the contrast are those of
    one of five photographs of frost, drawn for each image.
    """
    ridges = 1 - (2 * plasma(images, 1.1, generator) - 1).abs()
    crystals = ridges**2
    crystals = crystals - crystals.mean((1, 2), keepdim=True)
    crystals /= crystals.std((1, 2), keepdim=True, correction=0).clamp(min=1e-6)
    kind = torch.randint(len(FROSTS), (len(images),), generator=generator, device=images.device)
    ground = torch.stack([tint(colour, images) for colour, _, _ in FROSTS])[kind]
    within, between = images.new_tensor([deviations for _, *deviations in FROSTS])[kind].T[..., None, None, None]
    light = torch.randn((len(images), 1, 1, 1), generator=generator, device=images.device, dtype=images.dtype)
    return (ground + between * light + within * crystals[:, None]).clamp(0, 1)
