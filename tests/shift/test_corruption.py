"""What holds for all 19 corruptions."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.shift import EXTRA, SEVERITIES, STANDARD, Corruption

NAMES = STANDARD + EXTRA

# Where the published table, or its rounding to the pixels of small images, is not one of rising distortion.
UNSTEADY = {
    "glass_blur": "severity 3 smooths more than 1 and 2, and 5 more than 4, where both move the same pixels",
    "motion_blur": "severities 3 and 4 differ in the radius alone, in taps of no weight",
    "frost": "the image loses weight from severity 3 on",
    "elastic_transform": "the affine part shrinks while the displacement grows",
    "spatter": "water at severities 1 to 3, mud at 4 and 5",
    "saturate": "severities 1 and 2 take colour away, 3 to 5 add some",
}


def distortions(name: str, images: Tensor) -> list[float]:
    return [(Corruption(name, s)(images) - images).abs().mean().item() for s in range(1, 6)]


def test_there_are_fifteen_and_four_with_five_severities_each() -> None:
    assert (len(STANDARD), len(EXTRA)) == (15, 4)
    assert set(NAMES) == set(SEVERITIES)
    assert all(len(rows) == 5 for rows in SEVERITIES.values())


@pytest.mark.parametrize("name", NAMES)
def test_distortion_grows_with_severity(photos: Tensor, name: str) -> None:
    amounts = distortions(name, photos)
    if name not in UNSTEADY:
        assert amounts == sorted(amounts)
        assert amounts[4] > 1.2 * amounts[0]
    assert min(amounts) > 0.001


@pytest.mark.parametrize("name", NAMES)
def test_digits_of_8_pixels_change_at_every_severity(digits: Tensor, name: str) -> None:
    amounts = distortions(name, digits)
    assert min(amounts) > 0.001
    # Pixelation of 8 pixels has the sides 7, 7, 6, 6 and 5: equal steps, and boxes that fit or do not.
    if name not in UNSTEADY and name != "pixelate":
        assert amounts == sorted(amounts)
    if name not in ("impulse_noise", "spatter"):
        changed = (Corruption(name, 1)(digits) - digits).abs().flatten(1).amax(1) > 1e-4
        assert changed.all()


def test_the_unsteady_tables_are_unsteady(photos: Tensor) -> None:
    assert distortions("elastic_transform", photos)[0] > distortions("elastic_transform", photos)[4]
    assert distortions("saturate", photos)[1] > distortions("saturate", photos)[2]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("severity", [1, 4])
def test_repeats_itself_and_leaves_the_world_alone(photos: Tensor, name: str, severity: int) -> None:
    images = photos[:3]
    before = images.clone()
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy(), random.getstate()  # noqa: NPY002
    first = Corruption(name, severity, seed=7)(images)
    assert torch.equal(first, Corruption(name, severity, seed=7)(images))
    assert torch.equal(states[0], torch.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state(legacy=False)["state"]["key"])  # noqa: NPY002
    assert states[2] == random.getstate()
    assert torch.equal(images, before)
    assert first.data_ptr() != images.data_ptr()
    assert (first.shape, first.dtype, first.device) == (images.shape, images.dtype, images.device)
    assert 0 <= first.min() <= first.max() <= 1


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "motion_blur", "snow", "frost", "fog", "spatter"])
def test_seed_severity_and_generator_matter(photos: Tensor, name: str) -> None:
    images = photos[:2]
    shift = Corruption(name, 2, seed=0)
    assert not torch.equal(shift(images), Corruption(name, 2, seed=1)(images))
    generator = shift.generator()
    assert torch.equal(shift(images), shift(images, generator))
    assert not torch.equal(shift(images), shift(images, generator))


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_follow_the_input(photos: Tensor, name: str) -> None:
    shift = Corruption(name, 3)
    for dtype in (torch.float16, torch.bfloat16):
        images = photos[:2].to(dtype)
        assert torch.equal(shift(images), shift(images.float()).to(dtype))
    assert shift(photos[:2].double()).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_layout_default_device_autocast_and_gradients_do_not_matter(photos: Tensor, name: str) -> None:
    shift = Corruption(name, 5)
    images = photos[:2]
    wanted = shift(images)
    assert torch.equal(shift(images.contiguous(memory_format=torch.channels_last)), wanted)
    with torch.device("meta"):
        assert torch.equal(shift(images), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(shift(images), wanted)
    assert not shift(images.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (1, 1, 8, 8), (2, 3, 9, 13), (1, 3, 48, 33)])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for severity in (1, 5):
        shifted = Corruption(name, severity)(images)
        assert shifted.shape == images.shape
        assert shifted.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_images_stay_finite(name: str, value: float) -> None:
    for channels in (1, 3):
        images = torch.full((2, channels, 8, 8), value)
        assert all(Corruption(name, s)(images).isfinite().all() for s in range(1, 6))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_cuda(photos: Tensor, name: str) -> None:
    images = photos[:4].cuda()
    state = torch.cuda.get_rng_state()
    shift = Corruption(name, 3)
    shifted = shift(images)
    assert shifted.device == images.device
    assert torch.equal(shifted, shift(images))
    assert torch.equal(state, torch.cuda.get_rng_state())
    if name in ("brightness", "contrast", "defocus_blur", "gaussian_blur", "pixelate", "saturate", "zoom_blur"):
        torch.testing.assert_close(shifted.cpu(), shift(photos[:4]), atol=1e-5, rtol=0)


def test_bad_arguments() -> None:
    with pytest.raises(BadInput, match=r"name must be one of gaussian_noise, .*; got 'rain'"):
        Corruption("rain", 1)
    for severity in (0, 6):
        with pytest.raises(BadInput, match=f"severity must be .*got {severity}"):
            Corruption("fog", severity)
    with pytest.raises(BadType, match="severity must be an integer, got float"):
        Corruption("fog", 2.5)  # type: ignore[arg-type]


def test_bad_sizes() -> None:
    shift = Corruption("fog", 1)
    with pytest.raises(BadInput, match=r"1 or 3 channels, got shape \(2, 32, 32, 3\).*permute"):
        shift(torch.zeros(2, 32, 32, 3))
    with pytest.raises(BadInput, match="8 x 8 pixels at least, got 4 x 9"):
        shift(torch.zeros(2, 1, 4, 9))


@pytest.mark.parametrize("name", ["gaussian_blur", "pixelate", "impulse_noise"])
def test_eight_bits_as_in_the_published_files(photos: Tensor, name: str) -> None:
    whole, cut = Corruption(name, 3)(photos), Corruption(name, 3, eight_bit=True)(photos)
    levels = 255 * cut.double()
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    lost = (whole - cut) * 255
    low, high = (-0.5, 0.5) if name == "pixelate" else (0.0, 1.0)
    assert low - 2e-3 <= lost.min() <= lost.max() <= high + 2e-3
    if name == "impulse_noise":  # whole levels stay what they are
        torch.testing.assert_close(cut, whole)
