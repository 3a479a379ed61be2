"""Two processes that saw different rows compute the metrics of all rows."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from bayesguard import metrics
from bayesguard.predictive import Predictive

N = 90
# Unequal shares, one of them in two batches: lists of scores must be padded to be gathered.
ROWS = ((slice(0, 20), slice(20, 35)), (slice(35, N),))
CLASSES: dict[str, dict[str, Any]] = {
    "Accuracy": {},
    "NegativeLogLikelihood": {},
    "BrierScore": {},
    "ExpectedCalibrationError": {},
    "ClasswiseCalibrationError": {"num_classes": 4},
    "AreaUnderRiskCoverage": {},
    "ErrorAUROC": {},
    "SmoothCalibrationError": {},
    "CalibrationErrorAt": {"threshold": 0.5},
    "SetCoverage": {},
}
REAL = (
    "RootMeanSquaredError",
    "NegativeLogLikelihood",
    "ContinuousRankedProbabilityScore",
    "IntervalCoverage",
    "IntervalWidth",
    "QuantileCalibrationError",
    "ExpectedNormalisedCalibrationError",
    "IntervalScore",
)


def cases() -> list[tuple[Callable[[], Any], Any, Tensor]]:
    """Every class with predictions and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (N,), generator=generator)
    pred, y = Predictive.from_normal(logits[:, :2], torch.ones(N, 2, dtype=torch.float64)), logits[:, 2:]
    probs = logits.softmax(-1)
    return [
        *((lambda n=name, o=options: getattr(metrics, n)(**o), probs, labels) for name, options in CLASSES.items()),
        (lambda: metrics.ExpectedCalibrationError(binning="mass"), probs, labels),
        (lambda: metrics.ExpectedCalibrationError(binning="mass", exact=False), probs, labels),
        (metrics.OODAUROC, probs[:, 0], labels == 0),
        (lambda: metrics.OODFalsePositiveRate("in"), probs[:, 0], labels == 0),
        *((lambda n=name: getattr(metrics, n)(), pred, y) for name in REAL),
    ]


def work(rank: int, file: str) -> None:
    """Compare, in one of two processes, the synchronised value with that of all rows in one go."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = []
    for make, pred, y in cases():
        whole = make()
        whole.update(pred, y, weights)
        wanted.append(whole.compute().item())
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        for (make, pred, y), value in zip(cases(), wanted, strict=True):
            metric = make()
            for rows in ROWS[rank]:
                metric.update(pred[rows], y[rows], weights[rows])
            alone = metric.compute().item()
            if abs(alone - value) > 1e-12:
                raise ValueError(f"{metric} on rank {rank}: {alone} is not {value}")
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    # A script of its own: spawned processes import this module, which has no name under pytest.
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
