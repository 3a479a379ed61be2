"""Rotated and translated images follow the published protocol, and the claims are decided by the numbers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import rotate

from bayesguard.benchmarks import image_cells
from bayesguard.benchmarks.datasets import ImageSet
from bayesguard.benchmarks.image_cells import DEGREES, PIXELS, POINTWISE, SET, records_of, rolled, rotated
from bayesguard.benchmarks.image_recipes import METHODS, NETWORKS, RECIPES
from bayesguard.benchmarks.mnist_shift import claims, curves_of, draw, over_shifts, run, table
from bayesguard.benchmarks.ood import areas, of_sets, target
from bayesguard.benchmarks.ood import run as run_ood
from bayesguard.benchmarks.ood import table as ood_table
from bayesguard.benchmarks.stored.files import read
from bayesguard.benchmarks.stored.registry import REGISTRY
from bayesguard.cli import main
from bayesguard.errors import BadFile, BadInput
from bayesguard.shift import Rotation, Translation


def _images(count: int, seed: int, kind: int = 0) -> torch.Tensor:
    """Bright bars at a height that is the label's; of another kind, upright ones."""
    images = torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed)) * 0.3
    for row in range(count):
        bar = slice(2 + 2 * (row % 10), 6 + 2 * (row % 10))
        if kind == 0:
            images[row, 0, bar, 6:22] += 0.7
        else:
            images[row, 0, 6:22, bar] += 0.7
    return images


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **_: Any) -> ImageSet:
        parts = [(_images(count, seed), torch.arange(count) % 10) for seed, count in enumerate((200, 120, 110))]
        return ImageSet(name, parts[0], parts[1], parts[2], 10)

    monkeypatch.setattr(image_cells, "load", load)
    monkeypatch.setattr(image_cells, "ood_images", lambda name, **_: _images(40, len(name), 1))
    monkeypatch.setattr(image_cells, "HELD_SEVERITIES", (1,))


SIZES: dict[str, Any] = {"network": "lenet5", "members": 2, "epochs": 2, "samples": 4, "device": "cpu"}


def test_rotation_is_the_published_one() -> None:
    images = _images(3, 0)
    for degrees in (15, 45, 90):
        one = rotate(images[1, 0].numpy(), degrees)
        start = one.shape[0] // 2 - 14
        assert np.array_equal(rotated(images, degrees)[1, 0].numpy(), one[start : start + 28, start : start + 28])
    assert torch.allclose(rotated(images, 180), images.flip(-1, -2), atol=1e-4)
    assert DEGREES == (15, 30, 45, 60, 75, 90, 105, 120, 135, 150, 165, 180)


def test_the_library_rotates_the_same_way_but_interpolates_linearly() -> None:
    images = _images(3, 0)
    assert torch.allclose(rotated(images, 90), Rotation(degrees=90)(images), atol=1e-4)
    assert not torch.allclose(rotated(images, 45), Rotation(degrees=45)(images), atol=0.05)
    # Splines overshoot: values leave [0, 1].
    assert rotated((images > 0.5).float(), 45).min() < 0


def test_translation_is_numpys_roll_and_the_librarys() -> None:
    images = _images(2, 1)
    for pixels in PIXELS:
        assert np.array_equal(rolled(images, pixels).numpy(), np.roll(images.numpy(), pixels, axis=-1))
        assert torch.equal(rolled(images, pixels), Translation(pixels=pixels)(images))
    assert list(PIXELS) == list(range(2, 27, 2))


@pytest.mark.parametrize(
    ("name", "count"), [("lenet", 1_199_882), ("mlp", 199_210), ("lenet5", 44_426), ("wide_lenet5", 545_546)]
)
def test_networks_have_the_published_sizes(name: str, count: int) -> None:
    network = NETWORKS[name](1, 10, 28, 0.1)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_every_network_has_every_recipe() -> None:
    assert set(RECIPES) == set(NETWORKS)
    assert all(set(recipes) == set(METHODS) for recipes in RECIPES.values())


def _record(row: str, clean: float, levels: dict[str, float], seed: int = 0) -> dict[str, Any]:
    def values(x: float) -> dict[str, float]:
        return {"accuracy": 1 - x, "nll": x, "brier": x, "ece": x / 2}

    shifts = {"clean": {"0": values(clean)}, "rotation": {level: values(x) for level, x in levels.items()}}
    return {"method": row, "seed": seed, "values": {"rows": {row: {"shifts": shifts}}, "costs": {}}}


