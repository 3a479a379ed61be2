"""Where the benchmarks' data come from: NumPy archives below one folder.

The folder is `--data-dir`, or the environment variable `BAYESGUARD_DATA`; `docs/benchmarks.md` says what the files hold.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from bayesguard.errors import BadFile, BadInput


def read(name: str, data_dir: str | Path | None = None) -> dict[str, Any]:
    """Return the arrays of `name`, such as "tabular/adult.npz", by name.

    Args:
        name: Path below the folder of the data.
        data_dir: That folder; None for the one that BAYESGUARD_DATA names.

    Raises:
        BadInput: No folder is named, or it does not hold the file.
        BadFile: The file is damaged.
    """
    folder = data_dir if data_dir is not None else os.environ.get("BAYESGUARD_DATA")
    if folder is None:
        raise BadInput(
            f"{name} is needed: pass --data-dir, or set the environment variable BAYESGUARD_DATA, with the folder that holds it"
        )
    path = Path(folder) / name
    if not path.is_file():
        raise BadInput(f"{path} does not exist; the folder of the data must be the one that holds {name}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise BadFile(f"{path} cannot be read ({error}); fetch it again") from None
