"""Every predictor in the registry passes the contract, on networks of every habit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.posteriors import REGISTRY
from bayesguard.posteriors.mcmc import MarkovChains
from bayesguard.predictor import Predictor
from bayesguard.testing import CHECKS, check_predictor
from tests.networks import Attention, FunctionalDropout, Recurrent, Residual, Transformer, mlp

Make = Callable[[Callable[[], nn.Module], dict[str, Any]], Predictor]

# How each method in the registry is made from a factory of networks. A new method has to add its line here.
MAKE: dict[str, Make] = {
    "Deterministic": lambda make, options: bg.Deterministic(make(), **options),
    "MCDropout": lambda make, options: bg.MCDropout(make(), num_samples=6, **options),
    "DeepEnsemble": lambda make, options: bg.DeepEnsemble([make() for _ in range(3)], **options),
    "Variational": lambda make, options: bg.Variational(make(), init_scale=0.1, num_samples=6, **options),
    "NUTS": lambda make, options: sampled(bg.NUTS, make, options),
    "HMC": lambda make, options: sampled(bg.HMC, make, options),
    "PyroPredictor": lambda make, options: program(bg.Variational(make(), init_scale=0.1, **options), options),
}


def program(variational: bg.Variational, options: dict[str, Any]) -> bg.PyroPredictor:
    """A network with its prior as a Pyro model, and its posterior as a guide."""
    own = {name: value for name, value in options.items() if name not in ("output", "likelihood")}
    return bg.PyroPredictor(variational.pyro_model(ROWS), variational.pyro_guide(), num_samples=6, **own)


def sampled(kind: type[MarkovChains], make: Callable[[], nn.Module], options: dict[str, Any]) -> MarkovChains:
    """A sampler with two chains of states around the network's weights, of no chain at all."""
    predictor = kind(make(), num_samples=8, **options)
    weights = predictor.weights.flatten().detach()
    noise = torch.randn(2, 20, len(weights), dtype=weights.dtype, generator=torch.Generator().manual_seed(0))
    predictor.set_draws(weights + 0.1 * noise)
    return predictor


class Keyword(nn.Module):
    """Two inputs by name, and a mapping as the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(nn.Dropout(0.5))

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        return {"hidden": first, "logits": self.body(first * second)}


class Tied(nn.Module):
    """Input and output share one matrix; the bias is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(8, 8), nn.Linear(8, 8)
        self.decode.weight = self.encode.weight
        self.decode.bias.requires_grad_(False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.drop(self.encode(x)))


