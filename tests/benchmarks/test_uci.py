"""UCI regression: the table's numbers by hand, a tiny run from end to end, and what is refused."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesguard import Predictive
from bayesguard.benchmarks import datasets, uci
from bayesguard.benchmarks.cells import spread
from bayesguard.benchmarks.datasets import Regression, Standardised
from bayesguard.benchmarks.published import UCI_SETS, Published
from bayesguard.benchmarks.tuned_dropout import Search, tuned
from bayesguard.cli import main
from bayesguard.errors import BadInput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A set of 60 rows in the documented format, with two splits."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(60, 3)).astype(np.float32)
    targets = (100 + 5 * inputs[:, 0] + generator.normal(size=60)).astype(np.float32)
    tests = np.stack([np.arange(6), np.arange(6, 12)]).astype(np.int32)
    (tmp_path / "uci").mkdir()
    np.savez(tmp_path / "uci" / "yacht.npz", X=inputs, y=targets, test_index=tests)
    return tmp_path


def test_scores_are_in_the_targets_own_unit() -> None:
    nothing = np.zeros(0, dtype=np.float32)
    split = Standardised(nothing, nothing, nothing, nothing, target_mean=10.0, target_sd=4.0)
    predictive = Predictive.from_normal(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    found = uci.scores(predictive, torch.tensor([0.5, 0.0]), split)
    assert found["rmse"] == pytest.approx(4 * math.sqrt((0.25 + 1) / 2))
    # N(10, 4^2) at 12 and N(14, 8^2) at 10.
    by_hand = [0.5 * math.log(2 * math.pi * s**2) + (y - m) ** 2 / (2 * s**2) for m, s, y in ((10, 4, 12), (14, 8, 10))]
    assert found["nll"] == pytest.approx(sum(by_hand) / 2)
    assert found["nll_normal"] == pytest.approx(found["nll"])


def test_a_mixture_has_two_likelihoods() -> None:
    nothing = np.zeros(0, dtype=np.float32)
    split = Standardised(nothing, nothing, nothing, nothing, target_mean=0.0, target_sd=1.0)
    predictive = Predictive.from_normal(torch.tensor([[-1.0], [1.0]]), 0.1, draws=True)
    found = uci.scores(predictive, torch.tensor([1.0]), split)
    assert found["nll"] == pytest.approx(math.log(2) + 0.5 * math.log(2 * math.pi * 0.01), abs=1e-6)
    assert found["nll_normal"] == pytest.approx(0.5 * math.log(2 * math.pi * 1.01) + 1 / 2.02, abs=1e-6)


def test_every_method_runs_and_goes_on_where_it_stopped(folder: Path) -> None:
    said: list[str] = []
    records = uci.run("yacht", budget="small", out=folder / "out", data_dir=folder, say=said.append)
    assert [record["method"] for record in records] == list(uci.METHODS)
    assert all(math.isfinite(record["values"]["nll"]) for record in records)
    assert "| MC dropout |" in said[0]
    assert "0.67 ± 0.05" in said[0]  # published
    costs = [record["values"]["costs"] for record in records]
    # 50 units over 3 inputs; 1 or 2 outputs.
    assert [each["parameters"] for each in costs[:4]] == [302, 251, 2 * 302, 5 * 302]
    assert "| Deep ensemble | 1,510 |" in said[0]
    kept = json.loads((folder / "out" / "uci-yacht.json").read_text())
    assert kept["meta"] == {"benchmark": "uci", "data": "yacht", "budget": "small"}
    again = uci.run("yacht", budget="small", out=folder / "out", data_dir=folder, say=said.append)
    assert again == records
    summary = uci.summary(folder / "out")
    assert summary.count("\n") == 2 + 2 * (len(uci.METHODS) + 2)
    assert all(name in summary for name in UCI_SETS)


def test_methods_differ_by_the_seed_of_the_split() -> None:
    first, second = (uci.ensemble(uci.METHODS["ensemble"], 3, 5, seed) for seed in (0, 1))
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_within_one_published_standard_error() -> None:
    assert uci.holds(spread([1.0, 1.1]), Published(1.0, 0.05))
    assert not uci.holds(spread([1.0, 1.2]), Published(1.0, 0.05))
    assert uci.best_published("yacht") == 1.18
    assert uci.best_published("kin8nm") == -1.20


def test_the_page_names_on_how_many_sets_one_method_is_ahead_of_all_published() -> None:
    """The ensemble with dropout is ahead on as many sets as the text beside the table says."""
    root = Path(__file__).parent.parent.parent
    ahead = 0
    for data in UCI_SETS:
        cells = json.loads((root / "benchmarks" / "results" / f"uci-{data}.json").read_text())["cells"]
        own = uci.found(cells, "dropout_ensemble", "nll")
        assert own is not None
        assert own.num_values == (5 if data == "protein" else 20)
        ahead += own.mean < uci.best_published(data)
    words = {7: "seven of nine", 8: "eight of nine", 9: "all nine"}
    page = " ".join((root / "docs" / "benchmarks.md").read_text(encoding="utf-8").split())
    assert f"ensemble with dropout has a lower NLL than any published one on {words[ahead]} sets" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ["gp"]}, "methods must be among deterministic, .*, got gp"),
        ({"methods": []}, "got none"),
        ({"budget": "large"}, "budget must be 'full' or 'small', got 'large'"),
        ({"splits": 3}, "splits must be from 1 to 2 for yacht, got 3"),
    ],
)
def test_what_cannot_be_run_is_refused(folder: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        uci.run("yacht", out=folder / "out", data_dir=folder, **given)  # type: ignore[arg-type]


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([
            *("benchmark", "uci", "--data", "yacht", "--budget", "small", "--methods", "deterministic"),
            *("--out", str(folder / "out"), "--data-dir", str(folder)),
        ])  # fmt: skip
    assert done.value.code == 0
    assert "| Deterministic |" in capsys.readouterr().out


def test_all_sets_are_asked_for_their_splits_before_the_first_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten of all: it was refused at protein, which has five, when six sets had been measured."""

    def small(name: str, data_dir: object = None) -> Regression:
        rows = np.arange(20.0)
        return Regression(rows[:, None], rows, np.zeros((5 if name == "protein" else 20, 2), np.int64), name)

    monkeypatch.setattr(datasets, "regression", small)
    monkeypatch.setattr(uci, "run", lambda *_, **__: pytest.fail("nothing is measured"))
    with pytest.raises(SystemExit) as done:
        main(["benchmark", "uci", "--data", "all", "--splits", "10", "--out", str(tmp_path)])
    assert done.value.code == 2
    assert "splits must be from 1 to 5 for protein, got 10" in capsys.readouterr().err


