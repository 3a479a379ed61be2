"""Images for the tests of shifts, and slow references that more than one of them needs."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor

Array = npt.NDArray[np.float64]


@pytest.fixture(scope="session")
def photos() -> Tensor:
    """Return 24 crops `[24, 3, 32, 32]` of two photographs, at a quarter of their size, as they have texture there."""
    rng = np.random.default_rng(0)
    crops = []
    for name in ("china.jpg", "flower.jpg"):
        photo = Image.fromarray(load_sample_image(name))
        small = np.asarray(photo.resize((photo.width // 4, photo.height // 4), Image.Resampling.BOX))
        for _ in range(12):
            top, left = rng.integers(0, small.shape[0] - 32), rng.integers(0, small.shape[1] - 32)
            crops.append(small[top : top + 32, left : left + 32])
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="session")
def digits() -> Tensor:
    """Return 64 handwritten digits `[64, 1, 8, 8]`."""
    return torch.from_numpy(load_digits().images[:64]).float()[:, None] / 16


class Slow:
    """Slow references on one channel `[H, W]`, from the definitions."""

    @staticmethod
    def streak(image: Array, angle: float, radius: float, sigma: float) -> Array:
        """Return the image dragged along an angle, tap by tap in whole pixels."""
        height, width = image.shape
        weights = [math.exp(-(tap**2) / (2 * sigma**2)) for tap in range(2 * math.ceil(radius) + 1)]
        dragged = np.zeros_like(image)
        for tap, weight in enumerate(weights):
            down, right = (math.ceil(tap * part - 0.5) for part in (math.sin(angle), math.cos(angle)))
            rows = (np.arange(height) + down).clip(0, height - 1)
            columns = (np.arange(width) + right).clip(0, width - 1)
            dragged += weight / sum(weights) * image[np.ix_(rows, columns)]
        return dragged

    @staticmethod
    def zoom(image: Array, zoom: float) -> Array:
        """Return the middle of the image, cut out, enlarged by SciPy, and trimmed to the size of the image."""
        side = len(image)
        kept = math.ceil(side / zoom)
        start = (side - kept) // 2
        enlarged = scipy.ndimage.zoom(image[start : start + kept, start : start + kept], zoom, order=1)
        trim = (len(enlarged) - side) // 2
        return np.asarray(enlarged[trim : trim + side, trim : trim + side])


@pytest.fixture(scope="session")
def slow() -> type[Slow]:
    """Return the slow references."""
    return Slow
