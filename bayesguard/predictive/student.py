"""Cumulative distributions with exact tails: Student's t, which torch lacks, and the Gaussian, whose tail it loses."""

import math

import torch
from torch import Tensor

from bayesguard.predictive.numerics import wide

_MANY = 200.0  # degrees of freedom from which the expansion is as exact as the fraction, and faster
_MANY_IN_SINGLE = 20.0  # those from which the expansion of the density's constant is exact in float32
_TINY = 1e-300
_MOST_TERMS = 500


def gaussian_cdf(z: Tensor) -> Tensor:
    """Return P(Z <= z) for a standard Gaussian; `torch.special.ndtr` is 0 from -9 on."""
    return torch.special.erfc(z * -math.sqrt(0.5)) / 2


def student_cdf(z: Tensor, df: Tensor) -> Tensor:
    """Return P(T <= z) for Student's t with `df` degrees of freedom, in float64, to 1e-12; shapes broadcast.

    References:
        Hill, 1970, Communications of the ACM, algorithm 395 (many degrees of freedom).
    """
    z, df = torch.broadcast_tensors(wide(z), wide(df))
    square = z.clamp(-1e150, 1e150).square()  # infinite z: infinity over infinity
    few = df.clamp(max=_MANY)
    total = few + square
    tail = incomplete_beta(few / 2, z.new_tensor(0.5), few / total, square / total) / 2
    gaussian = gaussian_cdf(-_hill(square, df.clamp(min=_MANY)))
    lower = torch.where(df > _MANY, gaussian, tail)
    return torch.where(z > 0, 1 - lower, lower)


def student_log_prob(z: Tensor, df: Tensor) -> Tensor:
    """Return the log-density of standard Student's t; torch's loses its digits with many degrees of freedom."""
    # A difference of two numbers of the size of df: for many, its expansion (Abramowitz and Stegun, 6.1.40).
    gap = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2)
    series = (df / 2).log() / 2 - 1 / (4 * df) + 1 / (24 * df**3)
    many = 1e3 if df.dtype == torch.float64 else _MANY_IN_SINGLE
    constant = torch.where(df > many, series, gap) - (df * math.pi).log() / 2
    return constant - (df + 1) / 2 * torch.log1p(z.square() / df)


def incomplete_beta(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the regularised incomplete beta function I_x(a, b) in float64; shapes broadcast.

    Args:
        a, b: Positive parameters.
        x: Argument in [0, 1].
        y: 1 - x, given apart because the difference would lose its digits where x is nearly 1.

    References:
        Abramowitz and Stegun, 1964, equation 26.5.8; evaluated by Lentz' method (Thompson and Barnett, 1986, JCP).
    """
    a, b, x, y = torch.broadcast_tensors(a, b, x, y)
    swap = x > (a + 1) / (a + b + 2)
    a, b, x, y = (
        torch.where(swap, b, a),
        torch.where(swap, a, b),
        torch.where(swap, y, x),
        torch.where(swap, x, y),
    )
    log_front = torch.xlogy(a, x) + torch.xlogy(b, y) + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    value = log_front.exp() * _fraction(a, b, x) / a
    return torch.where(swap, 1 - value, value)


def _fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The continued fraction of I_x(a, b), which converges fast for x below its mean."""

    def away_from_zero(value: Tensor) -> Tensor:
        return torch.where(value.abs() < _TINY, _TINY, value)

    above = torch.ones_like(x)
    below = 1 / away_from_zero(1 - (a + b) * x / (a + 1))
    result = below
    for term in range(1, _MOST_TERMS):
        even = term * (b - term) * x / ((a + 2 * term - 1) * (a + 2 * term))
        odd = -(a + term) * (a + b + term) * x / ((a + 2 * term) * (a + 2 * term + 1))
        for step in (even, odd):
            below = 1 / away_from_zero(1 + step * below)
            above = away_from_zero(1 + step / above)
            factor = below * above
            result = result * factor
        if not ((factor - 1).abs() > 1e-15).any():
            break
    return result


def _hill(square: Tensor, df: Tensor) -> Tensor:
    """The Gaussian deviate with the tail probability of t, from t squared."""
    a = df - 0.5
    b = 48 * a * a
    z2 = a * torch.log1p(square / df)
    series = (((-0.4 * z2 - 3.3) * z2 - 24) * z2 - 85.5) / (0.8 * z2 * z2 + 100 + b) + z2 + 3
    return (series / b + 1) * z2.sqrt()
