"""Student's and Gauss' cumulative distributions against SciPy."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from bayesguard.predictive.student import gaussian_cdf, incomplete_beta, student_cdf, student_log_prob


@pytest.mark.parametrize("df", [0.3, 0.51, 1.0, 1.5, 2.0, 3.5, 10.0, 30.0, 199.9, 200.0, 200.1, 250.0, 1000.0])
def test_student(df: float) -> None:
    z = torch.linspace(-60, 60, 2401, dtype=torch.float64)
    found = student_cdf(z, torch.tensor(df, dtype=torch.float64))
    tail = special.betainc(df / 2, 0.5, df / (df + z.numpy() ** 2)) / 2
    exact = np.where(z.numpy() > 0, 1 - tail, tail)
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-12)
    kept = (z.numpy() < 0) & (exact > 1e-20)
    np.testing.assert_allclose(found.numpy()[kept], exact[kept], rtol=1e-9)


def test_student_with_a_million_degrees_of_freedom_is_gaussian() -> None:
    z = torch.linspace(-5, 5, 101, dtype=torch.float64)
    found = student_cdf(z, torch.tensor(1e6, dtype=torch.float64))
    np.testing.assert_allclose(found, special.stdtr(1e6, z.numpy()), rtol=1e-11)
    np.testing.assert_allclose(found, special.ndtr(z.numpy()), rtol=1e-3)


def test_student_broadcasts_and_keeps_extremes() -> None:
    z = torch.tensor([[-torch.inf], [0.0], [1e200], [-1e8]], dtype=torch.float64)
    found = student_cdf(z, torch.tensor([1.0, 4.0, 500.0], dtype=torch.float64))
    assert found[0].tolist() == pytest.approx([0.0] * 3, abs=1e-100)
    assert found[1].tolist() == [0.5] * 3
    assert found[2].tolist() == [1.0] * 3
    assert float(found[3, 0]) == pytest.approx(1 / (np.pi * 1e8), rel=1e-12)


@pytest.mark.parametrize("df", [0.5, 3.0, 900.0, 1100.0, 1e4])
def test_student_density(df: float) -> None:
    z = torch.linspace(-20, 20, 81, dtype=torch.float64)
    found = student_log_prob(z, torch.tensor(df, dtype=torch.float64))
    np.testing.assert_allclose(found, stats.t.logpdf(z.numpy(), df), rtol=1e-10, atol=1e-10)


def test_student_density_with_many_degrees_of_freedom_is_gaussian() -> None:
    z = torch.linspace(-5, 5, 11, dtype=torch.float64)
    found = student_log_prob(z, torch.tensor(1e12, dtype=torch.float64))
    np.testing.assert_allclose(found, stats.norm.logpdf(z.numpy()), rtol=1e-9)


def test_gaussian_keeps_its_tail() -> None:
    z = torch.linspace(-37, 37, 149, dtype=torch.float64)
    np.testing.assert_allclose(gaussian_cdf(z), special.ndtr(z.numpy()), rtol=1e-12)


@pytest.mark.parametrize("a", [0.05, 1.0, 7.5, 300.0])
@pytest.mark.parametrize("b", [0.5, 3.0, 90.0])
def test_incomplete_beta(a: float, b: float) -> None:
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    found = incomplete_beta(x.new_tensor(a), x.new_tensor(b), x, 1 - x)
    np.testing.assert_allclose(found, special.betainc(a, b, x.numpy()), rtol=1e-10, atol=1e-14)
