"""Calibration of K classes by a linear map of every draw: vector, matrix and Dirichlet calibration."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from bayesguard.calibration.fitted import BOUND, TOLERANCE, Fitted, check_possible, first_few, warn
from bayesguard.calibration.likelihood import PooledLikelihood, picked
from bayesguard.calibration.linear_fit import Diagonal, Found, Matrix, Shrinkage, cross_validated, fit_map, odir
from bayesguard.calibration.map_likelihood import MapLikelihood, mapped
from bayesguard.checks import check_labels
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import CategoricalPredictive, Predictive
from bayesguard.predictive.numerics import wide

_NO_ERROR = 0.1, 2e-6  # sum and mean of the distances of a class's probabilities from 0 and 1, less than any mistake


class _ClassMap(Fitted):
    """What linear maps of K logits share: the fit of the pooled likelihood, and the identity where that has no minimum."""

    _bounded = False  # whether a penalty bounds the logits, however well the targets are told apart

    @staticmethod
    def _features(draws: Tensor) -> Tensor:
        """What the map is linear in, float64 `[S, N, ..., K]`, 0 for a masked class: logits with mean 0 over the others."""
        masked = draws == -torch.inf
        values = wide(draws).masked_fill(masked, 0.0)
        allowed = (~masked).sum(-1, keepdim=True)
        return (values - values.sum(-1, keepdim=True) / allowed).masked_fill(masked, 0.0)

    @abstractmethod
    def _search(self, likelihood: MapLikelihood) -> Found:
        """Find the map of the smallest pooled NLL."""

    @abstractmethod
    def _identity(self, classes: int) -> Tensor:
        """The factors that change nothing: `[K]` of a diagonal, or `[K, K]`."""

    def _calibrate(self, pred: Predictive) -> Predictive:
        draws = self._draws(pred)
        if len(self.bias) != draws.shape[-1]:
            raise BadInput(
                f"pred has {draws.shape[-1]} classes, but this {type(self).__name__} was fitted to {len(self.bias)}; "
                "fit one to predictions of these classes"
            )
        factors, bias = (wide(self.get_buffer(name).to(draws.device)) for name in self.sized_by_fit)

        def calibrated(part: Tensor) -> Tensor:
            # float64: autocast would make a matrix product of float32 one of half precision.
            logits = mapped(self._features(part), factors, bias).masked_fill(part == -torch.inf, -torch.inf)
            return logits.log_softmax(-1).to(part.dtype)

        return self._changed(pred, draws, calibrated)

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        draws, weights = self._draws(pred).detach(), pred.weights
        labels = check_labels(targets, pred.batch_shape, draws.shape[-1]).flatten()
        logits = draws.flatten(1, -2)
        if (weights == 0).any():
            logits, weights = logits[weights > 0], weights[weights > 0]
        impossible = (picked(logits, labels) == -torch.inf).all(0)
        excluded = int(impossible.sum())
        check_possible(excluded, len(labels))
        if excluded:
            logits, labels = logits[:, ~impossible], labels[~impossible]
        # Tensors of inference mode may not be used where derivatives are taken. As decorators these would stand between
        # a warning and the caller.
        with torch.inference_mode(False), torch.no_grad():
            likelihood = MapLikelihood(logits, labels, weights, self._features)
            unmoved = found = Found(self._identity(draws.shape[-1]).to(weights), weights.new_zeros(draws.shape[-1]))
            before = after = likelihood.nll(unmoved.factors, unmoved.bias)
            self.diagnostics = {"num_examples": len(labels), "num_excluded": excluded}
            separable = PooledLikelihood(logits, labels, weights).separable()
            if not separable:
                found = self._search(likelihood)
                self._store(found.factors, found.bias)
                factors, bias = (wide(self.get_buffer(name)).to(weights) for name in self.sized_by_fit)
                after = likelihood.nll(factors, bias)
                # At a minimum, twice as large logits are worse.
                separable = not self._bounded and likelihood.nll(2 * factors, 2 * bias) < after - 1e-12
            if separable or not after <= before:
                self._store(unmoved.factors, unmoved.bias)
                self._explain_identity(separable, before, after, len(labels))
                after = before
            else:
                self._warn_of(found, likelihood)
            self.diagnostics |= {
                "nll_before": before,
                "nll_after": after,
                "converged": found.converged,
                "iterations": found.iterations,
                "gradient_norm": found.gradient_norm,
                "separable": separable,
            }

    def _explain_identity(self, separable: bool, before: float, after: float, count: int) -> None:
        name = type(self).__name__
        if separable:
            warn(
                f"the {count} targets are separable: the likelihood favours ever larger logits, and no {name} is best; "
                "the predictions stay as they are. More held-out examples, with mistakes among them, or a calibrator "
                "with fewer parameters are needed"
            )
        elif not after <= before + 1e-9:  # what is less is rounding
            warn(
                f"the {name} that was found has a mean NLL of {after:.6g} on the data it was fitted to, and no "
                f"calibration one of {before:.6g}; the predictions stay as they are"
            )

    def _warn_of(self, found: Found, likelihood: MapLikelihood) -> None:
        name, largest, count = type(self).__name__, float(found.factors.abs().max()), len(likelihood.labels)
        little = max(_NO_ERROR[0] / count, _NO_ERROR[1])
        sure = (likelihood.errors(found.factors, found.bias) < little) & (likelihood.counts > 0)
        if sure.any():
            warn(
                f"classes {first_few(sure)} are separable: the {name} tells their targets without a mistake, the "
                "likelihood favours ever larger factors, and what they are is set by the ridge alone. More held-out "
                "examples, with mistakes among them, are needed"
            )
        if not found.converged:
            warn(
                f"the search for the {name} did not converge in {found.iterations} iterations: the gradient of the "
                f"mean NLL has norm {found.gradient_norm:.2g}, more than {TOLERANCE:g}"
            )
        if largest > BOUND:
            warn(
                f"a factor of the {name} is {largest:.4g}, more than {BOUND:g}: the {count} examples are too few, or "
                "these are no logits"
            )

    def _draws(self, pred: Predictive) -> Tensor:
        name = type(self).__name__
        if not isinstance(pred, CategoricalPredictive):
            raise BadType(
                f"{name} is for one class among several, got a {type(pred).__name__}; for yes or no use "
                "PlattScaling or BetaCalibration, and predictions of numbers have no logits"
            )
        return self._kept_draws(pred)

    def extra_repr(self) -> str:
        return f"num_classes={len(self.bias)}" if self.fitted else "not fitted"


class VectorScaling(_ClassMap):
    """Scale and shift the logit of every class: `a_k z_k + b_k` in every draw, fitted to the pooled likelihood.

    The logits are those of a network up to a constant for each example, which a predictive does not keep: z are the
    logits with their mean over the classes (that are not masked) subtracted. a and b minimise the mean of
    `-log sum_s w_s softmax(a z_s + b)[y]` in nats, plus 1e-6 times the squared distance from a = 1, b = 0. For one draw
    this is convex; for several, the minimum that is found is the one downhill from doing nothing. It never scores worse
    than doing nothing on the data it was fitted to.

    A class that is no target gets the mean factor and the mean bias (0) of those that are. If the targets are
    separable, so that ever larger logits fit ever better, nothing is changed; a `CalibrationWarning` says so. If one of
    several classes is, its factor is where the ridge stops it, and a warning names it. Masked classes stay masked.

    Attributes:
        scale: a, `[K]`; empty before `fit`.
        bias: b, `[K]`, in nats; its mean over the classes among the targets is 0.
        diagnostics: `nll_before` and `nll_after` (nats, mean), `num_examples`, `num_excluded` (targets of probability
            zero in every draw), `converged`, `iterations` (products with the Hessian), `gradient_norm` (of what is
            minimised), `separable`.

    References:
        Guo, Pleiss, Sun, Weinberger, 2017, ICML, section 4.2.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = 3 * torch.randn(2000, 3, generator=generator)
        >>> shifted = logits / 2 + torch.tensor([1.0, 0.0, -1.0])
        >>> targets = shifted.softmax(-1).multinomial(1, generator=generator)[:, 0]
        >>> scaling = VectorScaling().fit(Predictive.from_logits(logits), targets)
        >>> bool((scaling.scale - 0.5).abs().max() < 0.1)
        True
        >>> bool((scaling.bias - torch.tensor([1.0, 0.0, -1.0])).abs().max() < 0.2)
        True
    """

    scale: Tensor

    def _search(self, likelihood: MapLikelihood) -> Found:
        return fit_map(Diagonal(likelihood, Shrinkage()))

    def _identity(self, classes: int) -> Tensor:
        return torch.ones(classes)


class _Full(_ClassMap):
    """A matrix and a bias, with off-diagonal and intercept regularisation."""

    weight: Tensor
    sized_by_fit = ("weight", "bias")

    def __init__(self, off_diagonal: float | None = None, bias: float | None = None) -> None:
        super().__init__()
        self.off_diagonal_penalty = _check_penalty(off_diagonal, "off_diagonal")
        self.bias_penalty = _check_penalty(bias, "bias")

    def _search(self, likelihood: MapLikelihood) -> Found:
        strengths = cross_validated(likelihood, self.off_diagonal_penalty, self.bias_penalty)
        self.diagnostics |= {"off_diagonal": strengths[0], "bias": strengths[1]}
        return fit_map(Matrix(likelihood, odir(strengths, likelihood.num_classes)))

    def _identity(self, classes: int) -> Tensor:
        return torch.eye(classes)

    def extra_repr(self) -> str:
        penalties = f"off_diagonal={self.off_diagonal_penalty}, bias={self.bias_penalty}"
        return f"{penalties}, {super().extra_repr()}"


class MatrixScaling(_Full):
    """Map the logits of every draw by a matrix: `W z + b`, with off-diagonal and intercept regularisation (ODIR).

    z are the logits with their mean over the classes (that are not masked) subtracted, since a predictive does not keep
    the constant of each example; a masked class adds nothing to the others. W and b minimise the mean of
    `-log sum_s w_s softmax(W z_s + b)[y]` in nats, plus `off_diagonal` times the mean square of the K(K-1) elements
    beside the diagonal, plus `bias` times the mean square of the K biases, plus 1e-6 times the squared distance from
    doing nothing. For one draw this is convex; for several, the minimum that is found is the one downhill from doing
    nothing. It never scores worse than doing nothing on the data it was fitted to.

    A class that is no target is no feature of the others either, and its own row is the mean of theirs; its bias is 0.
    If the targets are separable, nothing is changed; a `CalibrationWarning` says so.

    Args:
        off_diagonal: Strength of the first penalty, at least 0; None: the best of 1e5, 1e4, ..., 1e-2 by the pooled NLL
            in 3-fold cross-validation on the held-out data, while `bias` is in the middle of its own values.
        bias: Strength of the second one; None: the best of 1, 0.1, ..., 1e-4, chosen after the first. The folds depend
            on the examples, not on their order: those of which the predictions think alike are spread evenly.

    Attributes:
        weight: W, `[K, K]`: row k makes the logit of class k; empty before `fit`.
        bias: b, `[K]`, in nats; its mean over the classes among the targets is 0.
        diagnostics: As for `VectorScaling`, and `off_diagonal` and `bias`, the strengths that were used (if it came
            to a search).

    Raises:
        BadInput: A strength that is negative or not finite.

    References:
        Guo, Pleiss, Sun, Weinberger, 2017, ICML, section 4.2 (the map); Kull, Perello-Nieto, Kängsepp, Silva Filho,
        Song, Flach, 2019, NeurIPS, section 3 (ODIR: `lambda` and `mu` there are `off_diagonal` and `bias` here).

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = 4 * torch.randn(500, 3, generator=generator)
        >>> targets = (logits / 4).softmax(-1).multinomial(1, generator=generator)[:, 0]
        >>> pred = Predictive.from_logits(logits)
        >>> scaling = MatrixScaling(off_diagonal=1.0, bias=0.1).fit(pred, targets)
        >>> scaling.weight.shape, scaling.diagnostics["nll_after"] < scaling.diagnostics["nll_before"] - 0.5
        (torch.Size([3, 3]), True)
    """


class DirichletCalibration(_Full):
    """Map the log-probabilities of every draw by a matrix: `softmax(W log p + b)`, with ODIR.

    The optimal map if the predicted probabilities of the examples of each class are Dirichlet distributed. Everything is
    as for `MatrixScaling`, but for the features: log-probabilities are never positive, and tell how sure a draw is, where
    centred logits tell only how classes differ. Exact zeros are masked classes: they stay zero and add nothing to the
    others.

    Args:
        off_diagonal: Strength of the penalty on the elements beside the diagonal, at least 0; None: chosen by
            cross-validation, as for `MatrixScaling`.
        bias: Strength of the penalty on the biases; None: chosen as well.

    Attributes:
        weight: W, `[K, K]`: row k makes the logit of class k; empty before `fit`.
        bias: b, `[K]`, in nats; its mean over the classes among the targets is 0.
        diagnostics: As for `MatrixScaling`.

    Raises:
        BadInput: A strength that is negative or not finite.

    References:
        Kull, Perello-Nieto, Kängsepp, Silva Filho, Song, Flach, 2019, NeurIPS, equation 1 and section 3.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = 4 * torch.randn(500, 3, generator=generator)
        >>> targets = (logits / 4).softmax(-1).multinomial(1, generator=generator)[:, 0]
        >>> pred = Predictive.from_probs(logits.softmax(-1))
        >>> calibration = DirichletCalibration(off_diagonal=1.0, bias=0.1).fit(pred, targets)
        >>> bool(calibration(pred).confidence.mean() < pred.confidence.mean() - 0.2)
        True
    """

    @staticmethod
    def _features(draws: Tensor) -> Tensor:
        return wide(draws).masked_fill(draws == -torch.inf, 0.0)


def _check_penalty(value: float | None, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadType(f"{name} must be a number or None (chosen by cross-validation), got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise BadInput(f"{name} must be at least 0 and finite, or None (chosen by cross-validation), got {value}")
    return float(value)
