"""Roots of many functions at once."""

import pytest
import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.predictive.roots import bracket, find_root


def test_many_roots() -> None:
    target = torch.logspace(-9, 9, 37, dtype=torch.float64)
    calls = 0

    def cubic(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x**3 - target

    root = find_root(cubic, torch.full_like(target, -2e3), torch.full_like(target, 1e3))
    torch.testing.assert_close(root, target ** (1 / 3), rtol=1e-13, atol=0.0)
    assert calls < 60  # bisection alone would need about 70 for the smallest


def test_steps_and_flat_parts() -> None:
    def staircase(x: Tensor) -> Tensor:
        return torch.where(x < 3, -1.0, torch.where(x < 4, 0.0, 1.0))

    root = find_root(staircase, torch.tensor([0.0, 3.5]).double(), torch.tensor([10.0, 3.5]).double())
    assert ((root >= 3) & (root <= 4)).all()


def test_jump() -> None:
    root = find_root(lambda x: torch.where(x < 1 / 3, -1.0, 1.0).double(), *torch.tensor([[0.0], [1.0]]).double())
    assert float(root) == pytest.approx(1 / 3, rel=1e-13)


def test_root_at_an_end() -> None:
    ends = torch.tensor([[-1.0], [0.0]], dtype=torch.float64)
    assert float(find_root(lambda x: x, *ends)) == 0.0
    assert float(find_root(lambda x: x + 1, *ends)) == -1.0


def test_no_functions() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    assert find_root(lambda x: x, empty, empty).shape == (0,)


def test_bracket_grows_to_both_sides() -> None:
    target = torch.tensor([-1e6, 0.5, 1e30], dtype=torch.float64)
    lower, upper = bracket(lambda x: x - target, torch.zeros(3).double(), torch.ones(3).double())
    assert (lower <= target).all()
    assert (upper >= target).all()
    assert float(lower[1]) == 0.0


def test_bracket_gives_up() -> None:
    with pytest.raises(BadInput, match="bracketed"):
        bracket(lambda x: torch.ones_like(x), torch.zeros(1).double(), torch.ones(1).double())
