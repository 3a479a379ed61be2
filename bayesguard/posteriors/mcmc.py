"""Markov chain Monte Carlo over a network's weights, by Pyro's kernels.

M. D. Hoffman, A. Gelman (2014). The No-U-Turn sampler: adaptively setting path lengths in Hamiltonian Monte Carlo. JMLR 15.
R. M. Neal (2011). MCMC using Hamiltonian dynamics. In: Handbook of Markov chain Monte Carlo.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from bayesguard.checks import check_count
from bayesguard.data import batches, split_inputs, to_device
from bayesguard.errors import BadInput, ConvergenceWarning, NotFitted
from bayesguard.likelihoods import Likelihood
from bayesguard.posteriors.kept_draws import evenly_spaced
from bayesguard.posteriors.variational import WeightDraw, check_alike
from bayesguard.posteriors.weight_outputs import WeightOutputs, head_of
from bayesguard.posteriors.weight_predictor import WeightPredictor
from bayesguard.predictor import Options
from bayesguard.priors import Prior, check_prior
from bayesguard.pyro_scope import pyro_scope
from bayesguard.sampling import Forward, derive_seed, seeded_default_generators, stream
from bayesguard.sampling.random_weights import RandomWeights
from bayesguard.training_setup import check_trainable
from bayesguard.weights import Subset, Weights, select_weights

Potential = Callable[[Tensor], Tensor]

_BLOCK = 8
_WATCHED_ROWS = 64
# The curvature of this many weights takes as many gradients, once; correlated weights then cost no long trajectories.
_MAX_WHITENED = 500
# Vehtari, Gelman, Simpson, Carpenter, Bürkner, 2021, Bayesian Analysis 16: chains above it have not mixed.
_R_HAT = 1.01


class MarkovChains(WeightPredictor):
    """Base of the samplers: a network whose draws are the states of Markov chains over its weights.

    Args:
        network: The network, best trained already; its outputs are raw. Chains start around the maximum a posteriori.
        likelihood: What the outputs say about the target; a noise that it learns is fitted together with the maximum a
            posteriori, and held from then on. None for `likelihoods.Categorical()`.
        prior: An object of `bayesguard.priors`; None for `priors.Normal(scale=1.0)`.
        subset_of_weights: Which weights are sampled: "all", "last_layer", names of parameters or modules, or a predicate.
            The others stay as they are. For the last layer alone, its features are computed once.
        num_samples: Draws in one prediction, evenly spaced over all states that were kept.
        options: `output`, `input_key`, `target_key`, `copy`, `seed`: see `Predictor`.

    Attributes:
        draws: The states kept, `[chains, draws, P]`; empty before `fit`.
        divergences: How many transitions diverged, for each chain.
    """

    draws: Tensor

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood | None = None,
        *,
        prior: Prior | None = None,
        subset_of_weights: Subset = "all",
        num_samples: int = 200,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(network, likelihood, num_samples=num_samples, **options)
        self.prior = check_prior(prior)
        self.weights = Weights(self.network, select_weights(self.network, subset_of_weights))
        check_alike(self.weights)
        self.prior.joint(self.weights.named())
        self.register_buffer("draws", self.weights.flatten().detach().new_empty(0, 0, self.weights.size))
        self.divergences: list[int] = []
        self._outputs = WeightOutputs(self.weights)

    @abstractmethod
    def _kernel(self, potential: Callable[[dict[str, Tensor]], Tensor]) -> Any:
        """Pyro's kernel on the potential."""

    # Sampling.

    @torch.inference_mode(False)
    def fit(  # type: ignore[override]
        self,
        data: Any,
        *,
        num_samples: int = 1000,
        num_chains: int = 4,
        warmup: int = 500,
        map_steps: int = 200,
        n_jobs: int = 1,
        batch_size: int | None = None,
    ) -> Self:
        """Sample the weights given all of the data, which are held in memory.

        Args:
            data: A DataLoader, an iterable of batches, or a pair of arrays; one pass.
            num_samples: States kept of each chain.
            num_chains: Independent chains, each on random numbers of its own.
            warmup: Transitions before them, in which step size and mass matrix adapt.
            map_steps: Iterations of L-BFGS to the maximum a posteriori, around which chains start.
            n_jobs: Chains run at a time, each in a process of joblib's. The result does not depend on it.
            batch_size: Rows a batch, where `data` is a pair of arrays.

        Warns:
            ConvergenceWarning: The rank-normalised split R-hat of a weight or of a prediction is above 1.01, or
                transitions diverged.
        """
        from joblib import Parallel, delayed

        counts = {"num_samples": num_samples, "num_chains": num_chains, "warmup": warmup}
        for name, count in counts.items():
            check_count(count, name)
        check_trainable(self.parameters())
        inputs, targets = self._gathered(data, batch_size)
        potential = _PotentialOf(self, inputs, targets)
        start = self._maximum_a_posteriori(potential, check_count(map_steps, "map_steps", minimum=0))
        factor = _whitening(potential, start)
        seeds = [derive_seed(self.seed, "chain", chain) for chain in range(num_chains)]
        run = Parallel(n_jobs=n_jobs)
        found = run(delayed(_run_chain)(self, potential, start, factor, seed, num_samples, warmup) for seed in seeds)
        self.forget_calibration()
        self.set_draws(torch.stack([states for states, _ in found]))
        self.divergences = [count for _, count in found]
        self._warn_of_convergence(inputs)
        return self

    def set_draws(self, draws: Tensor) -> None:
        """Take states from elsewhere, `[chains, draws, P]`; the network's parameters become their mean."""
        if draws.dim() != 3 or draws.shape[-1] != self.weights.size or not draws.numel():
            raise BadInput(
                f"draws must have shape [chains, draws, {self.weights.size}] (the weights {', '.join(self.weights.names)}), "
                f"got {tuple(draws.shape)}"
            )
        if not bool(draws.isfinite().all()):
            raise BadInput("draws has values that are not finite")
        like = self.weights.slots[0].tensor
        self.draws = draws.detach().to(like)
        self._write(self.draws.double().mean((0, 1)).to(like))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(prefix + "draws")
        if isinstance(saved, Tensor) and saved.dim() == 3 and saved.shape[-1] == self.weights.size:
            # How many states there are is known after fitting only.
            self.draws = self.draws.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def _write(self, flat: Tensor) -> None:
        for tensor, value in zip(self.weights.tensors(), self.weights.split(flat), strict=True):
            tensor.copy_(value)

    def _gathered(self, data: Any, batch_size: int | None) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Tensor]:
        dtype = self.weights.slots[0].tensor.dtype
        with torch.random.fork_rng(devices=[]):
            read = batches(
                data, batch_size=batch_size, numpy_dtype=dtype, input_key=self.input_key, target_key=self.target_key
            )
            parts = [to_device(batch, self._device) for batch in read]
        if any(batch.targets is None for batch in parts):
            raise BadInput("data has no targets; batches must be (inputs, targets)")
        positional = tuple(torch.cat(values) for values in zip(*(batch.inputs for batch in parts), strict=True))
        keywords = {name: torch.cat([batch.kwargs[name] for batch in parts]) for name in parts[0].kwargs}
        return (positional, keywords), torch.cat([batch.targets for batch in parts if batch.targets is not None])

    def _maximum_a_posteriori(self, potential: "_PotentialOf", steps: int) -> Tensor:
        start = self.weights.flatten().detach().clone().requires_grad_(True)
        learned = [parameter for parameter in self.likelihood.parameters() if parameter.requires_grad]
        if steps:
            optimizer = torch.optim.LBFGS([start, *learned], max_iter=steps, line_search_fn="strong_wolfe")

            def closure() -> Tensor:
                optimizer.zero_grad()
                value = potential(start)
                value.backward()
                return value.detach()

            optimizer.step(closure)
            self.likelihood.zero_grad(set_to_none=True)
        if not bool(start.isfinite().all()):
            raise BadInput(
                "the maximum a posteriori is not finite; standardise inputs and targets, or use another prior"
            )
        return start.detach()

    # Convergence.

    def convergence(self, *inputs: Any, **kwargs: Any) -> dict[str, float]:
        """Return the worst rank-normalised split R-hat and the least bulk ESS of weights, and of outputs on inputs.

        Weights of a network have symmetries, along which chains need not mix; what has to mix are its outputs.

        References:
            Vehtari, Gelman, Simpson, Carpenter, Bürkner, 2021, Bayesian Analysis 16.
        """
        import arviz

        states = self._states()
        chains = self.draws.shape[:2]
        figures = {"weights": self.draws}
        if inputs or kwargs:
            with torch.no_grad():
                positional, keywords = self._prepare(inputs, kwargs)
                forward = Forward(self.network, positional, keywords, self.output)
                outputs = list(
                    self._outputs.chunks(forward, lambda some: states[some.start : some.stop], range(len(states)))
                )
            figures["outputs"] = torch.cat(outputs).reshape(*chains, -1)
        report = {}
        for name, values in figures.items():
            columns = values.double().cpu().numpy()
            columns = columns[..., columns.reshape(-1, columns.shape[-1]).std(0) > 0]
            hats = [_figure(arviz.rhat, columns[..., k]) for k in range(columns.shape[-1])]
            sizes = [_figure(arviz.ess, columns[..., k]) for k in range(columns.shape[-1])]
            report[f"r_hat of {name}"], report[f"ess of {name}"] = max(hats, default=1.0), min(sizes, default=0.0)
        return report

    def _warn_of_convergence(self, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        troubles = []
        if self.draws.shape[0] > 1 and self.draws.shape[1] >= 4:
            positional, keywords = inputs
            rows = Forward(self.network, positional, keywords, self.output).rows(slice(0, _WATCHED_ROWS))
            report = self.convergence(*rows.inputs, **rows.kwargs)
            r_hats = {name: value for name, value in report.items() if "r_hat" in name and not value <= _R_HAT}
            troubles += [f"{name} is {value:.3f}" for name, value in r_hats.items()]
        if sum(self.divergences):
            troubles.append(f"{sum(self.divergences)} transitions diverged")
        if troubles:
            warnings.warn(
                f"the chains may not have converged: {', '.join(troubles)} (R-hat should be at most {_R_HAT}); raise warmup= "
                "and num_samples=, or sample the last layer only. Weights may fail to mix where outputs do",
                ConvergenceWarning,
                stacklevel=3,
            )

    # Draws.

    def _states(self) -> Tensor:
        """All states kept, chain after chain, `[chains * draws, P]`."""
        if not self.draws.numel():
            raise NotFitted(f"this {type(self).__name__} has no draws yet; call fit(data) first")
        return self.draws.reshape(-1, self.weights.size)

    def _chosen(self, num_samples: int) -> Tensor:
        states = self._states()
        return states[evenly_spaced(num_samples, len(states))]

    def _samples(self, num_samples: int | None) -> int:
        kept = self.draws.shape[0] * self.draws.shape[1]
        return min(self.num_samples, max(kept, 1)) if num_samples is None else super()._samples(num_samples)

    def output_chunks(
        self, *inputs: Any, num_samples: int, seed: int, offset: int = 0, **kwargs: Any
    ) -> Iterator[Tensor]:
        """Yield raw outputs `[s, N, ...]` of states evenly spaced over the chains; the seed changes nothing."""
        chosen = self._chosen(num_samples)
        forward = Forward(self.network, inputs, kwargs, self.output)
        yield from self._outputs.chunks(forward, lambda some: chosen[some.start : some.stop], range(num_samples))

    def draw(self, seed: int) -> nn.Module:
        """Return the network under one state, chosen by the seed."""
        states = self._states()
        return WeightDraw(self, states[derive_seed(seed, "which state") % len(states)])

    def weight_draws(self, num_samples: int | None = None, seed: int | None = None) -> dict[str, Tensor]:
        """Return the states of a prediction by name, `[S, *shape]`, chain after chain."""
        return self.weights.unflatten(self._chosen(self._samples(num_samples)))

    @property
    def num_chains(self) -> int:
        """How many chains the draws come from."""
        return self.draws.shape[0]

    @property
    def draws_per_block(self) -> int:
        """States in a row depend on one another; the error of a mean is told between blocks of them."""
        return _BLOCK

    @property
    def strategy(self) -> str:
        """How the last prediction was computed."""
        return self._outputs.strategy

    def loss(self, inputs: Any, targets: Tensor, *, num_data: int) -> Tensor:
        """Return minus the log joint density of data and weights, an unbiased estimate divided by `num_data`, in nats."""
        check_count(num_data, "num_data")
        positional, keywords = split_inputs(inputs)
        outputs = Forward(self.network, positional, keywords, self.output)()
        log_prior = self.prior.joint(self.weights.named()).log_prob(self.weights.flatten()).sum()
        return self.likelihood.loss(outputs, targets) - log_prior / num_data

    def extra_repr(self) -> str:
        chains, draws, size = self.draws.shape
        return f"{super().extra_repr()}, prior={self.prior}, {chains} chains of {draws} draws of {size} weights"


class _PotentialOf:
    """Minus the log joint density of all data and the weights `[P]`, written out: no program is traced."""

    def __init__(self, predictor: MarkovChains, inputs: Any, targets: Tensor) -> None:
        positional, keywords = inputs
        self.weights, self.likelihood = predictor.weights, predictor.likelihood
        self.prior = predictor.prior.joint(predictor.weights.named())
        whole = Forward(predictor.network, positional, keywords, predictor.output, copies=True)
        with torch.no_grad():
            self.forward = head_of(whole, predictor.weights) or whole
            # Looked at once: thousands of gradients follow.
            self.targets = self.likelihood.check_targets(self.forward(), targets)

    def __call__(self, flat: Tensor) -> Tensor:
        samples = dict(zip(map(id, self.weights.tensors()), self.weights.split(flat), strict=True))
        with RandomWeights(samples):
            outputs = self.forward()
        log_likelihood = self.likelihood._density(outputs, self.targets).sum()
        return -(log_likelihood + self.prior.log_prob(flat).sum())


def _whitening(potential: Potential, start: Tensor) -> Tensor | None:
    """Return a factor `[P, P]` of the inverse curvature at the maximum a posteriori; None where there is no such one.

    Chains move in coordinates in which the posterior is round there. It is a linear map, so that the states are exact.
    """
    if len(start) > _MAX_WHITENED:
        return None
    hessian = torch.autograd.functional.hessian(potential, start).double()
    root, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed) or not bool(root.isfinite().all()):
        return None
    unit = torch.eye(len(start), dtype=root.dtype, device=root.device)
    return torch.linalg.solve_triangular(root.T, unit, upper=True).to(start)


