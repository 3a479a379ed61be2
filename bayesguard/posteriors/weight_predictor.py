"""What methods with a distribution over a network's own weights share: a prior to look at, and a Pyro program."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bayesguard.checks import check_count
from bayesguard.looks import with_one_look
from bayesguard.posteriors.pyro_program import NetworkProgram
from bayesguard.posteriors.weight_outputs import WeightOutputs
from bayesguard.predictive import Predictive
from bayesguard.predictive.parts import Part, collect
from bayesguard.predictor import Predictor
from bayesguard.priors import Prior
from bayesguard.sampling import Forward, seeded_default_generators
from bayesguard.weights import Weights


class WeightPredictor(Predictor):
    """Base of `Variational` and the samplers; a subclass sets what it declares here."""

    is_reweightable = True
    prior: Prior
    weights: Weights
    _outputs: WeightOutputs

    @torch.inference_mode(False)
    @torch.no_grad()
    def prior_predictive(
        self, *inputs: Any, num_samples: int | None = None, seed: int | None = None, **kwargs: Any
    ) -> Predictive:
        """Return what the prior alone says about each example: the predictive under weights drawn from it.

        Weights outside of `subset_of_weights` are as they are. Look at it before any data are used: a prior that is sure
        of its answers, or that allows absurd ones, is a bad start.

        Args:
            inputs: As for the predictor itself.
            num_samples: Draws; None for the predictor's own number.
            seed: Seed of the draws; None for the predictor's own.
            kwargs: The network's keyword inputs.
        """
        positional, keywords = self._prepare(inputs, kwargs)
        seed = self._seed(seed)
        samples = self.num_samples if num_samples is None else check_count(num_samples, "num_samples")
        forward = Forward(self.network, positional, keywords, self.output)

        def parts() -> Iterator[Part]:
            for outputs in self._outputs.chunks(forward, lambda some: self._from_prior(seed, some), range(samples)):
                yield Part(self.likelihood.predictive(outputs), len(outputs) / samples)

        return with_one_look(lambda: collect(parts(), keep=True))

    def _from_prior(self, seed: int, draws: range) -> Tensor:
        """Weights `[s, P]` drawn from the prior."""
        found = []
        for draw in draws:
            # torch's distributions know the default generator only.
            with seeded_default_generators(self._device, seed, "prior", draw):
                named = self.weights.named().items()
                parts = [self.prior.distribution(name, tensor).sample().reshape(-1) for name, tensor in named]
            found.append(torch.cat(parts))
        return torch.stack(found)

    def pyro_model(self, num_data: int) -> NetworkProgram:
        """Return the network with its prior and likelihood as a Pyro model, for any guide, ELBO or kernel of Pyro's.

        The model is `model(*inputs, targets=None)`: a sample site for each random parameter tensor, by its name in
        `named_parameters()`, and the observed site "obs". `PyroPredictor` makes a predictor of it and a posterior.

        Args:
            num_data: Rows of the training set, to which the log-likelihood of a batch is scaled.
        """
        return NetworkProgram(self, num_data)
