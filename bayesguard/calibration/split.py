"""What split conformal predictors share: scores of held-out answers, and the rank among them that is a bound.

V. Vovk, A. Gammerman, G. Shafer (2005). Algorithmic learning in a random world. J. Lei, M. G'Sell, A. Rinaldo,
R. J. Tibshirani, L. Wasserman (2018). Distribution-free predictive inference for regression. JASA 113.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from bayesguard.calibration.base import Calibrator, check_weights
from bayesguard.calibration.ranks import (
    check_scores,
    conformal_rank,
    warn_too_few,
    weighted_bounds,
)
from bayesguard.checks import check_level, check_shape
from bayesguard.errors import BadInput, BadType, NotFitted
from bayesguard.metrics.functional.weights import effective_sample_size
from bayesguard.predictive import Predictive
from bayesguard.predictive.guaranteed import RowValues, guaranteed
from bayesguard.predictive.numerics import as_given

# Below this many examples' worth of weight a quantile under weights says nothing.
_LEAST_EFFECTIVE = 20


class SplitConformal(Calibrator):
    """Base of the conformal calibrators: scores of held-out answers, and the rank among them that is the bound.

    Args:
        alpha: Mis-coverage that is meant where none is said.
        by_group: Whether bounds are found for each group by itself (Mondrian: Vovk et al., 2005, section 4.5); `fit` and
            the call then take `groups=`.

    Attributes:
        scores: Of the held-out answers `[n]`, ascending within each group; what is fitted.
        strata: The group, or the class, of each score `[n]`, int64.
        weights: Weight of each score `[n]`; all ones unless `fit` was given some.
        is_weighted: Whether it was.
    """

    acts_on: ClassVar[Literal["draws", "pooled"]] = "pooled"
    needs_own_data: ClassVar[bool] = True
    sized_by_fit: ClassVar[tuple[str, ...]] = ("scores", "strata", "weights")
    settings: ClassVar[tuple[str, ...]] = ("by_group",)
    _slack: ClassVar[float] = 0.0  # within which two scores count as equal
    scores: Tensor
    strata: Tensor
    weights: Tensor
    is_weighted: Tensor

    def __init__(self, alpha: float = 0.1, *, by_group: bool = False) -> None:
        super().__init__()
        self.alpha, self.by_group = check_level(alpha, "alpha"), by_group
        self._keep(torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.long), torch.empty(0).double())
        self.register_buffer("is_weighted", torch.zeros((), dtype=torch.bool, device="cpu"))

    def _keep(self, scores: Tensor, strata: Tensor, weights: Tensor) -> None:
        for name, value in (("scores", scores), ("strata", strata), ("weights", weights)):
            self.register_buffer(name, value)

    # What a kind of conformal prediction says.

    @abstractmethod
    def _score(self, pred: Predictive, targets: Tensor) -> Tensor:
        """Scores of the targets, float64 `[n]`, or `[n, D]` for D targets an example."""

    @abstractmethod
    def _answer(self, pred: Predictive, alpha: float, rows: RowValues) -> Any:
        """The set or the ends of the interval."""

    # What they share.

    def fit(self, pred: Predictive, targets: object, *, groups: object = None, weights: object = None) -> Self:
        """Score held-out answers: examples that neither the network nor an earlier calibrator was fitted to.

        Args:
            pred: Predictions for n examples.
            targets: What was observed.
            groups: With `by_group`, the group of each example, integers `[n]`.
            weights: How much likelier each example is where predictions will be made than here, `[n]`, positive (density
                ratios; Tibshirani et al., 2019): the call then takes `weights=` as well.

        Raises:
            BadInput: No examples, scores that are not numbers, or weights that are worth less than 20 examples.
        """
        self._check_groups(groups)
        self._pending = groups, weights
        try:
            return super().fit(pred, targets)
        finally:
            self._pending = None, None

    _pending: tuple[object, object] = (None, None)

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        groups, weights = self._pending
        scores = self._score(pred, targets)
        each = scores.numel() // len(scores)
        flat = scores.reshape(-1)
        check_scores(flat)
        strata = self._strata(pred, targets, groups).repeat_interleave(each)
        own = (
            torch.ones_like(flat)
            if weights is None
            else check_weights(weights, len(scores)).to(flat).repeat_interleave(each)
        )
        effective = float(effective_sample_size(own)) / each
        if weights is not None and effective < _LEAST_EFFECTIVE:
            raise BadInput(
                f"weights of the {len(scores)} examples are worth {effective:.1f} equal ones, too few for a bound; the "
                "held-out data are too unlike those that predictions are wanted for"
            )
        order = flat.argsort(stable=True)
        order = order[strata[order].argsort(stable=True)]
        self._keep(flat[order], strata[order], own[order])
        self.is_weighted = self.is_weighted.new_tensor(weights is not None)
        self.diagnostics = {"num_examples": len(scores), "effective_examples": effective}
        self.diagnostics |= {"num_strata": len(strata.unique())}

    def _strata(self, pred: Predictive, targets: Tensor, groups: object) -> Tensor:
        if groups is None:
            return torch.zeros(len(targets), dtype=torch.long, device=pred.device)
        return _groups(groups, len(targets)).to(pred.device)

    def _check_groups(self, groups: object) -> None:
        if self.by_group != (groups is not None):
            raise BadInput('groups= goes with by_group=True (by="group" for classes), and is needed there')

    def forward(self, pred: Predictive, *, groups: object = None, weights: object = None) -> Predictive:
        """Return the predictive with guaranteed sets or intervals.

        Args:
            pred: Predictions for N examples.
            groups: With `by_group`, the group of each example `[N]`; a group that `fit` did not see gets everything.
            weights: Where `fit` had weights, those of these examples `[N]`.
        """
        if not self.fitted:
            raise NotFitted(
                f"this {type(self).__name__} is not fitted; call fit(pred, targets) on held-out predictions"
            )
        self._check_groups(groups)
        if bool(self.is_weighted) != (weights is not None):
            raise BadInput("weights= is needed where fit had weights, and only there")
        rows: RowValues = {}
        if groups is not None:
            rows["groups"] = _groups(groups, len(pred)).to(pred.device)
        if weights is not None:
            rows["weights"] = check_weights(weights, len(pred)).to(pred.device)
        return guaranteed(pred, self._answer, self.alpha, rows)

    def __call__(self, pred: Predictive, **more: Any) -> Predictive:
        """Return the predictive with guaranteed sets or intervals; see `forward`."""
        answer: Predictive = torch.nn.Module.__call__(self, pred, **more)
        return answer

    def _calibrate(self, pred: Predictive) -> Predictive:
        return self.forward(pred)

    def bounds(self, alpha: float, rows: RowValues, count: int) -> Tensor:
        """Return the bound of each of `count` new examples, float64 `[count]`."""
        groups = rows.get("groups")
        if groups is None:
            return self._bounds_of(self.scores, self.weights, alpha, rows.get("weights"), count)
        found = self.scores.new_full((count,), torch.inf)
        for group in groups.unique().tolist():
            here = groups == group
            held, held_weights = self._stratum(group)
            weights = rows["weights"][here] if "weights" in rows else None
            where = f" of group {group}"
            found[here] = self._bounds_of(held, held_weights, alpha, weights, int(here.sum()), where)
        return found

    def _stratum(self, stratum: int) -> tuple[Tensor, Tensor]:
        """The held-out scores that speak for a stratum, ascending, and their weights."""
        # Strata are in order, since `fit` sorts by them.
        first, last = torch.searchsorted(self.strata, self.strata.new_tensor([stratum, stratum + 1])).tolist()
        return self.scores[first:last], self.weights[first:last]

    def _bounds_of(
        self, scores: Tensor, weights: Tensor, alpha: float, own: Tensor | None, count: int, where: str = ""
    ) -> Tensor:
        if own is not None and len(scores):
            return weighted_bounds(scores, weights, own.to(scores), alpha)
        rank = conformal_rank(len(scores), alpha)
        if rank > len(scores):
            warn_too_few(len(scores), alpha, where)
            return scores.new_full((count,), torch.inf)
        return scores[rank - 1].expand(count)

    def p_values(self, pred: Predictive, targets: object, *, groups: object = None) -> Tensor:
        """Return the conformal p-value of each answer: the share of scores, its own among them, that are as large.

        An answer is in the set for every alpha below its p-value, and in no other (a most probable class is in all).
        For new examples the p-value is at most u with probability u at most.

        Args:
            pred: Predictions for N examples.
            targets: The answers.
            groups: With `by_group`, the group of each example `[N]`.

        Returns:
            float64, of the targets' shape.

        Raises:
            BadInput: A calibrator that was fitted with weights, under which no rank is the same for all examples.

        References:
            Vovk, Gammerman, Shafer, 2005, section 2.2.
        """
        if not self.fitted:
            raise NotFitted(
                f"this {type(self).__name__} is not fitted; call fit(pred, targets) on held-out predictions"
            )
        if self.is_weighted:
            raise BadInput("p-values are for a calibrator that was fitted without weights")
        self._check_groups(groups)
        with torch.no_grad():
            values = as_given(targets, "targets").to(pred.device)
            scores = self._score(pred, values)
            strata = self._strata(pred, values, groups)
            found = torch.empty_like(scores)
            for stratum in strata.unique().tolist():
                here = strata == stratum
                held = self._stratum(stratum)[0]
                # As in the sets, rounding of sums must not decide.
                smaller = torch.searchsorted(held, scores[here].contiguous() - self._slack)
                found[here] = (len(held) - smaller + 1).double() / (len(held) + 1)
            return found

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *more: Any) -> None:
        weights = state.get(prefix + "weights")
        if isinstance(weights, Tensor):  # states of 1.0 do not say whether there were weights
            state.setdefault(prefix + "is_weighted", (weights != 1).any())
        super()._load_from_state_dict(state, prefix, *more)

    def extra_repr(self) -> str:
        size = f"{len(self.scores)} scores" if self.fitted else "not fitted"
        return f"alpha={self.alpha}, {size}"


def _groups(groups: object, count: int) -> Tensor:
    values = as_given(groups, "groups")
    check_shape(values, (count,), "groups")
    if values.is_floating_point() or values.dtype == torch.bool:
        raise BadType(f"groups must be integers, got {values.dtype}")
    return values.long()
