# mypy: disable-error-code="no-untyped-call"
"""PyroPredictor: any Pyro program as a predictor, its parameters its own, and nothing drawn from a prior unasked."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as distributions
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput, BadType, IdenticalDraws, NotFitted
from bayesguard.testing import check_predictor

dist: Any = distributions
ADAM: Any = pyro.optim.Adam  # type: ignore[attr-defined]
X = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NOISE = 0.5
Y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + NOISE * torch.randn(
    30, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
)
PRECISION = torch.eye(2, dtype=torch.float64) + X.T @ X / NOISE**2
COVARIANCE = PRECISION.inverse()
MEAN = COVARIANCE @ X.T @ Y / NOISE**2


def model(x: Tensor, y: Tensor | None = None) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.Normal(x @ weights, NOISE), obs=y)


def guide(x: Tensor, y: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.zeros(2).double())
    factor = pyro.param("factor", torch.eye(2).double(), constraint=dist.constraints.lower_cholesky)
    pyro.sample("weights", dist.MultivariateNormal(loc, scale_tril=factor))


def exact_samples(count: int) -> dict[str, Tensor]:
    noise = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return {"weights": MEAN + noise @ torch.linalg.cholesky(COVARIANCE).T}


@pytest.fixture(autouse=True)
def users_store() -> Any:
    """The user's store is as it was after every test, unless the test is the user."""
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def test_samples_give_the_conjugate_predictive() -> None:
    pred = bg.PyroPredictor(model, exact_samples(4000), num_samples=4000)(X)
    want = (X @ COVARIANCE * X).sum(1)
    error = (want / 4000).sqrt()
    assert bool(((pred.mean - X @ MEAN).abs() < 5 * error).all())
    assert bool(((pred.variance - NOISE**2 - want).abs() < 5 * want * (2 / 4000) ** 0.5).all())


def test_a_guide_fitted_by_us_finds_the_posterior() -> None:
    torch.manual_seed(0)
    predictor = bg.PyroPredictor(model, AutoMultivariateNormal(model), num_samples=2000)
    predictor.fit((X, Y), epochs=400, batch_size=15, optimizer=partial(torch.optim.Adam, lr=0.02))
    predictor(X)
    weights = predictor.weight_draws()["weights"]
    assert bool(((weights.mean(0) - MEAN).abs() < 0.5 * COVARIANCE.diagonal().sqrt()).all())
    assert torch.allclose(weights.T.cov(), COVARIANCE, rtol=0.3, atol=0.3 * float(COVARIANCE.diagonal().mean()))
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("subsampled", [False, True])
def test_batches_stand_for_all_data(subsampled: bool) -> None:
    """Trap H7: with a point as the guide the loss has no noise, and halves must average to the whole."""

    def scaled(x: Tensor, y: Tensor | None = None) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        rows = {"size": 30, "subsample": torch.arange(len(x))} if subsampled else {"size": len(x)}
        with pyro.plate("rows", **rows):
            pyro.sample("obs", dist.Normal(x @ weights, NOISE), obs=y)

    predictor = bg.PyroPredictor(scaled, AutoDelta(scaled))
    whole = predictor.loss(X, Y, num_data=30)
    halves = [predictor.loss(X[part], Y[part], num_data=30) for part in (slice(15), slice(15, 30))]
    assert torch.allclose(torch.stack(halves).mean(), whole)
    latent = next(iter(predictor.network.parameters())).detach()
    prior = dist.Normal(0.0, 1.0).log_prob(latent).sum()
    likelihood = dist.Normal(X @ latent, NOISE).log_prob(Y).sum()
    assert torch.allclose(whole * 30, -(prior + likelihood))


def test_a_program_that_scales_to_another_size_is_refused() -> None:
    def scaled(x: Tensor, y: Tensor | None = None) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("rows", 60, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(x @ weights, NOISE), obs=y)

    with pytest.raises(BadInput, match="30 rows stand for 60, and num_data is 90"):
        bg.PyroPredictor(scaled, AutoDelta(scaled)).loss(X, Y, num_data=90)


