"""The text benchmark: n-grams and divisions against exact answers, and a tiny run from end to end."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from bayesguard.benchmarks.data.text import hashed, intents, left_out_domains, n_grams
from bayesguard.benchmarks.text import detection, run, scores
from bayesguard.benchmarks.text_tables import cost_table, detection_table, shown, table
from bayesguard.cli import main
from bayesguard.errors import BadInput
from bayesguard.predictive import Predictive
from bayesguard.sampling import stream

_WORDS = ["bank", "card", "road", "song", "room", "plug"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """CLINC150 with six intents in three domains, where each intent has words of its own."""
    generator = stream("cpu", 0, "queries")

    def queries(per_intent: int) -> tuple[list[str], list[int]]:
        labels = [intent for intent in range(6) for _ in range(per_intent)]
        order = torch.randint(4, (len(labels),), generator=generator).tolist()
        return [f"please {_WORDS[label]} number {extra}" for label, extra in zip(labels, order, strict=True)], labels

    arrays: dict[str, object] = {
        "class_name": np.array(_WORDS),
        "class_domain": np.array([0, 0, 1, 1, 2, 2], np.uint8),
        "domain_name": np.array(["money", "way", "home"]),
        "text_oos_test": np.array(["what is a gnu", "who was first", "how far off is it"]),
    }
    for part, count in (("train", 20), ("val", 40), ("test", 5)):
        texts, labels = queries(count)
        arrays[f"text_{part}"], arrays[f"y_{part}"] = np.array(texts), np.array(labels, np.uint8)
    (tmp_path / "text").mkdir()
    np.savez(tmp_path / "text" / "clinc150.npz", **arrays)  # type: ignore[arg-type]
    np.savez(tmp_path / "text" / "banking77.npz", text_test=np.array(["my card is lost", "top up failed"]))
    return tmp_path


def test_n_grams_are_words_pairs_and_letters_with_edges() -> None:
    assert n_grams("Hi") == ["hi", "<hi", "hi>", "<hi>"]
    assert n_grams("") == []


def test_hashing_is_crc_and_pads_with_zero() -> None:
    rows = hashed(["hi", "a"], 100)
    assert rows.tolist()[0] == [1 + zlib.crc32(gram.encode()) % 99 for gram in ("hi", "<hi", "hi>", "<hi>")]
    assert rows.tolist()[1] == [1 + zlib.crc32(gram.encode()) % 99 for gram in ("a", "<a>")] + [0, 0]


def test_five_seeds_leave_each_of_ten_domains_out_once() -> None:
    assert sorted(place for seed in range(5) for place in left_out_domains(seed, 10)) == list(range(10))


def test_left_out_domains_leave_training_and_number_the_intents_anew(folder: Path) -> None:
    whole, part = intents("clinc150", data_dir=folder), intents("clinc150_domains", seed=1, data_dir=folder)
    assert (whole.num_classes, whole.left_out) == (6, ())
    assert {name: len(rows) for name, rows in whole.outside.items()} == {"out of scope": 3, "Banking77": 2}
    # Of three domains seed 1 leaves out the third and the first; intents 2 and 3 stay and become 0 and 1.
    assert part.left_out == ("home", "money")
    assert part.num_classes == 2
    assert part.train[1].tolist() == [0] * 20 + [1] * 20
    assert len(part.test[0]) == 10
    assert len(part.outside["left-out domains"]) == 20
    assert torch.equal(part.train[0], whole.train[0][40:80, : part.train[0].shape[1]])


def test_detection_counts_queries_outside_as_positives() -> None:
    inside = Predictive.from_probs([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    outside = Predictive.from_probs([[0.7, 0.3], [0.5, 0.5]])
    found = detection(inside, outside)
    assert set(found) == {"max_probability", "entropy"}
    for values in found.values():
        # Ranked from the least certain: out, in, out, in, in.
        assert values["auroc"] == pytest.approx(5 / 6)
        assert values["auprc"] == pytest.approx((1 + 2 / 3) / 2)
        assert values["fpr95"] == pytest.approx(1 / 3)


def test_mutual_information_is_a_score_where_there_are_draws() -> None:
    pred = Predictive.from_probs([[[0.9, 0.1]], [[0.1, 0.9]]], draws=True)
    assert scores(pred)["mutual_information"].item() == pytest.approx(0.3681, abs=1e-4)


def test_shown_names_seeds_without_a_value() -> None:
    assert shown([None, None]) == "none"
    assert shown([0.5, 0.5]) == "0.500 [0.500, 0.500]"


def test_a_tiny_run_measures_every_method_and_keeps_it(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "results"
    records = run("clinc150", seeds=1, device="cpu", out=out, data_dir=folder, budget="small", say=said.append)
    assert [record["method"] for record in records] == ["deterministic", "mc_dropout", "deep_ensemble", "variational"]
    kept = json.loads((out / "text-clinc150.json").read_text())
    assert kept["cells"] == records
    assert kept["meta"]["positives"] == "out of scope"
    plain = records[0]["values"]["as_trained"]["outside"]["out of scope"]
    random = records[1]["values"]["as_trained"]["outside"]["out of scope"]
    assert "mutual_information" not in plain
    assert "mutual_information" in random
    assert "not comparable" in "".join(said)
    assert "Budget: small" in "".join(said)
    rows = table(records).splitlines()
    assert len(rows) == 2 + 2 * 4
    assert "| 0.965 |" in rows[2]
    assert "0.965" not in rows[3]
    assert "| 0.942 |" in detection_table(records)
    # 1,024 vectors of 16, and two dense layers; five members have them five times.
    parameters = 1024 * 16 + 17 * 32 + 33 * 6
    assert f"| Deterministic | {parameters:,} |" in cost_table(records)
    assert f"| Deep ensemble | {5 * parameters:,} |" in cost_table(records)


def test_left_out_domains_run_and_have_no_published_numbers(folder: Path, tmp_path: Path) -> None:
    records = run(
        "clinc150_domains",
        methods=["deterministic"],
        seeds=1,
        device="cpu",
        out=tmp_path,
        data_dir=folder,
        budget="small",
    )
    assert records[0]["values"]["left_out"] == ["money", "way"]
    assert "0.942" not in detection_table(records)
    assert "| 0.965 |" not in table(records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "trec"}, "data must be clinc150 or clinc150_domains, got 'trec'"),
        ({"methods": ["sngp"]}, "methods must be among deterministic"),
        ({"methods": []}, "got none"),
        ({"seeds": 0}, "seeds must be 1 or more, got 0"),
        ({"budget": "large"}, "budget must be 'full' or 'small', got 'large'"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        run(out=tmp_path, **arguments)  # type: ignore[arg-type]


def test_the_command_runs_chosen_methods(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["benchmark", "text", "--methods", "deterministic", "--seeds", "1", "--budget", "small"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--data-dir", str(folder), "--out", str(tmp_path), "--device", "cpu"])
    assert ended.value.code == 0
    assert "Deterministic + temperature" in capsys.readouterr().out
