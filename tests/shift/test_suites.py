"""The suites and what they hold."""

import pytest
import torch

from bayesguard.errors import BadInput
from bayesguard.shift import STANDARD, Composed, Corruption, FeatureNoise, Rotation, pairs, suite


def test_what_the_suites_hold() -> None:
    corruptions = suite("cifar10-c", seed=3)
    assert len(corruptions) == 15 * 5
    assert [(s.name, s.severity) for s in corruptions[:6]] == [
        *(("gaussian_noise", s) for s in range(1, 6)),
        ("shot_noise", 1),
    ]
    assert all(shift.seed == 3 for shift in corruptions)
    assert all(shift.eight_bit for shift in corruptions if isinstance(shift, Corruption))
    everything = suite("images")
    assert not any(shift.eight_bit for shift in everything if isinstance(shift, Corruption))
    assert len(everything) == 21 * 5
    assert [s.name for s in everything[95::5]] == ["rotation", "translation"]


def test_the_two_lists_of_cifar_10_c_are_different() -> None:
    ours, ovadia = ([s.name for s in suite(name)[::5]] for name in ("cifar10-c", "cifar10-c-ovadia"))
    assert tuple(ours) == STANDARD
    assert len(ovadia) == 16
    assert set(ours) - set(ovadia) == {"motion_blur", "snow", "jpeg_compression"}
    assert set(ovadia) - set(ours) == {"speckle_noise", "gaussian_blur", "spatter", "saturate"}


def test_published_rotations_and_translations() -> None:
    rotations = suite("rotation")
    assert all(isinstance(shift, Rotation) for shift in rotations)
    assert [getattr(shift, "degrees", None) for shift in rotations] == [15.0 * s for s in range(1, 13)]
    column = torch.zeros(1, 1, 1, 28)
    column[..., 0] = 1
    assert [shift(column).argmax().item() for shift in suite("translation")] == list(range(2, 28, 2))


def test_tabular() -> None:
    shifts = suite("tabular", scale=torch.ones(3))
    assert [shift.severity for shift in shifts] == [1, 2, 3, 4, 5]
    assert all(isinstance(shift, FeatureNoise) for shift in shifts)


def test_random_pairs() -> None:
    singles = suite("images")
    found = pairs(singles, 100, seed=1)
    kinds = [frozenset(pair.name.split("+")) for pair in found]
    assert len(set(kinds)) == 100  # each pair of kinds once
    assert all(len(kind) == 2 for kind in kinds)
    assert all(isinstance(pair, Composed) and set(pair.shifts) <= set(singles) for pair in found)
    assert len({pair.severity for pair in found}) > 5
    assert [pair.name for pair in pairs(singles, 100, seed=1)] == [pair.name for pair in found]
    assert [pair.name for pair in pairs(singles, 100)] != [pair.name for pair in found]
    assert len(pairs(singles, 21 * 10)) == 210
    with pytest.raises(BadInput, match="21 kinds of shifts make 210 pairs only"):
        pairs(singles, 211)


def test_bad_suites() -> None:
    with pytest.raises(
        BadInput, match=r"name must be one of cifar10-c, cifar10-c-ovadia, images, .*; got 'imagenet-c'"
    ):
        suite("imagenet-c")
    with pytest.raises(BadInput, match=r"needs scale=.*Available without scale: cifar10-c, cifar10-c-ovadia, images"):
        suite("tabular")
    with pytest.raises(BadInput, match="other suites take none: got name='images'"):
        suite("images", scale=torch.ones(3))
