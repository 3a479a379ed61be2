"""JPEG compression against Pillow's."""

import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from bayesguard.shift import SEVERITIES, Corruption
from bayesguard.shift.jpeg import LUMINANCE, quantisation


def pillow(image: npt.NDArray[np.uint8], quality: int) -> npt.NDArray[np.float64]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer)).astype(float)


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (27, 30), (9, 17)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_pillows_to_a_fraction_of_a_level(
    photos: Tensor, severity: int, size: tuple[int, int], channels: int
) -> None:
    images = photos[:, :channels, : size[0], : size[1]]
    quality = SEVERITIES["jpeg_compression"][severity - 1]
    assert isinstance(quality, int)
    original = (255 * images).round().byte().permute(0, 2, 3, 1).squeeze(-1).numpy()
    wanted = np.stack([pillow(image, quality) for image in original])
    result = (255 * Corruption("jpeg_compression", severity)(images)).permute(0, 2, 3, 1).squeeze(-1).numpy()
    # What is left comes from coefficients that libjpeg's integer transform puts on the other side of a half; one
    # of them changes a whole image of 8 pixels.
    assert np.abs(result - wanted).mean() < (0.4 if size == (32, 32) else 0.7)
    assert np.median(np.abs(result - wanted)) == 0
    assert np.abs(result - wanted).mean() < np.abs(wanted - original).mean() / 10


def test_the_tables_are_those_that_pillow_writes() -> None:
    for quality in (10, 40, 50, 80, 100):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
        opened = Image.open(buffer)
        assert sorted(opened.quantization[0]) == sorted(quantisation(LUMINANCE, quality).flatten().tolist())  # type: ignore[attr-defined]


def test_the_result_has_eight_bits(photos: Tensor) -> None:
    levels = 255 * Corruption("jpeg_compression", 3)(photos.double())
    torch.testing.assert_close(levels, levels.round())
