"""A training that was interrupted goes on from its file as if it had never been stopped."""

import functools
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.utils.data import DataLoader, TensorDataset

from bayesguard.checkpoint import load_tree
from bayesguard.data import Batch
from bayesguard.errors import BadFile, BadInput
from bayesguard.history import History
from bayesguard.training import fit

_SOURCE = torch.Generator().manual_seed(0)
INPUTS = torch.randn(20, 3, generator=_SOURCE)
TARGETS = INPUTS @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1 * torch.randn(20, 1, generator=_SOURCE)
DATA = (INPUTS, TARGETS)


def _network(seed: int = 0) -> nn.Sequential:
    """A small network with all that has state: dropout, batch statistics, several layers."""
    with torch.random.fork_rng():
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))


def _squares(module: nn.Module) -> Callable[[Batch, int], Tensor]:
    def loss(batch: Batch, num_data: int) -> Tensor:
        value: Tensor = (module(*batch.inputs) - batch.targets).square().mean()
        return value

    return loss


def _fit(module: nn.Module, data: Any = DATA, **settings: Any) -> History:
    return fit(module, _squares(module), data, **{"epochs": 3, "batch_size": 8, "seed": 1, **settings})


def _equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class _Interrupted(Exception):
    pass


def _interrupt_in_epoch(number: int, validation_loss: Callable[[Any], float]) -> Callable[[Any], float]:
    calls = iter(range(1, 1000))

    def interrupting(data: Any) -> float:
        if next(calls) == number:
            raise _Interrupted
        return validation_loss(data)

    return interrupting


def _loader(own_generator: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5) if own_generator else None
    return DataLoader(TensorDataset(*DATA), batch_size=6, shuffle=True, generator=generator)


SCHEDULERS: list[Callable[[Any], LRScheduler]] = [
    lambda o: OneCycleLR(o, max_lr=0.05, total_steps=8),
    lambda o: MultiStepLR(o, [2, 5], 0.3),
    lambda o: ReduceLROnPlateau(o, patience=0),
    lambda o: LambdaLR(o, lambda epoch: 0.9**epoch),
]


@pytest.mark.parametrize("own_generator", [False, True], ids=["default generator", "own generator"])
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=["one cycle", "multi step", "plateau", "lambda"])
def test_g10_resumed_is_never_stopped_bit_for_bit(
    tmp_path: Path, scheduler: Callable[[Any], LRScheduler], own_generator: bool
) -> None:
    def run(module: nn.Module, epochs: int, path: Path | None, stop_in: int = 0) -> History:
        def validation_loss(data: Any) -> float:
            return float((module(INPUTS) - TARGETS).square().mean())

        settings: dict[str, Any] = {"scheduler": scheduler, "patience": 2, "gradient_clip": 1.0, "seed": 3}
        watch = _interrupt_in_epoch(stop_in, validation_loss) if stop_in else validation_loss
        return fit(
            module,
            _squares(module),
            _loader(own_generator),
            epochs=epochs,
            validation=DATA,
            validation_loss=watch,
            optimizer=functools.partial(torch.optim.Adam, lr=0.05),
            checkpoint=path,
            **settings,
        )

    whole, resumed = _network(), _network(7)
    expected = run(whole, 6, None)
    path = tmp_path / "checkpoint"
    # Killed while the fourth epoch is under way, in a process whose network is then lost; then a longer plan.
    with pytest.raises(_Interrupted):
        run(_network(), 6, path, stop_in=4)
    assert len(load_tree(path, kind="training checkpoint")["epochs"]) == 3
    # What the caller has drawn in between must not matter.
    with torch.random.fork_rng():
        torch.rand(3)
        assert run(resumed, 5, path) == History(expected.epochs[:5], len(expected) < 5)
        history = run(resumed, 6, path)
    assert history == expected
    assert _equal(whole, resumed)
    # A finished checkpoint is only loaded.
    loaded = _network(8)
    assert run(loaded, 6, path) == expected
    assert _equal(loaded, whole)


def test_resuming_without_the_optimizer_state_would_be_seen(tmp_path: Path) -> None:
    whole, broken = _network(), _network()
    _fit(whole, epochs=4)
    for _ in range(2):
        _fit(broken, epochs=2)
    assert not _equal(whole, broken)


