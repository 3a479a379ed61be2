"""Conversion: what changes class, what stays, and why."""

import pytest
import torch
from torch import nn

from bayesguard import layers
from bayesguard.errors import UnsupportedNetwork
from tests.networks import Attention, Recurrent, Residual


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.decode.weight = self.encode.weight


def test_a_network_at_its_mean_is_the_network() -> None:
    for make, x in (
        (Residual, torch.randn(3, 1, 8, 8)),
        (Attention, torch.randn(3, 5, 8)),
        (Recurrent, torch.randn(3, 7, 4)),
    ):
        network = make().eval()
        made = layers.convert(network, init_scale=0.1, example_inputs=(x,))
        with torch.no_grad(), layers.at_mean():
            assert torch.equal(made.network(x), network(x))
        with torch.no_grad():
            assert not torch.allclose(made.network(x), network(x))
        assert not layers.bayesian_layers(network)


def test_what_a_layer_was_it_stays() -> None:
    calls = []
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", groups=2), nn.ReLU()).double()
    network[0].register_forward_hook(lambda module, args, output: calls.append(module))
    network[0].eval()
    layer = layers.convert(network).network.get_submodule("0")
    assert isinstance(layer, layers.Conv2d)
    assert (layer.padding_mode, layer.groups, layer.weight.dtype, layer.training) == (
        "reflect",
        2,
        torch.float64,
        False,
    )
    layer(torch.randn(1, 2, 5, 5, dtype=torch.float64))
    assert calls == [layer]


def test_the_report() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))
    network[2].requires_grad_(False)
    made = layers.convert(network, subset=lambda name, module: name != "3")
    assert made.converted == {"0": "Linear"}
    assert made.left == {
        "1": "there is no Bayesian BatchNorm1d",
        "2": "its parameters are frozen",
        "3": "it is not in the subset",
    }
    assert "1: left as it was" in str(made)


def test_tied_layers_stay_tied_and_are_left() -> None:
    made = layers.convert(Tied())
    assert made.converted == {"head": "Linear"}
    assert "Variational samples such a parameter once" in made.left["decode"]
    assert made.network.get_parameter("encode.weight") is made.network.get_submodule("decode")._parameters["weight"]


def test_parametrized_layers_are_left() -> None:
    network = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    made = layers.convert(network)
    assert made.converted == {"1": "Linear"}
    assert any("Parametrized" in why for why in made.left.values())


def test_nothing_to_convert() -> None:
    with pytest.raises(UnsupportedNetwork, match="no Bayesian BatchNorm1d"):
        layers.convert(nn.BatchNorm1d(3))


def test_a_copy_that_answers_otherwise() -> None:
    class Fickle(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            plain = type(self[0]) is nn.Linear
            output: torch.Tensor = self[0](input) if plain else 2 * self[0](input)
            return output

    with pytest.raises(UnsupportedNetwork, match="answers otherwise"):
        layers.convert(Fickle(nn.Linear(3, 2)), example_inputs=(torch.ones(1, 3),))
