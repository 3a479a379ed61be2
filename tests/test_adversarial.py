"""Adversarial examples, against the gradient by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from bayesguard.adversarial import adversarial_loss, fgsm
from bayesguard.data import Batch
from bayesguard.errors import BadInput

_SOURCE = torch.Generator().manual_seed(0)
INPUTS = torch.randn(20, 3, generator=_SOURCE)
TARGETS = torch.randn(20, 1, generator=_SOURCE)
WEIGHT = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)


def _linear_loss(batch: Batch) -> Tensor:
    return (batch.inputs[0] @ WEIGHT - batch.targets).square().mean()


@pytest.mark.parametrize("epsilon", [0.1, torch.tensor([0.1, 0.0, 0.3])])
def test_fgsm_is_a_step_along_the_sign_of_the_gradient(epsilon: float | Tensor) -> None:
    batch = Batch((INPUTS.double(), torch.arange(20)), {}, TARGETS.double())
    moved = fgsm(_linear_loss, batch, epsilon)
    residual = batch.inputs[0] @ WEIGHT - TARGETS.double()
    expected = batch.inputs[0] + torch.as_tensor(epsilon) * (residual * WEIGHT.T).sign()
    assert torch.equal(moved.inputs[0], expected)
    assert torch.equal(moved.inputs[1], batch.inputs[1])
    assert not moved.inputs[0].requires_grad
    assert _linear_loss(moved) > _linear_loss(batch)
    mean = (_linear_loss(batch) + _linear_loss(moved)) / 2
    assert torch.allclose(adversarial_loss(_linear_loss, batch, epsilon), mean, rtol=1e-14)


def test_the_adversarial_objective_has_the_gradient_of_both_terms_with_the_example_held_fixed() -> None:
    network = nn.Linear(3, 1).double()
    batch = Batch((INPUTS.double(),), {}, TARGETS.double())

    def loss(b: Batch) -> Tensor:
        value: Tensor = (network(*b.inputs) - b.targets).square().mean()
        return value

    moved = fgsm(loss, batch, 0.2)
    (expected,) = torch.autograd.grad((loss(batch) + loss(moved)) / 2, [network.weight])
    (gradient,) = torch.autograd.grad(adversarial_loss(loss, batch, 0.2), [network.weight])
    assert torch.allclose(gradient, expected, rtol=1e-13)
    assert batch.inputs[0].grad is None
    assert not batch.inputs[0].requires_grad


def test_adversarial_steps_that_cannot_be_taken_are_named() -> None:
    batch = Batch((INPUTS.double(),), {}, TARGETS.double())
    with pytest.raises(BadInput, match="floating dtype"):
        fgsm(_linear_loss, batch._replace(inputs=(torch.arange(3),)), 0.1)
    for epsilon in (-0.1, math.nan):
        with pytest.raises(BadInput, match="epsilon must be at least 0"):
            fgsm(_linear_loss, batch, epsilon)
    for shape in ((1, 20, 3), (2,)):
        with pytest.raises(BadInput, match="does not broadcast"):
            fgsm(_linear_loss, batch, torch.full(shape, 0.1))
