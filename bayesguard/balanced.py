"""Training rows of which every class, or group, has the same share, and the correction that undoes it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from bayesguard.calibration import PriorCorrection
from bayesguard.checks import check_count, check_labels, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive.numerics import as_given
from bayesguard.sampling import stream


class BalancedSampler(Sampler[int]):
    """Draw as many rows as there are, of every class (or group) the same number, in random order.

    Rows of a class are gone through in a random order, and again in another one where there are too few: none comes a
    second time before all have come once. Where classes do not share the number of rows, chance gives out the rest. What is
    drawn is a function of the seed and the epoch; `predictor.fit` tells the epoch.

    A network trained so answers as if all classes were equally frequent. `prior_correction()` undoes that.

    Args:
        labels: Class of each row `[N]`, integers from 0, each class once at least.
        groups: Group of each row `[N]`, integers; groups then have equal shares, and not classes.
        seed: Of the draws.

    Raises:
        BadInput: Other shapes, a class without a row, or one class or group only.
        BadType: Labels or groups that are no integers.

    Examples:
        >>> labels = torch.tensor([0] * 90 + [1] * 10)
        >>> sampler = BalancedSampler(labels)
        >>> labels[list(sampler)].bincount()
        tensor([50, 50])
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(labels), 20, sampler=sampler)
        >>> sampler.prior_correction().new
        tensor([0.9000, 0.1000], dtype=torch.float64)
    """

    def __init__(self, labels: object, *, groups: object = None, seed: int = 0) -> None:
        given = as_given(labels, "labels").detach().cpu()
        if given.dim() != 1 or not len(given):
            raise BadInput(f"labels must be [N], one class for each row, got shape {tuple(given.shape)}")
        most = 1 if given.is_floating_point() or given.dtype == torch.bool else int(given.max()) + 1
        counts = check_labels(given, given.shape, max(most, 1), "labels").bincount()
        if bool((counts == 0).any()):
            raise BadInput(f"labels has no row of class {int((counts == 0).nonzero()[0])}, and none can be drawn")
        self.class_shares = counts.double() / len(given)
        self.by_group = groups is not None
        strata = given.long() if groups is None else _groups(groups, len(given))
        self._members = [(strata == stratum).nonzero().squeeze(-1) for stratum in strata.unique()]
        if len(self._members) < 2:
            raise BadInput(f"{'groups' if self.by_group else 'labels'} has one value only; there is nothing to balance")
        self.seed, self.epoch, self._count = check_count(seed, "seed", minimum=0), 0, len(given)

    def set_epoch(self, epoch: int) -> None:
        """Draw the rows of this epoch from now on."""
        self.epoch = check_count(epoch, "epoch", minimum=0)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        generator = stream("cpu", self.seed, "balanced", self.epoch)
        share, rest = divmod(self._count, len(self._members))
        quotas = torch.full((len(self._members),), share)
        quotas[torch.randperm(len(quotas), generator=generator)[:rest]] += 1
        drawn = torch.cat(
            [_cycled(rows, quota, generator) for rows, quota in zip(self._members, quotas.tolist(), strict=True)]
        )
        return iter(drawn[torch.randperm(len(drawn), generator=generator)].tolist())

    def prior_correction(self) -> PriorCorrection:
        """Return the correction of probabilities learnt on equal shares to the shares of the classes in `labels`.

        Raises:
            BadInput: Groups were balanced: what inputs of a class look like has changed with their groups, and no
                correction of class shares undoes that.
        """
        if self.by_group:
            raise BadInput(
                "groups were balanced, which changes what the inputs of a class look like and not the shares of classes "
                "alone; no correction undoes it. Calibrate on held-out rows that were not balanced"
            )
        equal = torch.full_like(self.class_shares, 1 / len(self.class_shares))
        return PriorCorrection(trained_shares=equal).adapt_to(self.class_shares)


def _groups(groups: object, count: int) -> Tensor:
    values = as_given(groups, "groups").detach().cpu()
    check_shape(values, (count,), "groups")
    if values.is_floating_point() or values.dtype == torch.bool:
        raise BadType(f"groups must be integers, got {values.dtype}")
    return values.long()


def _cycled(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of the rows, going through all of them in random order before any comes again."""
    rounds = -(-count // len(rows))
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)] for _ in range(rounds)] or [rows[:0]])[
        :count
    ]
