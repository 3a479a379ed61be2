"""The loop is the loop that one would write by hand, and repeats itself."""

import ctypes
import functools
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from bayesguard.data import Batch
from bayesguard.errors import BadInput, BadType
from bayesguard.history import History
from bayesguard.training import fit
from bayesguard.training_setup import make_optimizer

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


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_loop_is_the_one_written_by_hand(clip: float | None) -> None:
    ours = nn.Linear(3, 1)
    theirs = deepcopy(ours)
    batches = [(INPUTS[:8], TARGETS[:8]), (INPUTS[8:16], TARGETS[8:16]), (INPUTS[16:], TARGETS[16:])]
    history = _fit(ours, batches, optimizer=SGD, scheduler=lambda o: StepLR(o, 1, 0.5), gradient_clip=clip)
    optimizer = SGD(theirs.parameters())
    losses = []
    for epoch in range(3):
        total = 0.0
        for inputs, targets in batches:
            loss = (theirs(inputs) - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(theirs.parameters(), clip)
            optimizer.step()
            total += len(inputs) * float(loss.detach())
        losses.append(total / 20)
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 ** (epoch + 1)
    assert _equal(ours, theirs)
    assert [epoch.train_loss for epoch in history.epochs] == losses
    assert [epoch.learning_rate for epoch in history.epochs] == [0.05, 0.025, 0.0125]


def test_the_default_is_adam() -> None:
    ours, theirs = nn.Linear(3, 1), nn.Linear(3, 1)
    theirs.load_state_dict(ours.state_dict())
    _fit(ours)
    _fit(theirs, optimizer=functools.partial(torch.optim.Adam, lr=1e-3, fused=True))
    assert _equal(ours, theirs)


def test_an_optimizer_with_closures_solves_least_squares() -> None:
    module = nn.Linear(3, 1, dtype=torch.float64)
    inputs, targets = INPUTS.double(), TARGETS.double()
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    newton = functools.partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0)
    _fit(module, [(inputs, targets)], optimizer=newton, epochs=3)
    design = torch.cat([inputs, torch.ones(20, 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, targets).solution.flatten()
    found = torch.cat([module.weight.flatten(), module.bias])
    assert torch.allclose(found, solution, atol=1e-8)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    first, second, third = _network(), _network(), _network()
    histories = _fit(first), _fit(second), _fit(third, seed=2)
    assert _equal(first, second)
    assert histories[0] == histories[1]
    assert not _equal(first, third)


def test_a7_the_callers_random_streams_rest() -> None:
    states = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002
    loader = DataLoader(TensorDataset(*DATA), batch_size=8, shuffle=True)
    _fit(_network(), loader, validation=loader)
    with pytest.raises(BadInput):
        _fit(_network(), (INPUTS * math.nan, TARGETS))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert repr(np.random.get_state()) == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]


@pytest.mark.parametrize("fails", [False, True])
def test_a3_modes_come_back_module_by_module(fails: bool) -> None:
    module = _network().eval()
    module[3].train()
    modes: list[list[bool]] = []

    def loss(batch: Batch, num_data: int) -> Tensor:
        modes.append([part.training for part in module.modules()])
        if fails:
            raise KeyboardInterrupt
        return _squares(module)(batch, num_data)

    def validation_loss(data: Any) -> float:
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
        return 0.0

    try:
        fit(module, loss, DATA, epochs=2, validation=DATA, validation_loss=validation_loss)
    except KeyboardInterrupt:
        assert fails
    assert all(all(flags) for flags in modes)
    assert [part.training for part in module] == [False, False, False, True, False]
    assert not module.training
    assert all(parameter.grad is None for parameter in module.parameters())


def test_validation_does_not_change_the_training() -> None:
    alone, watched = _network(), _network()
    _fit(alone)

    def noisy(data: Any) -> float:
        return float(torch.rand(()))

    _fit(watched, validation=DATA, validation_loss=noisy)
    assert _equal(alone, watched)


def test_early_stopping_goes_back_to_the_best_weights() -> None:
    scores = [3.0, 2.0, 2.5, 2.0, 1.0]
    module = nn.Linear(3, 1)
    seen: list[dict[str, Tensor]] = []

    def validation_loss(data: Any) -> float:
        seen.append(deepcopy(module.state_dict()))
        return scores[len(seen) - 1]

    history = fit(
        module, _squares(module), DATA, epochs=5, validation=DATA, validation_loss=validation_loss, patience=2
    )
    assert len(history) == 4
    assert history.stopped_early
    assert history.best_epoch == 2
    assert all(torch.equal(module.state_dict()[name], seen[1][name]) for name in seen[1])
    assert not torch.equal(seen[3]["weight"], seen[1]["weight"])


def test_without_patience_the_last_weights_stay() -> None:
    ours, theirs = _network(), _network()
    worse = iter([1.0, 2.0, 3.0])
    history = _fit(ours, validation=DATA, validation_loss=lambda data: next(worse))
    _fit(theirs)
    assert _equal(ours, theirs)
    assert (history.best_epoch, history.stopped_early) == (1, False)


def test_validation_without_a_loss_of_its_own_is_the_mean_of_the_objective() -> None:
    module = _network()
    history = _fit(module, validation=DATA)
    expected = (module.eval()(INPUTS) - TARGETS).square().mean().item()
    assert history.epochs[-1].validation_nll == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_is_not_finite_names_its_place_and_leaves_the_parameters() -> None:
    inputs = INPUTS.clone()
    inputs[9] = math.nan
    ours, theirs = nn.Linear(3, 1), nn.Linear(3, 1)
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises(BadInput, match=r"the loss is nan in epoch 1, batch 1;.*lower learning rate"):
        _fit(ours, [(inputs[:8], TARGETS[:8]), (inputs[8:], TARGETS[8:])])
    _fit(theirs, [(inputs[:8], TARGETS[:8])], epochs=1)
    assert _equal(ours, theirs)


def test_a_gradient_that_is_not_finite_is_caught_though_the_loss_is_finite() -> None:
    module = nn.Linear(3, 1)
    before = deepcopy(module)

    def loss(batch: Batch, num_data: int) -> Tensor:
        return (module.weight * 0).abs().sum().sqrt()

    with pytest.raises(BadInput, match="norm of the gradient is nan in epoch 1, batch 0"):
        fit(module, loss, DATA, epochs=1)
    assert _equal(module, before)


class _Dry:
    """Looks re-iterable and is not."""

    def __init__(self) -> None:
        self.rows = iter([(INPUTS, TARGETS)])

    def __iter__(self) -> Iterator[Any]:
        return self.rows


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (iter([DATA]), {}, "data is an iterator: it would run dry"),
        (DATA, {"validation": iter([DATA])}, "validation is an iterator"),
        (_Dry(), {}, "yields no batches"),
        ([], {}, "yields no batches"),
        ((INPUTS[:0], TARGETS[:0]), {}, "no rows to train on"),
        (DataLoader(TensorDataset(*DATA), batch_size=32, drop_last=True), {}, "drop_last"),
        ([{"x": INPUTS, "y": TARGETS}], {"input_key": "x"}, "no targets"),
        (DATA, {"epochs": 0}, "epochs"),
        (DATA, {"patience": 1}, "patience needs validation"),
        (DATA, {"gradient_clip": 0.0}, "gradient_clip"),
        (DATA, {"precision": "float32"}, "precision must be"),
        (DATA, {"precision": "float16"}, "needs CUDA"),
        (DATA, {"validation": DATA, "validation_loss": lambda data: math.nan}, "validation NLL is NaN after epoch 1"),
        (DATA, {"optimizer": torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=0.1)}, "works on a copy"),
        (DATA, {"optimizer": functools.partial(torch.optim.SGD, lr=0.0)}, "learning rate of SGD is 0"),
    ],
)
def test_unusable_settings_are_named(data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        _fit(_network(), data, **settings)


def test_optimizers_of_the_wrong_kind_are_named() -> None:
    module = _network()
    for wrong in ("adam", lambda parameters: None):
        with pytest.raises(BadType, match=r"functools\.partial"):
            _fit(module, optimizer=wrong)
    with pytest.raises(BadInput, match="nothing to train"):
        _fit(module.requires_grad_(False))


def test_a_ready_optimizer_of_this_module_is_used() -> None:
    ours, theirs = _network(), _network()
    _fit(ours, optimizer=SGD(ours.parameters()))
    _fit(theirs, optimizer=SGD)
    assert _equal(ours, theirs)


def test_an_iterator_serves_one_epoch() -> None:
    ours, theirs = _network(), _network()
    _fit(ours, iter([DATA]), epochs=1)
    _fit(theirs, [DATA], epochs=1)
    assert _equal(ours, theirs)


def _rows_seen(data: Any, **settings: Any) -> list[tuple[int, int]]:
    """The rows of the whole data and of each batch, as an objective is told."""
    module, seen = nn.Linear(3, 1), []

    def loss(batch: Batch, num_data: int) -> Tensor:
        seen.append((num_data, batch.num_rows))
        return _squares(module)(batch, num_data)

    fit(module, loss, data, epochs=1, **settings)
    return seen


def test_the_objective_gets_the_rows_of_the_whole_data() -> None:
    assert _rows_seen(DataLoader(TensorDataset(*DATA), batch_size=8, drop_last=True)) == [(16, 8), (16, 8)]


def test_rows_are_those_of_the_targets_whatever_stands_beside_them() -> None:
    graph = {"edges": torch.zeros(2, 7), "x": INPUTS[:10], "y": TARGETS[:10]}
    assert _rows_seen([graph, graph], input_key="x", target_key="y") == [(20, 10), (20, 10)]


def test_sparse_gradients_are_not_left_unclipped() -> None:
    module = nn.Sequential(nn.EmbeddingBag(5, 3, sparse=True), nn.Linear(3, 1))
    before = deepcopy(module.state_dict())
    data = (torch.arange(20).reshape(20, 1) % 5, TARGETS)
    with pytest.raises(BadInput, match="gradient_clip needs dense gradients"):
        _fit(module, data, gradient_clip=0.1, optimizer=SGD)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    _fit(module, data, optimizer=SGD)


def test_frozen_parameters_stay_and_numpy_follows_the_module() -> None:
    module = _network()
    module[0].requires_grad_(False)
    before = deepcopy(module.state_dict())
    _fit(module, (INPUTS.double().numpy(), TARGETS))
    after = module.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["4.weight"], before["4.weight"])


