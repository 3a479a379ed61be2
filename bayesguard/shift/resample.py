"""Linear resampling: filters and zooms as one matrix per axis, free displacements by bilinear lookup."""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Array = npt.NDArray[np.float64]
Border = Literal["nearest", "reflect", "mirror"]


def separable(images: Tensor, rows: Array, columns: Array) -> Tensor:
    """Return `rows @ image @ columns.T` for each of `images [..., H, W]`.

    A matrix per axis serves every filter, zoom and border, runs in full precision where a convolution on a
    GPU would round to TF32, and for images of this size is as fast.
    """
    return torch.from_numpy(rows).to(images) @ images @ torch.from_numpy(columns).to(images).mT


def filter_matrix(kernel: Array, size: int, border: Border) -> Array:
    """Return `[size, size]`, the correlation with a kernel of odd length; borders are named as in SciPy."""
    index = np.arange(size)[:, None] + np.arange(len(kernel)) - len(kernel) // 2
    if border == "nearest":
        index = index.clip(0, size - 1)
    elif border == "reflect":
        index = index % (2 * size)
        index = np.minimum(index, 2 * size - 1 - index)
    else:
        index = index % (2 * size - 2)
        index = np.minimum(index, 2 * size - 2 - index)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], index), kernel)
    return matrix


def correlate(images: Tensor, kernel: Array, border: Border) -> Tensor:
    """Return the correlation with a 2-D kernel of odd sides, as the sum of its separable parts."""
    left, weights, right = np.linalg.svd(kernel)
    parts = [
        separable(
            images,
            filter_matrix(left[:, i] * weight, images.shape[-2], border),
            filter_matrix(right[i], images.shape[-1], border),
        )
        for i, weight in enumerate(weights)
        if weight > 1e-12 * weights[0]
    ]
    return torch.stack(parts).sum(0)


def zoom_matrix(size: int, zoom: float, canvas: int) -> Array:
    """Return `[size, size]`, a bilinear magnification by `zoom >= 1`.

    The published script cuts out a whole number of pixels and enlarges them to a whole number, so that what
    it keeps is not quite the centre and the factor not quite `zoom`. Here it does so on `canvas` pixels, and
    the map of that canvas is what an image of any size gets.
    """
    kept = math.ceil(canvas / zoom)
    enlarged = round(kept * zoom)
    start, step = (canvas - kept) // 2, (kept - 1) / (enlarged - 1)
    on_canvas = (np.arange(size) + 0.5) * canvas / size - 0.5
    source = start + ((enlarged - canvas) // 2 + on_canvas) * step
    position = ((source + 0.5) * size / canvas - 0.5).clip(0, size - 1)
    low = np.floor(position).clip(0, size - 2).astype(int)
    matrix = np.zeros((size, size))
    matrix[np.arange(size), low] = 1 - (position - low)
    matrix[np.arange(size), low + 1] = position - low
    return matrix


def box_matrix(size: int, new_size: int) -> Array:
    """Return `[new_size, size]`, Pillow's BOX: the plain mean of the pixels whose centres are in the box."""
    ratio = size / new_size
    support = max(ratio, 1.0) / 2
    index, centre = np.arange(size), (np.arange(new_size)[:, None] + 0.5) * ratio
    # The conditions and the order of operations are Pillow's: where a pixel's centre is on the edge of a box,
    # rounding decides.
    distance = (index - centre + 0.5) * (0.5 / support)
    inside = (distance > -0.5) & (distance <= 0.5) & (index >= np.floor(centre - support + 0.5))
    return np.asarray(inside / inside.sum(1, keepdims=True))


def lookup(images: Tensor, rows: Tensor, columns: Tensor, border: Literal["nearest", "mirror", "zeros"]) -> Tensor:
    """Return the bilinear values at positions `[N, H, W]` in pixels, for `images [N, C, H, W]`."""
    height, width = images.shape[-2:]
    # A side of one pixel has no extent to normalise by: every position in it is its centre.
    grid = torch.stack([columns * (2 / max(width - 1, 1)) - 1, rows * (2 / max(height - 1, 1)) - 1], dim=-1)
    padding = {"nearest": "border", "mirror": "reflection", "zeros": "zeros"}[border]
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=True)


def pixel_grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and the column number of each pixel, `[H, 1]` and `[1, W]`."""
    rows, columns = (torch.arange(n, device=images.device, dtype=images.dtype) for n in images.shape[-2:])
    return rows[:, None], columns[None, :]
