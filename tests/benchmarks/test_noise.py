"""The benchmark of human labels: scores and parts against exact answers, and a tiny run from end to end."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesguard.benchmarks import noise
from bayesguard.benchmarks.datasets import ImageSet
from bayesguard.benchmarks.noise import Budget, human_counts, human_scores, noisy_labels, parts, run
from bayesguard.errors import BadFile, BadInput
from bayesguard.predictive import Predictive
from bayesguard.sampling import stream

_TINY = Budget("SmallCNN", 1, 16, 1e-3, 32, 24)


def _images(seed: int = 0) -> ImageSet:
    def part(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(rows) % 10
        pixels = torch.rand(rows, 3, 8, 8, generator=stream("cpu", seed, "pixels", rows)) * 0.1
        return pixels + labels.reshape(-1, 1, 1, 1) / 11, labels

    return ImageSet("cifar10", part(40), part(30), part(20), 10)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Label files for tiny images that stand in for CIFAR-10."""
    monkeypatch.setattr(noise, "load", lambda name, data_dir=None: _images())
    monkeypatch.setitem(noise.BUDGETS, "small", _TINY)
    (tmp_path / "images").mkdir()
    clean = np.concatenate([np.arange(40) % 10, np.arange(30) % 10]).astype(np.uint8)
    shifted = np.where(np.arange(70) % 2 == 0, (clean + 1) % 10, clean).astype(np.uint8)
    np.savez(tmp_path / "images" / "cifar10n_labels.npz", aggregate=clean, random1=shifted, worst=shifted)
    counts = np.full((20, 10), 1, np.uint8)
    counts[np.arange(20), np.arange(20) % 10] += np.arange(20).astype(np.uint8) + 1
    np.savez(tmp_path / "images" / "cifar10h_counts.npz", counts=counts)
    return tmp_path


def test_scores_against_people_are_those_of_the_formulas() -> None:
    counts = torch.tensor([[50.0, 0.0], [30.0, 20.0], [10.0, 40.0]], dtype=torch.float64)
    pred = Predictive.from_probs([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    found = human_scores(pred, counts)
    cross = [-math.log(0.9), -math.log(0.5), -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))]
    human = [0.0, -(0.6 * math.log(0.6) + 0.4 * math.log(0.4)), cross[2]]
    assert found["cross_entropy"] == pytest.approx(sum(cross) / 3, rel=1e-6)
    assert found["kl"] == pytest.approx((sum(cross) - sum(human)) / 3, rel=1e-5)
    assert found["human_entropy"] == pytest.approx(sum(human) / 3)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["accuracy_majority"] == pytest.approx(1.0)


def test_people_themselves_have_no_divergence_from_people() -> None:
    counts = torch.tensor([[45.0, 5.0], [30.0, 20.0], [10.0, 40.0]], dtype=torch.float64)
    found = human_scores(Predictive.from_probs(counts / 50), counts)
    assert found["kl"] == pytest.approx(0.0, abs=1e-9)
    assert found["pearson"] == pytest.approx(1.0)


def test_parts_take_noisy_labels_in_the_order_of_cifar10() -> None:
    images = _images()
    noisy = torch.arange(70)
    train, held = parts(images, noisy, _TINY)
    assert train[1].tolist() == list(range(32))
    assert torch.equal(train[0], images.train[0][:32])
    assert held[1].tolist() == list(range(40, 64))
    assert torch.equal(held[2], images.calibration[1][:24])
    plain, held = parts(images, None, _TINY)
    assert torch.equal(plain[1], images.train[1][:32])
    assert torch.equal(held[1], held[2])


def test_label_files_of_another_length_are_refused(folder: Path) -> None:
    images = _images()
    short = images._replace(test=(images.test[0][:5], images.test[1][:5]), train=images.calibration)
    with pytest.raises(BadFile, match=r"cifar10h_counts\.npz has 20 rows, but CIFAR-10 has 5"):
        human_counts(short, folder)
    with pytest.raises(BadFile, match=r"cifar10n_labels\.npz has 70 rows, but CIFAR-10 has 60"):
        noisy_labels("worst", short, folder)


def test_a_tiny_run_against_people(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    records = run("cifar10h", seeds=1, device="cpu", out=tmp_path, data_dir=folder, budget="small", say=said.append)
    assert [record["method"] for record in records] == ["deterministic", "mc_dropout", "deep_ensemble", "variational"]
    text = "".join(said)
    assert "Budget: small (SmallCNN, 32 training and 24 held-out images, 1 epochs)" in text
    assert "| DeepEnsemble + shift-aware |" in text
    assert "| People themselves |" in text
    assert text.count("| DeepEnsemble |") == 2  # and costs
    assert "| costs |" not in text
    kept = json.loads((tmp_path / "noise-cifar10h-small.json").read_text())
    assert kept["cells"] == records
    assert kept["meta"]["budget"] == "small"


def test_a_tiny_run_on_noisy_labels(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    records = run(
        "cifar10n",
        methods=["deterministic"],
        seeds=1,
        device="cpu",
        out=tmp_path,
        data_dir=folder,
        budget="small",
        say=said.append,
    )
    assert [record["data"] for record in records] == ["cifar10n_aggregate", "cifar10n_random1", "cifar10n_worst"]
    assert [record["values"]["held_out_noise"] for record in records] == [0.0, 0.5, 0.5]
    assert "| worst | Deterministic + temperature, clean held-out labels |" in "".join(said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "cifar100n"}, "labels must be cifar10h or cifar10n, got 'cifar100n'"),
        ({"methods": ["sngp"]}, "methods must be among deterministic"),
        ({"seeds": 0}, "seeds must be 1 or more, got 0"),
        ({"budget": "large"}, "budget must be 'full' or 'small', got 'large'"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        run(out=tmp_path, **arguments)  # type: ignore[arg-type]
