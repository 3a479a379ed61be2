"""Augmentation: exact on small images, equal to Pillow where it is a table of values, and the same again from a seed."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks import image_operations as ops
from bayesguard.benchmarks.augmentation import (
    AugmentedBatches,
    augmix,
    augmix_flip_and_crop,
    beta,
    dirichlet,
    flip,
    flip_and_crop,
    jensen_shannon,
    mixup,
    randaugment,
    random_crop,
)
from bayesguard.data import count_rows
from bayesguard.errors import BadInput
from bayesguard.sampling import stream

IMAGES = torch.rand(6, 3, 16, 16, generator=stream("cpu", 0, "images"))
LABELS = torch.arange(6) % 3


def generator(seed: int = 0) -> torch.Generator:
    return stream("cpu", seed, "augmentation")


def test_flip_is_an_involution_on_the_rows_it_chooses() -> None:
    once = flip(IMAGES, generator())
    chosen = (once != IMAGES).flatten(1).any(1)
    assert 0 < chosen.sum() < 6
    torch.testing.assert_close(once[chosen], IMAGES[chosen].flip(-1), rtol=0, atol=0)
    torch.testing.assert_close(flip(once, generator()), IMAGES, rtol=0, atol=0)


def test_crops_are_windows_of_the_padded_image() -> None:
    padded = nn.functional.pad(IMAGES, [2] * 4)
    windows = {(top, left): padded[:, :, top : top + 16, left : left + 16] for top in range(5) for left in range(5)}
    for image, crop in enumerate(random_crop(IMAGES, generator(), padding=2)):
        assert sum(torch.equal(crop, window[image]) for window in windows.values()) == 1
    torch.testing.assert_close(random_crop(IMAGES, generator(), padding=0), IMAGES, rtol=0, atol=0)
    many = random_crop(torch.ones(4000, 1, 2, 2), generator(), padding=1)
    # Each of the three places a side is as likely: all of 2 pixels are inside in one of them, half in two.
    assert many.mean().item() == pytest.approx((2 / 3) ** 2, abs=0.02)


def test_mixup_mixes_images_and_classes_by_one_share() -> None:
    mixed = mixup(IMAGES, LABELS, generator())
    soft = mixed.soft_targets(3)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    for row in range(6):
        (other,) = [
            k
            for k in range(6)
            if torch.allclose(mixed.images[row], torch.lerp(IMAGES[k], IMAGES[row], mixed.share[row]), atol=1e-6)
        ]
        assert mixed.second[row] == LABELS[other]
        expected = mixed.share[row] + (1 - mixed.share[row]) * (LABELS[other] == LABELS[row])
        assert soft[row, LABELS[row]].item() == pytest.approx(expected.item(), abs=1e-6)
    with pytest.raises(BadInput, match="alpha must be above 0, got 0"):
        mixup(IMAGES, LABELS, generator(), alpha=0)


def test_mixing_weights_have_their_means_and_spreads() -> None:
    shares = dirichlet(3, 20000, generator())
    torch.testing.assert_close(shares.sum(1), torch.ones(20000))
    torch.testing.assert_close(shares.mean(0), torch.full((3,), 1 / 3), atol=0.01, rtol=0)
    torch.testing.assert_close(shares.var(0), torch.full((3,), 1 / 18), atol=0.002, rtol=0)
    for alpha in (0.2, 1.0):
        drawn = beta(alpha, 20000, generator())
        assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
        assert drawn.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.005)


@pytest.mark.parametrize("augment", [augmix, augmix_flip_and_crop, randaugment, flip_and_crop])
def test_images_stay_images_and_seeds_repeat(augment: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    before = IMAGES.clone()
    result = augment(IMAGES, generator())
    assert result.shape == IMAGES.shape
    assert 0 <= result.min() <= result.max() <= 1
    torch.testing.assert_close(IMAGES, before, rtol=0, atol=0)
    torch.testing.assert_close(augment(IMAGES, generator()), result, rtol=0, atol=0)
    assert not torch.equal(augment(IMAGES, generator(1)), result)


def test_augmix_of_constant_images_is_a_mixture_of_what_its_operations_give() -> None:
    # Geometric operations bring in zeros, solarize an inverse, posterize fewer bits: none is above the larger of 0.2 and 0.8.
    result = augmix(torch.full((200, 1, 8, 8), 0.2), generator(), depth=1)
    assert result.max() <= 0.8 + 1e-6
    assert result[:, :, 4, 4].mean() > 0.15


def test_settings_are_checked() -> None:
    with pytest.raises(BadInput, match="width"):
        augmix(IMAGES, generator(), width=0)
    with pytest.raises(BadInput, match="level must be from 0 to 1, got 2"):
        randaugment(IMAGES, generator(), level=2)
    with pytest.raises(BadInput, match=r"got shapes .*\(5,\)"):
        AugmentedBatches(IMAGES, LABELS[:5], 2)


def as_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def from_pillow(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize(
    ("operation", "level", "pillow"),
    [
        (ops.equalize, 0.0, ImageOps.equalize),
        (ops.posterize, 1.0, lambda image: ImageOps.posterize(image, 0)),
        (ops.solarize, 0.3, lambda image: ImageOps.solarize(image, 256 - 76)),
        (ops.autocontrast, 0.0, ImageOps.autocontrast),
    ],
)
def test_tables_are_pillows(
    operation: ops.Operation, level: float, pillow: Callable[[Image.Image], Image.Image]
) -> None:
    dark = (IMAGES * 0.4 * 255).round() / 255
    levels, signs = torch.full((6,), level), torch.ones(6)
    if operation is ops.posterize:
        # The strongest keeps no bit, which Pillow has no name for.
        torch.testing.assert_close(operation(dark, levels, signs), torch.zeros_like(dark))
        levels, pillow = torch.full((6,), 0.3), lambda image: ImageOps.posterize(image, 3)
    expected = torch.stack([from_pillow(pillow(as_pillow(image))) for image in dark])
    tolerance = 1.01 / 255 if operation is ops.autocontrast else 1e-6
    torch.testing.assert_close(operation(dark, levels, signs), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("operation", "matrix"),
    [
        (ops.shear_x, (1, 0.3, 0, 0, 1, 0)),
        (ops.shear_y, (1, 0, 0, 0.3, 1, 0)),
        (ops.translate_x, (1, 0, 5, 0, 1, 0)),
        (ops.translate_y, (1, 0, 0, 0, 1, 5)),
    ],
)
def test_moves_are_pillows(operation: ops.Operation, matrix: tuple[float, ...]) -> None:
    smooth = nn.functional.interpolate(IMAGES[:, :, :4, :4], size=(16, 16), mode="bilinear")
    smooth = (smooth * 255).round() / 255
    moved = operation(smooth, torch.ones(6), torch.ones(6))
    moving = Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    expected = torch.stack([from_pillow(as_pillow(image).transform((16, 16), *moving)) for image in smooth])
    inside = (expected > 0).all(1, keepdim=True) & (moved > 0).all(1, keepdim=True)
    difference = torch.where(inside, (moved - expected).abs(), 0.0)
    # But for the outermost pixel, where Pillow does not mix with what lies outside.
    assert (difference > 1.01 / 255).float().mean() < 0.06


def test_rotation_is_pillows_in_the_middle() -> None:
    smooth = nn.functional.interpolate(IMAGES[:, :, :4, :4], size=(16, 16), mode="bilinear")
    rotated = ops.rotate(smooth, torch.ones(6), torch.ones(6))
    expected = torch.stack([from_pillow(as_pillow(image).rotate(30, Image.Resampling.BILINEAR)) for image in smooth])
    torch.testing.assert_close(rotated[..., 4:12, 4:12], expected[..., 4:12, 4:12], rtol=0, atol=2 / 255)


def test_each_image_has_its_own_operation() -> None:
    kinds = torch.tensor([0, 1, 0, 1, 1, 0])
    result = ops.applied(IMAGES, kinds, torch.ones(6), (ops.identity, ops.solarize), generator())
    torch.testing.assert_close(result[kinds == 0], IMAGES[kinds == 0], rtol=0, atol=0)
    torch.testing.assert_close(result[kinds == 1], 1 - (IMAGES[kinds == 1] * 255).round() / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("operation", ops.RANDAUGMENT)
def test_no_strength_leaves_images_alone(operation: ops.Operation) -> None:
    if operation in (ops.autocontrast, ops.equalize):
        return
    exact = (IMAGES * 255).round() / 255
    if operation is ops.posterize:
        exact = (exact * 255 / 16).floor() * 16 / 255  # The weakest keeps four bits.
    torch.testing.assert_close(operation(exact, torch.zeros(6), torch.ones(6)), exact, rtol=0, atol=1e-5)


def test_consistency_is_nothing_for_equal_views_and_log_two_for_opposite_ones() -> None:
    logits = torch.randn(4, 5, generator=generator())
    assert jensen_shannon(torch.stack([logits] * 3)).item() == pytest.approx(0, abs=1e-6)
    opposite = torch.tensor([[[50.0, -50.0]], [[-50.0, 50.0]]])
    assert jensen_shannon(opposite).item() == pytest.approx(math.log(2), abs=1e-6)


def test_batches_are_all_rows_in_an_order_of_the_epoch() -> None:
    tagged = torch.arange(7.0).view(-1, 1, 1, 1).expand(7, 1, 2, 2)
    batches = AugmentedBatches(tagged, torch.arange(7), 3, seed=5)
    assert (len(batches), count_rows(batches)) == (3, 7)
    passes = []
    for epoch in (1, 2, 1):
        batches.sampler.set_epoch(epoch)
        rows = list(batches)
        assert all(torch.equal(images[:, 0, 0, 0].long(), labels) for images, labels in rows)
        passes.append(torch.cat([labels for _, labels in rows]).tolist())
    assert passes[0] == passes[2] != passes[1]
    assert sorted(passes[0]) == list(range(7))


def test_training_follows_the_seed_of_fit_and_augments_anew() -> None:
    seen: list[Tensor] = []

    def augment(images: Tensor, random: torch.Generator) -> Tensor:
        seen.append(images)
        return flip_and_crop(images, random)

    batches = AugmentedBatches(IMAGES, LABELS, 6, augment, channels_last=True)
    assert next(iter(batches))[0].is_contiguous(memory_format=torch.channels_last)
    weights = []
    for seed in (3, 3, 4):
        seen.clear()
        network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(0.1)
        predictor = bg.Deterministic(network, seed=seed)
        predictor.fit(batches, epochs=2)
        weights.append(torch.cat([parameter.flatten() for parameter in predictor.parameters()]).detach())
        orders = [[int((image == IMAGES).flatten(1).all(1).nonzero()) for image in images] for images in seen]
        assert len(orders) == 3  # One pass to count, then two epochs.
        assert orders[1] != orders[2]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not torch.equal(weights[0], weights[2])
