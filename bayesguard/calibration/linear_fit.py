"""The search for the linear map of the logits of K classes of the smallest pooled NLL."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.calibration.fitted import RIDGE, TOLERANCE
from bayesguard.calibration.map_likelihood import MapLikelihood
from bayesguard.calibration.trust_region import step_within

_ROUNDING = 1e-7  # of the norm of a gradient where curvatures are about 1: less than 1e-14 nats are left
_MOST_ITERATIONS = 2000
_FOLDS = 3
_OFF_DIAGONAL = (1e5, 1e4, 1e3, 1e2, 1e1, 1e0, 1e-1, 1e-2)
_BIAS = (1e0, 1e-1, 1e-2, 1e-3, 1e-4)


Strengths = tuple[float, float]  # of the penalties on what is beside the diagonal, and on biases


class Shrinkage(NamedTuple):
    """What a search adds to the mean NLL: factors of the squared distances from `centre` times the identity, and of biases."""

    diagonal: float = RIDGE
    off_diagonal: float = RIDGE
    bias: float = RIDGE
    centre: float = 1.0


def odir(strengths: Strengths, classes: int) -> Shrinkage:
    """Return off-diagonal and intercept regularisation, which are means of squares (Kull et al., 2019, section 3)."""
    return Shrinkage(off_diagonal=RIDGE + strengths[0] / (classes * (classes - 1)), bias=RIDGE + strengths[1] / classes)


class Coordinates(ABC):
    """Free numbers, in which the likelihood is about equally curved, and the map that they stand for.

    Only classes among the targets have numbers of their own. The others are tied to their mean: without targets the
    likelihood alone would send them to probability zero.
    """

    size: int  # how many numbers

    def __init__(self, likelihood: MapLikelihood, shrinkage: Shrinkage) -> None:
        self.likelihood, self.num_classes, self.shrinkage = likelihood, likelihood.num_classes, shrinkage
        self.seen = likelihood.counts.nonzero()[:, 0]
        self.unseen = (likelihood.counts == 0).nonzero()[:, 0]

    @abstractmethod
    def free(self, flat: Tensor) -> Tensor:
        """Return the map of the classes among the targets."""

    @abstractmethod
    def whole(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors and bias of all classes."""

    def penalty(self, factors: Tensor, bias: Tensor) -> Tensor:
        """Return what is added to the mean NLL."""
        shrinkage, matrix = self.shrinkage, factors.dim() > 1
        own = factors.diagonal() if matrix else factors
        total = shrinkage.diagonal * (own - shrinkage.centre).square().sum() + shrinkage.bias * bias.square().sum()
        return total + shrinkage.off_diagonal * (factors - own.diag()).square().sum() if matrix else total

    def _bias(self, bias: Tensor) -> Tensor:
        """Biases of all classes; their mean over the targets' classes changes nothing, and is 0."""
        bias = bias - bias.mean()
        return bias.new_zeros(self.num_classes).index_put((self.seen,), bias)


class Diagonal(Coordinates):
    """A factor and a bias for each class, `[2, m]`."""

    def __init__(self, likelihood: MapLikelihood, shrinkage: Shrinkage) -> None:
        super().__init__(likelihood, shrinkage)
        self.size = 2 * len(self.seen)
        square, mean = likelihood.moments()
        square, mean = square.diagonal()[self.seen], mean[self.seen]
        share = likelihood.counts[self.seen].to(mean) / len(likelihood.labels)
        blocks = torch.stack([square, mean, mean, torch.ones_like(mean)], -1).unflatten(-1, (2, 2))
        penalties = mean.new_tensor([2 * shrinkage.diagonal, 2 * shrinkage.bias]).diag()
        self._whiten = _inverse_root(
            blocks * (share * (1 - share) + 1e-3 / self.num_classes)[:, None, None] + penalties
        )

    def free(self, flat: Tensor) -> Tensor:
        steps = self._whiten @ flat.reshape(-1, 2, 1)
        return steps.squeeze(-1).T + flat.new_tensor([[self.shrinkage.centre], [0.0]])

    def whole(self, free: Tensor) -> tuple[Tensor, Tensor]:
        factors, bias = free
        return factors.mean().expand(self.num_classes).index_put((self.seen,), factors), self._bias(bias)


