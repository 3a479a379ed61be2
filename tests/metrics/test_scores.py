"""Metrics weighted together: one product for all gives each what it gives by itself."""

import math

import pytest
import torch
from torch import Tensor

from bayesguard.metrics.bootstrap import bootstrap_weights
from bayesguard.metrics.registry import specs_for
from bayesguard.metrics.scores import NUM_BINS, Binned, Levels, Mean, Scores, Together
from bayesguard.predictive import Predictive
from bayesguard.sampling import stream

N = 53


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=stream("cpu", seed, "scores"), dtype=torch.float64)


def kept() -> list[Scores]:
    """Of each class one, means that are finite, infinite and rooted, and metrics of ranks and of many columns."""
    infinite = random(N).index_fill(0, torch.tensor([4]), math.inf)
    index = (random(N, 3, 1, seed=1) * NUM_BINS).long()
    pred, labels = Predictive.from_probs(random(N, 4, seed=2).softmax(-1)), (random(N, seed=3) * 4).long()
    ranked = [spec.scores(pred, labels) for spec in specs_for(pred, ["classwise_ece", "aurc"])]
    return [
        Mean(infinite),
        *ranked,
        Binned(random(N, 3, 1, seed=4) - 0.5, index),
        Mean(random(N, seed=5), root=True),
        Levels(random(N, 9, seed=6).round(), torch.arange(1, 10, dtype=torch.float64) / 10),
    ]


def by_hand(scores: Scores, weights: Tensor) -> tuple[float, list[float] | None]:
    """Return a metric and its gaps by loops over examples and bins."""
    total = weights.sum().item()
    if isinstance(scores, Mean):
        mean = sum(w * v for w, v in zip(weights.tolist(), scores.values.tolist(), strict=True) if w) / total
        return math.sqrt(mean) if scores.root else mean, None
    if isinstance(scores, Binned) and scores.gaps.shape[2] == 1:
        sums = [0.0] * NUM_BINS
        for row, weight in enumerate(weights.tolist()):
            for gap, place in zip(
                scores.gaps[row].flatten().tolist(), scores.index[row].flatten().tolist(), strict=True
            ):
                sums[place] += weight * gap / (total * scores.gaps.shape[1])
        return sum(map(abs, sums)), sums
    if isinstance(scores, Levels):
        shares = [
            sum(w * b for w, b in zip(weights.tolist(), column, strict=True)) for column in scores.below.T.tolist()
        ]
        gaps = [(s / total - q) / len(shares) for s, q in zip(shares, scores.levels.tolist(), strict=True)]
        return sum(map(abs, gaps)), gaps
    return scores.resample(weights.unsqueeze(0)).item(), None


# Room for all columns; for those of the means only; for none.
@pytest.mark.parametrize("room", [1 << 25, 4 * N, 0])
def test_together_is_each_by_itself(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayesguard.metrics.scores._KEPT", room)
    own = kept()
    weights = next(bootstrap_weights(N, 7, seed=0))
    assert not bool((weights[:, 4] > 0).all()), "some resamples are without the infinite value"
    for scores, (values, gaps) in zip(own, Together(own).resample(weights), strict=True):
        torch.testing.assert_close(values, scores.resample(weights), rtol=1e-13, atol=1e-14)
        assert values.dtype == torch.float64
        for row, weight in enumerate(weights):
            value, signed = by_hand(scores, weight)
            assert values[row].item() == pytest.approx(value, rel=1e-12)
            assert (gaps is None) == (signed is None)
            if gaps is not None and signed is not None:
                assert gaps[row].tolist() == pytest.approx(signed, abs=1e-14)


def test_without_weight_nothing_has_a_value() -> None:
    assert all(values.isnan().all() for values, _ in Together(kept()).resample(torch.zeros(2, N, dtype=torch.float64)))


@pytest.mark.parametrize(("units", "resamples"), [(7, 5000), (1000, 300), (150_000, 3)])
def test_weights_are_counts_of_one_stream_of_draws(units: int, resamples: int) -> None:
    # Drawn in one go, in 64 bits, and counted one by one: blocks, chunks and narrower integers change no bit.
    drawn = torch.randint(units, (resamples, units), generator=stream("cpu", 9, "bootstrap"))
    counts = torch.zeros(resamples, units, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(drawn.shape))
    assert torch.equal(torch.cat(list(bootstrap_weights(units, resamples, 9))), counts)


def test_chunks_of_many_examples_are_small() -> None:
    for units, rows in ((100_000, 20), (1_000_000, 8), (5_000_000, 1)):
        assert next(bootstrap_weights(units, 20, 0)).shape == (rows, units)
