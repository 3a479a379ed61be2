"""Numbers over shifts have the interval of their mean, whatever its kind."""

import math

import pytest
import torch
from torch import Tensor

from bayesguard.metrics.registry import specs_for
from bayesguard.predictive import Predictive
from bayesguard.sheet import Drawn, Interval, Sheet, mean_of


def drawn(kind: Interval | None, probs: list[Tensor], targets: Tensor) -> list[Drawn]:
    """The calibration errors of several predictions of the same targets, resampled together."""
    sheet = Sheet(0.95, 0, kind, None)
    for place, own in enumerate(probs):
        predictive = Predictive.from_probs(own)
        sheet.add(f"shift {place}", 1, predictive, targets, specs_for(predictive, ["ece"]))
    return sheet.drawn()


@pytest.mark.parametrize("kind", [None, "basic", "percentile", "bca"])
def test_the_mean_of_twins_has_the_interval_of_one(kind: Interval | None) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(80, generator=generator, dtype=torch.float64)
    targets = (torch.rand(80, generator=generator) < probs).long()
    twins = drawn(kind, [probs, probs], targets)
    assert mean_of(twins).interval(0.95, (0.0, 1.0), kind) == pytest.approx(twins[0].interval(0.95, (0.0, 1.0), kind))


def test_gaps_of_a_mean_add_up_to_it() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(80, generator=generator, dtype=torch.float64)
    targets = (torch.rand(80, generator=generator) < probs).long()
    mean = mean_of(drawn(None, [probs, probs.sqrt()], targets))
    assert mean.gaps is not None
    assert float(mean.gaps[0].abs().sum()) == pytest.approx(mean.value)
    torch.testing.assert_close(mean.gaps[1].abs().sum(-1), mean.resampled)


def test_an_infinite_number_keeps_an_open_end() -> None:
    number = Drawn(math.inf, torch.tensor([1.0, 2.0, math.inf]).double())
    assert number.interval(0.95) == (1.0, math.inf)