def trained(automatic: Any) -> Any:
    torch.manual_seed(0)
    made = automatic(model)
    svi = SVI(model, made, ADAM({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step(X, Y)
    return made


def test_a_guide_of_the_users_is_copied_and_left_alone() -> None:
    made = trained(AutoNormal)
    store = {name: value.clone() for name, value in pyro.get_param_store().items()}
    kept, state = made._model, torch.get_rng_state()
    predictor = bg.PyroPredictor(model, made)
    before = predictor(X).mean
    assert made._model is kept
    assert torch.equal(state, torch.get_rng_state())
    assert store.keys() == dict(pyro.get_param_store().items()).keys()
    assert all(torch.equal(value, pyro.param(name)) for name, value in store.items())
    # Training on changes the user's guide and not the predictor.
    SVI(model, made, ADAM({"lr": 1.0}), Trace_ELBO()).step(X, Y)
    assert torch.equal(predictor(X).mean, before)
    assert (before - X @ MEAN).abs().max() < 0.3


def test_two_guides_of_one_name_do_not_meet() -> None:
    """Trap H1: in Pyro's own store the second would move the first."""
    first = bg.PyroPredictor(model, AutoNormal(model), seed=0)
    second = bg.PyroPredictor(model, AutoNormal(model), seed=1)
    adam = partial(torch.optim.Adam, lr=0.05)
    first.fit((X, Y), epochs=200, batch_size=30, optimizer=adam)
    before = first(X).mean
    second.fit((X, -Y), epochs=200, batch_size=30, optimizer=adam)
    assert torch.equal(first(X).mean, before)
    assert (second(X).mean + before).abs().max() < 0.5
    assert len(pyro.get_param_store()) == 0


def test_functions_take_their_parameters_from_the_store_once() -> None:
    svi = SVI(model, guide, ADAM({"lr": 0.02}), Trace_ELBO())
    torch.manual_seed(0)
    for _ in range(1500):
        svi.step(X, Y)
    predictor = bg.PyroPredictor(model, guide, num_samples=500)
    before = predictor(X)
    pyro.clear_param_store()
    assert torch.equal(predictor(X).mean, before.mean)
    assert (before.mean - X @ MEAN).abs().max() < 0.2
    assert sorted(predictor.network.names) == ["factor", "loc"]


def test_functions_that_were_never_trained_are_refused_and_can_be_fitted() -> None:
    predictor = bg.PyroPredictor(model, guide, num_samples=200)
    with pytest.raises(NotFitted, match=r"makes the parameters .*loc.* anew"):
        predictor(X)
    predictor = bg.PyroPredictor(model, guide, num_samples=200)
    predictor.fit((X, Y), epochs=800, batch_size=30, optimizer=partial(torch.optim.Adam, lr=0.02))
    assert (predictor(X).mean - X @ MEAN).abs().max() < 0.2
    assert len(pyro.get_param_store()) == 0


def test_an_untrained_automatic_guide_is_refused() -> None:
    with pytest.raises(NotFitted, match="AutoNormal was never trained"):
        bg.PyroPredictor(model, AutoNormal(model))(X)


def test_other_objectives() -> None:
    torch.manual_seed(0)
    predictor = bg.PyroPredictor(model, AutoNormal(model), elbo=TraceMeanField_ELBO(num_particles=4))
    predictor.fit((X, Y), epochs=200, batch_size=30, optimizer=partial(torch.optim.Adam, lr=0.05))
    assert (predictor(X).mean - X @ MEAN).abs().max() < 0.3
    with pytest.raises(BadInput, match="has no differentiable loss"):
        bg.PyroPredictor(model, AutoNormal(model), elbo=RenyiELBO())


def test_chains_of_mcmc_are_kept_apart() -> None:
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=60, warmup_steps=60, num_chains=1, disable_progbar=True)
    mcmc.run(X, Y)
    predictor = bg.PyroPredictor(model, mcmc, num_samples=40)
    assert predictor.num_chains == 1
    assert mcmc._samples is not None
    mcmc._samples = {name: value.reshape(2, 30, *value.shape[2:]) for name, value in mcmc._samples.items()}
    predictor = bg.PyroPredictor(model, mcmc, num_samples=40)
    assert predictor.num_chains == 2
    data = predictor.to_inference_data((X, Y))
    assert data["posterior"]["weights"].shape == (2, 20, 2)
    assert torch.equal(predictor.weight_draws()["weights"][20], mcmc.get_samples()["weights"][30])


def test_noise_of_examples_comes_from_the_model_when_it_is_said() -> None:
    def noisy(x: Tensor, y: Tensor | None = None) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            own = pyro.sample("own", dist.Normal(torch.zeros(()).double(), 2.0))
            pyro.sample("obs", dist.Normal(x @ weights + own, NOISE), obs=y)

    with pytest.raises(BadInput, match="has nothing for own"):
        bg.PyroPredictor(noisy, exact_samples(50))(X)
    pred = bg.PyroPredictor(noisy, exact_samples(2000), from_prior=["own"], num_samples=2000)(X)
    want = NOISE**2 + 4 + (X @ COVARIANCE * X).sum(1)
    assert bool(((pred.variance - want).abs() < 6 * want * (2 / 2000) ** 0.5).all())
    weights = bg.PyroPredictor(noisy, exact_samples(50), from_prior=["own"])
    weights(X)
    assert list(weights.weight_draws()) == ["weights"]


def classifier(x: Tensor, y: Tensor | None = None) -> Tensor:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    logits = x @ weights.T
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
    return logits


FAMILIES: dict[str, Any] = {
    "normal": lambda eta: dist.Normal(eta, 0.3),
    "laplace": lambda eta: dist.Laplace(eta, 0.3),
    "student": lambda eta: dist.StudentT(4.0, eta, 0.3),
    "poisson": lambda eta: dist.Poisson(eta.exp()),
    "bernoulli": lambda eta: dist.Bernoulli(logits=eta),
    "categorical": lambda eta: dist.Categorical(logits=torch.stack([eta, -eta], -1)),
    "categorical by probabilities": lambda eta: dist.Categorical(probs=torch.stack([eta, -eta], -1).softmax(-1)),
    "mixture": lambda eta: dist.MixtureSameFamily(
        dist.Categorical(probs=torch.full((len(eta), 2), 0.5)), dist.Normal(torch.stack([eta, -eta], -1), 0.3)
    ),
    "two targets": lambda eta: dist.Normal(torch.stack([eta, -eta], -1), 0.3).to_event(1),
    "masked": lambda eta: dist.Normal(eta, 0.3).mask(torch.tensor(True)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_the_contract(family: str) -> None:
    def program(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", FAMILIES[family](x[:, 0] * weight), obs=y)

    x = torch.linspace(-1, 1, 7).reshape(-1, 1)
    torch.manual_seed(0)
    automatic = AutoNormal(program, init_scale=0.5)
    predictor = bg.PyroPredictor(program, automatic, num_samples=12)
    targets = FAMILIES[family](x[:, 0]).sample()
    targets = targets.long() if "categorical" in family else targets
    predictor.loss(x, targets, num_data=7)
    check_predictor(predictor, x, targets)
    pred = predictor(x)
    weights = predictor.weight_draws()["weight"]
    each = torch.stack(
        [FAMILIES[family](x[:, 0] * weight).log_prob(targets).reshape(7, -1).sum(1) for weight in weights]
    )
    got = pred.log_prob(targets) if family != "two targets" else pred.joint_log_prob(targets)
    assert torch.allclose(got.double(), (each.double().logsumexp(0) - torch.tensor(12.0).log()), atol=1e-5)


def test_a_returned_value_can_be_the_raw_outputs() -> None:
    x = torch.randn(5, 2)
    samples = {"weights": torch.randn(20, 3, 2)}
    said = bg.PyroPredictor(classifier, samples, bg.likelihoods.Categorical(), num_samples=20)
    assert torch.allclose(said(x).probs, bg.PyroPredictor(classifier, samples, num_samples=20)(x).probs, atol=1e-6)
    with pytest.raises(BadType, match="must return a tensor"):
        bg.PyroPredictor(model, exact_samples(4), bg.likelihoods.Gaussian())(X)


def test_four_threads_take_turns() -> None:
    """Trap H3."""
    predictors = [bg.PyroPredictor(model, exact_samples(20), seed=seed) for seed in range(4)]
    want = [predictor(X).mean for predictor in predictors]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda predictor: [predictor(X).mean for _ in range(5)], predictors))
    assert all(torch.equal(mean, want[k]) for k, means in enumerate(got) for mean in means)


class Module(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 4)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Normal(self.body(x).tanh() @ weights, 0.3), obs=y)


def test_a_guide_without_parameters_yet_can_be_loaded(tmp_path: Path) -> None:
    """Trap H4: an AutoGuide makes its parameters when it is first called."""
    x, y = X.float(), Y.float()

    def made() -> bg.PyroPredictor:
        torch.manual_seed(0)
        program = Module()
        return bg.PyroPredictor(program, AutoNormal(program), num_samples=6)

    predictor = made()
    predictor.fit((x, y), epochs=5, batch_size=10)
    fresh = made()
    save_file(predictor.state_dict(), tmp_path / "predictor.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "predictor.safetensors"))
    assert torch.equal(fresh(x).mean, predictor(x).mean)
    older = made()
    older.load_state_dict({**predictor.state_dict(), "_extra_state": ((torch.zeros(1, 2),), {})})
    assert torch.equal(older(x).mean, predictor(x).mean)
    pickled = pickle.loads(pickle.dumps(predictor))
    assert torch.equal(pickled(x).mean, predictor(x).mean)
    assert torch.isfinite(predictor.loss(x, y, num_data=30))


def test_lists_of_guides() -> None:
    def program(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(()), 1.0))
        offset = pyro.sample("offset", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Normal(x * slope + offset, 0.3), obs=y)

    both = AutoGuideList(program)
    both.append(AutoNormal(pyro.poutine.block(program, expose=["slope"])))
    both.append(AutoDelta(pyro.poutine.block(program, expose=["offset"])))
    x = torch.linspace(-1, 1, 20)
    predictor = bg.PyroPredictor(program, both)
    predictor.fit((x, 2 * x + 1), epochs=100, batch_size=20, optimizer=partial(torch.optim.Adam, lr=0.05))
    assert (predictor(x).mean - 2 * x - 1).abs().max() < 0.4
    assert both[0].master is not None
    assert both[0].prototype_trace is None


def double(x: Tensor, y: Tensor | None = None) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.Normal(x[:, 0], 1.0), obs=y)


def joint(x: Tensor, y: Tensor | None = None) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.MultivariateNormal(x * weights, torch.eye(2).double()), obs=y)


