"""Multicalibration, against loops and SciPy, and where the true probabilities of every group are known."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from bayesguard.calibration import Multicalibration, TemperatureScaling, multicalibration
from bayesguard.calibration.multicalibration import best_step, cells, loss_change, moved
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted
from bayesguard.predictive import BernoulliPredictive, Predictive


def two_groups(count: int = 20_000, seed: int = 0) -> tuple[Predictive, Tensor, Tensor, Tensor]:
    """Calibrated for all; one group's log-odds are one too low, the other's one too high. Answers, groups, truth."""
    generator = torch.Generator().manual_seed(seed)
    odds = 1.5 * torch.randn(count, generator=generator, dtype=torch.float64)
    first = torch.rand(count, generator=generator) < 0.5
    above, below = (odds + 1).sigmoid(), (odds - 1).sigmoid()
    truth = torch.where(first, above, below)
    targets = truth.bernoulli(generator=generator).long()
    return Predictive.from_probs((above + below) / 2), targets, torch.stack([first, ~first], -1), truth


def overlapping(count: int = 20_000, seed: int = 0) -> tuple[Predictive, Tensor, Tensor, Tensor]:
    """Three classes and three groups that overlap, each of which makes one class likelier than is predicted."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    groups = torch.rand(count, 3, generator=generator) < torch.tensor([0.5, 0.3, 0.2])
    truth = (logits + groups.double() @ torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, -1.0, 0.5]]).double()).softmax(-1)
    return Predictive.from_logits(logits), truth.multinomial(1, generator=generator)[:, 0], groups, truth


def excess(probs: Tensor, groups: Tensor, truth: Tensor, fitted_to: int = 20_000) -> float:
    """The worst group's and class's true mean residual beyond the tolerance, in the standard error of the fit's."""
    worst = 0.0
    for column in groups.T:
        residual, noise = (truth - probs)[column].mean(0).abs(), (truth * (1 - truth))[column].mean(0)
        share = float(column.double().mean())
        worst = max(worst, float(((residual - 0.01) / (noise / (fitted_to * share)).sqrt()).max()))
    return worst


# -- the pieces, by brute force


def test_the_best_step_is_scipys_minimum_and_the_change_of_the_loss_that_of_a_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (50,), generator=generator)

    def loss(step: float) -> float:
        shifted = logits + torch.tensor([0.0, step, 0.0], dtype=torch.float64)
        return float(nn.functional.cross_entropy(shifted, labels, reduction="sum"))

    probs, hits = logits.softmax(-1)[:, 1], labels == 1
    best = minimize_scalar(lambda step: loss(step) + step**2 / 2, bounds=(-5, 5), method="bounded")
    assert best_step(probs, hits) == pytest.approx(best.x, abs=1e-4)
    assert loss_change(probs, hits, 0.7) == pytest.approx(loss(0.7) - loss(0.0), rel=1e-12)
    wanted = (logits + torch.tensor([0.0, 0.7, 0.0], dtype=torch.float64)).log_softmax(-1)
    torch.testing.assert_close(moved(logits.log_softmax(-1), 1, 0.7), wanted)
    assert best_step(torch.full((5,), 0.5).double(), torch.ones(5).bool()) < 5  # the prior: no infinite step


def test_cells_are_sums_over_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(60, 3, generator=generator, dtype=torch.float64).softmax(-1)
    labels = torch.randint(3, (60,), generator=generator)
    members = torch.rand(60, 2, generator=generator) < 0.5
    found = cells(probs.log(), labels, members, 4)
    for k in range(3):
        for b in range(5):
            for g in range(2):
                inside = [
                    i for i in range(60) if members[i, g] and (b == 4 or b / 4 < float(probs[i, k]) <= (b + 1) / 4)
                ]
                residual = sum(float(labels[i] == k) - float(probs[i, k]) for i in inside)
                assert float(found.size[k, b, g]) == len(inside)
                assert float(found.residual[k, b, g]) == pytest.approx(residual, abs=1e-12)
                variance = sum(float(probs[i, k] * (1 - probs[i, k])) for i in inside)
                assert float(found.variance[k, b, g]) == pytest.approx(variance, abs=1e-12)


