"""Label shift: rows are resampled exactly, corrections do what theory says, and the tables are decided by the numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayesguard.benchmarks import label_shift
from bayesguard.benchmarks.costs import cost_table
from bayesguard.benchmarks.datasets import ImageSet
from bayesguard.benchmarks.label_shift import Answer, answers_of, run, scored
from bayesguard.benchmarks.label_shift_draws import (
    SHIFTS,
    Shift,
    counts_of,
    fitting_counts,
    resampled,
    shares_of,
    total_variation,
)
from bayesguard.benchmarks.label_shift_tables import (
    SHIFT_LABELS,
    change_table,
    described,
    shift_table,
    shown,
)
from bayesguard.benchmarks.stored.registry import REGISTRY, benchmark_of
from bayesguard.calibration import PriorCorrection
from bayesguard.cli import main
from bayesguard.errors import BadInput
from bayesguard.predictive import Predictive
from bayesguard.sampling import stream

UNIFORM = torch.full((4,), 0.25, dtype=torch.float64)


def test_a_draw_has_the_asked_counts_and_no_row_twice() -> None:
    labels = torch.arange(60) % 4
    counts = torch.tensor([15, 0, 3, 7])
    chosen = resampled(labels, counts, stream("cpu", 0))
    assert torch.equal(torch.bincount(labels[chosen], minlength=4), counts)
    assert len(set(chosen.tolist())) == len(chosen) == 25
    assert torch.equal(chosen, resampled(labels, counts, stream("cpu", 0)))
    assert not torch.equal(chosen, resampled(labels, counts, stream("cpu", 1)))
    with pytest.raises(BadInput, match="asks for 16 rows of class 1, of which there are 15"):
        resampled(labels, torch.tensor([0, 16, 0, 0]), stream("cpu", 0))


def test_counts_are_nearest_whole_numbers() -> None:
    assert counts_of(torch.tensor([0.5, 0.3, 0.2]), 10).tolist() == [5, 3, 2]
    assert counts_of(torch.tensor([1 / 3, 1 / 3, 1 / 3]), 10).tolist() == [4, 3, 3]
    assert counts_of(torch.tensor([0.05, 0.95]), 7).tolist() == [0, 7]
    # 0.9 of 10 rows would be 9 of the first class; 5 of 6 is the most that its 5 rows allow.
    assert fitting_counts(torch.tensor([0.9, 0.1]), torch.tensor([5, 5]), 10).tolist() == [5, 1]
    assert fitting_counts(torch.tensor([0.9, 0.1]), torch.tensor([9, 5]), 10).tolist() == [9, 1]
    with pytest.raises(BadInput, match="need a class of which there are no rows"):
        fitting_counts(torch.tensor([1.0, 0.0]), torch.tensor([0, 5]), 10)


def test_shares_of_every_shift() -> None:
    assert torch.equal(shares_of(Shift("none"), UNIFORM, 0, 3), UNIFORM)
    assert shares_of(Shift("tweak_one", 0.7), UNIFORM, 0, 1).tolist() == pytest.approx([0.1, 0.7, 0.1, 0.1])
    assert int(shares_of(Shift("tweak_one", 0.9), UNIFORM, 0, 6).argmax()) == 2
    for strength in (10, 1, 0.1):
        drawn = torch.stack([shares_of(Shift("dirichlet", strength), UNIFORM, 0, draw) for draw in range(2000)])
        assert torch.allclose(drawn.sum(1), torch.ones(2000).double())
        # Mean 1/K and variance (1/K)(1 - 1/K) / (K alpha + 1), within five standard errors.
        variance = 0.25 * 0.75 / (4 * strength + 1)
        assert torch.allclose(drawn.mean(0), UNIFORM, atol=5 * (variance / 2000) ** 0.5)
        assert float(drawn.var(0).mean()) == pytest.approx(variance, rel=0.1)
    again = shares_of(Shift("dirichlet", 1), UNIFORM, 0, 5)
    assert torch.equal(again, shares_of(Shift("dirichlet", 1), UNIFORM, 0, 5))
    assert not torch.equal(again, shares_of(Shift("dirichlet", 1), UNIFORM, 1, 5))
    with pytest.raises(BadInput, match="kind must be one of none, dirichlet, tweak_one"):
        shares_of(Shift("knock_out", 1), UNIFORM, 0, 0)
    assert total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75])) == 0.75
    assert [str(shift) for shift in SHIFTS] == list(SHIFT_LABELS)


def _exact(shares: Tensor, rows: int, seed: int) -> tuple[Predictive, Tensor]:
    """Rows of a Gaussian mixture with these class shares, and the true posterior under equal ones."""
    generator = stream("cpu", seed, "mixture")
    centres = 2 * torch.eye(4, dtype=torch.float64)
    labels = shares.multinomial(rows, replacement=True, generator=generator)
    x = centres[labels] + torch.randn(rows, 4, dtype=torch.float64, generator=generator)
    return Predictive.from_logits(-(x.unsqueeze(1) - centres).square().sum(-1) / 2), labels


def test_with_an_exactly_calibrated_predictor_em_is_as_good_as_the_true_shares() -> None:
    pred, labels = _exact(UNIFORM, 20_000, 0)
    held, held_labels = _exact(UNIFORM, 20_000, 1)
    found = answers_of(held, held_labels, pred)
    for shift in SHIFTS[2:]:
        available = torch.bincount(labels)
        counts = fitting_counts(shares_of(shift, UNIFORM, 0, 0), available, 4000)
        chosen = resampled(labels, counts, stream("cpu", 0, str(shift)))
        rows = {name: scored(found[name], chosen, labels, UNIFORM) for name in found}
        oracle, unaware = rows["temperature + true shares"], rows["temperature"]
        assert oracle is not None
        assert unaware is not None
        # Of alpha 0.1, BBSE leaves no share to a class of two rows, which costs it hundreds of nats for each.
        bbse = ["temperature + BBSE"] if int(counts.min()) > 2 else []
        for name in ["as trained + EM", "temperature + EM", "vector + EM", *bbse]:
            ours = rows[name]
            assert ours is not None
            # K - 1 estimated shares cost about (K - 1) / 2N nats; the error of the estimates is that of a multinomial.
            assert abs(ours["nll"] - oracle["nll"]) < 10 * 3 / (2 * len(chosen))
            assert ours["distance"] < 5 * (4 * 0.25 / len(chosen)) ** 0.5
        assert oracle["nll"] < unaware["nll"] - 0.03
        assert oracle["distance"] == pytest.approx(0, abs=1e-12)
        assert unaware["distance"] == pytest.approx(total_variation(UNIFORM, counts / counts.sum()), rel=1e-4)


def test_bbse_may_refuse_and_no_class_is_ruled_out() -> None:
    labels = torch.tensor([0, 1] * 10)
    alike = Predictive.from_probs([[0.5, 0.5]] * 20)
    half = torch.tensor([0.5, 0.5])
    blind = Answer(alike, PriorCorrection("bbse").fit(alike, labels))
    assert scored(blind, torch.arange(20), labels, half) is None
    told = Predictive.from_probs([[0.8, 0.2], [0.2, 0.8]] * 10)
    # Rows surer of class 0 than those held out: BBSE leaves no share for class 1, which one of them is of.
    sure = Answer(Predictive.from_probs([[0.9, 0.1]] * 4), PriorCorrection("bbse").fit(told, labels))
    found = scored(sure, torch.arange(4), torch.tensor([0, 0, 0, 1]), half)
    assert found is not None
    assert math.isfinite(found["nll"])
    assert sure.correction is not None
    assert 1 / 6 <= float(sure.correction.new[1]) < 1 / 2  # of four rows and two more, one of class 1


def _record(nlls: list[float | None], reference: list[float], seed: int) -> dict[str, Any]:
    def score(nll: float | None) -> dict[str, Any]:
        return {"accuracy": 0.5, "nll": nll, "brier": 0.25, "ece": 0.125, "distance": 0.0}

    rows = {"temperature": [score(nll) for nll in reference], "temperature + BBSE": [score(nll) for nll in nlls]}
    return {
        "method": "vanilla",
        "seed": seed,
        "device": "CPU, 1 threads",
        "settings": {"network": "mlp", "epochs": 1, "members": 2, "limit": None, "draws": 2},
        "values": {
            "shifts": {"dirichlet 1": {"sizes": [10, 9], "rows": rows}},
            "costs": {"parameters": 1000, "train_seconds": 2.0 + seed, "relative_time": 1.0},
        },
    }


def test_tables_by_hand() -> None:
    records = [_record([0.5, 0.25], [0.25, 0.5], 0), _record([0.75, 0.75], [0.5, 0.5], 1)]
    assert "| Deterministic, temperature + BBSE | 0.1250 [" in change_table(records)
    head, _, reference, ours = shift_table(records, "dirichlet 1").splitlines()
    assert head.count("|") == reference.count("|") == ours.count("|")
    assert reference.startswith("| Deterministic, temperature | 0.500 [0.500, 0.500] | 0.438 [")
    assert " |  |  | 0.250 [" in reference
    assert "| 75% |" in ours
    labels = {"vanilla": "Deterministic"}
    assert cost_table(records, labels).splitlines()[-1] == "| Deterministic | 1,000 | 2.5 | 1.0 |"
    assert "all training rows; 2 seeds x 2 draws of 9 to 10 test rows" in described(records)
    infinite = [_record([0.5, None], [0.25, 0.5], 0)]
    assert "| infinite in 1 of 2 |" in change_table(infinite)
    refused = _record([0.5, 0.25], [0.25, 0.5], 0)
    refused["values"]["shifts"]["dirichlet 1"]["rows"]["temperature + BBSE"] = [None, None]
    assert "| refused | " in shift_table([refused], "dirichlet 1")
    assert shown([-1e-9, -1e-9]) == "0.000 [0.000, 0.000]"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits with a hundredth of the work: bright pixels at a place that is the label's."""

    def load(name: str, *, seed: int, **_: Any) -> ImageSet:
        parts = []
        for part, count in enumerate((150, 120, 120)):
            labels = torch.arange(count) % 3
            images = torch.rand(count, 1, 8, 8, generator=stream("cpu", seed, part))
            images[torch.arange(count), 0, labels] += 0.4
            parts.append((images, labels))
        return ImageSet(name, parts[0], parts[1], parts[2], 3)

    monkeypatch.setattr(label_shift, "load", load)
    # Networks that have hardly been trained would need all of the steps.
    monkeypatch.setattr("bayesguard.calibration.class_shares._MAX_STEPS", 30)


