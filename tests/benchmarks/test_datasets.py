"""Image sets and regression sets as the benchmarks use them, read from small files in the documented format."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bayesguard.benchmarks.data.images import area_average
from bayesguard.benchmarks.datasets import Regression, load, ood_images, regression, standardised
from bayesguard.benchmarks.files import read
from bayesguard.errors import BadFile, BadInput

GENERATOR = np.random.default_rng(0)


def store(folder: Path, name: str, **arrays: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def pixels(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return GENERATOR.integers(0, 256, shape, dtype=np.uint8)


def test_mnist_holds_out_the_last_training_images(tmp_path: Path) -> None:
    train = {"x_train": pixels(10003, 28, 28), "y_train": GENERATOR.integers(0, 10, 10003, dtype=np.uint8)}
    test = {"x_test": pixels(5, 28, 28), "y_test": np.arange(5, dtype=np.uint8)}
    store(tmp_path, "images/mnist.npz", **train, **test)
    images = load("mnist", limit=4, data_dir=tmp_path)
    assert [len(part[0]) for part in (images.train, images.calibration, images.test)] == [3, 10000, 4]
    assert images.train[0].shape == (3, 1, 28, 28)
    assert images.test[1].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(images.calibration[0][0, 0].numpy(), train["x_train"][3].astype(np.float32) / 255)
    torch.testing.assert_close(ood_images("mnist", data_dir=tmp_path)[:4], images.test[0], rtol=0, atol=0)


def test_colour_images_are_the_same_from_strips_and_from_pixels(tmp_path: Path) -> None:
    images = pixels(4, 32, 32, 3)
    strips = []
    for pair in (images[:2], images[2:]):
        buffer = io.BytesIO()
        Image.fromarray(pair.reshape(64, 32, 3)).save(buffer, "WEBP", lossless=True)
        strips.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offset = np.cumsum([0, *map(len, strips)])
    labels = np.arange(4, dtype=np.uint8)
    store(tmp_path / "strips", "images/cifar100_test_half.npz", webp=np.concatenate(strips), offset=offset, y=labels)
    store(tmp_path / "plain", "images/cifar100_test_half.npz", x=images, y=labels)
    plain, decoded = (ood_images("cifar100", data_dir=tmp_path / folder) for folder in ("plain", "strips"))
    assert plain.shape == (4, 3, 32, 32)
    np.testing.assert_array_equal(plain[1, 2].numpy(), images[1, :, :, 2].astype(np.float32) / 255)
    torch.testing.assert_close(decoded, plain, rtol=0, atol=0)


def test_cifar10_joins_both_halves(tmp_path: Path) -> None:
    for name, label in (("train_1of2", 1), ("train_2of2", 2), ("test", 3)):
        store(tmp_path, f"images/cifar10_{name}.npz", x=pixels(2, 32, 32, 3), y=np.full(2, label, np.uint8))
    images = load("cifar10", data_dir=tmp_path)
    assert images.train[1].tolist() == [1, 1, 2, 2]
    assert images.test[1].tolist() == [3, 3]


def test_omniglot_is_white_on_black_and_keeps_its_ink(tmp_path: Path) -> None:
    drawing = np.zeros((1, 105, 105), np.uint8)
    drawing[0, 15:30, 30:45] = 1  # exactly four by four of the new pixels
    store(tmp_path, "images/omniglot_small.npz", x_bits=np.packbits(drawing.reshape(1, -1), axis=1))
    images = ood_images("omniglot", data_dir=tmp_path)
    expected = torch.zeros(1, 1, 28, 28)
    expected[0, 0, 4:8, 8:12] = 1
    torch.testing.assert_close(images, expected)


def test_area_averages_share_pixels_on_an_edge() -> None:
    row = torch.arange(1.0, 4.0).expand(3, 3)
    # Each half covers one pixel and a half: (1 + 2 / 2) / 1.5 and (2 / 2 + 3) / 1.5.
    torch.testing.assert_close(area_average(row, 2), torch.tensor([[4 / 3, 8 / 3]] * 2))
    noise = torch.from_numpy(GENERATOR.random((2, 1, 105, 105), np.float32))
    torch.testing.assert_close(area_average(noise, 28).mean((-2, -1)), noise.mean((-2, -1)))


@pytest.mark.parametrize("name", ["wine", "concrete"])
def test_regression_reads_its_file(tmp_path: Path, name: str) -> None:
    file = {"wine": "wine_red", "concrete": "concrete"}[name]
    arrays = {"X": pixels(6, 2).astype(np.float32), "y": np.arange(6, dtype=np.float32)}
    store(tmp_path, f"uci/{file}.npz", **arrays, test_index=np.array([[1, 4], [0, 5]], np.int32))
    data = regression(name, data_dir=tmp_path)
    assert {data.inputs.dtype, data.targets.dtype} == {np.dtype(np.float64)}
    assert data.name == name
    np.testing.assert_array_equal(data.inputs, arrays["X"])
    np.testing.assert_array_equal(data.test_index, [[1, 4], [0, 5]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_index": np.array([[1, 6]])}, "row numbers from 0 to 5"),
        ({"test_index": np.array([[1, 1]])}, "different row numbers"),
        ({"y": np.arange(5.0)}, "X must be"),
        ({"y": np.full(6, np.nan)}, "both finite"),
    ],
)
def test_regression_refuses_arrays_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    arrays = {"X": np.zeros((6, 2)), "y": np.arange(6.0), "test_index": np.array([[1, 4]])}
    store(tmp_path, "uci/yacht.npz", **(arrays | changes))
    with pytest.raises(BadFile, match=words):
        regression("yacht", data_dir=tmp_path)


def test_standardised_uses_the_training_part_only() -> None:
    inputs = np.array([[1.0, 7.1], [3.0, 7.1], [5.0, 7.1], [100.0, 8.1]])
    data = Regression(inputs, np.array([2.0, 4.0, 6.0, 10.0]), np.array([[3]]), "tiny")
    split = standardised(data, 0)
    sd = math.sqrt(8 / 3)
    np.testing.assert_allclose(split.train_inputs, np.array([[-2 / sd, 0.0], [0.0, 0.0], [2 / sd, 0.0]]), rtol=1e-6)
    np.testing.assert_array_equal(split.train_inputs[:, 1], 0)
    np.testing.assert_allclose(split.test_inputs, np.array([[97 / sd, 1.0]]), rtol=1e-6)
    assert split.test_targets.tolist() == [pytest.approx(6 / sd)]
    assert split.target_mean == 4.0
    assert split.target_sd == pytest.approx(sd)
    assert {part.dtype for part in split[:4]} == {np.dtype(np.float32)}


def test_a_split_must_exist() -> None:
    data = Regression(np.zeros((2, 1)), np.arange(2.0), np.array([[1]]), "tiny")
    for split in (-1, 1):
        with pytest.raises(BadInput, match=f"split must be from 0 to 0 for tiny, got {split}"):
            standardised(data, split)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BadInput, match=r"data must be one of digits, mnist.*got 'svhn'"):
        load("svhn")
    with pytest.raises(BadInput, match=r"must be one of mnist.*got 'svhn'"):
        ood_images("svhn")
    with pytest.raises(BadInput, match=r"must be one of boston.*got 'year'"):
        regression("year")


def test_read_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"mnist.npz is needed, and its download failed: .*--data-dir.*BAYESGUARD_DATA"):
        load("mnist")
    with pytest.raises(BadInput, match=r"yacht.npz does not exist, and its download failed"):
        regression("yacht", data_dir=tmp_path)
    with pytest.raises(BadInput, match=r"not downloaded: its original is a pickle"):
        read("images/cifar10n_labels.npz")
    with pytest.raises(BadInput, match=r"not downloaded: it is a random half"):
        ood_images("cifar100")
    monkeypatch.setenv("BAYESGUARD_DATA", str(tmp_path / "typo"))
    with pytest.raises(BadInput, match=r"\(--data-dir or BAYESGUARD_DATA\) does not exist: .*typo"):
        regression("yacht")


def test_read_refuses_damaged_and_pickled_files(tmp_path: Path) -> None:
    store(tmp_path, "pickled.npz", a=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    store(tmp_path, "cut.npz", a=np.arange(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.arange(3))
    for name in ("pickled.npz", "text.npz", "cut.npz", "single.npz"):
        with pytest.raises(BadFile, match=f"{name} cannot be read"):
            read(name, tmp_path)
