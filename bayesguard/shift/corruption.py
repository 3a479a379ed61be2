"""The 19 common corruptions, by name and severity."""

from collections.abc import Callable

from torch import Generator, Tensor

from bayesguard.errors import BadInput
from bayesguard.shift import blur, colour, digital, jpeg, noise, spatter, weather
from bayesguard.shift.base import ImageShift, check_severity
from bayesguard.shift.severities import SEVERITIES

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": colour.brightness,
    "contrast": colour.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": jpeg.jpeg_compression,
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter.spatter,
    "saturate": colour.saturate,
}
STANDARD: tuple[str, ...] = tuple(FUNCTIONS)[:15]
EXTRA: tuple[str, ...] = tuple(FUNCTIONS)[15:]


# Pillow rounds what the published script otherwise cuts downwards to 8 bits.
ROUNDED = ("pixelate",)


class Corruption(ImageShift):
    """One of the 19 common corruptions of CIFAR-10-C, at a severity from 1 to 5.

    Parameters are those of the published files (`SEVERITIES`). They are for 32-pixel images; on others every
    length in pixels (of blurs, displacements, streaks, flakes, drops) is multiplied by `min(H, W) / 32`, and
    quantities without a length (noise, colours, zooms, JPEG quality) are not. Each function's docstring and
    docs/shifts.md say what becomes of lengths under a pixel, and where the result differs from the published
    files: frost is procedural, and values have 8 bits only where `eight_bit` asks for it.

    Args:
        name: one of `STANDARD` (the 15 of the benchmark) or `EXTRA` (the 4 for validation).
        severity: 1 to 5.
        seed: of the default generator; see `Shift`.
        eight_bit: cut values downwards to multiples of 1/255, as the published files have them; that darkens
            by half a level, 0.002, on average.

    Raises:
        BadInput: an unknown name, a severity that is not 1 to 5; on a call, images that are not
            `[N, 1 or 3, H, W]` with sides of 8 pixels at least, in [0, 1].

    References:
        Hendrycks and Dietterich (2019), Benchmarking neural network robustness to common corruptions and
        perturbations, ICLR.

    Examples:
        >>> import torch
        >>> grey = torch.full((1, 1, 8, 8), 0.5)
        >>> grey[..., :4] = 0.3
        >>> Corruption("contrast", severity=2)(grey)[0, 0, 0]
        tensor([0.3500, 0.3500, 0.3500, 0.3500, 0.4500, 0.4500, 0.4500, 0.4500])
    """

    def __init__(self, name: str, severity: int, seed: int = 0, *, eight_bit: bool = False) -> None:
        if name not in FUNCTIONS:
            raise BadInput(f"name must be one of {', '.join(FUNCTIONS)}; got {name!r}")
        super().__init__(name, check_severity(severity), seed)
        self.eight_bit = eight_bit

    def check_size(self, images: Tensor) -> None:
        """Raise BadInput unless the images are grey or RGB, with sides of 8 pixels at least."""
        channels, height, width = images.shape[1:]
        if channels not in (1, 3):
            way_out = "channels come second: images.permute(0, 3, 1, 2)" if width in (1, 3) else "select three"
            raise BadInput(f"images must have 1 or 3 channels, got shape {tuple(images.shape)}; {way_out}")
        if min(height, width) < 8:
            raise BadInput(f"images must be 8 x 8 pixels at least, got {height} x {width}; enlarge them first")

    def apply(self, images: Tensor, generator: Generator) -> Tensor:
        """Return corrupted images."""
        row = SEVERITIES[self.name][int(self.severity) - 1]
        shifted = FUNCTIONS[self.name](images, generator, *(row if isinstance(row, tuple) else (row,)))
        if not self.eight_bit:
            return shifted
        shifted = shifted.clamp(0, 1)
        return (255 * shifted).round() / 255 if self.name in ROUNDED else colour.cut(shifted)
