"""Traps A1 to A21: ways in which MC dropout silently is none, or changes what it should not."""

import random
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesguard import Deterministic, MCDropout
from bayesguard.errors import BadInput, BadType, IdenticalDraws, RandomnessWarning, UnsupportedNetwork
from tests.networks import (
    Attention,
    DropPath,
    FunctionalDropout,
    HiddenDropout,
    Recurrent,
    Residual,
    Transformer,
    mlp,
    snapshot,
    unchanged,
)


def spread(network: nn.Module, *inputs: Tensor, **settings: Any) -> float:
    """The largest standard deviation over draws of any output."""
    return MCDropout(network, num_samples=16, **settings).draw_outputs(*inputs).std(dim=0).max().item()


CARRIERS: list[tuple[str, Callable[[], nn.Module], Callable[[], Tensor]]] = [
    ("transformer", Transformer, lambda: torch.randint(0, 11, (5, 6))),
    ("attention", Attention, lambda: torch.randn(5, 6, 8)),
    ("attention with weights", lambda: Attention(need_weights=True), lambda: torch.randn(5, 6, 8)),
    ("lstm", Recurrent, lambda: torch.randn(5, 6, 4)),
    ("gru", lambda: Recurrent(nn.GRU), lambda: torch.randn(5, 6, 4)),
    ("rnn", lambda: Recurrent(nn.RNN), lambda: torch.randn(5, 6, 4)),
    ("functional", FunctionalDropout, lambda: torch.randn(5, 8)),
]


@pytest.mark.parametrize(("network", "inputs"), [c[1:] for c in CARRIERS], ids=[c[0] for c in CARRIERS])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a1_dropout_hidden_in_a_carrier_fires(
    network: Callable[[], nn.Module], inputs: Callable[[], Tensor], mode: Callable[[], Any]
) -> None:
    torch.manual_seed(0)
    with mode():
        assert spread(network(), inputs()) > 1e-3


def test_a1_flipping_module_flags_would_miss_the_transformer() -> None:
    """The twin: what the trap describes does happen to the usual implementation."""
    network = Transformer().eval()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    tokens = torch.randint(0, 11, (5, 6))
    with torch.no_grad():
        outputs = torch.stack([network(tokens) for _ in range(8)])
    assert outputs.std(dim=0).max() == 0


@pytest.mark.parametrize(
    ("dropout", "shape"),
    [
        (nn.Dropout(0.4), (4, 6)),
        (nn.Dropout1d(0.4), (4, 6, 5)),
        (nn.Dropout2d(0.4), (4, 6, 5, 5)),
        (nn.Dropout3d(0.4), (4, 6, 3, 3, 3)),
        (nn.AlphaDropout(0.4), (4, 6)),
        (nn.FeatureAlphaDropout(0.4), (4, 6, 5)),
        (DropPath(0.4), (4, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a1b_every_kind_of_dropout_fires(dropout: nn.Module, shape: tuple[int, ...]) -> None:
    assert spread(nn.Sequential(nn.Identity(), dropout), torch.ones(shape), likelihood=None) > 0.1


@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Dropout2d])
def test_a1b_masked_values_are_torchs(kind: type[nn.Module]) -> None:
    """What kept and dropped units become is what torch makes of them in training."""
    x = torch.full((4, 3, 50, 1), 2.0)
    ours = MCDropout(nn.Sequential(kind(0.3)), num_samples=8).draw_outputs(x).unique()
    torch.manual_seed(0)
    assert torch.allclose(ours, kind(0.3)(x.expand(4, 3, 50, 1)).unique(), atol=1e-6)


def test_a2_a12_predicting_changes_no_bit_of_the_network() -> None:
    network = Residual().train()
    before = snapshot(network)
    predictor = MCDropout(network, num_samples=4)
    own = snapshot(predictor.network)
    predictor(torch.randn(6, 1, 8, 8))
    assert unchanged(before, network)
    assert unchanged(own, predictor.network)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 3:
            raise KeyboardInterrupt
        return x


def test_a3_modes_survive_an_exception() -> None:
    network = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), Fails()).eval()
    predictor = MCDropout(network, copy=False, num_samples=4)
    before = snapshot(network)
    with pytest.raises(KeyboardInterrupt):
        predictor(torch.randn(5, 8))
    assert unchanged(before, network)


def test_a4_no_dropout_is_an_error() -> None:
    with pytest.raises(IdenticalDraws, match="the network has no dropout"):
        MCDropout(mlp())(torch.randn(2, 8))


def test_a5_a_zero_rate_is_an_error_with_the_layers_name() -> None:
    network = mlp(nn.Dropout(0.0))
    with pytest.raises(IdenticalDraws, match=r"2 has p=0: give MCDropout a rate"):
        MCDropout(network)(torch.randn(2, 8))
    assert MCDropout(network, p=0.2)(torch.randn(2, 8)).uncertainty().epistemic.max() > 0


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.drop(x)
        return self.head(x)