class Matrix(Coordinates):
    """A matrix and biases, `[m, m + 1]`: a diagonal plus a full matrix, since a strong penalty curves all but the first.

    Args:
        likelihood: What is minimised,
        shrinkage: with this penalty,
        start: from here; None: from where the penalty is smallest.
    """

    def __init__(self, likelihood: MapLikelihood, shrinkage: Shrinkage, start: Tensor | None = None) -> None:
        super().__init__(likelihood, shrinkage)
        count, classes = len(self.seen), self.num_classes
        self.size = count * (count + 2)
        square, mean = likelihood.moments()
        square, mean = square[self.seen][:, self.seen], mean[self.seen]
        curved = torch.cat([torch.cat([square, mean[None]]), torch.cat([mean, mean.new_ones(1)])[:, None]], 1)
        penalties = mean.new_full((count + 1,), 2 * shrinkage.off_diagonal)
        penalties[-1] = 2 * shrinkage.bias
        self._whiten = _inverse_root(curved / classes + penalties.diag()).T
        self._whiten_diagonal = (square.diagonal() / classes + 2 * shrinkage.diagonal).rsqrt()
        self._start = shrinkage.centre * torch.eye(count, count + 1).to(mean) if start is None else start

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
    """Return the map of the smallest pooled NLL plus penalty, by Newton's method in a trust region.

    Iterations are products with the Hessian, of which every step takes some (Nocedal, Wright, 2006, Numerical
    optimization, algorithm 4.1).
    """
    here = _Point(coordinates, coordinates.likelihood.weights.new_zeros(coordinates.size))
    radius, iterations, stalled = max(1.0, here.scaled), 0, False
    while here.norm > tolerance and iterations < most and not stalled:
        step, promised, products = step_within(here.gradient, here.curvature(), radius)
        iterations += products
        there = _Point(coordinates, here.flat + step)
        fall, length = here.value - there.value, float(step.norm())
        # Of a fall that rounding hides, the gradient tells.
        hidden = promised <= 1e-13 * max(1.0, abs(here.value))
        good = fall / promised if not hidden else float(there.scaled < here.scaled)
        if not good >= 0.25:  # NaN where numbers overflow
            radius = length / 4
        elif good > 0.75 and length > 0.99 * radius:
            radius *= 4
        stalled = (hidden and not good) or radius < 1e-12
        if good > 1e-4:
            here = there
    # A strong penalty has a gradient of more than the tolerance where float64 shows no further fall.
    converged = here.norm <= tolerance or (stalled and here.scaled <= _ROUNDING)
    return Found(*coordinates.whole(here.free), converged, iterations, here.norm, here.free)


class _Point:
    """What is minimised at some flat numbers, with its gradient."""

    def __init__(self, coordinates: Coordinates, flat: Tensor) -> None:
        self.coordinates, self.flat, self.free = coordinates, flat, coordinates.free(flat)
        self.value, by_free, self.gradient = self._slope()
        self.norm, self.scaled = float(by_free.norm()), float(self.gradient.norm())

    @torch.enable_grad()
    def _slope(self) -> tuple[float, Tensor, Tensor]:
        flat = self.flat.detach().requires_grad_()
        free = self.coordinates.free(flat)
        factors, bias = self.coordinates.whole(free)
        added = self.coordinates.penalty(factors, bias)
        nll, by_factors, by_bias = self.coordinates.likelihood(factors.detach(), bias.detach())
        # The likelihood's own derivatives are known; the rest is linear or a square, and left to autograd.
        linear = added + (factors * by_factors).sum() + (bias * by_bias).sum()
        by_free, by_flat = torch.autograd.grad(linear, [free, flat])
        return nll + float(added.detach()), by_free, by_flat

    def curvature(self) -> Callable[[Tensor], Tensor]:
        """Return a function of a direction: the Hessian times it."""
        likelihood = self.coordinates.likelihood.curvature(*self.coordinates.whole(self.free))
        nothing = torch.zeros_like(self.flat)
        origin = self.coordinates.whole(self.coordinates.free(nothing))

        @torch.enable_grad()
        def by_penalty(direction: Tensor, pull: bool) -> Tensor:
            flat = direction.detach().requires_grad_()
            factors, bias = self.coordinates.whole(self.coordinates.free(flat))
            total = self.coordinates.penalty(factors, bias)
            if pull:
                # Maps are linear in the flat numbers but for a constant.
                moved = likelihood(factors.detach() - origin[0], bias.detach() - origin[1])
                total = total + (factors * moved[0]).sum() + (bias * moved[1]).sum()
            return torch.autograd.grad(total, flat)[0]

        constant = by_penalty(nothing, pull=False)
        return lambda direction: by_penalty(direction, pull=True) - constant


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
            shrinkage = odir(strengths, fitted.num_classes)
            found = fit_map(Matrix(fitted, shrinkage, starts[place]), tolerance=1e-4, most=200)
            score += held.nll(found.factors, found.bias) * len(held.labels)
            starts[place] = found.free
        scores.append(score)
        # From strong to weak the score falls and then rises, and the weak ones take longest to fit.
        if len(scores) > 2 and min(scores) < min(scores[-2:]):
            break
    return candidates[min(range(len(scores)), key=scores.__getitem__)]
