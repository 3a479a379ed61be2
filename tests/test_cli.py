"""The command line: what it reads, what it writes, and how it exits."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayesguard as bg
from bayesguard.cli import main
from bayesguard.errors import BadInput
from bayesguard.tables import read_predictions

PROBS = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
LABELS = np.array([0, 0, 1, 1])


def run(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


def npz(folder: Path, **arrays: Any) -> Path:
    path = folder / "predictions.npz"
    np.savez(path, **arrays)
    return path


def csv(folder: Path, text: str) -> Path:
    pytest.importorskip("pandas")
    path = folder / "predictions.csv"
    path.write_text(text)
    return path


def parquet(path: Path) -> Path:
    """Return the file of a csv file's columns."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    other = path.with_suffix(".parquet")
    pandas.read_csv(path).to_parquet(other)
    return other


def accuracy(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> float:
    out = path.parent / "out.json"
    code, _, error = run(["evaluate", path, "--json", out, *arguments], capsys)
    assert (code, error) == (0, "")
    results = json.loads(out.read_text())["results"]
    return float(next(r["value"] for r in results if r["metric"] == "accuracy" and r["group"] is None))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], capsys) == (0, f"bayesguard {bg.__version__}\n", "")


def test_evaluate_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = npz(tmp_path, probs=PROBS, targets=LABELS, where=np.array(["a", "a", "b", "b"]))
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    arguments = ["evaluate", path, "--groups", "where", "--json", out, "--html", page, "--seed", 3]
    code, text, error = run(arguments, capsys)
    direct = bg.evaluate(bg.Predictive.from_probs(PROBS), LABELS, groups=["a", "a", "b", "b"], seed=3)
    assert (code, error) == (0, "")
    assert text == direct.table() + "\n"
    assert out.read_text() == direct.to_json()
    assert "predictions.npz" in page.read_text()


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (["accuracy<0.9"], 1),
        (["accuracy<0.7"], 0),
        (["ece > 0.05"], 1),
        (["accuracy<=0.75"], 1),
        (["accuracy>=0.76", "brier>1"], 0),
        (["brier>1", "nll>=0"], 1),
        (["aurc>0.9"], 0),
    ],
)
def test_thresholds(limits: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = npz(tmp_path, probs=PROBS, labels=LABELS)
    found, text, _ = run(["evaluate", path, *(word for limit in limits for word in ("--fail-if", limit))], capsys)
    assert found == code
    assert ("crossed" in text) == (code == 1)


def test_undefined_number_crosses_every_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = npz(tmp_path, probs=PROBS[:2], labels=LABELS[:2])
    assert run(["evaluate", path, "--fail-if", "error_auroc<0.5"], capsys)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a command"),
        (["evaluate"], "predictions"),
        (["evaluate", "none.npz"], "none.npz does not exist"),
        (["evaluate", "none.csv"], "none.csv does not exist"),
        (["evaluate", "none.txt"], "no known kind"),
        (["evaluate", "FILE", "--nonsense"], "--nonsense"),
        (["evaluate", "FILE", "--targets", "truth"], "has no 'truth'"),
        (["evaluate", "FILE", "--groups", "where"], "has no 'where'"),
        (["evaluate", "FILE", "--metric", "eec"], "'eec'"),
        (["evaluate", "FILE", "--fail-if", "ece=0.05"], "'ece=0.05'"),
        (["evaluate", "FILE", "--fail-if", "eec>0.05"], "'eec'"),
        (["evaluate", "FILE", "--fail-if", "rmse>0.05"], "'rmse'"),
        (["evaluate", "FILE", "--json", "nowhere/out.json"], "nowhere"),
        (["evaluate", "FILE", "--seed", "-1"], "seed"),
        (["benchmark", "shift", "--data", "nonsense"], "nonsense"),
        (["benchmark", "shift", "--method", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = npz(tmp_path, probs=PROBS, labels=LABELS)
    code, _, error = run([str(path) if word == "FILE" else word for word in arguments], capsys)
    assert code == 2
    assert error.startswith("bayesguard: ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"labels": LABELS}, "no predictions"),
        ({"probs": PROBS}, "targets"),
        ({"probs": PROBS, "logits": PROBS, "labels": LABELS}, "several kinds"),
        ({"probs": PROBS * 2, "labels": LABELS}, "row 0"),
        ({"probs": PROBS, "labels": LABELS[:3]}, "shape"),
        ({"probs": PROBS, "labels": LABELS + 5}, "label 5 in row 0"),
        ({"probs": PROBS, "labels": np.array([0, 1, 0, np.nan])}, "row 3"),
        ({"probs": PROBS, "labels": np.array(["a", "b", "a", "b"])}, "'a'"),
        ({"probs": PROBS.astype(str), "labels": LABELS}, "'probs'"),
        ({"probs": PROBS, "labels": np.array([{}] * 4, dtype=object)}, "pickled"),
    ],
)
def test_bad_arrays(arrays: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(["evaluate", npz(tmp_path, **arrays)], capsys)
    assert code == 2
    assert words in error
    assert error.count("\n") == 1


def test_damaged_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "predictions.npz"
    path.write_bytes(npz(tmp_path, probs=PROBS, labels=LABELS).read_bytes()[:200])
    code, _, error = run(["evaluate", path], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert str(path) in error


GOOD = "p0,p1,label\n0.9,0.1,0\n0.2,0.8,1\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("p0,p1,label\n", "has no rows"),
        (GOOD + "0.2,0.8\n", "line 4 has 2 fields, the first line 3"),
        (GOOD + "0.2,0.8,1,1\n", "line 4 has 4 fields, the first line 3"),
        ("p0,p1,label\n0.9,0.1,0,7\n0.2,0.8,1,7\n", "line 2 has 4 fields"),
        ("p0,p1,p1,label\n0.9,0.1,0.1,0\n", "'p1' twice"),
        ("a,b,label\n0.9,0.1,0\n", "no predictions"),
        ("p0,p1,truth\n0.9,0.1,0\n", "no targets"),
        ("p0,p1,logit_0,logit_1,label\n0.9,0.1,1,2,0\n", "several kinds"),
        ("p0,p1,label\n0.9,high,0\n", "'p1'"),
        (GOOD + "0.2,0.7,1\n", "row 2"),
        (GOOD + "0.2,,1\n", "row 2"),
        (GOOD + "0.2,0.8,2\n", "label 2 in row 2"),
        (GOOD + "0.2,0.8,0.5\n", "integer class labels"),
        (GOOD + "0.2,0.8,cat\n", "neither numbers nor names"),
        (GOOD + "1.2,-3.1,1\n", "row 2"),
        (GOOD.replace("p0,p1", "logit_0,logit_1"), "logits that are probabilities"),
        ("loc,scale,y\n1,0,1\n", "scale"),
        ("loc,scale,y\n1,1,nan\n", "row 0"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_bad_tables(suffix: str, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv(tmp_path, text)
    if suffix == "parquet":
        if "fields" in words or words in ("it is empty", "'p1' twice"):
            pytest.skip("there are no lines in a parquet file")
        path = parquet(path)
    code, out, error = run(["evaluate", path], capsys)
    assert (code, out, error.count("\n")) == (2, "", 1), error
    assert words in error


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.97])
def test_damaged_files(suffix: str, share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = npz(tmp_path, probs=PROBS, labels=LABELS) if suffix == "npz" else parquet(csv(tmp_path, GOOD))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    code, out, error = run(["evaluate", path], capsys)
    assert (code, out, error.count("\n")) == (2, "", 1), error
    assert str(path) in error


def test_changed_byte_of_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = npz(tmp_path, probs=PROBS, labels=LABELS)
    content = path.read_bytes()
    place = content.index(PROBS.tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    code, _, error = run(["evaluate", path], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "CRC" in error


def test_group_without_a_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv(tmp_path, "p0,p1,label,where\n0.9,0.1,0,a\n0.2,0.8,1,\n")
    for file in (path, parquet(path)):
        code, _, error = run(["evaluate", file, "--groups", "where"], capsys)
        assert (code, error.count("\n")) == (2, 1)
        assert "'where' in row 1" in error


def test_logits_and_probabilities_are_not_mistaken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arrays, words in (
        ({"probs": np.log(PROBS)}, "from_logits"),
        ({"logits": PROBS}, "logits that are probabilities"),
        ({"logits": np.stack([PROBS, PROBS])}, "logits that are probabilities"),
    ):
        code, _, error = run(["evaluate", npz(tmp_path, labels=LABELS, **arrays)], capsys)
        assert (code, error.count("\n")) == (2, 1)
        assert words in error
    # Nothing changes with the remedy that the message names, nor is one row that sums to 1 a sign of anything.
    assert accuracy(npz(tmp_path, logits=PROBS - 1, labels=LABELS), capsys) == 0.75
    assert accuracy(npz(tmp_path, logits=PROBS * [[1], [1], [1], [2]], labels=LABELS), capsys) == 0.75


def test_parquet_is_read_in_the_dtype_of_the_file(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    values = np.random.default_rng(0).dirichlet(np.ones(3), size=70_001).astype(np.float32)
    frame = pandas.DataFrame(values, columns=["prob_b", "prob_a", "prob_c"])
    frame["label"] = np.array(["a", "b", "c"])[np.arange(len(values)) % 3]
    path = tmp_path / "predictions.parquet"
    frame.to_parquet(path, row_group_size=30_000)
    predictive, targets, _ = read_predictions(path)
    assert predictive.dtype == torch.float32
    assert torch.equal(predictive.draw_logits, bg.Predictive.from_probs(values).draw_logits)
    assert targets[:4].tolist() == [1, 0, 2, 1]


def test_without_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = npz(tmp_path, probs=PROBS, labels=LABELS, where=np.array(["a", "a", "b", "b"]))
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    arguments = ["evaluate", path, "--groups", "where", "--num-resamples", "0", "--fail-if", "accuracy<0.7"]
    code, text, error = run([*arguments, "--json", out, "--html", page], capsys)
    assert (code, error) == (0, "")
    assert "[" not in text
    assert "0.750" in text
    results = json.loads(out.read_text())["results"]
    assert all(result["lower"] is None and result["upper"] is None for result in results)
    assert "intervals over examples" not in page.read_text()
    assert "nan" not in page.read_text().lower().split("<img")[0]
    code, _, error = run(["evaluate", path, "--num-resamples", "10"], capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "at least 40" in error


def test_a_long_bootstrap_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = npz(tmp_path, probs=PROBS, labels=LABELS)
    monkeypatch.setattr("bayesguard.cli._LONG", 4000)
    code, _, error = run(["evaluate", path], capsys)
    assert code == 0
    assert error.startswith("bayesguard: 1,000 resamples of 4 examples will take about ")
    assert error.count("\n") == 1  # a terminal has a bar beneath it, a file has not
    assert run(["evaluate", path, "--num-resamples", "0"], capsys)[2] == ""


_MEASURE = """
import resource, sys
import numpy, torch, tqdm, bayesguard.cli, bayesguard.tables, bayesguard.metrics.registry
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
try:
    bayesguard.cli.main(["evaluate", sys.argv[1], "--num-resamples", "0"])
finally:
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in KiB on Linux only")
@pytest.mark.parametrize(("rows", "classes"), [(200_000, 40), (500_000, 10)])
def test_memory_of_a_large_file(rows: int, classes: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    probs = random.random((rows, classes), dtype=np.float32)
    probs /= probs.sum(1, keepdims=True)
    path = npz(tmp_path, probs=probs, targets=random.integers(classes, size=rows))
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # What was there before the predictions came in parts took more than six times the file, and eleven with few classes.
    assert int(done.stdout.splitlines()[-1]) < 4 * path.stat().st_size


def test_kinds_of_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy(npz(tmp_path, logits=np.log(PROBS), labels=LABELS), capsys) == 0.75
    assert accuracy(npz(tmp_path, probs=np.stack([PROBS, PROBS]), y=LABELS.astype(np.uint8)), capsys) == 0.75
    assert accuracy(npz(tmp_path, probs=PROBS[:, 1], labels=LABELS.astype(float)), capsys) == 0.75
    assert accuracy(npz(tmp_path, probs=PROBS, truth=LABELS, labels=1 - LABELS), capsys, "--targets", "truth") == 0.75
    for arrays in (
        {"loc": np.zeros(4), "scale": np.ones(4)},
        {"samples": np.random.default_rng(0).normal(size=(9, 4))},
    ):
        code, text, _ = run(["evaluate", npz(tmp_path, targets=np.arange(4.0), **arrays)], capsys)
        assert code == 0
        assert "CRPS" in text


def test_classes_go_by_number_not_by_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["p10", "p2", *(f"p{k}" for k in (0, 1, 3, 4, 5, 6, 7, 8, 9))]
    row = ",".join("1" if name == "p10" else "0" for name in names)
    path = csv(tmp_path, f"{','.join(names)},label\n{row},10\n{row},0\n")
    assert accuracy(path, capsys) == 0.5
    code, _, error = run(["evaluate", csv(tmp_path, "p0,p2,label\n1,0,0\n")], capsys)
    assert code == 2
    assert "without a gap" in error


def test_classes_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "prob_dog,prob_cat,label\n0.9,0.1,dog\n0.2,0.8,dog\n0.3,0.7,cat\n0.4,0.6,cat\n"
    assert accuracy(csv(tmp_path, text), capsys) == 0.75
    code, _, error = run(["evaluate", csv(tmp_path, text + "0.4,0.6,1\n")], capsys)
    assert code == 2
    assert "the classes are dog, cat" in error


def test_numbers_and_missing_values_in_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(["evaluate", csv(tmp_path, "loc,scale,y\n0,1,0.5\n1,1,2\n")], capsys)
    assert code == 0
    assert "RMSE" in text
    code, _, error = run(["evaluate", csv(tmp_path, "logit_0,logit_1,y\n0,1,0\n1,1,\n")], capsys)
    assert code == 2
    assert "row 1" in error


def test_benchmark_is_handed_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("bayesguard.benchmarks.shift.run", lambda data, **options: seen.update(options, data=data))
    arguments = ["benchmark", "shift", "--data", "mnist", "--method", "mc_dropout", "--device", "cpu", "--seed", "4"]
    assert run([*arguments, "--out", tmp_path], capsys)[0] == 0
    assert (seen["data"], seen["methods"], seen["device"], seen["seed"]) == ("mnist", ["mc_dropout"], "cpu", 4)
    assert seen["out"] == tmp_path


def test_as_a_process(tmp_path: Path) -> None:
    path = npz(tmp_path, probs=PROBS, labels=LABELS)
    code = "from bayesguard.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "evaluate", str(path), "--fail-if", "ece>0.05"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "crossed: ece>0.05" in done.stdout
    assert "Traceback" not in done.stderr


def test_groups_and_classes_are_what_is_written(tmp_path: Path) -> None:
    text = "prob_NA,prob_true,label,where\n0.9,0.1,NA,01\n0.2,0.8,true,1\n0.3,0.7,NA,None\n0.4,0.6,true,NA\n"
    _, truth, groups = read_predictions(csv(tmp_path, text), groups="where")
    assert truth.tolist() == [0, 1, 0, 1]
    assert groups.tolist() == ["01", "1", "None", "NA"]
    text = "prob_True,prob_False,label\n0.9,0.1,TRUE\n0.2,0.8,FALSE\n"
    assert read_predictions(csv(tmp_path, text))[1].tolist() == [0, 1]
    text = "prob_True,prob_False,label\n0.9,0.1,True\n0.2,0.8,\n"
    with pytest.raises(BadInput, match="no target in row 1"):
        read_predictions(csv(tmp_path, text))


def test_arrays_of_another_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy(npz(tmp_path, probs=PROBS.astype(">f8"), labels=LABELS.astype(">i4")), capsys) == 0.75
    if np.dtype(np.longdouble) != np.float64:
        code, _, error = run(["evaluate", npz(tmp_path, probs=PROBS.astype(np.longdouble), labels=LABELS)], capsys)
        assert (code, error.count("\n")) == (2, 1)
        assert "which torch does not know" in error


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["benchmark", "unseen", "--limit", "0"], "'0'"),
        (["benchmark", "unseen", "--limit=-3"], "'-3'"),
        (["benchmark", "text", "--seeds", "many"], "'many'"),
        (["evaluate", "predictions.npz", "--num-resamples", "1e3"], "'1e3'"),
    ],
)
def test_a_usage_error_quotes_what_was_given(
    arguments: list[str], given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(arguments, capsys)
    assert code == 2
    assert given in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shift", "--methods", ""], "--methods has '', which names nothing"),
        (["shift", "--data", "cifar10", "--methods", ","], "--methods has ',', which names nothing"),
        (["ood", "--ood", ""], "--ood has '', which names nothing"),
    ],
)
def test_an_empty_list_of_names_is_not_all_of_them(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a script's empty variable: it ran every method for hours."""
    code, _, error = run(["benchmark", *arguments], capsys)
    assert code == 2
    assert message in error


@pytest.mark.parametrize("arguments", [["shift"], ["shift", "--data", "cifar10"], ["label-shift", "--data", "digits"]])
def test_a_negative_seed_is_refused_before_training(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(["benchmark", *arguments, "--seed", "-1", "--out", tmp_path], capsys)
    assert code == 2
    assert error == "bayesguard: seed must be at least 0, got -1\n"
