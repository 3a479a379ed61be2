"""Calibration by a linear map of every draw: vector, matrix, Dirichlet, Platt and beta calibration."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.calibration.base import Calibrator
from bayesguard.calibration.likelihood import PooledLikelihood, picked
from bayesguard.checks import check_labels
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.bernoulli import check_answers
from bayesguard.predictive.numerics import BUDGET, slices, wide

_RIDGE = 1e-6  # on squared distances from the identity map: where the likelihood has no minimum, it gives one
_TOLERANCE = 1e-6  # of the norm of the gradient of the mean NLL
_ROUNDING = 1e-7  # of the norm of a gradient where curvatures are about 1: less than 1e-14 nats are left
_BOUND = 100.0  # of a factor: nobody's logits are off by more
_MOST_ITERATIONS = 2000
_ROUND = 25  # iterations of LBFGS between two looks at the gradient
_NO_ERROR = 0.1, 2e-6  # sum and mean of the distances of a class's probabilities from 0 and 1, less than any mistake
_FOLDS = 3
_OFF_DIAGONAL = (1e5, 1e4, 1e3, 1e2, 1e1, 1e0, 1e-1, 1e-2)
_BIAS = (1e0, 1e-1, 1e-2, 1e-3, 1e-4)
_SURE = 1e4  # log-odds of a probability that is 0 or 1 in float64, and finite

Features = Callable[[Tensor], Tensor]


class _Fitted(Calibrator):
    """A calibrator whose buffers have the shape of what it was fitted to: a fresh one takes any shape from a state."""

    def _declare(self, *names: str) -> None:
        for name in names:
            # float32, which every device has; at an optimum the likelihood is flat to second order in its rounding.
            self.register_buffer(name, torch.empty(0, dtype=torch.float32, device="cpu"))

    def _store(self, **values: Tensor) -> None:
        with torch.inference_mode(False):  # else a later load_state_dict could not write to it
            for name, value in values.items():
                setattr(self, name, self.get_buffer(name).new_empty(value.shape).copy_(value))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, held in self._buffers.items():
            given = state_dict.get(prefix + name)
            if held is not None and isinstance(given, Tensor) and given.shape != held.shape:
                self._buffers[name] = held.new_empty(given.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


# -- K classes


class _ClassMap(_Fitted):
    """What linear maps of K logits share: the fit of the pooled likelihood, and the identity where that has no minimum."""

    acts_on = "draws"
    bias: Tensor

    @staticmethod
    @abstractmethod
    def _features(draws: Tensor) -> Tensor:
        """What the map is linear in, float64 `[S, N, ..., K]` from log-probabilities; 0 for a masked class."""

    @abstractmethod
    def _search(self, pooled: _Pooled) -> _Found:
        """Find the map of the smallest pooled NLL."""

    @abstractmethod
    def _set(self, factors: Tensor, bias: Tensor) -> None:
        """Keep the map."""

    @abstractmethod
    def _factors(self) -> Tensor:
        """`[K]` of a diagonal, or `[K, K]`."""

    @abstractmethod
    def _identity(self, classes: int) -> Tensor:
        """The factors that change nothing."""

    def _calibrate(self, pred: Predictive) -> Predictive:
        draws = self._draws(pred)
        if len(self.bias) != draws.shape[-1]:
            raise BadInput(
                f"pred has {draws.shape[-1]} classes, but this {type(self).__name__} was fitted to {len(self.bias)}; "
                "fit one to predictions of these classes"
            )
        factors, bias = (wide(value.to(draws.device)) for value in (self._factors(), self.bias))

        def calibrated(part: Tensor) -> Tensor:
            # float64: autocast would make a matrix product of float32 one of half precision.
            mapped = _mapped(self._features(part), factors, bias).masked_fill(part == -torch.inf, -torch.inf)
            return mapped.log_softmax(-1).to(part.dtype)

        cost = 4 * draws[:, :1].numel()
        return pred._rebuild([torch.cat([calibrated(draws[:, rows]) for rows in slices(len(pred), cost)], dim=1)])

    @torch.inference_mode(False)  # whose tensors may not be used where derivatives are taken
    @torch.no_grad()
    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        draws = self._draws(pred)
        labels = check_labels(targets, pred.batch_shape, draws.shape[-1])
        logits, labels, weights, excluded = _possible(draws.flatten(1, -2), labels.flatten(), pred.weights)
        identity, unmoved = self._identity(draws.shape[-1]).to(weights), weights.new_zeros(draws.shape[-1])
        pooled = _Pooled(logits, labels, weights, self._features)
        before = pooled(identity, unmoved, gradient=False).nll
        self.diagnostics = {"num_examples": len(labels), "num_excluded": excluded}
        if PooledLikelihood(logits, labels, weights).separable():
            found = _Found(identity, unmoved, converged=True, iterations=0, gradient_norm=math.nan)
            separable, after = True, before
        else:
            found = self._search(pooled)
            self._set(found.factors, found.bias)
            factors, bias = wide(self._factors()).to(weights), wide(self.bias).to(weights)
            after = pooled(factors, bias, gradient=False).nll
            # At a minimum, twice as large logits are worse.
            separable = pooled(2 * factors, 2 * bias, gradient=False).nll < after - 1e-12
        if separable or not after <= before:
            self._set(identity, unmoved)
            self._explain_identity(separable, before, after, len(labels))
            after = before
        else:
            self._warn_of(found, labels, pooled)
        self.diagnostics |= {
            "nll_before": before,
            "nll_after": after,
            "converged": found.converged,
            "iterations": found.iterations,
            "gradient_norm": found.gradient_norm,
            "separable": separable,
        }

    def _explain_identity(self, separable: bool, before: float, after: float, count: int) -> None:
        if separable:
            _warn(
                f"the {count} targets are separable: the likelihood favours ever larger logits, and no "
                f"{type(self).__name__} is best; the predictions stay as they are. More held-out examples, with "
                "mistakes among them, or a calibrator with fewer parameters are needed"
            )
        elif not after <= before + 1e-9:  # what is less is rounding
            _warn(
                f"the {type(self).__name__} that was found has a mean NLL of {after:.6g} on the data it was fitted to, "
                f"and no calibration one of {before:.6g}; the predictions stay as they are"
            )

    def _warn_of(self, found: _Found, labels: Tensor, pooled: _Pooled) -> None:
        name, largest = type(self).__name__, float(found.factors.abs().max())
        little = max(_NO_ERROR[0] / len(labels), _NO_ERROR[1])
        sure = ((pooled.errors(found.factors, found.bias) < little) & (pooled.counts > 0)).nonzero()[:, 0].tolist()
        if sure:
            more = f" and {len(sure) - 5} more" if len(sure) > 5 else ""
            _warn(
                f"classes {sure[:5]}{more} are separable: the {name} tells their targets without a mistake, the "
                "likelihood favours ever larger factors, and what they are is set by the ridge alone. More held-out "
                "examples, with mistakes among them, are needed"
            )
        if not found.converged:
            _warn(
                f"the search for the {name} did not converge in {found.iterations} iterations: the gradient of the "
                f"mean NLL has norm {found.gradient_norm:.2g}, more than {_TOLERANCE:g}"
            )
        if largest > _BOUND:
            _warn(
                f"a factor of the {name} is {largest:.4g}, more than {_BOUND:g}: the {len(labels)} examples are too "
                "few, or these are no logits"
            )

    def _draws(self, pred: Predictive) -> Tensor:
        name = type(self).__name__
        if not isinstance(pred, CategoricalPredictive):
            raise BadType(
                f"{name} is for one class among several, got a {type(pred).__name__}; for yes or no use "
                "PlattScaling or BetaCalibration, and predictions of numbers have no logits"
            )
        return _kept(pred, name)

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
            zero in every draw), `converged`, `iterations`, `gradient_norm` (of what is minimised), `separable`.

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

    def __init__(self) -> None:
        super().__init__()
        self._declare("scale", "bias")

    @staticmethod
    def _features(draws: Tensor) -> Tensor:
        return _centred(draws)

    def _search(self, pooled: _Pooled) -> _Found:
        return _minimise(pooled, _Diagonal(pooled), lambda factors, bias: factors.new_zeros(()))

    def _set(self, factors: Tensor, bias: Tensor) -> None:
        self._store(scale=factors, bias=bias)

    def _factors(self) -> Tensor:
        return self.scale

    def _identity(self, classes: int) -> Tensor:
        return torch.ones(classes)


class _Full(_ClassMap):
    """A matrix and a bias, with off-diagonal and intercept regularisation."""

    weight: Tensor

    def __init__(self, off_diagonal: float | None = None, bias: float | None = None) -> None:
        super().__init__()
        self.off_diagonal_penalty = _check_penalty(off_diagonal, "off_diagonal")
        self.bias_penalty = _check_penalty(bias, "bias")
        self._declare("weight", "bias")

    def _search(self, pooled: _Pooled) -> _Found:
        strengths = _cross_validated(pooled, self.off_diagonal_penalty, self.bias_penalty)
        self.diagnostics |= {"off_diagonal": strengths[0], "bias": strengths[1]}
        return _minimise(pooled, _Matrix(pooled, strengths), _odir(strengths))

    def _set(self, factors: Tensor, bias: Tensor) -> None:
        self._store(weight=factors, bias=bias)

    def _factors(self) -> Tensor:
        return self.weight

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

    @staticmethod
    def _features(draws: Tensor) -> Tensor:
        return _centred(draws)


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


def _centred(draws: Tensor) -> Tensor:
    """Logits of which each row has mean 0 over the classes that are not masked."""
    masked = draws == -torch.inf
    values = wide(draws).masked_fill(masked, 0.0)
    allowed = (~masked).sum(-1, keepdim=True)
    return (values - values.sum(-1, keepdim=True) / allowed).masked_fill(masked, 0.0)


def _mapped(features: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    return (features * factors if factors.dim() == 1 else features @ factors.T) + bias


def _kept(pred: CategoricalPredictive | BernoulliPredictive, name: str) -> Tensor:
    if not pred.has_draws:
        raise BadInput(
            f"pred was reduced, its {pred.num_samples} draws are gone, and {name} acts on every draw; "
            "predict with keep_draws=True"
        )
    return pred.draw_logits


def _possible(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Leave out draws without weight, and targets that are impossible in every draw."""
    if (weights == 0).any():
        logits, weights = logits[weights > 0], weights[weights > 0]
    impossible = (picked(logits, labels) == -torch.inf).all(0)
    excluded = int(impossible.sum())
    if excluded:
        _warn_impossible(excluded, len(labels), stacklevel=6)
        logits, labels = logits[:, ~impossible], labels[~impossible]
    if not len(labels):
        raise BadInput("every target has probability zero in every draw; are the targets those of the predictions?")
    return logits, labels, weights, excluded


