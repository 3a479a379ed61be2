"""Priors over a network's weights: independent for every weight, with a scale for each tensor.

Variational inference, MCMC and the Bayesian layers share them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, MixtureSameFamily, constraints
from torch.distributions import Laplace as LaplaceDistribution
from torch.distributions import Normal as NormalDistribution
from torch.distributions import StudentT as StudentTDistribution

from bayesguard.checks import check_positive
from bayesguard.errors import BadInput
from bayesguard.exponential_integral import scaled_exponential_integral
from bayesguard.predictive.student import student_log_prob

Shape = torch.Size | list[int] | tuple[int, ...]


class Prior(ABC):
    """A distribution of every weight by itself.

    Args:
        scale: Scale of the prior, in the unit of the weights.
        by_fan_in: Divide the scale by the square root of the number of inputs of a unit, for tensors of two axes or
            more: the prior of a unit's sum is then the same for narrow and wide layers (Neal, 1996, section 2.1).
    """

    def __init__(self, scale: float = 1.0, *, by_fan_in: bool = False) -> None:
        self.scale, self.by_fan_in = check_positive(scale, "scale"), by_fan_in

    @abstractmethod
    def _make(self, loc: Tensor, scale: Tensor) -> Distribution:
        """Return the distribution for locations and scales of one shape."""

    def distribution(self, name: str, parameter: Tensor) -> Distribution:
        """Return the prior of one tensor: a torch distribution with its shape, dtype and device.

        Args:
            name: The parameter's name in `named_parameters()`.
            parameter: The tensor, for its shape, dtype and device.
        """
        scale = parameter.detach().new_full((), self.scale_of(parameter)).expand(parameter.shape)
        return self._make(self.loc_of(name, parameter), scale)

    def joint(self, named: Mapping[str, Tensor]) -> Distribution:
        """Return the prior of all numbers of several tensors, one after another: batch shape `[P]`."""
        scales = [p.detach().new_full((p.numel(),), self.scale_of(p)) for p in named.values()]
        locs = [self.loc_of(name, parameter).reshape(-1) for name, parameter in named.items()]
        return self._make(torch.cat(locs), torch.cat(scales))

    def scale_of(self, parameter: Tensor) -> float:
        """Return the scale for one tensor."""
        if not self.by_fan_in or parameter.dim() < 2:
            return self.scale
        return self.scale / math.sqrt(max(1, parameter[0].numel()))

    def loc_of(self, name: str, parameter: Tensor) -> Tensor:
        """Return the location for one tensor: zeros of its shape."""
        return parameter.detach().new_zeros(()).expand(parameter.shape)

    def __repr__(self) -> str:
        more = ", by_fan_in=True" if self.by_fan_in else ""
        return f"{type(self).__name__}(scale={self.scale:g}{more})"


class Normal(Prior):
    """A Gaussian around zero; the maximum a posteriori under it is L2 regularisation, 1 / (2 scale^2) a weight.

    Examples:
        >>> Normal(scale=2.0).distribution("weight", torch.zeros(3)).stddev
        tensor([2., 2., 2.])
    """

    def _make(self, loc: Tensor, scale: Tensor) -> Distribution:
        return NormalDistribution(loc, scale, validate_args=False)


class Laplace(Prior):
    """A double exponential around zero; the maximum a posteriori under it is L1 regularisation, 1 / scale a weight.

    Examples:
        >>> Laplace(scale=1.0).distribution("weight", torch.zeros(2)).variance
        tensor([2., 2.])
    """

    def _make(self, loc: Tensor, scale: Tensor) -> Distribution:
        return LaplaceDistribution(loc, scale, validate_args=False)


class StudentT(Prior):
    """Heavy tails: a few weights may be large (Fortuin et al., 2022, ICLR, find them in trained dense layers).

    Args:
        df: Degrees of freedom; the variance is infinite up to 2.
        scale: As for every prior.
        by_fan_in: As for every prior.
    """

    def __init__(self, df: float = 3.0, scale: float = 1.0, *, by_fan_in: bool = False) -> None:
        super().__init__(scale, by_fan_in=by_fan_in)
        self.df = check_positive(df, "df")

    def _make(self, loc: Tensor, scale: Tensor) -> Distribution:
        return _StudentT(torch.full_like(scale, self.df), loc, scale, validate_args=False)


class _StudentT(StudentTDistribution):
    """Student's t whose density keeps its digits in float32 with many degrees of freedom."""

    def log_prob(self, value: Tensor) -> Tensor:
        return student_log_prob((value - self.loc) / self.scale, self.df) - self.scale.log()


