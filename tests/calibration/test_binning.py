"""Histogram binning and isotonic calibration, against loops in float64 and against a map that is known."""

import math
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from bayesguard.calibration.binning import HistogramBinning, IsotonicCalibration
from bayesguard.calibration.class_maps import ClassMaps
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive

Floats = npt.NDArray[np.float64]
MAKE: list[Callable[..., ClassMaps]] = [
    HistogramBinning,
    lambda **settings: HistogramBinning(binning="width", **settings),
    IsotonicCalibration,
]
NAMES = ["mass", "width", "isotonic"]


def classes(count: int = 300, number: int = 4, draws: int = 3, seed: int = 0) -> tuple[CategoricalPredictive, Tensor]:
    """Over-confident draws, and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, number, generator=generator, dtype=torch.float64)
    targets = (logits / 2).softmax(-1).multinomial(1, generator=generator).squeeze(-1)
    return CategoricalPredictive(logits + torch.randn(draws, count, number, generator=generator)), targets


def answers(count: int, seed: int, labels: int | None = None, sharper: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-odds that are `sharper` times too large, the answers, and the true probabilities."""
    generator = torch.Generator().manual_seed(seed)
    odds = 1.5 * torch.randn((count,) if labels is None else (count, labels), generator=generator, dtype=torch.float64)
    truth = odds.sigmoid()
    return sharper * odds, truth.bernoulli(generator=generator).long(), truth


# -- against loops


def binned_by_hand(scores: Floats, hits: Floats, num_bins: int, new: Floats, uniform: float) -> Floats:
    """Equal width: the value of the bin of every new score, straight from the docstring."""
    values = np.empty_like(new)
    for place, score in enumerate(new):
        bin_ = max(math.ceil(score * num_bins) - 1, 0)
        inside = np.maximum(np.ceil(scores * num_bins) - 1, 0) == bin_
        prediction = scores[inside].mean() if inside.any() else (bin_ + 0.5) / num_bins
        value = (hits[inside].sum() + prediction) / (inside.sum() + 1)
        values[place] = (len(scores) * value + uniform) / (len(scores) + 1)
    return values


def isotonic_by_hand(scores: Floats, hits: Floats) -> Floats:
    """The min-max formula of isotonic regression: no blocks are pooled; equal scores are one group."""
    distinct, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    sums = np.bincount(group, hits)

    def mean(a: int, b: int) -> float:
        return float(sums[a : b + 1].sum() / sizes[a : b + 1].sum())

    number = len(distinct)
    fitted = [max(min(mean(a, b) for b in range(i, number)) for a in range(i + 1)) for i in range(number)]
    return np.array(fitted)[group]


def test_equal_width_is_a_loop() -> None:
    odds, targets, _ = answers(400, 0)
    pred = Predictive.from_logits(odds)
    new = Predictive.from_logits(answers(100, 1)[0])
    found = HistogramBinning(12, "width").fit(pred, targets)(new).probs.numpy()
    wanted = binned_by_hand(pred.probs.numpy(), targets.numpy().astype(float), 12, new.probs.numpy(), 0.5)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_on_an_edge_close_the_bin_below(dtype: torch.dtype) -> None:
    """Float32 0.3 is above 3/10, and 0.7 below 7/10: both close their bin."""
    probs = torch.arange(1, 10, dtype=dtype) / 10
    binning = HistogramBinning(10, "width").fit(Predictive.from_probs(probs), torch.arange(9) > 0)
    found = binning(Predictive.from_probs(probs)).probs.double()
    hit = torch.arange(9) > 0
    single = (hit + torch.arange(1, 10).double() / 10) / 2  # one example, and the prediction as another
    torch.testing.assert_close(found, (9 * single + 0.5) / 10, rtol=1e-6, atol=0)
    above = binning(Predictive.from_probs(probs + 1e-4)).probs.double()
    torch.testing.assert_close(above[:-1], found[1:])


