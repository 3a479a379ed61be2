"""The page of stored results, the tables made from them, and that nobody wrote a number of README or docs by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from bayesguard.benchmarks import report
from bayesguard.benchmarks.cells import collect
from bayesguard.benchmarks.published import UCI
from bayesguard.benchmarks.stored import blocks, docs_figures, shift_figures, shift_tables, uci_figure
from bayesguard.benchmarks.stored.files import facts
from bayesguard.benchmarks.stored.page import markup, page, stored, tables_of
from bayesguard.benchmarks.stored.registry import benchmark_of
from bayesguard.cli import main
from bayesguard.errors import BadFile, BadInput

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _cell(method: str, seed: int, values: dict[str, Any], data: str = "yacht") -> dict[str, Any]:
    return {
        "data": data,
        "method": method,
        "seed": seed,
        "settings": {"budget": "full"},
        "values": values,
        "seconds": 100.0,
        "device": "CPU, 1 threads",
        "date": f"2026-01-0{seed + 1}",
        "versions": {"bayesguard": "1", "torch": "2"},
    }


def _uci(folder: Path) -> list[dict[str, Any]]:
    cells = [_cell("ensemble", seed, {"rmse": 1.0 + seed, "nll": 2.0, "nll_normal": 2.0}) for seed in range(3)]
    collect(cells, folder / "uci-yacht.json", benchmark="uci", data="yacht", budget="full")
    return cells


def _evaluations() -> dict[str, Any]:
    def row(shift: str, severity: float, value: float) -> dict[str, Any]:
        place = {"shift": shift, "severity": severity, "group": None, "num_examples": 9}
        return {**place, "metric": "ece", "value": value, "lower": None, "upper": None}

    rows = [row("clean", 0, 0.1), row("fog", 1, 0.2), row("snow", 1, 0.4), row("mean", 1, 0.3)]
    bins = {"lower": [0, 0.5], "upper": [0.5, 1], "count": [0, 9], "confidence": [None, 0.8], "accuracy": [None, 0.7]}
    limits = {"accuracy_lower": [None, 0.6], "accuracy_upper": [None, 0.9]}
    evaluation = {"meta": {}, "results": rows, "reliability": {"0": {**bins, **limits}}}
    meta = {"data": "digits", "seed": 0, "device": "cpu", "torch": "2", "version": "1"}
    return {"meta": meta, "results": {"one & all": evaluation}}


def test_tables_of_readme_and_docs_are_those_of_the_results() -> None:
    for path in report.pages(ROOT):
        text = path.read_text(encoding="utf-8")
        assert blocks.rewritten(text, RESULTS) == text, f"{path.name}: run python -m benchmarks.report --write"


@pytest.mark.parametrize("name", docs_figures.FIGURES)
def test_figures_of_docs_show_the_results(name: str) -> None:
    stored = docs_figures.stored_checksum(ROOT / "docs" / "figures" / name)
    expected = docs_figures.checksum(docs_figures.drawn(name, RESULTS))
    assert stored == expected, f"{name}: run python -m benchmarks.report --write"
    assert any(f"figures/{name})" in path.read_text(encoding="utf-8") for path in report.pages(ROOT))


def test_every_stored_result_is_shown() -> None:
    found, problems = stored(RESULTS)
    assert problems == []
    assert {item.stem for item in found} == {path.stem for path in RESULTS.glob("*.json")}


def test_the_page_of_the_repository_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", "report", "--results", str(RESULTS), "--out", str(tmp_path / "page.html")])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'page.html'}\n"
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert all(f'id="{key}"' in text for key in {benchmark_of(path.stem) for path in RESULTS.glob("*.json")})


def test_a_damaged_or_unknown_file_is_one_line(tmp_path: Path) -> None:
    _uci(tmp_path)
    (tmp_path / "uci-boston.json").write_text('{"meta": {"data": "boston"}, "cells": [{"method": 1}]}')
    (tmp_path / "ood-mnist.json").write_text("{")
    (tmp_path / "intervals.json").write_text("[1]")
    (tmp_path / "magic-mnist.json").write_text("{}")
    text, problems = page(tmp_path)
    assert len(problems) == 4
    for name, word in (
        ("intervals.json", "holds a list"),
        ("magic-mnist.json", "no known benchmark"),
        ("ood-mnist.json", "cannot be read"),
        ("uci-boston.json", "KeyError"),
    ):
        line = next(line for line in problems if name in line)
        assert word in line
        assert "\n" not in line
        assert name in text
    # The summary of all UCI files reads the damaged one, too, but the good one has its table.
    assert "uci-yacht" in text
    assert "2.00 <small>± 0.58</small>" in text


def test_tables_are_written_in_the_repository_only(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="run --write in the folder of the repository"):
        report.write(tmp_path)


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no result files"):
        report.run(tmp_path)


def test_blocks_are_rewritten_and_nothing_else(tmp_path: Path) -> None:
    _uci(tmp_path)
    text = "Before.\n\n<!-- table: uci-yacht -->\nold\n<!-- end -->\n\nAfter `<!-- table: x -->`.\n"
    new = blocks.rewritten(text, tmp_path)
    assert new.startswith("Before.\n\n<!-- table: uci-yacht -->\n\n| | RMSE, mean ± s.e. (s.d.) | published")
    assert "| Deep ensemble | 2.00 ± 0.58 (1) | 1.58 ± 0.11 |" in new
    assert new.endswith("|\n\n<!-- end -->\n\nAfter `<!-- table: x -->`.\n")
    assert blocks.rewritten(new, tmp_path) == new
    assert "2.00 ± 0.58" in blocks.table("uci", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: uci-yacht -->\n", "does not end"),
        ("<!-- table: uci-yacht -->\n<!-- table: uci -->\n<!-- end -->\n", "does not end"),
        ("<!-- table: uci-boston -->\n<!-- end -->\n", "does not exist"),
        ("<!-- table: uci-yacht, Costs -->\n<!-- end -->\n", "no table 'Costs'"),
    ],
)
def test_blocks_that_cannot_be_made(tmp_path: Path, text: str, message: str) -> None:
    _uci(tmp_path)
    with pytest.raises(BadInput, match=message):
        blocks.rewritten(text, tmp_path)


def test_a_damaged_file_is_not_written_into_pages(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    _uci(results)
    (tmp_path / "README.md").write_text("<!-- table: uci-yacht -->\n<!-- end -->\n")
    lines: list[str] = []
    assert report.write(tmp_path, say=lines.append) == [tmp_path / "README.md"]
    assert report.write(tmp_path, say=lines.append) == []
    assert lines == [f"wrote {tmp_path / 'README.md'}", "every table and figure is as the results are"]
    (results / "uci-yacht.json").write_text("{}")
    with pytest.raises(BadFile, match=r"README.md: uci-yacht.json cannot be shown \(KeyError"):
        report.write(tmp_path)


def _changed(content: Any) -> None:
    """Add a thousandth to one number that is drawn."""
    if "results" in content:
        rows = next(iter(content["results"].values()))["results"]
        next(row for row in rows if (row["metric"], row["severity"], row["shift"]) == ("ece", 3, "mean"))["value"] += (
            0.001
        )
    else:
        # The mean over its seeds is drawn.
        method = content["cells"][0]["method"]
        for cell in content["cells"]:
            if cell["method"] == method:
                row = next(iter(cell["values"]["rows"].values()))
                if "sets" in row:
                    row["clean"]["ece"] += 0.001
                else:
                    row["shifts"]["rotation"]["45"]["brier"] += 0.001


@pytest.mark.parametrize("name", docs_figures.FIGURES)
def test_a_changed_result_is_drawn_and_nothing_else(name: str, tmp_path: Path) -> None:
    results, figure = tmp_path / "benchmarks" / "results", tmp_path / "docs" / "figures" / name
    results.mkdir(parents=True)
    path = results / f"{docs_figures.FIGURES[name].stem}.json"
    path.write_bytes((RESULTS / path.name).read_bytes())
    (tmp_path / "README.md").write_text(f"![A figure](docs/figures/{name})\n")
    lines: list[str] = []
    assert report.write(tmp_path, say=lines.append) == [figure]
    assert lines == [f"wrote {figure}"]
    before, written = docs_figures.drawn(name, results), figure.read_bytes()
    assert report.write(tmp_path, say=lines.append) == []
    figure.unlink()
    report.write(tmp_path, say=lines.append)
    assert figure.read_bytes() == written
    content = json.loads(path.read_text())
    _changed(content)
    path.write_text(json.dumps(content))
    assert report.write(tmp_path, say=lines.append) == [figure]
    after = docs_figures.data_of(docs_figures.drawn(name, results))
    old = [at for panel in docs_figures.data_of(before) for line in panel["lines"].values() for at in line]
    new = [at for panel in after for line in panel["lines"].values() for at in line]
    changes = [float(other[1]) - float(one[1]) for one, other in zip(old, new, strict=True) if one != other]
    assert changes  # one point of a line; of a box of one set median, quartiles and whiskers
    assert changes == pytest.approx([0.001] * len(changes), abs=1e-8)
    assert len(changes) == 1 or "cifar10" in name


def test_a_figure_without_its_result(tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("![A figure](docs/figures/shift-digits-ece.png)\n")
    with pytest.raises(BadFile, match=r"shift-digits\.json cannot be read"):
        report.write(tmp_path)


def test_commands_and_facts(tmp_path: Path) -> None:
    cells = _uci(tmp_path)
    found = facts({"cells": cells})
    assert found.device == "CPU, 1 threads"
    assert found.date == "2026-01-01 to 2026-01-03"
    assert (found.seeds, found.time) == ("0 to 2", "5.0 min in 3 cells")
    assert facts({"meta": {"device": "cpu"}}).date == "not recorded"
    line = blocks.table("commands", tmp_path).splitlines()[-1]
    assert line.startswith(
        "| `python -m benchmarks.uci --data yacht --splits 3 --methods ensemble --out results` | the data set named |"
    )


@pytest.mark.parametrize(
    ("stem", "key"),
    [
        ("shift-mnist-rotation", "mnist-shift"),
        ("shift-fashion_mnist-translation", "mnist-shift"),
        ("shift-mnist", "shift"),
        ("shift-cifar10-c-ovadia", "cifar10-c"),
        ("intervals", "intervals"),
        ("uci-wine", "uci"),
    ],
)
def test_the_name_of_a_file_tells_its_benchmark(stem: str, key: str) -> None:
    assert benchmark_of(stem) == key


@pytest.mark.parametrize("stem", ["unseenly", "mnist-shift", "magic-mnist"])
def test_a_file_of_no_benchmark(stem: str) -> None:
    with pytest.raises(BadInput, match="known are shift"):
        benchmark_of(stem)


def test_markdown_becomes_markup() -> None:
    text = "Told:\n\nA <b> & *word* here.\n\nSums:\n\n| | a \\| b |\n|---|---|\n| x | 1 [0, 2] |\n\n- one\n- two"
    assert [title for title, _ in tables_of(text)] == ["", "", "Sums", ""]
    found = markup(text)
    assert '<p class="note">Told:</p><p class="note">A &lt;b&gt; &amp; <em>word</em> here.</p>' in found
    assert '<th scope="col">a | b</th>' in found
    assert "<td>1 <small>[0, 2]</small></td>" in found
    assert "<ul><li>one</li><li>two</li></ul>" in found
    assert tables_of("Claims:\n\n- one") == [("Claims", "- one")]
    assert '<p class="note">Claims:</p><ul><li>one</li></ul>' in markup("Claims:\n\n- one")
    assert "<details><summary>Two</summary>" in markup("One:\n\n| a |\n|---|\n\nTwo:\n\n| a |\n|---|", folded=True)


def test_dots_are_means_with_standard_errors_beside_the_published(tmp_path: Path) -> None:
    cells = _uci(tmp_path)
    ours, *theirs = uci_figure.rows(cells, "rmse")
    assert (ours.name, ours.mean) == ("Deep ensemble", 2.0)
    assert ours.error == pytest.approx(3**-0.5)
    assert {dot.mean for dot in theirs} == {column["yacht"].mean for column in UCI["rmse"].values()}
    assert "yacht" in uci_figure.dots({"uci-yacht": {"cells": cells}})


def test_boxes_are_over_the_shifts_of_a_severity() -> None:
    content = _evaluations()
    assert shift_figures.points_of(content, "ece") == {"one & all": {0: [0.1], 1: [0.2, 0.4]}}
    sets = [{"shift": "fog", "severity": 2, "ece": 0.5}]
    cells = [_cell("vanilla", 0, {"rows": {"as trained": {"clean": {"ece": 0.1}, "sets": sets}}})]
    assert shift_figures.points_of({"cells": cells}, "ece") == {"vanilla, as trained": {0.0: [0.1], 2.0: [0.5]}}
    figures = shift_figures.of_evaluations({"shift-digits": content})
    assert "one &amp; all\nseverity 1: median 0.300" in figures
    assert "Reliability under shift" in figures


def test_rows_of_one_method_are_in_one_panel() -> None:
    labels = [f"{method}, {row}" for method in ("a", "b", "c") for row in ("as trained", "temperature", "aware")]
    assert shift_figures._shared_out(labels) == [labels[:6], labels[6:]]
    assert shift_figures._shared_out(labels[:4] + labels[6:]) == [labels[:4], labels[6:]]
    assert shift_figures._shared_out(labels[:1] * 9) == [labels[:1] * 9]


def test_the_table_of_evaluations() -> None:
    assert shift_tables.of_evaluations(_evaluations()).startswith(
        "ECE by severity:\n\n|  | clean | severity 1 |\n|---|---|---|\n| one & all | 0.100 | 0.300 |\n\nEvery metric:\n\n"
    )


def test_a_result_file_round_trips(tmp_path: Path) -> None:
    (tmp_path / "shift-digits.json").write_text(json.dumps(_evaluations()))
    text, problems = page(tmp_path)
    assert problems == []
    assert "--data digits --seed 0 --out results" in text


def test_a_file_of_cifar10_c(tmp_path: Path) -> None:
    names = ("accuracy", "nll", "brier", "ece")
    sets = [{"shift": kind, "severity": s, **dict.fromkeys(names, 0.1 * s)} for kind in ("fog", "snow") for s in (1, 5)]
    values = {"rows": {"as trained": {"clean": dict.fromkeys(names, 0.1), "sets": sets}}, "temperature": 1.0}
    costs = {"parameters": 9, "train_seconds": 2.0, "relative_prediction_time": 1.0}
    settings = {"suite": "cifar10-c-ovadia", "network": "resnet20", "epochs": 80, "budget": "full", "draws": 1}
    settings |= {"batch_size": 256, "members": 1}
    cells = [_cell("deterministic", seed, values | costs, "cifar10") | {"settings": settings} for seed in (0, 1)]
    collect(cells, tmp_path / "shift-cifar10-c-ovadia.json", **settings)
    text, problems = page(tmp_path)
    assert problems == []
    assert "0.057 / 0.127 / 0.288" in text
    assert "Deterministic, as trained\nseverity 5: median 0.500" in text
    assert (
        "python -m benchmarks.shift --data cifar10 --methods deterministic --seeds 2 --suite cifar10-c-ovadia "
        "--network resnet20 --epochs 80 --out results"
    ) in text


def test_a_file_of_noisy_labels(tmp_path: Path) -> None:
    scores = {"accuracy": 0.5, "nll": 1.0, "ece": 0.125}
    cells = [_cell("deterministic", 0, {"as trained": scores}, "cifar10n_worst")]
    collect(cells, tmp_path / "noise-cifar10n.json", labels="cifar10n", budget="full", protocol="one epoch")
    text, problems = page(tmp_path)
    assert problems == []
    assert "<td>0.125</td>" in text
    assert "--labels cifar10n --methods deterministic --seeds 1 --out results" in text
