"""Metrics against independent implementations; those that are not installed are left out.

The accuracy, the log loss, pinball losses, areas, precision and isotonic regression of scikit-learn are in the files of
their metrics.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from torch import Tensor

from bayesguard.metrics import functional as M
from bayesguard.predictive import Predictive


def classes(rows: int = 400, count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(rows, count, generator=generator, dtype=torch.float64).softmax(-1)
    return probs, torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def yes_or_no(rows: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    probs = torch.rand(rows, generator=generator, dtype=torch.float64)
    return probs, torch.bernoulli(probs.square(), generator=generator).long()


def weights(rows: int = 400) -> Tensor:
    return 3 * torch.rand(rows, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def real(rows: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    mean, scale = (torch.randn(rows, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = scale.exp()
    return mean, scale, mean + scale * torch.randn(rows, generator=generator, dtype=torch.float64)


def near(ours: Tensor, wanted: Any, abs_: float = 1e-12) -> None:
    assert ours.item() == pytest.approx(float(wanted), abs=abs_)


def test_sklearn_scores_with_weights() -> None:
    probs, y = classes()
    w = weights()
    near(M.accuracy(probs, y, weights=w), sk.accuracy_score(y, probs.argmax(-1), sample_weight=w))
    near(M.negative_log_likelihood(probs.log(), y, weights=w), sk.log_loss(y, probs, sample_weight=w))
    p, hit = yes_or_no()
    two = torch.stack([1 - p, p], -1)
    near(M.brier_score(two, hit, weights=w) / 2, sk.brier_score_loss(hit, p, sample_weight=w))
    mean, _, truth = real()
    w = weights(300)
    near(M.root_mean_squared_error(mean, truth, weights=w), sk.root_mean_squared_error(truth, mean, sample_weight=w))


def test_sklearn_ranks_with_weights() -> None:
    p, hit = yes_or_no()
    p, w = (p * 20).round() / 20, weights()
    near(M.area_under_roc(p, hit, weights=w), sk.roc_auc_score(hit, p, sample_weight=w))
    probs, y = classes()
    confidence, label = probs.max(-1)
    near(M.error_auroc(probs, y, weights=w), sk.roc_auc_score(label != y, -confidence, sample_weight=w))
    inside, outside = p[:150], p[150:]
    ours = M.ood_auroc(inside, outside, weights=(w[:150], w[150:]))
    near(ours, sk.roc_auc_score(torch.arange(400) >= 150, p, sample_weight=w))
    precision = M.area_under_precision_recall(inside, outside, positive="out", weights=(w[:150], w[150:]))
    near(precision, sk.average_precision_score(torch.arange(400) >= 150, p, sample_weight=w))


def test_sklearn_decompositions_and_bins() -> None:
    isotonic = pytest.importorskip("sklearn.isotonic")
    p, hit = yes_or_no()
    w = weights()
    fitted = isotonic.IsotonicRegression().fit_transform(p.numpy(), hit.numpy(), sample_weight=w.numpy())
    parts = M.corp_brier_decomposition(p, hit, weights=w)
    best, base = (
        sk.brier_score_loss(hit, q, sample_weight=w) for q in (fitted, np.full(400, np.average(hit, weights=w)))
    )
    near(parts.miscalibration, sk.brier_score_loss(hit, p, sample_weight=w) - best)
    near(parts.discrimination, base - best)
    rate, promised = calibration_curve(hit.numpy(), p.numpy(), n_bins=10)
    share = np.histogram(p, bins=np.arange(11) / 10)[0] / 400
    near(M.binary_calibration_error(p, hit, num_bins=10), np.sum(share * np.abs(rate - promised)))
    near(M.binary_calibration_error(p, hit, num_bins=10, norm="max"), np.max(np.abs(rate - promised)))


def test_sklearn_quantiles_with_weights() -> None:
    mean, scale, truth = real()
    w, levels = weights(300), [0.05, 0.25, 0.5, 0.75, 0.95]
    quantiles = torch.stack([Predictive.from_normal(mean, scale).icdf(t) for t in levels])
    losses = [sk.mean_pinball_loss(truth, q, alpha=t, sample_weight=w) for q, t in zip(quantiles, levels, strict=True)]
    near(M.weighted_interval_score(quantiles, truth, levels, weights=w), 2 * math.fsum(losses) / 5)
    # Width and misses of an interval are the pinball losses of its ends, times 2 / alpha.
    near(M.interval_score(quantiles[0], quantiles[-1], truth, 0.1, weights=w), 20 * (losses[0] + losses[-1]))


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_torchmetrics_calibration_errors(norm: Any) -> None:
    other = pytest.importorskip("torchmetrics.functional.classification")
    probs, y = classes()  # no confidence lies on an edge, where the two differ
    near(
        M.expected_calibration_error(probs, y, norm=norm),
        other.multiclass_calibration_error(probs, y, num_classes=4, n_bins=15, norm=norm),
        1e-6,  # sums in float32
    )
    p, hit = yes_or_no()
    # That of yes or no is of P(y = 1) there too.
    near(
        M.binary_calibration_error(p, hit, norm=norm),
        other.binary_calibration_error(p, hit, n_bins=15, norm=norm),
        1e-6,
    )


def test_torchmetrics_crps() -> None:
    other = pytest.importorskip("torchmetrics.regression")
    if not hasattr(other, "ContinuousRankedProbabilityScore"):
        pytest.skip("an older torchmetrics")
    mean, scale, truth = real(50)
    samples = Predictive.from_normal(mean, scale).sample(30, seed=0)
    metric = other.ContinuousRankedProbabilityScore()
    near(M.crps_decomposition(samples, truth).score, metric(samples.t(), truth), 1e-6)


def test_netcal() -> None:
    other = pytest.importorskip("netcal.metrics")
    probs, y = classes()
    near(M.expected_calibration_error(probs, y), other.ECE(15).measure(probs.numpy(), y.numpy()), 1e-9)
    near(M.expected_calibration_error(probs, y, norm="max"), other.MCE(15).measure(probs.numpy(), y.numpy()), 1e-9)


def test_scoringrules() -> None:
    other = pytest.importorskip("scoringrules")
    mean, scale, truth = (values.numpy() for values in real())
    ours = M.continuous_ranked_probability_score(Predictive.from_normal(mean, scale), truth)
    near(ours, other.crps_normal(truth, mean, scale).mean())
    low, high = mean - 1, mean + 1
    near(M.interval_score(low, high, truth, 0.1), other.interval_score(truth, low, high, 0.1).mean())


def test_relplot() -> None:
    other = pytest.importorskip("relplot")
    p, hit = yes_or_no()
    # It rounds probabilities to a grid.
    near(M.binary_smooth_calibration_error(p, hit), other.smECE(p.numpy(), hit.numpy()), 2e-3)


def test_mapie() -> None:
    other = pytest.importorskip("mapie.metrics.classification")
    probs, y = classes()
    sets = Predictive.from_probs(probs).prediction_set(0.2)
    coverage = other.classification_coverage_score(y.numpy(), sets.numpy()[..., np.newaxis])
    near(M.set_coverage(sets, y), np.ravel(coverage)[0])
    width = other.classification_mean_width_score(sets.numpy()[..., np.newaxis])
    near(M.set_size(sets), np.ravel(width)[0])


def test_uncertainty_toolbox() -> None:
    other = pytest.importorskip("uncertainty_toolbox")
    mean, scale, truth = (values.numpy() for values in real())
    pred = Predictive.from_normal(mean, scale)
    near(M.continuous_ranked_probability_score(pred, truth), other.crps_gaussian(mean, scale, truth))
    near(M.negative_log_likelihood(pred, truth), other.nll_gaussian(mean, scale, truth))
