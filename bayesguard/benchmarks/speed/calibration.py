"""Calibrators at scale: Dirichlet calibration, and the thresholds of adaptive prediction sets."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.benchmarks.speed.measure import calling, interleaved
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row, row_of
from bayesguard.sampling import stream

_ALPHA = 0.1


def problem(settings: Settings, rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return overconfident probabilities `[N, K]` and labels; a fortieth of the rows with `quick`."""
    rows = rows // 40 if settings.quick else rows
    generator = stream(settings.device, 0, "speed probabilities")
    logits = 2 * torch.randn(rows, classes, device=settings.device, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return (1.5 * logits).softmax(-1), labels


def dirichlet(settings: Settings) -> list[Row]:
    """Time the fit of Dirichlet calibration, its penalties given, beside twenty evaluations of its loss and gradient."""
    # With 1,000 classes the map has a million numbers.
    probs, labels = problem(settings, 20_000, 10 if settings.quick else 100)

    def ours() -> None:
        bg.calibration.DirichletCalibration(0.1, 0.1).fit(bg.Predictive.from_probs(probs), labels)

    def plain() -> None:
        inputs, classes = probs.log(), probs.shape[1]
        weight = torch.eye(classes, device=probs.device, requires_grad=True)
        for _ in range(20):
            torch.autograd.grad(torch.nn.functional.cross_entropy(inputs @ weight, labels), weight)

    note = "20 evaluations in float32 are what an optimiser needs at least; ours is converged, in float64"
    return [_row("dirichlet", "Dirichlet fit", ours, "20 gradients", plain, probs, settings, note)]


def adaptive_sets(settings: Settings) -> list[Row]:
    """Time the thresholds of APS and RAPS beside masked sums of the labels' scores, which sort nothing."""
    probs, labels = problem(settings, 50_000, 1000)

    def plain() -> Tensor:
        own = probs.gather(1, labels.unsqueeze(1))
        scores = torch.cat([(p * (p >= mine)).sum(1) for p, mine in zip(probs.split(500), own.split(500), strict=True)])
        return scores.kthvalue(int((1 - _ALPHA) * (len(scores) + 1)) + 1).values

    def ours(score: Literal["aps", "raps"]) -> Callable[[], object]:
        return lambda: bg.calibration.Conformal(score, _ALPHA, randomised=False).fit(
            bg.Predictive.from_probs(probs), labels
        )

    return [
        _row("aps", f"{score.upper()} calibration", ours(score), "masked sums", plain, probs, settings)
        for score in ("aps", "raps")
    ]


def _row(
    case: str,
    name: str,
    ours: Callable[[], object],
    baseline: str,
    plain: Callable[[], object],
    data: Tensor,
    settings: Settings,
    note: str = "",
) -> Row:
    candidates = {"ours": calling(ours), baseline: calling(plain)}
    timings = interleaved(candidates, settings.repeats, settings.clock)
    return row_of(timings, case, f"{name}, {data.shape[0]} x {data.shape[1]} float32", baseline, note=note)
