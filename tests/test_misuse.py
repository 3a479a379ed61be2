"""What users hand in by mistake is refused with a message that names it and the way out: no number, no raw error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import bayesguard as bg
from bayesguard import calibration, likelihoods, report
from bayesguard.cli import main
from bayesguard.errors import BadFile, BadInput, BadType, UnsupportedNetwork
from bayesguard.results import combined_table

X, Y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
Case = tuple[Callable[[], Any], type[Exception], str]


class Frame:
    """What pandas and polars have in common."""

    def to_numpy(self) -> Any:
        return X.numpy()

    def __iter__(self) -> Any:
        return iter(("a", "b"))


def network(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, classes))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same networks in any order of tests: some of them make calibration warn."""
    torch.manual_seed(0)


def predictor() -> bg.MCDropout:
    return bg.MCDropout(network(), num_samples=4)


def fitted(targets: Any, inputs: Any = X, **settings: Any) -> Any:
    return predictor().fit((inputs, targets), epochs=1, **settings)


def evaluated(**settings: Any) -> Any:
    return bg.evaluate(bg.Predictive.from_probs(torch.full((30, 3), 1 / 3)), Y, num_resamples=0, **settings)


LABELS: dict[str, Case] = {
    "numbers": (lambda: fitted(Y.float()), BadType, r"targets\.long\(\).*likelihoods\.Gaussian"),
    "booleans": (lambda: fitted(Y > 0), BadType, r"targets\.long\(\)"),
    "one-hot": (lambda: fitted(nn.functional.one_hot(Y)), BadInput, r"\(30, 3\).*argmax"),
    "soft": (lambda: fitted(nn.functional.one_hot(Y).float()), BadType, "argmax"),
    "from 1": (lambda: fitted(Y + 1), BadInput, "subtract 1"),
    "ignored": (lambda: fitted(Y - 1), BadInput, "Drop rows"),
    "column": (lambda: fitted(Y[:, None]), BadInput, r"targets\.squeeze\(-1\)"),
    "names": (lambda: fitted(np.array(["a", "b", "c"])[Y.numpy()]), BadType, r"numpy\.unique\(.*return_inverse"),
    "objects": (lambda: fitted(Y.numpy().astype(object)), BadType, "astype"),
    "listed names": (lambda: predictor()(X).log_prob(["a"] * 30), BadType, "value must hold numbers"),
    "listed in evaluate": (lambda: bg.evaluate(predictor()(X), ["a"] * 30), BadType, "data must hold numbers"),
    "none in a loss": (lambda: predictor().loss(X, None, num_data=30), BadType, "targets must be a tensor"),  # type: ignore[arg-type]
    "one-hot in evaluate": (
        lambda: bg.evaluate(predictor(), (X, nn.functional.one_hot(Y)), num_resamples=0),
        BadInput,
        "argmax",
    ),
    "regression": (
        lambda: bg.Deterministic(network(1), likelihoods.Gaussian()).fit((X, X[:, 0]), epochs=1),
        BadInput,
        r"targets\.unsqueeze\(-1\)",
    ),
}
DATA: dict[str, Case] = {
    "double": (lambda: predictor()(X.double()), BadType, "inputs are torch.float64.*parameters torch.float32.*convert"),
    "double in predict": (lambda: predictor().predict(X.double()), BadType, "inputs are torch.float64"),
    "double in fit": (lambda: fitted(Y, X.double()), BadType, "inputs are torch.float64"),
    "whole": (lambda: predictor()(X.long()), BadType, "inputs are torch.int64"),
    "double in Deterministic": (lambda: bg.Deterministic(network())(X.double()), BadType, "torch.float64"),
    "double in Variational": (lambda: bg.Variational(network())(X.double()), BadType, "torch.float64"),
    "double in an ensemble": (
        lambda: bg.DeepEnsemble([network(), network()])(X.double()),
        BadType,
        "inputs are torch.float64",
    ),
    "list": (lambda: predictor()(X.tolist()), BadInput, "got list"),
    "nested lists": (lambda: predictor().predict(X.tolist()), BadType, r"batch 0 is a list of numbers.*numpy\.asarray"),
    "frame": (lambda: predictor().predict(Frame()), BadType, r"got Frame; convert it, as by \.to_numpy\(\)"),
    "three arrays": (lambda: predictor().predict((X, X, X)), BadInput, "tuple of 3 arrays"),
    "weights": (lambda: predictor().calibrate((X, Y, torch.ones(30))), BadInput, "tuple of 3 arrays"),
    "dataset": (lambda: predictor().predict(TensorDataset(X, Y)), BadType, r"DataLoader\(dataset"),
    "mapping": (lambda: predictor().predict({"x": X}), BadType, r"\(\{\.\.\.\}, targets\)"),
    "examples": (lambda: predictor().predict(list(zip(X, Y, strict=True))), BadInput, "Single examples become batches"),
    "mappings without keys": (
        lambda: predictor().predict(DataLoader([{"image": x, "kind": y} for x, y in zip(X, Y, strict=True)])),  # type: ignore[arg-type]
        BadType,
        "'image', 'kind' as keyword arguments.*input_key=.*target_key=",
    ),
    "batches of nothing": (
        lambda: predictor().predict(X, batch_size=0),
        BadInput,
        "batch_size must be at least 1, got 0",
    ),
}
SETTINGS: dict[str, Case] = {
    "rate of 1": (lambda: bg.MCDropout(network(), p=1.0), BadInput, "p is 1, which drops everything"),
    "rate as text": (lambda: bg.MCDropout(network(), p="0.5"), BadType, "p must be a number, got str"),  # type: ignore[arg-type]
    "rate of True": (lambda: bg.MCDropout(network(), p=True), BadType, "p must be a number, got bool"),
    "a class": (lambda: bg.Deterministic(nn.Linear), BadType, "network must be a torch.nn.Module, got type"),  # type: ignore[arg-type]
    "no network": (lambda: bg.MCDropout(None), BadType, "network must be a torch.nn.Module"),  # type: ignore[arg-type]
    "meta": (lambda: bg.MCDropout(network().to("meta")), UnsupportedNetwork, "meta device and has no values"),
    "scale": (lambda: likelihoods.Gaussian(scale="a"), BadType, "scale must be a number"),  # type: ignore[arg-type]
    "scale of True": (lambda: likelihoods.Gaussian(scale=True), BadType, "scale must be a number"),
    "alpha as text": (lambda: calibration.Conformal(alpha="0.1"), BadType, "alpha must be a number"),  # type: ignore[arg-type]
    "no alpha": (lambda: predictor()(X).prediction_set(None), BadType, "alpha must be a number"),
    "factory without a seed": (
        lambda: bg.DeepEnsemble(lambda: network()),  # type: ignore[arg-type, misc]
        BadType,
        "factory that takes a seed",
    ),
    "members that differ": (
        lambda: bg.DeepEnsemble([network(3), network(2)])(X),
        BadInput,
        r"members 0 and 1 have outputs of shapes \(30, 3\) and \(30, 2\)",
    ),
    "one path": (lambda: bg.DeepEnsemble.from_checkpoints("a.safetensors", network()), BadType, "list of files"),
    "probabilities": (lambda: calibration.TemperatureScaling()(X), BadType, "pred must be a Predictive, got Tensor"),  # type: ignore[arg-type]
    "percentages": (lambda: bg.Predictive.from_probs([[50, 50]]), BadInput, "divide rows by their sums"),
    "ragged": (lambda: bg.Predictive.from_probs([[0.5, 0.5], [1.0]]), BadType, "rows of one length"),
    "clipping": (lambda: fitted(Y, gradient_clip="a"), BadType, "gradient_clip must be a number"),
    "scheduler by name": (lambda: fitted(Y, scheduler="cosine"), BadType, "scheduler must be a function"),
    "scheduler of nothing": (lambda: fitted(Y, scheduler=lambda _: None), BadType, "scheduler must be a function"),
    "empty validation": (lambda: fitted(Y, validation=(X[:0], Y[:0])), BadInput, "validation has no rows"),
    "checkpoint nowhere": (lambda: fitted(Y, checkpoint="/none/here"), FileNotFoundError, "no folder /none"),
    "checkpoint is a folder": (lambda: fitted(Y, checkpoint=Path(__file__).parent), IsADirectoryError, "is a folder"),
    "metrics as text": (lambda: evaluated(metrics="nll"), BadType, r"write \['nll'\]"),
    "groups without a label": (lambda: evaluated(groups=["a"] * 29 + [None]), BadInput, "no label in row 29"),
    "level as text": (lambda: evaluated(confidence_level="0.9"), BadType, "confidence_level must be a number"),
    "one shift": (
        lambda: bg.evaluate(predictor(), (X, Y), shifts=bg.shift.Corruption("fog", 1)),  # type: ignore[arg-type]
        BadType,
        "put one shift into a list",
    ),
    "a list to compare": (lambda: bg.compare([predictor(), predictor()], (X, Y)), BadType, "must be a mapping"),  # type: ignore[arg-type]
    "nothing to combine": (lambda: combined_table({}), BadInput, "of one at least"),
    "one evaluation": (lambda: report.to_html(evaluated(), "page.html"), BadType, r"evaluation\.to_html"),
    "page nowhere": (lambda: evaluated().to_html("/none/page.html"), FileNotFoundError, "no folder /none"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for cases in (LABELS, DATA, SETTINGS) for name, case in cases.items()]
)
def test_a_mistake_is_named(case: Case) -> None:
    call, error, message = case
    with pytest.raises(error, match=message):
        call()