def test_one_patch_takes_the_unlikeliest_cell() -> None:
    pred, targets, groups, _ = two_groups(2000)
    with pytest.warns(CalibrationWarning, match="cells left after 1 patches"):
        fitted = Multicalibration(max_patches=1).fit(pred, targets, groups=groups)
    group, label, bin_ = fitted.patches[0].tolist()
    assert (label, bin_) == (1, 10)
    rows = groups[:, group - 1]
    probs = fitted(pred, groups=groups).probs
    step = best_step(pred.probs[rows], targets[rows] == 1)
    torch.testing.assert_close(probs[rows], (pred.probs[rows].logit() + step).sigmoid())
    assert torch.equal(probs[~rows], pred.probs[~rows]) or torch.allclose(probs[~rows], pred.probs[~rows], rtol=1e-14)


# -- against the truth


def test_groups_become_calibrated_where_a_temperature_cannot_help() -> None:
    pred, targets, groups, _ = two_groups()
    fitted = Multicalibration().fit(pred, targets, groups=groups)
    new, _, new_groups, truth = two_groups(seed=1)
    everybody = torch.ones(20_000, 1).bool()
    assert excess(new.probs, everybody, truth) < 5  # calibrated for all
    assert excess(fitted(new, groups=new_groups).probs, new_groups, truth) < 5
    scaled = TemperatureScaling().fit(pred, targets)(new).probs
    assert excess(scaled, new_groups, truth) > 20
    # Tenths of each group, too: the noise is that of a cell's examples, and what is left has less than its price.
    for column in new_groups.T:
        probs, own = fitted(new, groups=new_groups).probs[column], truth[column]
        for rows in probs.argsort().chunk(10):
            noise = (own[rows] * (1 - own[rows])).mean() / len(rows)
            assert (own[rows] - probs[rows]).mean().abs() < 0.01 + 5 * noise.sqrt()


def test_overlapping_groups_and_several_classes() -> None:
    pred, targets, groups, _ = overlapping()
    fitted = Multicalibration().fit(pred, targets, groups=groups)
    new, _, new_groups, truth = overlapping(seed=1)
    found = fitted(new, groups=new_groups)
    assert excess(found.probs, new_groups, truth) < 5
    assert excess(new.probs, new_groups, truth) > 20
    assert excess(TemperatureScaling().fit(pred, targets)(new).probs, new_groups, truth) > 20
    torch.testing.assert_close(found.probs.sum(-1), torch.ones(20_000).double())
    assert fitted.diagnostics["nll_after"] < fitted.diagnostics["nll_before"]


