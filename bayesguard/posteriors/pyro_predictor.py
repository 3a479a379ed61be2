"""Any Pyro program with a posterior as a predictor.

E. Bingham et al. (2019). Pyro: deep universal probabilistic programming. JMLR 20.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bayesguard.checks import check_count
from bayesguard.data import batches, join_inputs, split_inputs, to_device
from bayesguard.errors import BadInput, BadType, NotFitted
from bayesguard.likelihoods import Likelihood
from bayesguard.posteriors.kept_draws import evenly_spaced
from bayesguard.posteriors.observed_site import ObservedSite
from bayesguard.posteriors.pyro_run import Arguments, PyroProgram, Run, scaled, take_apart
from bayesguard.predictor import Options, Predictor
from bayesguard.sampling import Forward, derive_seed, seeded_default_generators
from bayesguard.text_tensors import text_as_tensor, text_of_tensor

_DRAWS_PER_CHUNK = 8
# States of a chain depend on their neighbours.
_BLOCK = 8
# The key that marks a tensor's shape in a state.
_TENSOR = "tensor of"


class PyroPredictor(Predictor):
    """A Pyro model with a guide, or with samples of its posterior, as a predictor.

    Each draw runs the model once under one sample of the posterior; its observed site says what the predictive is of.
    Parameters are copied from the program and from Pyro's parameter store when the predictor is made, and live in it from
    then on: nothing that is done to the store later changes its answers, and predicting leaves the store as it was.
    Calls of all predictors of this kind take turns, because Pyro's handlers belong to the whole process.

    Args:
        model: `model(*inputs, targets=None)`, a function or module; without targets it must run all the same.
        posterior: A guide with the arguments of the model; or samples `{site: [S, *shape]}`; or a finished
            `pyro.infer.MCMC`, whose chains are kept apart.
        likelihood: What the model's returned value says about the target, as raw outputs; None where the observed site
            says it itself (Categorical, Bernoulli, Normal, Laplace, StudentT, Poisson, mixtures of such).
        observed: Name of the observed site.
        target_argument: The model's argument of the targets; None for the one after the inputs.
        from_prior: Sites that the posterior does not have and that are drawn from the model, as noise of each example
            is. Others that it does not have are an error.
        elbo: What `loss` and `fit` maximise, of `pyro.infer`; None for `Trace_ELBO()`. It must have a differentiable
            loss; for others train with `pyro.infer.SVI`, and hand in the guide.
        num_samples: Draws in one prediction.
        options: `input_key`, `target_key`, `copy`, `seed`: see `Predictor`.

    Raises:
        BadInput: Sites that model and posterior do not share, or an observed site that is not there.
        BadType: A posterior, or a distribution of the observed site, that no predictive can be made of.
        NotFitted: A guide or a parameter that was never trained.

    Examples:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x, y=None):
        ...     weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("obs", dist.Normal(weight * x, 0.1), obs=y)
        >>> samples = {"weight": 2 + 0.05 * torch.randn(100)}
        >>> pred = PyroPredictor(model, samples)(torch.tensor([0.0, 1.0]))
        >>> pred.num_samples, bool(pred.variance[1] > pred.variance[0])
        (32, True)
    """

    takes_bayesian_layers = True
    is_reweightable = True
    network: PyroProgram

    def __init__(
        self,
        model: Callable[..., Any],
        posterior: Any,
        likelihood: Likelihood | None = None,
        *,
        observed: str = "obs",
        target_argument: str | None = None,
        from_prior: Sequence[str] = (),
        elbo: Any = None,
        num_samples: int = 32,
        **options: Unpack[Options],
    ) -> None:
        if options.get("output") is not None:
            raise BadInput("output= is not for PyroPredictor: the model returns what likelihood= takes")
        guide, samples, self._chains = take_apart(posterior)
        program = PyroProgram(model, guide, samples, observed, from_prior)
        super().__init__(program, likelihood, num_samples=num_samples, **options)
        if likelihood is None:
            self.likelihood = ObservedSite().eval()
        own = getattr(model, "target_argument", None)
        self.target_argument = own if target_argument is None else target_argument
        self.elbo = _check_elbo(elbo)
        # Samples are in an order of their own, and there is no end of a guide's.
        self.can_continue = guide is not None  # type: ignore[misc]
        self._example: Arguments | None = None
        self.register_load_state_dict_pre_hook(_prime_before_loading)  # type: ignore[no-untyped-call]

    # Training.

    def loss(self, inputs: Any, targets: Tensor, *, num_data: int) -> Tensor:
        """Return minus the ELBO divided by `num_data`, in nats, from torch's default generator.

        Where the program does not scale the observed site itself (by a plate with a subsample), all that is in a plate of
        the batch's rows is scaled to `num_data`.
        """
        from pyro.infer import Trace_ELBO

        check_count(num_data, "num_data")
        if self.network.guide is None:
            raise BadInput("posterior samples are not trained; hand in a guide, or sample again")
        self._prime(inputs, targets)
        positional, keywords = self._with_targets(inputs, targets)
        model, guide = (
            scaled(part, self.network.observed, len(targets), num_data)
            for part in (self.network.model, self.network.guide)
        )
        elbo = Trace_ELBO() if self.elbo is None else self.elbo  # type: ignore[no-untyped-call]
        with self.network.store():
            loss: Tensor = elbo.differentiable_loss(model, guide, *positional, **keywords)
        return loss / num_data

    @torch.inference_mode(False)
    def fit(self, data: Any, **settings: Any) -> Any:
        """Train guide and program by stochastic variational inference; arguments as for every predictor's `fit`."""
        with torch.random.fork_rng(devices=[]):
            size = settings.get("batch_size")
            read = batches(data, batch_size=size, input_key=self.input_key, target_key=self.target_key)
            first = next(iter(read))
        batch = to_device(first, self._device)
        if batch.targets is None:
            raise BadInput("data has no targets; batches must be (inputs, targets)")
        self._prime(join_inputs(batch), batch.targets)
        return super().fit(data, **settings)

    def _prime(self, inputs: Any, targets: Tensor) -> None:
        """Let an untrained guide make its parameters, from random numbers of its own."""
        if not self.network.is_primed:
            with seeded_default_generators(self._device, self.seed, "prime"):
                self.network.prime(split_inputs(inputs), self._with_targets(inputs, targets), adopt=True)
        self._remember(split_inputs(inputs))

    def _with_targets(self, inputs: Any, targets: Tensor) -> Arguments:
        positional, keywords = split_inputs(inputs)
        if self.target_argument is None:
            return (*positional, targets), keywords
        return positional, {**keywords, self.target_argument: targets}

    def validation_loss(self, data: Any, batch_size: int | None = None) -> float:
        """Return the mean NLL per example, in nats, of the mixture over eight draws (no calibration)."""
        return self.mixture_loss(data, batch_size)

    # Draws.

    def output_chunks(
        self,
        *inputs: Any,
        num_samples: int,
        seed: int,
        offset: int = 0,
        first_draw: int = 0,
        draws_per_chunk: int | None = None,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        """Yield raw outputs `[s, N, ...]` of consecutive draws from number `first_draw` on."""
        arguments = inputs, kwargs
        indices = self._indices(num_samples)
        step = min(draws_per_chunk or _DRAWS_PER_CHUNK, _DRAWS_PER_CHUNK)
        end = first_draw + num_samples
        for start in range(first_draw, end, step):
            draws = range(start, min(start + step, end))
            yield torch.stack([self.outputs_of(arguments, seed, draw, indices) for draw in draws])

    def outputs_of(self, arguments: Arguments, seed: int, draw: int, indices: list[int]) -> Tensor:
        """Return the raw outputs of one draw, a function of the seed and its number."""
        rows = Forward(self.network, *arguments).num_rows
        if rows == 0:
            # Pyro has no empty plates.
            return self.outputs_of(pytree.tree_map(_one_row, arguments), seed, draw, indices)[:0]
        run = self._run(arguments, seed, draw, indices)
        if isinstance(self.likelihood, ObservedSite):
            outputs = self.likelihood.outputs_of(run.distribution)
        elif isinstance(run.returned, Tensor):
            outputs = run.returned
        else:
            raise BadType(
                f"with likelihood= the model must return a tensor of raw outputs, it returned a "
                f"{type(run.returned).__name__}"
            )
        if len(outputs) != rows:
            raise BadInput(
                f"the observed site has shape {tuple(outputs.shape)} for {rows} examples; the first is theirs"
            )
        return outputs

    def _run(self, arguments: Arguments, seed: int, draw: int, indices: list[int]) -> Run:
        if not self.network.is_primed:
            with seeded_default_generators(self._device, self.seed, "prime"):
                self.network.prime(arguments, arguments)
        self._remember(arguments)
        with seeded_default_generators(self._device, seed, "pyro", draw), self.network.store():
            return self.network.run(arguments, indices[draw] if indices else 0)

    def _indices(self, num_samples: int) -> list[int]:
        """Which samples of the posterior a prediction uses; none where there is a guide."""
        return evenly_spaced(num_samples, self.network.num_kept) if self.network.num_kept else []

    def _samples(self, num_samples: int | None) -> int:
        kept = self.network.num_kept
        return min(self.num_samples, kept) if num_samples is None and kept else super()._samples(num_samples)

    def draw(self, seed: int) -> nn.Module:
        """Return the program under one sample of its posterior: a module that gives raw outputs."""
        return ProgramDraw(self, seed)

    def weight_draws(self, num_samples: int | None = None, seed: int | None = None) -> dict[str, Tensor]:
        """Return the latent values of each draw by site, `[S, *shape]`; those of single examples are left out.

        Raises:
            NotFitted: There is a guide, and nothing was predicted yet (guides run on inputs only).
        """
        if self._example is None:
            raise NotFitted("a program runs on inputs only; predict something first")
        samples, seed = self._samples(num_samples), self._seed(seed)
        indices = self._indices(samples)
        with torch.no_grad():
            runs = [self._run(self._example, seed, draw, indices).latents for draw in range(samples)]
        return {site: torch.stack([run[site] for run in runs]) for site in runs[0]}

    @property
    def num_chains(self) -> int:
        """How many chains the posterior samples come from."""
        return self._chains

    @property
    def draws_per_block(self) -> int:
        """How many consecutive draws depend on one another: states of a chain do."""
        return _BLOCK if self._chains > 1 else 1

    @property
    def strategy(self) -> str:
        """How the last prediction was computed."""
        return "loop (one run of the program for each draw)"

    # What is kept, so that a guide that makes its parameters when it is first called can be loaded.

    def _remember(self, arguments: Arguments) -> None:
        def first_row(value: Any) -> Any:
            return value[:1].detach().clone() if isinstance(value, Tensor) and value.dim() else value

        if self._example is None:
            self._example = pytree.tree_map(first_row, arguments)

    def get_extra_state(self) -> Any:
        """Return the shapes of the inputs, as bytes: files of tensors hold nothing else."""
        shapes = pytree.tree_map(_shape_of, self._example)
        # Keys of mappings are texts, and so JSON gives back what it was given.
        return text_as_tensor(json.dumps(shapes))

    def set_extra_state(self, state: Any) -> None:
        """Nothing: the shapes have been used before anything was loaded."""


def _prime_before_loading(predictor: PyroPredictor, state: dict[str, Any], prefix: str, *more: Any) -> None:
    example = state.get(f"{prefix}_extra_state")
    if isinstance(example, Tensor):  # older states hold the inputs themselves
        example = _of_shapes(json.loads(text_of_tensor(example)), predictor._device)
    if example is None or predictor._example is not None:
        return
    inputs = example[0] if example[0] else example[1]
    arguments = example[0], example[1]
    with seeded_default_generators(predictor._device, predictor.seed, "prime"):
        targets = predictor.network.targets_for(arguments)
    predictor._prime(inputs, targets)


def _shape_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return {_TENSOR: [list(leaf.shape), str(leaf.dtype).removeprefix("torch.")]}
    return leaf if leaf is None or isinstance(leaf, (bool, int, float, str)) else None


def _of_shapes(shapes: Any, device: torch.device) -> Any:
    """Zeros in place of shapes."""
    if isinstance(shapes, dict):
        if _TENSOR in shapes:
            shape, dtype = shapes[_TENSOR]
            return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
        return {name: _of_shapes(value, device) for name, value in shapes.items()}
    return tuple(_of_shapes(value, device) for value in shapes) if isinstance(shapes, list) else shapes


def _check_elbo(elbo: Any) -> Any:
    if elbo is not None and not hasattr(elbo, "differentiable_loss"):
        raise BadInput(
            f"elbo has no differentiable loss ({type(elbo).__name__}); use Trace_ELBO(), TraceMeanField_ELBO(), ... of "
            "pyro.infer, or train with pyro.infer.SVI and hand in the guide"
        )
    return elbo


def _one_row(value: Any) -> Any:
    """A row of zeros in place of none."""
    return value.new_zeros(1, *value.shape[1:]) if isinstance(value, Tensor) and value.dim() else value


class ProgramDraw(nn.Module):
    """The program of a predictor under one sample of its posterior: deterministic, differentiable in its inputs."""

    def __init__(self, predictor: PyroPredictor, seed: int) -> None:
        super().__init__()
        self.predictor, self.seed = predictor, seed

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        kept = self.predictor.network.num_kept
        indices = [derive_seed(self.seed, "which sample") % kept] if kept else []
        return self.predictor.outputs_of((inputs, kwargs), self.seed, 0, indices)