def gamma(x: Tensor, y: Tensor | None = None) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("obs", dist.Gamma((x @ weights).exp(), 1.0), obs=y)


OUTSIDE = Module()


def closed(x: Tensor, y: Tensor | None = None) -> None:
    OUTSIDE(x, y)


@pytest.mark.parametrize(
    ("program", "posterior", "settings", "error", "message"),
    [
        (model, {"weight": torch.zeros(5, 2)}, {}, BadInput, "has weight, which the model does not draw"),
        (model, {"weights": torch.zeros(5, 3).double()}, {}, BadInput, r"has shape \(3,\), the model draws \(2,\)"),
        (model, {}, {}, BadInput, "of one S for each site"),
        (model, {"weights": 3.0}, {}, BadInput, "of one S for each site"),
        (model, 3, {}, BadType, "must be a guide, samples"),
        (model, exact_samples(5), {"observed": "y"}, BadInput, "no site 'y'; observed= must be one of weights"),
        (model, exact_samples(5), {"num_samples": 5, "output": "y"}, BadInput, "output= is not for"),
        (double, lambda x, y=None: None, {}, IdenticalDraws, "no latent site"),
        (joint, exact_samples(5), {}, BadType, r"MultivariateNormal over \(2,\) numbers"),
        (gamma, exact_samples(5), {}, BadType, "Gamma"),
        (closed, {"weights": torch.zeros(5, 4)}, {}, BadInput, "uses the PyroModule 'OUTSIDE' from outside"),
    ],
)
def test_what_is_refused(program: Any, posterior: Any, settings: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        bg.PyroPredictor(program, posterior, **settings)(X)


def test_a_guide_that_took_the_targets_for_latent_is_refused() -> None:
    automatic = AutoNormal(model)
    automatic(X)
    with pytest.raises(BadInput, match="first called without targets"):
        bg.PyroPredictor(model, automatic)(X)


def test_more_draws_than_samples_are_refused() -> None:
    predictor = bg.PyroPredictor(model, exact_samples(5))
    assert predictor(X).num_samples == 5
    with pytest.raises(BadInput, match="there are 5 posterior samples"):
        predictor(X, num_samples=6)
    with pytest.raises(BadInput, match="not trained"):
        predictor.loss(X, Y, num_data=30)


def test_rows_that_are_not_finite_are_named() -> None:
    spoiled = X.clone()
    spoiled[3, 0] = torch.nan
    with pytest.raises(BadInput, match="row 3"):
        bg.PyroPredictor(model, exact_samples(5))(spoiled)
