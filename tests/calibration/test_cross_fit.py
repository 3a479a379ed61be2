"""No example is scored by a calibrator that was fitted to it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bayesguard.calibration import Calibrator
from bayesguard.calibration.cross_fit import cross_fitted
from bayesguard.predictive import Predictive

SEEN: list[tuple[list[float], list[float]]] = []


class Spy(Calibrator):
    """Notes the examples that it is fitted and applied to, by their means."""

    acts_on = "pooled"

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        assert not hasattr(self, "own")  # a fresh copy for every fold
        assert torch.equal(pred.mean, targets)
        self.own = pred.mean.tolist()

    def _fit_weighted(self, pred: Predictive, targets: Tensor, weights: Tensor, /) -> None:
        assert torch.allclose(weights, targets / targets.mean())
        self._fit(pred, targets)

    def _calibrate(self, pred: Predictive) -> Predictive:
        SEEN.append((self.own, pred.mean.tolist()))
        return pred


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("folds", [2, 5, 11])
def test_each_example_is_held_out_once_and_seen_otherwise(weighted: bool, folds: int) -> None:
    SEEN.clear()
    rows = torch.arange(12, dtype=torch.float64)
    options: dict[str, Any] = {"num_folds": folds, "seed": 0, "weights": rows if weighted else None}
    found = cross_fitted(Spy(), Predictive.from_normal(rows, 1.0), rows, "crps", **options)
    kept = rows[1:].tolist() if weighted else rows.tolist()
    assert sorted(row for _, held in SEEN for row in held) == kept
    for fitted, held in SEEN:
        assert sorted(fitted + held) == kept
        assert len(held) in (len(kept) // folds, len(kept) // folds + 1)
    assert torch.equal(found.before, found.after)
    assert len(found.before) == len(kept)
