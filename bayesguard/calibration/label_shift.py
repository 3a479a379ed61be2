"""When classes are as they were and only their shares have changed: correction of the prior.

M. Saerens, P. Latinne, C. Decaestecker (2002). Adjusting the outputs of a classifier to new a priori probabilities.
Neural Computation 14. Z. C. Lipton, Y.-X. Wang, A. J. Smola (2018). Detecting and correcting for label shift with black
box predictors. ICML. A. Alexandari, A. Kundaje, A. Shrikumar (2020). Maximum likelihood with bias-corrected calibration is
hard-to-beat at label shift adaptation. ICML. H. Hotelling (1931). The generalization of Student's ratio. Annals of
Mathematical Statistics 2. J. P. T. Higgins, S. G. Thompson (2002). Quantifying heterogeneity in a meta-analysis. Statistics
in Medicine 21.
"""

from __future__ import annotations

import warnings
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from bayesguard.calibration.base import Calibrator, class_columns, class_labels, class_log_probs, from_class_log_probs
from bayesguard.calibration.class_shares import confused_shares, mean_test, most_likely_shares
from bayesguard.checks import check_finite, check_shape
from bayesguard.errors import BadInput, CalibrationWarning, NotFitted
from bayesguard.predictive import CategoricalPredictive, Predictive
from bayesguard.predictive.numerics import as_given, wide


