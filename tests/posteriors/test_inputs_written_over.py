"""Networks that write over their inputs: every draw and member starts from what was given, which stays as it is."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bayesguard as bg
from bayesguard.training import fit
from tests.chosen_ways import choose_way

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 0, 1])


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.outer(torch.tanh(self.inner(x)))
        return outputs


class Doubles(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2).add_(1))


class Doubles2(Layers):
    """Behind torch's count of changes."""

    def forward(self, x: Tensor) -> Tensor:
        x.data.mul_(2)
        return super().forward(x)


class Doubles3(Layers):
    """Large inputs alone, which those of the first call are not."""

    def forward(self, x: Tensor) -> Tensor:
        x[x.abs() > 100] *= 2
        return super().forward(x)


class Clears(Layers):
    """After it has read them."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        x.zero_()
        return outputs


def _rectified() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))


MAKE: list[Callable[[], nn.Module]] = [Doubles, Doubles2, Doubles3, Clears, _rectified]


def made(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double().eval()


def under(network: nn.Module, x: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """The outputs of a copy, on a copy of the inputs."""
    copied = deepcopy(network)
    with torch.no_grad():
        for name, value in (weights or {}).items():
            copied.get_parameter(name).copy_(value)
        outputs: Tensor = copied(x.clone())
    return outputs


def check(predictor: bg.Predictor, want: Callable[[Tensor], Tensor]) -> None:
    for x in (X, 200 * X, X[:1]):
        given, outputs = x.clone(), want(x)
        for _ in range(2):
            got = predictor.draw_outputs(given, num_samples=len(outputs))
            assert torch.allclose(got, outputs, rtol=0, atol=1e-10)
            probs = predictor(given, num_samples=len(outputs)).probs
            assert torch.allclose(probs, outputs.softmax(-1).mean(0), rtol=0, atol=1e-10)
            assert torch.equal(given, x)


@pytest.mark.parametrize("make", MAKE)
def test_one_network(make: Callable[[], nn.Module]) -> None:
    predictor = bg.Deterministic(made(make))
    check(predictor, lambda x: under(predictor.network, x).unsqueeze(0))


@pytest.mark.parametrize("way", ["loop", "batched", "vmap"])
@pytest.mark.parametrize("make", MAKE)
def test_members(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], way: str) -> None:
    choose_way(monkeypatch, way)
    ensemble = bg.DeepEnsemble([made(make, seed) for seed in range(3)])
    check(ensemble, lambda x: torch.stack([under(member.network, x) for member in ensemble.members]))


@pytest.mark.parametrize("way", ["loop", "mirrored pairs", "vectorised", "shared features"])
@pytest.mark.parametrize("make", MAKE)
def test_draws_of_weights(monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], way: str) -> None:
    choose_way(monkeypatch, way)
    subset = "last_layer" if way == "shared features" else "all"
    predictor = bg.Variational(made(make), init_scale=0.3, subset_of_weights=subset)
    weights = predictor.weight_draws(11)
    each = [{name: own[draw] for name, own in weights.items()} for draw in range(11)]
    check(predictor, lambda x: torch.stack([under(predictor.network, x, own) for own in each]))


def test_pairs_are_still_mirrored_where_inputs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_way(monkeypatch, "mirrored pairs")
    predictor = bg.Variational(made(Layers), init_scale=0.3)
    predictor(X)
    assert predictor.strategy.startswith("mirrored pairs")


@pytest.mark.parametrize("make", MAKE)
def test_the_loss_of_members_on_one_batch(make: Callable[[], nn.Module]) -> None:
    ensemble, given = bg.DeepEnsemble([made(make, seed) for seed in range(3)]), X.clone()
    loss = ensemble.loss(given, TARGETS, num_data=5)
    logits = [under(member.network, X) for member in ensemble.members]
    want = sum(float(nn.functional.cross_entropy(own, TARGETS)) for own in logits)
    assert abs(loss.item() - want) < 1e-10


@pytest.mark.parametrize("make", MAKE)
def test_the_potential_of_chains_is_the_same_at_every_step(make: Callable[[], nn.Module]) -> None:
    from bayesguard.posteriors.mcmc import _PotentialOf

    predictor, given = bg.HMC(made(make)), X.clone()
    potential = _PotentialOf(predictor, ((given,), {}), TARGETS)
    flat = predictor.weights.flatten().detach()
    first, second = potential(flat), potential(flat)
    assert torch.equal(first, second)
    assert torch.equal(given, X)


def fit_by_hand(network: nn.Module, data: list[tuple[Tensor, Tensor]], epochs: int) -> nn.Module:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x.clone()), y).backward()
            optimizer.step()
    return network


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


SGD = partial(torch.optim.SGD, lr=0.1)
# torch has no gradient of a layer whose input is then cleared.
TRAINED = [make for make in MAKE if make is not Clears]


@pytest.mark.parametrize("make", TRAINED)
@pytest.mark.parametrize("joint", [None, True, False])
def test_training_on_batches_that_are_read_again(make: Callable[[], nn.Module], joint: bool | None) -> None:
    data = [(X.clone(), TARGETS), (2 * X, TARGETS)]
    before = deepcopy(data)
    predictor: bg.Predictor = bg.Deterministic(made(make))
    if joint is not None:
        predictor = bg.DeepEnsemble([made(make, seed) for seed in range(2)], joint=joint)
    predictor.fit(data, epochs=3, optimizer=SGD)
    trained = predictor.members if isinstance(predictor, bg.DeepEnsemble) else [predictor]
    for seed, own in enumerate(trained):
        assert largest_difference(own.network, fit_by_hand(made(make, seed), before, 3)) < 1e-10
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(data, before, strict=True))


@pytest.mark.parametrize("make", TRAINED)
def test_a_trial_of_training_together_leaves_the_arrays_alone(make: Callable[[], nn.Module]) -> None:
    given = X.clone()
    bg.DeepEnsemble([made(make, seed) for seed in range(2)], joint=True).fit((given, TARGETS), epochs=1)
    assert torch.equal(given, X)


class Standardises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.features(x.sub_(1).mul_(2)).mean((2, 3)))
        return outputs


def test_a_trial_of_the_order_of_channels_leaves_the_first_batch_alone() -> None:
    images = torch.randn(5, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(images, TARGETS), batch_size=5)
    predictor = bg.Deterministic(made(Standardises))
    predictor.fit(loader, epochs=2, optimizer=SGD)
    want = fit_by_hand(made(Standardises), [(images, TARGETS)], 2)
    assert largest_difference(predictor.network, want) < 1e-10


def test_an_optimizer_that_asks_several_times_a_step() -> None:
    solved = bg.Deterministic(made(Doubles))
    by_hand = made(Doubles)
    lbfgs = partial(torch.optim.LBFGS, max_iter=5)
    solved.fit((X, TARGETS), epochs=1, optimizer=lbfgs)
    optimizer = lbfgs(by_hand.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(by_hand(X.clone()), TARGETS)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert largest_difference(solved.network, by_hand) < 1e-8


def test_functions_of_the_posterior_leave_their_inputs_alone() -> None:
    makes = (
        bg.Deterministic,
        bg.MCDropout,
        bg.Variational,
        lambda network: bg.DeepEnsemble([network, made(Doubles, 1)]),
    )
    for make in makes:
        given = X.clone()
        network = nn.Sequential(made(Doubles), nn.Dropout(0.5)) if make is bg.MCDropout else made(Doubles)
        function = make(network).draw(0)
        assert torch.equal(function(given), function(given))
        assert torch.equal(given, X)


def test_the_program_for_pyro_starts_from_what_was_given_each_time() -> None:
    given = X.clone()
    variational = bg.Variational(made(Doubles))
    predictor = bg.PyroPredictor(variational.pyro_model(5), variational.pyro_guide(), num_samples=3)
    first = predictor(given).probs
    assert torch.equal(predictor(given).probs, first)
    predictor.fit([(given, TARGETS)], epochs=2)
    assert torch.equal(given, X)


def test_validation_data_of_the_plain_loop_are_left_alone() -> None:
    network, held_out = made(Doubles), [(X.clone(), TARGETS)]
    history = fit(
        network,
        lambda batch, num_data: nn.functional.cross_entropy(network(*batch.inputs), TARGETS),
        [(X, TARGETS)],
        epochs=2,
        validation=held_out,
        optimizer=partial(torch.optim.SGD, lr=1e-12),
    )
    assert torch.equal(held_out[0][0], X)
    first, second = (epoch.validation_nll for epoch in history.epochs)
    assert second == pytest.approx(first)
