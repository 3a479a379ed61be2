"""Tables under natural shift: splits and encodings hold nothing back from the test and leak nothing into it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayesguard.benchmarks import tabular_data as data
from bayesguard.benchmarks.tabular import METHODS, run
from bayesguard.benchmarks.tabular_scores import Counts, class_scores
from bayesguard.benchmarks.tabular_tables import markdown, note, number
from bayesguard.benchmarks.tabular_tools import worst_window
from bayesguard.cli import main
from bayesguard.errors import BadFile, BadInput
from bayesguard.predictive import Predictive

LEVELS = {
    "workclass": ["?", "Private"],
    "education": ["Bachelors", "HS-grad"],
    "marital_status": ["Divorced", "Never-married"],
    "occupation": ["Sales", "Tech-support"],
    "relationship": ["Husband", "Wife"],
    "race": ["Black", "White"],
    "sex": ["Female", "Male"],
    "native_country": ["Cuba", "United-States"],
}
NUMBERS = ["age", "fnlwgt", "education_num", "capital_gain", "capital_loss", "hours_per_week"]
BIKE = [
    "season", "year", "month", "hour", "holiday", "weekday", "workingday", "weathersit",
    "temp", "feelingTemp", "humidity", "windspeed",
]  # fmt: skip


def adult_file(path: Path, rows: int = 400) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"num_name": np.array(NUMBERS), "cat_name": np.array(list(LEVELS))}
    arrays |= {f"levels_{name}": np.array(levels) for name, levels in LEVELS.items()}
    for part in ("train", "test"):
        numbers = rng.uniform(17, 80, (rows, len(NUMBERS))).astype(np.float32)
        codes = rng.integers(0, 2, (rows, len(LEVELS))).astype(np.int16)
        arrays |= {f"x_num_{part}": numbers, f"x_cat_{part}": codes}
        arrays[f"y_{part}"] = (numbers[:, 0] + rng.normal(0, 10, rows) > 50).astype(np.uint8)
    np.savez(path, **arrays)


def stream_file(path: Path, columns: int, rows: int = 400) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    y = (x[:, 0] + rng.normal(size=rows) > 0).astype(np.uint8)
    x[0, 2] = 5503.8
    np.savez(path, X=x, y=y, feature_names=np.array([f"feat_{place}" for place in range(columns)]))


def bike_file(path: Path) -> None:
    rng = np.random.default_rng(2)
    day = np.repeat(np.arange(0, 731, 12), 6).astype(np.int32)
    month = (day % 365) // 31 + 1
    hour = np.tile(np.arange(0, 24, 4), len(day) // 6)
    columns: dict[str, Any] = {"year": day // 365, "month": month, "hour": hour, "season": (month - 1) // 3 + 1}
    x = np.stack([columns.get(name, rng.integers(1, 4, len(day))) for name in BIKE], 1).astype(np.float32)
    y = rng.poisson(20 + 5 * hour + 60 * (day // 365)).astype(np.float32)
    np.savez(path, X=x, y=y, day=day, feature_names=np.array(BIKE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    below = tmp_path_factory.mktemp("data")
    (below / "tabular").mkdir()
    adult_file(below / "tabular" / "adult.npz")
    stream_file(below / "tabular" / "electricity.npz", 6)
    stream_file(below / "tabular" / "weather.npz", 8)
    bike_file(below / "tabular" / "bike_sharing_hour.npz")
    return below


def test_encoding_is_that_of_the_training_rows() -> None:
    numbers, codes = np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[4], [7]])
    encode = data.Encoder.fit(numbers, codes)
    # A constant column is only centred; level 9 was not trained on.
    found = encode(np.array([[1.0, 5.0], [5.0, 6.0]]), np.array([[7], [9]]))
    assert found.tolist() == [[-1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 0.0, 0.0]]
    with pytest.raises(BadInput, match="no rows"):
        data.Encoder.fit(numbers[:0], codes[:0])


def test_clipping_is_at_quantiles_of_the_training_rows() -> None:
    numbers = np.arange(1001.0)[:, None]
    encode = data.Encoder.fit(numbers, np.empty((1001, 0), np.int64), clip=[0])
    assert (encode.lower[0], encode.upper[0]) == (1.0, 999.0)
    far, edge = encode(np.array([[5000.0], [999.0]]), np.empty((2, 0), np.int64)).flatten().tolist()
    assert far == edge


def test_time_is_cut_into_halves_tenths_and_blocks() -> None:
    own, held, tested, blocks = data.chronological(103)
    assert [rows.tolist() for rows in (own, held, tested)] == [
        [*range(51)],
        [*range(51, 61)],
        [*range(61, 103)],
    ]
    assert [(rows.start, rows.stop) for rows in blocks.values()] == [(0, 8), (8, 16), (16, 25), (25, 33), (33, 42)]


def test_held_out_rows_are_the_rest() -> None:
    own, held = data.held_out(50, 0.2, 3)
    assert len(held) == 10
    assert sorted([*own, *held]) == [*range(50)]
    assert data.held_out(50, 0.2, 4)[1].tolist() != held.tolist()


def test_thinning_leaves_others_alone() -> None:
    inside = np.arange(40) % 2 == 0
    left = data.thinned(inside, 0.1, 0)
    assert inside[left].sum() == 2
    assert (~inside[left]).sum() == 20


def test_parts_of_adult(folder: Path) -> None:
    whole = data.load("adult", data_dir=folder)
    assert [len(part.y) for part in (whole.train, whole.calibration, whole.test)] == [320, 80, 400]
    assert whole.num_features == 6 + 16
    assert set(whole.test.labels["age"]) == {"under 30", "30 to 44", "45 to 59", "60 and over"}
    assert whole.train.x[:, :6].mean(0).abs().max() < 1e-6
    fewer = data.load("adult_few_women", data_dir=folder)
    assert fewer.test.labels == whole.test.labels
    for own, every in ((fewer.train, whole.train), (fewer.calibration, whole.calibration)):
        assert own.labels["sex"].count("Male") == every.labels["sex"].count("Male")
        assert own.labels["sex"].count("Female") == round(0.1 * every.labels["sex"].count("Female"))


def test_parts_of_a_stream(folder: Path) -> None:
    table = data.load("electricity", data_dir=folder)
    assert [len(part.y) for part in (table.train, table.calibration, table.test)] == [200, 40, 160]
    assert list(table.blocks) == ["1", "2", "3", "4", "5"]
    # The damaged value of the first row: cut in weather, kept in electricity.
    assert table.train.x[0, 2] > 10
    cut = data.load("weather", data_dir=folder).train.x[:, 2]
    rest = np.load(folder / "tabular" / "weather.npz")["X"][1:200, 2]
    assert cut[0] == cut.max()
    assert data.Encoder.fit(np.r_[5503.8, rest][:, None], np.empty((200, 0), np.int64), [0]).upper[0] < 5503.8


def test_parts_of_bikes(folder: Path) -> None:
    table = data.load("bike_sharing", data_dir=folder)
    assert list(table.blocks) == ["2011", "2012 Q1", "2012 Q2", "2012 Q3", "2012 Q4"]
    sizes = [len(part.y) for part in (table.train, table.calibration, table.test)]
    assert sum(sizes) == 366
    assert all(size % 6 == 0 for size in sizes)  # whole days
    assert table.target is not None
    assert table.counts is not None
    assert torch.equal(table.target(table.counts), table.test.y)
    later = table.counts[table.blocks["2012 Q1"].start :]
    assert later.mean() > table.counts[table.blocks["2011"]].mean() + 40
    assert table.train.y.double().std(correction=0) == pytest.approx(1, abs=1e-5)


def test_a_limit_takes_rows_evenly(folder: Path) -> None:
    table = data.load("electricity", data_dir=folder, limit=100)
    assert [len(part.y) for part in (table.train, table.calibration, table.test)] == [50, 10, 40]


def test_what_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="data must be one of"):
        data.load("iris", data_dir=folder)
    with pytest.raises(BadInput, match="does not exist"):
        data.load("adult", data_dir=tmp_path / "nowhere")
    (tmp_path / "tabular").mkdir()
    np.savez(tmp_path / "tabular" / "weather.npz", X=np.zeros((20, 3)))
    with pytest.raises(BadFile, match="does not hold what is needed"):
        data.load("weather", data_dir=tmp_path)


def test_scores_of_classes() -> None:
    found = class_scores(Predictive.from_probs([[0.8, 0.2], [0.4, 0.6]]), torch.tensor([0, 0]))
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert found["brier"] == pytest.approx((2 * 0.04 + 2 * 0.36) / 2)
    assert found["ece"] == pytest.approx((0.2 + 0.6) / 2)


def test_counts_are_scored_in_their_own_unit() -> None:
    target = data.Target(mean=3.0, deviation=0.8)
    loc, scale = torch.tensor([[0.0, 1.0], [0.5, -1.0]]), torch.tensor([[0.5, 0.4], [0.3, 0.6]])
    answers = Counts(Predictive.from_normal(loc.double(), scale.double(), draws=True), target)
    y = torch.tensor([30.0, 5.0])
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(2):
        which = torch.randint(2, (400_000, 1), generator=generator).expand(-1, 2)
        noise = torch.randn(400_000, 2, generator=generator)
        chosen = loc.gather(0, which) + scale.gather(0, which) * noise
        draws.append((3.0 + 0.8 * chosen.double()).expm1())
    first, second = draws
    crps = (first - y).abs().mean(0) - (first - second).abs().mean(0) / 2
    torch.testing.assert_close(answers.crps(y), crps, rtol=0.01, atol=0.0)
    torch.testing.assert_close(answers.mean, first.mean(0), rtol=0.01, atol=0.0)
    lower, upper = answers.interval(0.1)
    assert ((lower <= first) & (first <= upper)).double().mean(0).sub(0.9).abs().max() < 0.003
    # The density is the slope of the cdf.
    step = 1e-3
    ends = [answers.pred.cdf(((y.double() + sign * step / 2).log1p() - 3.0) / 0.8) for sign in (-1, 1)]
    torch.testing.assert_close(answers.log_prob(y).exp(), (ends[1] - ends[0]) / step, rtol=1e-4, atol=0.0)


def test_the_worst_window() -> None:
    covered = torch.tensor([1, 1, 0, 0, 1, 1]).bool()
    assert worst_window(covered, 3) == pytest.approx(1 / 3)
    assert worst_window(covered, 100) == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("count", "words"), [(1, "; 1 seed (0)."), (2, "; 2 seeds (0, 1)."), (5, "; 5 seeds (0 to 4).")]
)
def test_the_note_says_the_seeds(count: int, words: str) -> None:
    values = {"rows": {"train": 3, "calibration": 2, "test": 1}}
    settings = {"epochs": 1, "budget": "full"}
    records = [{"data": "adult", "seed": seed, "values": values, "settings": settings} for seed in range(count)]
    assert words in note(records)


def test_numbers_and_tables() -> None:
    assert number([0.5]) == "0.500"
    # t with two degrees of freedom: 4.302653.
    assert number([1.0, 2.0, 3.0]) == "2.000 ± 2.484"
    assert number([1.0, None]) == "not finite in 1 of 2"
    assert markdown(["", "x"], [["a", "1"], ["a", "2"]]) == "|  | x |\n| --- | --- |\n| a | 1 |\n|  | 2 |"


@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
@pytest.mark.parametrize("name", ["adult_few_women", "electricity", "bike_sharing"])
def test_a_short_run(name: str, folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    records = run(name, seeds=3, budget="small", device="cpu", out=tmp_path, data_dir=folder, say=lines.append)
    assert [record["method"] for record in records] == list(METHODS)
    written = json.loads((tmp_path / f"tabular-{name}.json").read_text())
    assert written["cells"] == records
    assert written["meta"]["seeds"] == 1
    assert "these numbers mean nothing" in lines[0]
    assert "no published numbers" in lines[0]
    for record in records:
        scores = record["values"]["scores"]
        if name == "adult_few_women":
            assert list(scores) == ["as trained", "calibrated", "multicalibrated"]
            assert "sex: Female" in scores["calibrated"]
            worst = record["values"]["worst"]["calibrated"]["nll"]
            assert worst["value"] == max(own["nll"] for group, own in scores["calibrated"].items() if group != "all")
            assert worst["lower"] <= worst["value"] <= worst["upper"]
        else:
            assert len(scores["calibrated"]) == 6
            assert set(record["values"]["coverage"]) == {"split", "adaptive", "tuned"}


@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "weather", "--methods", "deterministic, mc_dropout", "--budget", "small", "--device", "cpu"]
    with pytest.raises(SystemExit, match="0"):
        main(["benchmark", "tabular", *options, "--out", str(tmp_path), "--data-dir", str(folder)])
    assert "| MCDropout | as trained |" in capsys.readouterr().out


def test_bad_options(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="data must be one of"):
        run("iris")
    with pytest.raises(BadInput, match="methods must be among"):
        run("adult", methods=["laplace"])
    with pytest.raises(BadInput, match="budget must be"):
        run("adult", budget="huge")
    with pytest.raises(BadInput, match="seeds must be 1"):
        run("adult", seeds=0)
