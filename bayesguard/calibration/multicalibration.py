"""Calibration within groups that the user names and that may overlap: multicalibration."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.calibration.base import Calibrator, class_labels, class_log_probs, from_class_log_probs
from bayesguard.calibration.fitted import check_possible
from bayesguard.checks import check_count, check_level, check_shape
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted
from bayesguard.predictive import Predictive
from bayesguard.predictive.numerics import as_given
from bayesguard.sampling import stream

_NEEDLESS = 1.0  # patches of calibrated predictions that may be expected
_MOST_STEP = 20.0  # log-odds


class Cells(NamedTuple):
    """Sums over the examples of every cell `[K, B + 1, G]`: class, bin of its probability (the last: all), group."""

    size: Tensor
    residual: Tensor
    variance: Tensor


class Multicalibration(Calibrator):
    """Move the predictions of cells (group, class, bin of its probability) until the residuals of all have mean zero.

    A calibrated model may be too sure about one group and not sure enough about another. Groups are given to `fit` and to
    the call as `groups=`, bool `[N, G]`, and may overlap; everybody is a group, too. A cell is the examples of one group
    for which the probability p of one class is in one of B bins of equal width, or all examples of the group. The cell
    whose mean residual (whether the class is true, less p) is the least likely by chance is patched first: the log-odds
    of the class against the rest move by one number, and the other classes keep their ratios. So a patch of one class
    leaves a distribution, nothing leaves 0 to 1, and the residual is the slope of the likelihood: every patch makes the
    predictions likelier on what it is fitted to.

    A random half of the examples proposes patches. The other half must get more likely by a factor above the number of
    cells, else the patch is refused for good: of a cell that is calibrated this factor has mean one, so that at most one
    such cell is patched in expectation. What is kept is then fitted to the cell's examples of both halves, held back by a
    standard normal prior, and the NLL on the data of `fit` never gets worse. It ends when no cell with `min_cell`
    proposing examples and a mean residual above `tolerance` is left that was not refused.

    For one class of several, or yes and no. It acts on the mixture: what the draws disagreed about is gone.

    Args:
        num_bins: B.
        tolerance: Mean residual that is let be.
        min_cell: Examples of a cell, in the half that proposes, below which it is let be.
        max_patches: After which it stops, with a `CalibrationWarning`.
        seed: Of the halves.

    Attributes:
        patches: Group (0 for everybody, then 1 to G), class and bin (B for all) of every patch, int64 `[P, 3]`.
        steps: By how much log-odds move, float64 `[P]`; patches are applied in their order.
        diagnostics: `nll_before` and `nll_after` (nats, mean), `num_examples`, `num_patches`, `num_refused`,
            `num_excluded` (targets of probability zero).

    Raises:
        BadInput: In `fit` and the call: no groups, or of another shape; other classes or groups than `fit` saw.
        BadType: Groups that are not bool; predictives of numbers, or of several labels an example.

    References:
        Hébert-Johnson, Kim, Reingold, Rothblum, 2018, ICML, section 3 (algorithm 1); patches by the likelihood of
        log-odds, and their acceptance by held-out data, are this library's.

    Examples:
        >>> from bayesguard.predictive import Predictive
        >>> group = torch.arange(2000) % 2 == 0
        >>> answers = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < torch.where(group, 0.8, 0.4)
        >>> pred = Predictive.from_probs(torch.full((2000,), 0.6))  # right for both together, wrong for each
        >>> mended = Multicalibration().fit(pred, answers, groups=group[:, None])(pred, groups=group[:, None])
        >>> bool((mended.probs - torch.where(group, 0.8, 0.4)).abs().max() < 0.04)
        True
    """

    acts_on: ClassVar[Literal["draws", "pooled"]] = "pooled"
    sized_by_fit = ("patches", "steps")
    settings = ("num_bins",)
    patches: Tensor
    steps: Tensor
    num_classes: Tensor
    num_groups: Tensor
    _groups: object = None

    def __init__(
        self,
        num_bins: int = 10,
        *,
        tolerance: float = 0.01,
        min_cell: int = 30,
        max_patches: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_bins, self.tolerance = check_count(num_bins, "num_bins"), check_level(tolerance, "tolerance")
        self.min_cell = check_count(min_cell, "min_cell")
        self.max_patches = check_count(max_patches, "max_patches", minimum=0)
        self.seed = check_count(seed, "seed", minimum=0)
        self.register_buffer("patches", torch.empty(0, 3, dtype=torch.long, device="cpu"))
        self.register_buffer("steps", torch.empty(0, dtype=torch.float64, device="cpu"))
        for name in ("num_classes", "num_groups"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long, device="cpu"))

    def fit(self, pred: Predictive, targets: object, *, groups: object = None, weights: object = None) -> Self:
        """Find the patches on held-out predictions.

        Args:
            pred: Predictions for N examples.
            targets: Class labels `[N]`, or yes and no.
            groups: Which example belongs to which group, bool `[N, G]`; an example may be in several, or in none.
            weights: Not taken.
        """
        self._groups = groups
        try:
            return super().fit(pred, targets, weights=weights)
        finally:
            self._groups = None

    def forward(self, pred: Predictive, *, groups: object = None) -> Predictive:
        """Return the calibrated predictive of examples whose groups are `groups`, bool `[N, G]`."""
        if not self.fitted:
            raise NotFitted("this Multicalibration is not fitted; call fit(pred, targets, groups=groups) first")
        log_probs = class_log_probs(pred, self)
        if log_probs.shape[1] != int(self.num_classes):
            raise BadInput(f"pred has {log_probs.shape[1]} classes, fit saw {int(self.num_classes)}")
        members = _members(groups, len(log_probs), log_probs.device)
        if members.shape[1] - 1 != int(self.num_groups):
            raise BadInput(f"groups has {members.shape[1] - 1} columns, fit saw {int(self.num_groups)}")
        for (group, label, bin_), step in zip(self.patches.tolist(), self.steps.tolist(), strict=True):
            rows = self._rows(log_probs, members, group, label, bin_)
            log_probs[rows] = moved(log_probs[rows], label, step)
        return from_class_log_probs(pred, log_probs)

    def __call__(self, pred: Predictive, **more: Any) -> Predictive:
        """Return the calibrated predictive; see `forward`."""
        answer: Predictive = torch.nn.Module.__call__(self, pred, **more)
        return answer

    def _calibrate(self, pred: Predictive) -> Predictive:
        return self.forward(pred)

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        log_probs = class_log_probs(pred, self)
        count, classes = log_probs.shape
        members = _members(self._groups, count, log_probs.device)
        labels = class_labels(pred, targets)
        possible = log_probs.gather(1, labels.unsqueeze(-1)).squeeze(-1) > -torch.inf
        check_possible(count - int(possible.sum()), count)
        log_probs, members, labels = log_probs[possible], members[possible], labels[possible]
        before = F.nll_loss(log_probs, labels)
        order = torch.randperm(len(labels), generator=stream("cpu", self.seed, "multicalibration"), device="cpu")
        proposing = torch.zeros(len(labels), dtype=torch.bool).scatter(0, order[: (len(labels) + 1) // 2], True)
        found, refused, ended = self._search(log_probs, labels, members, proposing.to(labels.device))
        self._keep(found, classes, members.shape[1] - 1)
        self.diagnostics = {
            "nll_before": float(before),
            "nll_after": float(F.nll_loss(log_probs, labels)),
            "num_examples": len(labels),
            "num_patches": len(found),
            "num_refused": refused,
            "num_excluded": count - len(labels),
        }
        if not ended:
            warnings.warn(
                f"there are cells left after {self.max_patches} patches; allow more with max_patches=, or raise tolerance= "
                "or min_cell=",
                CalibrationWarning,
                stacklevel=4,
            )

    def _keep(self, found: list[tuple[int, int, int, float]], classes: int, groups: int) -> None:
        self.patches = self.patches.new_tensor([patch[:3] for patch in found]).reshape(-1, 3)
        self.steps = self.steps.new_tensor([patch[3] for patch in found])
        self.num_classes, self.num_groups = self.num_classes.new_tensor(classes), self.num_groups.new_tensor(groups)

    def _search(
        self, log_probs: Tensor, labels: Tensor, members: Tensor, proposing: Tensor
    ) -> tuple[list[tuple[int, int, int, float]], int, bool]:
        """Patch `log_probs` in place; return the patches, how many were refused, and whether no cell is left."""
        found: list[tuple[int, int, int, float]] = []
        refused, price, open_cells = None, 0.0, None
        while True:
            if open_cells is None:
                sums = cells(log_probs[proposing], labels[proposing], members[proposing], self.num_bins)
                chance = sums.residual.abs() / sums.variance.sqrt()
                mean = sums.residual.abs() / sums.size.clamp_min(1)
                open_cells = chance.where((sums.size >= self.min_cell) & (mean > self.tolerance), 0.0)
                if refused is None:
                    refused = torch.zeros_like(open_cells, dtype=torch.bool)
                    price = math.log(max(int((sums.size >= self.min_cell).sum()), 1) / _NEEDLESS)
            assert refused is not None
            open_cells = open_cells.masked_fill(refused, 0.0)
            worst = int(open_cells.argmax())
            if not open_cells.flatten()[worst] > 0:
                return found, int(refused.sum()), True
            if len(found) == self.max_patches:
                return found, int(refused.sum()), False
            label, bin_, group = (int(each) for each in torch.unravel_index(torch.tensor(worst), open_cells.shape))
            rows = self._rows(log_probs, members, group, label, bin_)
            probs, hits, ours = log_probs[rows, label].exp(), labels[rows] == label, proposing[rows]
            step = best_step(probs[ours], hits[ours])
            if not loss_change(probs[~ours], hits[~ours], step) < -price:
                refused[label, bin_, group] = True
                continue
            step = best_step(probs, hits)
            log_probs[rows] = moved(log_probs[rows], label, step)
            found.append((group, label, bin_, step))
            open_cells = None

    def _rows(self, log_probs: Tensor, members: Tensor, group: int, label: int, bin_: int) -> Tensor:
        rows = members[:, group].nonzero()[:, 0]
        if bin_ == self.num_bins:
            return rows
        return rows[_bins(log_probs[rows, label].exp(), self.num_bins) == bin_]

    def extra_repr(self) -> str:
        return f"num_bins={self.num_bins}, " + (f"{len(self.steps)} patches" if self.fitted else "not fitted")


def cells(log_probs: Tensor, labels: Tensor, members: Tensor, num_bins: int) -> Cells:
    """Return the sums of every cell; of two classes the first is left out (zero), since the second says the same."""
    classes = log_probs.shape[1]
    sums = log_probs.new_zeros(3, classes, num_bins + 1, members.shape[1])
    belongs = members.to(log_probs)
    for label in range(1 if classes == 2 else 0, classes):
        probs = log_probs[:, label].exp()
        place = _bins(probs, num_bins)
        each = (torch.ones_like(probs), (labels == label).to(probs) - probs, probs * (1 - probs))
        for total, values in zip(sums, each, strict=True):
            total[label].index_add_(0, place, belongs * values.unsqueeze(-1))
    sums[:, :, -1] = sums[:, :, :-1].sum(2)
    return Cells(*sums)


def best_step(probs: Tensor, hits: Tensor) -> float:
    """Return the step of the log-odds of `probs` `[M]` that makes `hits` likeliest, under a standard normal prior."""
    odds, total = probs.logit(), float(hits.sum())
    low, high = -_MOST_STEP, _MOST_STEP
    for _ in range(52):  # to the last digit of float64
        middle = (low + high) / 2
        # The slope of the penalised NLL, which rises with the step.
        rising = float((odds + middle).sigmoid().sum()) - total + middle > 0
        low, high = (low, middle) if rising else (middle, high)
    return (low + high) / 2


def loss_change(probs: Tensor, hits: Tensor, step: float) -> float:
    """Return by how many nats the NLL of `hits` changes, summed, if the log-odds of `probs` move by `step`."""
    return float(torch.log1p(probs * math.expm1(step)).sum()) - step * float(hits.sum())


def moved(log_probs: Tensor, label: int, step: float) -> Tensor:
    """Return log-probabilities `[M, K]` with the odds of a class against the rest times `exp(step)`."""
    own = log_probs[:, label].exp()
    after = log_probs.clone()
    after[:, label] += step
    return after - torch.log1p(own * math.expm1(step)).unsqueeze(-1)


def _bins(probs: Tensor, num_bins: int) -> Tensor:
    return ((probs * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)


def _members(groups: object, count: int, device: torch.device) -> Tensor:
    """Groups `[N, 1 + G]`, everybody first."""
    if groups is None:
        raise BadInput("groups= is needed: which example belongs to which group, bool [N, G]")
    values = as_given(groups, "groups").to(device)
    if values.dtype != torch.bool:
        raise BadType(
            f"groups must be bool [N, G], got {values.dtype}; of group labels, make torch.nn.functional.one_hot(labels).bool()"
        )
    check_shape(values, (count, values.shape[-1] if values.dim() == 2 else 1), "groups")
    return torch.cat([values.new_ones(count, 1), values], 1)