def test_a4_dropout_that_does_not_reach_the_output_is_an_error() -> None:
    with pytest.raises(IdenticalDraws, match="do not reach the output"):
        MCDropout(Unused())(torch.randn(2, 8))


def test_a4_rare_drops_are_no_error() -> None:
    """With p = 1e-6 no unit is dropped by chance, which is right and no fault of the network."""
    MCDropout(mlp(nn.Dropout(1e-6)), num_samples=2)(torch.randn(2, 8))


@pytest.mark.parametrize("strategy", ["loop", "replay", "compact", "fold", "fold_tail", "vmap"])
def test_a6_inplace_dropout_neither_compounds_nor_overwrites(strategy: Any) -> None:
    x = torch.ones(4, 1000)
    network = nn.Sequential(nn.Dropout(0.5, inplace=True))
    outputs = MCDropout(network, num_samples=6, strategy=strategy).draw_outputs(x)
    assert torch.equal(x, torch.ones(4, 1000))
    zeros = (outputs == 0).double().mean(dim=(1, 2))
    # Shared masks: 1,000 independent units a draw; five standard errors.
    assert (zeros - 0.5).abs().max() < 5 * (0.25 / 1000) ** 0.5
    assert set(outputs.unique().tolist()) == {0.0, 2.0}


def test_a7_the_callers_random_state_is_untouched() -> None:
    network = mlp(nn.Dropout(0.5))
    torch.manual_seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    MCDropout(network)(torch.ones(2, 8), seed=11)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
    assert states[2] == random.getstate()


