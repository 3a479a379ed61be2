"""Deep ensembles: the mixture by hand, nesting, and every way of training them."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput, BadType
from tests.networks import mlp


class Constant(nn.Module):
    """Answers every input with the same outputs."""

    def __init__(self, *outputs: float) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.tensor(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs.expand(len(x), -1)


def test_the_mixture_of_three_members_by_hand() -> None:
    """Probabilities .8, .5, .2 mix to .5; mutual information is log 2 minus the mean entropy."""
    probabilities = torch.tensor([0.8, 0.5, 0.2], dtype=torch.float64)
    members = [Constant(float(p.log()), float((1 - p).log())) for p in probabilities]
    for member in members:
        member.outputs.data += 0.3  # logits, not log-probabilities
    pred = bg.DeepEnsemble(members)(torch.zeros(1, 1))
    entropy = -(probabilities * probabilities.log() + (1 - probabilities) * (1 - probabilities).log()).mean()
    parts = pred.uncertainty()
    log2 = torch.tensor(2.0).log()
    assert torch.allclose(pred.probs, torch.tensor([[0.5, 0.5]]))
    assert torch.allclose(parts.total, log2)
    assert torch.allclose(parts.aleatoric.double(), entropy, atol=1e-6)
    assert torch.allclose(parts.epistemic.double(), log2.double() - entropy, atol=1e-6)


def test_c7_probabilities_are_mixed_and_logits_are_not_averaged() -> None:
    members = [Constant(10.0, 0.0), Constant(0.0, 1.0)]
    pred = bg.DeepEnsemble(members)(torch.zeros(1, 1))
    mixed = (torch.tensor([10.0, 0.0]).softmax(0) + torch.tensor([0.0, 1.0]).softmax(0)) / 2
    averaged = torch.tensor([5.0, 0.5]).softmax(0)
    assert torch.allclose(pred.probs[0], mixed)
    assert (mixed - averaged).abs().max() > 0.3


def test_a_regression_ensemble_keeps_its_epistemic_variance() -> None:
    """Members say 0, 3 and 6 with noise 1: mean 3, variance 1 + 6 by the law of total variance."""
    members = [Constant(0.0), Constant(3.0), Constant(6.0)]
    pred = bg.DeepEnsemble(members, bg.likelihoods.Gaussian(scale=1.0))(torch.zeros(2, 1))
    assert torch.allclose(pred.mean, torch.full((2, 1), 3.0))
    assert torch.allclose(pred.variance, torch.full((2, 1), 7.0))
    parts = pred.uncertainty()
    assert torch.allclose(parts.aleatoric, torch.ones(2, 1))
    assert torch.allclose(parts.epistemic, torch.full((2, 1), 6.0))


def test_members_keep_noise_of_their_own() -> None:
    ensemble = bg.DeepEnsemble([Constant(0.0), Constant(4.0)], bg.likelihoods.Gaussian())
    for member, scale in zip(ensemble.members, (1.0, 3.0), strict=True):
        member.likelihood.log_scale.data.fill_(torch.tensor(scale).log())  # type: ignore[operator]
    pred = ensemble(torch.zeros(1, 1))
    assert torch.allclose(pred.uncertainty().aleatoric, torch.tensor([[(1.0 + 9.0) / 2]]))


def test_an_ensemble_of_mc_dropout_is_the_mixture_of_all_draws() -> None:
    members = [bg.MCDropout(mlp(nn.Dropout(0.5)), num_samples=count) for count in (4, 8)]
    ensemble = bg.DeepEnsemble(members)
    x = torch.randn(3, 8)
    pred = ensemble(x)
    assert pred.num_samples == 12
    # Each member has half of the mass, however many draws it makes.
    assert torch.allclose(pred.weights, torch.tensor([1 / 8] * 4 + [1 / 16] * 8, dtype=torch.float64))
    outputs = ensemble.draw_outputs(x).softmax(dim=-1)
    assert torch.allclose(pred.probs, (outputs[:4].mean(dim=0) + outputs[4:].mean(dim=0)) / 2, atol=1e-6)
    assert torch.allclose(ensemble.predict((x, torch.zeros(3))).probs, pred.probs, atol=1e-6)


def test_a_members_own_calibration_comes_before_the_mixture() -> None:
    members = [bg.Deterministic(Constant(2.0, 0.0)), bg.Deterministic(Constant(0.0, 4.0))]
    data = (torch.zeros(8, 1), torch.tensor([0, 0, 0, 1, 1, 0, 1, 0]))
    members[0].calibrate(data)
    pred = bg.DeepEnsemble(members)(torch.zeros(1, 1))
    want = (members[0](torch.zeros(1, 1)).probs + members[1](torch.zeros(1, 1)).probs) / 2
    assert torch.allclose(pred.probs, want)


DATA = (torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3)


def trained(**settings: Any) -> bg.DeepEnsemble:
    ensemble = bg.DeepEnsemble(lambda seed: mlp(), num_members=3, **settings)
    ensemble.fit(DATA, epochs=3, batch_size=20, optimizer=partial(torch.optim.Adam, lr=0.01))
    return ensemble


@pytest.mark.parametrize("joint", [True, False])
def test_training_lowers_the_loss_of_every_member(joint: bool) -> None:
    fresh = bg.DeepEnsemble(lambda seed: mlp(), num_members=3)
    ensemble = trained(joint=joint)
    for before, after in zip(fresh.members, ensemble.members, strict=True):
        assert after.validation_loss(DATA) < before.validation_loss(DATA)


def test_processes_train_what_one_process_trains() -> None:
    alone, spread = trained(joint=False), trained(joint=False, n_jobs=2)
    for a, b in zip(alone.parameters(), spread.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_bootstrap_gives_members_different_data() -> None:
    ensemble = bg.DeepEnsemble(lambda seed: mlp(), num_members=2, bootstrap=True)
    first, second = (ensemble.member_data(DATA, index)[0] for index in range(2))
    assert first.shape == DATA[0].shape
    assert not torch.equal(first, second)
    trained(bootstrap=True)


def test_adversarial_smoothing_is_the_mean_of_both_losses() -> None:
    """For a linear model the adversarial example is x + eps * sign(dloss/dx), worked out by hand."""
    epsilon = 0.1
    ensemble = bg.DeepEnsemble([nn.Linear(8, 3)], adversarial_epsilon=epsilon)
    member = ensemble.members[0]
    x, y = DATA
    linear: Any = member.network
    gradient = (linear(x).softmax(dim=-1) - nn.functional.one_hot(y, 3)) @ linear.weight
    twin = x + epsilon * gradient.sign()
    cross = nn.functional.cross_entropy
    want = (cross(linear(x), y) + cross(linear(twin), y)) / 2
    assert torch.allclose(ensemble.loss(x, y, num_data=60), want, atol=1e-6)


def test_checkpoints_become_members(tmp_path: Path) -> None:
    networks = [mlp(), mlp()]
    paths = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for network, path in zip(networks, paths, strict=True):
        save_file(network.state_dict(), path)
    ensemble = bg.DeepEnsemble.from_checkpoints(paths, mlp)
    assert torch.equal(ensemble.draw_outputs(DATA[0]), bg.DeepEnsemble(networks).draw_outputs(DATA[0]))
    with pytest.raises(BadInput, match=r"not a .safetensors file"):
        bg.DeepEnsemble.from_checkpoints([tmp_path / "weights.pt"], mlp)


def test_bad_members_are_named() -> None:
    with pytest.raises(BadInput, match="members is empty"):
        bg.DeepEnsemble([])
    with pytest.raises(BadType, match=r"members\[1\] must be a torch.nn.Module"):
        bg.DeepEnsemble([mlp(), "network"])  # type: ignore[list-item]
    with pytest.raises(BadInput, match="likelihood of its own"):
        bg.DeepEnsemble([bg.Deterministic(mlp())], bg.likelihoods.Categorical())


def test_a_draw_is_one_member() -> None:
    ensemble = bg.DeepEnsemble([mlp() for _ in range(3)])
    outputs = ensemble.draw_outputs(DATA[0])
    drawn = {
        index for seed in range(20) for index in range(3) if torch.equal(ensemble.draw(seed)(DATA[0]), outputs[index])
    }
    assert drawn == {0, 1, 2}
