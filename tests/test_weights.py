"""Which weights are random, and their two forms."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from bayesguard.errors import BadInput
from bayesguard.weights import Weights, last_layer, select_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight
        self.decode.bias.requires_grad_(False)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 5))


@pytest.mark.parametrize(
    ("subset", "names"),
    [
        ("all", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]),
        ("last_layer", ["3.weight", "3.bias"]),
        ("0", ["0.weight", "0.bias"]),
        ("3.weight", ["3.weight"]),
        (["3", "0.bias"], ["0.bias", "3.weight", "3.bias"]),
        (lambda name, parameter: parameter.dim() > 1, ["0.weight", "3.weight"]),
    ],
)
def test_subsets(subset: Any, names: list[str]) -> None:
    assert select_weights(network(), subset) == names


def test_ties_are_there_once_and_frozen_ones_never() -> None:
    assert select_weights(Tied()) == ["encode.weight", "encode.bias"]


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ("head", "names 'head', which the network does not have; it has the parameters 0.weight"),
        (["3", "4.bias"], r"names '4.bias'"),
        (lambda name, parameter: False, "chooses no parameter"),
        ([], "chooses no parameter"),
    ],
)
def test_what_is_refused(subset: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        select_weights(network(), subset)


def test_a_frozen_weight_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="frozen"):
        select_weights(Tied(), "decode.bias")


def test_last_layer_is_the_last_that_is_trained() -> None:
    module = network()
    module[3].requires_grad_(False)
    assert last_layer(module) == "1"
    with pytest.raises(BadInput, match="no module with trainable parameters"):
        last_layer(nn.ReLU())


def test_flat_and_back() -> None:
    module = network()
    weights = Weights(module, select_weights(module))
    back = weights.unflatten(weights.flatten())
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.named().items())
    assert weights.unflatten(torch.zeros(7, weights.size))["3.weight"].shape == (7, 5, 2)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.weights = Weights(self.network, ["3.weight"])


def test_copies_and_moves() -> None:
    both = Both()
    copied = deepcopy(both)
    assert copied.weights.tensors()[0] is copied.network.get_parameter("3.weight")
    copied.double()
    assert copied.weights.flatten().dtype == torch.float64
    assert both.weights.flatten().dtype == torch.float32
