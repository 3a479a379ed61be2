"""Several predictives become one: a mixture over all their draws, or all their examples in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from bayesguard.errors import BadInput, BadType
from bayesguard.predictive.base import Predictive, normalised_weights
from bayesguard.predictive.components import parameters
from bayesguard.predictive.continuous import ComponentPredictive
from bayesguard.predictive.pooled import Moments, PooledPredictive, merge_moments


def mixture(predictives: Sequence[Predictive], weights: object = None) -> Predictive:
    """Return one predictive whose draws are the draws of all: an ensemble of predictors, answer by answer.

    Args:
        predictives: Of one kind and one batch shape. Reduced ones give a reduced mixture.
        weights: Total weight of each; None for equal weights.

    Raises:
        BadInput: None given, or batch shapes that differ.
        BadType: Different kinds of predictives, or components of different families.

    Examples:
        >>> sure, unsure = Predictive.from_probs([[0.9, 0.1]]), Predictive.from_probs([[0.5, 0.5]])
        >>> mixture([sure, unsure]).probs
        tensor([[0.7000, 0.3000]])
    """
    first = _check_alike(predictives)
    for other in predictives[1:]:
        if other.batch_shape != first.batch_shape:
            raise BadInput(
                f"predictives has batch shapes {tuple(first.batch_shape)} and {tuple(other.batch_shape)}; "
                "members of a mixture must answer the same examples"
            )
    shares = normalised_weights(weights, len(predictives), first.weights)
    if (shares == 0).any():
        predictives = [pred for pred, share in zip(predictives, shares.tolist(), strict=True) if share > 0]
        shares = shares[shares > 0]
    if len(predictives) == 1:
        return predictives[0]
    joined = torch.cat([share * pred.weights for share, pred in zip(shares, predictives, strict=True)])
    if all(pred.has_draws for pred in predictives):
        tensors = [torch.cat(parts) for parts in zip(*(pred._tensors() for pred in predictives), strict=True)]
        return first._rebuild(tensors, joined, exact=False)
    return _mix_reduced(cast(Sequence[PooledPredictive], predictives), shares.tolist(), joined)


def concatenate(predictives: Sequence[Predictive]) -> Predictive:
    """Return one predictive of all the examples, in order: the batches of a pass over a data set.

    Args:
        predictives: Of one kind, with the same draws (the same number, the same weights). If some are reduced, all are.

    Raises:
        BadInput: None given, or draws that differ.
        BadType: Different kinds of predictives, or components of different families.

    Examples:
        >>> len(concatenate([Predictive.from_normal([0.0, 1.0], 1.0), Predictive.from_normal([2.0], 1.0)]))
        3
    """
    first = _check_alike(predictives)
    for other in predictives[1:]:
        if other.weights.shape != first.weights.shape or not torch.equal(other.weights, first.weights):
            raise BadInput(
                f"predictives differ in their draws ({first.num_samples} and {other.num_samples}) or their weights; "
                "examples can be joined only if they were predicted with the same draws"
            )
        if other.batch_shape[1:] != first.batch_shape[1:]:
            raise BadInput(
                f"predictives has batch shapes {tuple(first.batch_shape)} and {tuple(other.batch_shape)}, "
                "which differ in more than the examples"
            )
    if not all(pred.has_draws for pred in predictives):
        predictives = [pred.reduce() for pred in predictives]
    axis = predictives[0]._example_axis
    tensors = [torch.cat(parts, axis) for parts in zip(*(pred._tensors() for pred in predictives), strict=True)]
    return predictives[0]._rebuild(tensors, exact=all(pred.exact for pred in predictives))


class Reduction:
    """Chunks of draws of a classification predictive, accumulated online: memory O(N K), whatever the number of draws.

    Examples:
        >>> reduction = Reduction()
        >>> for seed in range(3):
        ...     chunk = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(seed))
        ...     reduction.update(Predictive.from_logits(chunk, draws=True))
        >>> reduction.result().num_samples
        12
    """

    def __init__(self) -> None:
        self._first: PooledPredictive | None = None
        self._moments: Moments | None = None
        self._weights: list[torch.Tensor] = []
        self._total = 0.0

    def update(self, chunk: Predictive, weight: float | None = None) -> None:
        """Add the draws of `chunk`, all of the same examples; `weight` is their total, by default their number.

        Raises:
            BadInput: A batch shape that differs from the first chunk's, or a weight that is not positive.
            BadType: A chunk that is not a classification predictive.
        """
        if not isinstance(chunk, PooledPredictive):
            raise BadType(f"only classification predictives can be reduced, got {type(chunk).__name__}; keep its draws")
        if self._first is not None and chunk.batch_shape != self._first.batch_shape:
            raise BadInput(
                f"chunk has batch shape {tuple(chunk.batch_shape)}, the first had {tuple(self._first.batch_shape)}; "
                "chunks hold further draws of the same examples"
            )
        weight = float(chunk.num_samples if weight is None else weight)
        if not weight > 0:
            raise BadInput(f"weight must be positive, got {weight}")
        self._total += weight
        moments = chunk._wide_moments()
        self._moments = (
            moments if self._moments is None else merge_moments(self._moments, moments, weight / self._total)
        )
        self._weights.append(chunk.weights * weight)
        if self._first is None:
            self._first = chunk

    def result(self) -> Predictive:
        """Return the reduced predictive of all draws so far.

        Raises:
            BadInput: No draws were added.
        """
        if self._first is None or self._moments is None:
            raise BadInput("no draws were added; call update() with at least one chunk")
        weights = torch.cat(self._weights) / self._total
        if len(weights) == 1:
            return self._first
        exact = self._first.exact and len(self._weights) == 1
        return self._first._rebuild(list(self._moments.to(self._first.dtype)), weights, exact)


def _mix_reduced(predictives: Sequence[PooledPredictive], shares: list[float], weights: torch.Tensor) -> Predictive:
    moments, total = predictives[0]._wide_moments(), shares[0]
    for pred, share in zip(predictives[1:], shares[1:], strict=True):
        total += share
        moments = merge_moments(moments, pred._wide_moments(), share / total)
    return predictives[0]._rebuild(list(moments.to(predictives[0].dtype)), weights, exact=False)


def _check_alike(predictives: Sequence[Predictive]) -> Predictive:
    """Return the first of predictives that are all of one kind, family and dtype."""
    if not predictives:
        raise BadInput("predictives is empty; at least one is needed")
    first = predictives[0]
    for other in predictives:
        if type(other) is not type(first):
            raise BadType(f"predictives must be of one kind, got {type(first).__name__} and {type(other).__name__}")
        if _family(other) != _family(first):
            raise BadType(f"predictives must have components of one family, got {_family(first)} and {_family(other)}")
    return first


def _family(predictive: Predictive) -> object:
    if isinstance(predictive, ComponentPredictive):
        component = predictive.component
        shapes = [value.shape[len(component.batch_shape) :] for value in parameters(component).values()]
        return type(component).__name__, tuple(parameters(component)), *map(tuple, shapes)
    if isinstance(predictive, PooledPredictive):
        return type(predictive).__name__, predictive.num_classes
    return type(predictive).__name__
