"""Predictives over K classes."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.distributions import Categorical, constraints

from bayesguard.checks import bad_row, check_finite, check_labels
from bayesguard.errors import BadInput
from bayesguard.looks import found
from bayesguard.predictive.base import normalised_weights, with_draws
from bayesguard.predictive.numerics import BUDGET, CACHED, as_floating, as_given, slices, unfilled, wide
from bayesguard.predictive.pooled import PooledPredictive

_SURELY = 5e-4  # from one: a sum in float32 that is no further is within 1e-3 in float64


class CategoricalPredictive(PooledPredictive):
    """The mixture over S draws of distributions on K classes.

    The mixture is one of probabilities: logits are never averaged.

    Args:
        logits: `[S, N, ..., K]`, unnormalised or log-probabilities; -inf masks a class.
        weights: Weight of every draw `[S]`; None for equal weights.
        exact: The draws are the whole distribution and not a random sample of it, so its Monte-Carlo error is zero.

    Raises:
        BadInput: NaN or +inf (with the row), a row with every class masked, fewer than two classes.

    Examples:
        >>> pred = CategoricalPredictive(torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]))
        >>> pred.probs
        tensor([[0.5000, 0.5000]])
        >>> pred.uncertainty().epistemic
        tensor([0.3278])
    """

    _num_class_axes = 1

    def __init__(self, logits: object, weights: object = None, *, exact: bool = False) -> None:
        values = with_draws(as_floating(logits, "logits"), True, 2, "logits")
        _check_classes(values, "logits")
        log_probs = _log_softmax(values)
        # What may not be (NaN, +inf, every class masked) all ends in NaN, and nothing here is +inf, so that the sum is NaN
        # only where a number is: one look, and a reason where there is one.
        if found(log_probs.detach().sum().isnan()):
            check_finite(values, "logits", allow_negative_infinity=True, row_axis=1)
            masked = (values == -torch.inf).all(-1)
            raise BadInput(f"logits has every class masked (-inf) in row {bad_row(masked.movedim(1, 0))}")
        self._fill(log_probs, None, normalised_weights(weights, values.shape[0], values), exact)

    @classmethod
    def _of_finite(cls, logits: Tensor, exact: bool) -> CategoricalPredictive:
        """Make a predictive with equal weights from float32 or float64 logits `[S, N, ..., K]` known to be finite."""
        new = cls.__new__(cls)
        return new._fill(_log_softmax(logits), None, None, exact)

    @classmethod
    def from_logits(cls, logits: object, draws: bool = False) -> CategoricalPredictive:
        """Make a predictive from logits `[N, ..., K]`; with `draws=True` a leading S, the equal mixture over it."""
        return cls(with_draws(as_floating(logits, "logits"), draws, 2, "logits"), exact=not draws)

    @classmethod
    def from_probs(cls, probs: object, draws: bool = False) -> CategoricalPredictive:
        """Make a predictive from probabilities `[N, ..., K]`; with `draws=True` a leading S.

        Raises:
            BadInput: Values outside [0, 1], or rows that do not sum to one within 1e-3.
        """
        values = with_draws(as_floating(probs, "probs"), draws, 2, "probs")
        _check_classes(values, "probs")
        # Filled in parts, for one copy of the probabilities instead of three; a row that sums to 1 has no NaN here.
        log_probs = unfilled(values)
        for rows in slices(values.shape[1], values[:, :1].numel() * BUDGET // CACHED):
            part = values[:, rows]
            if not _are_distributions(part):
                _refuse_probs(values)
            log_probs[:, rows] = _log_softmax(part.log())
        new = cls.__new__(cls)
        return new._fill(log_probs, None, normalised_weights(None, values.shape[0], values), not draws)

    def _draw_log_probs(self, rows: slice) -> Tensor:
        return wide(self._draws_of(rows))

    @property
    def _class_probs(self) -> Tensor:
        # One draw is its own mixture, which needs no logarithms in float64 on the way.
        if self._draws is not None and self._draws.shape[0] == 1:
            return self._draws[0].softmax(-1)
        return super()._class_probs

    def _make_component(self, draws: Tensor) -> Categorical:
        return Categorical(logits=draws, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """Classes 0 to K-1."""
        return constraints.integer_interval(0, self.num_classes - 1)

    @property
    def num_classes(self) -> int:
        """K."""
        return self._tensor.shape[-1]

    @property
    def logits(self) -> Tensor:
        """Log-probabilities of the mixture, `[N, ..., K]`."""
        return self._log_probs

    @property
    def probs(self) -> Tensor:
        """Probabilities of the mixture, `[N, ..., K]`."""
        return self._class_probs

    @property
    def mean(self) -> Tensor:
        """The mean of the one-hot answer: the probabilities."""
        return self.probs

    @property
    def variance(self) -> Tensor:
        """The variance of every element of the one-hot answer, `[N, ..., K]`."""
        return self.probs * (1 - self.probs)

    @property
    def standard_error(self) -> Tensor:
        """Monte-Carlo standard error of the probabilities, `[N, ..., K]`: 0 if exact, infinite for one draw.

        It is the error between groups of draws (`groups`), if there are such.
        """
        return self._class_errors

    def log_prob(self, value: object) -> Tensor:
        """Return the log-probability in nats of class labels `[N, ...]`, integers in 0..K-1."""
        labels = check_labels(as_given(value, "value"), self.batch_shape, self.num_classes, "value").to(self.device)
        return self.logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all classes, `[K, 1, ...]`, or `[K, N, ...]` with `expand`."""
        classes = torch.arange(self.num_classes, device=self.device).reshape(-1, *[1] * len(self.batch_shape))
        return classes.expand(-1, *self.batch_shape) if expand else classes

    def _sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        return self._sample_classes(count, generator)


def _check_classes(values: Tensor, name: str) -> None:
    if values.shape[-1] < 2:
        raise BadInput(
            f"{name} has {values.shape[-1]} classes on its last axis; at least 2 are needed. "
            "For one number of yes or no use BernoulliPredictive"
        )


def _log_softmax(values: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(values.device.type):
        return values.log_softmax(-1)
    # Under autocast a softmax may stay in half precision, and its rows would miss 1 by 0.002.
    with torch.autocast(values.device.type, enabled=False):
        return values.log_softmax(-1)


def _are_distributions(probs: Tensor) -> bool:
    values = probs.detach()
    # Sums in float32 can say yes for those in float64, but not no.
    if values.numel():
        low, high = values.aminmax()
        if bool((low >= 0) & (high <= 1) & ((values.sum(-1) - 1).abs() <= _SURELY).all()):
            return True
    values = wide(values)
    return bool(((values >= 0) & (values <= 1)).all() & ((values.sum(-1) - 1).abs() <= 1e-3).all())


def _refuse_probs(probs: Tensor) -> NoReturn:
    """Raise BadInput with the first row that is no distribution."""
    check_finite(probs, "probs", row_axis=1)
    sums = wide(probs).sum(-1)
    bad = (probs < 0).any(-1) | (probs > 1).any(-1) | ((sums - 1).abs() > 1e-3)
    row = bad_row(bad.movedim(1, 0))
    raise BadInput(
        f"probs must be in [0, 1] and sum to 1 over the last axis, row {row} does not "
        f"(its sum is {float(sums.movedim(1, 0)[row][bad.movedim(1, 0)[row]][0]):.6g}); "
        + (
            "these look like logits: use from_logits"
            if bool((probs < 0).any())
            else "divide rows by their sums, if these are percentages or counts; for logits use from_logits"
        )
    )
