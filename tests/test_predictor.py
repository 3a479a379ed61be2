"""What every predictor inherits: streaming, calibration, seeds, and what it leaves alone."""

import copy
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import bayesguard as bg
from bayesguard.errors import BadInput, BadType
from tests.networks import mlp

X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 3


def predictor(**options: Any) -> bg.MCDropout:
    torch.manual_seed(0)
    return bg.MCDropout(mlp(nn.Dropout(0.5)), num_samples=8, **options)


def test_a_loader_leaves_the_callers_random_state_alone() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=16)
    own = predictor()
    before = torch.get_rng_state()
    own.predict(loader)
    own.calibrate(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_data_that_draw_random_numbers_draw_new_ones_for_each_batch() -> None:
    class Noisy(Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Any:
            return torch.randn(8), index % 3

    own, loader = bg.Deterministic(mlp()), DataLoader(Noisy(), batch_size=2)
    before = torch.get_rng_state()
    probs = own.predict(loader).probs
    assert torch.equal(before, torch.get_rng_state())
    assert torch.allclose(probs, torch.cat([own(x).probs for x, _ in loader]), atol=1e-6)
    assert torch.pdist(probs).min() > 0


class _Queue(IterableDataset[Any]):
    """Rows that are gone once they were read."""

    def __init__(self) -> None:
        self.rows = iter(zip(X, Y, strict=True))

    def __iter__(self) -> Any:
        return self.rows


@pytest.mark.parametrize("what", ["predict", "calibrate"])
def test_draws_are_kept_in_one_pass(what: str) -> None:
    own = predictor()
    halves = [list(range(25)), list(range(25, 50))]
    for loader in (DataLoader(_Queue(), batch_size=10), DataLoader(TensorDataset(X, Y), batch_sampler=halves)):
        before = torch.get_rng_state()
        if what == "predict":
            assert len(own.predict(loader, keep_draws=True)) == 50
        else:
            assert own.calibrate(loader).calibrators[0].diagnostics["num_examples"] == 50  # type: ignore[index]
        assert torch.equal(before, torch.get_rng_state())


def test_d6_targets_of_a_shuffled_loader_stay_with_their_rows() -> None:
    x = torch.eye(3).repeat(20, 1)
    y = torch.arange(3).repeat(20)
    network = nn.Linear(3, 3, bias=False)
    network.weight.data = 9 * torch.eye(3)
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    pred, targets = bg.Deterministic(network).predict_with_targets(loader)
    assert torch.equal(pred.labels, targets)


def test_numpy_inputs_are_cast_like_the_parameters() -> None:
    own = predictor()
    assert torch.allclose(own(X.double().numpy()).probs, own(X).probs)
    assert torch.allclose(own.predict(X.double().numpy()).probs, own(X).probs, atol=1e-6)


def test_draws_made_in_inference_mode_can_be_fitted_on() -> None:
    with torch.inference_mode():
        inputs = X + 0
        pred = bg.MCDropout(nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3)))(inputs)
    scale = torch.ones((), requires_grad=True)
    (pred.draw_logits * scale).sum().backward()
    assert scale.grad is not None


def test_per_example_masks_are_apart_between_batches() -> None:
    own = predictor(masks="per_example")
    same = X[:1].expand(6, -1)
    pred = own.predict((same, Y[:6]), batch_size=2, keep_draws=True)
    assert torch.pdist(pred.draw_logits.movedim(1, 0).flatten(1)).min() > 1e-3


def test_calibrating_again_replaces_and_an_error_keeps_what_was() -> None:
    own = predictor()
    own.calibrate((X, Y))
    first = own.calibrators[0].temperature.clone()  # type: ignore[operator]
    own.calibrate((X, Y))
    assert len(own.calibrators) == 1
    assert torch.equal(own.calibrators[0].temperature, first)  # type: ignore[arg-type]
    with pytest.raises(BadInput):
        own.calibrate((X, Y + 5))
    assert torch.equal(own.calibrators[0].temperature, first)  # type: ignore[arg-type]
    with pytest.raises(BadType, match=r"calibrators must be bayesguard.calibration objects"):
        own.calibrate((X, Y), "temperature")  # type: ignore[arg-type]


