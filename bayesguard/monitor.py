"""Watching calibration over time: an alarm that may be looked at after every example.

S. Arnold, A. Henzi, J. F. Ziegel (2023). Sequentially valid tests for forecast calibration. Annals of Applied Statistics 17.
A. Ramdas, P. Grünwald, V. Vovk, G. Shafer (2023). Game-theoretic statistics and safe anytime-valid inference.
Statistical Science 38.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesguard.checks import check_labels, check_level, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.numerics import as_given, wide
from bayesguard.text_tensors import text_as_tensor, text_of_tensor

Claim = Literal["confidence", "pit"]

# Shares of the wealth that are staked: small ones find small faults in long streams, large ones large faults soon.
_STAKES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
# Bets begin at the examples 1, 2, 4, 8, ..., so that a fault that comes late is not drowned in what was lost before.
_STARTS = 41
_ROWS = 1024


class CalibrationMonitor(nn.Module):
    """An e-process against the claim that predictions are calibrated: a fortune that grows only where they are not.

    A gambler bets against the predictions at fair odds. While the claim is true the probability that the fortune ever
    reaches `1 / alpha` is at most alpha (Ville's inequality), however long the stream and however often one looks. An
    update takes the same time and memory whatever has been seen; the state is in `state_dict()`.

    Args:
        alpha: Probability of a false alarm, over all time.
        claim: "confidence": an answer of confidence c is right with probability c. "pit": the answers' probability
            integrals are uniform, for predictives with a cdf.

    Attributes:
        num_examples: How many were seen.
        alarm_at: Number of the example at which the alarm was raised, from 1; 0 while there is none.

    Examples:
        >>> monitor = CalibrationMonitor(alpha=0.01)
        >>> sure = Predictive.from_probs(torch.tensor([[0.99, 0.01]]).expand(100, 2))
        >>> monitor.update(sure, torch.arange(100) % 2)  # half of them wrong
        True
        >>> int(monitor.alarm_at), monitor.finding()
        (26, 'over-confident')
    """

    log_wealth: Tensor
    num_examples: Tensor
    alarm_at: Tensor

    def __init__(self, alpha: float = 0.01, claim: Claim = "confidence") -> None:
        super().__init__()
        if claim not in ("confidence", "pit"):
            raise BadInput(f"claim must be 'confidence' or 'pit', got {claim!r}")
        self.alpha, self.claim = check_level(alpha, "alpha"), claim
        directions = 2 if claim == "confidence" else 4
        size = _STARTS, directions * len(_STAKES)
        self.register_buffer("log_wealth", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("num_examples", torch.zeros((), dtype=torch.long))
        self.register_buffer("alarm_at", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, pred: Predictive, targets: object) -> bool:
        """Take further examples in their order, and return whether there is an alarm.

        Args:
            pred: Predictions for n examples, made before their targets were known.
            targets: What was observed.

        Raises:
            BadInput: Targets of another shape, or outside their range.
            BadType: A predictive that says nothing about the claim.
        """
        gains = self._gains(pred, as_given(targets, "targets").detach().to(pred.device)).to(self.log_wealth.device)
        for part in gains.split(_ROWS) if len(gains) else ():
            self._take(part)
        return self.alarm

    @property
    def alarm(self) -> bool:
        """Whether the claim was rejected; it stays."""
        return bool(self.alarm_at > 0)

    @property
    def e_value(self) -> float:
        """The fortune now, of 1 at first, infinite above 1e308; its reciprocal is a p-value for those who look once."""
        return float(self._total(self.log_wealth).exp())

    def finding(self) -> str:
        """Say which bets have won most: what is wrong, if anything is."""
        if self.e_value <= 1:
            return "nothing against the claim"
        names = (
            ("under-confident", "over-confident")
            if self.claim == "confidence"
            else ("answers are too low", "answers are too high", "intervals are too narrow", "intervals are too wide")
        )
        each = self.log_wealth.reshape(_STARTS, len(names), len(_STAKES)).logsumexp((0, 2))
        return names[int(each.argmax())]

    def _gains(self, pred: Predictive, targets: Tensor) -> Tensor:
        """What a unit stake in each direction wins, `[n, directions]`, between -1 and 1, of mean 0 under the claim."""
        if self.claim == "confidence":
            if not isinstance(pred, (CategoricalPredictive, BernoulliPredictive)):
                raise BadType(f"a {type(pred).__name__} has no confidence; use claim='pit'")
            check_shape(pred.labels, (len(pred),), "pred")
            right = (pred.labels == check_labels(targets, pred.labels.shape, pred.num_classes)).double()
            gain = right - wide(pred.confidence)
            return torch.stack([gain, -gain], dim=-1)
        if isinstance(pred, (CategoricalPredictive, BernoulliPredictive)) or not hasattr(pred, "cdf"):
            raise BadType(f"a {type(pred).__name__} has no cdf; use claim='confidence'")
        check_shape(targets, (len(pred),), "targets")
        place = 2 * wide(pred.cdf(targets)) - 1
        spread = 1.5 * place.square() - 0.5
        return torch.stack([place, -place, spread, -spread], dim=-1)

    def _take(self, gains: Tensor) -> None:
        stakes = gains.new_tensor(_STAKES)
        growth = (gains.unsqueeze(-1) * stakes).log1p().flatten(1)
        numbers = self.num_examples + torch.arange(1, len(gains) + 1, device=gains.device)
        started = numbers.unsqueeze(-1) >= 2 ** torch.arange(_STARTS, device=gains.device)
        paths = self.log_wealth + (started.unsqueeze(-1) * growth.unsqueeze(1)).cumsum(0)
        if not self.alarm:
            reached = (self._total(paths) >= -math.log(self.alpha)).nonzero()
            if len(reached):
                self.alarm_at.copy_(numbers[int(reached[0])])
        self.log_wealth.copy_(paths[-1])
        self.num_examples += len(gains)

    def _total(self, log_wealth: Tensor) -> Tensor:
        """Logarithm of the fortune over all bets, `[...]`: it was divided among starts, directions and stakes at first."""
        order = torch.arange(_STARTS, device=log_wealth.device, dtype=log_wealth.dtype)
        shares = 1 / ((order + 1) * (order + 2))
        shares = (shares / shares.sum()).log() - math.log(log_wealth.shape[-1])
        return (log_wealth + shares.unsqueeze(-1)).logsumexp((-2, -1))

    def get_extra_state(self) -> Any:
        """Return the claim, so that another one's fortune is not taken for this one's."""
        return text_as_tensor(self.claim)

    def set_extra_state(self, state: Any) -> None:
        """Refuse the state of another claim."""
        # Older states are dicts.
        claim = text_of_tensor(state) if isinstance(state, Tensor) else state.get("claim")
        if claim != self.claim:
            raise BadInput(f"the state is of a monitor of {claim!r}, this one watches {self.claim!r}")

    def extra_repr(self) -> str:
        raised = f", alarm at example {int(self.alarm_at)}" if self.alarm else ""
        return f"alpha={self.alpha}, claim={self.claim!r}, {int(self.num_examples)} examples{raised}"
