"""Digital: elastic deformation and pixelation, both in sides of the image, whatever its size."""

import torch
from torch import Generator, Tensor

from bayesguard.shift.blur import smooth_noise
from bayesguard.shift.resample import box_matrix, lookup, pixel_grid, separable


def elastic_transform(images: Tensor, generator: Generator, strength: float, smoothing: float, jitter: float) -> Tensor:
    """Move the corners of a central triangle at random, then each pixel by a smooth random displacement.

    Strength, smoothing and jitter are in sides of the image. The affine part falls with severity while the
    displacement grows: the published table is not monotone, severity 1 moves the image as a whole the most.
    """
    side = min(images.shape[-2:])
    shape = (len(images), *images.shape[-2:])
    rows, columns = pixel_grid(images)
    moved = lookup(images, *affine(images, generator, jitter * side, rows, columns), "mirror")
    if not strength:
        return moved
    noise = torch.rand((2, *shape), generator=generator, device=images.device, dtype=images.dtype)
    down, right = strength * side * smooth_noise(2 * noise - 1, 32 * smoothing, "reflect", truncate=3.0)
    return lookup(moved, rows + down, columns + right, "mirror")


def affine(images: Tensor, generator: Generator, jitter: float, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return source positions `[N, H, W]` of the affine map that moves three points by up to `jitter`."""
    height, width = images.shape[-2:]
    reach = min(height, width) * 10 / 32
    corners = images.new_tensor([[reach, reach, 1.0], [reach, -reach, 1.0], [-reach, -reach, 1.0]])
    noise = torch.rand((len(images), 3, 2), generator=generator, device=images.device, dtype=images.dtype)
    targets = torch.cat([corners[:, :2] + jitter * (2 * noise - 1), corners[:, 2:].expand(len(images), 3, 1)], -1)
    # Each pixel looks up where it came from: the map from the moved points back to the points.
    back = torch.linalg.solve(targets, corners[:, :2].expand(len(images), 3, 2))
    (a, b, c), (d, e, f) = (back[:, :, i, None, None].unbind(1) for i in range(2))
    y, x = rows - height // 2, columns - width // 2
    return d * x + e * y + f + height // 2, a * x + b * y + c + width // 2


def pixelate(images: Tensor, generator: Generator, side: float) -> Tensor:
    """Shrink the image to `side` times its sides, rounded down, by Pillow's BOX filter, and enlarge it."""
    shrunk = [box_matrix(n, int(n * side)) for n in images.shape[-2:]]
    back = [box_matrix(len(matrix), n) for matrix, n in zip(shrunk, images.shape[-2:], strict=True)]
    return separable(images, *(b @ s for b, s in zip(back, shrunk, strict=True)))
