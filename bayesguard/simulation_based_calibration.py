"""Simulation-based calibration: does a sampler, on average over data, give the posterior that it claims to give?

S. Talts, M. Betancourt, D. Simpson, A. Vehtari, A. Gelman (2018). Validating Bayesian inference algorithms with
simulation-based calibration. arXiv:1804.06788, algorithm 2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesguard.checks import check_count, check_level
from bayesguard.errors import BadInput
from bayesguard.sampling import derive_seed


@dataclass(frozen=True)
class Calibration:
    """What simulation-based calibration found.

    Attributes:
        ranks: Rank of the true value among the posterior draws, int64 `[simulations, P]`, 0 to L.
        num_draws: L, posterior draws of a simulation.
        p_values: For each quantity, that of a chi-square test of uniform ranks, `[P]`.
    """

    ranks: Tensor
    num_draws: int
    p_values: Tensor

    def passed(self, alpha: float = 0.01) -> bool:
        """Tell whether no quantity's ranks are uneven, at level `alpha` over all quantities together (Bonferroni)."""
        return bool((self.p_values >= check_level(alpha, "alpha") / len(self.p_values)).all())


def simulation_based_calibration(
    prior: Callable[[int], Tensor],
    simulate: Callable[[Tensor, int], Any],
    posterior: Callable[[Any, int], Tensor],
    *,
    num_simulations: int = 200,
    num_bins: int = 10,
    seed: int = 0,
) -> Calibration:
    """Draw parameters from the prior, data from them, and rank the parameters among draws of the posterior of the data.

    Where the sampler is right the ranks are uniform. Dependent draws make them uneven: thin Markov chains until their
    effective sample size is about L.

    Args:
        prior: `seed -> parameters [P]`.
        simulate: `(parameters, seed) -> data`, in any form that `posterior` takes.
        posterior: `(data, seed) -> draws [L, P]`, of one L always.
        num_simulations: Data sets.
        num_bins: Bins of the ranks; it must divide L + 1, and leave five simulations for a bin.
        seed: Seed of the seeds that are handed out.

    Raises:
        BadInput: Shapes that do not fit, draws that are not finite, or bins that do not divide the ranks evenly.

    Examples:
        >>> def normal(loc, scale, shape, seed):
        ...     return loc + scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        >>> found = simulation_based_calibration(
        ...     prior=lambda seed: normal(0, 1, (1,), seed),
        ...     simulate=lambda mean, seed: normal(mean, 1, (1,), seed),
        ...     posterior=lambda x, seed: normal(x / 2, 0.5**0.5, (19, 1), seed),
        ... )
        >>> found.passed(), tuple(found.ranks.shape)
        (True, (200, 1))
    """
    check_count(num_simulations, "num_simulations")
    check_count(num_bins, "num_bins", minimum=2)
    if num_simulations < 5 * num_bins:
        raise BadInput(f"num_simulations={num_simulations} leaves less than 5 for each of {num_bins} bins; use more")
    ranks, num_draws = [], None
    for number in range(num_simulations):
        truth = prior(derive_seed(seed, "prior", number))
        data = simulate(truth, derive_seed(seed, "data", number))
        draws = posterior(data, derive_seed(seed, "posterior", number))
        _check(truth, draws, num_draws, num_bins)
        num_draws = len(draws)
        ranks.append((draws < truth).sum(0))
    assert num_draws is not None
    found = torch.stack(ranks)
    return Calibration(found, num_draws, _p_values(found, num_draws, num_bins))


def _check(truth: Tensor, draws: Tensor, num_draws: int | None, num_bins: int) -> None:
    if truth.dim() != 1 or draws.dim() != 2 or draws.shape[1:] != truth.shape:
        raise BadInput(
            f"prior must give [P] and posterior [L, P], got {tuple(truth.shape)} and {tuple(draws.shape)} "
            "(flatten and concatenate parameters)"
        )
    if num_draws is not None and len(draws) != num_draws:
        raise BadInput(f"posterior gave {len(draws)} draws after {num_draws}; the number must be one")
    if (len(draws) + 1) % num_bins:
        raise BadInput(
            f"num_bins={num_bins} does not divide the {len(draws) + 1} possible ranks; use L = 19, 39, 99, ..."
        )
    if not bool(draws.isfinite().all() & truth.isfinite().all()):
        raise BadInput("prior or posterior gave values that are not finite")


def _p_values(ranks: Tensor, num_draws: int, num_bins: int) -> Tensor:
    bins = ranks * num_bins // (num_draws + 1)
    expected = len(ranks) / num_bins
    counts = torch.stack([(bins == k).sum(0) for k in range(num_bins)]).double()
    statistic = (counts - expected).square().sum(0) / expected
    # The upper tail of chi-square with num_bins - 1 degrees of freedom.
    return torch.special.gammaincc(statistic.new_tensor((num_bins - 1) / 2), statistic / 2)
