"""Original tables and texts as arrays: UCI regression, Adult, German credit, streams, bicycles, CLINC150, Banking77."""

import csv
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bayesguard.errors import BadFile

Arrays = dict[str, Any]

_ADULT = [
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education_num",
    "marital_status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital_gain",
    "capital_loss",
    "hours_per_week",
    "native_country",
]
_ADULT_NUMBERS = ["age", "fnlwgt", "education_num", "capital_gain", "capital_loss", "hours_per_week"]
_GERMAN = [
    "checking_status",
    "duration_months",
    "credit_history",
    "purpose",
    "credit_amount",
    "savings",
    "employment_since",
    "installment_rate_pct",
    "personal_status_sex",
    "other_debtors",
    "residence_since",
    "property",
    "age_years",
    "other_installment_plans",
    "housing",
    "existing_credits",
    "job",
    "people_liable",
    "telephone",
    "foreign_worker",
]
_GERMAN_NUMBERS = [
    "duration_months",
    "credit_amount",
    "installment_rate_pct",
    "residence_since",
    "age_years",
    "existing_credits",
    "people_liable",
]
_FEMALE = ("A92", "A95")
_BIKE = [
    "season",
    "year",
    "month",
    "hour",
    "holiday",
    "weekday",
    "workingday",
    "weathersit",
    "temp",
    "feelingTemp",
    "humidity",
    "windspeed",
]

Rows = list[list[str]]


def uci(data: Path, indices: Sequence[Path]) -> Arrays:
    """Return a regression set with the test rows of each split, ascending.

    Args:
        data: The table, split by white space.
        indices: Files with the columns of the features, the column of the target, and the test rows of each split.
    """
    table = np.loadtxt(data, ndmin=2)
    features, target, *tests = (np.loadtxt(path, ndmin=1).astype(np.int32) for path in indices)
    return {
        "X": table[:, features].astype(np.float32),
        "y": table[:, int(target[0])].astype(np.float32),
        "test_index": np.stack([np.sort(test) for test in tests]),
    }


def adult(train: Path, test: Path) -> Arrays:
    """Return Adult with its own division; y = 1 for an income above 50K, levels in alphabetical order."""
    parts = {"train": _rows(train, len(_ADULT) + 1), "test": _rows(test, len(_ADULT) + 1)}
    categories = [name for name in _ADULT if name not in _ADULT_NUMBERS]
    levels = _levels([*parts["train"], *parts["test"]], _ADULT, categories)
    arrays: Arrays = {"num_name": np.array(_ADULT_NUMBERS), "cat_name": np.array(categories)}
    for part, rows in parts.items():
        arrays[f"x_num_{part}"] = _numbers(rows, _ADULT, _ADULT_NUMBERS)
        arrays[f"x_cat_{part}"] = _codes(rows, _ADULT, levels)
        arrays[f"y_{part}"] = np.array([row[-1].rstrip(".") == ">50K" for row in rows], np.uint8)
    return arrays | {f"levels_{name}": np.array(values) for name, values in levels.items()}


def german(path: Path) -> Arrays:
    """Return German credit; y = 1 for bad credit, `female` as its description reads the personal status."""
    rows = _rows(path, len(_GERMAN) + 1)
    categories = [name for name in _GERMAN if name not in _GERMAN_NUMBERS]
    levels = _levels(rows, _GERMAN, categories)
    status = _GERMAN.index("personal_status_sex")
    return {
        "x_num": _numbers(rows, _GERMAN, _GERMAN_NUMBERS),
        "x_cat": _codes(rows, _GERMAN, levels),
        "y": np.array([row[-1] == "2" for row in rows], np.uint8),
        "female": np.array([row[status] in _FEMALE for row in rows], np.uint8),
        "num_name": np.array(_GERMAN_NUMBERS),
        "cat_name": np.array(categories),
    } | {f"levels_{name}": np.array(values) for name, values in levels.items()}


