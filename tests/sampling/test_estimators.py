"""Estimators: one expectation, and the variances that their papers promise."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesguard.errors import BadInput
from bayesguard.sampling.estimators import Moments, check_estimator, random_weights
from bayesguard.sampling.random_weights import RandomWeights
from tests.networks import Attention, Recurrent, Residual, Transformer, mlp

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (5, 4)),
    "linear on sequences": (nn.Linear(4, 3, bias=False), (5, 2, 4)),
    "conv1d": (nn.Conv1d(2, 4, 3, padding=1, groups=2), (5, 2, 6)),
    "conv2d": (nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="reflect"), (5, 2, 5, 5)),
    "conv3d": (nn.Conv3d(1, 2, 2), (5, 1, 3, 3, 3)),
    "conv_transpose2d": (nn.ConvTranspose2d(2, 3, 2, stride=2), (5, 2, 3, 3)),
}


def run(layer: nn.Module, x: Tensor, estimator: Any, stddev: float, count: int) -> Tensor:
    """`count` outputs of a layer whose weights all have one standard deviation."""
    parameters = list(layer.parameters())
    moments = {id(p): Moments(p.detach(), torch.full_like(p, stddev)) for p in parameters}
    outputs = []
    for _ in range(count):
        samples = {id(p): p.detach() + stddev * torch.randn_like(p) for p in parameters}
        with torch.no_grad(), random_weights(estimator, samples, moments):
            outputs.append(layer(x))
    return torch.stack(outputs)


@pytest.mark.parametrize("estimator", ["shared", "local_reparameterisation", "flipout"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_have_the_moments_of_a_shared_draw(name: str, estimator: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    layer, x, count = layer.double(), torch.randn(shape, dtype=torch.float64), 2000
    outputs = run(layer, x, estimator, 0.3, count)
    mean = layer(x).detach()

    variance = variance_of(layer, x, 0.3)
    assert bool(((outputs.mean(0) - mean).abs() < 5.5 * (variance / count).sqrt()).all())
    deviations = (outputs - mean).square()
    error = 5.5 * deviations.std(0) / math.sqrt(count)
    assert bool(((deviations.mean(0) - variance).abs() < error).all())
    assert bool(((deviations.mean(0) - 1.3 * variance).abs() > error).any())


def variance_of(layer: nn.Module, x: Tensor, stddev: float) -> Tensor:
    """By brute force: an output is linear in the weights, and its variance the squared norm of its gradient."""
    parameters = list(layer.parameters())

    def outputs(*values: Tensor) -> Tensor:
        with RandomWeights({id(p): value for p, value in zip(parameters, values, strict=True)}):
            return layer(x)

    jacobians = torch.autograd.functional.jacobian(outputs, tuple(p.detach() for p in parameters))
    rank = outputs(*parameters).dim()
    return stddev**2 * sum(jacobian.square().flatten(rank).sum(-1) for jacobian in jacobians)


def test_examples_are_independent_where_the_paper_says_so() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 1, bias=False).double(), torch.ones(2, 4, dtype=torch.float64)
    correlations = {}
    for estimator in ("shared", "local_reparameterisation", "flipout"):
        outputs = run(layer, x, estimator, 0.5, 3000).squeeze(-1)
        correlations[estimator] = torch.corrcoef(outputs.T)[0, 1].item()
    error = 5 / math.sqrt(3000)
    assert correlations["shared"] > 1 - 1e-9
    assert abs(correlations["local_reparameterisation"]) < error
    assert abs(correlations["flipout"]) < error


def test_local_reparameterisation_has_the_smaller_gradient_variance() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 1).double()
    x, y = torch.randn(64, 20, dtype=torch.float64), torch.randn(64, 1, dtype=torch.float64)
    spreads = {}
    for estimator in ("shared", "local_reparameterisation", "flipout"):
        spreads[estimator] = gradients(layer, x, y, estimator, 400).var(0).sum().item()
    assert spreads["local_reparameterisation"] < 0.5 * spreads["shared"]
    assert spreads["flipout"] < 0.5 * spreads["shared"]


def gradients(layer: nn.Module, x: Tensor, y: Tensor, estimator: Any, count: int) -> Tensor:
    parameters, found = list(layer.parameters()), []
    for _ in range(count):
        samples = {id(p): p + 0.3 * torch.randn_like(p) for p in parameters}
        moments = {id(p): Moments(p, torch.full_like(p, 0.3)) for p in parameters}
        with random_weights(estimator, samples, moments):
            loss = F.mse_loss(layer(x), y)
        found.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(found)


NETWORKS: dict[str, tuple[Any, Tensor]] = {
    "mlp": (lambda: mlp(nn.Identity()), torch.randn(4, 8)),
    "residual": (Residual, torch.randn(4, 1, 8, 8)),
    "transformer": (Transformer, torch.randint(0, 11, (4, 5))),
    "attention": (Attention, torch.randn(4, 5, 8)),
    "lstm": (Recurrent, torch.randn(4, 7, 4)),
    "gru": (lambda: Recurrent(nn.GRU), torch.randn(4, 7, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_stand_for_every_parameter(name: str) -> None:
    """Under the weights of another network, a network is that network."""
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    mine, other = make().double().eval(), make().double().eval()
    x = x.double() if x.is_floating_point() else x
    other.load_state_dict({**other.state_dict(), **dict(mine.named_buffers())})
    pairs = zip(mine.parameters(), other.parameters(), strict=True)
    before = [parameter.clone() for parameter in mine.parameters()]
    with torch.no_grad(), RandomWeights({id(p): q.detach() for p, q in pairs}) as mode:
        outputs = mine(x)
    assert mode.used
    assert torch.allclose(outputs, other(x), atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, mine.parameters(), strict=True))


def test_a_transformed_weight_is_random_too() -> None:
    class Masked(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ (self.weight * 2).T + torch.stack([self.bias, self.bias]).sum(0)

    layer, x = Masked(3, 2), torch.ones(1, 3)
    samples = {id(layer.weight): torch.ones(2, 3), id(layer.bias): torch.ones(2)}
    with RandomWeights(samples):
        assert torch.equal(layer(x), torch.full((1, 2), 8.0))


def test_an_estimator_that_is_not_known() -> None:
    with pytest.raises(BadInput, match="one of 'shared'"):
        check_estimator("reinforce")
