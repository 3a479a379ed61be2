"""Resampling matrices against SciPy and Pillow, lookups against SciPy."""

from typing import Literal

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image
from torch import Tensor

from bayesguard.shift.resample import Border, box_matrix, correlate, filter_matrix, lookup, separable, zoom_matrix


@pytest.mark.parametrize("border", ["nearest", "reflect", "mirror"])
@pytest.mark.parametrize("length", [3, 19])
def test_filters_are_scipys_also_when_longer_than_the_image(border: Border, length: int) -> None:
    rng = np.random.default_rng(0)
    image, kernel = rng.random((8, 11)), rng.random(length)
    result = separable(torch.from_numpy(image), filter_matrix(kernel, 8, border), np.eye(11))
    wanted = scipy.ndimage.correlate1d(image, kernel, axis=0, mode=border)
    np.testing.assert_allclose(result.numpy(), wanted, atol=1e-12)


def test_correlate_is_scipys() -> None:
    rng = np.random.default_rng(1)
    images, kernel = rng.random((2, 1, 9, 10)), rng.random((5, 5))
    result = correlate(torch.from_numpy(images), kernel, "mirror")
    wanted = scipy.ndimage.correlate(images, kernel[None, None], mode="mirror")
    np.testing.assert_allclose(result.numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("size", [8, 19, 27, 32, 45, 64])
@pytest.mark.parametrize("share", [0.95, 0.9, 0.85, 0.75, 0.65])
def test_boxes_are_pillows(size: int, share: float) -> None:
    for old, new in ((size, int(share * size)), (int(share * size), size)):
        columns = [Image.fromarray(row[None]) for row in np.eye(old, dtype=np.float32)]
        wanted = [np.asarray(column.resize((new, 1), Image.Resampling.BOX))[0] for column in columns]
        np.testing.assert_allclose(box_matrix(old, new), np.stack(wanted, 1), atol=1e-6)


def test_zoom_keeps_rows_of_weights_and_the_map_whatever_the_size() -> None:
    for size in (8, 32, 100):
        matrix = zoom_matrix(size, 1.2, 32)
        np.testing.assert_allclose(matrix.sum(1), 1)
        assert matrix.min() >= 0
    np.testing.assert_array_equal(zoom_matrix(9, 1.0, 9), np.eye(9))
    # A ramp over the side shows the map: the same for 32 and for 128 pixels, between the clipped ends.
    ramps = [zoom_matrix(n, 1.2, 32) @ ((np.arange(n) + 0.5) / n) for n in (32, 128)]
    np.testing.assert_allclose(ramps[1].reshape(32, 4).mean(1)[1:-1], ramps[0][1:-1], atol=1e-12)


@pytest.mark.parametrize(("border", "mode"), [("nearest", "nearest"), ("mirror", "mirror"), ("zeros", "grid-constant")])
def test_lookup_is_scipys(photos: Tensor, border: Literal["nearest", "mirror", "zeros"], mode: str) -> None:
    rng = np.random.default_rng(2)
    where = rng.uniform(-3, 34, (2, 32, 32))
    rows, columns = torch.from_numpy(where)[:, None]
    result = lookup(photos[:1, :1].double(), rows, columns, border)[0, 0]
    wanted = scipy.ndimage.map_coordinates(photos[0, 0].double().numpy(), where, order=1, mode=mode)
    np.testing.assert_allclose(result.numpy(), wanted, atol=1e-9)
