"""Variational inference: a distribution over the weights, fitted by maximising the evidence lower bound.

A. Graves (2011). Practical variational inference for neural networks. NeurIPS. C. Blundell, J. Cornebise,
K. Kavukcuoglu, D. Wierstra (2015). Weight uncertainty in neural networks. ICML.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from bayesguard.checks import check_count
from bayesguard.data import split_inputs
from bayesguard.errors import BadInput
from bayesguard.guides import Guide, MeanFieldNormal, make_guide
from bayesguard.layers import LayerPosteriors, LayerPriors, at_mean, bayesian_layers
from bayesguard.likelihoods import Likelihood
from bayesguard.posteriors.pyro_program import WeightGuide
from bayesguard.posteriors.weight_outputs import WeightOutputs
from bayesguard.posteriors.weight_predictor import WeightPredictor
from bayesguard.predictive.numerics import keep_freed_memory
from bayesguard.predictor import Options
from bayesguard.priors import Prior, check_prior
from bayesguard.sampling import Forward, stream
from bayesguard.sampling.estimators import Estimator, Moments, check_estimator, random_weights
from bayesguard.sampling.random_weights import RandomWeights
from bayesguard.weights import Subset, Weights, select_weights


class Variational(WeightPredictor):
    """A network with a distribution over its weights; each draw is the network under one sample of all of them.

    Works on any network: calls that take a random weight are handed its sample, and the network's own parameters are
    the posterior mean. `fit` maximises the evidence lower bound, in which the log-likelihood is scaled to the rows of
    the data (read from the loader) and the divergence from the prior counts every weight once.

    Args:
        network: The network, trained or not; its outputs are raw. Its weights are where the means start. Where it has
            Bayesian layers (`bayesguard.layers`), their posteriors are this predictor's, their weights the random ones,
            and `prior`, `guide`, `subset_of_weights`, `estimator`, `init_scale` and `relative` are left to them.
        likelihood: What the outputs say about the target; None for `likelihoods.Categorical()`.
        prior: An object of `bayesguard.priors`; None for `priors.Normal(scale=1.0)`.
        guide: The family of the posterior: "normal" (independent Gaussians), "low_rank", "full", "radial",
            "matrix_normal", "flow" (inverse autoregressive, for a few hundred weights), "delta" (the maximum a posteriori), or a factory `weights -> guides.Guide`.
        subset_of_weights: Which weights are random: "all", "last_layer", names of parameters or modules, or a predicate
            `(name, parameter) -> bool`. The others are trained as usual; frozen ones stay as they are.
        estimator: How `loss` estimates the expected log-likelihood: "shared" (one sample of the weights a batch),
            "local_reparameterisation" or "flipout" (for "normal" only).
        init_scale: First standard deviation of each weight.
        relative: `init_scale` is a share of each weight's size instead: for networks that are trained already.
        kl_weight: Factor of the divergence; 1 is Bayes' rule, less a "cold" posterior.
        kl_warmup: Steps of the optimizer over which that factor grows from 0, linearly. One that asks for the loss several
            times a step, as L-BFGS, counts as many.
        antithetic: Draws come in pairs with opposite noise: every draw by itself is as it was, and the error of their
            mean is smaller. False for independent draws.
        num_samples: Draws in one prediction.
        options: `output`, `input_key`, `target_key`, `copy`, `seed`: see `Predictor`.

    Raises:
        BadInput: A family, an estimator or a subset that is not known, or that do not go together.

    Examples:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> predictor = Variational(network, init_scale=0.1, num_samples=20)
        >>> pred = predictor(torch.ones(2, 4))
        >>> pred.num_samples, bool((pred.uncertainty().epistemic > 0).all())
        (20, True)
    """

    can_continue = True
    takes_bayesian_layers = True
    steps: Tensor

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood | None = None,
        *,
        prior: Prior | None = None,
        guide: str | Callable[[Weights], Guide] = "normal",
        subset_of_weights: Subset = "all",
        estimator: Estimator = "shared",
        init_scale: float = 0.01,
        relative: bool = False,
        kl_weight: float = 1.0,
        kl_warmup: int = 0,
        antithetic: bool = True,
        num_samples: int = 32,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(network, likelihood, num_samples=num_samples, **options)
        self.estimator = check_estimator(estimator)
        self.guide: Guide
        if bayesian_layers(self.network):
            given = {"prior": prior, "guide": guide, "subset_of_weights": subset_of_weights, "estimator": estimator}
            _check_left_alone({**given, "init_scale": init_scale, "relative": relative})
            self.guide, self.prior = LayerPosteriors(self.network), LayerPriors(self.network)
            self.weights = self.guide.weights
        else:
            self.prior = check_prior(prior)
            self.weights = Weights(self.network, select_weights(self.network, subset_of_weights))
            self.prior.joint(self.weights.named())  # A prior that does not fit shows here and not in training.
            settings = {"init_scale": init_scale, "relative": relative} if isinstance(guide, str) else {}
            self.guide = make_guide(guide, self.weights, **settings)
        check_alike(self.weights)
        self.guide.training = False
        if self.estimator != "shared" and not isinstance(self.guide, MeanFieldNormal):
            raise BadInput(
                f'estimator={estimator!r} needs independent Gaussian weights, guide="normal"; with this guide use "shared"'
            )
        if not kl_weight >= 0:
            raise BadInput(f"kl_weight must be 0 or more, got {kl_weight}")
        self.kl_weight, self.kl_warmup = float(kl_weight), check_count(kl_warmup, "kl_warmup", minimum=0)
        self.antithetic = antithetic and self.guide.noise_size > 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._outputs = WeightOutputs(self.weights)

    # Training.

    def loss(self, inputs: Any, targets: Tensor, *, num_data: int) -> Tensor:
        """Return minus the evidence lower bound, divided by `num_data`: an unbiased estimate from one batch, in nats.

        Its random numbers come from torch's default generator. With `kl_warmup`, calls that record gradients count.
        """
        check_count(num_data, "num_data")
        self.weights.check_in(self.network)
        keep_freed_memory()  # As `fit` does: a sample and its gradients are freed and made again in every step.
        positional, keywords = split_inputs(inputs)
        forward = Forward(self.network, positional, keywords, self.output)
        if isinstance(self.guide, LayerPosteriors):
            # The layers draw for themselves, each with the estimator that it was made with.
            outputs, divergence = forward(), self.kl_divergence()
        else:
            # Half precision is for the network's matrix products; a divergence is a sum over all weights.
            with torch.autocast(self._device.type, enabled=False):
                sample, divergence = self.guide.parts_with_kl(self.prior)
            with self._training_mode(sample):
                outputs = forward()
        loss = self.likelihood.loss(outputs, targets)
        return loss + self._next_kl_weight() / num_data * divergence

    def kl_divergence(self) -> Tensor:
        """Return the divergence of the posterior from the prior in nats, over all weights; see `Guide.kl`."""
        return self.guide.draw_with_kl(self.prior)[1]

    def _training_mode(self, sample: list[Tensor]) -> RandomWeights:
        tensors = self.weights.tensors()
        samples = dict(zip(map(id, tensors), sample, strict=True))
        if self.estimator == "shared":
            return random_weights("shared", samples)
        stddevs = self.weights.split(self.guide.stddev())
        moments = {id(tensor): Moments(tensor, stddev) for tensor, stddev in zip(tensors, stddevs, strict=True)}
        return random_weights(self.estimator, samples, moments)

    def _next_kl_weight(self) -> float:
        if not self.kl_warmup:
            return self.kl_weight
        share = int(self.steps) / self.kl_warmup
        if share < 1 and torch.is_grad_enabled():
            self.steps += 1
        return self.kl_weight * share

    def pyro_guide(self) -> WeightGuide:
        """Return the posterior as a Pyro guide of `pyro_model(num_data)`, for an ELBO or an optimizer of Pyro's.

        Raises:
            BadInput: A radial, matrix normal or layer-wise posterior, which Pyro has no density for.
        """
        return WeightGuide(self)

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
        if self.is_exact:
            num_samples, first_draw = 1, 0
        forward = Forward(self.network, inputs, kwargs, self.output)
        draws = range(first_draw, first_draw + num_samples)
        mirrored = self.antithetic and self.guide.is_odd
        self.weights.check_in(self.network)
        self._outputs.keep_draws_of(self.guide.tensors)
        flats = partial(self._flats, seed)
        yield from self._outputs.chunks(forward, flats, draws, draws_per_chunk, mirrored=mirrored)

    def predictives(self, *inputs: Any, num_samples: int, **more: Any) -> Iterator[Any]:
        return super().predictives(*inputs, num_samples=1 if self.is_exact else num_samples, **more)

    def draw(self, seed: int) -> nn.Module:
        """Return the network under one sample of its weights."""
        return WeightDraw(self, self._sample(seed, 0))

    def weight_draws(self, num_samples: int | None = None, seed: int | None = None) -> dict[str, Tensor]:
        """Return samples of the random weights by name, `[S, *shape]`: those under which `draw_outputs` runs."""
        samples, seed = self._samples(num_samples), self._seed(seed)
        return self.weights.unflatten(torch.stack([self._sample(seed, draw) for draw in range(samples)]))

    def _flats(self, seed: int, draws: range) -> Tensor:
        """The weights of some draws `[s, P]`, each a function of the seed, its number and `guide.tensors`."""
        # The guide itself: another one may be made of the same numbers.
        key = (seed, draws, self.antithetic, self.guide)
        return self._outputs.remembered(key, lambda: torch.stack([self._sample(seed, draw) for draw in draws]))

    @torch.no_grad()
    def _sample(self, seed: int, draw: int) -> Tensor:
        pair, second = divmod(draw, 2) if self.antithetic else (draw, 0)
        return self.guide.draw(stream(self._device, seed, "weights", pair), opposite=bool(second))

    @property
    def draws_per_block(self) -> int:
        """Consecutive draws that share their noise: pairs, where they are antithetic."""
        return 2 if self.antithetic else 1

    @property
    def is_exact(self) -> bool:
        """Whether the posterior is a point."""
        return self.guide.noise_size == 0

    @property
    def strategy(self) -> str:
        """How the last prediction was computed."""
        return self._outputs.strategy

    def explain(self) -> str:
        """Say how the last prediction was computed and why; where ways were timed, what draws cost and what memory they take.

        The cost is that of outputs under given weights, which are made at the first batch and kept for the others while they
        fit into 256 MiB.
        """
        plan = self._outputs.last
        if plan is None:
            return super().explain()
        return super().explain() + plan.explain(self.num_samples, self._outputs.kept_bytes(self.num_samples))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, prior={self.prior}, estimator={self.estimator!r}"


class WeightDraw(nn.Module):
    """The network of a predictor under given weights: deterministic and differentiable in its inputs."""

    def __init__(self, predictor: Any, flat: Tensor) -> None:
        super().__init__()
        self.network, self.output, self.weights = predictor.network, predictor.output, predictor.weights
        self.register_buffer("flat", flat)

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        forward = Forward(self.network, inputs, kwargs, self.output, copies=True)
        samples = dict(zip(map(id, self.weights.tensors()), self.weights.split(self.flat), strict=True))
        with at_mean(), RandomWeights(samples):
            return forward()


_OF_LAYERS = {
    "guide": "normal",
    "subset_of_weights": "all",
    "estimator": "shared",
    "init_scale": 0.01,
    "relative": False,
}


def _check_left_alone(given: dict[str, Any]) -> None:
    """Raise BadInput where an argument would silently do nothing, because the network's layers have it already."""
    changed = [name for name, value in given.items() if value is not None and value != _OF_LAYERS.get(name)]
    if changed:
        raise BadInput(
            f"the network has Bayesian layers, which have their own {', '.join(changed)}: leave it out here and give it to "
            "the layers, or hand in the network of plain layers"
        )


def check_alike(weights: Weights) -> None:
    """Raise BadInput where random weights have several dtypes or devices, and could not be one vector."""
    kinds = {(tensor.dtype, tensor.device) for tensor in weights.tensors()}
    if len(kinds) > 1:
        raise BadInput(
            f"the random weights have several dtypes or devices ({', '.join(sorted(map(str, kinds)))}); convert the "
            "network to one, or choose others with subset_of_weights="
        )
