"""One trained network, taken as it is: the baseline, and what every ensemble is made of."""

import warnings
from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from bayesguard.errors import RandomnessWarning
from bayesguard.likelihoods import Likelihood
from bayesguard.predictor import Options, Predictor
from bayesguard.sampling import Forward, seeded_default_generators


class Deterministic(Predictor):
    """A single network behind the interface of every other method: one draw, no epistemic uncertainty.

    Args:
        network: The trained network; its outputs are raw.
        likelihood: What the outputs say about the target; None for `likelihoods.Categorical()`.
        options: `output`, `input_key`, `target_key`, `copy`, `seed`: see `Predictor`.

    Examples:
        >>> import torch
        >>> predictor = Deterministic(torch.nn.Linear(4, 3))
        >>> pred = predictor(torch.zeros(2, 4))
        >>> pred.probs.shape, pred.uncertainty().epistemic
        (torch.Size([2, 3]), tensor([0., 0.]))
    """

    def __init__(self, network: nn.Module, likelihood: Likelihood | None = None, **options: Unpack[Options]) -> None:
        super().__init__(network, likelihood, num_samples=1, **options)
        self._own_randomness: bool | None = None

    def output_chunks(
        self, *inputs: Any, num_samples: int, seed: int, offset: int = 0, **kwargs: Any
    ) -> Iterator[Tensor]:
        """Yield the network's outputs `[1, N, ...]`; there is one function, however many draws are asked for."""
        forward = Forward(self.network, inputs, kwargs, self.output, copies=True)
        if self._own_randomness is None and forward.num_rows:
            self._own_randomness = _differs(forward, seed)
        if self._own_randomness:
            with seeded_default_generators(forward.device, seed):
                outputs = forward()
        else:
            outputs = forward()
        yield outputs.unsqueeze(0)

    def predictives(self, *inputs: Any, num_samples: int, **more: Any) -> Iterator[Any]:
        return super().predictives(*inputs, num_samples=1, **more)

    def draw(self, seed: int) -> nn.Module:
        """Return the network itself: the posterior has one function."""
        return _Outputs(self)

    @property
    def is_exact(self) -> bool:
        return True

    @property
    def strategy(self) -> str:
        return "single pass"


class _Outputs(nn.Module):
    """The raw outputs of a deterministic predictor as a module."""

    def __init__(self, predictor: Deterministic) -> None:
        super().__init__()
        self.network, self.output = predictor.network, predictor.output

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        return Forward(self.network, inputs, kwargs, self.output, copies=True)()


def _differs(forward: Forward, seed: int) -> bool:
    """Tell, with a warning, whether two passes over the first rows in eval mode disagree."""
    few = forward.rows(slice(0, 2))
    with seeded_default_generators(forward.device, seed):
        differs = not torch.equal(few().nan_to_num(), few().nan_to_num())
    if differs:
        warnings.warn(
            "the network is random in eval mode (functional dropout called without training=self.training?): its "
            "answers depend on the seed; wrap it in MCDropout to treat it as random",
            RandomnessWarning,
            stacklevel=2,
        )
    return differs