def test_means_and_spread_by_hand() -> None:
    records = [_record("vanilla", 0.1, {"15": 0.2, "90": 0.4}), _record("vanilla", 0.1, {"15": 0.4, "90": 0.6}, 1)]
    curves = curves_of(records, "rotation")
    assert curves["vanilla"][0]["brier"] == {0: 0.1, 15: 0.2, 90: 0.4}
    mean = over_shifts(curves, "vanilla", "brier")
    assert mean.mean == pytest.approx(0.4)
    assert mean.error == pytest.approx(0.1)
    assert over_shifts(curves, "vanilla", "brier", 90).mean == pytest.approx(0.5)
    assert "| vanilla | 0.900 [0.900, 0.900] |" in table(curves)
    assert over_shifts(curves, "vanilla", "ece")._replace(num_values=1).shown() == "0.200"


def test_claims_are_decided_by_the_numbers() -> None:
    records = [
        _record("vanilla", 0.1, {"15": 0.5, "90": 0.9}),
        _record("temperature", 0.1, {"15": 0.4, "90": 0.8}),
        _record("dropout", 0.1, {"15": 0.4, "90": 0.9}),
        _record("variational", 0.2, {"15": 0.3, "90": 0.7}),
    ]
    found = {claim.text: claim.held for claim in claims(curves_of(records, "rotation"), "rotation")}
    assert found == {
        "variational is the least accurate on undisturbed data": True,
        "variational has the lowest Brier score at 90 degrees and more": True,
        "dropout has a lower Brier score under shift than temperature scaling": False,
        "variational has a lower Brier score under shift than temperature scaling": True,
    }
    assert not claims(curves_of(records[:1], "rotation"), "rotation")


