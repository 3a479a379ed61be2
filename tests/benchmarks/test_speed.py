"""What the speed benchmark runs: networks, peers, files and options. Nothing here is judged by how long it takes."""

import json
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks.speed import draws, dropout, memory, runner, variational
from bayesguard.benchmarks.speed.bayesian_peers import BAYESIAN
from bayesguard.benchmarks.speed.ensembles import loop as ensemble_loop
from bayesguard.benchmarks.speed.ensembles import work_of
from bayesguard.benchmarks.speed.half import in_half
from bayesguard.benchmarks.speed.limits import Rates
from bayesguard.benchmarks.speed.measure import Spread
from bayesguard.benchmarks.speed.memory import measured
from bayesguard.benchmarks.speed.metrics import _same, crps_by_hand, ece_by_hand
from bayesguard.benchmarks.speed.networks import RECIPES, lenet, members, mlp, subject
from bayesguard.benchmarks.speed.peers import (
    collect,
    dropout_by_vmap,
    ensemble_by_vmap,
    in_dropout_mode,
    spread_of_draws,
    temperature_by_lbfgs,
)
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row, tables
from bayesguard.benchmarks.speed.training import one_after_another, vmapped
from bayesguard.cli import main
from bayesguard.errors import BadInput, BayesguardError
from bayesguard.pyro_scope import pyro_scope
from bayesguard.sampling import seeded_default_generators

CPU = torch.device("cpu")


# Peers.


def test_a_missing_peer_is_skipped_with_a_line() -> None:
    lines = list[str]()

    def missing() -> Mapping[str, Callable[[], float]]:
        import no_such_package  # type: ignore[import-not-found]  # noqa: F401

        return {}

    def refusing() -> Mapping[str, Callable[[], float]]:
        raise ValueError("no dropout module")

    makers = {"gone": missing, "strict": refusing, "there": lambda: {"there": lambda: 1.0}}
    assert list(collect(makers, say=lines.append)) == ["there"]
    assert lines == [
        "skipped gone: No module named 'no_such_package'",
        "skipped strict: it refused with ValueError: no dropout module",
    ]


def test_no_stand_in_is_left_behind() -> None:
    from bayesguard.benchmarks.speed.peers import torch_uncertainty

    before = {name for name in sys.modules if name.startswith("torchvision")}
    try:
        torch_uncertainty("methods")
    except ImportError as error:
        assert "torch_uncertainty" in str(error)  # noqa: PT017 -- either outcome is fine
    assert {name for name in sys.modules if name.startswith("torchvision")} == before


def test_a_peer_whose_draws_are_all_the_same_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = subject("lenet", CPU, quick=True)
    naive = in_dropout_mode(members(lenet, 1, CPU)[0])
    lines, notes = list[str](), list[str]()

    def makers(network: nn.Module, inputs: Tensor) -> dict[str, Callable[[int], Tensor]]:
        outputs = network(inputs)
        honest = dropout_by_vmap(network, inputs)["torch.vmap by hand"]
        return {"frozen": lambda count: outputs.expand(count, *outputs.shape), "honest": honest}

    monkeypatch.setattr(dropout, "DROPOUT", {"some": makers})
    naive.load_state_dict(chosen.network.state_dict())
    with torch.no_grad():
        kept = dropout._same_job(chosen, naive, 8, Settings(say=lines.append), notes)
    assert list(kept) == ["honest"]
    assert lines == [f"skipped frozen for {chosen.title}: its draws vary 0 times as much as those of the loop"]


