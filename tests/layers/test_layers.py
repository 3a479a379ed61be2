"""Bayesian layers: torch's layers at the mean, one function under a seed, and every weight counted once."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_divergence

from bayesguard import layers, priors
from bayesguard.errors import BadInput

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SERIES = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
WORDS = torch.tensor([[1, 2, 0], [3, 0, 0]])

PAIRS: dict[str, tuple[str, dict[str, Any], tuple[Tensor, ...]]] = {
    "linear": ("Linear", {"in_features": 4, "out_features": 3}, (X,)),
    "linear without bias": ("Linear", {"in_features": 4, "out_features": 3, "bias": False}, (X,)),
    "conv1d": ("Conv1d", {"in_channels": 7, "out_channels": 2, "kernel_size": 3, "padding": "same"}, (SERIES,)),
    "conv2d": (
        "Conv2d",
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "dilation": 2, "padding": 2},
        (IMAGES,),
    ),
    "conv2d, circular": (
        "Conv2d",
        {"in_channels": 4, "out_channels": 2, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        (IMAGES,),
    ),
    "conv3d": ("Conv3d", {"in_channels": 3, "out_channels": 2, "kernel_size": 2}, (IMAGES.unsqueeze(0),)),
    "conv_transpose2d": (
        "ConvTranspose2d",
        {"in_channels": 4, "out_channels": 2, "kernel_size": 2, "stride": 2, "output_padding": 1},
        (IMAGES,),
    ),
    "embedding": ("Embedding", {"num_embeddings": 5, "embedding_dim": 3, "padding_idx": 0}, (WORDS,)),
    "lstm": (
        "LSTM",
        {"input_size": 4, "hidden_size": 3, "num_layers": 2, "bidirectional": True, "batch_first": True},
        (SERIES,),
    ),
    "lstm, projected": ("LSTM", {"input_size": 4, "hidden_size": 5, "proj_size": 2}, (SERIES,)),
    "gru": ("GRU", {"input_size": 4, "hidden_size": 3, "num_layers": 2, "bias": False}, (SERIES,)),
    "attention": ("MultiheadAttention", {"embed_dim": 4, "num_heads": 2, "batch_first": True}, (SERIES,) * 3),
}


def pair(name: str, **settings: Any) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    kind, arguments, inputs = PAIRS[name]
    torch.manual_seed(0)
    plain = getattr(nn, kind)(**arguments).double()
    bayesian = getattr(layers, kind)(**arguments, **settings).double()
    missing, unexpected = bayesian.load_state_dict(plain.state_dict(), strict=False)
    assert all(key.startswith("posterior.") for key in missing)
    assert not unexpected
    return plain, bayesian, inputs


def first(outputs: Any) -> Tensor:
    found = outputs[0] if isinstance(outputs, tuple) else outputs
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_without_spread_it_is_torchs_layer(name: str, train: bool) -> None:
    plain, bayesian, inputs = pair(name, init_scale=1e-14)
    plain.train(train), bayesian.train(train)
    want = first(plain(*inputs))
    assert torch.allclose(first(bayesian(*inputs)), want, atol=1e-10)
    with layers.at_mean():
        assert torch.equal(first(bayesian(*inputs)), want)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_every_call_draws_and_a_seed_is_one_function(name: str, train: bool) -> None:
    _, bayesian, inputs = pair(name, init_scale=0.3)
    bayesian.train(train)
    with torch.no_grad():
        assert not torch.allclose(first(bayesian(*inputs)), first(bayesian(*inputs)))
        found = []
        for seed in (1, 1, 2):
            with layers.fixed_draw(seed):
                found.append(first(bayesian(*inputs)))
                assert torch.equal(found[-1], first(bayesian(*inputs)))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


@pytest.mark.parametrize("name", PAIRS)
def test_every_parameter_is_trained(name: str) -> None:
    _, bayesian, inputs = pair(name, init_scale=0.1)
    (first(bayesian(*inputs)).square().sum() + layers.kl_divergence(bayesian)).backward()
    for parameter in bayesian.parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).any())


@pytest.mark.parametrize("estimator", ["shared", "local_reparameterisation", "flipout"])
def test_moments_of_an_output(estimator: Any) -> None:
    torch.manual_seed(0)
    layer, count = layers.Linear(4, 3, init_scale=0.3, estimator=estimator).double(), 4000
    with torch.no_grad():
        outputs = torch.stack([layer(X) for _ in range(count)])
        mean = F.linear(X, layer.weight, layer.bias)
    variance = 0.09 * (X.square().sum(-1, keepdim=True) + 1).expand_as(mean)
    assert bool(((outputs.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all())
    squares = (outputs - mean).square()
    error = 5 * squares.std(0) / math.sqrt(count)
    assert bool(((squares.mean(0) - variance).abs() < error).all())
    assert bool(((squares.mean(0) - 1.3 * variance).abs() > error).any())


def test_the_padding_row_is_not_random() -> None:
    layer = layers.Embedding(5, 3, padding_idx=0, init_scale=1.0)
    assert torch.equal(layer(torch.tensor([0, 0])), torch.zeros(2, 3))


# The divergence.


def closed_form(parameters: Sequence[Tensor], stddev: float, prior: float) -> Tensor:
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    return torch_divergence(Normal(flat, torch.full_like(flat, stddev)), Normal(0 * flat, 0 * flat + prior)).sum()


def test_the_divergence_of_three_layers() -> None:
    prior = priors.Normal(0.7)
    network = nn.Sequential(
        layers.Conv2d(4, 2, 3, prior=prior, init_scale=0.2, dtype=torch.float64),
        nn.Flatten(),
        layers.Linear(32, 8, prior=prior, init_scale=0.2, dtype=torch.float64),
        layers.Linear(8, 2, prior=prior, init_scale=0.2, dtype=torch.float64),
    )
    means = [p for name, p in network.named_parameters() if "posterior" not in name]
    assert torch.allclose(layers.kl_divergence(network), closed_form(means, 0.2, 0.7), atol=1e-6, rtol=0)


def test_a_recurrent_layer_counts_each_weight_once() -> None:
    lstm = layers.LSTM(4, 3, num_layers=2, bidirectional=True, init_scale=0.2, dtype=torch.float64)
    means = [p for name, p in lstm.named_parameters() if "posterior" not in name]
    assert len(means) == 16
    assert torch.allclose(layers.kl_divergence(lstm), closed_form(means, 0.2, 1.0), atol=1e-6, rtol=0)


def test_a_layer_that_is_used_twice_counts_once() -> None:
    layer = layers.Linear(4, 4).double()
    assert torch.equal(layers.kl_divergence(nn.Sequential(layer, layer)), layers.kl_divergence(layer))


def test_a_training_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    y = (x[:, 0] + x[:, 1] > 0).long()
    network = nn.Sequential(layers.Linear(4, 16), nn.ReLU(), layers.Linear(16, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y) + layers.kl_divergence(network) / len(x)
        loss.backward()
        optimizer.step()
    with torch.no_grad(), layers.fixed_draw(0):
        assert (network(x).argmax(-1) == y).float().mean() > 0.85


# Copies, moves, and what is refused.


def test_copies_and_moves_have_weights_of_their_own() -> None:
    layer = layers.Linear(4, 3, init_scale=0.1)
    copied = deepcopy(layer).double()
    with torch.no_grad():
        copied.weight.add_(1.0)
    assert copied(X).dtype == torch.float64
    assert copied.posterior.weights.tensors()[0] is copied.weight
    assert layer(X.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.Linear(3, 2, estimator="reinforce"), "estimator must be one of"),  # type: ignore[arg-type]
        (lambda: layers.LSTM(3, 2, estimator="flipout"), r'"shared" only'),
        (lambda: layers.Linear(3, 2, estimator="flipout", posterior="full"), 'needs posterior="normal"'),
        (lambda: layers.Linear(3, 2, posterior="gauss"), "guide must be one of"),
        (lambda: layers.Linear(3, 2, prior=priors.Normal), "got the class Normal"),  # type: ignore[arg-type]
        (lambda: layers.kl_divergence(nn.Linear(3, 2)), "no Bayesian layer"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()
