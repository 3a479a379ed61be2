"""Calibration kernels: fitting a temperature, and the expected calibration error, beside the fastest of the others."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.benchmarks.speed.measure import calling, interleaved
from bayesguard.benchmarks.speed.peers import ECE, TEMPERATURE, collect, quiet
from bayesguard.benchmarks.speed.settings import Settings
from bayesguard.benchmarks.speed.table import Row, row_of
from bayesguard.sampling import stream

# The temperature that the labels are drawn with.
_TEMPERATURE = 1.5
_MUST, _AIM = 0.35, 0.25


def temperature(settings: Settings) -> list[Row]:
    """Time the fit of one temperature to logits `[N, K]`."""
    logits, labels = _problem(settings)

    def ours() -> float:
        fitted = bg.calibration.TemperatureScaling().fit(bg.Predictive.from_logits(logits), labels)
        return float(fitted.temperature)

    peers = _checked(TEMPERATURE, ours(), 0.02, settings, logits, labels)
    return [_row("temperature", "temperature fit", ours, peers, logits, settings)]


def calibration_error(settings: Settings) -> list[Row]:
    """Time the top-label calibration error in 15 bins of probabilities `[N, K]`."""
    logits, labels = _problem(settings)
    probs = logits.softmax(-1)

    def ours() -> float:
        return float(bg.metrics.functional.expected_calibration_error(probs, labels))

    peers = _checked(ECE, ours(), 0.01, settings, probs, labels)
    return [_row("ece", "expected calibration error", ours, peers, probs, settings)]


def _problem(settings: Settings) -> tuple[Tensor, Tensor]:
    rows, classes = (2000, 100) if settings.quick else (50_000, 1000)
    generator = stream(settings.device, 0, "speed logits")
    true = 3 * torch.randn(rows, classes, device=settings.device, generator=generator)
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator).squeeze(-1)
    return _TEMPERATURE * true, labels


def _checked(
    makers: Mapping[str, Callable[..., Mapping[str, Callable[[], float]]]],
    value: float,
    tolerance: float,
    settings: Settings,
    *arguments: Tensor,
) -> dict[str, Callable[[], float]]:
    """Return the peers, leaving out, with a line, those that find another value than ours: they do another job."""
    if not settings.peers:
        return {}
    kept: dict[str, Callable[[], float]] = {}
    for name, call in collect(makers, *arguments, say=settings.say).items():
        try:
            found = quiet(call)()
        except Exception as error:
            settings.say(f"skipped {name}: it failed with {type(error).__name__}: {' '.join(str(error).split())[:160]}")
            continue
        if abs(found - value) <= tolerance * abs(value):
            kept[name] = call
        else:
            settings.say(f"skipped {name}: it finds {found:.5g} where ours is {value:.5g}")
    return kept


def _row(
    case: str,
    name: str,
    ours: Callable[[], float],
    peers: Mapping[str, Callable[[], float]],
    data: Tensor,
    settings: Settings,
) -> Row:
    candidates = {"ours": calling(ours), **{peer: calling(quiet(call)) for peer, call in peers.items()}}
    timings = interleaved(candidates, settings.repeats, settings.clock, optional=peers)
    present = [peer for peer in peers if peer in timings.seconds]
    # The least that has to be done is to read everything once.
    moved = data.numel() * data.element_size()
    timings.seconds["limit"] = [settings.rates.seconds(0, moved)] * len(timings.seconds["ours"])
    baseline = min(present, key=lambda peer: timings.of(peer).median, default="limit")
    demanded = {"must": _MUST, "aim": _AIM} if present else {}
    note = "" if present else "no peer could run: the ratio is to one reading of the data, at the rate of a copy"
    title = f"{name}, {data.shape[0]} x {data.shape[1]} float32"
    return row_of(timings, case, title, baseline, peers=present, limit="limit", note=note, **demanded)
