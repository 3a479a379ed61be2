"""The bridge to ArviZ: groups, chains, and figures against closed forms."""

import warnings
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput

az: Any = import_module("arviz")

# What ArviZ and its parts say about themselves is not about the data.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:arviz"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::bayesguard.errors.ConvergenceWarning"),
]

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, outputs))


def sampled() -> bg.NUTS:
    nuts = bg.NUTS(network(), subset_of_weights="last_layer", num_samples=20)
    flat = nuts.weights.flatten().detach()
    nuts.set_draws(flat + 0.1 * torch.randn(2, 30, len(flat), generator=torch.Generator().manual_seed(0)))
    return nuts


MAKE: dict[str, tuple[Any, int, set[str]]] = {
    "deterministic": (lambda: bg.Deterministic(network()), 1, set()),
    "dropout": (lambda: bg.MCDropout(network()), 1, set()),
    "ensemble": (
        lambda: bg.DeepEnsemble([nn.Linear(4, 3) for _ in range(4)]),
        4,
        {"weight", "bias"},
    ),
    "variational": (lambda: bg.Variational(network(), subset_of_weights="last_layer"), 1, {"2_weight", "2_bias"}),
    "nuts": (sampled, 2, {"2_weight", "2_bias"}),
}


@pytest.mark.parametrize("name", MAKE)
def test_groups_and_chains(name: str) -> None:
    make, chains, weights = MAKE[name]
    predictor = make()
    idata = predictor.to_inference_data((X, LABELS))
    log_likelihood = idata["log_likelihood"]["y"]
    assert log_likelihood.dims == ("chain", "draw", "observation")
    assert log_likelihood.shape[0] == chains
    assert log_likelihood.dtype == np.float64
    assert idata["posterior_predictive"]["y"].shape == log_likelihood.shape
    assert set(np.unique(idata["posterior_predictive"]["y"])) <= {0, 1, 2}
    assert np.array_equal(idata["observed_data"]["y"], LABELS)
    assert ("posterior" in idata.groups()) == bool(weights)
    if weights:
        assert set(idata["posterior"].data_vars) == weights


@pytest.mark.parametrize("name", MAKE)
def test_the_mixture_of_the_draws_is_the_predictive(name: str) -> None:
    predictor = MAKE[name][0]()
    predictor.calibrate((X, LABELS))
    draws = torch.as_tensor(predictor.to_inference_data((X, LABELS))["log_likelihood"]["y"].values).flatten(0, 1)
    mixed = draws.logsumexp(0) - np.log(len(draws))
    assert torch.allclose(mixed, predictor.predict((X, LABELS)).log_prob(LABELS).double(), atol=1e-6)


def test_draws_of_weights_are_those_of_the_predictions() -> None:
    predictor = sampled()
    idata = predictor.to_inference_data((X, LABELS))
    weight = torch.as_tensor(idata["posterior"]["2_weight"].values).flatten(0, 1)
    bias = torch.as_tensor(idata["posterior"]["2_bias"].values).flatten(0, 1)
    features = network().get_submodule("0")(X)
    outputs = torch.einsum("nf,skf->snk", features, weight) + bias.unsqueeze(1)
    log_likelihood = outputs.log_softmax(-1).gather(-1, LABELS.expand(20, -1).unsqueeze(-1)).squeeze(-1)
    got = torch.as_tensor(idata["log_likelihood"]["y"].values).flatten(0, 1)
    assert torch.allclose(got.float(), log_likelihood, atol=1e-5)


def regression() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, dtype=torch.float64, generator=generator)
    noise = 0.5 * torch.randn(40, 1, dtype=torch.float64, generator=generator)
    return x, x @ torch.tensor([[1.0], [-0.5]], dtype=torch.float64) + noise


def exact_leave_one_out(x: Tensor, y: Tensor) -> float:
    """The sum of log densities of each answer given all the others, in closed form."""
    total = 0.0
    for row in range(len(x)):
        rest = torch.arange(len(x)) != row
        precision = x[rest].T @ x[rest] / 0.25 + torch.eye(2, dtype=torch.float64)
        covariance = torch.linalg.inv(precision)
        mean = x[row] @ covariance @ x[rest].T @ y[rest, 0] / 0.25
        scale = (0.25 + x[row] @ covariance @ x[row]).sqrt()
        total += torch.distributions.Normal(mean, scale).log_prob(y[row, 0]).item()
    return total


def test_leave_one_out_against_the_closed_form() -> None:
    x, y = regression()
    torch.manual_seed(0)
    predictor = bg.NUTS(nn.Linear(2, 1, bias=False).double(), bg.likelihoods.Gaussian(scale=0.5), num_samples=400)
    precision = x.T @ x / 0.25 + torch.eye(2, dtype=torch.float64)
    posterior = torch.distributions.MultivariateNormal(
        torch.linalg.solve(precision, x.T @ y[:, 0] / 0.25), precision_matrix=precision
    )
    predictor.set_draws(posterior.sample((2, 1000)))
    idata = predictor.to_inference_data((x, y), num_samples=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = az.loo(idata)
    want = exact_leave_one_out(x, y)
    # Importance sampling by 2,000 independent draws: well under 0.1 of a nat over 40 rows.
    assert abs(found.elpd_loo - want) < 0.1
    assert abs(found.elpd_loo - torch.as_tensor(idata["log_likelihood"]["y"].values).mean((0, 1)).sum().item()) > 0.1
    assert float(az.rhat(idata)["weight"].max()) < 1.02


def test_models_can_be_compared() -> None:
    x, y = regression()
    good = bg.Variational(nn.Linear(2, 1).double(), bg.likelihoods.Gaussian(scale=0.5))
    with torch.no_grad():
        good.network.get_parameter("weight").copy_(torch.tensor([[1.0, -0.5]]))
    poor = bg.Variational(nn.Linear(2, 1).double(), bg.likelihoods.Gaussian(scale=2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = az.compare({"good": good.to_inference_data((x, y)), "poor": poor.to_inference_data((x, y))})
    assert list(table.index) == ["good", "poor"]


def test_random_states_stay() -> None:
    predictor = bg.MCDropout(network())
    before = torch.get_rng_state()
    predictor.to_inference_data((X, LABELS))
    assert torch.equal(before, torch.get_rng_state())


def test_the_newer_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """ArviZ 1.x has no InferenceData, and takes the groups as one mapping."""
    seen: dict[str, Any] = {}

    def from_dict(groups: Any, **settings: Any) -> str:
        seen.update(groups=groups, **settings)
        return "tree"

    monkeypatch.delattr(az, "InferenceData")
    monkeypatch.setattr(az, "from_dict", from_dict)
    assert bg.MCDropout(network()).to_inference_data((X, LABELS)) == "tree"
    assert set(seen["groups"]) == {"posterior_predictive", "log_likelihood", "observed_data"}
    assert seen["dims"] == {"y": ["observation"]}


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="cannot be 2 chains of one length"):
        sampled().to_inference_data((X, LABELS), num_samples=7)
