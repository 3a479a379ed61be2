"""The residual networks have the shapes and the numbers of parameters of their papers."""

import pytest
import torch

from bayesguard.benchmarks.residual import NETWORKS, WideResNet, num_parameters
from bayesguard.errors import BadInput


@pytest.mark.parametrize(
    ("name", "millions", "digits"), [("resnet20", 0.27, 2), ("resnet18", 11.17, 2), ("wrn-16-4", 2.75, 2)]
)
def test_published_numbers_of_parameters(name: str, millions: float, digits: int) -> None:
    network = NETWORKS[name](3, 10, 32, rate=0.1, head_rate=0.2)
    assert round(num_parameters(network) / 1e6, digits) == millions
    rates = [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates == [0.1] * (len(rates) - 1) + [0.2]
    assert len(rates) > 6
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert num_parameters(NETWORKS[name](3, 10, 32)) == num_parameters(network)


def test_the_widest_network() -> None:
    with torch.device("meta"):
        network = NETWORKS["wrn-28-10"](3, 10, 32)
        assert round(num_parameters(network) / 1e6, 1) == 36.5
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert not any(isinstance(module, torch.nn.Dropout) for module in network.modules())


def test_other_images() -> None:
    assert NETWORKS["wrn-16-4"](1, 3, 28)(torch.rand(1, 1, 28, 28)).shape == (1, 3)
    assert NETWORKS["small_cnn"](3, 10, 32, 0.1, 0.2)(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(BadInput, match=r"depth must be 6 n \+ 4 .*got 18"):
        WideResNet(3, 10, depth=18, widening=1)