def test_a_calibrator_that_is_fitted_for_another_leaves_the_first_predictor_alone() -> None:
    calibrator = bg.calibration.TemperatureScaling()
    first, second = predictor().calibrate((X, Y), calibrator), predictor()
    before, temperature = first(X).probs, calibrator.temperature.clone()
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.mul_(3)
    second.calibrate((X, Y), calibrator)
    assert not torch.equal(calibrator.temperature, temperature)
    assert second.calibrators[0] is calibrator
    assert torch.equal(first(X).probs, before)
    with pytest.raises(BadInput):
        second.calibrate((X, Y), calibrator, bg.calibration.Conformal(), bg.calibration.TemperatureScaling())
    assert torch.equal(first(X).probs, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))], ids=["copy", "pickle"])
def test_the_calibrator_of_a_copy_is_its_own_as_well(copied: Any) -> None:
    original = predictor().calibrate((X, Y))
    own = copied(original)
    before = own(X).probs
    predictor().calibrate((X[:20], Y[:20].flip(0)), own.calibrators[0])
    assert torch.equal(own(X).probs, before)
    assert torch.equal(original(X).probs, before)


def test_one_calibrator_in_two_places_is_refused() -> None:
    """Its second fit would undo the first."""
    calibrator = bg.calibration.TemperatureScaling()
    own = predictor()
    with pytest.raises(BadInput, match="one calibrator object is there twice"):
        own.calibrate((X, Y), calibrator, calibrator)
    assert len(own.calibrators) == 0


def test_an_error_after_the_first_of_two_calibrators_keeps_what_was() -> None:
    class Fails(bg.calibration.TemperatureScaling):
        def _fit(self, pred: Any, targets: Any, counts: Any = None) -> None:
            raise BadInput("no")

    own, calibrator = predictor(), bg.calibration.TemperatureScaling()
    before = own.calibrate((X, Y), calibrator)(X).probs
    with pytest.raises(BadInput, match="no"):
        own.calibrate((X[:40], Y[:40]), calibrator, Fails())
    assert torch.equal(own(X).probs, before)


def test_calibration_is_forgotten_when_the_weights_change() -> None:
    own = predictor()
    own.calibrate((X, Y)).fit((X, Y), epochs=1)
    assert len(own.calibrators) == 0
    ensemble = bg.DeepEnsemble([predictor(), bg.Deterministic(mlp())])
    ensemble.members[0].calibrate((X, Y))
    ensemble.calibrate((X, Y)).fit((X, Y), epochs=1)
    assert len(ensemble.calibrators) == len(ensemble.members[0].calibrators) == 0


@pytest.mark.parametrize("make", [predictor, lambda: bg.DeepEnsemble([predictor(), bg.Deterministic(mlp())])])
def test_calibration_survives_a_fit_that_changed_nothing(make: Any) -> None:
    own = make().calibrate((X, Y))
    with pytest.raises(BadInput, match="labels must be in"):
        own.fit((X, Y + 5), epochs=1)
    assert len(own.calibrators) == 1


def test_calibration_does_not_survive_a_fit_that_failed_after_a_step() -> None:
    own = predictor().calibrate((X, Y))
    before = own.network.state_dict()["0.weight"].clone()
    with pytest.raises(BadInput, match="labels must be in"):
        own.fit([(X, Y), (X, Y + 5)], epochs=1)
    assert not torch.equal(before, own.network.state_dict()["0.weight"])
    assert len(own.calibrators) == 0


def test_calibration_acts_on_every_draw() -> None:
    own = predictor()
    before = own(X)
    own.calibrate((X, Y))
    temperature = float(own.calibrators[0].temperature)  # type: ignore[arg-type]
    after = own(X)
    assert torch.allclose(after.draw_logits, (before.draw_logits / temperature).log_softmax(-1), atol=1e-5)


def test_a_draw_can_be_differentiated() -> None:
    x = X.clone().requires_grad_()
    predictor().draw(3)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_a_copy_and_its_original_live_apart() -> None:
    network = mlp(nn.Dropout(0.5))
    own = bg.MCDropout(network)
    want = own(X).probs
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(own(X).probs, want)
    assert torch.equal(copy.deepcopy(own)(X).probs, want)


def test_progress_bars_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    own = predictor()
    assert torch.equal(own.predict((X, Y), progress=True).probs, own.predict((X, Y)).probs)
    assert "predict" in capsys.readouterr().err


