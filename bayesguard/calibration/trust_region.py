"""A step of Newton's method inside a ball, by conjugate gradients: products with the Hessian are all that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

_MOST_PRODUCTS = 200  # with the Hessian, for one step


def step_within(gradient: Tensor, curvature: Callable[[Tensor], Tensor], radius: float) -> tuple[Tensor, float, int]:
    """Return a step, the fall that the quadratic promises for it, and how many products with the Hessian it took.

    It ends where the quadratic is nearly smallest, or on the surface of the ball: at the latest where the function bends
    down, as that of several draws can.

    Args:
        gradient: `[P]`, not zero.
        curvature: The Hessian times a direction `[P]`.
        radius: Of the ball.

    References:
        T. Steihaug (1983). The conjugate gradient method and trust regions in large scale optimization. SIAM Journal on
        Numerical Analysis 20.
    """
    step, bent, rest = gradient * 0, gradient * 0, gradient  # `bent` is the Hessian times the step
    direction, square = -gradient, float(gradient.square().sum())
    enough = square * min(0.25, math.sqrt(square))  # ever closer near the minimum, for ever faster convergence
    products, done = 0, False
    while not done:
        curved = curvature(direction)
        products += 1
        bend, edge = float(direction @ curved), _to_the_surface(step, direction, radius)
        length = min(square / bend, edge) if bend > 0 else edge
        step, bent, rest = step + length * direction, bent + length * curved, rest + length * curved
        before, square = square, float(rest.square().sum())
        done = length == edge or square <= enough or products == min(len(step), _MOST_PRODUCTS)
        direction = direction * (square / before) - rest
    return step, -float(gradient @ step + step @ bent / 2), products


def _to_the_surface(step: Tensor, direction: Tensor, radius: float) -> float:
    """Return how far one can go from a step inside the ball."""
    square, along = float(direction.square().sum()), float(step @ direction)
    missing = max(radius**2 - float(step.square().sum()), 0.0)
    return (math.sqrt(along**2 + square * missing) - along) / square