def stream_of_rows(path: Path) -> Arrays:
    """Return a table in time order whose last column is the class."""
    header, *rows = _rows(path)
    table = np.array(rows, dtype=np.float64)
    return {
        "X": table[:, :-1].astype(np.float32),
        "y": table[:, -1].astype(np.uint8),
        "feature_names": np.array(header[:-1]),
    }


def bicycles(path: Path) -> Arrays:
    """Return the hours in time order with the hires in each, and the days since the first."""
    header, *rows = _rows(path)
    date, count = header.index("dateday"), header.index("count")
    days = [datetime.strptime(row[date], "%d-%m-%Y").toordinal() for row in rows]
    return {
        "X": _numbers(rows, header, _BIKE),
        "y": np.array([row[count] for row in rows], dtype=np.float32),
        "day": np.array(days, np.int32) - np.int32(days[0]),
        "feature_names": np.array(_BIKE),
    }


def clinc(data: Path, domains: Path) -> Arrays:
    """Return the queries of each part with intents, and those outside every intent; names in alphabetical order."""
    parts = json.loads(data.read_text(encoding="utf-8"))
    intents_of = json.loads(domains.read_text(encoding="utf-8"))
    names, domain_names = sorted({intent for _, intent in parts["train"]}), sorted(intents_of)
    domain_of = {intent: name for name, intents in intents_of.items() for intent in intents}
    number = {name: index for index, name in enumerate(names)}
    arrays: Arrays = {
        "class_name": np.array(names),
        "class_domain": np.array([domain_names.index(domain_of[name]) for name in names], np.uint8),
        "domain_name": np.array(domain_names),
    }
    for part, queries in parts.items():
        arrays[f"text_{part}"] = np.array([text for text, _ in queries])
        if not part.startswith("oos"):
            arrays[f"y_{part}"] = np.array([number[intent] for _, intent in queries], np.uint8)
    return arrays


def banking(train: Path, test: Path) -> Arrays:
    """Return the questions without white space at their ends; intents in alphabetical order."""
    parts = {"train": _rows(train, 2)[1:], "test": _rows(test, 2)[1:]}
    names = sorted({row[1] for row in parts["train"]})
    number = {name: index for index, name in enumerate(names)}
    arrays: Arrays = {"class_name": np.array(names)}
    for part, rows in parts.items():
        arrays[f"text_{part}"] = np.array([row[0].strip() for row in rows])
        arrays[f"y_{part}"] = np.array([number[row[1]] for row in rows], np.uint8)
    return arrays


def _rows(path: Path, columns: int | None = None) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, skipinitialspace=True) if row]
    wanted = len(rows[0]) if columns is None and rows else columns
    for number, row in enumerate(rows):
        if len(row) != wanted:
            raise BadFile(f"{path}: row {number} has {len(row)} columns where {wanted} are expected")
    return rows


def _numbers(rows: Rows, header: list[str], names: list[str]) -> npt.NDArray[np.float32]:
    columns = [header.index(name) for name in names]
    return np.array([[float(row[column]) for column in columns] for row in rows]).astype(np.float32)


def _levels(rows: Rows, header: list[str], names: list[str]) -> dict[str, list[str]]:
    """The values of each column: in alphabetical order, shorter codes before longer ones (A49 before A410)."""
    found = {name: {row[header.index(name)] for row in rows} for name in names}
    return {name: sorted(values, key=_code_order) for name, values in found.items()}


def _code_order(level: str) -> tuple[int, str]:
    is_code = level[:1] == "A" and level[1:].isdigit()
    return (len(level) if is_code else 0), level


def _codes(rows: Rows, header: list[str], levels: dict[str, list[str]]) -> npt.NDArray[np.int16]:
    numbers = {name: {level: code for code, level in enumerate(values)} for name, values in levels.items()}
    columns = {name: header.index(name) for name in levels}
    return np.array([[numbers[name][row[column]] for name, column in columns.items()] for row in rows], np.int16)