def test_the_learning_rate_falls_on_large_sets_only_or_never_or_always() -> None:
    falls = {name: [uci.recipe_of(name, rows).cosine for rows in (5000, 5001)] for name in uci.METHODS}
    assert falls["ensemble"] == [False, True]
    assert falls["dropout"] == [False, False]
    assert falls["dropout_ensemble"] == [True, True]


def test_what_was_chosen_is_told_in_the_targets_own_unit(folder: Path) -> None:
    methods = ["dropout", "dropout_ensemble"]
    single, ensemble = uci.run("yacht", methods=methods, budget="small", out=folder / "out", data_dir=folder)
    assert single["values"]["rate"] in uci.METHODS["dropout"].search.rates  # type: ignore[union-attr]
    assert ensemble["values"]["rate"] in uci.METHODS["dropout_ensemble"].search.rates  # type: ignore[union-attr]
    # After two epochs the best noise is about the target's own deviation, here sqrt(25 + 1), and the factor about 1.
    assert 2 < single["values"]["scale"] < 10
    assert 0.5 < ensemble["values"]["factor"] < 3
    assert "scale" not in ensemble["values"]


@pytest.mark.parametrize("method", ["dropout", "dropout_ensemble"])
def test_splits_that_were_measured_are_not_trained_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A search over all splits goes on where it was stopped: with the missing ones only."""
    asked: list[int] = []

    def counted(*args: Any, **how: Any) -> Any:
        asked.append(len(args[2]))
        return tuned(*args, **how)

    monkeypatch.setattr(uci, "tuned", counted)
    run = partial(uci.run, "yacht", methods=[method], out=folder / "out", data_dir=folder, say=lambda text: None)
    short = replace(uci.METHODS[method], epochs=(2,), search=replace(_search(method), epochs=None, draws=64))
    monkeypatch.setitem(uci.METHODS, method, short)
    both = run()
    (folder / "out" / "uci" / f"yacht-{method}-1.json").unlink()
    again = run()
    assert asked == [2, 1]
    assert again[0] == both[0]
    assert again[1]["values"].keys() == both[1]["values"].keys()
    assert run() == again
    assert asked == [2, 1]


def _search(method: str) -> Search:
    search = uci.METHODS[method].search
    assert search is not None
    return search
