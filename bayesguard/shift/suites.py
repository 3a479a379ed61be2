"""Suites: lists of shifts under one name."""

import itertools
from collections.abc import Sequence

import torch

from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.shift.base import Composed, Shift, seeded
from bayesguard.shift.content import Blend, Erasing, PatchShuffle
from bayesguard.shift.corruption import EXTRA, STANDARD, Corruption
from bayesguard.shift.geometric import Rotation, Translation
from bayesguard.shift.tabular import FeatureNoise

OVADIA: tuple[str, ...] = tuple(
    name for name in STANDARD + EXTRA if name not in ("motion_blur", "snow", "jpeg_compression")
)
NAMES = ("cifar10-c", "cifar10-c-ovadia", "images", "content", "rotation", "translation", "tabular")


def suite(name: str, seed: int = 0, *, scale: object = None) -> list[Shift]:
    """Return the shifts of a suite.

    Args:
        name: "cifar10-c", the 15 corruptions of the benchmark (`STANDARD`: gaussian_noise, shot_noise,
            impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog, brightness,
            contrast, elastic_transform, pixelate, jpeg_compression) at severities 1 to 5, in 8 bits as the
            published files are; "cifar10-c-ovadia", the 16 of Ovadia et al. (2019) in the same way (`OVADIA`:
            without motion_blur, snow and jpeg_compression, with the 4 of `EXTRA`: speckle_noise,
            gaussian_blur, spatter, saturate): numbers of the two lists must not be compared; "images", the 19
            of both lists, not cut to 8 bits, and rotation and translation at severities 1 to 5; "content", what takes
            the content away (patch_shuffle, blend, erasing) at severities 1 to 5; "rotation", the 12 published angles, 15 to 180 degrees;
            "translation", the 13 published shifts, 2 to 26 pixels of 28; "tabular", noise on features.
        seed: of every shift.
        scale: for "tabular" only, the standard deviation of each feature over the training data.

    Returns:
        The shifts, kind by kind in rising severity.

    Raises:
        BadInput: an unknown name, "tabular" without `scale`, or `scale` with another suite.

    Examples:
        >>> len(suite("cifar10-c")), len(suite("cifar10-c-ovadia")), len(suite("images"))
        (75, 80, 105)
    """
    levels = range(1, 6)
    if name not in NAMES:
        raise BadInput(f"name must be one of {', '.join(NAMES)}; got {name!r}")
    if (name == "tabular") == (scale is None):
        raise BadInput(
            'suite("tabular") needs scale=, the standard deviation of each feature over the training data; '
            f"other suites take none: got name={name!r}, scale={'None' if scale is None else 'given'}. "
            f"Available without scale: {', '.join(NAMES[:-1])}"
        )
    if name == "tabular":
        return [FeatureNoise(s, scale, seed) for s in levels]
    if name == "rotation":
        return [Rotation(s, seed=seed) for s in range(1, 13)]
    if name == "translation":
        return [Translation(s, seed=seed) for s in range(1, 14)]
    if name == "content":
        return [kind(s, seed) for kind in (PatchShuffle, Blend, Erasing) for s in levels]
    if name != "images":
        kinds = STANDARD if name == "cifar10-c" else OVADIA
        return [Corruption(kind, s, seed, eight_bit=True) for kind in kinds for s in levels]
    return [
        *(Corruption(kind, s, seed) for kind in STANDARD + EXTRA for s in levels),
        *(Rotation(s, seed=seed) for s in levels),
        *(Translation(s, seed=seed) for s in levels),
    ]


def pairs(shifts: Sequence[Shift], count: int, seed: int = 0) -> list[Shift]:
    """Return random pairs of shifts of two kinds, each pair of kinds once, one severity of each.

    Args:
        shifts: What they are made of: a suite, or a list of one's own.
        count: How many.
        seed: Of the choice, and of every pair.

    Raises:
        BadInput: Fewer pairs of kinds than `count`.

    Examples:
        >>> [pair.name for pair in pairs(suite("images"), 3)]
        ['snow+rotation', 'rotation+fog', 'impulse_noise+motion_blur']
    """
    kinds: dict[str, list[Shift]] = {}
    for shift in shifts:
        kinds.setdefault(shift.name, []).append(shift)
    possible = list(itertools.combinations(kinds, 2))
    if check_count(count, "count") > len(possible):
        raise BadInput(f"count is {count}, but {len(kinds)} kinds of shifts make {len(possible)} pairs only")
    generator = seeded("cpu", seed, "pairs")

    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    chosen: list[Shift] = []
    for place in torch.randperm(len(possible), generator=generator)[:count].tolist():
        names = possible[place] if below(2) else possible[place][::-1]
        chosen.append(Composed([kinds[name][below(len(kinds[name]))] for name in names], seed))
    return chosen