def test_an_early_stopped_checkpoint_stays_stopped(tmp_path: Path) -> None:
    def run(module: nn.Module) -> History:
        scores = iter([1.0, 2.0, 3.0, 0.0])
        return _fit(
            module,
            epochs=9,
            validation=DATA,
            validation_loss=lambda data: next(scores),
            patience=2,
            checkpoint=tmp_path / "c",
        )

    first, second = _network(), _network(4)
    assert run(first) == run(second)
    assert _equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 9}, "seed=1, this training has 9"),
        ({"optimizer": SGD}, "optimizer='Adam', this training has 'SGD'"),
        ({"scheduler": lambda o: StepLR(o, 1)}, "scheduler=None"),
        ({"optimizer": functools.partial(torch.optim.Adam, lr=0.1)}, "lr of parameter group 0=0.001"),
        ({"optimizer": functools.partial(torch.optim.Adam, betas=(0.5, 0.9))}, "betas of parameter group 0"),
        ({"precision": "bfloat16"}, "precision=None"),
        ({"validation": DATA, "patience": 1}, "early stopping=False"),
        ({"data": (INPUTS[:-1], TARGETS[:-1])}, "examples=20, this training has 19"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _fit(_network(), checkpoint=tmp_path / "c")
    module = _network(4)
    with pytest.raises(BadInput, match=message):
        _fit(module, checkpoint=tmp_path / "c", epochs=9, **change)
    assert _equal(module, _network(4))


def test_a_schedule_of_another_length_is_refused(tmp_path: Path) -> None:
    def schedule(length: int) -> Callable[[Any], LRScheduler]:
        return lambda optimizer: CosineAnnealingLR(optimizer, T_max=length)

    _fit(_network(), checkpoint=tmp_path / "c", optimizer=SGD, scheduler=schedule(3))
    with pytest.raises(BadInput, match="T_max of the scheduler=3, this training has 6"):
        _fit(_network(), checkpoint=tmp_path / "c", epochs=6, optimizer=SGD, scheduler=schedule(6))
    fast = functools.partial(SGD, lr=0.1)
    with pytest.raises(BadInput, match=r"lr of parameter group 0=0\.05"):
        _fit(_network(), checkpoint=tmp_path / "c", epochs=6, optimizer=fast, scheduler=schedule(3))


def test_one_optimizer_object_goes_on_after_its_scheduler_changed_it(tmp_path: Path) -> None:
    module = _network()
    optimizer = SGD(module.parameters())
    settings = {"checkpoint": tmp_path / "c", "optimizer": optimizer, "scheduler": lambda o: StepLR(o, 1, 0.5)}
    _fit(module, **settings)
    assert len(_fit(module, epochs=5, **settings)) == 5


def test_the_same_settings_in_another_form_are_the_same(tmp_path: Path) -> None:
    rates: list[Any] = [np.float64(0.05), 0.05, torch.tensor(0.05, dtype=torch.float64)]
    for number, rate in enumerate(rates, start=1):
        optimizer = functools.partial(torch.optim.SGD, lr=rate, foreach=number == 2)
        assert len(_fit(_network(), epochs=number, checkpoint=tmp_path / "c", optimizer=optimizer)) == number


@pytest.mark.parametrize(
    "other", [nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 1)), _network().double()], ids=["linear", "names", "dtype"]
)
def test_a_checkpoint_of_another_module_is_refused_before_it_changes_any(tmp_path: Path, other: nn.Module) -> None:
    _fit(_network(), checkpoint=tmp_path / "c")
    before = deepcopy(other)
    with pytest.raises(BadFile, match="belongs to another module"):
        _fit(other, checkpoint=tmp_path / "c")
    assert _equal(other, before)


def test_g2_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    _fit(_network(), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadFile, match=str(path)):
        _fit(_network(), checkpoint=path)


def test_g12_a_checkpoint_holds_no_data(tmp_path: Path) -> None:
    sizes = []
    for copies in (1, 50):
        path = tmp_path / f"{copies}"
        inputs = torch.full((20 * copies, 3), 0.123456)
        _fit(_network(), (inputs, torch.zeros(20 * copies, 1)), checkpoint=path, epochs=1)
        assert inputs[0].numpy().tobytes() not in path.read_bytes()
        sizes.append(path.stat().st_size)
    # Only the digits of the losses and of the clock may differ.
    assert abs(sizes[0] - sizes[1]) < 200


def test_a_missing_folder_shows_before_the_first_epoch(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fit(_network(), lambda batch, n: pytest.fail("trained"), DATA, epochs=1, checkpoint=tmp_path / "no" / "c")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_g10_resumed_is_never_stopped_on_cuda_with_loss_scaling(tmp_path: Path) -> None:
    whole, resumed = _network().cuda(), _network(7).cuda()
    before = torch.cuda.get_rng_state()
    expected = _fit(whole, epochs=4, precision="float16")
    _fit(_network().cuda(), epochs=2, precision="float16", checkpoint=tmp_path / "c")
    assert _fit(resumed, epochs=4, precision="float16", checkpoint=tmp_path / "c") == expected
    assert _equal(whole, resumed)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_the_memory_format_of_images_is_resumed_too(tmp_path: Path) -> None:
    images = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    data = (images, images.mean((1, 2, 3)).unsqueeze(1))
    start = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1))
    whole, part, resumed = (deepcopy(start) for _ in range(3))
    expected = _fit(whole, data, epochs=4)
    _fit(part, data, epochs=2, checkpoint=tmp_path / "file")
    assert load_tree(tmp_path / "file", kind="training checkpoint")["channels last"] is True
    assert _fit(resumed, data, epochs=4, checkpoint=tmp_path / "file") == expected
    assert _equal(whole, resumed)
