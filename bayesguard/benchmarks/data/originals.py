"""The arrays of every benchmark file, made from downloaded originals."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bayesguard.benchmarks.data import originals_images as images
from bayesguard.benchmarks.data import originals_tables as tables
from bayesguard.benchmarks.data.downloads import fetch_original, fetch_uci
from bayesguard.benchmarks.data.sources import UCI_SETS
from bayesguard.errors import BadInput

Arrays = dict[str, Any]

_FOUR = [
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
]
_TRAIN_BATCHES = [f"data_batch_{number}.bin" for number in range(1, 6)]
_CIFAR10 = ["cifar10/cifar-10-binary.tar.gz"]

Parser = Callable[..., Arrays]

# Each file: what reads its originals, and their names.
PARSERS: dict[str, tuple[Parser, list[str]]] = {
    "images/mnist.npz": (images.train_and_test, [f"mnist/{file}" for file in _FOUR]),
    "images/fashion_mnist.npz": (images.train_and_test, [f"fashion_mnist/{file}" for file in _FOUR]),
    "images/notmnist_test.npz": (images.test_only, [f"notmnist/{file}" for file in _FOUR[2:]]),
    "images/cifar10_train_1of2.npz": (
        partial(images.cifar_batches, batches=_TRAIN_BATCHES, rows=slice(None, 25000)),
        _CIFAR10,
    ),
    "images/cifar10_train_2of2.npz": (
        partial(images.cifar_batches, batches=_TRAIN_BATCHES, rows=slice(25000, None)),
        _CIFAR10,
    ),
    "images/cifar10_test.npz": (partial(images.cifar_batches, batches=["test_batch.bin"]), _CIFAR10),
    "images/omniglot_small.npz": (images.omniglot, ["omniglot/images_background_small1.zip"]),
    "images/cifar10h_counts.npz": (images.votes, ["cifar10h/cifar10h-counts.npy"]),
    "text/clinc150.npz": (tables.clinc, ["clinc150/data_full.json", "clinc150/domains.json"]),
    "text/banking77.npz": (tables.banking, ["banking77/train.csv", "banking77/test.csv"]),
    "tabular/adult.npz": (tables.adult, ["tabular/adult-train.csv", "tabular/adult-test.csv"]),
    "tabular/german_credit.npz": (tables.german, ["tabular/german.csv"]),
    "tabular/electricity.npz": (tables.stream_of_rows, ["streams/elec.csv"]),
    "tabular/weather.npz": (tables.stream_of_rows, ["streams/weather.csv"]),
    "tabular/bike_sharing_hour.npz": (tables.bicycles, ["bike/hour.csv"]),
}
WITHOUT_DOWNLOAD = {
    "images/cifar10n_labels.npz": "its original is a pickle, which can run code when it is opened",
    "images/cifar100_test_half.npz": "it is a random half of the CIFAR-100 test images that the original order does not give",
}


def arrays(name: str) -> Arrays:
    """Return the arrays of `name`, such as "tabular/adult.npz", from originals that are downloaded where the cache lacks them.

    Colour images are the array `x` [N, 32, 32, 3] here.

    Raises:
        BadInput: There is no download for `name`, or it failed.
        BadFile: An original is not what it should be.
    """
    if name in PARSERS:
        parse, files = PARSERS[name]
        return parse(*map(fetch_original, files))
    folder, stem = Path(name).parent.as_posix(), Path(name).stem
    if folder == "uci" and stem in UCI_SETS:
        return tables.uci(*fetch_uci(stem))
    raise BadInput(f"{name} is not downloaded: {WITHOUT_DOWNLOAD.get(name, 'no address is known for it')}")
