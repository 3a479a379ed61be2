"""Original files, downloaded once into the user's cache and checked against their checksums."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayesguard.benchmarks.data.sources import SOURCES, UCI, UCI_SETS
from bayesguard.errors import BadFile, BadInput


def fetch_original(name: str) -> Path:
    """Return the path of an original file, downloading it first if the cache lacks it.

    Args:
        name: Source and file, such as "clinc150/data_full.json"; `bayesguard.benchmarks.data.sources` lists them.

    Raises:
        BadInput: An unknown name, pooch is not installed, or the address cannot be reached.
        BadFile: What the address serves is not the file that the checksum stands for.
    """
    source, _, file = name.partition("/")
    if source not in SOURCES or file not in SOURCES[source].checksums:
        known = [f"{key}/{entry}" for key, value in SOURCES.items() for entry in value.checksums]
        raise BadInput(f"name must be one of {', '.join(known)}, got {name!r}")
    found = SOURCES[source]
    return retrieve(found.address, {file: found.checksums[file]}, Path(source))[0]


def fetch_uci(name: str) -> tuple[Path, list[Path]]:
    """Return the paths of data.txt of a UCI set, and of its files of indices: features, target, test set of each split.

    Raises:
        BadInput: As `fetch_original`.
        BadFile: As `fetch_original`.
    """
    known = UCI_SETS[name]
    files = ["index_features.txt", "index_target.txt", *(f"index_test_{split}.txt" for split in range(known.splits))]
    address, folder = f"{UCI.address}{known.folder}/data/", Path("uci") / name
    checksums = {"data.txt": f"sha256:{known.data}", **dict.fromkeys(files)}
    data, *indices = retrieve(address, checksums, folder)
    if hashlib.sha256(b"".join(path.read_bytes() for path in indices)).hexdigest() != known.indices:
        for path in indices:
            path.unlink()
        raise BadFile(
            f"the index files below {address} do not have the expected checksum and were deleted; try again, and if this "
            f"stays so get uci/{name}.npz in another way and pass --data-dir"
        )
    return data, indices


def retrieve(address: str, checksums: Mapping[str, str | None], folder: Path) -> list[Path]:
    """Return the paths of files in `folder` of the cache, each downloaded from below `address` if it is not there or is damaged.

    Args:
        address: Ends with a slash.
        checksums: Files and their checksums; None for one that the caller checks.
        folder: Below the user's cache.
    """
    try:
        import pooch
    except ImportError:
        raise BadInput(
            "pooch, which downloads it, is not installed: pip install 'bayesguard[benchmarks]', or pip install pooch"
        ) from None
    files = pooch.create(pooch.os_cache("bayesguard") / folder, address, registry=dict(checksums))
    return [_fetch(files, address, file) for file in checksums]


def _fetch(files: Any, address: str, file: str) -> Path:
    try:
        return Path(files.fetch(file))
    except ValueError as error:
        raise BadFile(f"{address}{file} is not the file that its checksum stands for ({_line(error)})") from None
    except OSError as error:  # requests' errors are OSErrors, too
        raise BadInput(f"{address}{file} could not be downloaded to {files.path} ({_line(error)})") from None


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