def _run_chain(
    predictor: MarkovChains,
    potential: _PotentialOf,
    start: Tensor,
    factor: Tensor | None,
    seed: int,
    num_samples: int,
    warmup: int,
) -> tuple[Tensor, int]:
    """Return the states of one chain `[draws, P]` and how many transitions diverged."""
    from pyro.infer import MCMC

    # Apart from one another, so that R-hat can tell; near enough to be typical of the posterior.
    noise = torch.randn(
        start.shape, dtype=start.dtype, device=start.device, generator=stream(start.device, seed, "start")
    )
    with pyro_scope(), seeded_default_generators(start.device, seed, "chain"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="pyro")
        diverged = [0]

        def count(kernel: Any, state: Any, stage: str, number: int) -> None:
            if stage == "Sample":
                diverged[0] = len(kernel.diagnostics().get("divergences", []))

        def weights(state: Tensor) -> Tensor:
            return state if factor is None else start + state @ factor.T

        kernel = predictor._kernel(lambda state: potential(weights(state["weights"])))
        chain = MCMC(  # type: ignore[no-untyped-call]
            kernel,
            num_samples=num_samples,
            warmup_steps=warmup,
            initial_params={"weights": start + 0.01 * noise if factor is None else noise},
            hook_fn=count,
            disable_progbar=True,
        )
        with torch.enable_grad():
            chain.run()
        states = weights(chain.get_samples()["weights"].detach())  # type: ignore[no-untyped-call]
    return states, diverged[0]


def _figure(statistic: Any, column: Any) -> float:
    return float(statistic(column))
