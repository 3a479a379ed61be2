"""When classes are as they were and only their shares have changed: correction of the prior.

M. Saerens, P. Latinne, C. Decaestecker (2002). Adjusting the outputs of a classifier to new a priori probabilities.
Neural Computation 14. Z. C. Lipton, Y.-X. Wang, A. J. Smola (2018). Detecting and correcting for label shift with black
box predictors. ICML.
"""

from __future__ import annotations

import warnings
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from bayesguard.calibration.base import Calibrator, class_columns
from bayesguard.checks import check_finite, check_labels, check_shape
from bayesguard.errors import BadInput, CalibrationWarning, NotFitted
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.numerics import as_given, wide

_MAX_STEPS = 10_000
_STEADY = 1e-10
# Confusion so near to singular that shares are guesses.
_MAX_CONDITION = 1e4


class PriorCorrection(Calibrator):
    """Bayes' rule with the class shares of the new data: p'(y | x) is proportional to p(y | x) new(y) / old(y).

    Fitted on held-out data with labels, it knows the old shares; the new ones are given, or estimated from predictions
    for unlabelled new data. Calibrate first: the estimates believe the probabilities.

    It acts on the mixture, whose answer is then one distribution: what draws disagreed about is gone.

    Args:
        method: How `adapt` estimates the new shares. "em": the maximum likelihood of all predictions (Saerens et al.,
            2002, eq. 2.8); "bbse": from the confusion of held-out predictions (Lipton et al., 2018, eq. 3).
        trained_shares: Class shares that the network was trained on `[K]`, where they are not those of the held-out data:
            equal ones after training on balanced batches. `fit` then corrects to the shares of the held-out data;
            `adapt_to` and `adapt` by "em" need no `fit`.

    Attributes:
        old: Class shares that predictions are made for `[K]`: of the held-out data, or `trained_shares`.
        new: Those corrected to `[K]`; those of the held-out data until `adapt` or `adapt_to`.

    Examples:
        >>> probs = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).repeat(50, 1)
        >>> labels = torch.tensor([0, 1]).repeat(50)
        >>> correction = PriorCorrection().fit(Predictive.from_probs(probs), labels).adapt_to([0.9, 0.1])
        >>> correction(Predictive.from_probs([[0.5, 0.5]])).probs
        tensor([[0.9000, 0.1000]])
    """

    acts_on: ClassVar[Literal["draws", "pooled"]] = "pooled"
    sized_by_fit = ("old", "new", "confusion")
    old: Tensor
    new: Tensor
    confusion: Tensor

    def __init__(self, method: Literal["em", "bbse"] = "em", *, trained_shares: object = None) -> None:
        super().__init__()
        if method not in ("em", "bbse"):
            raise BadInput(f"method must be 'em' or 'bbse', got {method!r}")
        self.method = method
        for name, shape in (("old", (0,)), ("new", (0,)), ("confusion", (0, 0))):
            self.register_buffer(name, torch.empty(shape, dtype=torch.float64))
        self._trained = None if trained_shares is None else _shares(trained_shares, "trained_shares")
        if self._trained is not None:
            if not bool((self._trained > 0).all()):
                raise BadInput("trained_shares must be positive: what was never trained on cannot be corrected to")
            self.old, self.new = self._trained.clone(), self._trained.clone()
            self.is_fitted = self.is_fitted.new_tensor(True)

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        probs = wide(class_columns(pred, self))
        labels = check_labels(targets, probs.shape[:1], probs.shape[1])
        member = torch.nn.functional.one_hot(labels, probs.shape[1]).double()
        counts = member.sum(0)
        if bool((counts == 0).any()):
            missing = int((counts == 0).nonzero()[0])
            raise BadInput(f"class {missing} has no held-out example, so that its old share is unknown; add some")
        self.old, self.new = counts / counts.sum(), counts / counts.sum()
        if self._trained is not None:
            check_shape(self._trained, self.old.shape, "trained_shares")
            self.old = self._trained.to(self.old)
        # Mean prediction for each true class, columns for classes.
        self.confusion = (probs.T @ member) / counts
        self.diagnostics = {"num_examples": len(labels), "condition": float(torch.linalg.cond(self.confusion))}

    @property
    def can_adapt(self) -> bool:
        return True

    @torch.no_grad()
    def adapt(self, pred: Predictive) -> Self:
        """Estimate the new shares from predictions for unlabelled data, and correct to them from now on.

        Raises:
            NotFitted: `fit` comes first.
            BadInput: "bbse" with predictions that do not tell the classes apart.
        """
        self._check_fitted()
        probs = wide(class_columns(pred, self)).to(self.old)
        if probs.shape[1] != len(self.old):
            raise BadInput(f"pred has {probs.shape[1]} classes, fit saw {len(self.old)}")
        if not len(probs):
            raise BadInput("pred has no examples to estimate shares from")
        self.new = self._by_em(probs) if self.method == "em" else self._by_confusion(probs)
        return self

    def adapt_to(self, shares: object) -> Self:
        """Correct to shares that are known, `[K]`, from now on: after training on balanced batches, the true ones."""
        self._check_fitted()
        values = _shares(shares, "shares")
        check_shape(values, self.old.shape, "shares")
        self.new = values.to(self.old)
        return self

    def _by_em(self, probs: Tensor) -> Tensor:
        ratio = torch.ones_like(self.old)
        for _ in range(_MAX_STEPS):
            joint = probs * ratio
            shares = (joint / joint.sum(-1, keepdim=True)).mean(0)
            step = (shares / self.old - ratio).abs().max()
            ratio = shares / self.old
            if step < _STEADY:
                return shares
        warnings.warn(
            f"the shares still move after {_MAX_STEPS} steps of expectation maximisation; more unlabelled data are needed",
            CalibrationWarning,
            stacklevel=3,
        )
        return shares

    def _by_confusion(self, probs: Tensor) -> Tensor:
        from scipy.optimize import nnls

        if not len(self.confusion):
            raise NotFitted('method="bbse" needs the confusion of held-out predictions; call fit(pred, targets) first')
        condition = float(torch.linalg.cond(self.confusion))
        if not condition < _MAX_CONDITION:
            raise BadInput(
                f"the held-out confusion is nearly singular (condition {condition:.3g}): predictions do not tell all classes "
                'apart, and their shares cannot be found; use method="em", or a better predictor'
            )
        shares, _ = nnls(self.confusion.cpu().numpy(), probs.mean(0).cpu().numpy())
        found = torch.as_tensor(shares).to(self.old)
        return found / found.sum()

    def _calibrate(self, pred: Predictive) -> Predictive:
        probs = wide(class_columns(pred, self)).to(self.old)
        joint = (probs * (self.new / self.old)).clamp_min(torch.finfo(torch.float64).tiny)
        corrected = (joint / joint.sum(-1, keepdim=True)).to(pred.device, pred.dtype)
        if isinstance(pred, BernoulliPredictive):
            return BernoulliPredictive(torch.logit(corrected[:, 1]).unsqueeze(0), exact=pred.exact)
        return CategoricalPredictive(corrected.log().unsqueeze(0), exact=pred.exact)

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise NotFitted("this PriorCorrection is not fitted; call fit(pred, targets) on held-out predictions first")

    def extra_repr(self) -> str:
        return f"method={self.method!r}, {'fitted' if self.fitted else 'not fitted'}"


def _shares(shares: object, name: str) -> Tensor:
    """Shares of classes `[K]` in float64, or what is wrong with them."""
    values = as_given(shares, name).detach().double()
    if values.dim() != 1:
        raise BadInput(f"{name} must be [K], a share for each class, got shape {tuple(values.shape)}")
    check_finite(values, name)
    if not bool((values >= 0).all()) or abs(float(values.sum()) - 1) > 1e-6:
        raise BadInput(f"{name} must be 0 or more and sum to 1, got a sum of {float(values.sum()):.6g}")
    return values / values.sum()