class Pair(nn.Module):
    """A tuple of answers from two positional inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(nn.Dropout(0.5))

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return first, self.body(first + second)


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 1])
ROWS = len(LABELS)


def features(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(1))


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Tensor, dict[str, Any]]] = {
    "mlp": (lambda: mlp(nn.Dropout(0.5)), features(8), LABELS, {}),
    "float64": (lambda: mlp(nn.Dropout(0.5)).double(), features(8).double(), LABELS, {}),
    "convolution and batch norm": (Residual, features(1, 8, 8), LABELS, {}),
    "functional dropout": (FunctionalDropout, features(8), LABELS, {}),
    "transformer": (Transformer, torch.randint(0, 11, (ROWS, 5)), LABELS, {}),
    "transformer, time first": (lambda: Transformer(False), torch.randint(0, 11, (ROWS, 5)), LABELS, {}),
    "attention": (Attention, features(5, 8), LABELS, {}),
    "lstm": (Recurrent, features(7, 4), LABELS, {}),
    "gru, time first": (lambda: Recurrent(nn.GRU, batch_first=False), features(7, 4), LABELS, {}),
    "keyword inputs, mapping": (
        Keyword,
        {"first": features(8), "second": features(8)},
        LABELS,
        {"output": "logits"},
    ),
    "two inputs, tuple": (Pair, (features(8), features(8)), LABELS, {"output": 1}),
    "tied and frozen": (Tied, features(8), LABELS, {}),
    "compiled": (
        lambda: torch.compile(mlp(nn.Dropout(0.5)), backend="eager"),  # type: ignore[dict-item,return-value]
        features(8),
        LABELS,
        {},
    ),
    "dense prediction": (
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Dropout2d(0.5), nn.Conv2d(6, 3, 1)),
        features(1, 4, 4),
        LABELS[:, None, None].expand(-1, 4, 4).contiguous(),
        {"likelihood": bg.likelihoods.Categorical(class_dim=1)},
    ),
    "multi-label": (
        lambda: mlp(nn.Dropout(0.5), classes=4),
        features(8),
        (features(4) > 0).long(),
        {"likelihood": bg.likelihoods.Bernoulli()},
    ),
    "regression": (
        lambda: mlp(nn.Dropout(0.5), classes=2),
        features(8),
        features(2),
        {"likelihood": bg.likelihoods.Gaussian()},
    ),
    "heteroscedastic": (
        lambda: mlp(nn.Dropout(0.5), classes=2),
        features(8),
        features(),
        {"likelihood": bg.likelihoods.HeteroscedasticGaussian(beta=0.5)},
    ),
    "heavy tails": (
        lambda: mlp(nn.Dropout(0.5), classes=2),
        features(8),
        features(),
        {"likelihood": bg.likelihoods.StudentT(4.0)},
    ),
    "counts": (
        lambda: mlp(nn.Dropout(0.5), classes=2),
        features(8),
        features(2).exp().round(),
        {"likelihood": bg.likelihoods.Poisson()},
    ),
}


def test_every_registered_method_is_made_here() -> None:
    assert MAKE.keys() == REGISTRY.keys()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", REGISTRY)
def test_contract(method: str, case: str) -> None:
    torch.manual_seed(0)
    make, inputs, targets, options = CASES[case]
    check_predictor(MAKE[method](make, options), inputs, targets)


def test_a_nested_ensemble_passes_too() -> None:
    torch.manual_seed(0)
    members = [bg.MCDropout(mlp(nn.Dropout(0.5)), num_samples=4) for _ in range(3)]
    check_predictor(bg.DeepEnsemble(members), features(8), LABELS)


def test_bfloat16_autocast_gives_float32_answers() -> None:
    for method, make in MAKE.items():
        predictor = make(lambda: mlp(nn.Dropout(0.5)), {})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pred = predictor(features(8))
        assert pred.probs.dtype == torch.float32, method
        assert (pred.probs.sum(dim=-1) - 1).abs().max() < 1e-6


class Forgetful(bg.Deterministic):
    """A predictor that breaks the contract: every call has another answer."""

    def output_chunks(self, *inputs: Any, **settings: Any) -> Any:
        for chunk in super().output_chunks(*inputs, **settings):
            yield chunk + torch.rand(())


def test_the_suite_fails_a_broken_predictor() -> None:
    with pytest.raises(AssertionError) as failure:
        check_predictor(Forgetful(mlp()), features(8), LABELS)
    message = str(failure.value)
    assert "check_same_seed_repeats" in message
    assert "check_random_state_is_untouched" in message


def test_expected_failures_have_to_fail() -> None:
    with pytest.raises(AssertionError, match="check_copies_agree passes, though it was expected to fail: a reason"):
        check_predictor(
            bg.Deterministic(mlp()), features(8), LABELS, expected_failures={"check_copies_agree": "a reason"}
        )
    with pytest.raises(AssertionError, match="names no check: check_nothing"):
        check_predictor(bg.Deterministic(mlp()), features(8), LABELS, expected_failures={"check_nothing": "a reason"})


def test_checks_are_all_listed() -> None:
    import bayesguard.testing as testing

    defined = {name for name in vars(testing) if name.startswith("check_") and name != "check_predictor"}
    assert defined == {check.__name__ for check in CHECKS}