def test_bfloat16_runs_the_forward_pass_in_it_and_keeps_float32_parameters() -> None:
    module = nn.Linear(3, 1)
    dtypes = set()

    def loss(batch: Batch, num_data: int) -> Tensor:
        outputs = module(*batch.inputs)
        dtypes.add(outputs.dtype)
        return (outputs.float() - batch.targets).square().mean()

    history = fit(module, loss, DATA, epochs=30, optimizer=SGD, precision="bfloat16")
    losses = [epoch.train_loss for epoch in history.epochs]
    assert dtypes == {torch.bfloat16}
    assert module.weight.dtype == torch.float32
    assert losses[-1] < 0.1 * losses[0]


def test_progress_is_shown_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    _fit(_network())
    assert capsys.readouterr().err == ""
    _fit(_network(), progress=True)
    assert "60/60" in capsys.readouterr().err


class _Images(nn.Module):
    """Convolutions with batch statistics; `how` says in which way the features become rows."""

    calls: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.head, self.how, self.orders = nn.Linear(64, 1), how, set[bool]()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls = self.calls + 1
        if self.how == "dropout":
            images = nn.functional.dropout(images, 0.5, self.training)
        self.orders.add(images.is_contiguous(memory_format=torch.channels_last))
        hidden = self.second(self.norm(self.first(images)).relu())
        return self.head(hidden.view(len(hidden), -1) if self.how == "view" else hidden.flatten(1))


