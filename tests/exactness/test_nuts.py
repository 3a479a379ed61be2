"""Markov chains against Bayesian linear regression in closed form."""

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput, ConvergenceWarning, NotFitted

# Short chains do not reach the R-hat of long ones.
pytestmark = pytest.mark.filterwarnings("ignore::bayesguard.errors.ConvergenceWarning")

NOISE = 0.5


def regression() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.8, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    x = torch.randn(30, 3, dtype=torch.float64, generator=generator) @ mixing
    noise = NOISE * torch.randn(30, dtype=torch.float64, generator=generator)
    return x, (x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + noise).unsqueeze(-1)


def closed_form(x: Tensor, y: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    precision = x.T @ x / NOISE**2 + torch.eye(3, dtype=torch.float64) / prior**2
    covariance = torch.linalg.inv(precision)
    return covariance @ x.T @ y[:, 0] / NOISE**2, covariance


def sampler(kind: Any = bg.NUTS, prior: float = 1.0, **settings: Any) -> Any:
    torch.manual_seed(0)
    network = nn.Linear(3, 1, bias=False).double()
    return kind(network, bg.likelihoods.Gaussian(scale=NOISE), prior=bg.priors.Normal(prior), **settings)


def z_scores(draws: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Means and second moments of `[chains, draws, P]` against the truth, in units of their Monte-Carlo errors."""
    import arviz

    deviations = draws.double() - mean
    products = (deviations.unsqueeze(-1) * deviations.unsqueeze(-2)).flatten(2)
    figures = torch.cat([deviations, products - covariance.flatten()], dim=-1)
    mcse: Any = arviz.mcse
    errors = [float(mcse(figures[..., k].numpy(), method="mean")) for k in range(figures.shape[-1])]
    return figures.mean((0, 1)) / torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "settings"), [(bg.NUTS, {}), (bg.HMC, {"num_steps": 4})])
def test_the_posterior_is_the_closed_forms(kind: Any, settings: Any) -> None:
    x, y = regression()
    fitted = sampler(kind, prior=0.3, **settings).fit((x, y), num_samples=250, num_chains=2, warmup=100)
    assert z_scores(fitted.draws, *closed_form(x, y, 0.3)).abs().max() < 5
    # The twin: the posterior under another prior.
    assert z_scores(fitted.draws, *closed_form(x, y, 3.0)).abs().max() > 5


def test_the_predictive_and_its_error() -> None:
    x, y = regression()
    fitted = sampler(num_samples=400).fit((x, y), num_samples=200, num_chains=2, warmup=200)
    mean, covariance = closed_form(x, y, 1.0)
    pred = fitted(x)
    assert bool(((pred.mean[:, 0] - x @ mean).abs() < 5 * pred.standard_error[:, 0]).all())
    between = (x @ covariance * x).sum(-1)
    assert bool((pred.uncertainty().epistemic[:, 0] / between - 1).abs().max() < 5 * math.sqrt(2 / 100))
    assert bool((pred.standard_error[:, 0] > 0).all())


def test_the_last_layer_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1, bias=False)).double()
    x, y = regression()
    fitted = bg.NUTS(network, bg.likelihoods.Gaussian(scale=NOISE), subset_of_weights="last_layer")
    fitted.fit((x, y), num_samples=120, num_chains=2, warmup=100)
    features = network[:2](x).detach()
    precision = features.T @ features / NOISE**2 + torch.eye(6, dtype=torch.float64)
    covariance = torch.linalg.inv(precision)
    assert z_scores(fitted.draws, covariance @ features.T @ y[:, 0] / NOISE**2, covariance).abs().max() < 5
    assert fitted.weights.names == ["2.weight"]
    assert torch.equal(fitted.network.get_parameter("0.weight"), network.get_parameter("0.weight"))


def test_chains_repeat_themselves_in_processes_too() -> None:
    x, y = regression()
    settings = {"num_samples": 30, "num_chains": 2, "warmup": 30}
    found = [sampler().fit((x, y), **settings, n_jobs=jobs).draws for jobs in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], found[2])
    assert not torch.equal(found[0][0], found[0][1])
    assert not torch.equal(found[0], sampler(seed=1).fit((x, y), **settings).draws)


def numpy_state() -> str:
    return repr(np.random.get_state())  # noqa: NPY002


def test_nothing_global_changes() -> None:
    x, y = regression()
    pyro.clear_param_store()
    pyro.param("mine", torch.ones(2))
    nuts = sampler()
    states = torch.get_rng_state(), numpy_state(), random.getstate()
    nuts.fit((x, y), num_samples=20, num_chains=2, warmup=20)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == numpy_state()
    assert states[2] == random.getstate()
    assert list(pyro.get_param_store().keys()) == ["mine"]
    pyro.clear_param_store()


def test_a_learned_noise_is_held_at_the_maximum_a_posteriori() -> None:
    x, y = regression()
    torch.manual_seed(0)
    fitted = bg.NUTS(nn.Linear(3, 1, bias=False).double(), bg.likelihoods.Gaussian())
    fitted.fit((x, y), num_samples=50, num_chains=2, warmup=100)
    assert fitted.likelihood.get_parameter("log_scale").exp().item() == pytest.approx(NOISE, rel=0.4)


def test_chains_that_did_not_mix() -> None:
    x, y = regression()
    with pytest.warns(ConvergenceWarning, match=r"r_hat of .* is .*raise warmup="):
        sampler(bg.HMC, num_steps=1).fit((x, y), num_samples=6, num_chains=4, warmup=1, map_steps=0)


def test_convergence_of_weights_and_outputs() -> None:
    x, y = regression()
    fitted = sampler().fit((x, y), num_samples=200, num_chains=2, warmup=200)
    report = fitted.convergence(x[:5])
    assert set(report) == {"r_hat of weights", "ess of weights", "r_hat of outputs", "ess of outputs"}
    assert 0.99 < report["r_hat of outputs"] < 1.03
    assert report["ess of outputs"] > 100


def test_a_state_is_loaded_whatever_the_number_of_draws(tmp_path: Path) -> None:
    x, y = regression()
    fitted = sampler(num_samples=8).fit((x, y), num_samples=10, num_chains=2, warmup=10)
    save_file(fitted.state_dict(), tmp_path / "chains.safetensors")
    fresh = sampler(num_samples=8)
    fresh.load_state_dict(load_file(tmp_path / "chains.safetensors"))
    assert torch.equal(fresh.predict(x).mean, fitted.predict(x).mean)
    assert fresh.num_chains == 2
    with pytest.raises(RuntimeError, match="size mismatch for draws"):
        fresh.load_state_dict({**fitted.state_dict(), "draws": torch.zeros(2, 10, 4)})


def test_what_is_refused() -> None:
    with pytest.raises(NotFitted, match="call fit"):
        sampler()(torch.zeros(2, 3, dtype=torch.float64))
    fitted = sampler()
    with pytest.raises(BadInput, match=r"\[chains, draws, 3\]"):
        fitted.set_draws(torch.zeros(2, 3))
    with pytest.raises(BadInput, match="not finite"):
        fitted.set_draws(torch.full((1, 2, 3), torch.nan))
    fitted.set_draws(torch.randn(1, 4, 3))
    with pytest.raises(BadInput, match="num_samples=9 draws were asked for, and there are 4"):
        fitted(torch.zeros(2, 3, dtype=torch.float64), num_samples=9)
    with pytest.raises(BadInput, match="target_accept"):
        sampler(target_accept=1.5)
    with pytest.raises(BadInput, match="num_chains"):
        sampler().fit(regression(), num_chains=0)


@pytest.mark.parametrize("method", ["nuts", "full", "normal"])
def test_the_epistemic_part_grows_in_a_gap_and_the_aleatoric_part_does_not(method: str) -> None:
    """Where there are no data the function is unknown, and the noise is what it was."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + 1.5 * torch.rand(40, dtype=torch.float64, generator=generator)
    x[:20] *= -1
    y = torch.sin(2 * x) + 0.3 * torch.randn(40, dtype=torch.float64, generator=generator)
    centres = torch.linspace(-3, 3, 9, dtype=torch.float64)

    def basis(points: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * ((points.unsqueeze(-1) - centres) / 0.7).square())

    network, noise = nn.Linear(9, 1, bias=False).double(), bg.likelihoods.Gaussian(scale=0.3)
    predictor: bg.Predictor
    if method == "nuts":
        predictor = bg.NUTS(network, noise, num_samples=400).fit(
            (basis(x), y.unsqueeze(-1)), num_samples=200, num_chains=2, warmup=200
        )
    else:
        predictor = bg.Variational(network, noise, guide=method, init_scale=0.1, num_samples=400)
        adam = partial(torch.optim.Adam, lr=0.02)
        predictor.fit((basis(x), y.unsqueeze(-1)), epochs=1000, batch_size=40, optimizer=adam)
    points = torch.tensor([-1.8, 0.0, 1.8], dtype=torch.float64)
    _, aleatoric, epistemic = predictor(basis(points)).uncertainty()
    precision = basis(x).T @ basis(x) / 0.09 + torch.eye(9, dtype=torch.float64)
    exact = (basis(points) @ precision.inverse() * basis(points)).sum(-1)
    assert torch.allclose(aleatoric, torch.full_like(aleatoric, 0.09))
    assert epistemic[1] > 10 * epistemic[::2].max()
    if method == "normal":
        assert epistemic[1] < exact[1] / 2
    else:
        # 0.35 is five Monte-Carlo errors of the logarithm of a variance from 400 draws.
        assert bool(((epistemic[:, 0] / exact).log().abs() < 0.35).all())
