"""Bootstrap intervals: BCa as SciPy's, clusters against the exact variance, sums of absolute gaps against their law."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesguard.metrics.bootstrap import (
    basic_interval,
    bca_interval,
    bootstrap_weights,
    critical_value,
    inverted_interval,
    jackknife,
    largest,
    percentile_interval,
    standardised,
)
from bayesguard.metrics.functional.selective import weighted_aurc
from bayesguard.metrics.scores import Mean, Pairs, Scores
from bayesguard.sampling import stream

ANY = (-math.inf, math.inf)


def skewed(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, generator=generator, dtype=torch.float64).exp()


def cases() -> dict[str, tuple[Scores, Any]]:
    """Scores, and the same statistic of row numbers for SciPy."""
    values, confidence = skewed(90), skewed(90, 1)
    losses = (confidence < skewed(90, 2)).double()
    ranked = Pairs(confidence[:, None], losses[:, None], weighted_aurc)

    def aurc(rows: Any) -> float:
        counts = torch.bincount(torch.as_tensor(rows).long(), minlength=90).double()
        return float(weighted_aurc(confidence, losses, counts[None]))

    return {
        "mean": (Mean(values), lambda rows: values.numpy()[rows].mean()),
        "root": (Mean(values, root=True), lambda rows: math.sqrt(values.numpy()[rows].mean())),
        "ranked": (ranked, aurc),
    }


@pytest.mark.parametrize("name", ["mean", "root", "ranked"])
def test_bca_is_that_of_scipy(name: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    scores, statistic = cases()[name]
    found = stats.bootstrap(
        (np.arange(90),), statistic, n_resamples=999, method="BCa", vectorized=False, rng=np.random.default_rng(0)
    )
    resampled = torch.from_numpy(np.array(found.bootstrap_distribution))
    limits = bca_interval(scores.value(), resampled, jackknife(scores), 0.95, ANY)
    # The same resamples: nothing is left to chance.
    assert limits == pytest.approx(tuple(found.confidence_interval), rel=1e-9)
    assert percentile_interval(resampled, 0.95, ANY) != pytest.approx(limits, rel=1e-3)
    # Without the acceleration it would be noticed.
    flat = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    assert bca_interval(scores.value(), resampled, flat, 0.95, ANY) != pytest.approx(limits, rel=1e-4)


def test_blocks_of_a_jackknife_tell_the_acceleration() -> None:
    values = skewed(3000)
    confidence, losses = values[:, None], torch.ones(3000, 1, dtype=torch.float64)

    def plain(_: Tensor, __: Tensor, weights: Tensor) -> Tensor:
        return weights @ values / weights.sum(-1)

    def acceleration(left_out: Tensor) -> float:
        influence = left_out.mean() - left_out
        return float(influence.pow(3).sum() / (6 * influence.square().sum() ** 1.5))

    blocks = jackknife(Pairs(confidence, losses, plain))
    assert len(blocks) == 200
    # Five times the error of a skewness from 200 nearly normal sums, sqrt(15 / 200) / (6 sqrt(200)).
    bound = 5 * math.sqrt(15 / 200) / (6 * math.sqrt(200))
    assert abs(acceleration(blocks) - acceleration(jackknife(Mean(values)))) < bound


def test_left_out_clusters_are_whole() -> None:
    values, clusters = skewed(7), torch.tensor([0, 1, 0, 2, 1, 2, 2])
    wanted = [float(values[clusters != cluster].mean()) for cluster in range(3)]
    assert jackknife(Mean(values), clusters).tolist() == pytest.approx(wanted)
    ranked = Pairs(values[:, None], (values[:, None] > 1).double(), weighted_aurc)
    again = [
        float(weighted_aurc(values[kept], (values[kept] > 1).double(), torch.ones(1, int(kept.sum())).double()))
        for kept in (clusters != cluster for cluster in range(3))
    ]
    assert jackknife(ranked, clusters).tolist() == pytest.approx(again)


def clustered() -> tuple[Tensor, Tensor, float]:
    """Values of 60 interleaved clusters of five that share most of their noise, and the bootstrap variance of the mean."""
    generator = torch.Generator().manual_seed(4)
    shared = torch.randn(60, generator=generator, dtype=torch.float64)
    clusters = torch.arange(300) % 60
    values = shared[clusters] + 0.3 * torch.randn(300, generator=generator, dtype=torch.float64)
    means = values.reshape(5, 60).mean(0)
    return values, clusters, float((means - means.mean()).square().sum() / 60**2)


def spread(clusters: Tensor | None) -> float:
    """The resampled variance of the mean over the exact one, in five standard errors of a variance from 2,000 draws."""
    values, _, exact = clustered()
    weights = torch.cat(list(bootstrap_weights(300, 2000, 0, clusters=clusters)))
    variance = float((weights @ values / weights.sum(-1)).var())
    return abs(variance - exact) / (5 * exact * math.sqrt(2 / 2000))


@pytest.mark.parametrize(("rows", "resamples"), [(3, 50), (700, 400), (200_000, 3)])
def test_weights_count_what_was_drawn(rows: int, resamples: int) -> None:
    drawn = torch.randint(rows, (resamples, rows), generator=stream("cpu", 7, "bootstrap"))
    counts = torch.stack([torch.bincount(row, minlength=rows) for row in drawn])
    assert torch.equal(torch.cat(list(bootstrap_weights(rows, resamples, 7))), counts.double())


def test_clusters_are_drawn_whole() -> None:
    _, clusters, _ = clustered()
    weights = torch.cat(list(bootstrap_weights(300, 50, 1, clusters=clusters)))
    assert torch.equal(weights, weights[:, :60].repeat(1, 5))
    chunks = torch.cat(list(bootstrap_weights(300, 50, 1, clusters=clusters, chunk_size=7)))
    assert torch.equal(weights, chunks)
    assert spread(clusters) < 1


def test_rows_instead_of_clusters_would_be_noticed() -> None:
    assert spread(None) > 1


def test_one_gap_has_the_interval_of_its_folded_law() -> None:
    stats, optimize = pytest.importorskip("scipy.stats"), pytest.importorskip("scipy.optimize")
    levels = (torch.arange(10_001, dtype=torch.float64) + 0.5) / 10_001
    noise = 0.02 * torch.special.ndtri(levels)
    for gap in (0.0, 0.01, -0.045, 0.1):
        lower, upper = inverted_interval(torch.tensor([gap]).double(), gap + noise[:, None], 0.9, (0.0, 1.0))

        def folded(true: float, level: float, size: float = abs(gap)) -> float:
            law = stats.norm(true, 0.02)
            return float(law.cdf(size) - law.cdf(-size) - level)

        wanted = [0.0 if folded(0, 0.95) < 0 else optimize.brentq(folded, 0, 0.5, args=(0.95,))]
        wanted.append(optimize.brentq(folded, 0, 0.5, args=(0.05,)) if folded(0, 0.05) > 0 else 0.0)
        if gap:
            assert (lower, upper) == pytest.approx(wanted, abs=2e-4)
        assert lower <= upper


def null_coverage(kind: str) -> float:
    """Share of 150 estimates of 15 gaps, all truly 0, whose interval holds 0."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400, 15, generator=generator, dtype=torch.float64)
    held = 0
    for _ in range(150):
        gaps = torch.randn(15, generator=generator, dtype=torch.float64)
        again = gaps + noise
        if kind == "inverted":
            lower = inverted_interval(gaps, again, 0.95, (0.0, math.inf))[0]
        else:
            lower = basic_interval(float(gaps.abs().sum()), again.abs().sum(-1), 0.95, (0.0, math.inf))[0]
        held += lower <= 1e-9
    return held / 150


