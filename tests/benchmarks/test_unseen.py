"""The benchmark of unseen shifts runs, leaves each family out, and writes what it found."""

import json
from pathlib import Path

import pytest

from bayesguard.benchmarks.unseen import FAMILIES, ROWS, run
from bayesguard.errors import BadInput
from bayesguard.shift import suite


def test_families_are_a_partition_of_the_suite() -> None:
    members = [name for family in FAMILIES.values() for name in family]
    assert len(set(members)) == len(members)
    assert set(members) == {shift.name for shift in suite("images")}


@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
def test_a_short_run(tmp_path: Path) -> None:
    lines: list[str] = []
    summary = run("digits", epochs=6, limit=400, out=tmp_path, say=lines.append)
    assert list(summary) == list(ROWS)
    assert all(values["num_sets"] == 105 for values in summary.values())
    assert summary[ROWS[4]]["ece_mean"] < summary[ROWS[1]]["ece_mean"]
    written = json.loads((tmp_path / "unseen-digits.json").read_text())
    assert written["summary"] == summary
    assert len(written["every_set"][ROWS[0]]["clean"]) == len(FAMILIES)
    assert any("left out weather" in line for line in lines)


def test_an_unknown_set() -> None:
    with pytest.raises(BadInput, match="data must be one of"):
        run("imagenet")
