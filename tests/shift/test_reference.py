"""Corruptions against statistics of the published script, run on the same images (`reference_cifar_c.json`).

For each image, the mean absolute difference to the clean image, and the standard deviation of the difference, over
pixels and channels. Compared are, over images, the mean of the first (`mean`), its standard deviation (`deviation`) and
the mean of the second (`spread`), each within 2 % and twice the Monte-Carlo error of both sides.
"""

import io
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from bayesguard.benchmarks.files import read
from bayesguard.shift import EXTRA, STANDARD, Corruption

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "reference_cifar_c.json").read_text())
TOLERANCE = 0.02
RANDOM = {name for name, rows in REFERENCE["statistics"]["photos"].items() if rows["draws"] > 1}
NUM_IMAGES, AT_ONCE = 1536, 768  # over all draws, and in one call


class Found(NamedTuple):
    """A statistic and its Monte-Carlo error."""

    value: float
    error: float


def tiles() -> Tensor:
    """Return 48 tiles `[48, 3, 32, 32]` of scikit-learn's two photographs, at a third of their size."""
    found = []
    for name in ("china.jpg", "flower.jpg"):
        photo = torch.from_numpy(load_sample_image(name).copy()).long()
        height, width = photo.shape[0] // 3, photo.shape[1] // 3
        sums = photo[: 3 * height, : 3 * width].reshape(height, 3, width, 3, 3).sum((1, 3))
        small = ((sums + 4) // 9).permute(2, 0, 1)
        found += [
            small[:, top : top + 32, left : left + 32]
            for top in range(0, height - 31, 32)
            for left in range(0, width - 31, 32)
        ]
    return torch.stack(found).float() / 255


def cifar() -> Tensor:
    """Return the first 200 test images of CIFAR-10, kept as strips of lossless WebP."""
    data = read("images/cifar10_test.npz")
    bounds, found = data["offset"], []
    for start, end in itertools.pairwise(bounds):
        strip = np.asarray(Image.open(io.BytesIO(data["webp"][start:end].tobytes())))
        found.append(strip.reshape(-1, 32, 32, 3))
        if sum(map(len, found)) >= 200:
            break
    return torch.from_numpy(np.concatenate(found)[:200]).permute(0, 3, 1, 2).float() / 255


def statistics(images: Tensor, name: str, severity: int) -> dict[str, Found]:
    """Return our statistics, over as many draws as the corruption needs."""
    corruption = Corruption(name, severity, eight_bit=True)
    generator = corruption.generator()
    copies = AT_ONCE // len(images) if name in RANDOM else 1
    calls = NUM_IMAGES // (copies * len(images)) if name in RANDOM else 1
    rows = []
    for _ in range(calls):
        many = images.repeat(copies, 1, 1, 1)
        difference = (corruption(many, generator) - many).double().flatten(1).unflatten(0, (copies, -1))
        size = difference.abs().mean(-1)
        spread = difference.std(-1, correction=0).mean(-1)
        rows.append(torch.stack([size.mean(-1), size.std(-1, correction=0), spread], -1))
    draws = torch.cat(rows)
    error = draws.std(0) / math.sqrt(len(draws)) if len(draws) > 1 else torch.zeros(3)
    values = zip(draws.mean(0).tolist(), error.tolist(), strict=True)
    return dict(zip(("mean", "deviation", "spread"), (Found(*pair) for pair in values), strict=True))


def published(images: str, name: str, severity: int) -> dict[str, Found]:
    """Return the script's statistics."""
    rows = REFERENCE["statistics"][images][name]
    return {key: Found(*rows[key][severity - 1]) for key in ("mean", "deviation", "spread")}


def disagreements(ours: dict[str, Found], theirs: dict[str, Found]) -> dict[str, str]:
    """Return which statistics are further apart than they may be, and by how much."""
    wrong = {}
    for key, (value, error) in theirs.items():
        off = ours[key].value / value - 1
        allowed = TOLERANCE + 2 * math.hypot(error, ours[key].error) / value
        if abs(off) > allowed:
            wrong[key] = f"{off:+.1%}, allowed {allowed:.1%}"
    return wrong


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    return tiles()


def test_the_images_are_those_of_the_reference(photographs: Tensor) -> None:
    known = REFERENCE["images"]["photos"]
    assert len(photographs) == known["count"]
    # Decoders of JPEG differ in single levels.
    assert photographs.mean().item() == pytest.approx(known["mean"], abs=2e-3)


@pytest.mark.parametrize("name", STANDARD + EXTRA)
def test_photographs_change_as_much_as_by_the_script(photographs: Tensor, name: str) -> None:
    for severity in range(1, 6):
        wrong = disagreements(statistics(photographs, name, severity), published("photos", name, severity))
        assert not wrong, f"severity {severity}"


@pytest.mark.skipif("BAYESGUARD_DATA" not in os.environ, reason="needs CIFAR-10 in BAYESGUARD_DATA")
@pytest.mark.parametrize("name", STANDARD + EXTRA)
def test_cifar_changes_as_much_as_by_the_script(name: str) -> None:
    images = cifar()
    for severity in range(1, 6):
        wrong = disagreements(statistics(images, name, severity), published("cifar", name, severity))
        assert not wrong, f"severity {severity}"


@pytest.mark.parametrize("name", ["gaussian_noise", "fog", "brightness", "snow"])
def test_the_wrong_severity_is_found_out(photographs: Tensor, name: str) -> None:
    assert "mean" in disagreements(statistics(photographs, name, 3), published("photos", name, 4))


@pytest.mark.parametrize("name", ["gaussian_blur", "brightness"])
def test_images_that_are_not_cut_to_8_bits_are_found_out(photographs: Tensor, name: str) -> None:
    whole = (Corruption(name, 1)(photographs) - photographs).double().flatten(1)
    wrong = disagreements(
        {
            "mean": Found(whole.abs().mean().item(), 0.0),
            "deviation": Found(whole.abs().mean(1).std(correction=0).item(), 0.0),
            "spread": Found(whole.std(1, correction=0).mean().item(), 0.0),
        },
        published("photos", name, 1),
    )
    assert "mean" in wrong
