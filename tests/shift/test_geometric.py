"""Rotation against SciPy, translation against NumPy."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.shift import Rotation, Translation


@pytest.mark.parametrize("degrees", [15.0, 45.0, 90.0, 172.5, -30.0])
def test_rotation_is_scipys(photos: Tensor, degrees: float) -> None:
    images = photos[:2, :, :, :27].double()
    wanted = scipy.ndimage.rotate(
        images.numpy(), degrees, axes=(3, 2), reshape=False, order=1, mode="grid-constant", prefilter=False
    )
    np.testing.assert_allclose(Rotation(degrees=degrees)(images).numpy(), wanted, atol=1e-10)


def test_severities_are_the_published_steps() -> None:
    assert [Rotation(s).degrees for s in (1, 12)] == [15.0, 180.0]
    assert Rotation(degrees=45).severity == 3
    row = torch.arange(28.0).div(28).expand(1, 1, 1, 28)
    for severity in (1, 13):
        wanted = np.roll(row.numpy(), 2 * severity, axis=3)
        np.testing.assert_array_equal(Translation(severity)(row).numpy(), wanted)


def test_translation_is_numpys_roll_and_scales_with_the_width(digits: Tensor, photos: Tensor) -> None:
    for severity, pixels in zip(range(1, 6), (1, 1, 2, 2, 3), strict=True):
        wanted = np.roll(digits.numpy(), pixels, axis=3)
        np.testing.assert_array_equal(Translation(severity)(digits).numpy(), wanted)
    for severity, pixels in zip(range(1, 6), (2, 5, 7, 9, 11), strict=True):
        wanted = np.roll(photos.numpy(), pixels, axis=3)
        np.testing.assert_array_equal(Translation(severity)(photos).numpy(), wanted)
    np.testing.assert_array_equal(Translation(pixels=-3)(photos).numpy(), np.roll(photos.numpy(), -3, axis=3))


def test_any_number_of_channels_and_any_size() -> None:
    images = torch.rand(2, 5, 3, 1, generator=torch.Generator().manual_seed(0))
    assert Rotation(2)(images).shape == images.shape
    assert torch.equal(Translation(2)(images), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either severity or"),
        ({"severity": 1, "degrees": 15.0}, "either severity or"),
        ({"severity": 0}, "severity must be above 0, got 0"),
        ({"severity": float("nan")}, "severity must be above 0"),
        ({"degrees": float("inf")}, "must be finite"),
    ],
)
def test_bad_rotations(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Rotation(**arguments)  # type: ignore[arg-type]


def test_a_translation_by_a_fraction_of_a_pixel_is_refused() -> None:
    """It was cut to whole pixels in silence: half a pixel did nothing, and was reported as a shift."""
    with pytest.raises(BadInput, match=r"pixels must be a whole number, got 0\.5"):
        Translation(pixels=0.5)  # type: ignore[arg-type]
    assert Translation(pixels=3.0).pixels == 3  # type: ignore[arg-type]
