"""CIFAR-10-C: sums as published, tables with the right published column, and a small run from files."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesguard.benchmarks import cifar10_c
from bayesguard.benchmarks.cells import Cell, Record
from bayesguard.benchmarks.cifar10_c import left_out, run, run_shift
from bayesguard.benchmarks.cifar10_c_scores import Bins, Scored, averaged, by_set, reliability_of, scored
from bayesguard.benchmarks.cifar10_c_tables import quartiles, table
from bayesguard.benchmarks.datasets import ImageSet, load
from bayesguard.benchmarks.published import Quartiles
from bayesguard.benchmarks.shift_methods import METHODS
from bayesguard.benchmarks.stored import shift_figures
from bayesguard.benchmarks.unseen import FAMILIES
from bayesguard.errors import BadInput
from bayesguard.evaluation import evaluate
from bayesguard.predictive import Predictive
from bayesguard.sampling import stream
from bayesguard.shift import suite

SETTINGS = {
    "suite": "cifar10-c-ovadia",
    "budget": "full",
    "network": "resnet20",
    "epochs": 80,
    "batch_size": 256,
    "members": 10,
    "draws": 128,
    "severities": [1, 2, 3, 4, 5],
}


def record(method: str, seed: int, level: float, rows: tuple[str, ...], **settings: Any) -> dict[str, Any]:
    """A cell whose sets have 1, 2, ..., 5 times the level in every metric."""
    clean = dict.fromkeys(("accuracy", "nll", "brier", "ece"), level)
    sets = [{"shift": "fog", "severity": s, **dict.fromkeys(clean, s * level)} for s in range(1, 6)]
    values = {
        "rows": {row: {"clean": clean, "sets": sets} for row in rows},
        "temperature": 1.0,
        "costs": {"parameters": 1234, "train_seconds": 2.0, "relative_time": 1.0},
    }
    return {
        "data": "cifar10",
        "method": method,
        "seed": seed,
        "settings": SETTINGS | settings,
        "values": values,
        "device": "CPU",
    }


def test_quartiles_are_numpys() -> None:
    values = torch.rand(80, generator=stream("cpu", 0, "values"), dtype=torch.float64).tolist()
    np.testing.assert_allclose(quartiles(values), np.percentile(values, [25, 50, 75]))
    assert quartiles([1.0, 3.0]) == Quartiles(1.5, 2.0, 2.5)


def test_quartiles_stand_beside_those_of_the_paper() -> None:
    rows = ("as trained", "temperature", "shift-aware, pointwise", "shift-aware, unlabelled batch")
    text = table([record("deterministic", 0, 0.1, rows[:2]), record("dropout_ensemble", 0, 0.01, rows)])
    lines = text.splitlines()
    ours = "0.200 / 0.300 / 0.400"
    assert lines[2].startswith(f"| Deterministic | 0.100 | 0.100 | {ours} | {ours} | 0.057 / 0.127 / 0.288 | 0.200 ")
    assert lines[2].endswith("| 0.578 / 1.120 / 2.356 |")
    assert f"| Deterministic, temperature | 0.100 | 0.100 | {ours} | {ours} | 0.022 / 0.049 / 0.180 |" in lines[3]
    ours = "0.020 / 0.030 / 0.040"
    assert lines[4] == f"| Ensemble with dropout | 0.010 | 0.010 | {ours} |" + f" {ours} |  |" * 3
    assert f"pointwise | 0.010 | 0.010 | {ours} | {ours} | aim: 0.022 / 0.030 / 0.070 | {ours} |  |" in lines[6]
    assert f"| {ours} | aim: 0.012 / 0.020 / 0.045 | {ours} | aim: 50 % at most 0.299 | {ours} |  |" in lines[7]
    assert len({line.count("|") for line in lines[:8]}) == 1
    assert "0.147" not in text


def test_seeds_have_an_interval() -> None:
    text = table([record("deterministic", seed, level, ("as trained",)) for seed, level in ((0, 0.1), (1, 0.2))])
    reach = 12.7062 * 0.15  # The t quantile, and the standard error of 0.3 and 0.6.
    assert f"0.450 [{0.45 - reach:.3f}, {0.45 + reach:.3f}]" in text


def test_means_stand_beside_those_of_uncertainty_baselines() -> None:
    text = table([record("deep_ensemble", 0, 0.1, ("as trained", "temperature"), suite="cifar10-c")])
    lines = text.splitlines()
    expected = "0.100 | 0.114 | 0.100 | 0.966 | 0.100 | 0.010 | 0.300 | 0.810 | 0.300 | 0.779 | 0.300 | 0.087 |"
    assert lines[2] == f"| Deep ensemble | {expected}"
    assert "0.114" not in lines[3]
    assert "Ovadia" not in text


@pytest.mark.parametrize("name", cifar10_c.SUITES)
def test_every_kind_is_of_a_family(name: str) -> None:
    kinds = {shift.name for shift in suite(name)}
    assert kinds <= {kind for family in FAMILIES.values() for kind in family}
    assert set(cifar10_c.BUDGETS["small"]["kinds"]) <= kinds


def test_a_left_out_family_is_not_calibrated_on() -> None:
    """Shifts of one family make answers overconfident; what never saw it cannot mend it, and does not by its labels."""
    labels = torch.arange(200) % 2
    generator = stream("cpu", 0, "answers")

    def answers(scale: float, share: float) -> Predictive:
        right = torch.rand(200, generator=generator) < share
        signs = torch.where(right, 1.0, -1.0) * (2 * labels - 1)
        noise = 0.3 * torch.rand(200, generator=generator)
        logits = signs * (scale + noise)
        return Predictive.from_logits(torch.stack([-logits, logits], 1))

    kinds = ["gaussian_noise", "fog", "defocus_blur"]
    held = [answers(1.5, 0.95), answers(1.0, 0.8), answers(1.0, 0.8), answers(1.0, 0.8)]
    # What takes the content away is seen whichever family is left out, and not tested on.
    kinds, content = [*kinds, "patch_shuffle"], answers(0.3, 0.5)
    found = left_out([*held, content], labels, held, labels, kinds, seed=0)
    assert set(found) == {
        "shift-aware, pointwise",
        "shift-aware, unlabelled batch",
        "best temperature for each set",
    }
    for own in found.values():
        assert len(own) == 4
        assert [each.bins.sets for each in own] == [3, 1, 1, 1]
        assert own[1].scores["accuracy"] == pytest.approx(float((held[1].labels == labels).double().mean()))
    other = [*held[:2], answers(3.0, 0.3), held[3]]
    changed = left_out([*other, content], labels, held, labels, kinds, seed=0)
    row = "shift-aware, pointwise"
    assert changed[row][2] == found[row][2]
    assert changed[row][1] != found[row][1]
    changed = left_out([*held, answers(0.1, 0.4)], labels, held, labels, kinds, seed=0)
    assert all(changed[row][k] != found[row][k] for k in range(4))


def _answers(seed: int, scale: float, count: int = 300) -> tuple[Predictive, torch.Tensor]:
    generator = stream("cpu", seed, "answers")
    logits = scale * torch.randn(count, 4, generator=generator)
    return Predictive.from_logits(logits), torch.randint(4, (count,), generator=generator)


def test_bins_of_a_set_make_its_calibration_error() -> None:
    pred, labels = _answers(0, 2.0)
    found = scored(pred, labels)
    assert sum(found.bins.count) == len(labels)
    gaps = np.abs(np.subtract(found.bins.confidence, found.bins.accuracy))
    assert gaps.sum() / len(labels) == pytest.approx(found.scores["ece"])
    bins, expected = reliability_of([asdict(found.bins)]), evaluate(pred, labels, num_resamples=0).reliability[0]
    for name, values in vars(bins).items():
        torch.testing.assert_close(values, getattr(expected, name).double(), equal_nan=True)


def test_bins_are_pooled_over_the_sets_of_a_severity_and_an_image_counts_once() -> None:
    shifts = [
        shift for shift in suite("cifar10-c-ovadia") if shift.name in ("fog", "contrast") and shift.severity in (1, 5)
    ]
    sets = [scored(*_answers(seed, 1.0 + seed)) for seed in range(5)]
    row = json.loads(json.dumps(by_set(shifts, sets)))
    assert set(row["reliability"]) == {"0", "1", "5"}
    first, second = (own.bins for shift, own in zip(shifts, sets[1:], strict=True) if shift.severity == 5)
    kept = row["reliability"]["5"]
    assert kept["sets"] == 2
    for name in ("count", "confidence", "accuracy"):
        np.testing.assert_allclose(kept[name], np.add(getattr(first, name), getattr(second, name)))
    # The same answers twice say no more than once.
    once, twice = reliability_of([asdict(first)]), reliability_of([asdict(first)] * 2)
    torch.testing.assert_close(twice.count, 2 * once.count)
    torch.testing.assert_close(twice.accuracy_lower, once.accuracy_lower, equal_nan=True)


def test_several_answers_to_a_set_have_mean_scores_and_summed_bins() -> None:
    found = averaged([Scored({"ece": 0.1}, Bins(1, [1.0], [0.5], [1.0])), Scored({"ece": 0.3}, Bins(1, [3], [2], [1]))])
    assert found.scores["ece"] == pytest.approx(0.2)
    assert found.bins == Bins(2, [4.0], [2.5], [2.0])


def test_the_page_draws_the_bins_of_all_seeds() -> None:
    cells = [record("deterministic", seed, 0.1, ("as trained", "temperature")) for seed in (0, 1)]
    assert "Reliability under shift" not in shift_figures.of_evaluations({"shift-cifar10-c": {"cells": cells}})
    for cell, right in zip(cells, (6.0, 2.0), strict=True):
        bins = Bins(1, [0.0] * 14 + [10.0], [0.0] * 14 + [9.7], [0.0] * 14 + [right])
        cell["values"]["rows"]["as trained"]["reliability"] = {"0": asdict(bins), "5": asdict(bins)}
    content = {"cells": cells}
    found = shift_figures.bins_of(content)
    assert set(found) == {"Deterministic, as trained"}
    assert found["Deterministic, as trained"]["5"].accuracy[-1] == pytest.approx(0.4)
    text = shift_figures.of_evaluations({"shift-cifar10-c": content})
    assert "severity 5: confidence 0.970\naccuracy 0.400 " in text
    assert "20 answers" in text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """CIFAR-10 in the documented format: 200 training and 120 test images."""
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name, count in (("train_1of2", 100), ("train_2of2", 100), ("test", 120)):
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"images/cifar10_{name}.npz", x=pixels, y=labels)
    return tmp_path


@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
def test_a_small_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cifar10_c.BUDGETS["small"], "train", 64)
    monkeypatch.setitem(cifar10_c.BUDGETS["small"], "test", 110)
    monkeypatch.setitem(cifar10_c.BUDGETS["small"], "epochs", 1)

    def split(name: str, data_dir: Path) -> ImageSet:
        # Of 50,000 images the last 10,000 are held out, of these 200 none.
        images = load(name, data_dir=data_dir)
        return images._replace(calibration=images.train)

    monkeypatch.setattr(cifar10_c, "load", split)
    lines: list[str] = []
    methods = ["deterministic", "dropout_ensemble"]
    options: dict[str, Any] = {"budget": "small", "device": "cpu", "data_dir": folder, "out": folder / "out"}
    records = run(methods=methods, say=lines.append, **options)
    path = folder / "out" / "shift-cifar10-c-ovadia-small.json"
    written = json.loads(path.read_text())
    assert written["cells"] == records
    assert written["meta"]["suite"] == "cifar10-c-ovadia"
    first, second = (each["values"] for each in records)
    assert set(first["rows"]) == {"as trained", "temperature"}
    assert len(second["rows"]) == 5
    for row in second["rows"].values():
        assert [(one["shift"], one["severity"]) for one in row["sets"]] == [
            (kind, severity) for kind in sorted(cifar10_c.BUDGETS["small"]["kinds"], key=_place) for severity in (1, 5)
        ]
        assert {name: sum(own["count"]) / own["sets"] for name, own in row["reliability"].items()} == {
            "0": 110,
            "1": 110,
            "5": 110,
        }
        assert all(math.isfinite(one[name]) for one in row["sets"] for name in ("accuracy", "nll", "brier", "ece"))
    assert second["costs"]["parameters"] == 2 * first["costs"]["parameters"]
    assert min(*first["costs"].values(), *second["costs"].values()) > 0
    assert "SMALL BUDGET" in lines[0]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured already")

    monkeypatch.setattr(cifar10_c, "measure", never)
    assert run(methods=methods, say=lines.append, **options) == records


def test_budgets_name_their_files_and_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    def note(*_: object, settings: Any, folder: Path, **__: object) -> list[Record]:
        seen.append((folder.name, settings(Cell("cifar10", "deterministic", 0))))
        return []

    monkeypatch.setattr(cifar10_c, "measure_all", note)
    monkeypatch.setattr(cifar10_c, "table", lambda _: "")
    for options in (
        {"budget": "cpu"},
        {"budget": "cpu", "network": "resnet18", "epochs": 3},
        {"network": "resnet18"},
        {"network": "resnet20"},
    ):
        run(methods=["deterministic"], out=tmp_path, device="cpu", say=lambda _: None, **options)
    names = ["-cpu", "-cpu-resnet18", "-resnet18", ""]
    assert [name for name, _ in seen] == [f"shift-cifar10-c-ovadia{name}-cells" for name in names]
    chosen = [(each["network"], each["epochs"], each["train"], each["kinds"]) for _, each in seen]
    assert chosen == [
        ("resnet20", 8, 20_000, None),
        ("resnet18", 3, 20_000, None),
        ("resnet18", 80, None, None),
        ("resnet20", 80, None, None),
    ]
    assert all(each["severities"] == [1, 2, 3, 4, 5] for _, each in seen)


def _place(kind: str) -> int:
    return [shift.name for shift in suite("cifar10-c-ovadia")].index(kind)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["swag"]}, "methods must be among deterministic, .*got swag"),
        ({"suite": "imagenet-c"}, "suite must be one of cifar10-c-ovadia, cifar10-c, got 'imagenet-c'"),
        ({"network": "vgg"}, "network must be one of small_cnn, .*got 'vgg'"),
        ({"budget": "tiny"}, "budget must be one of full, cpu, small, got 'tiny'"),
        ({"seeds": 0}, "seeds and epochs must be 1 or more"),
    ],
)
def test_bad_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        run(**options)


def test_options_of_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    common: dict[str, Any] = {"methods": None, "limit": None, "budget": "full"}
    with pytest.raises(BadInput, match="--seeds is for --data cifar10, got --data digits"):
        run_shift("digits", seeds=3, **common)
    with pytest.raises(BadInput, match="--limit is not for cifar10"):
        run_shift("cifar10", **common | {"limit": 3})
    seen: dict[str, Any] = {}
    monkeypatch.setattr("bayesguard.benchmarks.shift.run", lambda data, **options: seen.update(options, data=data))
    run_shift("digits", seed=1, epochs=None, **common | {"budget": "small"})
    assert seen == {
        "data": "digits",
        "methods": list(METHODS),
        "seed": 1,
        "epochs": 2,
        "limit": 500,
    }