@pytest.mark.filterwarnings("ignore")  # posteriors and tensordict warn at their import
@pytest.mark.parametrize("name", ["Pyro", "posteriors"])
def test_peers_that_sample_all_weights_learn(name: str) -> None:
    if name == "posteriors":
        pytest.importorskip("posteriors")
    inputs = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(16, 1)
    targets = torch.tensor([0, 1]).repeat(16)
    # What Pyro's global store holds afterwards would be taken for that of the next program.
    with seeded_default_generators(CPU, 0), pyro_scope():
        # The second network has other sizes under the same names: nothing may be left of the first.
        for hidden in (4, 16):
            network = mlp((2, hidden, 2), 0.0)
            peer = BAYESIAN[name](network)[name]
            assert not torch.equal(peer.network(inputs), peer.network(inputs))
            optimizer = torch.optim.Adam(peer.network.parameters(), lr=0.05)
            losses = []
            for _ in range(100):
                optimizer.zero_grad()
                loss = peer.loss(inputs, targets, 100_000)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert sum(losses[-10:]) < sum(losses[:10]) / 2
            fitted = sum(value.numel() for value in peer.network.parameters() if value.grad is not None)
            assert fitted == 2 * sum(value.numel() for value in network.parameters())  # a mean and a scale each


def test_spread_of_draws() -> None:
    outputs = torch.tensor([[[0.0, 1.0]], [[2.0, 1.0]]])
    assert spread_of_draws(outputs) == pytest.approx(1.0)  # the variances are 2 and 0


def test_ensembles_by_hand_are_ours() -> None:
    networks, inputs = members(lambda: mlp((6, 8, 8, 3), 0.0), 3, CPU), torch.ones(4, 6)
    with torch.no_grad():
        expected = bg.DeepEnsemble(networks)(inputs).probs
        assert torch.allclose(ensemble_loop(networks, inputs), expected, atol=1e-6)
    by_vmap = ensemble_by_vmap(networks, inputs)["torch.vmap by hand"]
    assert torch.allclose(by_vmap(), expected, atol=1e-6)


@pytest.mark.parametrize("case", ["dirichlet", "aps", "ece-by-hand", "crps", "bootstrap"])
def test_calibration_and_metrics_beside_a_few_lines(case: str) -> None:
    settings = Settings(repeats=1, quick=True, peers=False, say=lambda line: None)
    for row in runner.CASES[case](settings):
        assert row.case == case
        assert row.value.median > 0
        assert {"ours", row.baseline} == set(row.seconds)


def test_metrics_by_hand_are_ours() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.65, 0.35]])
    labels, samples = torch.tensor([0, 0, 1]), torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    assert ece_by_hand(probs, labels) == pytest.approx((0.1 + 0.8 + 0.65) / 3)
    # Mean distance to the target less half of that between samples.
    assert crps_by_hand(samples, torch.tensor([2.0, 0.0])) == pytest.approx(((4 - 8 / 2) / 3 + (6 - 6 / 2) / 3) / 2)
    with pytest.raises(BayesguardError, match="the same job"):
        _same(1.0, 1.001, "ECE")


def test_temperature_by_hand_is_ours() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 5, generator=generator)
    labels = torch.multinomial((logits / 2).softmax(-1), 1, generator=generator).squeeze(-1)
    ours = bg.calibration.TemperatureScaling().fit(bg.Predictive.from_logits(logits), labels)
    found = temperature_by_lbfgs(logits, labels)["plain LBFGS"]()
    assert found == pytest.approx(float(ours.temperature), rel=1e-3)


def test_training_at_once_is_training_one_after_another() -> None:
    network, *_ = members(lambda: mlp((2, 16, 2), 0.0).double(), 1, CPU)
    inputs = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64).repeat(64, 1)
    targets = torch.tensor([0, 1]).repeat(64)
    before = nn.functional.cross_entropy(network(inputs), targets).item()
    with seeded_default_generators(CPU, 0):
        at_once = vmapped([network], inputs, targets, 150)
    with seeded_default_generators(CPU, 0):
        one_after_another([network], inputs, targets, 150)
    assert nn.functional.cross_entropy(network(inputs), targets).item() < before / 2
    for name, value in network.named_parameters():
        assert torch.allclose(at_once[name][0], value, rtol=0, atol=1e-10)


# Networks, and what else is measured.


