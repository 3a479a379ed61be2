"""Features are what the last layer is given, whatever the kind of data."""

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput, BadType


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3))


def test_the_last_layer_makes_outputs_of_them() -> None:
    net, x = network().train(), torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    found = bg.features(net, (x, torch.zeros(7).long()), batch_size=3)
    assert net.training
    assert not found.requires_grad
    assert not net[3]._forward_pre_hooks
    torch.testing.assert_close(net[3](found), net.eval()(x))
    torch.testing.assert_close(bg.features(net, x.double().numpy()), found)


def test_predictors() -> None:
    x = torch.ones(4, 2)
    for predictor in (bg.Deterministic(network()), bg.MCDropout(network())):
        torch.testing.assert_close(bg.features(predictor, x), bg.features(predictor.network, x))
    ensemble = bg.DeepEnsemble([network(), network()])
    torch.testing.assert_close(bg.features(ensemble, x), bg.features(ensemble.members[0], x))
    with pytest.raises(BadType, match="got a Variational"):
        bg.features(bg.Variational(network()), x)


def test_a_last_layer_without_one_input() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    twice = Twice()
    with pytest.raises(BadInput, match="'layer', 2 times"):
        bg.features(twice, torch.zeros(4, 2))
    assert not twice.layer._forward_pre_hooks


def test_a_density_ratio_of_features() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 400, 2, generator=generator)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    ratio = bg.calibration.density_ratio(bg.features(net, x[0]), bg.features(net, x[1] + torch.tensor([0.5, 0.0])))
    assert ratio.effective_size < 0.97 * 400
    assert ratio.auc > 0.55