class PriorCorrection(Calibrator):
    """Bayes' rule with the class shares of the new data: p'(y | x) is proportional to p(y | x) new(y) / old(y).

    Fitted on held-out data with labels, it knows the old shares; the new ones are given, or estimated from predictions
    for unlabelled new data. Calibrate first: the estimates believe the probabilities.

    An estimate costs something, and where little has changed more than it gains. `adapt` therefore

    - counts K rows more, which have the shares that predictions were for so far: no class is ruled out, and what that
      changes falls with the number of new rows;
    - tests whether the mean prediction is still that of held-out data (Hotelling's T²), and goes the share `max(0, 1 - 1/F)`
      of the way to its estimate, where F is about 1 if nothing has changed: the share of the distance that chance does not
      explain (I² of Higgins and Thompson, 2002). Whatever changes predictions passes for other shares.

    It acts on the mixture, whose answer is then one distribution: what draws disagreed about is gone.

    Args:
        method: How `adapt` estimates the new shares. "em": the most likely ones, given all predictions (Saerens et al.,
            2002, eq. 2.8), which are taken to be for the mean of held-out predictions (Alexandari et al., 2020);
            "bbse": from the confusion of held-out predictions (Lipton et al., 2018, eq. 3).
        trained_shares: Class shares that the network was trained on `[K]`, where they are not those of the held-out data:
            equal ones after training on balanced batches. `fit` then corrects to the shares of the held-out data;
            `adapt_to` and `adapt` by "em" need no `fit`.

    Attributes:
        old: Class shares that predictions are made for `[K]`: of the held-out data, or `trained_shares`.
        new: Those corrected to `[K]`; those of the held-out data until `adapt` or `adapt_to`.
        shift_p_value: Probability that predictions differ as much from held-out ones as those that were adapted to, if
            nothing has changed, 0-d float64; NaN before `adapt`.

    Examples:
        >>> probs = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).repeat(50, 1)
        >>> labels = torch.tensor([0, 1]).repeat(50)
        >>> correction = PriorCorrection().fit(Predictive.from_probs(probs), labels).adapt_to([0.9, 0.1])
        >>> correction(Predictive.from_probs([[0.5, 0.5]])).probs
        tensor([[0.9000, 0.1000]])
    """

    acts_on: ClassVar[Literal["draws", "pooled"]] = "pooled"
    sized_by_fit = ("old", "new", "confusion", "held", "reference", "mean", "scatter")
    old: Tensor
    new: Tensor
    confusion: Tensor
    held: Tensor  # shares of the held-out data, or what is known without them: those trained on
    reference: Tensor  # shares that EM takes predictions to be for
    mean: Tensor  # of held-out predictions, and the outer products of their distances from it
    scatter: Tensor
    num_held: Tensor
    shift_p_value: Tensor

    def __init__(self, method: Literal["em", "bbse"] = "em", *, trained_shares: object = None) -> None:
        super().__init__()
        if method not in ("em", "bbse"):
            raise BadInput(f"method must be 'em' or 'bbse', got {method!r}")
        self.method = method
        for name in self.sized_by_fit:
            shape = (0, 0) if name in ("confusion", "scatter") else (0,)
            self.register_buffer(name, torch.empty(shape, dtype=torch.float64))
        self.register_buffer("num_held", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.register_buffer("shift_p_value", torch.full((), torch.nan, dtype=torch.float64, device="cpu"))
        self._trained = None if trained_shares is None else _shares(trained_shares, "trained_shares")
        if self._trained is not None:
            if not bool((self._trained > 0).all()):
                raise BadInput("trained_shares must be positive: what was never trained on cannot be corrected to")
            self.old, self.new, self.held = (self._trained.clone() for _ in range(3))
            self.reference, self.mean = self._trained.clone(), self._trained.clone()
            self.scatter = torch.zeros(2 * self.mean.shape, dtype=torch.float64, device=self.mean.device)
            self.is_fitted = self.is_fitted.new_tensor(True)

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        probs = wide(class_columns(pred, self))
        labels = class_labels(pred, targets)
        member = torch.nn.functional.one_hot(labels, probs.shape[1]).double()
        counts = member.sum(0)
        if bool((counts == 0).any()):
            missing = int((counts == 0).nonzero()[0])
            raise BadInput(f"class {missing} has no held-out example, so that its old share is unknown; add some")
        self.old, self.new, self.held = (counts / counts.sum() for _ in range(3))
        self.mean = probs.mean(0)
        # Of held-out data EM then finds the shares that they have, calibrated or not; no class has the reference 0.
        self.reference = (probs.sum(0) + len(counts) * self.held) / (len(probs) + len(counts))
        if self._trained is not None:
            check_shape(self._trained, self.old.shape, "trained_shares")
            self.old = self._trained.to(self.old)
            self.reference = self.old.clone()
        self.scatter = (probs - self.mean).T @ (probs - self.mean)
        self.num_held = torch.full_like(self.num_held, len(labels))
        self.shift_p_value = torch.full_like(self.shift_p_value, torch.nan)
        # Mean prediction for each true class, columns for classes.
        self.confusion = (probs.T @ member) / counts
        self.diagnostics = {"num_examples": len(labels), "condition": float(torch.linalg.cond(self.confusion))}

    @property
    def can_adapt(self) -> bool:
        return True

    @torch.no_grad()
    def adapt(self, pred: Predictive) -> Self:
        """Estimate the new shares from predictions for unlabelled data, and correct to them from now on.

        They stay those of the held-out data where the mean prediction is as near to the held-out one as chance makes it.

        Raises:
            NotFitted: `fit` comes first.
            BadInput: "bbse" with predictions that do not tell the classes apart.

        Warns:
            CalibrationWarning: Too few rows to tell whether anything has changed: the shares stay.
        """
        self._check_fitted()
        probs = wide(class_columns(pred, self)).to(self.old)
        if probs.shape[1] != len(self.old):
            raise BadInput(f"pred has {probs.shape[1]} classes, fit saw {len(self.old)}")
        if not len(probs):
            raise BadInput("pred has no examples to estimate shares from")
        found = self._by_em(probs) if self.method == "em" else self._by_confusion(probs)
        test = mean_test(probs, self.mean, self.scatter, int(self.num_held))
        if test is None:
            warnings.warn(
                f"pred has {len(probs)} rows, too few or too much alike to tell whether class shares have changed; they stay "
                "as they were. Adapt to more rows, or give shares that are known to adapt_to",
                CalibrationWarning,
                stacklevel=2,
            )
        moved = 0.0 if test is None else max(0.0, 1 - 1 / max(test.ratio, 1.0))
        self.new = torch.lerp(self.held, found, moved)
        self.shift_p_value = torch.full_like(self.shift_p_value, torch.nan if test is None else test.p_value)
        return self

    def adapt_to(self, shares: object) -> Self:
        """Correct to shares that are known, `[K]`, from now on: after training on balanced batches, the true ones."""
        self._check_fitted()
        values = _shares(shares, "shares")
        check_shape(values, self.old.shape, "shares")
        self.new = values.to(self.old)
        self.shift_p_value = torch.full_like(self.shift_p_value, torch.nan)
        return self

    def _by_em(self, probs: Tensor) -> Tensor:
        # The prior's mode, as shares that stand to the reference as those of the held-out data to the old ones.
        centre = _normalised(self.reference * self.held / self.old)
        shares = most_likely_shares(probs, self.reference, centre, strength=len(centre))
        return _normalised(self.old * shares / self.reference)

    def _by_confusion(self, probs: Tensor) -> Tensor:
        if not len(self.confusion):
            raise NotFitted('method="bbse" needs the confusion of held-out predictions; call fit(pred, targets) first')
        shares = confused_shares(probs.mean(0), self.confusion)
        return (len(probs) * shares + len(shares) * self.held) / (len(probs) + len(shares))

    def _calibrate(self, pred: Predictive) -> Predictive:
        # In logarithms, since a probability next to 1 has no digits left; an answer that new shares rule out stays finite.
        change = (self.new / self.old).clamp_min(torch.finfo(torch.float64).tiny).log()
        log_probs = class_log_probs(pred, self).to(self.old) + change
        if isinstance(pred, CategoricalPredictive):
            log_probs = log_probs.log_softmax(-1)
        return from_class_log_probs(pred, log_probs)

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise NotFitted("this PriorCorrection is not fitted; call fit(pred, targets) on held-out predictions first")

    def extra_repr(self) -> str:
        return f"method={self.method!r}, {'fitted' if self.fitted else 'not fitted'}"


def _normalised(values: Tensor) -> Tensor:
    return values / values.sum()


def _shares(shares: object, name: str) -> Tensor:
    """Shares of classes `[K]` in float64, or what is wrong with them."""
    values = as_given(shares, name).detach().double()
    if values.dim() != 1:
        raise BadInput(f"{name} must be [K], a share for each class, got shape {tuple(values.shape)}")
    check_finite(values, name)
    if not bool((values >= 0).all()) or abs(float(values.sum()) - 1) > 1e-6:
        raise BadInput(f"{name} must be 0 or more and sum to 1, got a sum of {float(values.sum()):.6g}")
    return _normalised(values)
