"""Adversarial examples, against the gradient by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from bayesguard.adversarial import adversarial_loss, fgsm, pgd
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
    expected = batch.inputs[0] + epsilon * (residual * WEIGHT.T).sign()
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


@pytest.mark.parametrize("epsilon", [0.1, torch.tensor([0.1, 0.0, 0.3])])
def test_pgd_reaches_the_optimum_of_a_linear_loss(epsilon: float | Tensor) -> None:
    batch = Batch((INPUTS.double(), torch.arange(20)), {}, TARGETS.double())
    moved = pgd(lambda b: (b.inputs[0] @ WEIGHT).sum(), batch, epsilon, seed=3)
    expected = batch.inputs[0] + epsilon * WEIGHT.T.sign()
    torch.testing.assert_close(moved.inputs[0], expected, rtol=0, atol=1e-15)
    assert torch.equal(moved.inputs[1], batch.inputs[1])
    assert not moved.inputs[0].requires_grad


def test_pgd_stays_within_the_bounds() -> None:
    batch = Batch((INPUTS.double().sigmoid(),), {}, TARGETS.double())
    moved = pgd(lambda b: (b.inputs[0] @ WEIGHT).sum(), batch, 0.3, bounds=(0, 1)).inputs[0]
    assert torch.equal(moved, (batch.inputs[0] + 0.3 * WEIGHT.T.sign()).clamp(0, 1))
    with pytest.raises(BadInput, match=r"inputs must be within bounds=\(0, 0.2\)"):
        pgd(_linear_loss, batch, 0.3, bounds=(0, 0.2))


def test_pgd_starts_at_random_within_the_cube_and_repeats_itself() -> None:
    batch = Batch((INPUTS.double(),), {}, TARGETS.double())

    def start(seed: int, random_start: bool = True) -> Tensor:
        moved = pgd(_linear_loss, batch, 0.5, steps=1, step_size=0.0, seed=seed, random_start=random_start)
        return moved.inputs[0] - batch.inputs[0]

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    assert not start(0, random_start=False).any()
    assert start(0).abs().amax() <= 0.5
    assert start(0).abs().mean().item() == pytest.approx(0.25, abs=0.05)


def test_pgd_finds_no_less_than_one_step_on_a_curved_loss() -> None:
    network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    batch = Batch((INPUTS.double(),), {}, TARGETS.double())

    def loss(b: Batch) -> Tensor:
        value: Tensor = (network(*b.inputs) - b.targets).square().mean()
        return value

    one, many = fgsm(loss, batch, 0.5), pgd(loss, batch, 0.5, random_start=False, steps=40)
    assert loss(many) > loss(batch)
    assert loss(many) >= loss(one) - 1e-3
    assert (many.inputs[0] - batch.inputs[0]).abs().amax() <= 0.5 + 1e-12


def test_pgd_refuses_what_it_cannot_do() -> None:
    batch = Batch((INPUTS.double(),), {}, TARGETS.double())
    for epsilon in (-0.1, math.nan):
        with pytest.raises(BadInput, match="epsilon must be at least 0"):
            pgd(_linear_loss, batch, epsilon)
    with pytest.raises(BadInput, match="steps"):
        pgd(_linear_loss, batch, 0.1, steps=0)


def test_a_network_that_writes_over_its_inputs_is_the_same_as_one_that_does_not() -> None:
    batch = Batch((INPUTS.double(),), {}, TARGETS.double())

    def writes(b: Batch) -> Tensor:
        return _linear_loss(b._replace(inputs=(b.inputs[0].mul_(2),)))

    def plain(b: Batch) -> Tensor:
        return _linear_loss(b._replace(inputs=(b.inputs[0] * 2,)))

    assert torch.equal(adversarial_loss(writes, batch, 0.1), adversarial_loss(plain, batch, 0.1))
    assert torch.equal(fgsm(writes, batch, 0.1).inputs[0], fgsm(plain, batch, 0.1).inputs[0])
    assert torch.equal(pgd(writes, batch, 0.1, steps=3).inputs[0], pgd(plain, batch, 0.1, steps=3).inputs[0])
    assert torch.equal(batch.inputs[0], INPUTS.double())
