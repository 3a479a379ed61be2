"""Spline calibration, against SciPy in float64 and against maps that are known."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize
from torch import Tensor, nn

from bayesguard.calibration import PlattScaling, SplineCalibration
from bayesguard.calibration.spline import (
    _PENALTIES,
    _best_values,
    _knots,
    least_slope,
    penalised_fit,
    penalty_root,
    spline,
)
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive

KNOTS = torch.tensor([-2.0, -1.1, 0.3, 0.9, 2.5], dtype=torch.float64)


def wavy(odds: Tensor) -> Tensor:
    """An increasing map that no line is near to."""
    return 0.6 * odds + 0.9 * torch.tanh(2 * odds - 1)


def answers(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-odds, answers, and the true probabilities."""
    generator = torch.Generator().manual_seed(seed)
    odds = 1.5 * torch.randn(count, generator=generator, dtype=torch.float64)
    truth = wavy(odds).sigmoid()
    return odds, truth.bernoulli(generator=generator).long(), truth


# -- the spline


@pytest.mark.parametrize("number", [2, 3, 5])
def test_it_is_scipys_natural_spline_and_a_line_outside(number: int) -> None:
    knots = KNOTS[:number]
    values = torch.randn(number, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    reference = CubicSpline(knots, values, bc_type="natural" if number > 2 else "not-a-knot")
    places = torch.linspace(-2, float(knots[-1]), 301, dtype=torch.float64)
    np.testing.assert_allclose(spline(knots, values, places), reference(places.numpy()), atol=1e-12)
    low, high = float(knots[0]), float(knots[-1])
    outside = torch.tensor([low - 3, low - 0.5, high + 0.5, high + 3], dtype=torch.float64)
    ends = np.array([low, low, high, high])
    wanted = reference(ends) + (outside.numpy() - ends) * reference(ends, 1)
    np.testing.assert_allclose(spline(knots, values, outside), wanted, atol=1e-12)


def test_the_penalty_is_the_integral_and_the_least_slope_the_least() -> None:
    for seed in range(20):
        values = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        reference = CubicSpline(KNOTS, values, bc_type="natural")
        pieces = zip(KNOTS[:-1].tolist(), KNOTS[1:].tolist(), strict=True)
        wanted = sum(quad(lambda z, f=reference: f(z, 2) ** 2, low, high)[0] for low, high in pieces)
        assert float((penalty_root(KNOTS) @ values).square().sum()) == pytest.approx(wanted, rel=1e-9)
        fine = reference(np.linspace(-2, 2.5, 200_001), 1).min()
        # The grid misses the least by at most half a step squared times the largest second derivative of the slope.
        assert fine - 1e-7 <= least_slope(KNOTS, values) <= fine + 1e-12


@pytest.mark.parametrize("penalty", [1e-5, 1e-2, 1.0])
def test_the_fit_is_scipys_minimum(penalty: float) -> None:
    odds, targets, _ = answers(300, 0)
    knots = _knots(odds, 6)
    hits = targets.double()
    eye = torch.eye(6, dtype=torch.float64)
    design = torch.stack([spline(knots, row, odds) for row in eye], -1)
    root = penalty**0.5 * penalty_root(knots) * (knots[-1] - knots[0]) ** 1.5
    found, criterion = penalised_fit(design, hits, root, knots, knots)

    def objective(g: np.ndarray) -> float:
        reference = CubicSpline(knots, g, bc_type="natural")
        low, high = knots[0].item(), knots[-1].item()
        z = odds.numpy()
        inside = reference(np.clip(z, low, high))
        f = inside + np.minimum(z - low, 0) * reference(low, 1) + np.maximum(z - high, 0) * reference(high, 1)
        nll = np.mean(np.logaddexp(0, np.where(targets.numpy() == 1, -f, f)))
        away = g - knots.numpy()
        return float(nll + ((root.numpy() @ g) ** 2).sum() / 2 + (away**2).mean() / 300 / 2)

    best = minimize(objective, knots.numpy(), method="BFGS", options={"gtol": 1e-9})
    assert objective(found.numpy()) <= best.fun + 1e-10
    np.testing.assert_allclose(found, best.x, atol=2e-3)
    assert criterion > objective(found.numpy()) - float((root @ found).square().sum())


def test_without_bending_it_is_platt_scaling() -> None:
    """Both minimise one likelihood; the penalty of one example moves a coefficient by at most its pull over M."""
    generator = torch.Generator().manual_seed(0)
    odds = 2 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    targets = (0.5 * odds - 0.3).sigmoid().bernoulli(generator=generator).long()
    pred = Predictive.from_logits(odds)
    fitted = SplineCalibration().fit(pred, targets)
    platt = PlattScaling().fit(pred, targets)(pred)
    assert (fitted(pred).probs - platt.probs).abs().max() < 0.03
    knots = _knots(odds, 10)
    design = torch.stack([spline(knots, row, odds) for row in torch.eye(10, dtype=torch.float64)], -1)
    straight = 1e3 * penalty_root(knots)
    line, _ = penalised_fit(design, targets.double(), straight, knots, knots)
    torch.testing.assert_close(spline(knots, line, odds).sigmoid(), platt.probs, atol=1e-4, rtol=0)


# -- against a map that is known


def gaps(probs: Tensor, truth: Tensor) -> Tensor:
    """Gaps of tenths to the mean of the true probabilities, in the standard error of the fit to as many answers."""
    rows = torch.stack(probs.argsort().chunk(10))
    mean = truth[rows].mean(-1)
    return (mean - probs[rows].mean(-1)).abs() / (mean * (1 - mean) / rows.shape[1]).sqrt()


def test_a_known_map_is_recovered_and_was_not_there() -> None:
    odds, targets, _ = answers(20_000, 0)
    fitted = SplineCalibration().fit(Predictive.from_logits(odds), targets)
    new, _, truth = answers(20_000, 1)
    assert gaps(fitted(Predictive.from_logits(new)).probs, truth).max() < 5
    assert gaps(new.sigmoid(), truth).max() > 15
    platt = PlattScaling().fit(Predictive.from_logits(odds), targets)
    assert gaps(platt(Predictive.from_logits(new)).probs, truth).max() > 7  # the twin: a line is not enough


def test_it_increases_where_the_best_bend_would_not() -> None:
    fell = 0
    for seed in range(20):
        odds, targets, _ = answers(60, seed)
        fitted = SplineCalibration().fit(Predictive.from_logits(odds), targets)
        assert least_slope(fitted.points[0], fitted.values[0]) >= 0
        probs = fitted(Predictive.from_logits(torch.linspace(-30, 30, 5001, dtype=torch.float64))).probs
        assert (probs.diff() >= 0).all()
        knots = _knots(odds, 10)
        design = torch.stack([spline(knots, row, odds) for row in torch.eye(10, dtype=torch.float64)], -1)
        loose = _PENALTIES[-1] ** 0.5 * penalty_root(knots) * (knots[-1] - knots[0]) ** 1.5
        fell += least_slope(knots, penalised_fit(design, targets.double(), loose, knots, knots)[0]) < 0
    assert fell > 10  # the twin: without the check it falls


def test_answers_against_the_probabilities_give_their_rate() -> None:
    odds, targets, _ = answers(500, 0)
    pred = Predictive.from_logits(-odds)
    with pytest.warns(CalibrationWarning, match="lower where the answers are true"):
        probs = SplineCalibration().fit(pred, targets)(pred).probs
    rate = (float(targets.sum()) + 0.5) / 501
    torch.testing.assert_close(probs, torch.full_like(probs, (500 * rate + 0.5) / 501))


# -- what the answer is


def classes(count: int = 300, draws: int = 3) -> tuple[CategoricalPredictive, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    targets = (logits / 2).softmax(-1).multinomial(1, generator=generator).squeeze(-1)
    return CategoricalPredictive(logits + torch.randn(draws, count, 4, generator=generator)), targets


def test_kept_labels_and_ratios() -> None:
    pred, targets = classes()
    found = SplineCalibration(keep_labels=True).fit(pred, targets)(pred)
    assert torch.equal(found.labels, pred.labels)
    rows = torch.arange(300)
    before, after = pred.probs.clone(), found.probs.clone()
    before[rows, pred.labels] = after[rows, pred.labels] = 0
    torch.testing.assert_close(after / after.sum(-1, keepdim=True), before / before.sum(-1, keepdim=True))
    assert found.uncertainty().epistemic.abs().max() == 0


def test_classes_are_one_against_the_rest() -> None:
    pred, targets = classes()
    found = SplineCalibration().fit(pred, targets)(pred).probs
    each = []
    for k in range(4):
        alone = Predictive.from_probs(pred.probs[:, k])
        each.append((301 * SplineCalibration().fit(alone, targets == k)(alone).probs - 0.5 + 0.25) / 301)
    columns = torch.stack(each, -1)
    torch.testing.assert_close(found, columns / columns.sum(-1, keepdim=True), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [False, True])
def test_sure_predictions_are_told_apart_and_never_sure_again(dtype: torch.dtype, keep: bool) -> None:
    """Traps 24 and 25: probabilities that round to 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    odds = 40 * torch.randn(2000, generator=generator, dtype=torch.float64)
    targets = (odds / 10).sigmoid().bernoulli(generator=generator).long()
    logits = torch.stack([-odds / 2, odds / 2], -1).to(dtype)
    for pred in (Predictive.from_logits(logits), Predictive.from_logits(odds.to(dtype))):
        found = SplineCalibration(keep_labels=keep).fit(pred, targets)(pred)
        assert (found.probs > 0).all()
        assert (found.probs < 1).all()
        assert found.log_prob(targets).isfinite().all()
        assert found.probs.unique().numel() > 500  # float32 probabilities above 1 - 2^-24 are one number
        assert found.log_prob(targets).mean() > pred.log_prob(targets).mean()


def test_separable_one_sided_and_constant_answers() -> None:
    odds = torch.linspace(-2, 2, 40)
    pred = Predictive.from_logits(odds)
    separable = SplineCalibration().fit(pred, (odds > 0).long())(pred)
    assert ((separable.probs > 0) & (separable.probs < 1)).all()
    with pytest.warns(CalibrationWarning, match="one outcome only"):
        sure = SplineCalibration().fit(pred, torch.ones(40).long())(pred)
    assert (sure.probs > 0.7).all()
    same = Predictive.from_logits(torch.full((40,), 0.3))
    fitted = SplineCalibration().fit(same, (torch.arange(40) % 4 == 0).long())
    # A quarter, held towards its 57 % by one example, and one example of one half.
    assert float(fitted(same).probs[0]) == pytest.approx(0.25, abs=0.03)
    outlier = SplineCalibration(2).fit(Predictive.from_logits([0.1] * 39 + [5.0]), [0, 1] * 20)
    assert outlier(pred).probs.isfinite().all()


@pytest.mark.parametrize("keep", [False, True])
def test_state_order_of_rows_and_labels_of_their_own(keep: bool) -> None:
    pred, targets = classes()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    fitted = nn.ModuleList([SplineCalibration(keep_labels=keep).fit(pred, targets)])
    fresh = nn.ModuleList([SplineCalibration(keep_labels=keep)])
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh[0](pred).probs, fitted[0](pred).probs)
    again = SplineCalibration(keep_labels=keep).fit(pred[order], targets[order])
    torch.testing.assert_close(again(pred).probs, fitted[0](pred).probs)
    assert len(fitted[0](pred[:0])) == 0
    odds = torch.stack([answers(200, seed)[0] for seed in (0, 1)], -1)
    both = torch.stack([answers(200, seed)[1] for seed in (0, 1)], -1)
    labels = BernoulliPredictive(odds[None])
    found = SplineCalibration(keep_labels=keep).fit(labels, both)(labels).probs
    alone = Predictive.from_logits(odds[:, 1])
    torch.testing.assert_close(found[:, 1], SplineCalibration(keep_labels=keep).fit(alone, both[:, 1])(alone).probs)


def test_inputs_that_will_not_do() -> None:
    pred, targets = classes()
    with pytest.raises(NotFitted):
        SplineCalibration()(pred)
    with pytest.raises(BadInput, match="num_knots must be at least 2"):
        SplineCalibration(1)
    with pytest.raises(BadInput, match="targets has shape"):
        SplineCalibration().fit(pred, targets[:-1])
    with pytest.raises(BadType, match="for classification"):
        SplineCalibration().fit(Predictive.from_normal(torch.zeros(3), 1.0), torch.zeros(3))
    with pytest.raises(BadInput, match="has 5 classes, but"):
        SplineCalibration().fit(pred, targets)(Predictive.from_logits(torch.zeros(2, 5)))
    assert _best_values(KNOTS, KNOTS, torch.tensor([0.0, 0, 1, 0, 1]).double()).shape == (5,)
