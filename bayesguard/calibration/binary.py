"""Calibration of yes or no by a map of the log-odds of every draw: Platt scaling and beta calibration."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.calibration.binary_fit import AnswerLikelihood, Minimum, identity_like, newton
from bayesguard.calibration.fitted import BOUND, TOLERANCE, Fitted, check_possible, first_few, warn
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import BernoulliPredictive, Predictive
from bayesguard.predictive.bernoulli import check_answers
from bayesguard.predictive.numerics import wide


class _AnswerMap(Fitted):
    """What maps of one logit share: a few numbers for each label, found by damped Newton steps for all labels at once."""

    scale: Tensor
    smooth = False

    @staticmethod
    @abstractmethod
    def _features(odds: Tensor) -> Tensor:
        """What the map is linear in, `[..., P]`, the last of them 1; from finite log-odds."""

    def _search(self, likelihood: AnswerLikelihood) -> Minimum:
        """Find the numbers `[L, P]` of the smallest pooled NLL."""
        return newton(likelihood)

    def _calibrate(self, pred: Predictive) -> Predictive:
        draws = self._draws(pred)
        if self.bias.shape != draws.shape[2:]:
            raise BadInput(
                f"pred has batch shape {tuple(pred.batch_shape)}, but this {type(self).__name__} was fitted to "
                f"{('N', *self.bias.shape)}; fit one to predictions of these labels"
            )
        bias = self.bias.unsqueeze(-1)
        change = wide(torch.cat([self.scale.reshape(*self.bias.shape, -1), bias], dim=-1).to(draws.device))
        change = change - identity_like(change)

        def calibrated(part: Tensor) -> Tensor:
            sure = part.isinf()
            odds = wide(part).masked_fill(sure, 0.0)
            # The sum of changes: where nothing changes, not even by a rounding.
            return torch.where(sure, part, (odds + (self._features(odds) * change).sum(-1)).to(part.dtype))

        return self._changed(pred, draws, calibrated)

    def _fit(self, pred: Predictive, targets: Tensor, counts: Tensor | None = None) -> None:
        draws, weighted = self._draws(pred), pred.weights > 0
        answers = check_answers(targets, pred.batch_shape, "targets")
        if counts is not None:
            some = counts > 0  # an example of weight 0 is as if it was not there
            draws, answers, counts = draws[:, some], answers[some], counts[some]
        labelled = answers.dim() == 2
        if not labelled:
            draws, answers = draws.unsqueeze(-1), answers.unsqueeze(-1)
        side = 2 * wide(answers) - 1
        share = torch.ones_like(side) if counts is None else counts.unsqueeze(-1).expand_as(side)
        plain = AnswerLikelihood(draws[weighted], side, share, pred.weights[weighted], self._features)
        count = int((plain.share > 0).sum())
        check_possible(answers.numel() - count, answers.numel())
        likelihood = plain.smoothed() if self.smooth else plain
        found = self._search(likelihood)
        numbers = found.numbers.float().to(found.numbers)  # as they are kept
        identity = likelihood.identity.expand_as(numbers)

        one_sided = plain.one_sided()
        separable = torch.zeros_like(one_sided)
        if not self.smooth:
            # At a minimum, twice as large log-odds are worse.
            ever_better = plain.nll(2 * numbers) < plain.nll(numbers) - 1e-12
            separable = ~one_sided & (plain.separable() | ever_better)
        before, after = likelihood.nll(identity), likelihood.nll(numbers)
        unchanged = one_sided | separable | ~(after <= before)
        numbers = torch.where(unchanged[:, None], identity, numbers)
        kept = numbers if labelled else numbers[0]
        self._store(kept[..., :-1].squeeze(-1), kept[..., -1])
        self._warn_of(labelled, one_sided, separable, ~(after <= before + 1e-9), found, numbers)
        norms = found.gradient_norm[~(one_sided | separable)]
        self.diagnostics = {
            "nll_before": plain.mean(plain.nll(identity)),
            "nll_after": plain.mean(plain.nll(numbers)),
            "num_examples": count,
            "num_excluded": answers.numel() - count,
            "converged": bool((norms <= TOLERANCE).all()),
            "iterations": found.iterations,
            "gradient_norm": float(norms.max()) if len(norms) else math.nan,
            "separable": bool(separable.any()),
        }

    _fit_weighted = _fit

    def _warn_of(
        self, labelled: bool, one_sided: Tensor, separable: Tensor, worse: Tensor, found: Minimum, numbers: Tensor
    ) -> None:
        name, fine = type(self).__name__, ~(one_sided | separable | worse)
        reasons = {
            "the answers are all yes or all no, and no map of them can be fitted; the predictions stay as they are. "
            "Held-out examples of both kinds are needed": one_sided,
            f"the answers are separable: the likelihood favours ever larger log-odds, and no {name} is best; the "
            "predictions stay as they are. More held-out examples, with mistakes among them, are needed": separable,
            f"the {name} that was found is worse than none on the data it was fitted to; the predictions stay as they "
            "are": worse,
            f"the search for the {name} did not converge in {found.iterations} iterations: the norm of the gradient of "
            f"the mean NLL is more than {TOLERANCE:g}": fine & ~(found.gradient_norm <= TOLERANCE),
            f"a factor of the {name} is more than {BOUND:g}; the examples are too few, or these are no logits": fine
            & (numbers[:, :-1].abs() > BOUND).any(-1),
            "the log-odds are lower where the answer is yes, and the fitted factor is negative; are the targets in the "
            "order of the predictions?": fine & (numbers[:, :-1] < 0).any(-1),
        }
        for reason, where in reasons.items():
            if where.any():
                warn((f"labels {first_few(where)}: " if labelled else "") + reason)

    def _draws(self, pred: Predictive) -> Tensor:
        name = type(self).__name__
        if not isinstance(pred, BernoulliPredictive):
            raise BadType(
                f"{name} is for yes or no, got a {type(pred).__name__}; for one class among several use VectorScaling, "
                "MatrixScaling or DirichletCalibration, and predictions of numbers have no logits"
            )
        if len(pred.batch_shape) > 2:
            raise BadInput(
                f"pred has batch shape {tuple(pred.batch_shape)}; {name} fits one map for each label and allows [N] or "
                "[N, L]. Flatten the predictions to one of these"
            )
        return self._kept_draws(pred)

    def extra_repr(self) -> str:
        if not self.fitted:
            return "not fitted"
        return (
            f"num_labels={len(self.bias)}" if self.bias.dim() else f"scale={self.scale.tolist()}, bias={self.bias:.4g}"
        )


class PlattScaling(_AnswerMap):
    """Scale and shift the log-odds of yes: `a z + b` in every draw, fitted to the pooled likelihood, for each label.

    a and b minimise the mean of `-log sum_s w_s p_s(y)` in nats, where draw s says yes with probability
    `sigmoid(a z_s + b)`, plus 1e-6 times the squared distance from a = 1, b = 0. For one draw this is convex; for
    several, the minimum that is found is the one downhill from doing nothing. It never scores worse than doing nothing on
    the data it was fitted to. a may be negative, with a `CalibrationWarning`.

    A label whose answers are all yes or all no, or separable (there are log-odds below which all are no and above which
    all are yes, or the reverse), has no best map: its predictions stay as they are, and a `CalibrationWarning` says so.
    Probabilities of exactly 0 and 1 stay what they are.

    Args:
        smooth: Fit to Platt's targets instead of 0 and 1: (n + 1) / (n + 2) for yes and 1 / (m + 2) for no, with n times
            yes and m times no among the label's answers. They are the posterior means under a uniform prior, and have a
            best map even if the answers are separable. What is never worse than doing nothing is then the NLL of these
            targets.

    Attributes:
        scale: a, without axes, or `[L]` for predictions `[N, L]`; empty before `fit`.
        bias: b, in nats, of the same shape.
        diagnostics: `nll_before` and `nll_after` (nats, mean, of the answers as they are), `num_examples` (answers of all
            labels), `num_excluded` (of probability zero in every draw), `converged`, `iterations`, `gradient_norm` (the
            largest of the labels that were changed), `separable`.

    References:
        Platt, 1999, Advances in Large Margin Classifiers, section 2 (equation 1 and the targets); Lin, Lin, Weng, 2007,
        Machine Learning 68, section 2.

    Examples:
        >>> odds = torch.tensor([4.0, 4.0, 4.0, 4.0, -4.0, -4.0, -4.0, -4.0])
        >>> pred = Predictive.from_logits(odds)
        >>> scaling = PlattScaling().fit(pred, torch.tensor([1, 1, 1, 0, 0, 0, 1, 1]))
        >>> print(scaling(pred).mean[[0, -1]])  # three of four, and two of four
        tensor([0.7500, 0.5000])
    """

    def __init__(self, smooth: bool = False) -> None:
        super().__init__()
        self.smooth = bool(smooth)

    @staticmethod
    def _features(odds: Tensor) -> Tensor:
        return torch.stack([odds, torch.ones_like(odds)], dim=-1)


class BetaCalibration(_AnswerMap):
    """Map the probability p of yes by `logit p' = a log p - b log(1 - p) + c`, a and b at least 0, for each label.

    The map acts on every draw and is fitted to the pooled likelihood: a, b, c minimise the mean of
    `-log sum_s w_s p'_s(y)` in nats, plus 1e-6 times the squared distance from doing nothing (a = b = 1, c = 0), which
    it never scores worse than on the data it was fitted to. For one draw this is convex; for several, the minimum
    that is found is the one downhill from doing nothing. The map is the best if p is beta distributed among the examples
    of each answer; with a = b it is Platt's.

    A label whose answers are all yes or all no, or separable (all yes above some p, all no below), has no best map: its
    predictions stay as they are, and a `CalibrationWarning` says so. Probabilities of exactly 0 and 1 stay what they are.

    Attributes:
        scale: (a, b), `[2]`, or `[L, 2]` for predictions `[N, L]`; empty before `fit`.
        bias: c, in nats, without axes or `[L]`.
        diagnostics: As for `PlattScaling`.

    References:
        Kull, Silva Filho, Flach, 2017, AISTATS, equation 3 and section 4.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> probs = torch.rand(5000, generator=generator)
        >>> honest = probs**2 / (probs**2 + (1 - probs) ** 0.5)
        >>> answers = torch.rand(5000, generator=generator) < honest
        >>> calibration = BetaCalibration().fit(Predictive.from_probs(probs), answers)
        >>> bool((calibration(Predictive.from_probs(probs)).mean - honest).abs().max() < 0.05)
        True
    """

    @staticmethod
    def _features(odds: Tensor) -> Tensor:
        return torch.stack([F.logsigmoid(odds), F.softplus(odds), torch.ones_like(odds)], dim=-1)

    def _search(self, likelihood: AnswerLikelihood) -> Minimum:
        """Newton's method without bounds, and where a or b is negative, the best of the searches that hold some at 0."""
        found = newton(likelihood).where_positive()
        for held in ([0], [1], [0, 1]):
            if not found.value.isfinite().all():
                found = found.or_better(newton(likelihood, held).where_positive())
        return found
