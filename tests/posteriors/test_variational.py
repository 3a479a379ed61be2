"""Variational: what is random, how draws are computed, what the objective is made of, and what is refused."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesguard as bg
from bayesguard.errors import BadInput, IdenticalDraws
from tests.networks import Residual, Transformer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()


def manual(predictor: bg.Variational, x: Tensor, draws: int, seed: int) -> Tensor:
    """The outputs by the plainest way: weights written into a copy of the network."""
    outputs = []
    weights = predictor.weight_draws(draws, seed)
    for draw in range(draws):
        copied = bg.Deterministic(predictor.network).network
        with torch.no_grad():
            for name, value in weights.items():
                copied.get_parameter(name).copy_(value[draw])
            outputs.append(copied(x))
    return torch.stack(outputs)


@pytest.mark.parametrize("guide", ["normal", "low_rank", "full", "radial", "matrix_normal"])
@pytest.mark.parametrize("subset", ["all", "last_layer", "0.weight"])
def test_draws_are_the_network_under_sampled_weights(guide: str, subset: str) -> None:
    predictor = bg.Variational(network().double(), guide=guide, subset_of_weights=subset, init_scale=0.3)
    outputs = predictor.draw_outputs(X.double(), num_samples=11, seed=3)
    assert torch.allclose(outputs, manual(predictor, X.double(), 11, 3), atol=1e-12)


@pytest.mark.parametrize(
    ("make", "x"), [(Residual, torch.randn(4, 1, 8, 8)), (Transformer, torch.randint(0, 11, (4, 5)))]
)
def test_any_network(make: Any, x: Tensor) -> None:
    predictor = bg.Variational(make(), init_scale=0.1)
    outputs = predictor.draw_outputs(x, num_samples=4)
    assert torch.allclose(outputs, manual(predictor, x, 4, 0), atol=1e-4)


def test_every_way_gives_the_loops_outputs() -> None:
    predictor = bg.Variational(network().double(), subset_of_weights="last_layer", init_scale=0.3)
    flats = predictor._flats(0, range(6))
    forward = bg.sampling.Forward(predictor.network, (X.double(),), {})
    computed = predictor._outputs
    want = computed._way("loop", forward)(flats)
    ways = computed._candidates(forward, flats, mirrored=False)
    assert ways == ["shared features", "vectorised"]
    assert all(torch.allclose(computed._way(way, forward)(flats), want, atol=1e-12) for way in ways)


def test_a_head_with_something_behind_it_is_not_shared() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = 2 * self.body(x)
            return outputs

    predictor = bg.Variational(Scaled(), subset_of_weights="last_layer", init_scale=0.3)
    outputs = predictor.draw_outputs(X, num_samples=6)
    assert "shared" not in predictor.strategy
    assert torch.allclose(outputs, manual(predictor, X, 6, 0), atol=1e-4)


def test_antithetic_pairs_and_independent_draws() -> None:
    pairs = bg.Variational(network(), init_scale=0.3).weight_draws(4)["0.weight"]
    mean = network().get_parameter("0.weight").detach()
    assert torch.allclose((pairs[0] + pairs[1]) / 2, mean, atol=1e-6)
    assert not torch.allclose((pairs[1] + pairs[2]) / 2, mean, atol=1e-3)
    independent = bg.Variational(network(), init_scale=0.3, antithetic=False)
    assert independent.draws_per_block == 1
    first, second = independent.weight_draws(2)["0.weight"]
    assert not torch.allclose((first + second) / 2, mean, atol=1e-3)


def step(optimizer: Any) -> Callable[[bg.Variational], None]:
    def change(predictor: bg.Variational) -> None:
        made = optimizer(predictor.parameters())
        predictor.loss(X, Y, num_data=len(X)).backward()
        made.step()

    return change


def replace(predictor: bg.Variational) -> None:
    weight = predictor.network.get_parameter("0.weight").detach()
    predictor.network.get_submodule("0").weight = nn.Parameter(1.5 * weight)


CHANGES: dict[str, Callable[[bg.Variational], object]] = {
    "in place": lambda predictor: torch.no_grad()(predictor.network.get_parameter("0.weight").mul_)(2),
    "data": lambda predictor: predictor.network.get_parameter("0.weight").data.mul_(2),
    "data of the scales": lambda predictor: predictor.guide.get_parameter("log_scale").data.add_(1),
    "NumPy": lambda predictor: predictor.network.get_parameter("0.weight").detach().numpy().fill(1),
    "Adam": step(partial(torch.optim.Adam, lr=0.1)),
    "fused Adam": step(partial(torch.optim.Adam, lr=0.1, fused=True)),
    "training": lambda predictor: predictor.fit((X, Y), epochs=1),
    "a new parameter": replace,
    "loaded": lambda predictor: predictor.load_state_dict(bg.Variational(network(), init_scale=0.1).state_dict()),
    "pairs": lambda predictor: setattr(predictor, "antithetic", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_remembered_draw_follows_the_weights(change: str) -> None:
    predictor = bg.Variational(network(), init_scale=0.3)
    before = predictor.draw_outputs(X, num_samples=4)
    for _ in range(4):  # A new parameter may lie in the memory of an old one.
        assert torch.equal(before, predictor.draw_outputs(X, num_samples=4))
        CHANGES[change](predictor)
        after = predictor.draw_outputs(X, num_samples=4)
        assert torch.allclose(after, manual(predictor, X, 4, 0), atol=1e-5)
        assert change in ("loaded", "pairs", "NumPy") or not torch.allclose(before, after, atol=1e-5)
        before = after


def test_the_validation_loss_is_that_of_the_weights_of_its_epoch() -> None:
    predictor = bg.Variational(network(), init_scale=0.1)
    history = predictor.fit((X, Y), epochs=3, batch_size=10, validation=(X, Y))
    losses = [epoch.validation_nll for epoch in history.epochs]
    assert len(set(losses)) == 3
    assert losses[-1] == pytest.approx(deepcopy(predictor).validation_loss((X, Y)), rel=1e-6)


def test_the_network_handed_in_stays() -> None:
    module = network()
    before = [parameter.clone() for parameter in module.parameters()]
    predictor = bg.Variational(module)
    predictor.fit((X, Y), epochs=1)
    predictor(X)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_fit_learns_and_says_the_spread() -> None:
    predictor = bg.Variational(network(), num_samples=16)
    history = predictor.fit(
        (X, Y), epochs=60, validation=(X, Y), optimizer=partial(torch.optim.Adam, lr=0.02), batch_size=20
    )
    losses = [epoch.train_loss for epoch in history.epochs]
    assert losses[-1] < losses[0]
    far, near = predictor(50 * X).uncertainty().epistemic.mean(), predictor(X).uncertainty().epistemic.mean()
    assert far > 0
    assert near > 0
    assert (predictor(X).labels == Y).float().mean() > 0.8


def test_a_subset_leaves_the_rest_to_be_trained_as_usual() -> None:
    predictor = bg.Variational(network(), subset_of_weights="last_layer")
    assert predictor.weights.names == ["2.weight", "2.bias"]
    draws = predictor.weight_draws(3)
    assert set(draws) == {"2.weight", "2.bias"}
    before = predictor.network.get_parameter("0.weight").clone()
    predictor.fit((X, Y), epochs=1)
    assert not torch.equal(before, predictor.network.get_parameter("0.weight"))


# The objective.


def expected_loss(predictor: bg.Variational, data: Any, num_data: int, draws: int = 1500) -> tuple[float, float]:
    torch.manual_seed(0)
    with torch.no_grad():
        values = torch.stack([predictor.loss(*batch, num_data=num_data) for _ in range(draws) for batch in data])
    means = values.double().reshape(draws, -1).mean(1)
    return means.mean().item(), 5 * means.std().item() / draws**0.5


def test_batches_and_duplicates_leave_the_objective_where_it_was() -> None:
    predictor = bg.Variational(network(), init_scale=0.3)
    whole, first = expected_loss(predictor, [(X, Y)], 40)
    halves, second = expected_loss(predictor, [(X[:20], Y[:20]), (X[20:], Y[20:])], 40)
    assert abs(whole - halves) < first + second
    # Twice the data: the likelihood's share doubles, so that the objective is NLL + KL / 80.
    divergence = predictor.kl_divergence().item()
    twice, third = expected_loss(predictor, [(torch.cat([X, X]), torch.cat([Y, Y]))], 80)
    assert abs(whole - divergence / 80 - twice) < first + third
    # The twin: a divergence counted once a batch of 20 instead of once for the data.
    wrong, fourth = expected_loss(predictor, [(X[:20], Y[:20]), (X[20:], Y[20:])], 20)
    assert abs(whole - wrong) > first + fourth


@pytest.mark.parametrize("estimator", ["local_reparameterisation", "flipout"])
def test_estimators_have_one_expectation(estimator: Any) -> None:
    predictors = [bg.Variational(network(), init_scale=0.3, estimator=e) for e in ("shared", estimator)]
    (shared, first), (other, second) = (expected_loss(predictor, [(X, Y)], 40) for predictor in predictors)
    assert abs(shared - other) < first + second
    wider = bg.Variational(network(), init_scale=0.4, estimator=estimator)
    wrong, third = expected_loss(wider, [(X, Y)], 40)
    assert abs(shared - wrong) > first + third


def test_the_loader_says_how_many_rows_there_are() -> None:
    seen = []

    class Watched(bg.Variational):
        def loss(self, inputs: Any, targets: Tensor, *, num_data: int) -> Tensor:
            seen.append(num_data)
            return super().loss(inputs, targets, num_data=num_data)

    loader = DataLoader(TensorDataset(X, Y), batch_size=16, drop_last=True)
    Watched(network()).fit(loader, epochs=1)
    assert set(seen) == {32}


def test_warm_up_and_temperature() -> None:
    predictor = bg.Variational(network(), kl_weight=0.5, kl_warmup=4).train()
    weights = [predictor._next_kl_weight() for _ in range(6)]
    assert weights == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    with torch.no_grad():
        predictor._next_kl_weight()
    assert int(predictor.steps) == 4
    assert "steps" in predictor.state_dict()


def test_the_divergence_warms_up_in_a_loop_that_leaves_the_mode_alone() -> None:
    predictor = bg.Variational(network(), kl_warmup=2)
    assert not predictor.training
    for _ in range(3):
        predictor.loss(X, Y, num_data=40).backward()
    assert predictor._next_kl_weight() == 1


def test_delta_is_one_exact_draw() -> None:
    predictor = bg.Variational(network(), guide="delta", prior=bg.priors.Laplace(1.0))
    pred = predictor(X)
    assert pred.num_samples == 1
    assert bool((pred.standard_error == 0).all())
    loss = predictor.loss(X, Y, num_data=40)
    plain = nn.functional.cross_entropy(predictor.network(X), Y)
    penalty = torch.cat([p.reshape(-1) for p in predictor.network.parameters()]).abs().sum()
    constant = predictor.weights.size * torch.log(torch.tensor(2.0))
    assert torch.allclose(loss, plain + (penalty + constant) / 40)


def test_weights_that_no_call_takes() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.other = network(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.body(x)
            return outputs

    with pytest.raises(IdenticalDraws, match="no call of the network takes"):
        bg.Variational(Unused(), subset_of_weights="last_layer")(X)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize(
    "change",
    [
        lambda predictor: setattr(predictor.network, "2", nn.Linear(8, 3).eval()),
        lambda predictor: setattr(predictor, "network", network().eval()),
        lambda predictor: setattr(predictor.network[2], "weight", nn.Parameter(torch.ones(4, 8))),
        lambda predictor: setattr(predictor.network[2], "bias", None),
        lambda predictor: nn.utils.parametrizations.weight_norm(predictor.network[2]).eval(),
    ],
)
def test_layers_that_were_replaced_are_not_taken_for_fixed(change: Callable[[Any], object], subset: str) -> None:
    predictor = bg.Variational(network(), subset_of_weights=subset, init_scale=0.3)
    predictor(X)
    change(predictor)
    for call in (lambda: predictor(X), lambda: predictor.loss(X, Y, num_data=40)):
        with pytest.raises(BadInput, match=r"parameter '\d.(weight|bias)' of the network is not the one"):
            call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guide": "gauss"}, "guide must be one of"),
        ({"prior": bg.priors.Normal}, "got the class Normal"),
        ({"estimator": "reinforce"}, "estimator must be one of"),
        ({"estimator": "flipout", "guide": "full"}, "needs independent Gaussian weights"),
        ({"subset_of_weights": "head"}, "which the network does not have"),
        ({"kl_weight": -1.0}, "kl_weight must be"),
        ({"kl_weight": float("nan")}, "kl_weight must be"),
        ({"kl_warmup": -1}, "kl_warmup"),
        ({"init_scale": -0.1}, "init_scale must be"),
        ({"prior": bg.priors.Informed(nn.Linear(2, 2))}, "same architecture"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        bg.Variational(network(), **settings)


def test_mixed_dtypes_are_refused() -> None:
    module = network()
    module.get_submodule("2").double()
    with pytest.raises(BadInput, match="several dtypes"):
        bg.Variational(module)


def test_autocast_draws_differ() -> None:
    """Trap B2: weights that autocast caches would give every draw the first sample."""
    predictor = bg.Variational(network(), init_scale=0.3, antithetic=False)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = predictor.draw_outputs(X, num_samples=6)
    assert outputs.float().std(0).min() > 0


@pytest.mark.parametrize("guide", ["normal", "low_rank", "full", "matrix_normal"])
def test_the_divergence_keeps_its_precision_under_autocast(guide: str) -> None:
    predictor = bg.Variational(network(), guide=guide, init_scale=0.3)
    with torch.no_grad():
        for number, parameter in enumerate(predictor.guide.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))

    def objective() -> Tensor:
        torch.manual_seed(0)
        # The likelihood says nothing: what is left is the divergence.
        return predictor.loss(X[:0], Y[:0], num_data=1).detach()

    with torch.random.fork_rng():
        want = objective()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(objective(), want)
