"""Answer only where the answer can be trusted: a threshold on confidence with a guaranteed error rate.

A. N. Angelopoulos, S. Bates, E. J. Candès, M. I. Jordan, L. Lei (2021). Learn then test: calibrating predictive
algorithms to achieve risk control. arXiv:2110.01052.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from bayesguard.calibration.base import class_labels
from bayesguard.checks import check_finite, check_level, check_shape
from bayesguard.errors import BadInput, BadType, NotFitted
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.numerics import as_given, wide

_STARTS = 10


class Selection(NamedTuple):
    """Which examples are answered, bool `[N]`, and with what label `[N]`."""

    answered: Tensor
    labels: Tensor


class SelectiveClassifier:
    """Answers where the confidence is high enough for an error rate that holds with a stated probability.

    Among the answered examples the error rate is at most `max_error`, with probability `1 - delta` over the held-out data.
    Thresholds are tried from the most confident down, each by an exact binomial test, from ten places on with a tenth of
    `delta` each; a failure ends what began at one place, so that the number of thresholds costs nothing (fixed sequence
    testing with several starts: Angelopoulos et al., 2021, proposition 2 and section 4).

    Args:
        max_error: The error rate that is allowed among answers.
        delta: Probability that the promise is broken.

    Attributes:
        threshold: Confidence at which an answer is given; infinity if no threshold passes.
        coverage: Share of the held-out examples that are answered.

    Examples:
        >>> probs = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)).mul(6).softmax(-1)
        >>> labels = probs.multinomial(1, generator=torch.Generator().manual_seed(1)).squeeze(-1)
        >>> pred = Predictive.from_probs(probs)
        >>> selective = SelectiveClassifier(max_error=0.1).fit(pred[:2000], labels[:2000])
        >>> answered, answers = selective(pred[2000:])
        >>> bool((answers[answered] != labels[2000:][answered]).float().mean() < 0.12)
        True
    """

    def __init__(self, max_error: float = 0.02, delta: float = 0.05) -> None:
        self.max_error, self.delta = check_level(max_error, "max_error"), check_level(delta, "delta")
        self.threshold, self.coverage = math.nan, math.nan

    def fit(self, pred: Predictive, targets: object) -> Self:
        """Find the lowest threshold that passes on held-out examples.

        Raises:
            BadInput: No examples, or targets that are no classes.
            BadType: Predictives of numbers.
        """
        confidence, labels = _answers(pred)
        truth = class_labels(pred, as_given(targets, "targets").to(labels.device))
        if not len(labels):
            raise BadInput("pred has no examples")
        order = confidence.argsort(descending=True, stable=True)
        ranked, wrong = confidence[order], (labels != truth)[order].double().cumsum(0)
        counts = torch.arange(1, len(ranked) + 1, device=ranked.device, dtype=torch.float64)
        # Examples of one confidence are answered together or not at all.
        ends = torch.ones_like(ranked, dtype=torch.bool)
        ends[:-1] = ranked[1:] != ranked[:-1]
        ends &= counts >= self._fewest()
        number = self._last_passed(binomial_p_value(wrong[ends], counts[ends], self.max_error))
        self.threshold = math.inf if number is None else float(ranked[ends][number])
        self.coverage = 0.0 if number is None else float(counts[ends][number]) / len(ranked)
        return self

    def _fewest(self) -> int:
        """How many answers without an error make a test pass."""
        return math.ceil(math.log(self.delta / _STARTS) / math.log1p(-self.max_error))

    def _last_passed(self, p_values: Tensor) -> int | None:
        """The last threshold in a run of passes that begins at one of the starts."""
        passed = (p_values <= self.delta / _STARTS).tolist()
        last = None
        for start in {len(passed) * k // _STARTS for k in range(_STARTS)}:
            place = start
            while place < len(passed) and passed[place]:
                last = place if last is None else max(last, place)
                place += 1
        return last

    def __call__(self, pred: Predictive) -> Selection:
        """Return which examples are answered, and the labels of all.

        Raises:
            NotFitted: `fit` was not called.
        """
        if math.isnan(self.threshold):
            raise NotFitted(
                "this SelectiveClassifier is not fitted; call fit(pred, targets) on held-out predictions first"
            )
        confidence, labels = _answers(pred)
        return Selection(confidence >= self.threshold, labels)

    def __repr__(self) -> str:
        return f"SelectiveClassifier(max_error={self.max_error}, delta={self.delta}, threshold={self.threshold:.4g})"


def risk_controlled_threshold(
    losses: object, alpha: float, *, delta: float | None = None, bound: float = 1.0
) -> int | None:
    """Return the first setting, in the order given, whose risk is controlled by held-out losses; None if there is none.

    The settings' losses must not increase from one to the next (larger sets, fewer answers, ...).

    Args:
        losses: Of each held-out example under each setting, `[n, L]`, between 0 and `bound`.
        alpha: The mean loss that is allowed.
        delta: None: the expected loss of the next example is at most alpha (conformal risk control). A number: the mean
            loss over new examples is at most alpha with probability 1 - delta (upper confidence bound of Hoeffding and
            Bentkus).
        bound: The largest loss that there can be.

    References:
        Angelopoulos, Bates, Fisch, Lei, Schuster, 2024, ICLR, theorem 1; Bates, Angelopoulos, Lei, Malik, Jordan, 2021,
        JACM 68, section 3.

    Raises:
        BadInput: Losses outside of 0..bound, or that increase.

    Examples:
        >>> losses = (torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)) > torch.linspace(0, 1, 11)).float()
        >>> risk_controlled_threshold(losses, alpha=0.25)
        8
    """
    values = wide(as_given(losses, "losses"))
    if values.dim() != 2 or not values.numel():
        raise BadInput(f"losses must be [n, L], got shape {tuple(values.shape)}")
    check_finite(values, "losses")
    if not bool(((values >= 0) & (values <= bound)).all()):
        raise BadInput(f"losses must lie between 0 and bound={bound}")
    risks = values.mean(0)
    if bool((risks[1:] > risks[:-1] + 1e-12).any()):
        raise BadInput(
            "losses increase from one setting to the next; order the settings from the riskiest to the safest"
        )
    count = len(values)
    if delta is None:
        controlled = (count * risks + bound) / (count + 1) <= alpha
    else:
        check_level(delta, "delta")
        p_values = torch.stack([hoeffding_bentkus(risk / bound, count, alpha / bound) for risk in risks])
        # From the safest on, so that the first failure ends the search.
        controlled = (p_values <= delta).flip(0).long().cumprod(0).flip(0).bool()
    return int(controlled.nonzero()[0]) if bool(controlled.any()) else None


def hoeffding_bentkus(risk: Tensor, count: int, alpha: float) -> Tensor:
    """Return a p-value of "the true mean of losses in 0..1 exceeds alpha" (Bates et al., 2021, proposition 4)."""
    if float(risk) >= alpha:
        return torch.ones_like(risk)
    divergence = _xlogy(risk, risk / alpha) + _xlogy(1 - risk, (1 - risk) / (1 - alpha))
    hoeffding = (-count * divergence).exp()
    bentkus = math.e * binomial_p_value(
        (count * risk).ceil().reshape(1), torch.full_like(risk, count).reshape(1), alpha
    )
    return torch.minimum(hoeffding, bentkus[0]).clamp_max(1.0)


def binomial_p_value(wrong: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Return P(X <= wrong) of a binomial with `counts` trials of probability `rate`, float64."""
    # scipy's incomplete beta function; torch has none.
    from scipy.stats import binom

    found = binom.cdf(wrong.cpu().numpy(), counts.cpu().numpy(), rate)
    return torch.as_tensor(found, dtype=torch.float64, device=wrong.device)


def _xlogy(x: Tensor, y: Tensor) -> Tensor:
    return torch.special.xlogy(x, y)


def _answers(pred: Predictive) -> tuple[Tensor, Tensor]:
    """Confidence and label of each example `[N]`."""
    if not isinstance(pred, (CategoricalPredictive, BernoulliPredictive)):
        raise BadType(f"selective prediction is for classification, got a {type(pred).__name__}")
    check_shape(pred.labels, (len(pred),), "pred")
    return wide(pred.confidence), pred.labels.long()
