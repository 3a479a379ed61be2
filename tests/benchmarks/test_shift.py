"""The shift benchmark keeps each method that it measured, and goes on with the rest."""

import json
from pathlib import Path

import pytest

from bayesguard.benchmarks import shift
from bayesguard.errors import BadFile, BadInput
from bayesguard.results import Evaluation


@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def run(*methods: str) -> dict[str, Evaluation]:
        return shift.run("digits", methods=methods, epochs=1, limit=100, out=tmp_path, say=lines.append)

    first = run("deterministic")
    assert list(first)[1].startswith("Deterministic + T=")
    assert any(line.startswith("Deterministic: trained in ") for line in lines)
    monkeypatch.setattr(shift, "train", lambda *_: pytest.fail("it was measured already"))
    again = run("deterministic")
    assert list(again) == list(first)
    # What the table, the figures and the page are made of comes back whole.
    for name, evaluation in again.items():
        assert repr(vars(evaluation)) == repr(vars(first[name]))
    content = json.loads((tmp_path / "shift-digits.json").read_text())
    assert set(content["results"]) == set(first)
    assert content["meta"]["peak_memory_mib"] > 0
    assert {"date", "device", "seconds", "versions"} <= set(content["meta"])
    assert (tmp_path / "shift-digits.html").is_file()

    with pytest.raises(BadInput, match="epochs"):
        shift.run("digits", methods=["deterministic"], epochs=2, limit=100, out=tmp_path)
    kept = tmp_path / "cells" / "shift-digits" / "digits-deterministic-0.evaluations"
    whole = kept.read_bytes()
    for broken in (b"", b"nonsense", whole[: len(whole) // 2]):
        kept.write_bytes(broken)
        with pytest.raises(BadFile, match=r"delete digits-deterministic-0\.json"):
            run("deterministic")
    kept.unlink()
    with pytest.raises(BadFile, match=r"delete digits-deterministic-0\.json"):
        run("deterministic")


def test_what_cannot_be_run() -> None:
    with pytest.raises(BadInput, match="data must be one of"):
        shift.run("nonsense")
    with pytest.raises(BadInput, match="methods must be among"):
        shift.run("digits", methods=["nonsense"])
