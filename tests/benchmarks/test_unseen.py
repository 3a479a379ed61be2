"""The benchmark of unseen shifts runs, leaves each family out, and writes what it found."""

import json
from pathlib import Path

import pytest

from bayesguard.benchmarks.cells import Record
from bayesguard.benchmarks.unseen import FAMILIES, ROWS, run, summary, table
from bayesguard.errors import BadInput
from bayesguard.shift import suite


def test_families_are_a_partition_of_the_suite() -> None:
    members = [name for family in FAMILIES.values() for name in family]
    assert len(set(members)) == len(members)
    assert set(members) == {shift.name for shift in suite("images")}


@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
def test_a_short_run(tmp_path: Path) -> None:
    lines: list[str] = []
    (record,) = run("digits", epochs=6, limit=400, out=tmp_path, say=lines.append)
    found = record["values"]["rows"]
    assert list(found) == list(ROWS)
    for values in found.values():
        assert set(values["unseen"]) == {name for family in FAMILIES.values() for name in family}
        assert all(len(errors) == 5 for errors in values["unseen"].values())
        assert len(values["clean"]) == len(FAMILIES)
    assert summary(found[ROWS[4]])[3] < summary(found[ROWS[1]])[3]
    assert "| Deep ensemble |" in table([record])
    assert json.loads((tmp_path / "unseen-digits.json").read_text())["cells"] == [record]
    assert lines[0] == f"{table([record])}\n"
    # What was measured is not measured again: with other numbers of epochs it is refused, and not mistaken for the same.
    assert run("digits", epochs=6, limit=400, out=tmp_path, say=lines.append) == [record]
    with pytest.raises(BadInput, match="epochs"):
        run("digits", epochs=7, limit=400, out=tmp_path)


def test_the_table_has_intervals_over_seeds() -> None:
    def record(shift: float) -> Record:
        row = {"unseen": {"fog": [0.1 + shift, 0.3 + shift]}, "clean": [0.01], "brier": {"fog": [0.2, 0.4]}}
        return {"values": {"rows": dict.fromkeys(ROWS, row)}}

    alone = table([record(0.0)]).splitlines()[2]
    assert alone == "| as trained | 0.150 | 0.200 | 0.250 | 0.200 | 0.010 | 0.300 |"
    # Two seeds, 0.2 and 0.4: the standard error is 0.1, and t(0.975, 1) is 12.706.
    both = table([record(0.0), record(0.2)]).splitlines()[2]
    assert both.split(" | ")[4] == "0.300 [-0.971, 1.571]"


def test_an_unknown_set() -> None:
    with pytest.raises(BadInput, match="data must be one of"):
        run("imagenet")
    with pytest.raises(BadInput, match="seeds must be 1 or more"):
        run("digits", seeds=0)