class NoisyDropout(nn.Module):
    """A network with random calls of its own, which only a default generator can serve."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x + torch.randn_like(x), 0.5, self.training)


def test_a7_a_networks_own_noise_is_seeded_and_leaves_the_state_alone() -> None:
    predictor = MCDropout(NoisyDropout(), num_samples=5)
    x = torch.ones(3, 4)
    torch.manual_seed(1)
    first = predictor.draw_outputs(x)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, predictor.draw_outputs(x))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    assert first.std(dim=0).min() > 0


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(nn.Dropout(0.5)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return (self.body(x), self.head(x)) if self.training else self.body(x)


def test_a8_the_eval_modes_return_type_is_kept() -> None:
    assert MCDropout(TwoHeads())(torch.randn(2, 8)).probs.shape == (2, 3)


def test_a9_scripted_and_traced_networks_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(mlp(nn.Dropout(0.5)).eval(), torch.randn(2, 8))
    with pytest.raises(UnsupportedNetwork, match="scripted or traced"):
        MCDropout(traced)
    with pytest.raises(UnsupportedNetwork, match="its layer '1' is scripted"):
        MCDropout(nn.Sequential(nn.Identity(), traced))


def test_a10_a_parallel_deterministic_predict_stays_deterministic() -> None:
    network = mlp(nn.Dropout(0.5)).eval()
    x = torch.randn(4, 8)
    stochastic = MCDropout(network, copy=False, num_samples=4)
    want = network(x)
    wrong = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.is_set():
            stochastic(x)

    thread = threading.Thread(target=sample)
    thread.start()
    for _ in range(200):
        wrong.append(not torch.equal(network(x), want))
    stop.set()
    thread.join()
    assert not any(wrong)


def test_a10_two_threads_get_the_draws_of_their_own_seeds() -> None:
    predictor = MCDropout(mlp(nn.Dropout(0.5)), num_samples=4)
    x = torch.randn(4, 8)
    want = {seed: predictor.draw_outputs(x, seed=seed) for seed in (1, 2)}
    wrong: list[int] = []

    def sample(seed: int) -> None:
        wrong.extend(seed for _ in range(50) if not torch.equal(predictor.draw_outputs(x, seed=seed), want[seed]))

    threads = [threading.Thread(target=sample, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a11_draws_can_be_fitted_on_even_when_made_in_inference_mode() -> None:
    with torch.inference_mode():
        pred = MCDropout(mlp(nn.Dropout(0.5)))(torch.randn(3, 8))
    temperature = torch.ones((), requires_grad=True)
    (pred.logits / temperature).sum().backward()
    assert temperature.grad is not None


def test_a13_a_network_random_in_eval_mode_is_named() -> None:
    class AlwaysOn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5)

    with pytest.warns(RandomnessWarning, match="random in eval mode"):
        Deterministic(AlwaysOn())(torch.ones(4, 50))


class Named(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.wrap = mlp(nn.Dropout(0.5)), wrap

    def forward(self, first: Tensor, *, second: Tensor) -> Any:
        return self.wrap(self.body(first + second))


@pytest.mark.parametrize(
    ("wrap", "select"),
    [
        (lambda y: {"logits": y, "hidden": y}, "logits"),
        (lambda y: (y, None), 0),
        (lambda y: {"a": {"b": y}}, lambda out: out["a"]["b"]),
    ],
    ids=["key", "index", "callable"],
)
def test_a14_selected_outputs_and_keyword_inputs(wrap: Any, select: Any) -> None:
    predictor = MCDropout(Named(wrap), output=select)
    pred = predictor(torch.randn(4, 8), second=torch.randn(4, 8))
    assert pred.probs.shape == (4, 3)
    assert pred.uncertainty().epistemic.max() > 0


def test_a14_an_output_that_is_no_tensor_says_what_to_pass() -> None:
    with pytest.raises(BadType, match=r"keys 'logits'.*output="):
        MCDropout(Named(lambda y: {"logits": y}))(torch.randn(2, 8), second=torch.randn(2, 8))
    with pytest.raises(BadInput, match="output='scores' does not fit"):
        MCDropout(Named(lambda y: {"logits": y}), output="scores")(torch.randn(2, 8), second=torch.randn(2, 8))


def test_a15_wrappers_are_called_through() -> None:
    network = mlp(nn.Dropout(0.5))
    x = torch.randn(4, 8)
    want = MCDropout(network, strategy="replay").draw_outputs(x)
    compiled: Any = torch.compile(network, backend="eager")
    for wrapped in (nn.DataParallel(network), compiled):
        assert torch.equal(MCDropout(wrapped, strategy="replay").draw_outputs(x), want)


def test_a15_compiled_networks_stay_deterministic_outside() -> None:
    compiled = torch.compile(mlp(nn.Dropout(0.5)).eval(), backend="eager")
    x = torch.randn(4, 8)
    before = compiled(x)
    MCDropout(compiled, copy=False)(x)  # type: ignore[arg-type]
    assert torch.equal(compiled(x), before)


def test_a16_lazy_modules_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.Sequential(nn.LazyLinear(4), nn.Dropout(0.5))
    with pytest.raises(UnsupportedNetwork, match=r"'0.weight' belongs to a lazy module.*run one batch"):
        MCDropout(lazy)


def test_a17_draws_that_would_not_fit_are_refused_with_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesguard.predictor_checks.free_memory", lambda device: 10_000)
    predictor = MCDropout(mlp(nn.Dropout(0.5)), num_samples=50)
    data = (torch.randn(300, 8), torch.zeros(300, dtype=torch.long))
    with pytest.raises(BadInput, match=r"would hold .* GiB of draws.*keep_draws=False"):
        predictor.predict(data, keep_draws=True)
    assert not predictor.predict(data).has_draws


@pytest.mark.parametrize("strategy", ["loop", "replay", "compact", "fold", "fold_tail", "vmap"])
def test_a18_one_row_no_rows_and_a_ragged_last_batch(strategy: Any) -> None:
    predictor = MCDropout(mlp(nn.Dropout(0.5)), num_samples=4, strategy=strategy)
    assert predictor(torch.randn(1, 8)).probs.shape == (1, 3)
    empty = predictor(torch.randn(0, 8))
    assert empty.probs.shape == (0, 3)
    assert empty.uncertainty().total.shape == (0,)
    data = (torch.randn(7, 8), torch.zeros(7, dtype=torch.long))
    whole = predictor(data[0]).probs
    assert torch.allclose(predictor.predict(data, batch_size=3).probs, whole, atol=1e-6)


def test_a20_members_have_masks_of_their_own() -> None:
    from bayesguard import DeepEnsemble

    network = mlp(nn.Dropout(0.5))
    twin = mlp(nn.Dropout(0.5))
    twin.load_state_dict(network.state_dict())
    with torch.no_grad():
        next(twin.parameters())[0, 0] += 1e-7
    ensemble = DeepEnsemble([MCDropout(network, num_samples=4), MCDropout(twin, num_samples=4)])
    outputs = ensemble.draw_outputs(torch.randn(3, 8))
    assert (outputs[:4] - outputs[4:]).abs().max() > 1e-2


def test_a21_fully_hidden_dropout_is_an_error_that_names_it() -> None:
    with pytest.raises(IdenticalDraws, match=r"2 ran without a call to a dropout function"):
        MCDropout(mlp(HiddenDropout()))(torch.randn(2, 8))


def test_a21_partly_hidden_dropout_is_a_warning_that_names_it() -> None:
    with pytest.warns(RandomnessWarning, match="dropout never fired in 3"):
        MCDropout(mlp(nn.Dropout(0.5), HiddenDropout()))(torch.randn(2, 8))


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a19_the_same_seed_repeats_on_every_backend(backend: str | None) -> None:
    """Compiled parts run as plain code while draws are made, so that even the backends agree."""
    torch.manual_seed(0)
    network = mlp(nn.Dropout(0.5))
    x = torch.randn(4, 8)
    want = MCDropout(network, strategy="replay").draw_outputs(x, seed=5)
    used: Any = network if backend is None else torch.compile(network, backend=backend)
    predictor = MCDropout(used, strategy="replay")
    assert torch.equal(predictor.draw_outputs(x, seed=5), want)
    assert torch.equal(predictor.draw_outputs(x, seed=5), want)
    assert not torch.equal(predictor.draw_outputs(x, seed=6), want)
