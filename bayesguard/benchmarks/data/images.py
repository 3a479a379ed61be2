"""Real image sets in three parts: to train on, to calibrate on, to test on; and images out of their distribution.

`digits` comes with scikit-learn; the others are read by `bayesguard.benchmarks.files.read`.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayesguard.benchmarks.files import read
from bayesguard.errors import BadInput
from bayesguard.sampling import stream

Part = tuple[Tensor, Tensor]
Folder = str | Path | None

_OMNIGLOT_SIDE = 105


class ImageSet(NamedTuple):
    """Images `[N, C, H, W]` in [0, 1] with labels `[N]`, split so that no part has seen another."""

    name: str
    train: Part
    calibration: Part
    test: Part
    num_classes: int


def load(name: str, *, seed: int = 0, limit: int | None = None, data_dir: Folder = None) -> ImageSet:
    """Return an image set by name: "digits", "mnist", "fashion_mnist" or "cifar10".

    Args:
        name: Which one.
        seed: Of the split, where the set has none of its own.
        limit: Rows of the training and of the test part at most; None for all.
        data_dir: Folder of the data; see `bayesguard.benchmarks.files.read`.

    Raises:
        BadInput: An unknown name, or a file that is not there.
    """
    if name not in LOADERS:
        raise BadInput(f"data must be one of {', '.join(LOADERS)}, got {name!r}")
    images = LOADERS[name](seed, data_dir)
    if limit is None:
        return images
    return images._replace(train=_first(images.train, limit), test=_first(images.test, limit))


def ood_images(name: str, *, data_dir: Folder = None) -> Tensor:
    """Return images `[N, C, H, W]` in [0, 1] of a set that a network was not trained on.

    28 x 28 grey pixels, white on black: "mnist" and "fashion_mnist" (their test parts), "notmnist" (10,000 letters),
    "omniglot" (2,720 handwritten characters, resized by area averaging). 32 x 32 colour pixels: "cifar100" (half of its
    test part; one of the 5,000 images is also a CIFAR-10 test image).

    Raises:
        BadInput: An unknown name, or a file that is not there.
    """
    if name not in OOD:
        raise BadInput(f"out-of-distribution data must be one of {', '.join(OOD)}, got {name!r}")
    return OOD[name](data_dir)


def area_average(images: Tensor, side: int) -> Tensor:
    """Resize square images `[..., S, S]` to `side`: each new pixel is the mean of the area that it covers.

    Pixels on an edge of that area count with the share that lies inside.

    Example:
        >>> area_average(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), 2)
        tensor([[0.4444, 0.0000],
                [0.0000, 0.4444]])
    """
    old = images.shape[-1]
    edges = torch.arange(side + 1, dtype=torch.float64) * old / side
    pixels = torch.arange(old, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    weights = (overlap.clamp_min(0) * side / old).to(images.dtype)
    return weights @ images @ weights.T


def _first(part: Part, rows: int) -> Part:
    return part[0][:rows], part[1][:rows]


def _digits(seed: int, data_dir: Folder) -> ImageSet:
    """1,797 digits of 8 x 8 pixels, scanned from forms (Alpaydin and Kaynak 1998, UCI)."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(images), generator=stream("cpu", seed, "digits"))
    train, calibration, test = order.split([797, 400, 600])
    return ImageSet(
        "digits",
        (images[train], labels[train]),
        (images[calibration], labels[calibration]),
        (images[test], labels[test]),
        10,
    )


def _mnist_like(name: str) -> Callable[[int, Folder], ImageSet]:
    def read_set(seed: int, data_dir: Folder) -> ImageSet:
        # The published protocol: the last 10,000 training images are held out (Ovadia et al. 2019).
        file = read(f"images/{name}.npz", data_dir)
        images, labels = _grey(file["x_train"]), _labels(file["y_train"])
        test = _grey(file["x_test"]), _labels(file["y_test"])
        return ImageSet(name, (images[:-10000], labels[:-10000]), (images[-10000:], labels[-10000:]), test, 10)

    return read_set


def _cifar10(seed: int, data_dir: Folder) -> ImageSet:
    # The first four batches train, the fifth is held out (Ovadia et al. 2019).
    halves = [_colour(f"images/cifar10_train_{half}of2.npz", data_dir) for half in (1, 2)]
    images, labels = torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])
    return ImageSet(
        "cifar10",
        (images[:40000], labels[:40000]),
        (images[40000:], labels[40000:]),
        _colour("images/cifar10_test.npz", data_dir),
        10,
    )


def _test_part(file: str) -> Callable[[Folder], Tensor]:
    return lambda data_dir: _grey(read(f"images/{file}.npz", data_dir)["x_test"])


def _omniglot(data_dir: Folder) -> Tensor:
    bits = read("images/omniglot_small.npz", data_dir)["x_bits"]
    side = _OMNIGLOT_SIDE
    ink = np.unpackbits(bits, axis=1, count=side * side).reshape(-1, 1, side, side)
    return area_average(torch.from_numpy(ink).float(), 28).clamp_(0, 1)


LOADERS: dict[str, Callable[[int, Folder], ImageSet]] = {
    "digits": _digits,
    "mnist": _mnist_like("mnist"),
    "fashion_mnist": _mnist_like("fashion_mnist"),
    "cifar10": _cifar10,
}
OOD: dict[str, Callable[[Folder], Tensor]] = {
    "mnist": _test_part("mnist"),
    "fashion_mnist": _test_part("fashion_mnist"),
    "notmnist": _test_part("notmnist_test"),
    "omniglot": _omniglot,
    "cifar100": lambda data_dir: _colour("images/cifar100_test_half.npz", data_dir)[0],
}


def _grey(images: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).float().div_(255).reshape(len(images), 1, *images.shape[-2:])


def _labels(labels: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def _colour(name: str, data_dir: Folder) -> Part:
    file = read(name, data_dir)
    pixels = file["x"] if "x" in file else _decoded(file)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    return images.contiguous(), _labels(file["y"])


def _decoded(file: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """Decode colour images kept as strips of lossless WebP."""
    from PIL import Image

    strips = [
        np.asarray(Image.open(io.BytesIO(file["webp"][start:end].tobytes()))).reshape(-1, 32, 32, 3)
        for start, end in zip(file["offset"], file["offset"][1:], strict=False)
    ]
    return np.concatenate(strips)
