"""Clustered conformal prediction: coverage within each cluster beside a twin that must fail, and what is refused."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.calibration import Conformal
from bayesguard.calibration.clusters import NULL, cluster_classes, clustering_rows
from bayesguard.errors import BadInput, CalibrationWarning

ALPHA = 0.1
CLASSES = 20


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_kinds(rows: int, seed: int) -> tuple[bg.Predictive, Tensor]:
    """Twenty classes alike in frequency; the network knows the first ten, and takes a mass of the others for another."""
    labels = torch.randint(CLASSES, (rows,), generator=generator(seed))
    seen = torch.where(labels < 10, 2.5, 0.5).unsqueeze(-1) * torch.nn.functional.one_hot(labels, CLASSES)
    return bg.Predictive.from_logits(seen + torch.randn(rows, CLASSES, generator=generator(seed + 1))), labels


def test_each_cluster_is_covered() -> None:
    trials, held, new = 60, 1500, 1500
    found: dict[str, list[list[float]]] = {"cluster": [], "all": []}
    within: list[Tensor] = []
    marginal: list[float] = []
    for trial in range(trials):
        pred, labels = two_kinds(held + new, 1000 * trial)
        for by in ("cluster", "all"):
            fitted = Conformal("lac", ALPHA, by=by, seed=trial).fit(pred[:held], labels[:held])
            sets = fitted(pred[held:]).prediction_set()
            covered = sets.gather(-1, labels[held:, None])[:, 0].double()
            found[by].append([covered[(labels[held:] >= 10) == hard].mean().item() for hard in (False, True)])
            if by == "cluster":
                own = fitted.clusters[labels[held:]]
                within += [covered[own == cluster].mean() for cluster in own.unique().tolist()]
                marginal.append(covered.mean().item())
    inside, kinds = torch.stack(within), {by: torch.tensor(values) for by, values in found.items()}
    error = 5 * inside.std() / len(inside) ** 0.5
    # A cluster holds 59 rows for its bound, one class at the least.
    assert 1 - ALPHA - error < inside.mean() < 1 - ALPHA + 1 / 60 + error
    total = torch.tensor(marginal)
    assert 1 - ALPHA - 5 * total.std() / trials**0.5 < total.mean()
    hard = 5 * kinds["cluster"][:, 1].std() / trials**0.5
    assert kinds["cluster"][:, 1].mean() > 1 - ALPHA - hard - 0.01  # a class may be in the cluster of the other kind
    assert kinds["all"][:, 1].mean() < 1 - ALPHA - hard - 0.01
    assert kinds["all"][:, 0].mean() > 1 - ALPHA + hard


def test_too_few_examples_for_clusters_and_bounds() -> None:
    pred = bg.Predictive.from_logits(torch.randn(5, 1000, generator=generator(0)))
    with pytest.raises(BadInput, match="pred has 5 examples, too few to tell the clusters of 1000 classes"):
        Conformal(by="cluster").fit(pred, torch.arange(5))


def test_classes_that_are_alike_are_put_together() -> None:
    """Scores of three kinds, far apart, with 20 rows a class: k-means has to find the kinds."""
    kinds = torch.arange(30) % 3
    labels = torch.arange(30).repeat_interleave(20)
    scores = kinds[labels].double() + 0.1 * torch.rand(600, generator=generator(0)).double()
    clusters = cluster_classes(scores, labels, 32, ALPHA, seed=0)
    assert clusters[30:].tolist() == [NULL, NULL]
    for cluster in clusters[:30].unique():
        assert len(kinds[clusters[:30] == cluster].unique()) == 1
    assert torch.equal(clusters, cluster_classes(scores, labels, 32, ALPHA, seed=0))
    few = cluster_classes(scores[labels < 3], labels[labels < 3], 3, ALPHA, seed=0)
    assert few.unique().tolist() == [0, 1]  # fewer than the classes


def test_descriptions_are_quantiles() -> None:
    """Two classes of one kind are told from a third by their quantiles alone, wherever their extremes are."""
    base = torch.linspace(0, 1, 40, dtype=torch.float64)
    scores = torch.cat([base, base + 1e-3, base / 4])
    scores[0] = -100.0
    labels = torch.arange(3).repeat_interleave(40)
    clusters = cluster_classes(scores, labels, 3, ALPHA, seed=1)
    assert clusters[0] == clusters[1] != clusters[2]


def test_rows_that_tell_the_clusters_do_not_give_the_bounds() -> None:
    pred, labels = two_kinds(1000, 5)
    fitted = Conformal("lac", ALPHA, by="cluster").fit(pred, labels)
    spent = clustering_rows(1000, CLASSES, 0)
    assert spent.sum() == round(1000 * 20 / 95) == fitted.diagnostics["num_clustering_examples"]
    kept = Conformal("lac", ALPHA).fit(pred[~spent], labels[~spent])
    assert torch.equal(fitted.scores.sort().values, kept.scores)
    assert fitted.diagnostics["num_examples"] == 1000 - int(spent.sum())


def test_rare_classes_have_the_bound_of_all() -> None:
    pred, labels = two_kinds(4000, 7)
    rows = (labels != 3) | (torch.arange(4000) < 60)
    fitted = Conformal("lac", ALPHA, by="cluster").fit(pred[rows], labels[rows])
    assert fitted.diagnostics["num_rare_classes"] == 1
    assert fitted.clusters[3] == NULL
    everything = Conformal("lac", ALPHA).fit(pred[rows][~clustering_rows(int(rows.sum()), 20, 0)], _kept(labels[rows]))
    new, _ = two_kinds(200, 8)
    assert torch.equal(fitted(new).prediction_set()[:, 3], everything(new).prediction_set()[:, 3])
    with pytest.warns(CalibrationWarning, match="none of 20 classes has the 9 examples"):
        few = Conformal("lac", ALPHA, by="cluster").fit(pred[:100], labels[:100])
    all_rows = Conformal("lac", ALPHA).fit(pred[:100][~clustering_rows(100, 20, 0)], _kept(labels[:100]))
    assert torch.equal(few(new).prediction_set(), all_rows(new).prediction_set())


def _kept(labels: Tensor) -> Tensor:
    return labels[~clustering_rows(len(labels), CLASSES, 0)]


def test_states_and_weights() -> None:
    pred, labels = two_kinds(1500, 9)
    fitted = Conformal("aps", ALPHA, by="cluster").fit(pred, labels)
    loaded = Conformal("aps", ALPHA, by="cluster")
    loaded.load_state_dict(fitted.state_dict())
    sets = fitted(pred).prediction_set()
    assert torch.equal(loaded(pred).prediction_set(), sets)
    weighted = Conformal("aps", ALPHA, by="cluster").fit(pred, labels, weights=torch.ones(1500))
    assert torch.equal(weighted(pred, weights=torch.ones(1500)).prediction_set(), sets)


@pytest.mark.parametrize("by", ["all", "class", "cluster"])
def test_p_values_say_in_which_sets_an_answer_is(by: str) -> None:
    pred, labels = two_kinds(1500, 11)
    fitted = Conformal("aps", ALPHA, by=by).fit(pred[:1000], labels[:1000])  # type: ignore[arg-type]
    new, answers = pred[1000:], labels[1000:]
    p = fitted.p_values(new, answers)
    assert p.dtype == torch.float64
    for alpha in (0.1, 0.25, 0.5):
        inside: Tensor = fitted(new).prediction_set(alpha).gather(-1, answers[:, None])[:, 0]
        assert torch.equal(inside, (p > alpha) | (new.labels == answers))
    for low, high in pairwise((0.0, 0.2, 0.4, 0.6)):
        share = ((p > low) & (p <= high)).double().mean()
        assert abs(share - 0.2) < 5 * (0.16 / 500 + 0.16 / 700) ** 0.5
