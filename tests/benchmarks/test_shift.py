"""The shift benchmark keeps each method that it measured, and goes on with the rest."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import bayesguard as bg
from bayesguard.benchmarks import shift
from bayesguard.benchmarks.augmentation import augmix
from bayesguard.benchmarks.networks import SmallCNN
from bayesguard.benchmarks.shift_methods import METHODS
from bayesguard.benchmarks.stored.shift_tables import of_evaluations
from bayesguard.errors import BadFile, BadInput
from bayesguard.predictor import Predictor
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


@pytest.mark.parametrize("method", METHODS)
def test_what_each_method_is(method: str) -> None:
    asked: list[dict[str, object]] = []

    def fit(predictor: Predictor, **how: object) -> None:
        asked.append(how)

    predictor = METHODS[method].build(lambda _: SmallCNN(1, 10, 8), 3, fit)
    assert asked == [{"augment": augmix} if method == "augmix_last_layer" else {}]
    rates = {module.p for module in predictor.modules() if isinstance(module, nn.Dropout)}
    # Random weights or random units, not both.
    assert rates == ({0.0} if isinstance(predictor, bg.Variational) else {0.25})
    if isinstance(predictor, bg.DeepEnsemble):
        first, second = (next(member.parameters()) for member in list(predictor.members)[:2])
        assert not torch.equal(first, second)
        kind = bg.MCDropout if method == "dropout_ensemble" else bg.Deterministic
        assert all(isinstance(member, kind) for member in predictor.members)
    if isinstance(predictor, bg.Variational):
        assert predictor.weights.size == (64 * 10 + 10 if "last_layer" in method else 38282)


@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
def test_a_recipe_that_combines_has_a_row_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shift.SETTINGS, "digits", replace(shift.SETTINGS["digits"], suite="content"))
    lines: list[str] = []
    found = shift.run("digits", methods=["augmix_last_layer"], epochs=1, limit=60, out=tmp_path, say=lines.append)
    plain, tempered, aware = found
    label = METHODS["augmix_last_layer"].label
    assert (plain, aware) == (label, f"{label} + shift-aware")
    assert tempered.startswith(f"{label} + T=")
    assert any(f"| {label} | 38,932 |" in line for line in lines)
    content = json.loads((tmp_path / "shift-digits.json").read_text())
    assert set(content["costs"]) == {label}
    assert "Costs:" in of_evaluations(content)
    assert "Costs:" not in of_evaluations({**content, "costs": {}})