SMALL: dict[str, Any] = {"budget": "small", "seeds": 2, "device": "cpu", "rows": 40, "epochs": 4}


@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
def test_a_run_is_kept_shown_and_not_made_again(tmp_path: Path) -> None:
    lines: list[str] = []
    records = run("digits", out=tmp_path, say=lines.append, **SMALL)
    text = "\n".join(lines)
    assert "mlp, 4 epochs, ensemble of 2, 1,000 training rows at most; 2 seeds x 2 draws of 40 test rows" in text
    assert all(f"Every quality: {label}:" in text for label in SHIFT_LABELS.values())
    content = json.loads((tmp_path / "label-shift-digits.json").read_text())
    assert [(cell["method"], cell["seed"]) for cell in content["cells"]] == [
        ("vanilla", 0),
        ("vanilla", 1),
        ("ensemble", 0),
        ("ensemble", 1),
    ]
    first = content["cells"][0]["values"]
    assert list(first["shifts"]) == list(SHIFT_LABELS)
    assert all(len(draws) == 2 for found in first["shifts"].values() for draws in found["rows"].values())
    assert first["costs"]["parameters"] > 0
    # Both methods see the same draws.
    sizes = [[found["sizes"] for found in cell["values"]["shifts"].values()] for cell in content["cells"]]
    assert sizes[0] == sizes[2]
    for cell in content["cells"]:
        for found in cell["values"]["shifts"].values():
            assert all(score["distance"] < 1e-12 for score in found["rows"]["temperature + true shares"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "label-shift").glob("*.json")}
    assert run("digits", out=tmp_path, say=lines.append, **SMALL) == records
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "label-shift").glob("*.json")} == before

    assert benchmark_of("label-shift-digits") == "label-shift"
    shown_as = REGISTRY["label-shift"]
    assert shown_as.command(content) == (
        "bayesguard benchmark label-shift --data digits --methods vanilla,ensemble --seeds 2 --network mlp --members 2 "
        "--epochs 4 --limit 1000 --rows 40 --draws 2 --budget small --out results"
    )
    assert "Change of NLL by shift:" in shown_as.table(content)