class ScaleMixture(Prior):
    """A mixture of Gaussians around zero, a wide one and a narrow one (Blundell et al., 2015, ICML, eq. 7).

    Args:
        scales: Standard deviations of the parts.
        weights: Shares of the parts; they are normalised.
        by_fan_in: As for every prior; it divides all of the scales.

    Examples:
        >>> ScaleMixture((1.0, 0.1), (0.5, 0.5)).distribution("w", torch.zeros(1)).variance.item()
        0.5049999952316284
    """

    def __init__(
        self,
        scales: Sequence[float] = (1.0, math.exp(-6)),
        weights: Sequence[float] = (0.5, 0.5),
        *,
        by_fan_in: bool = False,
    ) -> None:
        super().__init__(1.0, by_fan_in=by_fan_in)
        if len(scales) != len(weights) or not scales:
            raise BadInput(f"scales and weights must have one number for each part, got {len(scales)}, {len(weights)}")
        self.scales = tuple(check_positive(scale, "scales") for scale in scales)
        self.weights = tuple(check_positive(weight, "weights") for weight in weights)

    def _make(self, loc: Tensor, scale: Tensor) -> Distribution:
        scales = scale.unsqueeze(-1) * scale.new_tensor(self.scales)
        shares = scale.new_tensor(self.weights).expand(scales.shape)
        parts = NormalDistribution(loc.unsqueeze(-1).expand_as(scales), scales, validate_args=False)
        return MixtureSameFamily(Categorical(shares, validate_args=False), parts, validate_args=False)

    def __repr__(self) -> str:
        return f"ScaleMixture(scales={self.scales}, weights={self.weights})"


class Horseshoe(Prior):
    """Most weights near zero and a few left alone: a Gaussian with a half-Cauchy scale (Carvalho et al., 2010).

    The half-Cauchy scale of each weight is integrated out exactly, so that there is nothing else to infer; `scale` is
    the global one. The density is infinite at zero.

    References:
        Carvalho, Polson, Scott, 2010, Biometrika 97, theorem 1 and the appendix.
    """

    def _make(self, loc: Tensor, scale: Tensor) -> Distribution:
        return HorseshoeDistribution(loc, scale)


class Informed(Prior):
    """A Gaussian around weights that were trained before (MOPED: Krishnan et al., 2020, AAAI, section 3).

    Args:
        network: The trained network; its parameters are copied, and matched by name and shape.
        scale: Standard deviation around them.
        by_fan_in: As for every prior.
    """

    def __init__(self, network: nn.Module, scale: float = 1.0, *, by_fan_in: bool = False) -> None:
        super().__init__(scale, by_fan_in=by_fan_in)
        self.locs = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}

    def loc_of(self, name: str, parameter: Tensor) -> Tensor:
        loc = self.locs.get(name)
        if loc is None or loc.shape != parameter.shape:
            had = "nothing of that name" if loc is None else f"shape {tuple(loc.shape)}"
            raise BadInput(
                f"an Informed prior was asked for {name!r} of shape {tuple(parameter.shape)}, and its network has {had}; "
                "hand it a network of the same architecture"
            )
        return loc.to(parameter.device, parameter.dtype)

    def _make(self, loc: Tensor, scale: Tensor) -> Distribution:
        return NormalDistribution(loc, scale, validate_args=False)


class HorseshoeDistribution(Distribution):
    """`Normal(loc, scale * half-Cauchy(1))`, its density in closed form through the exponential integral.

    Args:
        loc: Location, `[...]`.
        scale: Global scale, `[...]`.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape: Shape, _instance: object = None) -> "HorseshoeDistribution":
        return HorseshoeDistribution(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        x = ((value - self.loc) / self.scale).square() / 2
        # At zero the density has no end; the smallest number keeps it, and its gradient, finite.
        x = x.clamp_min(torch.finfo(x.dtype).tiny)
        return scaled_exponential_integral(x).log() - self.scale.log() - 1.5 * math.log(math.pi) - 0.5 * math.log(2)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(torch.Size(sample_shape))
        local = torch.empty(shape, dtype=self.loc.dtype, device=self.loc.device).cauchy_().abs()
        return self.loc + self.scale * local * torch.randn_like(local)


def check_prior(prior: object) -> Prior:
    """Return the prior, `Normal(1.0)` where none is given."""
    if prior is None:
        return Normal()
    if not isinstance(prior, Prior):
        given = f"the class {prior.__name__}" if isinstance(prior, type) else type(prior).__name__
        raise BadInput(f"prior must be an object of bayesguard.priors, as priors.Normal(scale=1.0), got {given}")
    return prior
