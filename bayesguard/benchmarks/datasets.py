"""Real image sets in three parts: to train on, to calibrate on, to test on.

`digits` comes with scikit-learn. The others are read from NumPy files in the folder that the environment variable
`BAYESGUARD_DATA` names (`images/mnist.npz` and so on; `docs/benchmarks.md` says what they hold).
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.sampling import stream

Part = tuple[Tensor, Tensor]


class ImageSet(NamedTuple):
    """Images `[N, C, H, W]` in [0, 1] with labels `[N]`, split so that no part has seen another."""

    name: str
    train: Part
    calibration: Part
    test: Part
    num_classes: int


def load(name: str, *, seed: int = 0, limit: int | None = None) -> ImageSet:
    """Return an image set by name: "digits", "mnist", "fashion_mnist" or "cifar10".

    Args:
        name: Which one.
        seed: Of the split, where the set has none of its own.
        limit: Rows of the training and of the test part at most; None for all.

    Raises:
        BadInput: An unknown name, or a file that is not there.
    """
    if name not in LOADERS:
        raise BadInput(f"data must be one of {', '.join(LOADERS)}, got {name!r}")
    images = LOADERS[name](seed)
    if limit is None:
        return images
    return images._replace(train=_first(images.train, limit), test=_first(images.test, limit))


def _first(part: Part, rows: int) -> Part:
    return part[0][:rows], part[1][:rows]


def _digits(seed: int) -> ImageSet:
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


def _mnist_like(name: str) -> Callable[[int], ImageSet]:
    def read(seed: int) -> ImageSet:
        # The published protocol: the last 10,000 training images are held out (Ovadia et al. 2019).
        file = _open(f"{name}.npz")
        images, labels = _grey(file["x_train"]), _labels(file["y_train"])
        test = _grey(file["x_test"]), _labels(file["y_test"])
        return ImageSet(name, (images[:-10000], labels[:-10000]), (images[-10000:], labels[-10000:]), test, 10)

    return read


def _cifar10(seed: int) -> ImageSet:
    # The first four batches train, the fifth is held out (Ovadia et al. 2019).
    first, second = _colour("cifar10_train_1of2.npz"), _colour("cifar10_train_2of2.npz")
    images, labels = torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
    return ImageSet(
        "cifar10",
        (images[:40000], labels[:40000]),
        (images[40000:], labels[40000:]),
        _colour("cifar10_test.npz"),
        10,
    )


LOADERS: dict[str, Callable[[int], ImageSet]] = {
    "digits": _digits,
    "mnist": _mnist_like("mnist"),
    "fashion_mnist": _mnist_like("fashion_mnist"),
    "cifar10": _cifar10,
}


def _open(file: str) -> "np.lib.npyio.NpzFile":
    folder = os.environ.get("BAYESGUARD_DATA")
    if folder is None:
        raise BadInput(
            f"images/{file} is needed: set the environment variable BAYESGUARD_DATA to the folder that holds it, "
            "or use --data digits, which comes with scikit-learn"
        )
    path = Path(folder) / "images" / file
    if not path.is_file():
        raise BadInput(f"{path} does not exist; BAYESGUARD_DATA must be the folder above images/{file}")
    return np.load(path, allow_pickle=False)


def _grey(images: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).float().div_(255).reshape(len(images), 1, *images.shape[-2:])


def _labels(labels: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def _colour(file: str) -> Part:
    """Read colour images kept as strips of lossless WebP."""
    from PIL import Image

    data = _open(file)
    strips = [
        np.asarray(Image.open(io.BytesIO(data["webp"][start:end].tobytes()))).reshape(-1, 32, 32, 3)
        for start, end in zip(data["offset"], data["offset"][1:], strict=False)
    ]
    images = torch.from_numpy(np.concatenate(strips)).permute(0, 3, 1, 2).float().div_(255)
    return images.contiguous(), _labels(data["y"])
