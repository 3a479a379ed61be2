# mypy: disable-error-code="no-untyped-call"
"""Variational as a Pyro program: the same bound as our own, for any guide and ELBO of Pyro's."""

import math
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoLowRankMultivariateNormal, AutoNormal
from torch import nn

import bayesguard as bg
from bayesguard.errors import BadInput
from tests.networks import Residual, Transformer

ADAM: Any = pyro.optim.Adam  # type: ignore[attr-defined]
X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture(autouse=True)
def users_store() -> Any:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def test_a_site_for_each_parameter_by_its_name() -> None:
    predictor = bg.Variational(network())
    trace = poutine.trace(predictor.pyro_model(40)).get_trace(X, targets=Y)
    sites: dict[str, Any] = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    shapes = {name: tuple(site["value"].shape) for name, site in sites.items() if name != "examples"}
    assert shapes == {name: tuple(p.shape) for name, p in predictor.network.named_parameters()}


@pytest.mark.parametrize("rows", [40, 10])
@pytest.mark.parametrize("prior", [bg.priors.Normal(0.5), bg.priors.Laplace(), bg.priors.Horseshoe()])
def test_the_joint_density_is_ours(rows: int, prior: bg.priors.Prior) -> None:
    predictor = bg.Variational(network().double(), prior=prior, init_scale=0.3)
    x, y = X[:rows].double(), Y[:rows]
    sample = predictor.guide.draw().detach()
    model = poutine.condition(predictor.pyro_model(40), data=predictor.weights.unflatten(sample))
    theirs: Any = poutine.trace(model).get_trace(x, targets=y).log_prob_sum()
    with predictor._training_mode(predictor.weights.split(sample)):
        likelihood = predictor.likelihood.loss(predictor.network(x), y)
    ours = -40 * likelihood + prior.joint(predictor.weights.named()).log_prob(sample).sum()
    assert torch.allclose(theirs, ours, rtol=1e-10)


@pytest.mark.parametrize("guide", ["normal", "low_rank", "full", "delta"])
def test_the_bound_is_ours(guide: str) -> None:
    predictor = bg.Variational(network(), guide=guide, init_scale=0.3)
    model, theirs = predictor.pyro_model(40), predictor.pyro_guide()
    elbo: Any = TraceMeanField_ELBO() if guide == "normal" else Trace_ELBO()
    torch.manual_seed(0)
    with torch.no_grad():
        bounds = torch.tensor([elbo.loss(model, theirs, X, targets=Y) for _ in range(600)]).double()
        ours = torch.stack([predictor.loss(X, Y, num_data=40) for _ in range(600)]).double() * 40
    error = 5 * ((bounds.var() + ours.var()) / 600).sqrt() + 1e-4
    assert abs(bounds.mean() - ours.mean()) < error
    if guide == "normal":
        # The twin: a prior that is counted once for each batch.
        assert abs(bounds.mean() + predictor.kl_divergence() - ours.mean()) > error


def test_draws_of_the_guide_are_those_of_the_posterior() -> None:
    predictor = bg.Variational(network(), guide="full", init_scale=0.3)
    made = bg.PyroPredictor(predictor.pyro_model(40), predictor.pyro_guide(), num_samples=2000)
    theirs, ours = made(X), predictor(X, num_samples=2000)
    assert bool(((theirs.probs - ours.probs).abs() < 5.5 * (theirs.standard_error + ours.standard_error)).all())


@pytest.mark.parametrize(
    ("automatic", "rate"), [(AutoNormal, 0.03), (AutoLowRankMultivariateNormal, 0.03), (AutoIAFNormal, 0.003)]
)
def test_any_guide_of_pyros_and_its_svi(automatic: Any, rate: float) -> None:
    torch.manual_seed(0)
    model = bg.Variational(network()).pyro_model(40)
    guide = automatic(model)
    svi = SVI(model, guide, ADAM({"lr": rate}), Trace_ELBO())
    losses = [svi.step(X, targets=Y) for _ in range(250)]
    assert sum(losses[-50:]) < 0.95 * sum(losses[:50])
    chance = -bg.Variational(network(), init_scale=1e-3)(X).log_prob(Y).mean()
    assert -bg.PyroPredictor(model, guide)(X).log_prob(Y).mean() < chance
    ours = bg.PyroPredictor(model, automatic(model))
    ours.fit((X, Y), epochs=100, batch_size=20, optimizer=partial(torch.optim.Adam, lr=rate))
    assert -ours(X).log_prob(Y).mean() < chance


