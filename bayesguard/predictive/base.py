"""What all predictive distributions share: weights over the draws, indexing, moving, Monte-Carlo error."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesguard.checks import check_count
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive.groups import Groups, error_factor, numbered
from bayesguard.predictive.numerics import as_given, wide

if TYPE_CHECKING:
    from bayesguard.predictive.continuous import ContinuousPredictive
    from bayesguard.predictive.samples import SamplePredictive


_NO_EVENT = torch.Size()


class Decomposition(NamedTuple):
    """Uncertainty and its two parts, each of the predictive's batch shape, with `total = aleatoric + epistemic`.

    Discrete answers: entropy of the mixture, expected entropy of the draws, and mutual information between answer and
    draw, in nats. Continuous answers and counts: variance of the mixture, expected variance of the draws, and variance
    of the draws' means, in the target's unit squared.

    References:
        Depeweg, Hernández-Lobato, Doshi-Velez, Udluft, 2018, ICML, equations 5 and 7.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


class Predictive(Distribution):
    """The answer to N questions: the mixture over S posterior draws, as a `torch.distributions.Distribution`.

    The batch shape is `[N, ...]`, one element for each example and output; the event shape is `()`. Its length is N,
    and `pred[index]` selects examples: an integer, a slice, a mask or a list of rows; the result is a Predictive
    again, so `pred[3]` has length one.

    Attributes:
        weights: the weight of every draw, `[S]`, float64, summing to one.
        exact: whether the distribution is known as it is, not estimated from random draws: no Monte-Carlo error.
        groups: which draws depend on one another, int64 `[S]` on the CPU (draws of one group share a number); None
            where all are independent. `standard_error` is then that between groups.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Which attributes there are depends on the target: `probs` for classes, `interval` for real targets."""

    arg_constraints: ClassVar[
        dict[str, Any]
    ] = {}  # torch's own check knows no row numbers; ours are in the constructors
    weights: Tensor
    exact: bool
    groups: Groups

    def _set(self, batch_shape: Sequence[int], weights: Tensor | None, exact: bool, groups: Groups) -> None:
        super().__init__(torch.Size(batch_shape), _NO_EVENT, validate_args=False)
        self.exact, self.groups = exact, groups
        if weights is not None:
            self.weights = weights

    # -- what each kind of predictive says about itself

    @abstractmethod
    def _tensors(self) -> list[Tensor]:
        """The tensors that hold the distribution, all with examples along `_example_axis`."""

    @abstractmethod
    def _refill(self, like: Self, tensors: list[Tensor], weights: Tensor, exact: bool, groups: Groups) -> Self:
        """Fill a new object with the tensors of one that is like another, and return it."""

    @abstractmethod
    def log_prob(self, value: Any) -> Tensor:
        """Return the log density or log-probability of every element's `value`, in nats; shapes must match exactly."""

    @abstractmethod
    def uncertainty(self) -> Decomposition:
        """Return total, aleatoric and epistemic uncertainty of every element; see `Decomposition`."""

    @property
    @abstractmethod
    def standard_error(self) -> Tensor:
        """Monte-Carlo standard error of `mean`, of its shape: 0 if the predictive is exact, infinite for one draw."""

    @abstractmethod
    def _sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        """`count` samples of every element, `[count, N, ...]`."""

    @property
    def _example_axis(self) -> int:
        return 1 if self.has_draws else 0

    # -- what they share

    def _rebuild(
        self,
        tensors: list[Tensor],
        weights: Tensor | None = None,
        exact: bool | None = None,
        groups: Groups = None,
    ) -> Self:
        """The same kind of predictive from other tensors, without the checks of the constructor.

        Weights that are given come with their groups.
        """
        if weights is None:
            weights, groups = self.weights, self.groups
        new = type(self).__new__(type(self))
        return new._refill(self, tensors, weights, self.exact if exact is None else exact, groups)

    @property
    def has_draws(self) -> bool:
        """Whether the draws are kept, so that `component` and calibrators that act on draws can be had."""
        return True

    @property
    def num_samples(self) -> int:
        """S, the number of draws in the mixture."""
        return self.weights.shape[0]

    @property
    def draws_used(self) -> Tensor:
        """How many draws every example's answer is made of, int64 `[N]`: S, except where `tolerance=` ended them."""
        return torch.full((len(self),), self.num_samples, dtype=torch.long, device=self.device)

    def with_groups(self, groups: object) -> Self:
        """Return the predictive with its draws in groups: within a group they depend on one another.

        Args:
            groups: A number for each draw `[S]`; draws with the same number are of one group, and groups are
                independent of one another. None: all draws are independent.

        Raises:
            BadInput: Not one integer for each draw.
            BadType: A predictive that was reduced.

        Examples:
            >>> probs = [[[0.9, 0.1]], [[0.1, 0.9]], [[0.6, 0.4]], [[0.2, 0.8]]]
            >>> pred = Predictive.from_probs(probs, draws=True)
            >>> pred.standard_error[0, 0], pred.with_groups([0, 0, 1, 1]).standard_error[0, 0]
            (tensor(0.1848), tensor(0.0500))
        """
        if not self.has_draws:
            raise BadType("this predictive was reduced, and its draws can no longer be put into groups")
        if groups is None:
            return self._grouped(None)
        labels = as_given(groups, "groups")
        if tuple(labels.shape) != (self.num_samples,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise BadInput(
                f"groups must have one integer for each of the {self.num_samples} draws, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}"
            )
        return self._grouped(numbered(labels))

    def _grouped(self, groups: Groups) -> Self:
        return self._rebuild(self._tensors(), self.weights, groups=groups)

    @property
    def component(self) -> Distribution:
        """The S distributions that are mixed, as one torch distribution of batch shape `[S, N, ...]`."""
        raise BadType(f"a {type(self).__name__} has no component distributions")

    @property
    def _tensor(self) -> Tensor:
        return self._tensors()[0]

    @property
    def device(self) -> torch.device:
        """Where the predictive's tensors are."""
        return self._tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what the predictive returns."""
        return self._tensor.dtype

    def __len__(self) -> int:
        return self.batch_shape[0]

    def __getitem__(self, index: object) -> Self:
        rows = _example_index(index, len(self), self.device)
        where = (slice(None),) * self._example_axis + (rows,)
        return self._rebuild([tensor[where] for tensor in self._tensors()])

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the predictive on another device or in another floating dtype; arguments as for `Tensor.to`."""
        first, *others = self._tensors()
        first = first.to(*args, **kwargs)
        if first.dtype not in (torch.float32, torch.float64):
            raise BadType(
                f"a predictive is kept in float32 or float64, got {first.dtype}; sums would lose their digits"
            )
        # Numbers of draws stay integers.
        moved = [x.to(*args, **kwargs) if x.is_floating_point() else x.to(first.device) for x in others]
        return self._rebuild([first, *moved], self.weights.to(first.device), groups=self.groups)

    def sample(self, sample_shape: Sequence[int] | int = (), seed: int | None = None) -> Tensor:
        """Draw from the predictive distribution.

        Args:
            sample_shape: how many, `()` for one without an extra axis.
            seed: repeats the samples, from a generator of their own; None draws from torch's global generator.

        Returns:
            `sample_shape + batch_shape`.
        """
        shape = torch.Size((sample_shape,) if isinstance(sample_shape, int) else tuple(sample_shape))
        generator = None
        if seed is not None:
            generator = torch.Generator(self.device).manual_seed(check_count(seed, "seed", minimum=0))
        with torch.no_grad():
            return self._sample(shape.numel(), generator).reshape(shape + self.batch_shape)

    def rsample(self, sample_shape: Sequence[int] | int = ()) -> NoReturn:
        """A mixture has no reparameterised sample."""
        raise BadType("a mixture cannot be sampled with gradients; use sample()")

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> NoReturn:
        """A predictive belongs to its examples and cannot be expanded."""
        raise BadType("a Predictive cannot be expanded; to join several, use bayesguard.predictive.concatenate")

    def reduce(self) -> Predictive:
        """Return a predictive without its draws where the draws are not needed; continuous answers need theirs."""
        return self

    def numpy(self) -> dict[str, npt.NDArray[Any]]:
        """Return mean, standard deviation and the decomposition of the uncertainty as NumPy arrays, by name."""
        return to_numpy({"mean": self.mean, "stddev": self.stddev, **self.uncertainty()._asdict()})

    def __repr__(self) -> str:
        origin = "exact" if self.exact else f"num_samples={self.num_samples}"
        kept = "" if self.has_draws else ", draws not kept"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, {origin}{kept}, {dtype}, {self.device})"

    def _standard_error(self, variance: Tensor) -> Tensor:
        """Error of a mean over draws with this (biased) variance between groups; one says nothing about its error."""
        if self.exact:
            return torch.zeros_like(variance)
        factor = error_factor(self.weights, self.groups)
        return torch.full_like(variance, torch.inf) if factor == float("inf") else (variance * factor).sqrt()

    # -- from plain arrays

    @classmethod
    def from_probs(cls, probs: object, draws: bool = False) -> Predictive:
        """Make a predictive from probabilities.

        Args:
            probs: `[N, K]` (any number of axes between), or `[N]` for the probability of the positive of two classes;
                rows sum to one. With `draws=True` a leading axis S: the equal mixture over it.
            draws: whether the first axis is one of posterior draws.

        Raises:
            BadInput: probabilities outside [0, 1], or rows that do not sum to one within 1e-3 (logits?).

        Examples:
            >>> Predictive.from_probs([[0.7, 0.2, 0.1]]).labels
            tensor([0])
        """
        return _classifier(probs, "probs", draws).from_probs(probs, draws)

    @classmethod
    def from_logits(cls, logits: object, draws: bool = False) -> Predictive:
        """Make a predictive from logits `[N, K]`, or `[N]` for two classes; with `draws=True` a leading S.

        A logit of -inf masks a class; NaN and +inf are refused.

        Examples:
            >>> Predictive.from_logits([[0.0, 0.0]]).probs
            tensor([[0.5000, 0.5000]])
        """
        return _classifier(logits, "logits", draws).from_logits(logits, draws)

    @staticmethod
    def from_normal(loc: object, scale: object, draws: bool = False) -> ContinuousPredictive:
        """Make a Gaussian predictive from means and standard deviations, `[N]` or `[N, D]`, with `draws` a leading S.

        `scale` has the shape of `loc`, or is one number.

        Examples:
            >>> Predictive.from_normal([0.0], [1.0]).icdf(0.975)
            tensor([1.9600])
        """
        from bayesguard.predictive.continuous import ContinuousPredictive

        return ContinuousPredictive.from_normal(loc, scale, draws)

    @staticmethod
    def from_samples(samples: object) -> SamplePredictive:
        """Make a predictive from draws of the target itself, `[S, N]` or `[S, N, D]`.

        Examples:
            >>> Predictive.from_samples([[1.0], [2.0], [6.0]]).mean
            tensor([3.])
        """
        from bayesguard.predictive.samples import SamplePredictive

        return SamplePredictive(samples)


