"""UCI regression sets with the published random splits into 90 % to train on and 10 % to test on."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bayesguard.benchmarks.files import read
from bayesguard.errors import BadFile, BadInput

Doubles = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

REGRESSION = {
    "boston": "boston",
    "concrete": "concrete",
    "energy": "energy",
    "kin8nm": "kin8nm",
    "naval": "naval",
    "power": "power",
    "protein": "protein",
    "wine": "wine_red",
    "yacht": "yacht",
}


class Regression(NamedTuple):
    """Inputs `[N, D]` and targets `[N]` in their own units, and the test rows `[splits, n]`; the other rows train."""

    inputs: Doubles
    targets: Doubles
    test_index: npt.NDArray[np.int64]
    name: str


class Standardised(NamedTuple):
    """One split, standardised with the training part's means and population standard deviations.

    An error in the target's own units is `target_sd` times the standardised one; a log density in its own units is the
    standardised one minus `log(target_sd)`.
    """

    train_inputs: Singles
    train_targets: Singles
    test_inputs: Singles
    test_targets: Singles
    target_mean: float
    target_sd: float


def regression(name: str, *, data_dir: str | Path | None = None) -> Regression:
    """Return a regression set by name: boston, concrete, energy, kin8nm, naval, power, protein, wine (red) or yacht.

    The splits are those of Hernández-Lobato and Adams (2015): 20 each, 5 for protein.

    Raises:
        BadInput: An unknown name, or a file that is not there.
        BadFile: The file's arrays do not fit one another.
    """
    if name not in REGRESSION:
        raise BadInput(f"data must be one of {', '.join(REGRESSION)}, got {name!r}")
    file = f"uci/{REGRESSION[name]}.npz"
    stored = read(file, data_dir)
    inputs, targets = stored["X"].astype(np.float64), stored["y"].astype(np.float64)
    tests = stored["test_index"].astype(np.int64)
    if (
        inputs.ndim != 2
        or targets.shape != inputs.shape[:1]
        or not np.isfinite(inputs).all() & np.isfinite(targets).all()
    ):
        raise BadFile(f"{file}: X must be [N, D] and y [N], both finite, got shapes {inputs.shape} and {targets.shape}")
    if tests.ndim != 2 or tests.min() < 0 or tests.max() >= len(targets) or (np.diff(np.sort(tests)) == 0).any():
        raise BadFile(f"{file}: test_index must hold different row numbers from 0 to {len(targets) - 1} in each row")
    return Regression(inputs, targets, tests, name)


def standardised(regression: Regression, split: int) -> Standardised:
    """Return one split with every column, and the target, at mean 0 and standard deviation 1 in the training part.

    A column that is constant in the training part becomes 0 there and keeps its unit (standard deviation 1).

    Raises:
        BadInput: There is no such split.
    """
    splits = len(regression.test_index)
    if not 0 <= split < splits:
        raise BadInput(f"split must be from 0 to {splits - 1} for {regression.name}, got {split}")
    test = regression.test_index[split]
    train = np.setdiff1d(np.arange(len(regression.targets)), test)
    centre, scale = _moments(regression.inputs[train])
    inputs = ((regression.inputs - centre) / scale).astype(np.float32)
    mean, sd = _moments(regression.targets[train])
    targets = ((regression.targets - mean) / sd).astype(np.float32)
    return Standardised(inputs[train], targets[train], inputs[test], targets[test], float(mean), float(sd))


def _moments(values: Doubles) -> tuple[Doubles, Doubles]:
    # Rounding gives a constant column a mean off its value and a standard deviation just above zero.
    constant = values.max(0) == values.min(0)
    return np.where(constant, values[0], values.mean(0)), np.where(constant, 1.0, values.std(0))
