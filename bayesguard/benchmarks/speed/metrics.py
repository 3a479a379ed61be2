"""Metrics at scale: calibration error, CRPS of samples, and the bootstrap, each beside a few lines by hand."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.benchmarks.speed.calibration import problem
from bayesguard.benchmarks.speed.measure import calling, interleaved
from bayesguard.benchmarks.speed.peers import ECE, collect, quiet
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row, row_of
from bayesguard.errors import BayesguardError
from bayesguard.sampling import stream


def calibration_errors(settings: Settings) -> list[Row]:
    """Time the top-label calibration error beside one maximum and three counts."""
    rows = []
    for count, classes in ((1_000_000, 10), (50_000, 1000)):
        probs, labels = problem(settings, count, classes)

        def ours(probs: Tensor = probs, labels: Tensor = labels) -> float:
            return float(bg.metrics.functional.expected_calibration_error(probs, labels))

        def plain(probs: Tensor = probs, labels: Tensor = labels) -> float:
            return ece_by_hand(probs, labels)

        _same(ours(), plain(), "ECE")
        peers = collect(ECE, probs, labels, say=settings.say) if settings.peers else {}
        title = f"ECE by hand, {len(probs)} x {classes} float32"
        rows.append(_row("ece-by-hand", title, ours, "by hand", plain, settings, peers))
    return rows


def ece_by_hand(probs: Tensor, labels: Tensor) -> float:
    """Return the calibration error in 15 bins of probabilities that nobody checks."""
    confidence, predicted = probs.max(-1)
    bins = (confidence * 15).ceil().long().clamp(1, 15) - 1
    gaps = confidence.double() - (predicted == labels).double()
    return float(torch.bincount(bins, weights=gaps, minlength=15).abs().sum() / len(probs))


def sample_crps(settings: Settings) -> list[Row]:
    """Time the fair CRPS of 100 samples beside one sort."""
    count = 2500 if settings.quick else 100_000
    generator = stream(settings.device, 0, "speed samples")
    samples = torch.randn(100, count, device=settings.device, generator=generator)
    targets = torch.randn(count, device=settings.device, generator=generator)

    def ours() -> float:
        return float(
            bg.metrics.functional.continuous_ranked_probability_score(bg.Predictive.from_samples(samples), targets)
        )

    def plain() -> float:
        return crps_by_hand(samples, targets)

    _same(ours(), plain(), "CRPS")
    return [_row("crps", f"sample CRPS, {count} x 100 float32", ours, "one sort", plain, settings, {})]


def crps_by_hand(samples: Tensor, targets: Tensor) -> float:
    """Return the mean fair CRPS of samples `[S, N]` by the weighted sum of sorted samples."""
    number = len(samples)
    ordered = samples.T.contiguous().sort(-1).values.double()
    ranks = 2 * torch.arange(1, number + 1, dtype=torch.float64, device=samples.device) - number - 1
    spread = ordered @ ranks / (number * (number - 1))
    return float(((ordered - targets.unsqueeze(1)).abs().mean(1) - spread).mean())


def bootstrap(settings: Settings) -> list[Row]:
    """Time an evaluation with 1,000 resamples beside one without intervals."""
    probs, labels = problem(settings, 100_000, 10)
    pred = bg.Predictive.from_probs(probs)
    number = 100 if settings.quick else 1000
    candidates = {
        "ours": calling(lambda: bg.evaluate(pred[:], labels, num_resamples=number)),
        "no intervals": calling(lambda: bg.evaluate(pred[:], labels, num_resamples=0)),
    }
    timings = interleaved(candidates, settings.repeats, settings.clock)
    title = f"evaluate with {number} resamples, {len(probs)} x 10"
    return [row_of(timings, "bootstrap", title, "no intervals")]


def _same(ours: float, plain: float, name: str) -> None:
    if abs(ours - plain) > 1e-4 * abs(ours):
        raise BayesguardError(f"{name} is {ours:.6g}, but {plain:.6g} by hand: the two do not do the same job")


def _row(
    case: str,
    title: str,
    ours: Callable[[], float],
    baseline: str,
    plain: Callable[[], float],
    settings: Settings,
    peers: Mapping[str, Callable[[], float]],
) -> Row:
    candidates = {"ours": calling(ours), baseline: calling(plain)}
    candidates |= {peer: calling(quiet(call)) for peer, call in peers.items()}
    timings = interleaved(candidates, settings.repeats, settings.clock, optional=peers)
    return row_of(timings, case, title, baseline, peers=list(peers))