_IMAGES = torch.randn(12, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
_PICTURES = (_IMAGES, _IMAGES.mean((1, 2, 3)).unsqueeze(1))


def _images(how: str) -> _Images:
    with torch.random.fork_rng():
        torch.set_rng_state(torch.Generator().manual_seed(1).get_state())
        return _Images(how).double()


def test_images_train_with_their_channels_last_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = _images("flatten"), _images("flatten")
    _fit(fast, _PICTURES)
    assert True in fast.orders
    monkeypatch.setattr("bayesguard.training.has_convolutions", lambda module: False)
    _fit(slow, _PICTURES)
    assert slow.orders == {False}
    for name, value in fast.state_dict().items():
        assert torch.allclose(value, slow.state_dict()[name], rtol=0, atol=1e-10), name
        assert value.is_contiguous()


@pytest.mark.parametrize("how", ["view", "dropout"])
def test_images_keep_their_order_where_it_matters(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A `view` refuses another order, and dropout would draw other masks: training is bit for bit the plain one."""
    fast, slow = _images(how), _images(how)
    _fit(fast, _PICTURES)
    monkeypatch.setattr("bayesguard.training.has_convolutions", lambda module: False)
    _fit(slow, _PICTURES)
    assert _equal(fast, slow)


def test_one_kernel_updates_only_what_lies_in_one_order() -> None:
    """Fused Adam walks memory: parameters in another order than their state would be updated with a neighbour's."""
    ordered = nn.Conv2d(2, 4, 3)
    other = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    half = nn.Linear(2, 2).bfloat16()
    fused = [make_optimizer(None, list(part.parameters())).defaults["fused"] for part in (ordered, other, half)]
    assert fused == [True, None, None]


_KEPT = """
import ctypes, torch
from bayesguard.predictive.numerics import keep_freed_memory

class Information(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

ask = ctypes.CDLL(None).mallinfo2
ask.restype = Information

def mapped():
    before = ask().hblkhd
    block = torch.empty(20 << 20, dtype=torch.uint8)
    return ask().hblkhd - before

first = mapped()
keep_freed_memory()
print(first, mapped(), ask().fordblks)
"""


_TELLS = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")


@pytest.mark.skipif(not _TELLS, reason="only glibc 2.33 and later says what it keeps")
def test_memory_that_a_step_frees_is_kept_for_the_next() -> None:
    # The thresholds are those of a process: one of its own, without settings of the environment. The C library is
    # asked, not the kernel: some sandboxes count no page faults.
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    done = subprocess.run([sys.executable, "-c", _KEPT], env=plain, capture_output=True, text=True, check=True)
    first, then, kept = map(int, done.stdout.split())
    block = 20 * 2**20
    assert then == 0 < block <= first  # A mapping of its own, given back when freed; then a piece of the heap.
    assert kept >= block
