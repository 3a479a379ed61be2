"""Tables of numbers and categories in three parts, encoded by the training part alone.

`adult` keeps its original division and has groups of people; the others are in time order, and are tested on consecutive
blocks that lie later and later. `docs/benchmarks.md` says what the files hold.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayesguard.benchmarks.files import read
from bayesguard.errors import BadFile, BadInput, BayesguardError
from bayesguard.sampling import stream

Numbers = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]
Labels = dict[str, list[str]]

NUM_BLOCKS = 5
# Of the training rows: what a sensor cannot have measured lies beyond, and little else.
CLIPPED = (0.001, 0.999)
FEW_WOMEN = 0.1
_AGES = (30, 45, 60)


class Encoder(NamedTuple):
    """Standardises numbers and turns categories into indicators, as the rows that it was fitted to say.

    Attributes:
        lower: Least value of each number that is let through, minus infinity for all.
        upper: Largest one.
        mean: Of the training rows, after clipping.
        deviation: Of the training rows; 1 for a column that is constant there.
        levels: Codes of each category that the training rows have, in order; any other gets zeros throughout.
    """

    lower: Numbers
    upper: Numbers
    mean: Numbers
    deviation: Numbers
    levels: tuple[Codes, ...]

    @classmethod
    def fit(cls, numbers: Numbers, categories: Codes, clip: Sequence[int] = ()) -> "Encoder":
        """Fit to training rows; the columns `clip` of the numbers are cut at their quantiles `CLIPPED`."""
        if not len(numbers):
            raise BadInput("numbers has no rows; an encoder is fitted to training rows")
        width = numbers.shape[1]
        lower, upper = np.full(width, -np.inf), np.full(width, np.inf)
        for column in clip:
            lower[column], upper[column] = np.quantile(numbers[:, column], CLIPPED)
        kept = numbers.clip(lower, upper)
        deviation = kept.std(0)
        levels = tuple(np.unique(column) for column in categories.T)
        return cls(lower, upper, kept.mean(0), np.where(deviation > 0, deviation, 1.0), levels)

    def __call__(self, numbers: Numbers, categories: Codes) -> Tensor:
        """Return the encoded rows `[N, D]`, float32."""
        scaled = (numbers.clip(self.lower, self.upper) - self.mean) / self.deviation
        indicators = [column[:, None] == known for column, known in zip(categories.T, self.levels, strict=True)]
        return torch.from_numpy(np.concatenate([scaled, *indicators], 1).astype(np.float32))


class Target(NamedTuple):
    """How a real target y was turned into what the network is trained on: `(log(1 + y) - mean) / deviation`."""

    mean: float
    deviation: float

    @classmethod
    def fit(cls, y: Tensor) -> "Target":
        """Fit to the targets of the training rows."""
        logs = y.double().log1p()
        return cls(float(logs.mean()), float(logs.std(correction=0)))

    def __call__(self, y: Tensor) -> Tensor:
        """Return the standardised logarithms, float32."""
        return ((y.double().log1p() - self.mean) / self.deviation).float()


class Part(NamedTuple):
    """Encoded rows with their targets, and labels of groups by name."""

    x: Tensor
    y: Tensor
    labels: Labels

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y


@dataclass(frozen=True)
class Table:
    """A data set, ready for training.

    Attributes:
        train, calibration, test: Parts of which none has rows of another.
        blocks: Names of the consecutive parts of the test rows, and their rows; none where the rows have no order.
        in_time: Whether the test rows are in the order of time.
        target: How the targets were transformed; None for classes, 0 and 1.
        counts: The targets of the test rows in their own unit; None for classes.
    """

    name: str
    train: Part
    calibration: Part
    test: Part
    blocks: Mapping[str, slice]
    in_time: bool
    target: Target | None = None
    counts: Tensor | None = None

    @property
    def num_features(self) -> int:
        return self.train.x.shape[1]


def load(name: str, *, seed: int = 0, data_dir: str | Path | None = None, limit: int | None = None) -> Table:
    """Return a data set by name: one of `LOADERS`.

    Args:
        name: Which one.
        seed: Of the rows that are held out, where they are drawn.
        data_dir: Folder of the data; None for that of BAYESGUARD_DATA.
        limit: Rows at most, evenly spaced (of adult as many for training and for the test); None for all.

    Raises:
        BadInput: An unknown name, or a file that is not there.
        BadFile: A file without the arrays that are needed.
    """
    if name not in LOADERS:
        raise BadInput(f"data must be one of {', '.join(LOADERS)}, got {name!r}")
    file, build = LOADERS[name]
    raw = read(file, data_dir)
    try:
        return build(name, raw, seed, limit)
    except BayesguardError:
        raise
    except (KeyError, ValueError, IndexError) as error:
        raise BadFile(
            f"{file} does not hold what is needed ({error!r}); docs/benchmarks.md says what that is"
        ) from None


def chronological(count: int, num_blocks: int = NUM_BLOCKS) -> tuple[Rows, Rows, Rows, dict[str, slice]]:
    """Return the rows to train on (the first half), to calibrate on (the next tenth) and to test on, and its blocks."""
    rows = np.arange(count)
    first, second = count // 2, count // 2 + count // 10
    ends = [(count - second) * block // num_blocks for block in range(num_blocks + 1)]
    blocks = {str(block + 1): slice(ends[block], ends[block + 1]) for block in range(num_blocks)}
    return rows[:first], rows[first:second], rows[second:], blocks


def held_out(count: int, share: float, seed: int) -> tuple[Rows, Rows]:
    """Return two random parts of `count` rows in rising order, the second with `share` of them."""
    order = torch.randperm(count, generator=stream("cpu", seed, "held out")).numpy()
    cut = count - round(share * count)
    return np.sort(order[:cut]), np.sort(order[cut:])


def thinned(members: npt.NDArray[np.bool_], share: float, seed: int) -> Rows:
    """Return the rows that are left when only `share` of the `members`, drawn at random, stay with all others."""
    inside = np.flatnonzero(members)
    _, kept = held_out(len(inside), share, seed)
    return np.sort(np.concatenate([np.flatnonzero(~members), inside[kept]]))


def _adult(name: str, raw: dict[str, Any], seed: int, limit: int | None) -> Table:
    parts = {}
    for which in ("train", "test"):
        some = _evenly(len(raw[f"y_{which}"]), limit)
        numbers, codes = raw[f"x_num_{which}"][some].astype(np.float64), raw[f"x_cat_{which}"][some].astype(np.int64)
        parts[which] = numbers, codes, _classes(raw[f"y_{which}"][some]), _people(raw, numbers, codes)
    numbers, codes, y, people = parts["train"]
    own, held = held_out(len(y), 0.2, seed)
    if name == "adult_few_women":
        women = np.array([sex == "Female" for sex in people["sex"]])
        own, held = own[thinned(women[own], FEW_WOMEN, seed)], held[thinned(women[held], FEW_WOMEN, seed)]
    encode = Encoder.fit(numbers[own], codes[own])

    def part(rows: Rows) -> Part:
        labels = {key: [values[row] for row in rows] for key, values in people.items()}
        return Part(encode(numbers[rows], codes[rows]), y[rows], labels)

    test = parts["test"]
    return Table(name, part(own), part(held), Part(encode(*test[:2]), *test[2:]), {}, in_time=False)


def _people(raw: dict[str, Any], numbers: Numbers, codes: Codes) -> Labels:
    """The groups of people: by sex, by race, by age."""
    columns = [str(column) for column in raw["cat_name"]]
    found = {key: [str(raw[f"levels_{key}"][code]) for code in codes[:, columns.index(key)]] for key in ("sex", "race")}
    ages = numbers[:, [str(column) for column in raw["num_name"]].index("age")]
    names = (
        f"under {_AGES[0]}",
        *(f"{a} to {b - 1}" for a, b in pairwise(_AGES)),
        f"{_AGES[-1]} and over",
    )
    found["age"] = [names[place] for place in np.digitize(ages, _AGES)]
    return found


def _stream(name: str, raw: dict[str, Any], seed: int, limit: int | None) -> Table:
    """Electricity and weather: the first half, the next tenth, and five later blocks."""
    some = _evenly(len(raw["y"]), limit)
    numbers, y = raw["X"][some].astype(np.float64), _classes(raw["y"][some])
    none = np.empty((len(y), 0), dtype=np.int64)
    own, held, tested, blocks = chronological(len(y))
    # The third feature of weather, a pressure in hectopascals by its size, has values such as 5503.8.
    encode = Encoder.fit(numbers[own], none[own], clip=(2,) if name == "weather" else ())
    own_part, held_part, test = (Part(encode(numbers[rows], none[rows]), y[rows], {}) for rows in (own, held, tested))
    return Table(name, own_part, held_part, test, blocks, in_time=True)


_BIKE_NUMBERS = ("holiday", "workingday", "temp", "feelingTemp", "humidity", "windspeed")
_BIKE_CATEGORIES = ("season", "month", "hour", "weekday", "weathersit")
_QUARTERS = ("2012 Q1", "2012 Q2", "2012 Q3", "2012 Q4")


def _bikes(name: str, raw: dict[str, Any], seed: int, limit: int | None) -> Table:
    """Days of 2011 to train, to calibrate, and to test beside the quarters of 2012. The year is no feature."""
    some = _evenly(len(raw["y"]), limit)
    columns = [str(column) for column in raw["feature_names"]]
    values, y = raw["X"][some].astype(np.float64), torch.from_numpy(raw["y"][some].astype(np.float64))
    numbers = values[:, [columns.index(column) for column in _BIKE_NUMBERS]]
    codes = values[:, [columns.index(column) for column in _BIKE_CATEGORIES]].astype(np.int64)
    year, quarter = values[:, columns.index("year")], (values[:, columns.index("month")].astype(int) - 1) // 3
    # Whole days, since the hours of one are alike.
    days = np.unique(raw["day"][some][year == 0])
    rest, tested = held_out(len(days), 0.15, seed)
    fitted, held = held_out(len(rest), 0.15 / 0.85, seed + 1)
    of = [
        np.flatnonzero((year == 0) & np.isin(raw["day"][some], days[chosen]))
        for chosen in (rest[fitted], rest[held], tested)
    ]
    later = [np.flatnonzero((year == 1) & (quarter == place)) for place in range(4)]
    ends = np.cumsum([0, len(of[2]), *(len(rows) for rows in later)])
    blocks = {
        block: slice(int(a), int(b)) for block, a, b in zip(("2011", *_QUARTERS), ends[:-1], ends[1:], strict=True)
    }
    encode, target = Encoder.fit(numbers[of[0]], codes[of[0]]), Target.fit(y[of[0]])
    test = np.concatenate([of[2], *later])
    own_part, held_part, test_part = (
        Part(encode(numbers[rows], codes[rows]), target(y[rows]), {}) for rows in (of[0], of[1], test)
    )
    return Table(name, own_part, held_part, test_part, blocks, True, target, y[test])


LOADERS: dict[str, tuple[str, Callable[[str, dict[str, Any], int, int | None], Table]]] = {
    "adult": ("tabular/adult.npz", _adult),
    "adult_few_women": ("tabular/adult.npz", _adult),
    "electricity": ("tabular/electricity.npz", _stream),
    "weather": ("tabular/weather.npz", _stream),
    "bike_sharing": ("tabular/bike_sharing_hour.npz", _bikes),
}


def _evenly(count: int, limit: int | None) -> Rows:
    """Return the numbers of at most `limit` of `count` rows, in order and evenly spaced."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def _classes(y: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(y.astype(np.int64))
