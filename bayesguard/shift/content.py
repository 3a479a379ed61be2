"""What takes the content out of images in steps, until nobody can tell the class: shuffled, blended, covered.

Common corruptions leave most classes recognisable. These do not: at their highest severities a network can only guess, and what
is calibrated on them has seen what guessing looks like.
"""

from typing import ClassVar

import torch
from torch import Generator, Tensor

from bayesguard.errors import BadInput
from bayesguard.shift.base import ImageShift, check_severity


class _Levels(ImageShift):
    """A shift of a fixed name with one parameter for each severity."""

    kind: ClassVar[str]
    levels: ClassVar[tuple[float, ...]]

    def __init__(self, severity: int, seed: int = 0) -> None:
        super().__init__(self.kind, check_severity(severity), seed)

    @property
    def level(self) -> float:
        """The parameter at this severity."""
        return self.levels[int(self.severity) - 1]


class PatchShuffle(_Levels):
    """Cut each image into a grid of equal cells and put them back in random order, another one for each image.

    Severities 1 to 5 are grids of 2, 3, 4, 6 and 8 cells a side. Cells have `H // n` times `W // n` pixels, and the grid lies in
    the middle: rows and columns that are left over at the borders stay where they are. No value changes, only its place.

    Args:
        severity: 1 to 5.
        seed: Of the default generator; see `Shift`.

    Raises:
        BadInput: A severity that is not 1 to 5; on a call, images with fewer pixels a side than the grid has cells.

    References:
        T. Zhang, Z. Zhu (2019), Interpreting adversarially trained convolutional neural networks, ICML;
        M. Naseer, K. Ranasinghe, S. Khan, M. Hayat, F. S. Khan, M.-H. Yang (2021), Intriguing properties of vision
        transformers, NeurIPS.

    Examples:
        >>> import torch
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4) / 16
        >>> shuffled = PatchShuffle(severity=1)(image)
        >>> torch.equal(shuffled.flatten().sort().values, image.flatten())
        True
    """

    kind = "patch_shuffle"
    levels = (2, 3, 4, 6, 8)

    def check_size(self, images: Tensor) -> None:
        """Raise BadInput for images with fewer pixels a side than the grid has cells."""
        height, width = images.shape[-2:]
        if min(height, width) < self.level:
            raise BadInput(
                f"images must be {self.level} x {self.level} pixels at least to be cut into as many cells, got "
                f"{height} x {width}; take a lower severity"
            )

    def apply(self, images: Tensor, generator: Generator) -> Tensor:
        """Return images with their cells in another order."""
        count, channels, height, width = images.shape
        n = int(self.level)
        h, w = height // n, width // n
        top, left = (height - n * h) // 2, (width - n * w) // 2
        grid = (..., slice(top, top + n * h), slice(left, left + n * w))
        cells = images[grid].unfold(2, h, h).unfold(3, w, w).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        order = torch.rand(count, n * n, generator=generator, device=images.device).argsort(-1)
        moved = cells[torch.arange(count, device=images.device)[:, None], order].unflatten(1, (n, n))
        shuffled = images.clone()
        shuffled[grid] = moved.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, n * h, n * w)
        return shuffled


class Blend(_Levels):
    """Blend each image with another one of its batch, drawn anew; the label stays that of the stronger one.

    Severities 1 to 5 give the other image a weight of 0.2, 0.25, 0.3, 0.35 and 0.4. Partners go round in a random circle through
    the whole batch, so that each image is blended with another one, and each lends itself once.

    Args:
        severity: 1 to 5.
        seed: Of the default generator; see `Shift`.

    Raises:
        BadInput: A severity that is not 1 to 5; on a call, a batch of one image.

    References:
        H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz (2018), mixup: beyond empirical risk minimization, ICLR, whose weights
        are random and whose labels are blended as well.

    Examples:
        >>> import torch
        >>> Blend(severity=5)(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)).flatten()
        tensor([0.4000, 0.6000])
    """

    kind = "blend"
    levels = (0.2, 0.25, 0.3, 0.35, 0.4)

    def check_size(self, images: Tensor) -> None:
        """Raise BadInput for a batch of one."""
        if len(images) == 1:
            raise BadInput(
                "images is a batch of one, and Blend needs another image of the batch; choose a batch_size that leaves no "
                "batch of one, or drop a row"
            )

    def apply(self, images: Tensor, generator: Generator) -> Tensor:
        """Return blended images."""
        circle = torch.randperm(len(images), generator=generator, device=images.device)
        partner = torch.empty_like(circle)
        partner[circle] = circle.roll(1)
        return (1 - self.level) * images + self.level * images[partner]


class Erasing(_Levels):
    """Cover a rectangle of each image, at a random place, by one random grey value.

    Its sides are 0.3, 0.4, 0.5, 0.6 and 0.7 of the image's at severities 1 to 5, rounded, one pixel at least; it lies within the
    image.

    Args:
        severity: 1 to 5.
        seed: Of the default generator; see `Shift`.

    Raises:
        BadInput: A severity that is not 1 to 5.

    References:
        Z. Zhong, L. Zheng, G. Kang, S. Li, Y. Yang (2020), Random erasing data augmentation, AAAI, whose area and aspect ratio
        are random, and whose values may be random for each pixel.

    Examples:
        >>> import torch
        >>> erased = Erasing(severity=3)(torch.zeros(1, 1, 8, 8))
        >>> int((erased > 0).sum())
        16
    """

    kind = "erasing"
    levels = (0.3, 0.4, 0.5, 0.6, 0.7)

    def apply(self, images: Tensor, generator: Generator) -> Tensor:
        """Return images with a covered rectangle."""

        def covered(size: int) -> Tensor:
            """Which of the rows (or columns) of each image are covered `[N, size]`."""
            length = max(1, round(self.level * size))
            start = torch.randint(size - length + 1, (len(images), 1), generator=generator, device=images.device)
            place = torch.arange(size, device=images.device)
            return (place >= start) & (place < start + length)

        rows, columns = covered(images.shape[-2])[:, None, :, None], covered(images.shape[-1])[:, None, None, :]
        greys = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device, dtype=images.dtype)
        return torch.where(rows & columns, greys, images)
