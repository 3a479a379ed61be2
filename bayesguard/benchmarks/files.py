"""Where the benchmarks' data come from: NumPy archives below one folder, or else downloaded originals.

The folder is `--data-dir`, or the environment variable `BAYESGUARD_DATA`; `docs/benchmarks.md` says what the files hold.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from bayesguard.benchmarks.data.originals import arrays
from bayesguard.errors import BadFile, BadInput


def read(name: str, data_dir: str | Path | None = None) -> dict[str, Any]:
    """Return the arrays of `name`, such as "tabular/adult.npz", by name.

    A file that the folder lacks is made from its original files, which are downloaded once into the user's cache.

    Args:
        name: Path below the folder of the data.
        data_dir: That folder; None for the one that BAYESGUARD_DATA names, if any.

    Raises:
        BadInput: The folder does not exist; or it does not hold the file, and the original could not be downloaded.
        BadFile: The file is damaged.
    """
    folder = data_dir if data_dir is not None else os.environ.get("BAYESGUARD_DATA") or None
    if folder is not None and not Path(folder).is_dir():
        raise BadInput(f"the folder of the data (--data-dir or BAYESGUARD_DATA) does not exist: {folder}")
    path = None if folder is None else Path(folder) / name
    if path is not None and path.is_file():
        return _archive(path)
    try:
        return arrays(name)
    except BadInput as error:
        missing = f"{name} is needed" if path is None else f"{path} does not exist"
        raise BadInput(
            f"{missing}, and its download failed: {error}. Otherwise pass --data-dir, or set the environment variable "
            f"BAYESGUARD_DATA, with the folder that holds {name}"
        ) from None


def _archive(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise BadFile(f"{path} cannot be read ({error}); fetch it again") from None
