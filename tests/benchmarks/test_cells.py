"""Cells: each measured once, refused where settings differ, and a failure costs its own cell only."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import pytest
import torch

from bayesguard.benchmarks.cells import Cell, CellsFailed, collect, measure_all, measure_together, spread
from bayesguard.errors import BadFile, BadInput

CELLS = [Cell("toy", method, seed) for method in ("a", "b") for seed in range(2)]


def number(cell: Cell, device: torch.device) -> dict[str, Any]:
    return {"value": cell.seed + len(cell.method), "device": str(device), "undefined": math.nan}


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, cell: Cell, device: torch.device) -> dict[str, Any]:
        self.calls += 1
        return number(cell, device)


def test_a_second_run_measures_only_what_is_missing(tmp_path: Path) -> None:
    measure = Counted()
    first = measure_all(measure, CELLS[:3], settings={"epochs": 1}, folder=tmp_path, device="cpu")
    again = measure_all(measure, CELLS, settings={"epochs": 1}, folder=tmp_path, device="cpu")
    assert measure.calls == 4
    assert again[:3] == first
    assert [record["values"]["value"] for record in again] == [1, 2, 1, 2]
    assert again[0]["values"]["undefined"] is None
    assert again[0]["seconds"] >= 0
    assert again[0]["peak_memory_mib"] > 0


def test_other_settings_are_refused_and_nothing_is_overwritten(tmp_path: Path) -> None:
    measure_all(number, CELLS[:1], settings={"epochs": 1}, folder=tmp_path, device="cpu")
    before = (tmp_path / "toy-a-0.json").read_text()
    with pytest.raises(BadInput, match="other settings \\(epochs\\)"):
        measure_all(number, CELLS[:1], settings={"epochs": 2}, folder=tmp_path, device="cpu")
    assert (tmp_path / "toy-a-0.json").read_text() == before


def test_each_cell_may_have_settings_of_its_own(tmp_path: Path) -> None:
    """So that cells of several methods are measured in one call, and by as many processes as there are cells."""
    records = measure_all(number, CELLS, settings=lambda cell: {"of": cell.method}, folder=tmp_path, device="cpu")
    assert [record["settings"] for record in records] == [{"of": cell.method} for cell in CELLS]
    with pytest.raises(BadInput, match=r"toy-b-0.json was measured with other settings \(of\)"):
        measure_all(number, CELLS, settings={"of": "a"}, folder=tmp_path, device="cpu")


@pytest.mark.parametrize("text", ['{"settings": null}', '{"settings": [1], "values": {}}', '{"settings": {}}'])
def test_a_file_of_another_form_is_named(text: str, tmp_path: Path) -> None:
    """What is JSON and no record ended in an AttributeError or a KeyError."""
    (tmp_path / "toy-a-0.json").write_text(text)
    with pytest.raises(BadFile, match=r"toy-a-0.json is not the result of a cell .* delete it"):
        measure_all(number, CELLS, settings={}, folder=tmp_path, device="cpu")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "toy-a-0.json").write_text("{")
    with pytest.raises(BadFile, match="toy-a-0"):
        measure_all(number, CELLS[:1], settings={}, folder=tmp_path, device="cpu")


def test_no_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"jobs must be 1 or more processes, .*got 0"):
        measure_all(number, CELLS, settings={}, folder=tmp_path, device="cpu", jobs=0)


def test_a_failure_costs_its_own_cell_only(tmp_path: Path) -> None:
    def measure(cell: Cell, device: torch.device) -> dict[str, Any]:
        if cell == CELLS[1]:
            raise BadInput("no such thing")
        return number(cell, device)

    with pytest.raises(CellsFailed, match="1 of 4 cells failed: toy, a, 1: BadInput: no such thing"):
        measure_all(measure, CELLS, settings={}, folder=tmp_path, device="cpu")
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_processes_give_the_same_records(tmp_path: Path) -> None:
    alone = measure_all(number, CELLS, settings={}, folder=tmp_path / "one", device="cpu")
    shared = measure_all(number, CELLS, settings={}, folder=tmp_path / "two", device="cpu", jobs=2)
    assert [record["values"] for record in alone] == [record["values"] for record in shared]
    assert shared[0]["device"] == "CPU, 1 threads"


def test_what_torch_loads_at_its_first_step_is_in_no_cells_time() -> None:
    """Seconds on some machines, which the first method of a table alone would have had. In a process of its own."""
    program = """
import sys, tempfile
from bayesguard.benchmarks.cells import Cell, measure_all

def measure(cell, device):
    return {"loaded": "torch._dynamo" in sys.modules}

assert "torch._dynamo" not in sys.modules
print(measure_all(measure, [Cell("toy", "a", 0)], settings={}, folder=tempfile.mkdtemp(), device="cpu")[0]["values"])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "{'loaded': True}"


def test_the_surrounding_backend_is_used(tmp_path: Path) -> None:
    with joblib.parallel_config(backend="threading", n_jobs=2):
        records = measure_all(number, CELLS, settings={}, folder=tmp_path, device="cpu")
    assert len(records) == 4


def test_cells_run_on_a_dask_cluster(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs dask's distributed")
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        records = measure_all(number, CELLS, settings={}, folder=tmp_path, device="cpu")
    assert [record["values"]["value"] for record in records] == [1, 2, 1, 2]


def test_records_are_collected_in_one_file(tmp_path: Path) -> None:
    records = measure_all(number, CELLS, settings={}, folder=tmp_path / "cells", device="cpu")
    collect(records, tmp_path / "toy.json", benchmark="toy")
    kept = json.loads((tmp_path / "toy.json").read_text())
    assert kept["meta"] == {"benchmark": "toy"}
    assert kept["cells"] == records


def test_spread_is_that_of_the_t_distribution() -> None:
    found = spread([1.0, 2.0, 4.0])
    assert found.deviation == pytest.approx(math.sqrt(7 / 3))
    # t with two degrees of freedom: 4.302653.
    assert found.upper - found.mean == pytest.approx(4.302652729911275 * math.sqrt(7 / 9))
    assert math.isnan(spread([1.0]).error)
    with pytest.raises(BadInput, match="empty"):
        spread([])


def test_cells_measured_together_are_one_call_for_what_is_missing(tmp_path: Path) -> None:
    asked = []

    def measure(cells: Sequence[Cell], device: torch.device) -> list[dict[str, Any]]:
        asked.append(list(cells))
        return [number(cell, device) for cell in cells]

    measure_together(measure, CELLS[:1], settings={}, folder=tmp_path, device="cpu")
    records = measure_together(measure, CELLS, settings={}, folder=tmp_path, device="cpu")
    assert measure_together(measure, CELLS, settings={}, folder=tmp_path, device="cpu") == records
    assert asked == [CELLS[:1], CELLS[1:]]
    assert [record["values"]["value"] for record in records] == [1, 2, 1, 2]
    assert len({record["seconds"] for record in records[1:]}) == 1


def test_cells_that_fail_together_are_all_named(tmp_path: Path) -> None:
    def measure(cells: Sequence[Cell], device: torch.device) -> list[dict[str, Any]]:
        raise BadInput("no such thing")

    said = r"4 of 4 cells failed: toy, a, 0 and toy, a, 1 and toy, b, 0 and toy, b, 1: BadInput: no such thing$"
    with pytest.raises(CellsFailed, match=said):
        measure_together(measure, CELLS, settings={}, folder=tmp_path, device="cpu")