def test_an_error_of_a_factory_itself_is_not_explained_away() -> None:
    def factory(seed: int) -> nn.Module:
        raise TypeError(f"mine, {seed}")

    with pytest.raises(TypeError, match=r"^mine"):
        bg.DeepEnsemble(factory)


def test_an_error_of_a_network_itself_stays_as_it_is() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(f"wrong type of day, {len(x)}")

    with pytest.raises(RuntimeError, match=r"^wrong type of day"):
        bg.Deterministic(Fails())(X)


def test_damaged_and_foreign_members_are_named(tmp_path: Path) -> None:
    path = tmp_path / "member.safetensors"
    save_file(network().state_dict(), path)
    with pytest.raises(BadFile, match=r"member\.safetensors' belongs to another network"):
        bg.DeepEnsemble.from_checkpoints([path], network(5))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadFile, match=r"member\.safetensors' is damaged"):
        bg.DeepEnsemble.from_checkpoints([path], network())


def test_lists_of_inputs_stay_batches() -> None:
    assert len(predictor().predict([X, X, X])) == 90
    for two in ([X, X], [X.numpy(), X.numpy()]):
        with pytest.raises(BadInput, match="may be two batches of inputs or inputs with their targets"):
            predictor().predict(two)
    assert len(predictor().predict([X, X[:, 0]])) == len(predictor().predict((X, X))) == 30


