"""Steps in a ball against closed forms: Newton's step inside, and the surface where the quadratic bends down."""

import pytest
import torch

from bayesguard.calibration.trust_region import step_within

GRADIENT = torch.tensor([1e-7, -2e-7, 3e-7], dtype=torch.float64)  # so small that the step is exact to 1e-3


def test_in_a_large_ball_it_is_the_step_of_newton() -> None:
    root = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = root @ root.T + torch.eye(3)
    step, fall, products = step_within(GRADIENT, hessian.mv, radius=1.0)
    want = -torch.linalg.solve(hessian, GRADIENT)
    assert products <= 3
    torch.testing.assert_close(step, want, rtol=1e-3, atol=0)
    assert fall == pytest.approx(float(-GRADIENT @ want / 2), rel=1e-5)


@pytest.mark.parametrize("curved", [[1.0, 1.0, 1.0], [1.0, 2.0, -1.0], [0.0, 0.0, 0.0]])
def test_in_a_small_ball_it_ends_on_the_surface_further_down(curved: list[float]) -> None:
    hessian = torch.tensor(curved, dtype=torch.float64)
    step, fall, _ = step_within(GRADIENT, lambda direction: hessian * direction, radius=1e-8)
    assert float(step.norm()) == pytest.approx(1e-8)
    assert fall == pytest.approx(float(-GRADIENT @ step - (hessian * step * step).sum() / 2))
    assert fall >= 1e-8 * float(GRADIENT.norm()) * (1 - 1e-6) - 1e-16  # no less than along the gradient


def test_the_promise_of_a_wrong_hessian_is_told() -> None:
    """Twin: with half the curvature the step is twice as long, and its promise is not the true fall."""
    step, fall, _ = step_within(GRADIENT, lambda direction: direction / 2, radius=1.0)
    true = float(-GRADIENT @ step - step @ step / 2)
    assert true == pytest.approx(0, abs=1e-16)
    assert fall > 5e-14
