"""The pooled likelihood of a linear map of the logits of K classes, and the search for its minimum."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.calibration.fitted import RIDGE, TOLERANCE, Features
from bayesguard.calibration.likelihood import picked
from bayesguard.predictive.numerics import BUDGET, slices

_ROUNDING = 1e-7  # of the norm of a gradient where curvatures are about 1: less than 1e-14 nats are left
_MOST_ITERATIONS = 2000
_ROUND = 25  # iterations of LBFGS between two looks at the gradient
_FOLDS = 3
_OFF_DIAGONAL = (1e5, 1e4, 1e3, 1e2, 1e1, 1e0, 1e-1, 1e-2)
_BIAS = (1e0, 1e-1, 1e-2, 1e-3, 1e-4)


Part = tuple[Tensor, Tensor, Tensor]  # features, masks and labels of some examples
Strengths = tuple[float, float]  # of the penalties on what is beside the diagonal, and on biases


def mapped(features: Tensor, factors: Tensor, bias: Tensor) -> Tensor:
    """Return `A x + b` for a matrix A `[K, K]`, or a diagonal `[K]`."""
    return (features * factors if factors.dim() == 1 else features @ factors.T) + bias


class MapLikelihood:
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

    def select(self, rows: Tensor) -> MapLikelihood:
        """Return the same of some of the examples."""
        return MapLikelihood(self.logits[:, rows], self.labels[rows], self.weights, self.features)

    def _made(self) -> Iterator[Part]:
        for rows in slices(len(self.labels), 8 * self.logits[:, :1].numel()):
            part = self.logits[:, rows]
            yield self.features(part), part == -torch.inf, self.labels[rows]

    def _parts(self) -> Iterator[Part]:
        yield from self._made() if self._kept is None else self._kept

    def nll_of_rows(self, factors: Tensor, bias: Tensor) -> Tensor:
        """Return the NLL of every example, `[N]`."""
        return torch.cat([-self._shares(part, factors, bias)[0] for part in self._parts()])

    def nll(self, factors: Tensor, bias: Tensor) -> float:
        """Return the mean NLL."""
        return float(self.nll_of_rows(factors, bias).mean())

    def errors(self, factors: Tensor, bias: Tensor) -> Tensor:
        """Return for every class the mean distance between its pooled probability and 1 or 0, what it was, `[K]`."""
        total = torch.zeros_like(bias)
        for part in self._parts():
            probs = torch.tensordot(self.weights, self._shares(part, factors, bias)[2].exp_(), dims=1)
            total += (probs - F.one_hot(part[2], self.num_classes)).abs().sum(0)
        return total / len(self.labels)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the pooled means of x xᵀ `[K, K]` and of x `[K]`."""
        square = self.weights.new_zeros(self.num_classes, self.num_classes)
        mean = self.weights.new_zeros(self.num_classes)
        for features, _, _ in self._parts():
            flat = (features * self.weights.sqrt()[:, None, None]).flatten(0, 1)
            square += flat.T @ flat
            mean += torch.tensordot(self.weights, features.sum(1), dims=1)
        return square / len(self.labels), mean / len(self.labels)

    def __call__(self, factors: Tensor, bias: Tensor) -> tuple[float, Tensor, Tensor]:
        """Return the mean NLL, and its derivatives in factors and bias."""
        total, by_factors, by_bias = self.weights.new_zeros(()), torch.zeros_like(factors), torch.zeros_like(bias)
        for part in self._parts():
            features, _, labels = part
            pooled, share, log_probs = self._shares(part, factors, bias)
            total -= pooled.sum()
            slope = log_probs.exp_()
            slope[:, torch.arange(len(labels), device=labels.device), labels] -= 1
            slope *= share.unsqueeze(-1)
            by_bias += slope.sum((0, 1))
            if factors.dim() == 1:
                by_factors += (slope * features).sum((0, 1))
            else:
                by_factors += slope.flatten(0, 1).T @ features.flatten(0, 1)
        count = len(self.labels)
        return float(total) / count, by_factors / count, by_bias / count

    def _shares(self, part: Part, factors: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log of the pooled probability of every label `[n]`, each draw's share in it, and all log-probabilities."""
        features, masked, labels = part
        log_probs = mapped(features, factors, bias).masked_fill_(masked, -torch.inf).log_softmax(-1)
        joint = picked(log_probs, labels) + self.weights.log().unsqueeze(-1)
        pooled = joint.logsumexp(0)
        return pooled, (joint - pooled).exp(), log_probs


class Coordinates(ABC):
    """Free numbers, in which the likelihood is about equally curved, and the map that they stand for.

    Only classes among the targets have numbers of their own. The others are tied to their mean: without targets the
    likelihood alone would send them to probability zero.
    """

    size: int  # how many numbers

    def __init__(self, likelihood: MapLikelihood) -> None:
        self.likelihood, self.num_classes = likelihood, likelihood.num_classes
        self.seen = likelihood.counts.nonzero()[:, 0]
        self.unseen = (likelihood.counts == 0).nonzero()[:, 0]

    @abstractmethod
    def free(self, flat: Tensor) -> Tensor:
        """Return the map of the classes among the targets."""

    @abstractmethod
    def whole(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors and bias of all classes."""

    def penalty(self, factors: Tensor, bias: Tensor) -> Tensor:
        """Return what is added to the mean NLL: the ridge."""
        identity = torch.ones_like(factors) if factors.dim() == 1 else torch.eye(len(bias)).to(factors)
        return RIDGE * ((factors - identity).square().sum() + bias.square().sum())

    def _bias(self, bias: Tensor) -> Tensor:
        """Biases of all classes; their mean over the targets' classes changes nothing, and is 0."""
        bias = bias - bias.mean()
        return bias.new_zeros(self.num_classes).index_put((self.seen,), bias)


class Diagonal(Coordinates):
    """A factor and a bias for each class, `[2, m]`."""

    def __init__(self, likelihood: MapLikelihood) -> None:
        super().__init__(likelihood)
        self.size = 2 * len(self.seen)
        square, mean = likelihood.moments()
        square, mean = square.diagonal()[self.seen], mean[self.seen]
        share = likelihood.counts[self.seen].to(mean) / len(likelihood.labels)
        blocks = torch.stack([square, mean, mean, torch.ones_like(mean)], -1).unflatten(-1, (2, 2))
        self._whiten = _inverse_root(blocks * (share * (1 - share) + 1e-3 / self.num_classes)[:, None, None])

    def free(self, flat: Tensor) -> Tensor:
        steps = self._whiten @ flat.reshape(-1, 2, 1)
        return steps.squeeze(-1).T + flat.new_tensor([[1.0], [0.0]])

    def whole(self, free: Tensor) -> tuple[Tensor, Tensor]:
        factors, bias = free
        return factors.mean().expand(self.num_classes).index_put((self.seen,), factors), self._bias(bias)


class Matrix(Coordinates):
    """A matrix and biases, `[m, m + 1]`: a diagonal plus a full matrix, since a strong penalty curves all but the first.

    Args:
        likelihood: What is minimised,
        strengths: with the off-diagonal and intercept regularisation (Kull et al., 2019, section 3) of these strengths,
        start: from here; None: from the identity.
    """

    def __init__(self, likelihood: MapLikelihood, strengths: Strengths, start: Tensor | None = None) -> None:
        super().__init__(likelihood)
        self._strengths = strengths
        count, classes = len(self.seen), self.num_classes
        self.size = count * (count + 2)
        square, mean = likelihood.moments()
        square, mean = square[self.seen][:, self.seen], mean[self.seen]
        curved = torch.cat([torch.cat([square, mean[None]]), torch.cat([mean, mean.new_ones(1)])[:, None]], 1)
        penalties = mean.new_full((count + 1,), 2 * strengths[0] / (classes * (classes - 1)))
        penalties[-1] = 2 * strengths[1] / classes
        self._whiten = _inverse_root(curved / classes + penalties.diag()).T
        self._whiten_diagonal = (square.diagonal() / classes + 1e-6).rsqrt()
        self._start = torch.eye(count, count + 1).to(mean) if start is None else start

    def penalty(self, factors: Tensor, bias: Tensor) -> Tensor:
        """Return what is added to the mean NLL."""
        beside = factors - factors.diagonal().diag()
        mean = beside.square().sum() / (len(bias) * (len(bias) - 1))
        odir = self._strengths[0] * mean + self._strengths[1] * bias.square().mean()
        return odir + super().penalty(factors, bias)

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
    level = curved.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(curved.shape[-1], dtype=curved.dtype, device=curved.device)
    root = torch.linalg.cholesky(curved + (1e-6 * level + 1e-9) * eye)
    return torch.linalg.solve_triangular(root, eye.expand_as(root), upper=False).mT


class Found(NamedTuple):
    """The map that a search ended at, and how it ended; without any search, as it is."""

    factors: Tensor
    bias: Tensor
    converged: bool = True
    iterations: int = 0
    gradient_norm: float = math.nan
    free: Tensor | None = None


def fit_map(coordinates: Coordinates, tolerance: float = TOLERANCE, most: int = _MOST_ITERATIONS) -> Found:
    """Return the map of the smallest pooled NLL plus penalty, by LBFGS with a line search (strong Wolfe conditions)."""
    flat = coordinates.likelihood.weights.new_zeros(coordinates.size).requires_grad_()
    norm = scaled = math.inf

    def loss() -> float:
        nonlocal norm, scaled
        value, by_free, flat.grad = _slope(coordinates, flat)
        norm, scaled = float(by_free.norm()), float(flat.grad.norm())
        return value

    search = torch.optim.LBFGS(
        [flat],
        max_iter=_ROUND,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=max(5, min(50, BUDGET * 4 // coordinates.size)),  # 50 pairs of a million numbers would be 800 MB
        line_search_fn="strong_wolfe",
    )
    best, iterations, stalled = loss(), 0, False
    while norm > tolerance and iterations < most and not stalled:
        search.step(loss)  # a number will do, no graph is needed
        iterations += _ROUND
        value = loss()
        stalled, best = not value < best, min(value, best)
    free = coordinates.free(flat.detach())
    # A strong penalty has a gradient of more than the tolerance where float64 shows no further fall.
    converged = norm <= tolerance or (stalled and scaled <= _ROUNDING)
    return Found(*coordinates.whole(free), converged, iterations, norm, free)


def _slope(coordinates: Coordinates, flat: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return what is minimised, and its derivatives in the free numbers of the map and in the flat ones."""
    with torch.enable_grad():
        free = coordinates.free(flat)
        factors, bias = coordinates.whole(free)
        added = coordinates.penalty(factors, bias)
        nll, by_factors, by_bias = coordinates.likelihood(factors.detach(), bias.detach())
        # The likelihood's own derivatives are known; the rest is linear or a square, and left to autograd.
        linear = added + (factors * by_factors).sum() + (bias * by_bias).sum()
        by_free, by_flat = torch.autograd.grad(linear, [free, flat])
    return nll + float(added.detach()), by_free, by_flat


def cross_validated(likelihood: MapLikelihood, off_diagonal: float | None, bias: float | None) -> Strengths:
    """Return both strengths, those that were not given by the NLL of held-out folds: first one, then the other."""
    few = len(likelihood.labels) < 2 * _FOLDS  # too few to choose by
    folds = [] if few or None not in (off_diagonal, bias) else _folds(likelihood)
    if off_diagonal is None:
        other = _BIAS[len(_BIAS) // 2] if bias is None else bias
        off_diagonal = _best(folds, [(strength, other) for strength in _OFF_DIAGONAL])[0]
    if bias is None:
        bias = _best(folds, [(off_diagonal, strength) for strength in _BIAS])[1]
    return off_diagonal, bias


def _folds(likelihood: MapLikelihood) -> list[tuple[MapLikelihood, MapLikelihood]]:
    """Pairs of data to fit and to score on; each fold has as many hard examples as the others, in whatever order."""
    identity = torch.ones(likelihood.num_classes).to(likelihood.weights)
    order = likelihood.nll_of_rows(identity, torch.zeros_like(identity)).argsort(stable=True)
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order), device=order.device) % _FOLDS
    return [(likelihood.select(fold != held), likelihood.select(fold == held)) for held in range(_FOLDS)]


def _best(folds: list[tuple[MapLikelihood, MapLikelihood]], candidates: list[Strengths]) -> Strengths:
    """Return the candidate with the smallest NLL on what was held out; the first, strongest one of equals."""
    starts: list[Tensor | None] = [None] * len(folds)
    scores: list[float] = []
    for strengths in candidates:
        score = 0.0
        for place, (fitted, held) in enumerate(folds):
            found = fit_map(Matrix(fitted, strengths, starts[place]), tolerance=1e-4, most=200)
            score += held.nll(found.factors, found.bias) * len(held.labels)
            starts[place] = found.free
        scores.append(score)
        # From strong to weak the score falls and then rises, and the weak ones take longest to fit.
        if len(scores) > 2 and min(scores) < min(scores[-2:]):
            break
    return candidates[min(range(len(scores)), key=scores.__getitem__)]