def test_a_scheduler_is_stepped() -> None:
    history = predictor().fit((X, Y), epochs=2, scheduler=lambda optimizer: StepLR(optimizer, 1, gamma=0.5))
    assert history.epochs[1].learning_rate == history.epochs[0].learning_rate / 2


def test_one_example_has_no_interval() -> None:
    pred = bg.Predictive.from_probs([[0.9, 0.1]])
    result = bg.evaluate(pred, [0], num_resamples=50).result("nll")
    assert np.isfinite(result.value)
    assert np.isnan([result.lower, result.upper]).all()
    two = bg.Predictive.from_probs([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    evaluation = bg.evaluate(two, [0, 0, 1], groups=["a", "b", "b"], num_resamples=50)
    assert np.isnan(evaluation.result("nll", group="a").lower)
    assert np.isnan([result.upper for result in evaluation.simultaneous if result.group == "a"]).all()
    assert "nan" not in evaluation.table()
    assert "NaN" not in evaluation.to_json()
    assert evaluation.result("nll", group="b").lower < evaluation.result("nll", group="b").upper


def test_a_calibrated_state_says_what_it_needs_and_comes_back() -> None:
    calibrated = predictor().calibrate((X, Y))
    state = calibrated.state_dict()
    fresh = predictor()
    with pytest.raises(RuntimeError, match="1 calibrators and this predictor 0: before loading, append"):
        fresh.load_state_dict(state)
    fresh.calibrators.append(calibration.TemperatureScaling())
    fresh.load_state_dict(state)
    assert torch.equal(fresh(X).probs, calibrated(X).probs)


@pytest.mark.parametrize("option", ["--html", "--json"])
@pytest.mark.parametrize(("path", "message"), [("none/here", "no folder none"), (".", "is a folder")])
def test_files_that_cannot_be_written_are_named_before_the_work(
    option: str,
    path: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("file.npz", probs=np.full((9, 3), 1 / 3), targets=np.arange(9) % 3)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "file.npz", option, path])
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert message in err
    assert not out


def test_boolean_targets_of_many_classes_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.npz"
    np.savez(path, probs=np.full((9, 3), 1 / 3), targets=np.arange(9) > 4)
    with pytest.raises(SystemExit):
        main(["evaluate", str(path)])
    assert "True and False, but 3 classes" in capsys.readouterr().err
    np.savez(path, probs=np.full((9, 2), 1 / 2), targets=np.arange(9) > 4)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(path), "--num-resamples", "0"])
    assert end.value.code == 0


def test_no_epochs_are_not_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["benchmark", "shift", "--epochs", "0"])
    assert end.value.code == 2
    assert "--epochs" in capsys.readouterr().err
