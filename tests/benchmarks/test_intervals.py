"""The simulation of coverage: its truths are true, our interval of the calibration error covers, a percentile one does not."""

import json
import math
from pathlib import Path

import pytest
import torch

from bayesguard.benchmarks import intervals
from bayesguard.benchmarks.intervals import METRICS, coverage, run, truths
from bayesguard.benchmarks.stored.files import facts
from bayesguard.errors import BadInput
from bayesguard.metrics.registry import specs_for
from bayesguard.predictive import Predictive


def test_truths_are_those_of_a_very_large_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(1_000_000, generator=generator, dtype=torch.float64)
    targets = (torch.rand(len(z), generator=generator, dtype=torch.float64) < (z / 1.5).sigmoid()).long()
    wanted = truths(1.5)
    answers = Predictive.from_probs(z.sigmoid())
    for spec in specs_for(answers, list(METRICS)):
        # A per-example loss has a standard deviation below 1 here.
        assert abs(spec.scores(answers, targets).value() - wanted[spec.name]) < 5 / math.sqrt(len(z)), spec.name
    assert truths(1.0)["ece"] < 1e-9


def test_intervals_of_the_calibration_error_cover_and_percentiles_do_not() -> None:
    ours, percentile = coverage(2.0, 1000, 200, 1, metrics=["ece"], kinds=[None, "percentile"])
    tolerance = 5 * ours.standard_error(200)
    assert abs(ours.coverage - 0.95) < tolerance
    assert ours.above + ours.below + ours.coverage == 1
    flawed = coverage(1.25, 1000, 60, 1, metrics=["ece"], kinds=["percentile"])[0]
    assert percentile.coverage < 0.95
    assert flawed.coverage < 0.95 - 5 * flawed.standard_error(60)


def test_a_short_run(tmp_path: Path) -> None:
    lines: list[str] = []
    content = run(runs=3, sizes=[50], temperatures=[1.0, 2.0], out=tmp_path, say=lines.append)
    assert json.loads((tmp_path / "intervals.json").read_text()) == content
    assert len(content["coverage"]) == 2 * 4 * 4
    assert content["meta"]["runs"] == 3
    found = facts(content)
    assert found.device.startswith("CPU, ")
    assert f"torch {torch.__version__}" in found.versions
    assert found.seeds == "0"
    assert "not recorded" not in found
    assert any("| 2 | 50 | 0." in line for line in lines)


def test_what_cannot_be_run_is_refused_before_the_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="runs must be at least 1, got 0"):
        run(runs=0, out=tmp_path)
    monkeypatch.setattr(intervals, "coverage", lambda *_: pytest.fail("the folder is found out first"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run(runs=1, out=tmp_path / "file", say=lambda line: None)
