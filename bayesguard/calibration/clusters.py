"""Clusters of classes whose scores are alike: coverage nearly by class where classes are too many for their own bounds.

T. Ding, A. N. Angelopoulos, S. Bates, M. I. Jordan, R. J. Tibshirani (2023). Class-conditional conformal prediction with
many classes. NeurIPS.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bayesguard.calibration.ranks import conformal_rank, enough_for
from bayesguard.errors import CalibrationWarning
from bayesguard.sampling import derive_seed, stream

NULL = -1  # the cluster of classes that are too rare to be told by their scores
_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5)


def clustering_rows(count: int, num_classes: int, seed: int) -> Tensor:
    """Return which of `count` held-out rows tell the clusters, bool `[count]`; the others give the bounds.

    A random share of `K / (75 + K)` for K classes (section 3.1 of the paper), a function of K alone, so that the rows
    that are left stay exchangeable with new ones.
    """
    share = num_classes / (75 + num_classes)
    order = torch.randperm(count, generator=stream("cpu", seed, "clustering"))
    return order < round(share * count)


def cluster_classes(scores: Tensor, labels: Tensor, num_classes: int, alpha: float, seed: int) -> Tensor:
    """Return the cluster of each class, int64 `[K]`, `NULL` for rare ones.

    A class is described by quantiles of its scores, at 0.5, 0.6, 0.7, 0.8, 0.9 and `1 - alpha`; those descriptions are
    clustered by k-means, each with the weight of the square root of its number of rows. There are half as many clusters
    as the rarest class that is not too rare has rows. A class with fewer rows than a bound at `alpha` needs is rare.

    Args:
        scores: Of the answers `[n]`, float64.
        labels: The answers `[n]`.
        num_classes: K.
        alpha: Mis-coverage.
        seed: Of the starts of k-means.
    """
    from sklearn.cluster import KMeans

    counts = labels.bincount(minlength=num_classes)
    usual = (counts >= enough_for(alpha)).nonzero().squeeze(-1).tolist()
    clusters = torch.full((num_classes,), NULL, dtype=torch.long, device=labels.device)
    if not usual:
        return clusters
    described = torch.stack([_describe(scores[labels == label], alpha) for label in usual]).cpu()
    number = min(int(counts[usual].min()) // 2, len(usual) - 1, len(described.unique(dim=0)))
    if number <= 1:
        clusters[usual] = 0
        return clusters
    kmeans = KMeans(number, n_init=10, random_state=derive_seed(seed, "k-means") % 2**32)
    found = kmeans.fit_predict(described.numpy(), sample_weight=counts[usual].double().sqrt().cpu().numpy())
    clusters[usual] = torch.as_tensor(found, dtype=torch.long, device=labels.device)
    return clusters


def warn_all_rare(count: int, num_classes: int, alpha: float) -> None:
    """Warn that there is no cluster, and sets are those of all examples together."""
    warnings.warn(
        f"none of {num_classes} classes has the {enough_for(alpha)} examples that a cluster at alpha={alpha} needs, among "
        f"the {count} that tell the clusters; sets are as with by='all'",
        CalibrationWarning,
        stacklevel=5,
    )


def _describe(scores: Tensor, alpha: float) -> Tensor:
    ordered = scores.sort().values
    ranks = [min(conformal_rank(len(scores), level), len(scores)) for level in (*_LEVELS, alpha)]
    return ordered[[rank - 1 for rank in ranks]]