@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", "digits", "--methods", "vanilla", "--seeds", "1", "--budget", "small", "--device", "cpu"]
    for words in (["shift", "--shift", "labels", "--seed", "1"], ["label-shift", "--rows", "30", "--draws", "1"]):
        with pytest.raises(SystemExit) as done:
            main(["benchmark", *words, *given, "--epochs", "1", "--out", str(tmp_path / words[0])])
        assert done.value.code == 0
        assert "Every quality: one class has 0.9:" in capsys.readouterr().out
    assert (tmp_path / "shift" / "label-shift" / "digits-vanilla-1.json").is_file()
    with pytest.raises(SystemExit) as done:
        main(["benchmark", "shift", "--shift", "labels", "--suite", "cifar10-c"])
    assert done.value.code == 2
    assert "--suite is not for --shift labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "adult"}, "data must be one of digits, mnist, fashion_mnist, cifar10 for label shift, got 'adult'"),
        ({"methods": ["dropout"]}, "methods must be among vanilla, ensemble, got dropout"),
        ({"budget": "huge"}, "budget must be 'full' or 'small'"),
        ({"seeds": 0}, "seeds must be 1 or more"),
        ({"network": "vgg"}, "network must be one of lenet"),
        ({"draws": 0}, "draws must be 1 or more, got 0"),
        ({"samples": 3}, "samples is not a setting of label shift"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        run(**{"data": "digits", "out": tmp_path, **settings})