def test_equal_mass_is_a_loop() -> None:
    odds, targets, _ = answers(103, 0)
    pred = Predictive.from_logits(odds)
    found = HistogramBinning(7).fit(pred, targets)(pred).probs.numpy()
    scores, hits = pred.probs.numpy(), targets.numpy()
    order = np.argsort(scores)
    wanted = np.empty(103)
    for bin_ in range(7):
        rows = order[[rank for rank in range(103) if int((rank + 0.5) * 7 / 103) == bin_]]
        value = (hits[rows].sum() + scores[rows].mean()) / (len(rows) + 1)
        wanted[rows] = (103 * value + 0.5) / 104
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_isotonic_is_the_min_max_formula() -> None:
    odds, targets, _ = answers(60, 0)
    pred = Predictive.from_probs(odds.sigmoid().mul(20).round() / 20)  # with ties, and with 0 and 1
    found = IsotonicCalibration().fit(pred, targets)(pred).probs.numpy()
    wanted = isotonic_by_hand(pred.probs.numpy(), targets.numpy().astype(float))
    np.testing.assert_allclose(found, (60 * wanted + 0.5) / 61, atol=1e-12)


def test_isotonic_is_that_of_scikit_learn_at_new_places() -> None:
    from sklearn.isotonic import IsotonicRegression

    odds, targets, _ = answers(500, 0)
    pred, new = Predictive.from_logits(odds), Predictive.from_logits(3 * answers(300, 1)[0])
    found = IsotonicCalibration().fit(pred, targets)(new).probs.numpy()
    reference = IsotonicRegression(out_of_bounds="clip").fit(pred.probs.numpy(), targets.numpy())
    wanted = (500 * reference.predict(new.probs.numpy()) + 0.5) / 501
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_classes_are_one_against_the_rest(make: Callable[..., ClassMaps]) -> None:
    pred, targets = classes()
    found = make().fit(pred, targets)(pred).probs
    each = []
    for k in range(4):
        alone = make().fit(Predictive.from_probs(pred.probs[:, k]), targets == k)(
            Predictive.from_probs(pred.probs[:, k])
        )
        each.append((301 * alone.probs - 0.5 + 0.25) / 301)  # 1/K in place of 1/2
    columns = torch.stack(each, -1)
    torch.testing.assert_close(found, columns / columns.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_every_label_has_its_map(make: Callable[..., ClassMaps], keep: bool) -> None:
    odds, targets, _ = answers(300, 0, labels=3)
    found = make(keep_labels=keep).fit(Predictive.from_logits(odds[..., 0]), targets[:, 0])
    alone = found(Predictive.from_logits(odds[..., 0])).mean
    together = make(keep_labels=keep).fit(BernoulliPredictive(odds[None]), targets)(BernoulliPredictive(odds[None]))
    assert together.batch_shape == (300, 3)
    torch.testing.assert_close(together.mean[:, 0], alone)
    dense = make(keep_labels=keep).fit(BernoulliPredictive(odds.reshape(1, 60, 5, 3)), targets.reshape(60, 5, 3))
    torch.testing.assert_close(
        dense(BernoulliPredictive(odds.reshape(1, 60, 5, 3))).mean.reshape(300, 3), together.mean
    )


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_dense_classes(make: Callable[..., ClassMaps]) -> None:
    pred, targets = classes(draws=1)
    dense = CategoricalPredictive(pred.draw_logits.reshape(1, 30, 5, 2, 4))
    found = make().fit(dense, targets.reshape(30, 5, 2))(dense)
    assert found.batch_shape == (30, 5, 2)
    torch.testing.assert_close(found.probs.reshape(300, 4), make().fit(pred, targets)(pred).probs)


# -- against a map that is known


def gaps(probs: Tensor, targets: Tensor, fitted_to: int) -> Tensor:
    """Gap of ten bins of equal mass, in its standard error under calibration (that of the fit included)."""
    found = []
    for rows in probs.argsort().chunk(10):
        mean = probs[rows].mean()
        share = len(rows) / len(probs)
        variance = mean * (1 - mean) * (1 / len(rows) + 1 / (share * fitted_to))
        found.append((targets[rows].double().mean() - mean) / variance.sqrt())
    return torch.stack(found)


def true_gaps(probs: Tensor, truth: Tensor) -> Tensor:
    """Gap to the mean of the true probabilities, of neighbours: in the standard error of a fit to as many examples."""
    found = []
    for rows in probs.argsort().chunk(10):
        mean = truth[rows].mean()
        found.append((mean - probs[rows].mean()) / (mean * (1 - mean) / len(rows)).sqrt())
    return torch.stack(found)


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_new_answers_are_calibrated_and_were_not(make: Callable[..., ClassMaps]) -> None:
    odds, targets, _ = answers(20_000, 0)
    calibrator = make().fit(Predictive.from_logits(odds), targets)
    new_odds, new_targets, truth = answers(20_000, 1)
    pred = Predictive.from_logits(new_odds)
    calibrated = calibrator(pred).probs
    assert gaps(calibrated, new_targets, 20_000).abs().max() < 5
    assert gaps(pred.probs, new_targets, 20_000).abs().max() > 15
    assert true_gaps(calibrated, truth).abs().max() < 5
    assert true_gaps(pred.probs, truth).abs().max() > 15
    assert calibrator.diagnostics["nll_after"] < calibrator.diagnostics["nll_before"]


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_confidence_of_new_classes_is_calibrated_and_was_not(make: Callable[..., ClassMaps]) -> None:
    pred, targets = classes(20_000, draws=1)
    new, new_targets = classes(20_000, draws=1, seed=1)
    calibrated = make(keep_labels=True).fit(pred, targets)(new)
    right = new.labels == new_targets
    assert gaps(calibrated.confidence, right, 20_000).abs().max() < 5
    assert gaps(new.confidence, right, 20_000).abs().max() > 15
    assert torch.equal(calibrated.labels, new.labels)


# -- what the answer is


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_kept_labels_keep_the_ratios_of_the_others(make: Callable[..., ClassMaps]) -> None:
    pred, targets = classes()
    calibrated = make(keep_labels=True).fit(pred, targets)(pred)
    assert torch.equal(calibrated.labels, pred.labels)
    rows = torch.arange(300)
    for before, after in zip(pred.probs, calibrated.probs, strict=True):
        others = [k for k in range(4) if k != int(before.argmax())]
        torch.testing.assert_close(after[others] / after[others].sum(), before[others] / before[others].sum())
    torch.testing.assert_close(calibrated.probs[rows, pred.labels], calibrated.confidence)
    torch.testing.assert_close(calibrated.probs.sum(-1), torch.ones(300, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_the_top_class_stays_where_everything_is_wrong(make: Callable[..., ClassMaps], dtype: torch.dtype) -> None:
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:20] = 0  # every class equal: the first of them stays
    logits[20:40, 1] = logits[20:40].amax(-1)
    pred = Predictive.from_logits(logits)
    with pytest.warns(CalibrationWarning, match="one outcome only"):
        calibrator = make(keep_labels=True).fit(pred, logits.argmin(-1).where(logits[:, 0] != 0, 1))
    calibrated = calibrator(pred)
    assert torch.equal(calibrated.labels, pred.labels)
    assert (calibrated.confidence <= pred.confidence + 1e-4).all()


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_yes_stays_yes(make: Callable[..., ClassMaps]) -> None:
    odds, targets, _ = answers(300, 0)
    pred = Predictive.from_logits(torch.cat([odds, odds.new_zeros(5)]).float())
    calibrated = make(keep_labels=True).fit(pred, torch.cat([targets, targets.new_ones(5)]))(pred)
    assert torch.equal(calibrated.labels, pred.labels)
    with pytest.warns(CalibrationWarning, match="always right, or always wrong"):
        wrong = make(keep_labels=True).fit(pred, 1 - pred.labels)
    assert torch.equal(wrong(pred).labels, pred.labels)


def test_sure_answers_have_shares_for_the_others() -> None:
    pred = Predictive.from_probs([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.4, 0.0], [0.3, 0.7, 0.0]])
    calibrator = HistogramBinning(2, keep_labels=True).fit(pred, [0, 0, 0, 1])
    found = calibrator(pred).probs
    top = (4 * (1 + 1) / 3 + 1 / 3) / 5  # one of two right, and the prediction of 1 as a third
    torch.testing.assert_close(found[0], torch.tensor([top, (1 - top) / 2, (1 - top) / 2]))
    assert found[2, 2] == 0  # a class that is ruled out stays so where the others have ratios


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_nothing_is_impossible_or_sure(make: Callable[..., ClassMaps]) -> None:
    """Trap D8: a class without examples; trap 24: probabilities of exactly 0."""
    pred = Predictive.from_probs([[0.7, 0.3, 0.0], [0.2, 0.8, 0.0], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]])
    with pytest.warns(CalibrationWarning, match="1 of 3 maps saw one outcome only"):
        calibrator = make().fit(pred, [0, 1, 0, 1])
    found = calibrator(Predictive.from_probs([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert (found.probs > 0).all()
    assert (found.probs < 1).all()
    assert found.log_prob([2, 0]).isfinite().all()
    assert calibrator.diagnostics["num_one_sided"] == 1
    binary = Predictive.from_probs([0.0, 0.0, 1.0, 1.0, 0.5])
    found = make().fit(binary, [0, 0, 1, 1, 0])(binary)
    assert found.log_prob([1, 1, 0, 0, 0]).isfinite().all()


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_draw_that_claims_no_more_than_it_knows(make: Callable[..., ClassMaps], dtype: torch.dtype) -> None:
    pred, targets = classes()
    pred = pred.to(dtype)
    calibrated = make().fit(pred, targets)(pred)
    assert isinstance(calibrated, CategoricalPredictive)
    assert calibrated.dtype == dtype
    assert (calibrated.num_samples, calibrated.exact) == (1, False)
    assert (calibrated.standard_error == torch.inf).all()
    assert (calibrated.uncertainty().epistemic == 0).all()
    torch.testing.assert_close(make().fit(pred.reduce(), targets)(pred.reduce()).probs, calibrated.probs)
    exact = make().fit(Predictive.from_probs(pred.probs), targets)(Predictive.from_probs(pred.probs))
    assert exact.exact
    assert (exact.standard_error == 0).all()
    assert len(calibrated[:0]) == len(make().fit(pred, targets)(pred[:0])) == 0


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_order_of_rows_does_not_matter(make: Callable[..., ClassMaps], keep: bool) -> None:
    pred, targets = classes()
    parts = (pred.probs * 20).round() + 1
    tied = Predictive.from_probs(parts / parts.sum(-1, keepdim=True))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    first, second = make(keep_labels=keep).fit(tied, targets), make(keep_labels=keep).fit(tied[order], targets[order])
    torch.testing.assert_close(first(tied).mean, second(tied).mean, rtol=1e-12, atol=0)


def test_equal_mass_never_splits_ties() -> None:
    """Trap 18: ten bins are asked for, and there are three values."""
    pred = Predictive.from_probs(torch.tensor([0.2] * 50 + [0.5] * 3 + [0.9] * 47, dtype=torch.float64))
    targets = torch.tensor([1] * 10 + [0] * 40 + [1, 0, 1] + [1] * 30 + [0] * 17)
    binning = HistogramBinning(10).fit(pred, targets)
    assert binning.diagnostics["num_values"] == 3
    wanted = torch.tensor([10.2 / 51, 2.5 / 4, 30.9 / 48], dtype=torch.float64)
    torch.testing.assert_close(binning(pred).probs[[0, 50, 53]], (100 * wanted + 0.5) / 101)
    assert HistogramBinning(10).fit(pred[:50], targets[:50]).diagnostics["num_values"] == 1
    assert IsotonicCalibration().fit(pred[:50], targets[:50])(pred).probs.unique().numel() == 1


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_yes_and_no_may_change_names(make: Callable[..., ClassMaps]) -> None:
    odds, targets, _ = answers(101, 0)
    yes = make().fit(Predictive.from_logits(odds), targets)(Predictive.from_logits(odds)).mean
    no = make().fit(Predictive.from_logits(-odds), 1 - targets)(Predictive.from_logits(-odds)).mean
    torch.testing.assert_close(yes, 1 - no)


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_chunks_do_not_change_the_answer(make: Callable[..., ClassMaps], monkeypatch: pytest.MonkeyPatch) -> None:
    pred, targets = classes()
    calibrator = make().fit(pred, targets)
    whole = calibrator(pred).probs
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 200)
    torch.testing.assert_close(calibrator(pred).probs, whole)


# -- state


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_state_loads_into_a_fresh_one(make: Callable[..., ClassMaps], keep: bool) -> None:
    pred, targets = classes()
    fitted = nn.ModuleList([make(keep_labels=keep).fit(pred, targets)])
    fresh = nn.ModuleList([make(keep_labels=keep)])
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh[0](pred).probs, fitted[0](pred).probs)
    assert all(value.dtype == torch.float64 for name, value in fresh.state_dict().items() if name.endswith("points"))
    fresh.load_state_dict(nn.ModuleList([make(keep_labels=keep)]).state_dict())
    with pytest.raises(NotFitted):
        fresh[0](pred)
    assert "not fitted" in repr(fresh)
    assert "not fitted" not in repr(fitted)
    fitted.float()
    torch.testing.assert_close(
        fitted[0](pred).probs, make(keep_labels=keep).fit(pred, targets)(pred).probs, atol=1e-5, rtol=0
    )


# -- wrong inputs


@pytest.mark.parametrize("make", MAKE, ids=NAMES)
def test_inputs_that_will_not_do(make: Callable[..., ClassMaps]) -> None:
    pred, targets = classes()
    fitted = make().fit(pred, targets)
    with pytest.raises(BadType, match="for classification"):
        make().fit(Predictive.from_normal(torch.zeros(3), 1.0), torch.zeros(3))
    with pytest.raises(BadInput, match="targets has shape"):
        make().fit(pred, targets[:-1])
    with pytest.raises(BadInput, match="label 7 in row 2"):
        make().fit(pred, targets.index_fill(0, torch.tensor(2), 7))
    with pytest.raises(BadType, match="integer class labels"):
        make().fit(pred, targets.double())
    binary = Predictive.from_logits(torch.zeros(3))
    with pytest.raises(BadInput, match="row 1"):
        make().fit(binary, torch.tensor([0.0, torch.nan, 1.0]))
    with pytest.raises(BadType, match="fitted to a CategoricalPredictive, got a BernoulliPredictive"):
        fitted(binary)
    with pytest.raises(BadType, match="for classification"):
        fitted(Predictive.from_normal(torch.zeros(3), 1.0))
    with pytest.raises(BadInput, match="has 5 classes, but"):
        fitted(Predictive.from_logits(torch.zeros(2, 5)))
    with pytest.raises(NotFitted):
        make()(pred)
    labels = make().fit(BernoulliPredictive(answers(50, 0, 2)[0][None]), answers(50, 0, 2)[1])
    with pytest.raises(BadInput, match="has 2 maps, but pred needs 3"):
        labels(BernoulliPredictive(torch.zeros(1, 4, 3)))
    other = make(keep_labels=True)
    other.load_state_dict(fitted.state_dict())
    with pytest.raises(BadInput, match="has 4 maps, but pred needs 1 with keep_labels=True"):
        other(pred)


def test_settings_that_will_not_do() -> None:
    with pytest.raises(BadInput, match="num_bins must be at least 1"):
        HistogramBinning(0)
    with pytest.raises(BadInput, match="binning must be 'mass' or 'width', got 'equal'"):
        HistogramBinning(binning="equal")  # type: ignore[arg-type]
    with pytest.raises(BadType, match="keep_labels must be True or False"):
        IsotonicCalibration(keep_labels=1)  # type: ignore[arg-type]


def test_no_gradient_and_no_warning_where_there_is_nothing_to_warn_of() -> None:
    pred, targets = classes(draws=1)
    logits = pred.draw_logits.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for make in MAKE:
            calibrator = make().fit(CategoricalPredictive(logits), targets)
            assert not calibrator(CategoricalPredictive(logits)).probs.requires_grad
    assert logits.grad is None