@pytest.mark.parametrize("key", RECIPES)
def test_the_parts_make_the_whole(key: str) -> None:
    chosen = subject(key, CPU, quick=True)
    with torch.no_grad():
        whole, parts = chosen.network(chosen.inputs), chosen.after(chosen.before(chosen.inputs))
        assert whole.shape == parts.shape == (len(chosen.inputs), 10)
        if key != "lstm":  # whose parts have weights of their own
            assert torch.equal(whole, parts)
        noisy = in_dropout_mode(chosen.network)
        assert not torch.equal(noisy(chosen.inputs), noisy(chosen.inputs))
        # The part before is the same with dropout on: nothing random precedes the rest.
        assert torch.equal(chosen.before(chosen.inputs), chosen.before(chosen.inputs))


def test_batch_norm_rests_in_the_loop() -> None:
    network = in_dropout_mode(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)))
    network(torch.randn(8, 3))
    assert torch.equal(network[0].running_mean, torch.zeros(3))  # type: ignore[index]


def test_members_differ_and_repeat_themselves() -> None:
    first, second = members(lambda: mlp((2, 4, 2)), 2, CPU)
    again = members(lambda: mlp((2, 4, 2)), 1, CPU)[0]
    weights = [network.state_dict()["before.0.weight"] for network in (first, second, again)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_the_loop_is_a_mean_of_probabilities() -> None:
    network, inputs = nn.Linear(3, 4), torch.ones(2, 3)
    assert torch.allclose(dropout.loop(network, inputs, 3), network(inputs).softmax(-1))


def test_operations_and_bytes() -> None:
    operations, moved = work_of(nn.Linear(3, 5), torch.ones(2, 3))
    assert operations == 2 * 2 * 3 * 5
    assert moved == 4 * (3 * 5 + 5 + 6 + 10)


def test_draws_that_are_needed() -> None:
    numbers = [8, 16, 24]
    assert draws.needed([4.0, 2.0, 1.0], 2.0, numbers) == 16
    assert draws.needed([1.0, 1.0, 1.0], 2.0, numbers) == 8
    # As independent draws: none is enough, and the error goes on as one over the number.
    assert draws.needed([50 / 8, 50 / 16, 50 / 24], 1.0, numbers) == pytest.approx(50)


def test_peak_memory_counts_a_pass() -> None:
    hidden = 512 * 1024 * 4  # one of two layers; smaller ones drown in the kernel's counting by the page
    settings = Settings(device=CPU)
    for number in (0, 4):
        assert hidden < measured("mlp", number, settings) < 100 * hidden


def test_memory_is_measured_at_every_number_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def measured(key: str, number: int, settings: Settings) -> int:
        asked.append(number)
        return 1000 + number

    monkeypatch.setattr(memory, "measured", measured)
    found = memory.rows(Settings(samples=(10, 50, 100), quick=True))
    assert asked == [0, 10, 50, 100]
    assert [row.name.partition(", S=")[2] for row in found] == ["10", "50", "100"]
    assert [row.value.median for row in found] == [1.01, 1.05, 1.1]


def test_variational_predictions_at_every_number_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    small = variational._Kind("small", lambda: mlp((6, 8, 10), 0.0), (6,), 2.0, 1.5)
    monkeypatch.setattr(variational, "KINDS", (small,))
    settings = Settings(samples=(2, 30), repeats=1, quick=True, peers=False)
    _, *predictions = variational.rows(settings)
    assert [row.name.partition(", S=")[2] for row in predictions] == ["2", "20", "30"]
    assert [row.must for row in predictions] == [None, 1.2, None]


# The run.


def row(case: str) -> Callable[[Settings], list[Row]]:
    return lambda settings: [Row(case, case, Spread(1.0, 0.5, 2.0), "loop", must=2.0)]


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {"a": row("a"), "b": row("b")}
    monkeypatch.setattr(runner, "CASES", found)
    monkeypatch.setattr(Settings, "rates", Rates(1e9, 1e9))
    return found


def test_files(cases: dict[str, Any], tmp_path: Path) -> None:
    lines = list[str]()
    found = runner.run(cases=list(cases), out=tmp_path / "deep", say=lines.append)
    written = json.loads((tmp_path / "deep" / "speed-cpu.json").read_text())
    assert [entry["case"] for entry in written["rows"]] == [entry.case for entry in found] == ["a", "b"]
    assert set(written) == {"machine", "rates", "repeats", "quick", "failed", "rows"}
    facts = written["machine"]
    assert set(facts) == {"cpu", "cores", "gpu", "threads", "python", "system", "date", "versions"}
    assert facts["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert (facts["threads"], facts["gpu"], written["quick"], written["failed"]) == (1, None, False, {})
    assert tables(found) in (tmp_path / "deep" / "speed-cpu.md").read_text()


def test_a_folder_that_cannot_be_made_is_refused_before_the_timing(cases: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cases["a"] = lambda settings: pytest.fail("the folder is found out first")
    with pytest.raises(OSError, match="file"):
        runner.run(cases=["a"], out=tmp_path / "file", say=lambda line: None)


def test_quick_files_do_not_replace_real_ones(cases: dict[str, Any], tmp_path: Path) -> None:
    found = runner.run(cases=["a"], quick=True, out=tmp_path, say=lambda line: None)
    assert (found[0].must, found[0].verdict) == (None, "")  # nothing is judged at small sizes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed-quick-cpu.json", "speed-quick-cpu.md"]


def test_one_failure_loses_nothing_and_is_an_error(cases: dict[str, Any], tmp_path: Path) -> None:
    def fail(settings: Settings) -> list[Row]:
        raise RuntimeError("out of luck")

    cases["a"] = fail
    threads = torch.get_num_threads()
    with pytest.raises(BayesguardError, match="1 of 2 cases failed: a"):
        runner.run(cases=["a", "b"], out=tmp_path, say=lambda line: None)
    written = json.loads((tmp_path / "speed-cpu.json").read_text())
    assert written["failed"] == {"a": "RuntimeError: out of luck"}
    assert [entry["case"] for entry in written["rows"]] == ["b"]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cases": ["nonsense"]}, "nonsense"),
        ({"cases": []}, "none"),
        ({"device": "tpu"}, "'tpu'"),
        ({"samples": [1]}, "samples"),
        ({"samples": []}, "samples"),
        ({"repeats": 0}, "repeats"),
        ({"threads": 0}, "threads"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        runner.run(**{"out": tmp_path, "say": lambda line: None, **options})


def test_the_demands_are_about_fifty_draws() -> None:
    assert Settings(samples=(10, 50, 100)).main_samples == 50
    assert Settings(samples=(10,)).main_samples == 10


def test_half_precision_runs_in_half_precision() -> None:
    weight = torch.randn(8, 8)
    half = in_half(lambda: weight @ weight, CPU)
    assert half().dtype == torch.bfloat16
    assert (weight @ weight).dtype == torch.float32


def test_every_network_has_a_demand() -> None:
    assert set(dropout.DEMANDS) == set(RECIPES) <= set(runner.CASES)
    for demands in dropout.DEMANDS.values():
        assert all(demand.aim < demand.must for demand in demands)
    assert all(a < b for a, b in pairwise(draws._NUMBERS))


def test_the_command_line_hands_over_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(runner, "run", lambda device, **options: seen.update(options, device=device))
    words = ["--cases", "mlp, lenet", "--samples", "10,20", "--repeats", "7", "--threads", "2", "--quick", "--no-peers"]
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "speed", "--out", "elsewhere", *words, "--out", str(tmp_path)])
    assert stop.value.code == 0
    assert seen == {
        "device": "cpu",
        "cases": ["mlp", "lenet"],
        "samples": [10, 20],
        "repeats": 7,
        "threads": 2,
        "quick": True,
        "peers": False,
        "out": tmp_path,
    }


def test_the_command_line_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--samples", "ten"], ["--cases", "nonsense"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as stop:
            main(["benchmark", "speed", *words])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert words[1] in error
        assert error.count("\n") == 1
