"""Likelihoods: what a network's raw outputs say about the target, as torch distributions.

A likelihood takes raw outputs (logits, a location, a location and a raw scale), never probabilities. It gives the
log density that training uses, and builds the Predictive of S posterior draws.
"""

import math
import warnings
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Distribution, Normal
from torch.distributions import Poisson as PoissonDistribution
from torch.distributions import StudentT as StudentTDistribution

from bayesguard.checks import as_tensor, bad_row, check_finite, check_labels, check_positive, check_shape
from bayesguard.errors import BadInput, BadType, BayesguardWarning
from bayesguard.looks import found, puts_off
from bayesguard.predictive import (
    BernoulliPredictive,
    CategoricalPredictive,
    ContinuousPredictive,
    CountPredictive,
    Predictive,
)
from bayesguard.predictive.components import component_log_prob, widened
from bayesguard.predictive.few import are_few
from bayesguard.predictive.numerics import wide

# A scale below this (in the target's unit) makes a density overflow float32 before it means anything.
_MIN_SCALE = 1e-6
# Outputs of fewer numbers are summed in less time than it takes to pick a row of them.
_FEW = 1 << 10


class Likelihood(nn.Module, ABC):
    """Base of the likelihoods; a subclass says which distribution its raw outputs stand for."""

    @abstractmethod
    def distribution(self, outputs: Tensor) -> Distribution:
        """Return the distribution of the target, for outputs `[..., N, *output]` of any number of draws."""

    @abstractmethod
    def predictive(self, outputs: Tensor, weights: Tensor | None = None, *, exact: bool = False) -> Predictive:
        """Return the mixture over draws.

        Args:
            outputs: Raw outputs `[S, N, ...]`.
            weights: Weights of the draws `[S]`; None for equal ones.
            exact: The draws are the whole posterior, not a sample of it (a deterministic network).
        """

    @abstractmethod
    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the targets in the form that `log_prob` needs, or raise."""

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log density of each target in nats, `[N, ...]`, for outputs `[N, ...]` of one pass.

        Raises:
            BadInput: Targets of another shape, out of range, or not finite.
            BadType: Targets of a dtype that cannot be used.
        """
        targets = self.check_targets(outputs, as_tensor(targets, "targets"))
        # Half precision is for the network's matrix products; a log density needs float32.
        with torch.autocast(outputs.device.type, enabled=False):
            return self._density(outputs, targets)

    def _density(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The log density of targets that were checked, outside of autocast."""
        return self.distribution(outputs).log_prob(targets)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the training loss: the mean negative log density per example, in nats.

        An example with several targets (outputs, labels, pixels) counts the sum over them.
        """
        log_prob = self.log_prob(outputs, targets)
        return -log_prob.sum() / max(1, log_prob.shape[0])


class Categorical(Likelihood):
    """One of K classes, from logits.

    Args:
        class_dim: Axis of the classes in a network's output: -1, or 1 for a channel-first network
            (`[N, K, H, W]`). It is moved to the end once, here.

    Examples:
        >>> import torch
        >>> likelihood = Categorical()
        >>> likelihood.loss(torch.zeros(2, 4), torch.tensor([0, 3])).item()  # log 4
        1.3862943649291992
    """

    def __init__(self, class_dim: int = -1) -> None:
        super().__init__()
        if isinstance(class_dim, bool) or not isinstance(class_dim, int):
            raise BadType(f"class_dim must be an integer, got {type(class_dim).__name__}")
        if class_dim == 0:
            raise BadInput(
                "class_dim is 0, but axis 0 is that of the examples; use -1, or 1 for channel-first networks"
            )
        self.class_dim = class_dim

    def logits(self, outputs: Tensor, *, draws: bool = False) -> Tensor:
        """Return outputs as float logits with the classes last, after checking them."""
        return self._checked(outputs, draws)[0]

    def _checked(self, outputs: Tensor, draws: bool) -> tuple[Tensor, bool]:
        """Return the logits, and whether they are known to be finite: False where nobody has looked."""
        axis = self.class_dim + 1 if draws and self.class_dim > 0 else self.class_dim
        if not -outputs.dim() + 1 <= axis < outputs.dim() or outputs.dim() < 2 + draws:
            raise BadInput(
                f"outputs have shape {tuple(outputs.shape)}, which has no axis {self.class_dim} of classes; "
                "Categorical needs [N, K], or [N, K, ...] with class_dim=1"
            )
        logits = outputs if axis in (-1, outputs.dim() - 1) else outputs.movedim(axis, -1)
        if logits.shape[-1] < 2:
            raise BadInput("outputs have one class only; for one logit per example use likelihoods.Bernoulli()")
        are_finite = _refuse_probabilities(logits)
        return _float(logits), are_finite

    def distribution(self, outputs: Tensor) -> Distribution:
        return CategoricalDistribution(logits=self.logits(outputs), validate_args=False)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(outputs)
        return check_labels(targets, logits.shape[:-1], logits.shape[-1])

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if type(self) is not Categorical:
            return super().log_prob(outputs, targets)
        # One operation in place of a distribution: a third of the time for a small batch. Autocast never lowers its
        # precision.
        logits = self.logits(outputs)
        labels = check_labels(as_tensor(targets, "targets"), logits.shape[:-1], logits.shape[-1])
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return -losses.reshape(labels.shape)

    def predictive(self, outputs: Tensor, weights: Tensor | None = None, *, exact: bool = False) -> Predictive:
        if type(self) is not Categorical:
            return CategoricalPredictive(self.logits(outputs, draws=True), weights, exact=exact)
        logits, are_finite = self._checked(outputs, True)
        if are_finite and weights is None and logits.is_floating_point():
            return CategoricalPredictive._of_finite(logits, exact)
        return CategoricalPredictive(logits, weights, exact=exact)

    def extra_repr(self) -> str:
        return f"class_dim={self.class_dim}"


class Bernoulli(Likelihood):
    """Yes or no, from one logit; several logits an example are several labels (multi-label).

    Outputs `[N]`, `[N, 1]` or `[N, L]`; targets have exactly the outputs' shape, as 0/1 or bool.

    Examples:
        >>> import torch
        >>> Bernoulli().log_prob(torch.zeros(3), torch.tensor([0, 1, 1])).exp()
        tensor([0.5000, 0.5000, 0.5000])
    """

    def distribution(self, outputs: Tensor) -> Distribution:
        return BernoulliDistribution(logits=_float(outputs), validate_args=False)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        check_shape(targets, outputs.shape, "targets")
        bad = (targets != 0) & (targets != 1)
        if bad.any():
            raise BadInput(f"targets has a value other than 0 and 1 in row {bad_row(bad)}; Bernoulli needs 0/1 or bool")
        return targets.to(_float(outputs).dtype)

    def predictive(self, outputs: Tensor, weights: Tensor | None = None, *, exact: bool = False) -> Predictive:
        if outputs.numel() >= 64 and found(((outputs >= 0) & (outputs <= 1)).all()):
            warnings.warn(
                "all outputs lie in [0, 1]: they are taken as logits, but look like probabilities; "
                "if the network ends in a sigmoid, leave it out",
                BayesguardWarning,
                stacklevel=2,
            )
        return BernoulliPredictive(_float(outputs), weights, exact=exact)


class _Continuous(Likelihood):
    """What the likelihoods of a real target share: outputs `[N, ...]` or `[N, ..., 2]`, targets `[N, ...]`."""

    def predictive(self, outputs: Tensor, weights: Tensor | None = None, *, exact: bool = False) -> Predictive:
        return ContinuousPredictive(self.distribution(outputs), weights, exact=exact)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        shape = self.distribution(outputs).batch_shape
        check_shape(targets, shape, "targets")
        if not targets.is_floating_point():
            targets = targets.to(outputs.dtype if outputs.dtype == torch.float64 else torch.float32)
        check_finite(targets, "targets")
        return targets


class Gaussian(_Continuous):
    """A real target with the same noise everywhere; the network gives its location.

    Outputs and targets `[N]` or `[N, D]` (a network that ends in one unit gives `[N, 1]`, and targets `[N, 1]`).

    Args:
        scale: Standard deviation of the noise in the target's unit; None to learn it together with the network.

    Examples:
        >>> import torch
        >>> Gaussian(scale=1.0).log_prob(torch.zeros(1), torch.zeros(1)).item()  # -log(2 pi)/2
        -0.9189385175704956
    """

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.learned = scale is None
        if scale is not None and check_positive(scale, "scale") < _MIN_SCALE:
            raise BadInput(f"scale must be at least {_MIN_SCALE:g}, got {scale}; give targets in a smaller unit")
        log_scale = torch.tensor(math.log(1.0 if scale is None else scale))
        if self.learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the noise, in the target's unit."""
        return self.log_scale.exp().clamp_min(_MIN_SCALE)

    def distribution(self, outputs: Tensor) -> Distribution:
        loc = _float(outputs)
        return Normal(loc, self.scale.to(loc.dtype).expand_as(loc), validate_args=False)

    def extra_repr(self) -> str:
        return f"scale={self.scale.item():.4g}{', learned' if self.learned else ''}"


class HeteroscedasticGaussian(_Continuous):
    """A real target whose noise depends on the input; the network gives a location and a raw scale.

    Outputs `[N, 2]` or `[N, D, 2]` (location, raw scale; the scale is `softplus(raw)`), targets `[N]` or `[N, D]`.

    Args:
        beta: Exponent of the beta-NLL of Seitzer et al. (2022, ICLR, eq. 5): each example's loss is weighted by its
            variance to the power beta, without gradient. 0 is the plain NLL, 1 has the gradients of a squared
            error for the location; the authors advise 0.5. It changes `loss` only, never a density.

    Examples:
        >>> import torch
        >>> HeteroscedasticGaussian().distribution(torch.tensor([[2.0, 0.0]])).scale
        tensor([0.6931])
    """

    def __init__(self, beta: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= beta <= 1.0:
            raise BadInput(f"beta must lie in 0..1, got {beta}")
        self.beta = float(beta)

    def distribution(self, outputs: Tensor) -> Distribution:
        if outputs.dim() < 2 or outputs.shape[-1] != 2:
            raise BadInput(
                f"outputs have shape {tuple(outputs.shape)}; a last axis of size 2 (location, raw scale) is needed: "
                "end the network with Linear(..., 2 * D) and Unflatten(-1, (D, 2)), or Linear(..., 2) for one target"
            )
        loc, raw = _float(outputs).unbind(-1)
        return Normal(loc, F.softplus(raw).clamp_min(_MIN_SCALE), validate_args=False)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        log_prob = self.log_prob(outputs, targets)
        if self.beta:
            variance: Tensor = self.distribution(outputs).variance.detach()
            log_prob = log_prob * variance**self.beta
        return -log_prob.sum() / max(1, log_prob.shape[0])

    def extra_repr(self) -> str:
        return f"beta={self.beta}"


class StudentT(_Continuous):
    """A real target with heavy tails; the network gives a location and a raw scale.

    Outputs `[N, 2]` or `[N, D, 2]` (location, raw scale; the scale is `softplus(raw)`), targets `[N]` or `[N, D]`.

    Args:
        df: Degrees of freedom. The variance is infinite up to 2, the mean undefined up to 1.

    Examples:
        >>> import torch
        >>> StudentT(df=4.0).distribution(torch.tensor([[0.0, 1.0]])).df
        tensor([4.])
    """

    def __init__(self, df: float = 4.0) -> None:
        super().__init__()
        self.df = check_positive(df, "df")

    def distribution(self, outputs: Tensor) -> Distribution:
        if outputs.dim() < 2 or outputs.shape[-1] != 2:
            raise BadInput(
                f"outputs have shape {tuple(outputs.shape)}; a last axis of size 2 (location, raw scale) is needed"
            )
        loc, raw = _float(outputs).unbind(-1)
        df = loc.new_full((), self.df).expand_as(loc)
        return StudentTDistribution(df, loc, F.softplus(raw).clamp_min(_MIN_SCALE), validate_args=False)

    def _density(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # With many degrees of freedom torch's own is a small difference of large numbers, in float32 of no digits.
        component = self.distribution(outputs)
        return component_log_prob(widened(component), wide(targets)).to(component.mean.dtype)

    def extra_repr(self) -> str:
        return f"df={self.df}"


class Poisson(Likelihood):
    """A count, from the logarithm of its rate. Outputs and targets `[N]` or `[N, D]`.

    Examples:
        >>> import torch
        >>> Poisson().log_prob(torch.zeros(1), torch.tensor([0])).item()  # -rate
        -1.0
    """

    def distribution(self, outputs: Tensor) -> Distribution:
        return PoissonDistribution(_float(outputs).exp(), validate_args=False)

    def check_targets(self, outputs: Tensor, targets: Tensor) -> Tensor:
        check_shape(targets, outputs.shape, "targets")
        check_finite(targets, "targets")
        bad = (targets < 0) | (targets != targets.round())
        if bad.any():
            raise BadInput(f"targets is not a count in row {bad_row(bad)}; Poisson needs whole numbers from 0")
        return targets.to(_float(outputs).dtype)

    def _density(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if type(self) is not Poisson:
            return super()._density(outputs, targets)
        # From the logarithm of the rate: a rate of zero in float32 has a gradient of 0 / 0. Large counts make it a small
        # difference of large numbers.
        log_rate, counts = wide(outputs), wide(targets)
        return (counts * log_rate - log_rate.exp() - torch.lgamma(counts + 1)).to(_float(outputs).dtype)

    def predictive(self, outputs: Tensor, weights: Tensor | None = None, *, exact: bool = False) -> Predictive:
        return CountPredictive(self.distribution(outputs), weights, exact=exact)


def _float(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def _refuse_probabilities(logits: Tensor) -> bool:
    """Raise where every row is a probability vector to float rounding: no network's logits are that by chance.

    Returns:
        Whether all logits are known to be finite, because their sum is: it is taken of a few only.
    """
    # Inside vmap values cannot be looked at; the same network is also seen outside of it.
    if (size := logits.numel()) == 0 or torch._C._functorch.is_batchedtensor(logits):
        return False
    # All rows would have to be probabilities: the first one, or the sum of a few, settles it for nearly every network.
    if puts_off(logits):
        found((logits[(0,) * (logits.dim() - 1)].sum() - 1).abs() < 1e-3)
        return False
    some = logits if size < _FEW else logits[(0,) * (logits.dim() - 1)]
    rows = some.numel() // logits.shape[-1]
    total = sum(some.flatten().tolist()) if are_few(some) else some.sum().item()
    are_finite = size < _FEW and math.isfinite(total)
    if not abs(total - rows) < 1e-3 * rows:
        return are_finite
    logits = logits.detach()
    sums = logits.sum(dim=-1)
    one_hot = (logits == 0) | (logits == 1)
    if bool(((sums - 1).abs() < 1e-5).all() and (logits >= 0).all() and not one_hot.all()):
        raise BadInput(
            "outputs are probabilities (every row is non-negative and sums to 1), but Categorical takes logits: "
            "leave the softmax out of the network, or pass output=torch.log to use its logarithm"
        )
    return are_finite
