"""Several predictives become one: a mixture over all their draws, or all their examples in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.predictive.base import Predictive, normalised_weights
from bayesguard.predictive.components import parameters
from bayesguard.predictive.continuous import ComponentPredictive
from bayesguard.predictive.groups import Groups, joined
from bayesguard.predictive.pooled import Moments, PooledPredictive, merge_moments


def mixture(
    predictives: Sequence[Predictive], weights: object = None, *, groups: Literal["within", "members"] = "within"
) -> Predictive:
    """Return one predictive whose draws are the draws of all: an ensemble of predictors, answer by answer.

    Args:
        predictives: Of one kind and one batch shape. Reduced ones give a reduced mixture.
        weights: Total weight of each; None for equal weights.
        groups: What the Monte-Carlo error is that of. "within": the predictives are fixed, and their draws random
            (groups of draws stay what they are). "members": the predictives are themselves random, as the members of
            an ensemble are, and all draws of one are a group.

    Raises:
        BadInput: None given, batch shapes that differ, or an unknown kind of groups.
        BadType: Different kinds of predictives, or components of different families.

    Examples:
        >>> sure, unsure = Predictive.from_probs([[0.9, 0.1]]), Predictive.from_probs([[0.5, 0.5]])
        >>> mixture([sure, unsure]).probs
        tensor([[0.7000, 0.3000]])
    """
    if groups not in ("within", "members"):
        raise BadInput(f"groups must be 'within' or 'members', got {groups!r}")
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
    if not all(pred.has_draws for pred in predictives):
        reduction = Reduction()
        for pred, share in zip(predictives, shares.tolist(), strict=True):
            reduction.update(pred, share, as_group=groups == "members")
        return reduction.result()
    all_weights = torch.cat([share * pred.weights for share, pred in zip(shares, predictives, strict=True)])
    tensors = [torch.cat(parts) for parts in zip(*(pred._tensors() for pred in predictives), strict=True)]
    members = [_one_group(pred) if groups == "members" else pred.groups for pred in predictives]
    all_groups = joined(members, [pred.num_samples for pred in predictives])
    return first._rebuild(tensors, all_weights, exact=False, groups=all_groups)


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
    gathering = Gathering(sum(map(len, predictives)))
    _check_alike(predictives)
    if not all(pred.has_draws for pred in predictives):
        predictives = [pred.reduce() for pred in predictives]
    for pred in predictives:
        gathering.add(pred)
    return gathering.result()


class Gathering:
    """Examples written batch by batch into tensors that are made once: at the end nothing lies in memory twice.

    Args:
        rows: How many examples there will be; None where nobody knows, which costs a copy of one tensor at a time.
        device: Where they are gathered; None for where the first batch is.

    Examples:
        >>> gathering = Gathering(3)
        >>> for rows in (2, 1):
        ...     gathering.add(Predictive.from_logits(torch.zeros(rows, 4)))
        >>> len(gathering.result())
        3
    """

    def __init__(self, rows: int | None = None, device: torch.device | str | None = None) -> None:
        self._rows, self._device = rows or 0, device
        self._first: Predictive | None = None
        self._exact = True
        self._whole: list[Tensor] = []  # with room for all the rows
        self._filled = 0
        self._parts: list[list[Tensor]] = []  # what came beyond that room

    def add(self, pred: Predictive) -> None:
        """Add the examples of `pred`.

        Raises:
            BadInput: Draws, weights or shapes that differ from those of the first.
            BadType: Another kind of predictive, or components of another family.
        """
        first = self._first = self._first or pred
        _check_alike([first, pred])
        _check_same_draws(first, pred)
        self._exact &= pred.exact
        axis, tensors = pred._example_axis, pred._tensors()
        device = first.device if self._device is None else self._device
        if not self._whole and self._rows:
            shapes = [(*x.shape[:axis], self._rows, *x.shape[axis + 1 :]) for x in tensors]
            self._whole = [x.new_empty(shape, device=device) for x, shape in zip(tensors, shapes, strict=True)]
        if self._parts or not self._whole or self._filled + len(pred) > self._rows:
            self._parts.append([tensor.to(device) for tensor in tensors])
            return
        for whole, part in zip(self._whole, tensors, strict=True):
            whole.narrow(axis, self._filled, len(pred)).copy_(part)
        self._filled += len(pred)

    def result(self) -> Predictive:
        """Return the predictive of all examples; the gathering is empty afterwards.

        Raises:
            BadInput: Nothing was added.
        """
        if self._first is None:
            raise BadInput("nothing was added; call add() with at least one predictive")
        first, axis = self._first, self._first._example_axis
        tensors = [whole.narrow(axis, 0, self._filled) for whole in self._whole]
        if self._parts:
            lists = [list(column) for column in zip(*([tensors] if tensors else []), *self._parts, strict=True)]
            tensors, self._whole, self._parts = [], [], []
            while lists:  # what one tensor was joined from is freed before the next is
                tensors.append(torch.cat(lists.pop(0), axis))
        return first._rebuild(tensors, first.weights.to(tensors[0].device), self._exact, first.groups)


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
        self._weights: list[Tensor] = []
        self._groups: list[Groups] = []
        self._total = 0.0

    def update(self, chunk: Predictive, weight: float | None = None, *, as_group: bool = False) -> None:
        """Add the draws of `chunk`, all of the same examples; `weight` is their total, by default their number.

        A group of draws must not be cut by the end of a chunk. `as_group` makes one group of all draws of the chunk.

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
        if as_group:
            moments = moments._replace(variance=torch.zeros_like(moments.variance))
        self._moments = (
            moments if self._moments is None else merge_moments(self._moments, moments, weight / self._total)
        )
        self._weights.append(chunk.weights * weight)
        self._groups.append(_one_group(chunk) if as_group else chunk.groups)
        if self._first is None:
            self._first = chunk
        elif self._first.has_draws:  # from the second chunk on the first one's draws are not needed any more
            self._first = self._first._rebuild(moments.to(chunk.dtype).tensors())

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
        groups = joined(self._groups, [len(part) for part in self._weights])
        return self._first._rebuild(self._moments.to(self._first.dtype).tensors(), weights, exact, groups)


def _one_group(predictive: Predictive) -> Groups:
    return None if predictive.num_samples == 1 else torch.zeros(predictive.num_samples, dtype=torch.long)


def _check_same_draws(first: Predictive, other: Predictive) -> None:
    same_weights = other.weights is first.weights or (
        # Draws that came in other chunks have weights that differ by a rounding.
        other.weights.shape == first.weights.shape
        and torch.allclose(other.weights, first.weights.to(other.device), rtol=1e-12, atol=0)
    )
    a, b = first.groups, other.groups
    if not same_weights or not (a is b or (a is not None and b is not None and torch.equal(a, b))):
        raise BadInput(
            f"predictives differ in their draws ({first.num_samples} and {other.num_samples}), their weights or their "
            "groups; examples can be joined only if they were predicted with the same draws"
        )
    if other.has_draws != first.has_draws:
        raise BadInput("some predictives were reduced and others keep their draws; reduce() all of them first")
    if len(other._tensors()) != len(first._tensors()):
        raise BadInput(
            "predictives drawn to a tolerance cannot be joined with others, whose examples have the same draws; "
            "predict all of them with tolerance=, or none"
        )
    if other.batch_shape[1:] != first.batch_shape[1:]:
        raise BadInput(
            f"predictives has batch shapes {tuple(first.batch_shape)} and {tuple(other.batch_shape)}, "
            "which differ in more than the examples"
        )


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