def test_held_out_examples_keep_noise_from_being_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated predictions, twenty groups that mean nothing: at most one patch is expected, and hardly any is made."""

    def fitted(seed: int) -> tuple[float, int]:
        generator = torch.Generator().manual_seed(seed)
        truth = torch.randn(1000, generator=generator, dtype=torch.float64).sigmoid()
        pred, groups = Predictive.from_probs(truth), torch.rand(1000, 20, generator=generator) < 0.3
        targets = truth.bernoulli(generator=generator).long()
        found = Multicalibration(max_patches=100).fit(pred, targets, groups=groups)
        q = found(pred, groups=groups).probs
        divergence = truth * (truth / q).log() + (1 - truth) * ((1 - truth) / (1 - q)).log()
        return float(divergence.mean()), found.diagnostics["num_patches"]

    careful = [fitted(seed) for seed in range(10)]
    patches = np.array([count for _, count in careful])
    assert patches.mean() < 1 + 5 * math.sqrt(1 / 10)  # as a count with mean one would be
    monkeypatch.setattr(multicalibration, "_NEEDLESS", 1e300)
    with pytest.warns(CalibrationWarning, match="cells left"):
        greedy, count = fitted(0)
    assert count == 100
    assert np.mean([lost for lost, _ in careful]) < greedy / 10


# -- what it is


@pytest.mark.parametrize("seed", range(5))
def test_the_likelihood_never_gets_worse(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(150, 4, generator=generator)
    targets = torch.randint(4, (150,), generator=generator)
    groups = torch.rand(150, 5, generator=generator) < 0.5
    pred = Predictive.from_logits(logits)
    fitted = Multicalibration(min_cell=1, tolerance=1e-6, seed=seed).fit(pred, targets, groups=groups)
    after = fitted(pred, groups=groups)
    assert after.log_prob(targets).mean() >= pred.log_prob(targets).mean() - 1e-6
    assert float(-after.log_prob(targets).double().mean()) == pytest.approx(fitted.diagnostics["nll_after"], abs=1e-5)
    assert after.dtype == torch.float32
    assert (after.standard_error == 0).all() == pred.exact


def test_yes_or_no_is_two_classes() -> None:
    pred, targets, groups, _ = two_groups(4000)
    both = Predictive.from_probs(torch.stack([1 - pred.probs, pred.probs], -1))
    first = Multicalibration().fit(pred, targets.bool(), groups=groups)(pred, groups=groups)
    second = Multicalibration().fit(both, targets, groups=groups)(both, groups=groups)
    assert isinstance(first, BernoulliPredictive)
    torch.testing.assert_close(first.probs, second.probs[:, 1])


def test_state_and_order_of_rows() -> None:
    pred, targets, groups, _ = overlapping(3000)
    fitted = nn.ModuleList([Multicalibration().fit(pred, targets, groups=groups)])
    fresh = nn.ModuleList([Multicalibration()])
    fresh.load_state_dict(fitted.state_dict())
    found = fresh[0](pred, groups=groups).probs
    assert torch.equal(found, fitted[0](pred, groups=groups).probs)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fresh[0](pred[order], groups=groups[order]).probs, found[order])
    assert len(fresh[0](pred[:0], groups=groups[:0])) == 0
    assert "patches" in repr(fresh)


def test_impossible_targets_and_inputs_that_will_not_do() -> None:
    pred, targets, groups, _ = two_groups(200)
    fitted = Multicalibration().fit(pred, targets, groups=groups)
    with pytest.raises(NotFitted):
        Multicalibration()(pred, groups=groups)
    with pytest.raises(BadInput, match="groups= is needed"):
        fitted(pred)
    with pytest.raises(BadInput, match="groups= is needed"):
        Multicalibration().fit(pred, targets)
    with pytest.raises(BadType, match="one_hot"):
        Multicalibration().fit(pred, targets, groups=groups.long())
    with pytest.raises(BadInput, match="groups has shape"):
        fitted(pred, groups=groups[:-1])
    with pytest.raises(BadInput, match="groups has 1 columns, fit saw 2"):
        fitted(pred, groups=groups[:, :1])
    with pytest.raises(BadInput, match="3 classes, fit saw 2"):
        fitted(Predictive.from_logits(torch.zeros(200, 3)), groups=groups)
    with pytest.raises(BadInput, match="0 or 1 everywhere, row 0 is not"):
        Multicalibration().fit(pred, targets.index_fill(0, torch.tensor(0), 2), groups=groups)
    with pytest.raises(BadType, match="Multicalibration is for one class"):
        Multicalibration().fit(Predictive.from_normal(torch.zeros(200), 1.0), targets, groups=groups)
    with pytest.raises(BadInput, match="tolerance"):
        Multicalibration(tolerance=0.0)
    masked = Predictive.from_logits(torch.tensor([[0.0, -torch.inf]]).repeat(100, 1).index_fill(0, torch.arange(50), 0))
    with pytest.warns(CalibrationWarning, match="1 of 100 targets have probability zero"):
        found = Multicalibration().fit(masked, [1, 0] * 25 + [0] * 49 + [1], groups=torch.ones(100, 1).bool())
    assert found.diagnostics["num_excluded"] == 1
    assert np.isfinite(found.diagnostics["nll_after"])
