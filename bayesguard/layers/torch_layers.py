"""torch's layers with distributions over their weights: the same arguments, and four more by name.

Each takes `prior` (`priors.Normal(1.0)`), `posterior` (a family of `guides.FAMILIES`: "normal", "low_rank", ...),
`estimator` ("shared", "local_reparameterisation", "flipout") and `init_scale`, the first standard deviation of a weight.
"""

from typing import Any

from torch import nn

from bayesguard.errors import BadInput
from bayesguard.layers.base import BayesianLayer
from bayesguard.priors import Prior
from bayesguard.sampling.estimators import Estimator


class _Layer(BayesianLayer):
    # Estimators that treat examples apart know dense and convolutional calls only.
    only_shared = False

    def __init__(
        self,
        *args: Any,
        prior: Prior | None = None,
        posterior: str = "normal",
        estimator: Estimator = "shared",
        init_scale: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.check_covered(estimator)
        self.make_bayesian(prior, posterior, estimator, init_scale)

    @classmethod
    def check_covered(cls, estimator: Estimator) -> None:
        """Raise BadInput for an estimator that would silently be the shared draw here."""
        if cls.only_shared and estimator != "shared":
            raise BadInput(f'a {cls.__name__} layer has the estimator "shared" only, got {estimator!r}')


class Linear(_Layer, nn.Linear):
    """`torch.nn.Linear` with a distribution over its weights.

    Examples:
        >>> import torch
        >>> Linear(3, 2, estimator="flipout")(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """


class Conv1d(_Layer, nn.Conv1d):
    """`torch.nn.Conv1d` with a distribution over its weights."""


class Conv2d(_Layer, nn.Conv2d):
    """`torch.nn.Conv2d` with a distribution over its weights."""


class Conv3d(_Layer, nn.Conv3d):
    """`torch.nn.Conv3d` with a distribution over its weights."""


class ConvTranspose2d(_Layer, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` with a distribution over its weights."""


class Embedding(_Layer, nn.Embedding):
    """`torch.nn.Embedding` with a distribution over its table; the row of `padding_idx` is never random."""

    only_shared = True


class LSTM(_Layer, nn.LSTM):
    """`torch.nn.LSTM` with a distribution over the weights of all its layers and directions."""

    only_shared = True


class GRU(_Layer, nn.GRU):
    """`torch.nn.GRU` with a distribution over the weights of all its layers and directions."""

    only_shared = True


class MultiheadAttention(_Layer, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with a distribution over its projections, the last one included."""

    only_shared = True


# What `convert` replaces, by torch's exact type.
BY_TYPE: dict[type[nn.Module], type[_Layer]] = {
    nn.Linear: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.Embedding: Embedding,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.MultiheadAttention: MultiheadAttention,
}
