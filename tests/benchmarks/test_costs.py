"""Costs: what is counted, what is timed, and tables of cells with and without them."""

from itertools import count

import pytest
import torch
from torch import nn

import bayesguard as bg
from bayesguard.benchmarks.cells import Record
from bayesguard.benchmarks.costs import cost_table, costs, with_costs

COSTS = {"parameters": 1000, "train_seconds": 12.4, "relative_time": 2.0}


def _cell(method: str, **values: object) -> Record:
    return {"method": method, "values": values}


def test_a_prediction_is_timed_beside_one_pass_of_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by one at each pass of a network, and stands still between."""
    passes = count(1)
    now = [0]

    class Counted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            now[0] = next(passes)
            return super().forward(x)

    monkeypatch.setattr("bayesguard.benchmarks.costs.time.perf_counter", lambda: now[0])
    members = [bg.MCDropout(nn.Sequential(Counted(3, 2), nn.Dropout(0.5)), num_samples=1) for _ in range(4)]
    ensemble = bg.DeepEnsemble(members, copy=False)
    found = costs(ensemble, bg.Deterministic(Counted(3, 2)), torch.zeros(5, 3), 1.234)
    assert found == {"parameters": 4 * 8, "train_seconds": 1.23, "relative_time": 4.0}


def test_cells_that_were_stored_without_costs_stay_valid() -> None:
    old, new = _cell("old", nll=1.0), _cell("new", costs=COSTS)
    assert with_costs("| a |", [old]) == "| a |"
    assert with_costs("| a |", [old, new]).startswith("| a |\n\nCosts:\n\n| | parameters |")
    assert cost_table([old, new], {"old": "Old", "new": "New"}).splitlines()[2:] == [
        "| Old | - | - | - |",
        "| New | 1,000 | 12 | 2.0 |",
    ]
    # A mean over the seeds that have them.
    other = _cell("new", costs={**COSTS, "train_seconds": 2.4, "relative_time": 3.0})
    assert cost_table([_cell("new"), new, other]).endswith("| new | 1,000 | 7.4 | 2.5 |")


def test_the_former_form_of_cifar10_c() -> None:
    old = _cell("one", parameters=1000, train_seconds=12.4, relative_prediction_time=2.0, rows={})
    assert cost_table([old]) == cost_table([_cell("one", costs=COSTS)])