def normalised_weights(weights: object, count: int, like: Tensor) -> Tensor:
    """Return the weights of `count` draws as float64 summing to one; None means equal weights."""
    if weights is None:
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        return torch.full((count,), 1 / count, dtype=dtype, device=like.device)
    tensor = wide(as_given(weights, "weights").detach().to(like.device))
    if tuple(tensor.shape) != (count,):
        raise BadInput(f"weights must have one number for each of the {count} draws, got shape {tuple(tensor.shape)}")
    if not (tensor.isfinite().all() and (tensor >= 0).all() and tensor.sum() > 0):
        raise BadInput("weights must be finite, not negative, and not all zero")
    return tensor / tensor.sum()


def with_draws(value: Tensor, draws: bool, minimum: int, name: str) -> Tensor:
    """Return `value` with a leading axis of draws, after checking that it has `minimum` axes besides."""
    if value.dim() < minimum + draws:
        wanted = ["S"] * draws + ["N", "K"][:minimum]
        raise BadInput(
            f"{name} has shape {tuple(value.shape)}; with draws={draws} it must be [{', '.join(wanted)}] at least"
        )
    if draws and value.shape[0] == 0:
        raise BadInput(f"{name} has no draws (the first axis, S, is empty)")
    return value if draws else value.unsqueeze(0)


