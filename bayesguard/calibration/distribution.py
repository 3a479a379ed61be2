"""Conformal predictive distributions: a whole distribution whose cdf is right on average, whatever the model.

V. Vovk, J. Shen, V. Manokhin, M. Xie (2019). Nonparametric predictive distributions based on conformal prediction. Machine
Learning 108. V. Vovk, I. Petej, I. Nouretdinov, V. Manokhin, A. Gammerman (2020). Computationally efficient versions of
conformal predictive distributions. Neurocomputing 397.
"""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from bayesguard.calibration.base import Calibrator
from bayesguard.calibration.conformal import ConformalInterval, real_targets, rounding_slack
from bayesguard.calibration.ranks import conformal_rank
from bayesguard.checks import check_count, check_level
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.predictive import CountPredictive, Predictive, SamplePredictive
from bayesguard.predictive.guaranteed import RowValues, guaranteed
from bayesguard.predictive.numerics import wide

ResidualScore = Literal["absolute", "normalised"]


class ConformalDistribution(Calibrator):
    """The distribution of held-out residuals around each prediction: calibrated for exchangeable examples, whatever the model.

    A prediction becomes the samples `mean + residual`, or `mean + stddev * residual` with residuals in standard deviations
    of the predictive: a `SamplePredictive`, with mean, variance, cdf, quantiles, samples and CRPS. It is the crisp form:
    without ties the cdf at the answer, of n held-out examples, is uniform on 0, 1/n, ..., 1; with ties nothing is drawn at
    random, and it is above that. `interval(alpha)` leaves out `floor(alpha / 2 (n + 1))` residuals on each side but those
    that are its ends, and holds the answer with probability `1 - alpha` at least; quantiles by `icdf` are off by up to
    `1 / (n + 1)`.

    Each of several outputs has residuals of its own. A prediction costs as many numbers as there are draws.

    Args:
        score: "absolute": residuals in the target's unit, one shape everywhere. "normalised": in standard deviations of the
            predictive.
        alpha: Mis-coverage of intervals where none is said.
        num_draws: Residuals that are kept at most, at ranks of equal distance; with fewer than there are, the ends of
            intervals move outwards to the nearest kept ones.

    Attributes:
        residuals: That are kept, ascending, float64 `[S, ...]`.
        ranks: Their ranks among the n held-out ones, from 1, int64 `[S]`.
        num_examples: n, int64 without axes.

    References:
        Vovk et al., 2020, section 4 (split conformal predictive systems).

    Examples:
        >>> pred = Predictive.from_normal(torch.zeros(99), 0.1)  # ten times too sure
        >>> y = torch.randn(99, generator=torch.Generator().manual_seed(0))
        >>> calibrated = ConformalDistribution().fit(pred, y)(pred)
        >>> calibrated.stddev[0] > 0.9, calibrated.icdf(0.5)[0].abs() < 0.3
        (tensor(True), tensor(True))
    """

    acts_on = "pooled"
    needs_own_data = True
    sized_by_fit = ("residuals", "ranks")
    settings = ("score",)
    residuals: Tensor
    ranks: Tensor
    num_examples: Tensor

    def __init__(self, score: ResidualScore = "normalised", alpha: float = 0.1, *, num_draws: int = 1000) -> None:
        if score not in get_args(ResidualScore):
            raise BadInput(f"score must be one of {', '.join(map(repr, get_args(ResidualScore)))}, got {score!r}")
        super().__init__()
        self.score, self.alpha = score, check_level(alpha, "alpha")
        self.num_draws = check_count(num_draws, "num_draws", minimum=2)
        self.register_buffer("residuals", torch.empty(0, dtype=torch.float64))
        self.register_buffer("ranks", torch.empty(0, dtype=torch.long))
        self.register_buffer("num_examples", torch.zeros((), dtype=torch.long))

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        centre, width = self._shape(pred)
        residuals = ((real_targets(pred, targets) - centre) / width).sort(dim=0).values
        count = len(residuals)
        if count < 2:
            raise BadInput("pred has one example; a distribution of residuals needs two held-out examples at least")
        kept = min(count, self.num_draws)
        places = torch.arange(1, kept + 1, device=residuals.device)
        self.ranks = (places * (count + 1) + (kept + 1) // 2) // (kept + 1)
        self.residuals, self.num_examples = residuals[self.ranks - 1], self.num_examples.new_tensor(count)
        self.diagnostics = {"num_examples": count, "num_draws": kept}

    def _shape(self, pred: Predictive) -> tuple[Tensor, Tensor]:
        if isinstance(pred, CountPredictive):
            raise BadType("a count and a residual make no count; use ConformalInterval for intervals of counts")
        if not hasattr(pred, "icdf"):
            raise BadType(f"residuals are of predictives of numbers, got a {type(pred).__name__}")
        return ConformalInterval(self.score)._shape(pred)

    def _calibrate(self, pred: Predictive) -> Predictive:
        centre, width = self._shape(pred)
        residuals = self.residuals.to(centre)
        if residuals.shape[1:] != centre.shape[1:]:
            raise BadInput(
                f"pred has outputs {tuple(centre.shape[1:])}, this calibrator was fitted to {tuple(residuals.shape[1:])}"
            )
        samples = SamplePredictive((centre + width * residuals.unsqueeze(1)).to(pred.dtype))
        # The draws are all that there is: no Monte-Carlo error.
        return guaranteed(samples._rebuild(samples._tensors(), exact=True), self._interval, self.alpha)

    def _interval(self, pred: Predictive, alpha: float, _: RowValues) -> tuple[Tensor, Tensor]:
        assert isinstance(pred, SamplePredictive)
        count = int(self.num_examples)
        outside = count + 1 - conformal_rank(count, alpha / 2)
        # Ascending, since residuals are and widths are positive.
        below = int((self.ranks <= outside).sum())
        above = int((self.ranks >= count + 1 - outside).sum())
        if not below or not above:
            self._warn_of_few(alpha)
            everything = torch.full_like(pred.samples[0], torch.inf)
            return -everything, everything
        lower, upper = pred.samples[below - 1], pred.samples[len(self.ranks) - above]
        crossed, middle = lower > upper, (lower + upper) / 2
        lower, upper = torch.where(crossed, middle, lower), torch.where(crossed, middle, upper)
        # Samples are rounded to the nearest number: the answer that a residual came from may lie beside it.
        slack = rounding_slack(wide(lower), wide(upper)).to(lower)
        infinity = torch.full_like(lower, torch.inf)
        return lower.nextafter(-infinity) - slack, upper.nextafter(infinity) + slack

    def _warn_of_few(self, alpha: float) -> None:
        warnings.warn(
            f"{len(self.ranks)} residuals are too few to leave any out on either side at alpha={alpha}, and intervals hold "
            "everything: about 2 / alpha held-out examples are needed, and as many draws (num_draws=)",
            CalibrationWarning,
            stacklevel=4,
        )

    def extra_repr(self) -> str:
        size = f"{int(self.num_examples)} examples" if self.fitted else "not fitted"
        return f"score={self.score!r}, alpha={self.alpha}, {size}"