# An upper tail of 0.025 within five standard errors of a share of 150, and of the quantile of 400 shared draws.
TOLERANCE = 5 * math.sqrt(0.025 * 0.975 * (1 / 150 + 1 / 400))


def test_a_sum_of_no_gaps_is_held() -> None:
    assert abs(null_coverage("inverted") - 0.975) < TOLERANCE


def test_a_basic_interval_would_miss_it() -> None:
    assert abs(null_coverage("basic") - 0.975) > TOLERANCE


def test_gaps_that_do_not_vary_have_no_interval() -> None:
    gaps = torch.tensor([0.1, -0.2], dtype=torch.float64)
    assert inverted_interval(gaps, gaps.expand(50, 2), 0.95, (0.0, 1.0)) == pytest.approx((0.3, 0.3))
    assert inverted_interval(gaps, torch.full((50, 2), torch.nan).double(), 0.95, (0.0, 1.0)) == (0.0, 1.0)


def test_intervals_of_what_has_no_value_or_is_infinite() -> None:
    left_out = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    none, some = torch.full((5,), torch.nan).double(), torch.tensor([1.0, 2.0, math.inf]).double()
    for limits in (bca_interval(1.0, none, left_out, 0.9, (0, 1)), percentile_interval(none, 0.9, (0, 1))):
        assert limits == (0, 1)
    for limits in (bca_interval(1.0, some, left_out, 0.9, ANY), percentile_interval(some, 0.9, ANY)):
        assert limits == (1.0, math.inf)


def test_the_critical_value_is_where_the_counted_p_value_turns() -> None:
    statistics = torch.randn(999, generator=torch.Generator().manual_seed(2), dtype=torch.float64).abs()
    for level in (0.9, 0.95, 0.99):
        critical = critical_value(statistics, level)
        for statistic in (critical - 1e-9, critical, critical + 1e-9):
            p_value = (1 + int((statistics >= statistic).sum())) / 1000
            assert (p_value <= 1 - level + 1e-12) == (statistic > critical)
    assert critical_value(statistics[:10], 0.95) == math.inf


def test_standardised_passes_over_what_has_no_spread() -> None:
    resampled = torch.tensor([[1.0, 3.0, 0.1], [1.0, 5.0, 0.1], [1.0, torch.nan, 0.1]], dtype=torch.float64)
    standard = standardised(resampled)
    assert standard[:, 0].tolist() == standard[:, 2].tolist() == [0, 0, 0]
    assert standard[:, 1].tolist() == [-1, 1, 0]
    assert largest(standard).tolist() == [1, 1, 0]
