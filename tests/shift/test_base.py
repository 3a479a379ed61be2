"""What every shift of images checks, and where its random numbers come from."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.shift import Composed, Corruption, Rotation, Shift
from bayesguard.shift.base import image_scale

SHIFT: Shift = Corruption("gaussian_noise", 3)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), BadType, "torch.uint8; divide uint8 images by 255"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), BadType, "torch.int64; convert to floats"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.complex64), BadType, "torch.complex64"),
        (torch.zeros(2, 8, 8), BadInput, r"[N, C, H, W], got shape (2, 8, 8); images[None]"),
        (torch.full((2, 1, 8, 8), 200.0), BadInput, "in [0, 1], got 200 in row 0; divide by 255"),
        (torch.full((2, 1, 8, 8), -1.5), BadInput, "got -1.5 in row 0; undo the normalisation"),
        ("photo.png", BadType, "images must be a tensor or a NumPy array, got str"),
    ],
)
def test_what_is_not_a_batch_of_images(images: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        SHIFT(images)  # type: ignore[arg-type]


def test_rows_are_named() -> None:
    images = torch.zeros(5, 1, 8, 8)
    images[3, 0, 2, 2] = torch.nan
    with pytest.raises(BadInput, match="NaN or infinity in row 3"):
        SHIFT(images)
    images[3, 0, 2, 2] = 1.25
    with pytest.raises(BadInput, match=r"got 1\.25 in row 3"):
        SHIFT(images)


def test_generators() -> None:
    images = torch.rand(2, 1, 8, 8)
    with pytest.raises(BadType, match=r"generator must be a torch\.Generator or None, got int"):
        SHIFT(images, 0)  # type: ignore[arg-type]
    with pytest.raises(BadType, match="seed must be an integer"):
        Corruption("fog", 1, seed=0.5)  # type: ignore[arg-type]
    seeds = {
        Corruption(name, s, seed).generator().initial_seed()
        for name in ("fog", "snow")
        for s in (1, 2)
        for seed in (0, 1)
    }
    assert len(seeds) == 8
    assert Corruption("fog", 1).generator().initial_seed() == Corruption("fog", 1).generator().initial_seed()


def test_one_generator_gives_every_batch_its_own_noise() -> None:
    images = torch.full((4, 1, 8, 8), 0.5)
    generator = SHIFT.generator(images.device)
    batches = [SHIFT(batch, generator) for batch in images.split(2)]
    assert not torch.equal(batches[0], batches[1])
    assert torch.equal(SHIFT(images[:2]), SHIFT(images[2:]))


def test_arrays_and_read_only_memory_are_taken() -> None:
    array = np.full((2, 1, 8, 8), 0.5, dtype=np.float32)
    array.flags.writeable = False
    shifted: Tensor = SHIFT(array)  # type: ignore[arg-type]
    assert torch.equal(shifted, SHIFT(torch.full((2, 1, 8, 8), 0.5)))


def test_names_and_scale() -> None:
    assert repr(SHIFT) == "Corruption('gaussian_noise', severity=3, seed=0)"
    assert (Rotation(2).name, Rotation(2).severity) == ("rotation", 2)
    assert image_scale(torch.zeros(1, 1, 16, 64)) == 0.5


def test_composed_is_one_after_the_other() -> None:
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    fog, noise = Corruption("fog", 2), Corruption("gaussian_noise", 3)
    both = Composed([fog, noise], seed=4)
    assert (both.name, both.severity) == ("fog+gaussian_noise", 5)
    generator = both.generator()
    by_hand = noise(fog(images, generator), generator)
    assert torch.equal(both(images), by_hand)
    assert torch.equal(both(images.numpy(), both.generator()), by_hand)  # type: ignore[arg-type]
    assert not torch.equal(Composed([noise, fog], seed=4)(images), by_hand)
    assert not torch.equal(both(images, torch.Generator().manual_seed(1)), by_hand)
    assert both(images[:0]).shape == (0, 1, 8, 8)


def test_a_chain_of_one_kind_draws_anew() -> None:
    """Two noises of one severity and seed are two noises, and not twice the same one."""
    images = torch.full((1, 1, 32, 32), 0.5)
    noise = Corruption("gaussian_noise", 1)
    spread = Composed([noise, noise])(images).std() / noise(images).std()
    assert abs(float(spread) - 2**0.5) < 5 * (2 / 1024) ** 0.5  # twice the same would be 2


def test_what_composed_refuses() -> None:
    with pytest.raises(BadInput, match="shifts must be two or more, got 1"):
        Composed([Corruption("fog", 1)])
    with pytest.raises(BadType, match="shifts has a str"):
        Composed(["fog", "frost"])  # type: ignore[list-item]