def to_numpy(values: dict[str, Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Return every tensor as an array on the host."""
    return {name: value.detach().cpu().numpy() for name, value in values.items()}


def _classifier(value: object, name: str, draws: bool) -> type[Predictive]:
    # One number an example cannot be K classes: no guess is needed to tell the two kinds of classification apart.
    from bayesguard.predictive.bernoulli import BernoulliPredictive
    from bayesguard.predictive.categorical import CategoricalPredictive

    return BernoulliPredictive if as_given(value, name).dim() == 1 + draws else CategoricalPredictive


def _example_index(index: object, length: int, device: torch.device) -> slice | Tensor:
    """Return an index over examples that keeps their axis."""
    if isinstance(index, slice):
        if index.step is None or index.step > 0:
            return index
        index = list(range(length)[index])  # torch has no negative steps
    if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
        if not -length <= index < length:
            raise IndexError(f"example {index} of a predictive with {length} examples")
        row = int(index) % length
        return slice(row, row + 1)
    if isinstance(index, tuple):
        raise BadType("a Predictive is indexed by examples only, got several indices; select outputs before it is made")
    if isinstance(index, list) and not index:
        return slice(0, 0)
    rows = as_given(index, "index").to(device)
    if rows.is_floating_point() or rows.dim() != 1:
        raise BadType(
            f"an index must be integers or a mask along the examples, got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    if rows.dtype == torch.bool and rows.shape[0] != length:
        raise BadInput(f"a mask over {length} examples must have {length} elements, got {rows.shape[0]}")
    return rows if rows.dtype == torch.bool else rows.long()
