"""Rotation and translation as in Ovadia et al. (2019), whose images have 28 pixels."""

import math

import torch
from torch import Generator, Tensor

from bayesguard.errors import BadInput
from bayesguard.shift.base import ImageShift
from bayesguard.shift.resample import lookup, pixel_grid

DEGREES, PIXELS = 15.0, 2  # one published step of each


def _one_of(severity: float | None, other: float | None, name: str, step: float) -> float:
    """Return the severity that was given, or that the other argument amounts to."""
    if (severity is None) == (other is None):
        raise BadInput(f"give either severity or {name}, got severity={severity} and {name}={other}")
    if other is not None:
        severity = other / step
    elif severity is not None and not severity > 0:
        raise BadInput(f"severity must be above 0, got {severity}; {name}= takes both directions")
    if severity is None or not math.isfinite(severity):
        raise BadInput(f"severity and {name} must be finite, got severity={severity} and {name}={other}")
    return severity


class Rotation(ImageShift):
    """Rotation about the centre, counter-clockwise, with zeros outside of the image.

    Severity s is 15 s degrees on images of every size: 1 to 12 are the published angles, 1 to 5 those of
    `suite("images")`. Values are interpolated linearly; the published code uses cubic splines.

    Args:
        severity: in steps of 15 degrees, above 0.
        degrees: the angle itself, in place of the severity; negative is clockwise.
        seed: for uniformity; nothing is random.

    Raises:
        BadInput: not exactly one of severity and degrees, or not a finite number.

    References:
        Ovadia et al. (2019), Can you trust your model's uncertainty?, NeurIPS, section 4.1.

    Examples:
        >>> import torch
        >>> Rotation(degrees=90)(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])).round()
        tensor([[[[0., 0.],
                  [1., 0.]]]])
    """

    def __init__(self, severity: float | None = None, *, degrees: float | None = None, seed: int = 0) -> None:
        super().__init__("rotation", _one_of(severity, degrees, "degrees", DEGREES), seed)
        self.degrees = DEGREES * self.severity if degrees is None else float(degrees)

    def apply(self, images: Tensor, generator: Generator) -> Tensor:
        """Return rotated images."""
        height, width = images.shape[-2:]
        rows, columns = pixel_grid(images)
        y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
        sin, cos = math.sin(math.radians(self.degrees)), math.cos(math.radians(self.degrees))
        shape = (len(images), height, width)
        source_rows = (cos * y + sin * x + (height - 1) / 2).expand(shape)
        source_columns = (cos * x - sin * y + (width - 1) / 2).expand(shape)
        return lookup(images, source_rows, source_columns, "zeros")


class Translation(ImageShift):
    """A cyclic shift to the right; what leaves on one side enters on the other.

    Severity s is 2 s pixels of a 28-pixel image, multiplied by width / 28 and rounded, one pixel at least:
    1 to 13 are the published shifts, 1 to 5 those of `suite("images")`. Beyond half the width (severity 7)
    the image comes back: on 28 pixels a shift by 26 is one by 2 to the left. Images of 8 pixels move by 1, 1,
    2, 2 and 3 pixels at severities 1 to 5.

    Args:
        severity: in steps of 2 pixels of a 28-pixel image, above 0.
        pixels: the shift itself, in place of the severity, whatever the width; negative is to the left.
        seed: for uniformity; nothing is random.

    Raises:
        BadInput: not exactly one of severity and pixels, not a finite number, or a fraction of a pixel.

    References:
        Ovadia et al. (2019), Can you trust your model's uncertainty?, NeurIPS, section 4.1.

    Examples:
        >>> import torch
        >>> Translation(pixels=1)(torch.tensor([[[[0.1, 0.2, 0.3]]]]))
        tensor([[[[0.3000, 0.1000, 0.2000]]]])
    """

    def __init__(self, severity: float | None = None, *, pixels: int | None = None, seed: int = 0) -> None:
        super().__init__("translation", _one_of(severity, pixels, "pixels", PIXELS), seed)
        if pixels is not None and pixels != int(pixels):
            raise BadInput(f"pixels must be a whole number, got {pixels}; nothing is interpolated")
        self.pixels = None if pixels is None else int(pixels)

    def apply(self, images: Tensor, generator: Generator) -> Tensor:
        """Return rolled images."""
        scaled = max(1, round(PIXELS * self.severity * images.shape[-1] / 28))
        return torch.roll(images, scaled if self.pixels is None else self.pixels, dims=-1)