def test_weights_outside_of_the_subset_are_trained_by_svi() -> None:
    predictor = bg.Variational(network(), bg.likelihoods.Categorical(), subset_of_weights="last_layer")
    model, guide = predictor.pyro_model(40), predictor.pyro_guide()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    SVI(model, guide, ADAM({"lr": 0.1}), RenyiELBO(num_particles=2)).step(X, targets=Y)
    changed = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.weight", "0.bias"}
    assert all(torch.equal(before[name], value) for name, value in predictor.network.state_dict().items())
    trained = dict(guide.named_parameters())
    assert not torch.equal(trained["network.2.weight"], predictor.network.get_parameter("2.weight"))


@pytest.mark.parametrize(("make", "x"), [(Residual, torch.randn(7, 1, 8, 8)), (Transformer, torch.ones(7, 5).long())])
def test_any_network(make: Any, x: torch.Tensor) -> None:
    torch.manual_seed(0)
    predictor = bg.Variational(make(), init_scale=0.05)
    made = bg.PyroPredictor(predictor.pyro_model(7), predictor.pyro_guide(), num_samples=4)
    made.fit((x, Y[:7]), epochs=2, batch_size=7)
    assert made(x).probs.shape[0] == 7


def test_programs_of_mcmc_and_of_bayesian_layers() -> None:
    torch.manual_seed(0)
    layered = bg.layers.convert(network(), prior=bg.priors.Laplace(0.5)).network
    for predictor in (bg.NUTS(network(), prior=bg.priors.StudentT()), bg.Variational(layered)):
        made = bg.PyroPredictor(predictor.pyro_model(40), AutoNormal(predictor.pyro_model(40)))
        made.fit((X, Y), epochs=2, batch_size=20)
        assert made(X).num_samples == 32


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="has no Pyro guide"):
        bg.Variational(network(), guide="radial").pyro_guide()
    with pytest.raises(BadInput, match="num_data=10"):
        bg.Variational(network()).pyro_model(10)(X, targets=Y)
    with pytest.raises(BadInput, match="num_data"):
        bg.Variational(network()).pyro_model(0)


def test_the_prior_predictive_is_that_of_a_linear_model() -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-3.0, 1.0]], dtype=torch.float64)
    likelihood = bg.likelihoods.Gaussian(scale=0.3)
    variance = 0.3**2 + 0.25 * (x.square().sum(1, keepdim=True) + 1)
    for kind in (bg.Variational, bg.NUTS):
        predictor = kind(nn.Linear(2, 1).double(), likelihood, prior=bg.priors.Normal(0.5))
        state = torch.get_rng_state()
        pred: Any = predictor.prior_predictive(x, num_samples=4000)
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(pred.mean, predictor.prior_predictive(x, num_samples=4000).mean)
        assert bool((pred.mean.abs() < 5 * (variance / 4000).sqrt()).all())
        assert bool(((pred.variance - variance).abs() < 5 * variance * (2 / 4000) ** 0.5).all())


def test_the_prior_predictive_of_layers_uses_their_own_priors() -> None:
    layer = bg.layers.Linear(2, 1, prior=bg.priors.Normal(3.0), bias=False)
    x = torch.tensor([[1.0, 0.0]])
    pred: Any = bg.Variational(layer, bg.likelihoods.Gaussian(0.1)).prior_predictive(x, num_samples=4000)
    assert abs(pred.variance.item() - 9.01) < 5 * 9 * (2 / 4000) ** 0.5


def test_the_observed_site_has_the_density_of_the_likelihood() -> None:
    x, counts = torch.ones(3, 2), torch.tensor([[1.0], [2.0], [3.0]])
    net = nn.Linear(2, 1)
    predictor = bg.Variational(net, bg.likelihoods.Poisson(), seed=1)
    low = {"network.weight": torch.full((1, 2), -75.0), "network.bias": torch.zeros(1)}
    data = {name: low[f"network.{name}"].requires_grad_() for name in predictor.weights.names}
    trace = poutine.trace(poutine.condition(predictor.pyro_model(3), data=data)).get_trace(x, targets=counts)
    torch.as_tensor(trace.log_prob_sum()).backward()
    # Rates of exp(-150) are zero in float32; the density falls with their logarithm by one a count.
    assert trace.nodes["obs"]["log_prob_sum"].item() == pytest.approx(-150 * 6 - math.log(2) - math.log(6), rel=1e-6)
    assert data["bias"].grad is not None
    assert data["bias"].grad.isfinite().all()

    heavy = bg.Variational(nn.Sequential(nn.Linear(2, 2)), bg.likelihoods.StudentT(df=1e6))
    trace = poutine.trace(heavy.pyro_model(3)).get_trace(x, targets=torch.zeros(3))
    trace.compute_log_prob()
    outputs: Any = trace.nodes["_RETURN"]["value"]
    assert torch.equal(trace.nodes["obs"]["log_prob"], heavy.likelihood.log_prob(outputs, torch.zeros(3)))
