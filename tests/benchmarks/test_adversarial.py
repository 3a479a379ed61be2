"""The benchmark of adversarial radii: the attack against a gradient by hand, the onsets, a short run."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks.adversarial import METHODS, attacked_loss, measured, onset, perturbed, run, table
from bayesguard.cli import main
from bayesguard.data import Batch
from bayesguard.errors import BadInput
from bayesguard.sampling import stream


def _linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return nn.Sequential(nn.Flatten(), layer)


def _images(count: int = 50) -> Tensor:
    return torch.rand(count, 1, 2, 2, generator=stream("cpu", 0, "images"))


WEIGHT = torch.tensor([[1.0, -1.0, 0.5, -0.5], [-1.0, 1.0, -0.5, 0.5]])


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_a_linear_network_is_attacked_along_the_sign_of_its_weights(attack: str) -> None:
    images = _images()
    labels = torch.arange(50) % 2
    moved = perturbed(bg.Deterministic(_linear(WEIGHT)), (images, labels), 0.1, attack, seed=0)
    direction = torch.where(labels == 0, -1.0, 1.0)[:, None, None, None] * WEIGHT[0].sign().view(1, 1, 2, 2)
    torch.testing.assert_close(moved, (images + 0.1 * direction).clamp(0, 1))


def test_the_attacked_loss_is_that_of_the_mixture_of_members() -> None:
    ensemble = bg.DeepEnsemble(lambda seed: _linear(WEIGHT * (seed % 7 - 3)), num_members=3)
    images, labels = _images(6), torch.tensor([0, 1, 0, 1, 0, 1])
    loss = attacked_loss(ensemble, 0)(Batch((images,), {}, labels))
    probs = ensemble(images).probs
    torch.testing.assert_close(loss, -probs.gather(1, labels[:, None]).log().sum())


def test_onset_is_the_first_radius_with_a_change_for_certain() -> None:
    sure, unsure = torch.tensor([1.0, 1.1, 0.9, 1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert onset([0 * sure, unsure, sure, -sure], [0.0, 0.1, 0.2, 0.3]) == 0.2
    assert onset([0 * sure, unsure, -sure], [0.0, 0.1, 0.2]) is None


def test_figures_of_a_network_whose_margin_is_known() -> None:
    """All margins are 0.2 in units of the attack's reach, so that accuracy falls from 1 to 0 between 0.1 and 0.3."""
    images = torch.tensor([[0.6, 0.4, 0.5, 0.5]]).view(1, 1, 2, 2).expand(40, 1, 2, 2)
    network = _linear(40 * torch.tensor([[1.0, -1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]]))
    labels = torch.zeros(40, dtype=torch.long)
    found = measured(bg.Deterministic(network), (images, labels), [0.0, 0.05, 0.15], "fgsm", 0)
    clean, near, far = found["radii"]
    assert [row["accuracy"] for row in found["radii"]] == [1.0, 1.0, 0.0]
    # Logits differ by 2 * 40 * (0.2 - 2 radius).
    for row, gap in ((clean, 16.0), (near, 8.0), (far, 8.0)):
        p = 1 / (1 + math.exp(-gap))
        assert row["confidence"] == pytest.approx(p, rel=1e-5)
        assert row["entropy"] == pytest.approx(-p * math.log(p) - (1 - p) * math.log1p(-p), rel=1e-3, abs=1e-6)
        assert row["mutual_information"] == 0
        assert row["error_auroc"] is None
    assert found["entropy_rises_at"] == 0.05
    assert found["accuracy_falls_at"] == 0.15


@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
def test_a_short_run(tmp_path: Path) -> None:
    lines: list[str] = []
    records = run("digits", seeds=1, radii=(0.0, 0.1), epochs=2, limit=60, out=tmp_path, device="cpu", say=lines.append)
    assert [record["method"] for record in records] == list(METHODS)
    written = json.loads((tmp_path / "adversarial-digits.json").read_text())
    assert written["cells"] == records
    assert written["meta"]["attack"] == "pgd"
    assert all(label in lines[0] for label in METHODS.values())
    plain, calibrated = (record["values"]["radii"] for record in records[:2])
    assert [row["accuracy"] for row in plain] == [row["accuracy"] for row in calibrated]  # the same attack
    by_radius, onsets, title, costs = table(records).split("\n\n")
    assert [part.count("\n| ") for part in (by_radius, onsets, costs)] == [2 * len(METHODS)] + 2 * [len(METHODS)]
    assert title == "Costs:"


def test_what_cannot_be_run(tmp_path: Path) -> None:
    for wrong, message in (
        ({"methods": ["svm"]}, "methods must be among deterministic, .*, got svm"),
        ({"data": "imagenet"}, "data must be one of digits"),
        ({"attack": "cw"}, "attack must be one of pgd, fgsm"),
        ({"radii": (0.1, 0.2)}, "radii must rise from 0"),
        ({"budget": "huge"}, "budget must be 'full' or 'small'"),
        ({"seeds": 0}, "seeds must be 1 or more"),
    ):
        with pytest.raises(BadInput, match=message):
            run(**{"out": tmp_path, **wrong})  # type: ignore[arg-type]


def test_the_command_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", "adversarial", "--methods", "svm"])
    assert stopped.value.code == 2
    assert "methods must be among deterministic" in capsys.readouterr().err
