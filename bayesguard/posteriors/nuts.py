"""The No-U-Turn sampler and Hamiltonian Monte Carlo."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.likelihoods import Likelihood
from bayesguard.posteriors.mcmc import MarkovChains

KernelPotential = Callable[[dict[str, Tensor]], Tensor]


class NUTS(MarkovChains):
    """The No-U-Turn sampler over the weights of a small network, or of the last layer of a large one.

    Args:
        network: See `MarkovChains`, as for the arguments that are not listed here.
        likelihood: What the outputs say about the target.
        target_accept: Acceptance rate that the step size is adapted to.
        max_tree_depth: A transition takes at most two to this power gradients.
        settings: `prior`, `subset_of_weights`, `num_samples`, and the options of `Predictor`.

    References:
        Hoffman, Gelman, 2014, JMLR 15, algorithm 6, as Pyro implements it (with multinomial sampling).

    Examples:
        >>> import torch, warnings, bayesguard as bg
        >>> warnings.simplefilter("ignore", bg.ConvergenceWarning)  # so short are chains in an example only
        >>> x = torch.linspace(-1, 1, 20).reshape(-1, 1)
        >>> nuts = NUTS(torch.nn.Linear(1, 1), bg.likelihoods.Gaussian(scale=0.1), num_samples=40)
        >>> pred = nuts.fit((x, 2 * x), num_samples=100, num_chains=2, warmup=50)(x)
        >>> pred.num_samples, bool((pred.mean - 2 * x).abs().max() < 0.2)
        (40, True)
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood | None = None,
        *,
        target_accept: float = 0.8,
        max_tree_depth: int = 10,
        **settings: Any,
    ) -> None:
        super().__init__(network, likelihood, **settings)
        self.target_accept = _rate(target_accept)
        self.max_tree_depth = check_count(max_tree_depth, "max_tree_depth")

    def _kernel(self, potential: KernelPotential) -> Any:
        from pyro.infer import NUTS as Kernel

        settings = {"target_accept_prob": self.target_accept, "max_tree_depth": self.max_tree_depth}
        return Kernel(potential_fn=potential, **settings)  # type: ignore[no-untyped-call]


class HMC(MarkovChains):
    """Hamiltonian Monte Carlo with a fixed number of leapfrog steps.

    Args:
        network: See `MarkovChains`, as for the arguments that are not listed here.
        likelihood: What the outputs say about the target.
        num_steps: Leapfrog steps of a transition.
        target_accept: Acceptance rate that the step size is adapted to.
        settings: `prior`, `subset_of_weights`, `num_samples`, and the options of `Predictor`.

    References:
        Neal, 2011, Handbook of Markov chain Monte Carlo, chapter 5.
    """

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood | None = None,
        *,
        num_steps: int = 20,
        target_accept: float = 0.8,
        **settings: Any,
    ) -> None:
        super().__init__(network, likelihood, **settings)
        self.num_steps, self.target_accept = check_count(num_steps, "num_steps"), _rate(target_accept)

    def _kernel(self, potential: KernelPotential) -> Any:
        from pyro.infer import HMC as Kernel

        settings = {"target_accept_prob": self.target_accept, "num_steps": self.num_steps}
        return Kernel(potential_fn=potential, **settings)


def _rate(target_accept: float) -> float:
    if not 0 < target_accept < 1:
        raise BadInput(f"target_accept must lie strictly between 0 and 1, got {target_accept}")
    return float(target_accept)
