"""The bridge to ArviZ: groups, chains, and figures against closed forms."""

import warnings
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
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
    assert set(idata["posterior"].data_vars) == weights | {"prediction"}
    prediction = idata["posterior"]["prediction"]
    assert prediction.dims == ("chain", "draw", "observation", "class")
    probs = torch.as_tensor(prediction.values).flatten(0, 1).mean(0)
    assert torch.allclose(probs, predictor.predict((X, LABELS)).probs, atol=1e-6)


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
    estimate = found.elpd_loo if hasattr(found, "elpd_loo") else found.elpd  # ArviZ 0.x and 1.x
    assert abs(estimate - want) < 0.1
    assert abs(estimate - torch.as_tensor(idata["log_likelihood"]["y"].values).mean((0, 1)).sum().item()) > 0.1
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

    monkeypatch.setattr(az, "from_dict", from_dict)
    assert bg.MCDropout(network()).to_inference_data((X, LABELS)) == "tree"
    assert set(seen["groups"]) == {"posterior", "posterior_predictive", "log_likelihood", "observed_data"}
    assert seen["dims"] == {"y": ["observation"], "prediction": ["observation", "class"]}


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="cannot be 2 chains of one length"):
        sampled().to_inference_data((X, LABELS), num_samples=7)
    with pytest.raises(BadInput, match="label 3 in row 3"):
        sampled().to_inference_data((X, torch.arange(12) % 4))


KINDS = [bg.likelihoods.Gaussian(scale=1.0), bg.likelihoods.Bernoulli(), bg.likelihoods.Poisson()]


@pytest.mark.parametrize("likelihood", KINDS, ids=lambda each: type(each).__name__)
def test_targets_of_another_shape_are_not_broadcast(likelihood: bg.likelihoods.Likelihood) -> None:
    predictor = bg.MCDropout(network(1), likelihood)
    with pytest.raises(BadInput, match=r"targets has shape \(12,\), but \(12, 1\) is needed"):
        predictor.to_inference_data((X, LABELS % 2))
    idata = predictor.to_inference_data((X, LABELS[:, None] % 2))
    assert idata["log_likelihood"]["y"].shape == (1, 32, 12, 1)


def test_log_likelihoods_of_large_counts_keep_their_digits() -> None:
    identity = nn.Linear(1, 1, bias=False)
    nn.init.ones_(identity.weight)
    predictor = bg.Deterministic(identity, bg.likelihoods.Poisson())
    x, counts = torch.tensor([[14.0], [15.0]]), torch.tensor([[1_200_000], [3_300_000]])
    idata = predictor.to_inference_data((x, counts))
    rates = predictor(x).component.rate[0].double().numpy()
    assert np.allclose(idata["log_likelihood"]["y"][0, 0], stats.poisson.logpmf(counts.numpy(), rates), rtol=1e-7)


def test_draws_of_unequal_weights_are_refused() -> None:
    members = {"one": bg.Deterministic(network()), "other": bg.Deterministic(nn.Linear(4, 3))}
    Stacked = import_module("bayesguard.stacking").Stacked
    Stacked(members, torch.tensor([0.5, 0.5])).to_inference_data((X, LABELS))
    with pytest.raises(BadInput, match="weights that differ"):
        Stacked(members, torch.tensor([0.9, 0.1])).to_inference_data((X, LABELS))


def line(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, rows).reshape(-1, 1)
    return x, 1.5 * x + 0.2 * torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed))


def test_methods_are_compared_by_us_and_by_arviz() -> None:
    train, test = line(3, 60), line(4, 200)
    likelihood = bg.likelihoods.Gaussian(scale=0.2)
    torch.manual_seed(0)
    predictors: dict[str, Any] = {
        "nuts": bg.NUTS(nn.Linear(1, 1), likelihood, num_samples=100),
        "vi": bg.Variational(nn.Linear(1, 1), likelihood, init_scale=0.05, num_samples=100),
        "ensemble": bg.DeepEnsemble(lambda seed: nn.Linear(1, 1), likelihood, num_members=4),
        "deaf": bg.Variational(nn.Linear(1, 1), bg.likelihoods.Gaussian(scale=2.0), num_samples=100),
    }
    predictors["nuts"].fit(train, num_samples=200, num_chains=2, warmup=100)
    for name in ("vi", "ensemble"):
        predictors[name].fit(train, epochs=200, batch_size=60, optimizer=partial(torch.optim.Adam, lr=0.05))
    found = bg.compare(predictors, test, baseline="nuts")
    rows = {row.name: row for row in found.differences if row.metric == "nll"}
    assert rows["deaf"].is_clear
    assert abs(rows["vi"].difference) < 0.05
    assert abs(rows["ensemble"].difference) < 0.05
    assert bg.stack(predictors, test).named_weights["deaf"] < 0.01
    # Leaving out is about data that were fitted to.
    draws = {name: predictors[name].to_inference_data(train) for name in ("nuts", "vi", "deaf")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = az.compare(draws)
    assert table.index[-1] == "deaf"
    assert table.loc["vi", "elpd_diff"] + table.loc["nuts", "elpd_diff"] < 1


def test_the_prior_predictive_is_a_group() -> None:
    predictor = bg.Variational(
        nn.Linear(1, 1).double(), bg.likelihoods.Gaussian(scale=0.2), prior=bg.priors.Normal(3.0)
    )
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(-1, 1)
    idata = predictor.to_inference_data((x, x), num_samples=4000, prior=True, batch_size=4)
    drawn = torch.as_tensor(idata["prior_predictive"]["y"].values)
    assert drawn.shape == (1, 4000, 6, 1)
    want = 0.04 + 9 * (x.square() + 1)
    assert bool(((drawn[0].var(0) - want).abs() < 5 * want * (2 / 4000) ** 0.5).all())
    with pytest.raises(BadInput, match="needs a prior over weights"):
        bg.Deterministic(network()).to_inference_data((X, LABELS), prior=True)
