"""Original image files as arrays: IDX, the binary version of CIFAR-10, Omniglot's drawings, CIFAR-10H's votes."""

import gzip
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from bayesguard.errors import BadFile

Arrays = dict[str, Any]

_PIXELS = 3 * 32 * 32
_OMNIGLOT_SIDE = 105


def idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes: MNIST's format."""
    with gzip.open(path) as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise BadFile(f"{path} is not an IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) - start != shape.prod():
        raise BadFile(f"{path} holds {len(content) - start} bytes where its header promises {shape.prod()}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def train_and_test(train_images: Path, train_labels: Path, test_images: Path, test_labels: Path) -> Arrays:
    """Return MNIST or Fashion-MNIST, complete and in the original order."""
    return {
        "x_train": idx(train_images),
        "y_train": idx(train_labels),
        "x_test": idx(test_images),
        "y_test": idx(test_labels),
    }


def test_only(images: Path, labels: Path) -> Arrays:
    """Return a test part in MNIST's format."""
    return {"x_test": idx(images), "y_test": idx(labels)}


def cifar_batches(archive: Path, batches: list[str], rows: slice = slice(None)) -> Arrays:
    """Return rows of the named batches of CIFAR-10's binary version, end to end: `x` [N, 32, 32, 3] and `y`.

    A record is one byte of label and the red, green and blue plane of 32 x 32 bytes each.
    """
    parts = []
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if PurePosixPath(member.name).name in batches and (file := tar.extractfile(member)) is not None:
                parts.append((PurePosixPath(member.name).name, file.read()))
    missing = sorted(set(batches) - {name for name, _ in parts})
    if missing:
        raise BadFile(f"{archive} lacks {', '.join(missing)}")
    content = b"".join(data for _, data in sorted(parts))
    if len(content) % (1 + _PIXELS):
        raise BadFile(f"{archive} holds batches that are no whole number of {1 + _PIXELS} byte records")
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)[rows]
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return {"x": np.ascontiguousarray(images), "y": records[:, 0].copy()}


def omniglot(archive: Path) -> Arrays:
    """Return the drawings as bits, 1 = ink, with character numbers and names, in the order of the names."""
    from PIL import Image

    bits, characters = [], []
    with zipfile.ZipFile(archive) as drawings:
        for name in sorted(name for name in drawings.namelist() if name.endswith(".png")):
            with drawings.open(name) as file:
                drawing = np.asarray(Image.open(file).convert("L"))
            if drawing.shape != (_OMNIGLOT_SIDE, _OMNIGLOT_SIDE):
                raise BadFile(f"{archive}: {name} has {drawing.shape} pixels; 105 x 105 are expected")
            bits.append(np.packbits((drawing == 0).ravel()))
            characters.append("/".join(PurePosixPath(name).parts[-3:-1]))
    names, numbers = np.unique(characters, return_inverse=True)
    return {"x_bits": np.stack(bits), "y": numbers.astype(np.int16), "char_name": names}


def votes(path: Path) -> Arrays:
    """Return CIFAR-10H: how many people chose each class, for every CIFAR-10 test image."""
    counts = np.load(path, allow_pickle=False)
    if counts.ndim != 2 or counts.min() < 0 or counts.max() > 255:
        raise BadFile(f"{path} does not hold counts of votes per image and class")
    return {"counts": counts.astype(np.uint8)}
