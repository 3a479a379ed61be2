"""Suites: lists of shifts under one name."""

from bayesguard.errors import BadInput
from bayesguard.shift.base import Shift
from bayesguard.shift.corruption import EXTRA, STANDARD, Corruption
from bayesguard.shift.geometric import Rotation, Translation
from bayesguard.shift.tabular import FeatureNoise

NAMES = ("cifar10-c", "images", "rotation", "translation", "tabular")


def suite(name: str, seed: int = 0, *, scale: object = None) -> list[Shift]:
    """Return the shifts of a suite.

    Args:
        name: "cifar10-c", the 15 standard corruptions (`STANDARD`: gaussian_noise, shot_noise, impulse_noise,
            defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog, brightness, contrast,
            elastic_transform, pixelate, jpeg_compression) and the 4 extra ones (`EXTRA`: speckle_noise,
            gaussian_blur, spatter, saturate) at severities 1 to 5; "images", the same and rotation and
            translation at severities 1 to 5; "rotation", the 12 published angles, 15 to 180 degrees;
            "translation", the 13 published shifts, 2 to 26 pixels of 28; "tabular", noise on features.
        seed: of every shift.
        scale: for "tabular" only, the standard deviation of each feature over the training data.

    Returns:
        The shifts, kind by kind in rising severity.

    Raises:
        BadInput: an unknown name, "tabular" without `scale`, or `scale` with another suite.

    Examples:
        >>> len(suite("cifar10-c")), len(suite("images"))
        (95, 105)
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
    corruptions: list[Shift] = [Corruption(kind, s, seed) for kind in STANDARD + EXTRA for s in levels]
    if name == "cifar10-c":
        return corruptions
    return [
        *corruptions,
        *(Rotation(s, seed=seed) for s in levels),
        *(Translation(s, seed=seed) for s in levels),
    ]