@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
def test_one_training_serves_both_benchmarks(tmp_path: Path) -> None:
    lines: list[str] = []
    records = run("mnist", "rotation", out=tmp_path, say=lines.append, **SIZES)
    rows = [row for record in records for row in record["values"]["rows"]]
    assert rows == ["vanilla", "temperature", *METHODS[1:], POINTWISE, SET]
    text = "\n".join(lines)
    assert "lenet5, 2 epochs, 2 members, 4 draws" in text
    assert "held: " in text or "did not hold: " in text
    assert "| vanilla | 44,426 | " in text
    assert (tmp_path / "shift-mnist-rotation.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "shift-mnist-rotation.json").read_text())
    found = written["cells"][0]["values"]["rows"]["vanilla"]
    assert list(found["shifts"]["rotation"]) == [str(degrees) for degrees in DEGREES]
    assert written["cells"][0]["values"]["costs"]["parameters"] == 44_426

    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cells").rglob("*.json"))
    lines.clear()
    again = run_ood("mnist", ["omniglot"], out=tmp_path, say=lines.append, **SIZES)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cells").rglob("*.json")) == before
    assert again == records
    text = "\n".join(lines)
    assert "mnist against omniglot" in text
    assert "| ensemble | 88,852 | " in text
    assert "notmnist" not in text
    written = json.loads((tmp_path / "ood-mnist.json").read_text())
    assert SET not in written["cells"][-1]["values"]["rows"]
    assert set(written["cells"][0]["values"]["rows"]["vanilla"]["ood"]) == {"fashion_mnist", "notmnist", "omniglot"}


def _area(row: str, area: float, seed: int = 0) -> dict[str, Any]:
    numbers = dict.fromkeys(("auroc", "aupr_out", "aupr_in", "fpr95"), area)
    found = {"max_probability": numbers, "entropy": numbers, "confidence": 0.5}
    rows = {row: {"ood": {"fashion_mnist": found}}, f"{row} and more": {"ood": {}}}
    return {"method": row, "seed": seed, "values": {"rows": rows}}


def test_the_table_has_the_published_column() -> None:
    records = [_area("vanilla", 0.98), _area("ensemble", 0.991), _area("ensemble", 0.995, 1)]
    lines = ood_table(records, "mnist", "fashion_mnist").splitlines()
    assert lines[2] == "| vanilla | 0.9800 | 0.9800 | - | 0.9800 | 0.9800 | 0.5000 | 0.989 | 0.642 | 1 |"
    assert lines[3].endswith("| 0.992 | 0.554 | 2 |")
    assert "published" in lines[0]
    assert "0.989" not in ood_table(records, "fashion_mnist", "fashion_mnist")
    areas = of_sets(records, "fashion_mnist", lambda found: float(found["entropy"]["auroc"]))
    assert math.isclose(areas["ensemble"].mean, 0.993)
    assert ": reached; the ensemble has 0.9930" in target(records)
    assert ": not reached; the ensemble has 0.9910" in target(records[:2])
    assert "not measured" in target(records[:1])


def test_a_file_that_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"meta": {}}')
    with pytest.raises(BadFile, match="is not the result of a shift benchmark"):
        draw(path, tmp_path / "other.png")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "digits"}, "data must be one of mnist, fashion_mnist, cifar10"),
        ({"budget": "huge"}, "budget must be one of full, small"),
        ({"network": "vgg"}, "network must be one of lenet"),
        ({"methods": ["sgd"]}, "methods must be among vanilla"),
        ({"methods": []}, "methods is empty"),
        ({"members": 0}, "members must be 1 or more, got 0"),
        ({"seeds": 0}, "seeds must be 1 or more, got 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        records_of(**{"data": "mnist", "out": tmp_path, **settings})


def test_bad_questions(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="shift must be one of rotation, translation"):
        run("mnist", "shear", out=tmp_path)
    with pytest.raises(BadInput, match="data must be mnist or fashion_mnist"):
        run("cifar10", "rotation", out=tmp_path)
    with pytest.raises(BadInput, match="train must be one of"):
        run_ood("digits", out=tmp_path)
    with pytest.raises(BadInput, match="ood must be among fashion_mnist"):
        run_ood("mnist", ["mnist"], out=tmp_path)


@pytest.mark.usefixtures("tiny")
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--network", "lenet5", "--members", "2", "--epochs", "1", "--samples", "2", "--device", "cpu"]
    given = ["benchmark", "ood", "--train", "mnist", "--ood", "fashion_mnist", "notmnist", "--methods", "vanilla"]
    with pytest.raises(SystemExit) as done:
        main([*given, *small, "--out", str(tmp_path)])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "mnist against notmnist" in text
    assert "mnist against omniglot" not in text
    with pytest.raises(SystemExit) as done:
        main(
            [
                "benchmark",
                "mnist-shift",
                "--shift",
                "translation",
                "--methods",
                "vanilla",
                *small,
                "--out",
                str(tmp_path),
            ]
        )
    assert done.value.code == 0
    assert "mnist, translation; lenet5" in capsys.readouterr().out
    # The same option of both commands is the same cell, and the stored command says it.
    limited = ["--data", "mnist", "--network", "mlp", "--methods", "vanilla", "--epochs", "1", "--limit", "40"]
    for command in (["shift"], ["mnist-shift"]):
        with pytest.raises(SystemExit) as done:
            main(
                [
                    "benchmark",
                    *command,
                    *limited,
                    "--shift",
                    "rotation",
                    "--device",
                    "cpu",
                    "--out",
                    str(tmp_path / "limited"),
                ]
            )
        assert done.value.code == 0
        assert "40 rows at most" in capsys.readouterr().out
    content = read(tmp_path / "limited" / "shift-mnist-rotation.json")
    assert "--limit 40" in REGISTRY["mnist-shift"].command(content)
    short = ["--data", "mnist", "--network", "mlp", "--methods", "vanilla", "--budget", "small", "--device", "cpu"]
    with pytest.raises(SystemExit) as done:
        main(["benchmark", "shift", "--shift", "translation", *short, "--out", str(tmp_path / "mlp")])
    assert done.value.code == 0
    assert "mnist, translation; mlp" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["benchmark", "shift", "--data", "mnist", "--shift", "shear"])
    assert done.value.code == 2
    assert "shift must be one of rotation, translation" in capsys.readouterr().err
    for option, value, message in (
        ("--seed", "3", "--seed is not for --shift rotation"),
        ("--seeds", "0", "seeds must be 1 or more, got 0"),
        ("--limit", "0", "got '0'"),
        ("--methods", ",", "--methods has ',', which names nothing"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["benchmark", "shift", "--data", "mnist", "--shift", "rotation", option, value])
        assert done.value.code == 2
        assert message in capsys.readouterr().err


def test_areas_of_one_seed_have_the_interval_over_images() -> None:
    def record(area: float, **more: float) -> dict[str, Any]:
        return {"values": {"rows": {"vanilla": {"ood": {"notmnist": {"entropy": {"auroc": area, **more}}}}}}}

    assert areas([record(0.9)], "notmnist", "entropy") == {"vanilla": "0.9000"}
    assert areas([record(0.99, auroc_error=0.01)], "notmnist", "entropy") == {"vanilla": "0.9900 [0.9704, 1.0000]"}
    two = [record(0.8, auroc_error=0.01), record(0.9, auroc_error=0.01)]
    assert areas(two, "notmnist", "entropy")["vanilla"].startswith("0.8500 [0.21")