class _Value(NamedTuple):
    """The mean NLL of a map, and its derivatives in factors and bias."""

    nll: float
    factors: Tensor
    bias: Tensor


class _Pooled:
    """Mean of `-log sum_s w_s softmax(A x_s + b)[y]` over N examples, in float64, as a function of A and b.

    Args:
        logits: Log-probabilities of every draw, `[S, N, K]`; -inf masks a class.
        labels: `[N]`.
        weights: Of the draws, positive, `[S]`.
        features: Makes x from logits.
    """

    def __init__(self, logits: Tensor, labels: Tensor, weights: Tensor, features: Features) -> None:
        self.logits, self.labels, self.weights, self.features = logits, labels, weights, features
        self.num_classes = logits.shape[-1]
        self.counts = labels.bincount(minlength=self.num_classes)
        self._kept = list(self._made()) if logits.numel() <= BUDGET else None

    def select(self, rows: Tensor) -> _Pooled:
        """Return the same of some of the examples."""
        return _Pooled(self.logits[:, rows], self.labels[rows], self.weights, self.features)

    def _made(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rows in slices(len(self.labels), 8 * self.logits[:, :1].numel()):
            part = self.logits[:, rows]
            yield self.features(part), part == -torch.inf, self.labels[rows]

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features, masks and labels of one slice of examples after another."""
        yield from self._made() if self._kept is None else self._kept

    def nll_of_rows(self, factors: Tensor, bias: Tensor) -> Tensor:
        """Return the NLL of every example, `[N]`."""
        return torch.cat([-self._shares(*part, factors, bias)[0] for part in self.parts()])

    def errors(self, factors: Tensor, bias: Tensor) -> Tensor:
        """Return for every class the mean distance between its pooled probability and 1 or 0, what it was, `[K]`."""
        total = torch.zeros_like(bias)
        for features, masked, labels in self.parts():
            log_probs = self._shares(features, masked, labels, factors, bias)[2]
            probs = torch.tensordot(self.weights, log_probs.exp_(), dims=1)
            total += (probs - F.one_hot(labels, self.num_classes)).abs().sum(0)
        return total / len(self.labels)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the pooled means of x xᵀ `[K, K]` and of x `[K]`."""
        square = self.weights.new_zeros(self.num_classes, self.num_classes)
        mean = self.weights.new_zeros(self.num_classes)
        for features, _, _ in self.parts():
            flat = (features * self.weights.sqrt()[:, None, None]).flatten(0, 1)
            square += flat.T @ flat
            mean += torch.tensordot(self.weights, features.sum(1), dims=1)
        return square / len(self.labels), mean / len(self.labels)

    def __call__(self, factors: Tensor, bias: Tensor, gradient: bool = True) -> _Value:
        total = self.weights.new_zeros(())
        by_factors, by_bias = torch.zeros_like(factors), torch.zeros_like(bias)
        for features, masked, labels in self.parts():
            pooled, share, log_probs = self._shares(features, masked, labels, factors, bias)
            total -= pooled.sum()
            if not gradient:
                continue
            slope = log_probs.exp_()
            slope.scatter_add_(-1, _spread(labels, len(slope)), -torch.ones_like(share).unsqueeze(-1))
            slope *= share.unsqueeze(-1)
            by_bias += slope.sum((0, 1))
            if factors.dim() == 1:
                by_factors += (slope * features).sum((0, 1))
            else:
                by_factors += slope.flatten(0, 1).T @ features.flatten(0, 1)
        count = len(self.labels)
        return _Value(float(total) / count, by_factors / count, by_bias / count)

    def _shares(
        self, features: Tensor, masked: Tensor, labels: Tensor, factors: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the pooled probability of every label `[n]`, each draw's share in it, and all log-probabilities."""
        log_probs = _mapped(features, factors, bias).masked_fill_(masked, -torch.inf).log_softmax(-1)
        joint = picked(log_probs, labels) + self.weights.log().unsqueeze(-1)
        pooled = joint.logsumexp(0)
        return pooled, (joint - pooled).exp(), log_probs


def _spread(labels: Tensor, draws: int) -> Tensor:
    return labels.expand(draws, -1).unsqueeze(-1)


class _Coordinates:
    """Free numbers, in which the likelihood is about equally curved, and the map that they stand for.

    Only classes among the targets have numbers of their own. The others are tied to their mean: without targets the
    likelihood alone would send them to probability zero.
    """

    def __init__(self, pooled: _Pooled) -> None:
        self.num_classes = pooled.num_classes
        self.seen = pooled.counts.nonzero()[:, 0]
        self.unseen = (pooled.counts == 0).nonzero()[:, 0]
        self.size = 0

    def free(self, flat: Tensor) -> Tensor:
        """The map of the classes among the targets."""
        raise NotImplementedError

    def whole(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """Factors and bias of all classes."""
        raise NotImplementedError

    def _bias(self, bias: Tensor) -> Tensor:
        """Biases of all classes; their mean over the targets' classes changes nothing, and is 0."""
        bias = bias - bias.mean()
        return bias.new_zeros(self.num_classes).index_put((self.seen,), bias) if len(self.unseen) else bias


class _Diagonal(_Coordinates):
    """A factor and a bias for each class, `[2, m]`."""

    def __init__(self, pooled: _Pooled) -> None:
        super().__init__(pooled)
        self.size = 2 * len(self.seen)
        square, mean = pooled.moments()
        square, mean = square.diagonal()[self.seen], mean[self.seen]
        share = pooled.counts[self.seen].to(mean) / len(pooled.labels)
        blocks = torch.stack([torch.stack([square, mean], -1), torch.stack([mean, torch.ones_like(mean)], -1)], -2)
        blocks = blocks * (share * (1 - share) + 1e-3 / self.num_classes)[:, None, None]
        self._whiten = _inverse_root(blocks)

    def free(self, flat: Tensor) -> Tensor:
        steps = self._whiten @ flat.reshape(-1, 2, 1)
        return steps.squeeze(-1).T + flat.new_tensor([[1.0], [0.0]])

    def whole(self, free: Tensor) -> tuple[Tensor, Tensor]:
        factors, bias = free
        if len(self.unseen):
            factors = factors.mean().expand(self.num_classes).index_put((self.seen,), factors)
        return factors, self._bias(bias)


class _Matrix(_Coordinates):
    """A matrix and biases, `[m, m + 1]`: a diagonal plus a full matrix, since a strong penalty curves all but the first."""

    def __init__(self, pooled: _Pooled, strengths: tuple[float, float], start: Tensor | None = None) -> None:
        super().__init__(pooled)
        count, classes = len(self.seen), self.num_classes
        self.size = count * (count + 2)
        square, mean = pooled.moments()
        square, mean = square[self.seen][:, self.seen], mean[self.seen]
        curved = torch.cat([torch.cat([square, mean[None]]), torch.cat([mean, mean.new_ones(1)])[:, None]], 1)
        curved = curved / classes
        penalties = mean.new_full((count + 1,), 2 * strengths[0] / (classes * (classes - 1)))
        penalties[-1] = 2 * strengths[1] / classes
        self._whiten = _inverse_root(curved + penalties.diag()).T
        self._whiten_diagonal = (square.diagonal() / classes + 1e-6).rsqrt()
        self._start = torch.eye(count, count + 1).to(mean) if start is None else start

    def free(self, flat: Tensor) -> Tensor:
        count = len(self.seen)
        diagonal, rest = flat[:count] * self._whiten_diagonal, flat[count:].reshape(count, count + 1)
        return self._start + F.pad(diagonal.diag(), (0, 1)) + rest @ self._whiten

    def whole(self, free: Tensor) -> tuple[Tensor, Tensor]:
        factors, bias = free[:, :-1], free[:, -1]
        return self._tied(factors) if len(self.unseen) else factors, self._bias(bias)

    def _tied(self, factors: Tensor) -> Tensor:
        """Give classes without targets the mean row; what is added to a whole column still changes nothing."""
        others = (factors.sum(0) - factors.diagonal()) / max(len(self.seen) - 1, 1)
        own = (factors.diagonal() - others).mean()
        seen, unseen = self.seen, self.unseen
        whole = factors.new_zeros(self.num_classes, self.num_classes)
        whole = whole.index_put((seen[:, None], seen[None]), factors)
        whole = whole.index_put((unseen[:, None], seen[None]), others.expand(len(unseen), -1))
        return whole.index_put((unseen, unseen), own.expand(len(unseen)))


def _inverse_root(curved: Tensor) -> Tensor:
    """Return C with C Cᵀ close to the inverse: in steps of C a quadratic form is round."""
    size = curved.shape[-1]
    level = curved.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(size, dtype=curved.dtype, device=curved.device)
    root = torch.linalg.cholesky(curved + (1e-6 * level + 1e-9) * eye)
    return torch.linalg.solve_triangular(root, eye.expand_as(root), upper=False).mT


class _Found(NamedTuple):
    """The map that a search ended at, and how it ended."""

    factors: Tensor
    bias: Tensor
    converged: bool
    iterations: int
    gradient_norm: float
    free: Tensor | None = None


Penalty = Callable[[Tensor, Tensor], Tensor]


def _minimise(
    pooled: _Pooled,
    coordinates: _Coordinates,
    penalty: Penalty,
    tolerance: float = _TOLERANCE,
    most: int = _MOST_ITERATIONS,
) -> _Found:
    """Return the map of the smallest pooled NLL plus penalty, by LBFGS with a line search (strong Wolfe conditions)."""
    with torch.no_grad():
        flat = torch.zeros(coordinates.size, dtype=pooled.weights.dtype, device=pooled.weights.device)
        flat.requires_grad_()
        norm = scaled = math.inf

        def loss() -> float:
            nonlocal norm, scaled
            value, by_free, flat.grad = _slope(pooled, coordinates, penalty, flat)
            norm, scaled = float(by_free.norm()), float(flat.grad.norm())
            return value

        # 50 pairs of a million numbers would be 800 MB.
        history = max(5, min(50, BUDGET * 4 // coordinates.size))
        search = torch.optim.LBFGS(
            [flat],
            max_iter=_ROUND,
            tolerance_grad=0,
            tolerance_change=0,
            history_size=history,
            line_search_fn="strong_wolfe",
        )
        best, iterations, stalled = loss(), 0, False
        while norm > tolerance and iterations < most:
            search.step(loss)  # a number will do, no graph is needed
            iterations += _ROUND
            value = loss()
            stalled, best = not value < best, min(value, best)
            if stalled:
                break
        free = coordinates.free(flat.detach())
        # A strong penalty has a gradient of more than the tolerance where float64 shows no further fall.
        converged = norm <= tolerance or (stalled and scaled <= _ROUNDING)
        return _Found(*coordinates.whole(free), converged, iterations, norm, free)


def _slope(pooled: _Pooled, coordinates: _Coordinates, penalty: Penalty, flat: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return what is minimised, and its derivatives in the free numbers of the map and in the flat ones."""
    with torch.enable_grad():
        free = coordinates.free(flat)
        factors, bias = coordinates.whole(free)
        identity = torch.ones_like(factors) if factors.dim() == 1 else torch.eye(len(bias)).to(factors)
        added = penalty(factors, bias) + _RIDGE * ((factors - identity).square().sum() + bias.square().sum())
    here = pooled(factors.detach(), bias.detach())
    with torch.enable_grad():
        # The likelihood's own derivatives are known; the rest is linear or a square, and left to autograd.
        linear = added + (factors * here.factors).sum() + (bias * here.bias).sum()
        by_free, by_flat = torch.autograd.grad(linear, [free, flat])
    return here.nll + float(added.detach()), by_free, by_flat


def _odir(strengths: tuple[float, float]) -> Penalty:
    """Off-diagonal and intercept regularisation (Kull et al., 2019, section 3)."""

    def penalty(factors: Tensor, bias: Tensor) -> Tensor:
        beside = factors - factors.diagonal().diag()
        mean = beside.square().sum() / (len(bias) * (len(bias) - 1))
        return strengths[0] * mean + strengths[1] * bias.square().mean()

    return penalty


def _cross_validated(pooled: _Pooled, off_diagonal: float | None, bias: float | None) -> tuple[float, float]:
    """Return both strengths, those that were not given by the NLL of held-out folds: first one, then the other."""
    if off_diagonal is not None and bias is not None:
        return off_diagonal, bias
    if len(pooled.labels) < 2 * _FOLDS:  # too few to choose by
        return _OFF_DIAGONAL[0] if off_diagonal is None else off_diagonal, _BIAS[0] if bias is None else bias
    folds = _folds(pooled)
    if off_diagonal is None:
        other = _BIAS[len(_BIAS) // 2] if bias is None else bias
        off_diagonal = _best(folds, [(strength, other) for strength in _OFF_DIAGONAL])[0]
    if bias is None:
        bias = _best(folds, [(off_diagonal, strength) for strength in _BIAS])[1]
    return off_diagonal, bias


def _folds(pooled: _Pooled) -> list[tuple[_Pooled, _Pooled]]:
    """Pairs of data to fit and to score on; each fold has as many hard examples as the others, in whatever order."""
    classes = pooled.num_classes
    identity = torch.ones(classes).to(pooled.weights)
    order = pooled.nll_of_rows(identity, torch.zeros_like(identity)).argsort(stable=True)
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order), device=order.device) % _FOLDS
    return [(pooled.select(fold != held), pooled.select(fold == held)) for held in range(_FOLDS)]


def _best(folds: list[tuple[_Pooled, _Pooled]], candidates: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the candidate with the smallest NLL on what was held out; the first, strongest one of equals."""
    starts: list[Tensor | None] = [None] * len(folds)
    scores: list[float] = []
    for strengths in candidates:
        score = 0.0
        for place, (fitted, held) in enumerate(folds):
            coordinates = _Matrix(fitted, strengths, starts[place])
            found = _minimise(fitted, coordinates, _odir(strengths), tolerance=1e-4, most=200)
            score += held(found.factors, found.bias, gradient=False).nll * len(held.labels)
            starts[place] = found.free
        scores.append(score)
        # From strong to weak the score falls and then rises, and the weak ones take longest to fit.
        if len(scores) > 2 and min(scores) < min(scores[-2:]):
            break
    return candidates[min(range(len(scores)), key=scores.__getitem__)]


def _check_penalty(value: float | None, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadType(f"{name} must be a number or None (chosen by cross-validation), got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise BadInput(f"{name} must be at least 0 and finite, or None (chosen by cross-validation), got {value}")
    return float(value)


# -- yes or no


class _AnswerMap(_Fitted):
    """What maps of one logit share: a few numbers for each label, found by damped Newton steps for all labels at once."""

    acts_on = "draws"
    scale: Tensor
    bias: Tensor
    smooth = False

    def __init__(self) -> None:
        super().__init__()
        self._declare("scale", "bias")

    @staticmethod
    @abstractmethod
    def _features(odds: Tensor) -> Tensor:
        """What the map is linear in, `[..., P]`, the last of them 1; from finite log-odds."""

    @abstractmethod
    def _search(self, problem: _Answers) -> _Minimum:
        """Find the numbers `[L, P]` of the smallest pooled NLL."""

    @abstractmethod
    def _numbers(self) -> Tensor:
        """The fitted numbers, `[..., P]`."""

    @abstractmethod
    def _set(self, numbers: Tensor) -> None:
        """Keep the numbers `[..., P]`."""

    def _calibrate(self, pred: Predictive) -> Predictive:
        draws = self._draws(pred)
        if self.bias.shape != draws.shape[2:]:
            raise BadInput(
                f"pred has batch shape {tuple(pred.batch_shape)}, but this {type(self).__name__} was fitted to "
                f"{('N', *self.bias.shape)}; fit one to predictions of these labels"
            )
        change = wide(self._numbers().to(draws.device))
        change = change - _identity(change)

        def calibrated(part: Tensor) -> Tensor:
            sure = part.isinf()
            odds = wide(part).masked_fill(sure, 0.0)
            # The sum of changes: where nothing changes, not even by a rounding.
            return torch.where(sure, part, (odds + (self._features(odds) * change).sum(-1)).to(part.dtype))

        cost = 8 * draws[:, :1].numel()
        return pred._rebuild([torch.cat([calibrated(draws[:, rows]) for rows in slices(len(pred), cost)], dim=1)])

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        draws, weights = self._draws(pred), pred.weights
        answers = check_answers(targets, pred.batch_shape, "targets")
        labelled, shape = answers.dim() == 2, answers.shape[1:]
        if not labelled:
            draws, answers = draws.unsqueeze(-1), answers.unsqueeze(-1)
        draws, weights = draws[weights > 0], weights[weights > 0]
        plain = _Answers(draws, answers, weights, self._features, smooth=False)
        if plain.excluded:
            _warn_impossible(plain.excluded, answers.numel())
        if not plain.count.sum():
            raise BadInput("every target has probability zero in every draw; are the targets those of the predictions?")
        problem = _Answers(draws, answers, weights, self._features, smooth=True) if self.smooth else plain
        found = self._search(problem)
        numbers = found.numbers.float().to(found.numbers)  # as they are kept
        identity = problem.identity.expand_as(numbers)

        one_sided = plain.one_sided()
        separable = ~one_sided & plain.separable() if not self.smooth else torch.zeros_like(one_sided)
        if not self.smooth:
            separable |= ~one_sided & (plain.nll(2 * numbers) < plain.nll(numbers) - 1e-12)
        before, after = problem.nll(identity), problem.nll(numbers)
        worse = ~(after <= before)
        unchanged = one_sided | separable | worse
        numbers = torch.where(unchanged[:, None], identity, numbers)
        self._set(numbers if labelled else numbers[0])
        self._warn_of(labelled, one_sided, separable, worse & ~(after <= before + 1e-9), found, numbers)
        searched = ~(one_sided | separable)
        norms = found.gradient_norm[searched]
        self.diagnostics = {
            "nll_before": plain.mean(plain.nll(identity)),
            "nll_after": plain.mean(plain.nll(numbers)),
            "num_examples": int(plain.count.sum()),
            "num_excluded": plain.excluded,
            "converged": bool((norms <= _TOLERANCE).all()),
            "iterations": found.iterations,
            "gradient_norm": float(norms.max()) if len(norms) else math.nan,
            "separable": bool(separable.any()),
        }
        assert self.bias.shape == shape

    def _warn_of(
        self, labelled: bool, one_sided: Tensor, separable: Tensor, worse: Tensor, found: _Minimum, numbers: Tensor
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
            f"the mean NLL is more than {_TOLERANCE:g}": fine & ~(found.gradient_norm <= _TOLERANCE),
            f"a factor of the {name} is more than {_BOUND:g}; the examples are too few, or these are no logits": fine
            & (numbers[:, :-1].abs() > _BOUND).any(-1),
            "the log-odds are lower where the answer is yes, and the fitted factor is negative; are the targets in the "
            "order of the predictions?": fine & (numbers[:, :-1] < 0).any(-1),
        }
        for reason, where in reasons.items():
            if where.any():
                places = where.nonzero()[:, 0].tolist()
                more = f" and {len(places) - 5} more" if len(places) > 5 else ""
                _warn((f"labels {places[:5]}{more}: " if labelled else "") + reason)

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
        return _kept(pred, name)

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

    def _search(self, problem: _Answers) -> _Minimum:
        start = problem.identity.expand(problem.num_labels, -1)
        return _newton(problem, start, torch.ones_like(start, dtype=torch.bool))

    def _numbers(self) -> Tensor:
        return torch.stack([self.scale, self.bias], dim=-1)

    def _set(self, numbers: Tensor) -> None:
        self._store(scale=numbers[..., 0], bias=numbers[..., 1])


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

    def _search(self, problem: _Answers) -> _Minimum:
        """Newton's method without bounds, and where a or b is negative, the best of the searches that hold some at 0."""
        found: _Minimum | None = None
        for held in ([], [0], [1], [0, 1]):
            start = problem.identity.repeat(problem.num_labels, 1)
            start[:, held] = 0.0
            free = torch.ones_like(start, dtype=torch.bool)
            free[:, held] = False
            other = _newton(problem, start, free)
            allowed = (other.numbers[:, :2] >= 0).all(-1)
            other = other._replace(value=torch.where(allowed, other.value, torch.inf))
            found = other if found is None else found.or_better(other)
            if found.value.isfinite().all():
                break
        assert found is not None
        return found

    def _numbers(self) -> Tensor:
        return torch.cat([self.scale, self.bias.unsqueeze(-1)], dim=-1)

    def _set(self, numbers: Tensor) -> None:
        self._store(scale=numbers[..., :2], bias=numbers[..., 2])


class _Slopes(NamedTuple):
    """For every label the mean NLL with the ridge `[L]`, its gradient `[L, P]` and its second derivatives `[L, P, P]`."""

    value: Tensor
    first: Tensor
    second: Tensor


class _Answers:
    """Mean of `-log sum_s w_s p_s(y)` over the N answers of every label, `p_s(yes) = sigmoid(x_s . numbers)`, float64.

    Args:
        draws: Log-odds `[S, N, L]`; infinite ones are the same under every map.
        answers: 0 and 1, `[N, L]`.
        weights: Of the draws, positive, `[S]`.
        features: Makes x `[..., P]` from finite log-odds.
        smooth: Platt's targets instead of 0 and 1.
    """

    def __init__(self, draws: Tensor, answers: Tensor, weights: Tensor, features: Features, smooth: bool) -> None:
        self.draws, self.answers, self.features = draws, answers, features
        self.num_labels = answers.shape[1]
        self._log_weights = weights.log()[:, None, None]
        self.identity = _identity(features(weights[:1])[0])
        self._yes_possible = (draws != -torch.inf).any(0)
        self._no_possible = (draws != torch.inf).any(0)
        possible = torch.where(answers == 1, self._yes_possible, self._no_possible)
        self.excluded = int((~possible).sum())
        yes = _smoothed(answers, possible, weights) if smooth else wide(answers)
        # What is impossible in every draw is infinite whatever the map, and left out.
        self._yes = torch.where(self._yes_possible & possible, yes, 0.0)
        self._no = torch.where(self._no_possible & possible, 1 - yes, 0.0)
        self._possible = possible
        self._hard = not smooth
        self.count = (self._yes + self._no).sum(0)

    def one_sided(self) -> Tensor:
        """Whether all answers of a label are alike, `[L]`."""
        yes = (self._possible & (self.answers == 1)).any(0)
        no = (self._possible & (self.answers == 0)).any(0)
        return ~(yes & no)

    def separable(self) -> Tensor:
        """Whether log-odds part the yes and the no of a label, in all draws together, `[L]`."""
        yes, no = (self._possible & (self.answers == answer) for answer in (1, 0))

        def ends(chosen: Tensor) -> tuple[Tensor, Tensor]:
            return (
                self.draws.masked_fill(~chosen, torch.inf).amin((0, 1)),
                self.draws.masked_fill(~chosen, -torch.inf).amax((0, 1)),
            )

        (least_yes, most_yes), (least_no, most_no) = ends(yes), ends(no)
        apart = most_no <= least_yes
        # Beta calibration cannot turn the order round, and is not sent to infinity by answers that are.
        return apart | (most_yes <= least_no) if len(self.identity) == 2 else apart

    def nll(self, numbers: Tensor) -> Tensor:
        """Return the mean NLL of every label `[L]`, without the ridge; 0 where a label has no possible answer."""
        return self(numbers).value - self._ridge(numbers)

    def mean(self, nll: Tensor) -> float:
        """Return the mean over the answers of all labels."""
        return float((nll * self.count).sum() / self.count.sum())

    def _ridge(self, numbers: Tensor) -> Tensor:
        return _RIDGE * (numbers - self.identity).square().sum(-1)

    def __call__(self, numbers: Tensor) -> _Slopes:
        size = len(self.identity)
        value = numbers.new_zeros(self.num_labels)
        first, second = numbers.new_zeros(self.num_labels, size), numbers.new_zeros(self.num_labels, size, size)
        for rows in slices(len(self.answers), 4 * self.draws[:, :1].numel() * size):
            for side, share in self._sides(rows):
                part = self._terms(numbers, rows, side, share)
                value, first, second = value - part[0], first - part[1], second - part[2]
        count = self.count.clamp_min(1.0)
        eye = torch.eye(size, dtype=numbers.dtype, device=numbers.device)
        return _Slopes(
            value / count + self._ridge(numbers),
            first / count[:, None] + 2 * _RIDGE * (numbers - self.identity),
            second / count[:, None, None] + 2 * _RIDGE * eye,
        )

    def _sides(self, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """1 for yes and -1 for no, and how much of it there is: one pass for hard answers, two for smooth ones."""
        yes, no = self._yes[rows], self._no[rows]
        if self._hard:
            yield 2.0 * wide(self.answers[rows]) - 1, yes + no
        else:
            yield torch.ones_like(yes), yes
            yield -torch.ones_like(no), no

    def _terms(self, numbers: Tensor, rows: slice, side: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over examples of the log of the pooled probability of `side`, and its first two derivatives."""
        part = wide(self.draws[:, rows])
        sure = part.isinf()
        features = self.features(part.masked_fill(sure, 0.0)).masked_fill(sure.unsqueeze(-1), 0.0)
        odds = (features * numbers).sum(-1) + torch.where(sure, part.sign() * _SURE, 0.0)
        joint = F.logsigmoid(side * odds) + self._log_weights
        pooled = joint.logsumexp(0)
        owned = (joint - pooled).exp()  # each draw's share in the pooled probability
        slope = side * torch.sigmoid(-side * odds)
        bend = slope.square() - torch.sigmoid(odds) * torch.sigmoid(-odds)
        by_row = torch.einsum("snl,snlp->nlp", owned * slope, features)
        second = torch.einsum("snl,snlp,snlq->lpq", owned * bend * share, features, features)
        second = second - torch.einsum("nl,nlp,nlq->lpq", share, by_row, by_row)
        return (share * pooled).sum(0), torch.einsum("nl,nlp->lp", share, by_row), second


def _identity(like: Tensor) -> Tensor:
    """The numbers that change nothing: factors 1 and bias 0."""
    numbers = torch.ones_like(like)
    numbers[..., -1] = 0.0
    return numbers


def _smoothed(answers: Tensor, possible: Tensor, like: Tensor) -> Tensor:
    yes = (possible & (answers == 1)).sum(0).to(like)
    no = (possible & (answers == 0)).sum(0).to(like)
    return torch.where(answers == 1, (yes + 1) / (yes + 2), 1 / (no + 2))


class _Minimum(NamedTuple):
    """Where Newton's method ended, for every label: numbers `[L, P]`, value `[L]`, gradient's norm `[L]`."""

    numbers: Tensor
    value: Tensor
    gradient_norm: Tensor
    iterations: int

    def or_better(self, other: _Minimum) -> _Minimum:
        better = other.value < self.value
        return _Minimum(
            torch.where(better[:, None], other.numbers, self.numbers),
            torch.where(better, other.value, self.value),
            torch.where(better, other.gradient_norm, self.gradient_norm),
            self.iterations + other.iterations,
        )


def _newton(problem: _Answers, start: Tensor, free: Tensor) -> _Minimum:
    """Minimise over the free numbers, for all labels at once: Newton's steps, halved until the value falls enough.

    Several draws may bend the likelihood downwards; there the step goes by the size of the curvature.
    """
    numbers, here, iterations = start, problem(start), 0
    norm = torch.where(free, here.first, 0.0).norm(dim=-1)
    while iterations < 200 and float(norm.max()) > 1e-3 * _TOLERANCE:
        iterations += 1
        slope = torch.where(free, here.first, 0.0)
        step = _newton_step(here.second, slope, free)
        falls = (slope * step).sum(-1)
        length = torch.ones_like(falls)
        for _ in range(60):
            there = problem(numbers + length[:, None] * step)
            enough = there.value <= here.value + 1e-4 * length * falls + 1e-15 * here.value.abs()
            if enough.all():
                break
            length = torch.where(enough, length, length / 2)
        if not enough.any():
            break
        length = torch.where(enough, length, 0.0)
        numbers = numbers + length[:, None] * step
        here = problem(numbers)
        following = torch.where(free, here.first, 0.0).norm(dim=-1)
        settled = float(following.max()) <= _TOLERANCE and bool((following >= norm / 2).all())
        norm = following
        if settled:  # only rounding is left
            break
    return _Minimum(numbers, here.value, norm, iterations)


def _newton_step(second: Tensor, slope: Tensor, free: Tensor) -> Tensor:
    both = free.unsqueeze(-1) & free.unsqueeze(-2)
    eye = torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)
    values, vectors = torch.linalg.eigh(torch.where(both, second, eye))
    size = values.abs().clamp_min(_RIDGE)
    turned = (vectors.mT @ slope.unsqueeze(-1)) / size.unsqueeze(-1)
    return torch.where(free, -(vectors @ turned).squeeze(-1), 0.0)  # what is held stays there to the last digit


def _warn_impossible(excluded: int, count: int, stacklevel: int = 5) -> None:
    _warn(
        f"{excluded} of {count} targets have probability zero in every draw: no calibration of their logits changes "
        "that, and they were left out of the fit; their NLL is infinite",
        stacklevel,
    )


def _warn(message: str, stacklevel: int = 5) -> None:
    warnings.warn(message, CalibrationWarning, stacklevel=stacklevel)
