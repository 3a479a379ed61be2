"""Predictives of yes or no, one or several at a time (multi-label)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, constraints

from bayesguard.checks import bad_row, check_finite, check_shape
from bayesguard.errors import BadInput
from bayesguard.predictive.base import normalised_weights, with_draws
from bayesguard.predictive.numerics import as_floating, as_given, wide
from bayesguard.predictive.pooled import PooledPredictive


class BernoulliPredictive(PooledPredictive):
    """The mixture over S draws of yes or no, for `[N]` examples or `[N, L]` labels.

    Args:
        logits: `[S, N, ...]`, log-odds of yes.
        weights: Weight of every draw `[S]`; None for equal weights.
        exact: The draws are the whole distribution and not a random sample of it, so its Monte-Carlo error is zero.

    Raises:
        BadInput: NaN or infinity, with the row.

    Examples:
        >>> pred = BernoulliPredictive(torch.tensor([[0.0, 4.0], [0.0, -4.0]]))
        >>> pred.probs
        tensor([0.5000, 0.5000])
        >>> pred.uncertainty().epistemic
        tensor([0.0000, 0.6031])
    """

    _num_class_axes = 0

    def __init__(self, logits: object, weights: object = None, *, exact: bool = False) -> None:
        values = with_draws(as_floating(logits, "logits"), True, 1, "logits")
        check_finite(values, "logits", row_axis=1)
        self._fill(values, None, normalised_weights(weights, values.shape[0], values), exact)

    @classmethod
    def from_logits(cls, logits: object, draws: bool = False) -> BernoulliPredictive:
        """Make a predictive from log-odds `[N, ...]`; with `draws=True` a leading S, the equal mixture over it."""
        return cls(with_draws(as_floating(logits, "logits"), draws, 1, "logits"), exact=not draws)

    @classmethod
    def from_probs(cls, probs: object, draws: bool = False) -> BernoulliPredictive:
        """Make a predictive from probabilities of yes `[N, ...]`; with `draws=True` a leading S.

        Raises:
            BadInput: Values outside [0, 1].
        """
        values = with_draws(as_floating(probs, "probs"), draws, 1, "probs")
        check_finite(values, "probs", row_axis=1)
        bad = (values < 0) | (values > 1)
        if bad.any():
            row = bad_row(bad.movedim(1, 0))
            raise BadInput(f"probs must be in [0, 1], row {row} is not; these look like logits: use from_logits")
        # A probability of exactly 0 or 1 has infinite log-odds, which only a network's output may not have.
        new = cls.__new__(cls)
        return new._fill(values.logit(), None, normalised_weights(None, values.shape[0], values), not draws)

    def _draw_log_probs(self, rows: slice) -> Tensor:
        odds = wide(self._draws_of(rows))
        return torch.stack([F.logsigmoid(-odds), F.logsigmoid(odds)], dim=-1)

    def _make_component(self, draws: Tensor) -> Bernoulli:
        return Bernoulli(logits=draws, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """0 and 1."""
        return constraints.boolean

    @property
    def num_classes(self) -> int:
        """2: no and yes."""
        return 2

    @property
    def logits(self) -> Tensor:
        """Log-odds of yes under the mixture, `[N, ...]`."""
        log_probs = self._log_probs
        return log_probs[..., 1] - log_probs[..., 0]

    @property
    def probs(self) -> Tensor:
        """Probability of yes, `[N, ...]`."""
        return self._class_probs[..., 1]

    @property
    def labels(self) -> Tensor:
        """1 where yes is more probable than no, `[N, ...]`."""
        return (self.probs > 0.5).long()

    @property
    def mean(self) -> Tensor:
        """The probability of yes."""
        return self.probs

    @property
    def variance(self) -> Tensor:
        """p (1 - p), `[N, ...]`."""
        return self._class_probs.prod(-1)

    @property
    def standard_error(self) -> Tensor:
        """Monte-Carlo standard error of the probability of yes: 0 if exact, infinite for one draw.

        It is the error between groups of draws (`groups`), if there are such.
        """
        return self._class_errors[..., 1]

    def log_prob(self, value: object) -> Tensor:
        """Return the log-probability in nats of answers `[N, ...]`: 0 and 1 of any dtype, or bool."""
        answers = check_answers(as_given(value, "value"), self.batch_shape, "value").to(self.device)
        return self._log_probs.gather(-1, answers.unsqueeze(-1)).squeeze(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return 0 and 1 in the predictive's dtype, `[2, 1, ...]`, or `[2, N, ...]` with `expand`."""
        both = torch.arange(2, dtype=self.dtype, device=self.device).reshape(-1, *[1] * len(self.batch_shape))
        return both.expand(-1, *self.batch_shape) if expand else both

    def _sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        return self._sample_classes(count, generator).to(self.dtype)


def check_answers(answers: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Return answers 0 and 1 of any dtype as int64, or raise BadInput naming the first row with another value."""
    check_shape(answers, shape, name)
    bad = (answers != 0) & (answers != 1)
    if bad.any():
        row = bad_row(bad)
        raise BadInput(f"{name} must be 0 or 1 everywhere, row {row} is not; soft labels have no log-probability")
    return answers.long()