def test_data_without_targets_are_named() -> None:
    with pytest.raises(BadInput, match="data has no targets"):
        predictor().calibrate([(X,)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"masks": "per_row"}, "masks must be 'shared' or 'per_example'"),
        ({"layers": ["nothing"]}, "layers must be names of the network's modules"),
        ({"p": 1.5}, r"a drop rate must lie in 0\.\.1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        bg.MCDropout(mlp(nn.Dropout(0.5)), **settings)


def test_dropout_of_chosen_layers_only() -> None:
    """Dropout before the last layer alone: the closed-form variance is that of this layer."""
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.25), nn.Linear(8, 1)).double()
    x = X[:2].double()
    outputs = bg.MCDropout(network, layers=["2"], num_samples=4000, strategy="fold").draw_outputs(x)
    first, last = (module for module in network if isinstance(module, nn.Linear))
    hidden = first(x)
    mean, variance = last(hidden), 0.25 / 0.75 * (hidden**2) @ (last.weight**2).T
    assert ((outputs.mean(dim=0) - mean) / (variance / 4000).sqrt()).abs().max() < 5


def test_read_only_arrays_are_taken() -> None:
    x = X.numpy().copy()
    x.flags.writeable = False
    assert predictor().predict((x, np.arange(50) % 3)).probs.shape == (50, 3)


PEAK = """
import resource, sys
import torch
import bayesguard as bg

torch.set_num_threads(1)
samples, rows, classes = map(int, sys.argv[1:])
layers = torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(64, classes)
predictor = bg.MCDropout(torch.nn.Sequential(*layers), num_samples=samples, strategy="replay")
x = torch.zeros(rows, 16)
predictor.predict(x[:512])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pred = predictor.predict(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is counted in kilobytes on Linux only")
def test_memory_grows_with_the_answer_and_not_with_the_draws() -> None:
    """Beyond what a batch takes: log-probabilities and variances of all rows once, whatever the number of draws."""
    rows, classes = 3000, 600
    grown = []
    for samples in (4, 16):
        # Blocks go back to the system as they are freed, so that the peak is that of what is alive.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PEAK, str(samples), str(rows), str(classes)]
        grown.append(1024 * int(subprocess.check_output(command, text=True, env=environment)))
    answer = 2 * rows * classes * 4
    assert max(grown) < 1.25 * answer
    assert abs(grown[1] - grown[0]) < 0.1 * answer


def test_masks_of_a_block_are_never_cut_by_a_chunk() -> None:
    own = bg.MCDropout(mlp(nn.Dropout(0.5)), num_samples=50, memory_budget=1 << 12)
    block = own.draws_per_block
    sizes = [len(chunk) for chunk in own.output_chunks(X, num_samples=50, seed=0)]
    assert all(size % block == 0 for size in sizes[:-1])
    assert sum(sizes) == 50


def test_the_error_is_told_between_blocks_of_draws() -> None:
    own = bg.MCDropout(mlp(nn.Dropout(0.5)), num_samples=32)
    kept, reduced = own(X), own.predict(X)
    assert kept.groups is not None
    assert kept.groups.tolist() == [draw // 8 for draw in range(32)]
    assert reduced.groups is not None
    assert torch.equal(kept.groups, reduced.groups)
    torch.testing.assert_close(kept.standard_error, reduced.standard_error, rtol=1e-4, atol=1e-7)
    means = kept.draw_logits.softmax(-1).double().unflatten(0, (4, 8)).mean(1)
    torch.testing.assert_close(kept.standard_error.double(), means.std(0) / 2, rtol=1e-4, atol=1e-7)
    assert own(X, num_samples=15).groups is None  # less than two blocks: as if the draws were independent
    assert bg.MCDropout(mlp(nn.Dropout(0.5)), balanced=False)(X).groups is None


class Looping(nn.Module):
    """A module whose parts know it: walking over them has to end."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.body.whole = self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_training_mode_is_found_anywhere() -> None:
    own = bg.Deterministic(mlp(nn.Dropout(0.5)))
    own.network.get_submodule("2").train()
    with pytest.raises(BadInput, match=r"the network \(2\) is in training mode"):
        own(X)
    own.network.train()
    with pytest.raises(BadInput, match=r"the network \(its root\) is in training mode"):
        own(X)
    from bayesguard.predictor_checks import check_evaluating

    looping = Looping()
    for module in (looping, *looping.body):
        module.training = False
    looping.body.training = False
    check_evaluating(looping)
