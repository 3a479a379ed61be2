"""JPEG compression: what the codec loses, without its lossless part."""

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# Quantisation tables of ITU-T T.81 (1992), Annex K, tables K.1 and K.2.
LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMINANCE = np.full((8, 8), 99)
CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168735892, -0.331264108, 0.5], [0.5, -0.418687589, -0.081312411]])
Table = npt.NDArray[np.int64]
DCT = np.sqrt(np.where(np.arange(8) == 0, 1, 2) / 8)[:, None] * np.cos(
    math.pi / 16 * np.arange(8)[:, None] * (2 * np.arange(8) + 1)
)


def jpeg_compression(images: Tensor, generator: Generator, quality: float) -> Tensor:
    """Compress as baseline JPEG with 4:2:0 chroma (grey: luma only), and decompress; the result has 8 bits.

    Blocks are 8 pixels on images of every size; sides that are no multiple are padded by the edge pixels.
    Roundings follow libjpeg but for those inside its integer transforms: results are 0.3 levels of 255 from
    Pillow's on average, mostly by single coefficients that round the other way.

    References:
        ITU-T T.81 (1992); quality scaling of the tables and chroma interpolation as in libjpeg.
    """
    levels = (255 * images).round()
    height, width = levels.shape[-2:]
    if levels.shape[1] == 1:
        return (coded(levels - 128, LUMINANCE, quality) + 128).clamp(0, 255) / 255
    matrix = torch.from_numpy(TO_YCC).to(images)
    ycc = torch.einsum("kc,nchw->nkhw", matrix, levels).round()
    luma = coded(ycc[:, :1] - 128, LUMINANCE, quality) + 128
    # Columns are padded before the chroma is halved, rows after it, as libjpeg does.
    chroma = halved(F.pad(ycc[:, 1:], (0, -width % 16, 0, height % 2), mode="replicate"))
    chroma = coded(chroma, CHROMINANCE, quality)[..., : -(-width // 2)].clamp(-128, 127)
    full = torch.cat([luma.clamp(0, 255), doubled(chroma)[..., :height, :width]], 1)
    return torch.einsum("ck,nkhw->nchw", torch.linalg.inv(matrix), full).round().clamp(0, 255) / 255


def halved(chroma: Tensor) -> Tensor:
    """Return the means of 2 x 2 pixels, a half rounded down in even and up in odd columns, against a drift."""
    bias = torch.tensor([0.25, 0.5], device=chroma.device, dtype=chroma.dtype).repeat(chroma.shape[-1] // 4)
    return (F.avg_pool2d(chroma, 2) + bias).floor()


def doubled(chroma: Tensor) -> Tensor:
    """Return twice as many rows and columns, a quarter of the neighbour mixed into each, rounded alike."""
    bias = torch.tensor([8 / 16, 7 / 16], device=chroma.device, dtype=chroma.dtype).repeat(chroma.shape[-1])
    return (F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False) + bias).floor()


def quantisation(table: Table, quality: float) -> Table:
    """Return a table at a quality from 1 (worst) to 100, by libjpeg's rule."""
    percent = int(5000 / quality) if quality < 50 else int(200 - 2 * quality)
    return ((table * percent + 50) // 100).clip(1, 255)


def coded(plane: Tensor, table: Table, quality: float) -> Tensor:
    """Return planes `[N, K, H, W]` of levels around 0 after transform in blocks, quantisation and back."""
    height, width = plane.shape[-2:]
    padded = F.pad(plane, (0, -width % 8, 0, -height % 8), mode="replicate")
    transform = torch.from_numpy(DCT).to(plane)
    steps = torch.from_numpy(quantisation(table, quality)).to(plane)
    blocks = padded.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    ratios = transform @ blocks @ transform.mT / steps
    # Levels are whole, so that exact halves are common: they go away from zero, whatever rounding did before.
    coefficients = ratios.sign() * (ratios.abs() + 0.5001).floor() * steps
    restored = (transform.mT @ coefficients @ transform).round().transpose(3, 4).reshape(padded.shape)
    return restored[..., :height, :width]
