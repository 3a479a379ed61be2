"""Variational over a network of Bayesian layers: their posteriors, their divergence, one function for each draw."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput
from bayesguard.testing import check_predictor
from tests.networks import Attention, Recurrent, Residual, mlp

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 1])


def layered(seed: int = 0, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        bg.layers.Linear(4, 8, **settings), nn.Tanh(), nn.Linear(8, 8), bg.layers.Linear(8, 3, **settings)
    )


def features(*shape: int) -> Tensor:
    return torch.randn(7, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: mlp(), features(8)),
        (Residual, features(1, 8, 8)),
        (Attention, features(5, 8)),
        (Recurrent, features(7, 4)),
    ],
)
@pytest.mark.parametrize("posterior", ["normal", "low_rank"])
def test_the_contract(make: Any, inputs: Tensor, posterior: str) -> None:
    torch.manual_seed(0)
    network = bg.layers.convert(make(), posterior=posterior, init_scale=0.1).network
    check_predictor(bg.Variational(network, num_samples=6), inputs, Y)


def test_draws_are_the_layers_under_their_samples() -> None:
    predictor = bg.Variational(layered(init_scale=0.3).double(), num_samples=5)
    weights = predictor.weight_draws()
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).double()
    plain.load_state_dict(predictor.network.state_dict(), strict=False)
    outputs = predictor.draw_outputs(X.double())
    for draw in range(5):
        with torch.no_grad():
            for name, value in weights.items():
                plain.get_parameter(name).copy_(value[draw])
            assert torch.allclose(plain(X.double()), outputs[draw], atol=1e-12)
    assert sorted(weights) == ["0.bias", "0.weight", "3.bias", "3.weight"]


@pytest.mark.parametrize("posterior", ["normal", "full", "delta"])
def test_spread_and_divergence_are_those_of_the_layers(posterior: str) -> None:
    network = layered(posterior=posterior, prior=bg.priors.Normal(0.5))
    predictor = bg.Variational(network)
    assert torch.allclose(predictor.kl_divergence(), bg.layers.kl_divergence(network))
    stacked = torch.cat([layer.posterior.variance() for layer in bg.layers.bayesian_layers(network)])
    assert torch.allclose(predictor.guide.variance(), stacked)
    assert predictor.is_exact == (posterior == "delta")


def test_each_layer_keeps_its_own_prior() -> None:
    network = nn.Sequential(
        bg.layers.Linear(4, 8, prior=bg.priors.Laplace(2.0)), bg.layers.Linear(8, 3, prior=bg.priors.Normal(0.1))
    )
    prior = bg.Variational(network).prior
    assert isinstance(prior.distribution("0.weight", torch.zeros(8, 4)), torch.distributions.Laplace)
    assert prior.distribution("1.bias", torch.zeros(3)).stddev[0].item() == pytest.approx(0.1)


def test_fitting_learns_and_the_layers_keep_their_estimators() -> None:
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(2))
    y = (x[:, 0] > 0).long()
    predictor = bg.Variational(layered(estimator="local_reparameterisation"), num_samples=8)
    before = -predictor(x).log_prob(y).mean().item()
    predictor.fit((x, y), epochs=20, batch_size=50, optimizer=partial(torch.optim.Adam, lr=0.02))
    assert -predictor(x).log_prob(y).mean().item() < before / 2
    inputs, targets = x[:50], y[:50]
    torch.manual_seed(0)
    losses = torch.stack([predictor.loss(inputs, targets, num_data=400) for _ in range(400)]).double()
    shared = bg.Variational(layered(), num_samples=8)
    shared.load_state_dict(predictor.state_dict())
    theirs = torch.stack([shared.loss(inputs, targets, num_data=400) for _ in range(400)]).double()
    error = (losses.var() / 400 + theirs.var() / 400).sqrt()
    assert abs(losses.mean() - theirs.mean()) < 5 * error
    assert losses.std() < theirs.std()


@pytest.mark.parametrize(
    "settings", [{"prior": bg.priors.Normal(2.0)}, {"guide": "full"}, {"init_scale": 0.1}, {"estimator": "flipout"}]
)
def test_arguments_that_the_layers_have_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"have their own {next(iter(settings))}"):
        bg.Variational(layered(), **settings)


def test_a_parameter_with_two_posteriors_is_refused() -> None:
    first, second = bg.layers.Linear(4, 4), bg.layers.Linear(4, 4)
    second.weight = first.weight
    second.make_bayesian(None, "normal", "shared", 0.01)
    with pytest.raises(BadInput, match="two posteriors"):
        bg.Variational(nn.Sequential(first, second))


@pytest.mark.parametrize(
    "make",
    [
        lambda: bg.Deterministic(layered()),
        lambda: bg.MCDropout(layered()),
        lambda: bg.DeepEnsemble([layered(), layered()]),
        lambda: bg.NUTS(layered()),
    ],
)
def test_methods_that_do_not_know_of_them_refuse(make: Any) -> None:
    with pytest.raises(BadInput, match="draw their weights at each call"):
        make()


def test_an_ensemble_of_them_is_fine() -> None:
    pred = bg.DeepEnsemble([bg.Variational(layered(seed), num_samples=4) for seed in range(2)])(X)
    assert pred.num_samples == 8


@pytest.mark.parametrize("bayesian", [True, False])
def test_the_padding_row_of_a_table_is_never_random(bayesian: bool) -> None:
    table = bg.layers.Embedding(5, 3, padding_idx=1, init_scale=0.5) if bayesian else nn.Embedding(5, 3, padding_idx=1)
    network = nn.Sequential(table, nn.Flatten())
    settings: dict[str, Any] = {} if bayesian else {"init_scale": 0.5}
    predictor = bg.Variational(network, num_samples=6, **settings)
    outputs = predictor.draw_outputs(torch.tensor([[1, 1], [0, 1]]))
    assert bool((outputs[:, 0] == 0).all())
    assert bool((outputs[:, 1, 3:] == 0).all())
    assert float(outputs[:, 1, :3].std(0).min()) > 0
