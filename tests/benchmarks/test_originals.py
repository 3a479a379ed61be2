"""Original files are read into the documented arrays, and only when they are the files that the checksums stand for."""

import gzip
import hashlib
import io
import json
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bayesguard.benchmarks.data import downloads
from bayesguard.benchmarks.data import originals_images as images
from bayesguard.benchmarks.data import originals_tables as tables
from bayesguard.benchmarks.data.downloads import fetch_original, fetch_uci, retrieve
from bayesguard.benchmarks.data.originals import PARSERS, WITHOUT_DOWNLOAD, arrays
from bayesguard.benchmarks.data.sources import SOURCES, UCI, UCI_SETS, UciSet
from bayesguard.errors import BadFile, BadInput

ADULT_ROW = "39, {work}, 77516, Bachelors, 13, Divorced, Sales, Husband, White, {sex}, 2174, 0, 40, ?, {income}\n"
GERMAN_ROW = "A11,6,A34,{purpose},1169,A65,A75,4,{status},A101,4,A121,67,A143,A152,2,A173,1,A192,A201,{bad}\n"


def idx(path: Path, values: np.ndarray[Any, np.dtype[np.uint8]]) -> Path:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(header + values.tobytes())
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def test_idx(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    labels = np.array([7, 1], np.uint8)
    found = images.test_only(idx(tmp_path / "x.gz", values), idx(tmp_path / "y.gz", labels))
    np.testing.assert_array_equal(found["x_test"], values)
    np.testing.assert_array_equal(found["y_test"], labels)


@pytest.mark.parametrize(
    ("content", "words"), [(b"\0\0\x0d\x01", "not an IDX file"), (b"\0\0\x08\x01\0\0\0\x05ab", "2 bytes")]
)
def test_idx_refuses(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(BadFile, match=words):
        images.idx(path)


def test_cifar10_binary(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    records = [bytes([label]) + image.transpose(2, 0, 1).tobytes() for label, image in enumerate(pixels)]
    path = tmp_path / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        # The archive's order is not the batches' order.
        for name, data in (
            ("data_batch_2.bin", records[2] + records[3]),
            ("data_batch_1.bin", records[0] + records[1]),
        ):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = images.cifar_batches(path, ["data_batch_1.bin", "data_batch_2.bin"], slice(1, None))
    np.testing.assert_array_equal(found["x"], pixels[1:])
    assert found["y"].tolist() == [1, 2, 3]
    with pytest.raises(BadFile, match=r"lacks test_batch\.bin"):
        images.cifar_batches(path, ["test_batch.bin"])


def test_omniglot(tmp_path: Path) -> None:
    path = tmp_path / "omniglot.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for character, pixel in (("Latin/character01", 5), ("Greek/character02", 7)):
            drawing = np.ones((105, 105), bool)
            drawing[0, pixel] = False  # ink is black
            buffer = io.BytesIO()
            Image.fromarray(drawing).save(buffer, "PNG")
            archive.writestr(f"images_background_small1/{character}/0001_01.png", buffer.getvalue())
    found = images.omniglot(path)
    ink = np.unpackbits(found["x_bits"], axis=1, count=11025)
    assert [np.flatnonzero(row).tolist() for row in ink] == [[7], [5]]
    assert found["y"].tolist() == [0, 1]
    assert found["char_name"].tolist() == ["Greek/character02", "Latin/character01"]


def test_votes(tmp_path: Path) -> None:
    path = tmp_path / "counts.npy"
    np.save(path, np.array([[0, 51], [48, 1]]))
    counts = images.votes(path)["counts"]
    assert (counts.dtype, counts.tolist()) == (np.uint8, [[0, 51], [48, 1]])
    np.save(path, np.array([[300]]))
    with pytest.raises(BadFile, match="counts of votes"):
        images.votes(path)


def test_uci(tmp_path: Path) -> None:
    data = text(tmp_path / "data.txt", " 1.0  20\t5\n 2.0  30  6\n 3.0  40  7\n")
    files = {"index_features": "2.0\n0.0\n", "index_target": "1\n", "index_test_0": "2\n0\n", "index_test_1": "1\n0\n"}
    found = tables.uci(data, [text(tmp_path / f"{name}.txt", content) for name, content in files.items()])
    assert found["X"].tolist() == [[5, 1], [6, 2], [7, 3]]
    assert found["y"].tolist() == [20, 30, 40]
    assert found["test_index"].tolist() == [[0, 2], [0, 1]]
    assert [found[name].dtype for name in ("X", "y", "test_index")] == [np.float32, np.float32, np.int32]


def test_adult(tmp_path: Path) -> None:
    train = ADULT_ROW.format(work="State-gov", sex="Male", income="<=50K") + "\n"
    test = ADULT_ROW.format(work="Private", sex="Female", income=">50K.") + "\n"
    found = tables.adult(text(tmp_path / "train.csv", train), text(tmp_path / "test.csv", test))
    assert found["x_num_train"].tolist() == [[39, 77516, 13, 2174, 0, 40]]
    assert found["levels_workclass"].tolist() == ["Private", "State-gov"]
    assert (found["x_cat_train"][0, 0], found["x_cat_test"][0, 0]) == (1, 0)
    assert found["levels_native_country"].tolist() == ["?"]
    assert (found["y_train"].tolist(), found["y_test"].tolist()) == ([0], [1])
    with pytest.raises(BadFile, match="row 0 has 2 columns where 15 are expected"):
        tables.adult(text(tmp_path / "train.csv", "1, 2\n"), tmp_path / "test.csv")


def test_german_credit(tmp_path: Path) -> None:
    rows = [("A410", "A92", 2), ("A49", "A93", 1), ("A40", "A95", 1)]
    content = "".join(GERMAN_ROW.format(purpose=purpose, status=status, bad=bad) for purpose, status, bad in rows)
    found = tables.german(text(tmp_path / "german.csv", content))
    assert found["levels_purpose"].tolist() == ["A40", "A49", "A410"]
    assert found["x_cat"][:, 2].tolist() == [2, 1, 0]
    assert found["x_num"][0].tolist() == [6, 1169, 4, 4, 67, 2, 1]
    assert (found["y"].tolist(), found["female"].tolist()) == ([1, 0, 0], [1, 0, 1])


def test_streams(tmp_path: Path) -> None:
    found = tables.stream_of_rows(text(tmp_path / "elec.csv", "period,price,class\n0.0,0.5,1\n0.25,0.75,0\n"))
    assert found["X"].tolist() == [[0, 0.5], [0.25, 0.75]]
    assert found["y"].tolist() == [1, 0]
    assert found["feature_names"].tolist() == ["period", "price"]


def test_bicycles(tmp_path: Path) -> None:
    names = "season,year,month,hour,holiday,weekday,workingday,weathersit,temp,feelingTemp,humidity,windspeed"
    rows = [
        "1,31-12-2011,1,0,12,23,0,6,0,1,0.5,0.25,0.75,0,3,13,16",
        "2,02-01-2012,1,1,1,0,0,1,0,1,0.5,0.25,0.75,0,1,1,2",
    ]
    header = f"instant,dateday,{names},casual,registered,count"
    found = tables.bicycles(text(tmp_path / "hour.csv", "\n".join([header, *rows])))
    assert found["X"][0].tolist() == [1, 0, 12, 23, 0, 6, 0, 1, 0.5, 0.25, 0.75, 0]
    assert (found["y"].tolist(), found["day"].tolist()) == ([16, 2], [0, 2])
    assert found["feature_names"].tolist() == names.split(",")


def test_clinc(tmp_path: Path) -> None:
    parts = {"train": [["hi there", "greeting"], ["my balance", "balance"]], "oos_test": [["dow?", "oos"]]}
    domains = {"small_talk": ["greeting"], "banking": ["balance"]}
    data = text(tmp_path / "data.json", json.dumps(parts))
    found = tables.clinc(data, text(tmp_path / "domains.json", json.dumps(domains)))
    assert found["class_name"].tolist() == ["balance", "greeting"]
    assert found["y_train"].tolist() == [1, 0]
    assert found["domain_name"].tolist() == ["banking", "small_talk"]
    assert found["class_domain"].tolist() == [0, 1]
    assert found["text_oos_test"].tolist() == ["dow?"]
    assert "y_oos_test" not in found


def test_banking(tmp_path: Path) -> None:
    train = text(tmp_path / "train.csv", 'text,category\n"A, ""b""\n",lost\nC,Found\n')
    found = tables.banking(train, text(tmp_path / "test.csv", "text,category\nD,lost\n"))
    assert found["text_train"].tolist() == ['A, "b"', "C"]
    assert (found["y_train"].tolist(), found["y_test"].tolist()) == ([1, 0], [1])
    assert found["class_name"].tolist() == ["Found", "lost"]


def test_every_parser_has_its_sources() -> None:
    listed = {f"{source}/{file}" for source, entry in SOURCES.items() for file in entry.checksums}
    assert {file for _, files in PARSERS.values() for file in files} == listed
    assert not set(PARSERS) & set(WITHOUT_DOWNLOAD)
    for entry in SOURCES.values():
        assert entry.address.endswith("/")
        assert all(value.startswith(("md5:", "sha256:")) for value in entry.checksums.values())


def test_arrays_come_from_the_listed_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def serve(address: str, checksums: dict[str, str], folder: Path) -> list[Path]:
        asked.append((address, dict(checksums), folder))
        return [text(tmp_path / file, "a,class\n1,0\n") for file in checksums]

    monkeypatch.setattr(downloads, "retrieve", serve)
    assert arrays("tabular/weather.npz")["X"].tolist() == [[1]]
    source = SOURCES["streams"]
    assert asked == [(source.address, {"weather.csv": source.checksums["weather.csv"]}, Path("streams"))]


def test_uci_checks_its_index_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {
        "data.txt": "1 2\n3 4\n",
        "index_features.txt": "0\n",
        "index_target.txt": "1\n",
        "index_test_0.txt": "1\n",
    }

    def serve(address: str, checksums: dict[str, str | None], folder: Path) -> list[Path]:
        assert (address, folder) == (f"{UCI.address}tiny/data/", Path("uci/yacht"))
        assert checksums["data.txt"] == "sha256:of the data"
        return [text(tmp_path / file, contents[file]) for file in checksums]

    monkeypatch.setattr(downloads, "retrieve", serve)
    digest = hashlib.sha256(b"0\n1\n1\n").hexdigest()
    monkeypatch.setitem(UCI_SETS, "yacht", UciSet("tiny", 1, "of the data", digest))
    assert arrays("uci/yacht.npz")["test_index"].tolist() == [[1]]
    contents["index_test_0.txt"] = "0\n"
    with pytest.raises(BadFile, match="do not have the expected checksum and were deleted"):
        fetch_uci("yacht")
    assert not (tmp_path / "index_test_0.txt").exists()


def test_unknown_originals_are_refused() -> None:
    with pytest.raises(BadInput, match=r"name must be one of mnist/train-images.*got 'mnist/x'"):
        fetch_original("mnist/x")
    with pytest.raises(BadInput, match="no address is known"):
        arrays("uci/year.npz")


def test_without_pooch_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(BadInput, match=r"pip install 'bayesguard\[benchmarks\]'"):
        retrieve("http://localhost/", {"a": None}, Path("x"))


@pytest.mark.parametrize(
    ("failure", "error", "words"),
    [
        (ConnectionError("no\nroute"), BadInput, r"http://nowhere/a could not be downloaded to .* \(no route\)"),
        (ValueError("hash"), BadFile, r"http://nowhere/a is not the file that its checksum stands for \(hash\)"),
    ],
)
def test_failed_downloads(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, error: type[Exception], words: str
) -> None:
    def fetch(file: str) -> str:
        raise failure

    def create(path: Path, address: str, registry: dict[str, str]) -> SimpleNamespace:
        return SimpleNamespace(path=path, fetch=fetch)

    stub = SimpleNamespace(os_cache=Path, create=create)
    monkeypatch.setitem(sys.modules, "pooch", stub)
    with pytest.raises(error, match=words) as caught:
        retrieve("http://nowhere/", {"a": None}, Path("x"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_pooch_downloads_once_and_checks(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pooch = pytest.importorskip("pooch")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    served = text(tmp_path / "served" / "a.csv", "1,2\n")
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    checksums = {"a.csv": f"sha256:{digest}"}
    (path,) = retrieve(address, checksums, Path("tiny"))
    assert path == tmp_path / "cache/bayesguard/tiny/a.csv"
    assert path.read_text() == "1,2\n"
    served.write_text("changed\n")
    assert retrieve(address, checksums, Path("tiny")) == [path]
    path.write_text("damaged\n")
    with pytest.raises(BadFile, match="is not the file"):
        retrieve(address, checksums, Path("tiny"))
    with pytest.raises(BadInput, match=r"missing\.csv could not be downloaded"):
        retrieve(address, {"missing.csv": None}, Path("tiny"))
