"""Dropout before a linear layer has a closed form: mean w.x + b, variance p / (1 - p) * sum w^2 x^2."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg

DRAWS = 20_000
RATE = 0.3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Dropout(RATE), nn.Linear(6, 2)).double()


def exact(net: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    linear: Any = net[1]
    return linear(x).detach(), RATE / (1 - RATE) * (x**2 @ (linear.weight**2).T).detach()


def z_scores(outputs: Tensor, mean: Tensor, variance: Tensor) -> tuple[float, float]:
    """The largest deviation of the sample mean and variance, in their own standard errors."""
    centred = outputs - mean
    of_mean = (centred.mean(dim=0) / (variance / len(outputs)).sqrt()).abs().max().item()
    fourth = (centred**4).mean(dim=0)
    of_variance = ((centred**2).mean(dim=0) - variance) / ((fourth - variance**2) / len(outputs)).sqrt()
    return of_mean, of_variance.abs().max().item()


@pytest.mark.parametrize("masks", ["shared", "per_example"])
@pytest.mark.parametrize("strategy", ["loop", "vmap", "fold", "fold_tail", "replay", "compact"])
def test_mean_and_variance_are_the_closed_forms(strategy: Any, masks: Any) -> None:
    net = network()
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    predictor = bg.MCDropout(net, masks=masks, strategy=strategy, balanced=False, num_samples=DRAWS)
    if strategy in ("loop", "replay", "compact"):
        predictor.num_samples = 4000
    scores = z_scores(predictor.draw_outputs(x), *exact(net, x))
    assert max(scores) < 5


def test_each_balanced_draw_has_the_closed_forms() -> None:
    """One draw of each block of eight: these are independent, and each has the law of ordinary dropout."""
    net = network()
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs = bg.MCDropout(net, strategy="fold").draw_outputs(x, num_samples=8 * DRAWS)
    for position in range(8):
        assert max(z_scores(outputs[position::8], *exact(net, x))) < 5


def block_means_z(net: nn.Sequential, x: Tensor, balanced: bool) -> float:
    """The variance of the mean of eight draws against its closed form, in standard errors of that variance.

    A unit is dropped k = floor(8 p) times or once more, so of p only the fraction f = 8 p - k is left to chance:
    the mask's mean has the variance f (1 - f) / 64.
    """
    rate = round(RATE * 2**16) / 2**16
    fraction = 8 * rate - int(8 * rate)
    outputs = bg.MCDropout(net, strategy="fold", balanced=balanced).draw_outputs(x, num_samples=8 * 4000)
    means = outputs.unflatten(0, (-1, 8)).mean(dim=1)
    mean, variance = exact(net, x)
    variance = variance * (fraction * (1 - fraction) / 64 / (rate * (1 - rate)))
    return z_scores(means, mean, variance)[1]


def test_balanced_draws_leave_only_the_rounding_of_their_number_to_chance() -> None:
    net = network()
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert block_means_z(net, x, balanced=True) < 5
    assert block_means_z(net, x, balanced=False) > 5


def test_the_test_has_power() -> None:
    """The twin: a dropout that forgets to scale what it keeps is caught by the same statistic."""
    net = network()
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    keep = torch.rand(4000, 1, 6, generator=torch.Generator().manual_seed(2)) >= RATE
    outputs = net[1](x * keep).detach()
    assert max(z_scores(outputs, *exact(net, x))) > 5


def test_draws_that_are_not_balanced_are_independent() -> None:
    """Neighbouring draws do not correlate: the lag-1 autocorrelation is within five standard errors of 0."""
    net = network()
    x = torch.ones(1, 6, dtype=torch.float64)
    outputs = bg.MCDropout(net, strategy="fold", balanced=False).draw_outputs(x, num_samples=DRAWS)[:, 0]
    centred = outputs - outputs.mean(dim=0)
    correlation = (centred[1:] * centred[:-1]).mean(dim=0) / centred.var(dim=0)
    assert correlation.abs().max() < 5 / DRAWS**0.5


def test_regression_predictive_has_the_law_of_total_variance() -> None:
    """Gaussian noise 0.5: the total variance is its square plus that of the draws."""
    net = network()
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    predictor = bg.MCDropout(net, bg.likelihoods.Gaussian(scale=0.5).double(), strategy="fold", num_samples=DRAWS)
    parts = predictor(x).uncertainty()
    _, variance = exact(net, x)
    outputs = predictor.draw_outputs(x)
    fourth = ((outputs - outputs.mean(dim=0)) ** 4).mean(dim=0)
    error = ((fourth - variance**2) / DRAWS).sqrt()
    assert torch.allclose(parts.aleatoric, torch.full_like(parts.aleatoric, 0.25))
    assert ((parts.epistemic - variance) / error).abs().max() < 5


def test_standard_error_is_that_of_the_mean() -> None:
    net = network()
    x = torch.ones(1, 6, dtype=torch.float64)
    predictor = bg.MCDropout(net, bg.likelihoods.Gaussian(scale=0.5).double(), strategy="fold")
    means = torch.stack([predictor(x, num_samples=50, seed=seed).mean for seed in range(400)])
    claimed = predictor(x, num_samples=5000).standard_error * (5000 / 50) ** 0.5
    # The standard deviation of 400 means is known to 1 / sqrt(2 * 400) of itself, the claim to 1 / sqrt(2 * 5000).
    assert torch.allclose(means.std(dim=0), claimed, rtol=5 * (1 / 800 + 1 / 10000) ** 0.5)
