"""Maps of log-odds: their optima against SciPy and scikit-learn, and what they do where there is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from bayesguard.calibration.base import Calibrator
from bayesguard.calibration.binary import BetaCalibration, PlattScaling
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from tests.calibration.test_linear import DTYPES, Array, check_dtype, gradient, information, pooled_nll, predicted_nll

OF_ANSWERS: list[Callable[[], Calibrator]] = [PlattScaling, lambda: PlattScaling(smooth=True), BetaCalibration]


def answers(draws: int = 1, shape: tuple[int, ...] = (400,), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Over-confident log-odds `[S, ...]`, and answers."""
    generator = torch.Generator().manual_seed(seed)
    odds = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    said = torch.rand(shape, generator=generator, dtype=torch.float64) < torch.sigmoid(odds / 2 + 0.7)
    return odds + torch.randn(draws, *shape, generator=generator, dtype=torch.float64), said.long()


def pooled_answers(odds: Array, said: Array) -> float:
    return pooled_nll(np.stack([np.zeros_like(odds), odds], -1), said)


# -- exactness


def test_platt_scaling_is_logistic_regression() -> None:
    odds, said = answers()
    scaling = PlattScaling().fit(BernoulliPredictive(odds), said)
    peer = LogisticRegression(C=1e10, tol=1e-10, max_iter=10_000).fit(odds[0][:, None].numpy(), said.numpy())
    best = pooled_answers(peer.decision_function(odds[0][:, None].numpy())[None], said.numpy())
    assert abs(scaling.diagnostics["nll_after"] - best) < 1e-4
    assert float(scaling.scale) == pytest.approx(float(peer.coef_[0, 0]), abs=1e-4)
    assert float(scaling.bias) == pytest.approx(float(peer.intercept_[0]), abs=1e-4)


def test_platts_targets() -> None:
    odds, said = answers(shape=(40,))
    scaling = PlattScaling(smooth=True).fit(BernoulliPredictive(odds), said)
    yes, no = int(said.sum()), int((1 - said).sum())
    soft = np.where(said.numpy() == 1, (yes + 1) / (yes + 2), 1 / (no + 2))

    def objective(at: Array) -> float:
        mapped = odds[0].numpy() * at[0] + at[1]
        return float((soft * np.logaddexp(0, -mapped) + (1 - soft) * np.logaddexp(0, mapped)).mean())

    best = optimize.minimize(objective, np.array([1.0, 0.0]), options={"gtol": 1e-8})
    np.testing.assert_allclose([float(scaling.scale), float(scaling.bias)], best.x, atol=1e-3)
    plain = PlattScaling().fit(BernoulliPredictive(odds), said)
    assert abs(float(plain.scale) - float(scaling.scale)) > 0.01
    assert scaling.diagnostics["nll_after"] > plain.diagnostics["nll_after"]


@pytest.mark.parametrize("case", ["inside", "a is 0", "b is 0", "both are 0"])
def test_beta_calibration_is_the_bounded_optimum(case: str) -> None:
    generator = torch.Generator().manual_seed(1)
    odds = 2 * torch.randn(1, 600, generator=generator, dtype=torch.float64)
    honest = {
        "inside": odds / 2 + 0.5,
        "a is 0": torch.where(odds < 0, -odds, 2 * odds),
        "b is 0": torch.where(odds > 0, -odds, 2 * odds),
        "both are 0": -odds,
    }[case]
    said = (torch.rand(600, generator=generator, dtype=torch.float64) < honest[0].sigmoid()).long()
    scaling = BetaCalibration().fit(BernoulliPredictive(odds), said)
    low, high = np.logaddexp(0, -odds.numpy()), np.logaddexp(0, odds.numpy())
    best = optimize.minimize(
        lambda at: pooled_answers(-at[0] * low + at[1] * high + at[2], said.numpy()),
        np.array([1.0, 1.0, 0.0]),
        bounds=[(0, None), (0, None), (None, None)],
        method="L-BFGS-B",
        options={"ftol": 1e-14, "gtol": 1e-9},
    )
    assert abs(scaling.diagnostics["nll_after"] - best.fun) < 1e-4
    found = np.r_[scaling.scale.numpy(), float(scaling.bias)]
    np.testing.assert_allclose(found, best.x, atol=5e-3)
    assert (scaling.scale >= 0).all()
    at_zero = {"inside": [], "a is 0": [0], "b is 0": [1], "both are 0": [0, 1]}[case]
    assert (scaling.scale == 0).nonzero().flatten().tolist() == at_zero


@pytest.mark.parametrize("kind", [PlattScaling, BetaCalibration])
def test_answers_are_fitted_to_the_pooled_likelihood(kind: Callable[[], Calibrator]) -> None:
    odds, said = answers(draws=3)
    low, high = np.logaddexp(0, -odds.numpy()), np.logaddexp(0, odds.numpy())

    def objective(at: Array) -> float:
        if len(at) == 2:
            return pooled_answers(odds.numpy() * at[0] + at[1], said.numpy())
        return pooled_answers(-at[0] * low + at[1] * high + at[2], said.numpy())

    def fitted(draws: Tensor, labels: Tensor) -> Array:
        calibrator = kind().double().fit(BernoulliPredictive(draws), labels)
        return np.r_[calibrator.get_buffer("scale").flatten().numpy(), float(calibrator.get_buffer("bias"))]

    assert np.abs(gradient(objective, fitted(odds, said))).max() < 1e-5
    assert np.abs(gradient(objective, fitted(odds.reshape(1, -1), said.repeat(3)))).max() > 1e-3


@pytest.mark.parametrize("make", OF_ANSWERS)
def test_every_draw_of_an_answer_is_mapped(make: Callable[[], Calibrator]) -> None:
    odds, said = answers(draws=3)
    pred = BernoulliPredictive(odds, [1, 2, 3])
    calibrator = make().fit(pred, said)
    calibrated = calibrator(pred)
    mixed = torch.tensordot(pred.weights, calibrated.draw_logits.sigmoid(), dims=1)
    torch.testing.assert_close(calibrated.probs, mixed)
    assert predicted_nll(calibrated, said) == pytest.approx(calibrator.diagnostics["nll_after"], rel=1e-6)
    assert calibrator.diagnostics["nll_after"] < calibrator.diagnostics["nll_before"]
    assert calibrator.diagnostics["converged"]


@pytest.mark.parametrize("smooth", [False, True])
def test_known_pairs_are_found(smooth: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    odds = 3 * torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    scale, bias = torch.tensor([0.3, 1.5]).double(), torch.tensor([1.0, -0.5]).double()
    said = (torch.rand(20_000, 2, generator=generator, dtype=torch.float64) < (odds * scale + bias).sigmoid()).long()

    def off(said: Tensor) -> float:
        found, worst = PlattScaling(smooth).double().fit(BernoulliPredictive(odds[None]), said), 0.0
        for label in range(2):
            at = torch.stack([found.scale[label], found.bias[label]])

            def nll(at: Tensor, label: int = label) -> Tensor:
                mapped = odds[:, label] * at[0] + at[1]
                return nn.functional.binary_cross_entropy_with_logits(mapped, said[:, label].double())

            true = torch.stack([scale[label], bias[label]])
            worst = max(worst, float(((at - true).abs() / information(nll, at, 20_000)).max()))
        return worst

    assert off(said) < 5
    assert off(said.flip(1)) > 5  # each label with the other's answers


def test_several_labels_are_fitted_one_by_one() -> None:
    odds, said = answers(draws=2, shape=(300, 3))
    for kind in (PlattScaling, BetaCalibration):
        together = kind().fit(BernoulliPredictive(odds), said)
        assert together.bias.shape == (3,)
        for label in range(3):
            alone = kind().fit(BernoulliPredictive(odds[..., label]), said[:, label])
            torch.testing.assert_close(together.scale[label], alone.scale, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(together.bias[label], alone.bias, rtol=1e-5, atol=1e-6)
        assert together(BernoulliPredictive(odds)).batch_shape == (300, 3)
        assert together.diagnostics["num_examples"] == 900


# -- where there is no best map


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_separable_answers_change_nothing(scale: float) -> None:
    odds = scale * torch.tensor([-2.0, -1.0, 0.5, 2.0])
    pred = Predictive.from_logits(odds)
    for calibrator in (PlattScaling(), BetaCalibration()):
        with pytest.warns(CalibrationWarning, match="separable"):
            calibrator.fit(pred, [0, 0, 1, 1])
        assert torch.equal(calibrator(pred).logits, pred.logits)
    with pytest.warns(CalibrationWarning, match="separable"):
        PlattScaling().fit(pred, [1, 1, 0, 0])
    smooth = PlattScaling(smooth=True).fit(pred, [0, 0, 1, 1])
    assert smooth.diagnostics["converged"]
    assert not smooth.diagnostics["separable"]
    found = smooth(pred).mean
    assert 0.05 < found[0] < 0.3  # Platt's target is 1 / 4
    assert 0.7 < found[-1] < 0.95


def test_answers_that_fit_ever_better_as_votes() -> None:
    """Of sixteen draws most are right in every example: no log-odds part the answers, and yet the factor has no end."""
    generator = torch.Generator().manual_seed(0)
    said = torch.arange(120) % 2
    right = torch.rand(16, 120, generator=generator) < 0.9
    odds = 3.0 * torch.where(right, 2 * said - 1, 1 - 2 * said)
    with pytest.warns(CalibrationWarning, match="separable"):
        scaling = PlattScaling().fit(BernoulliPredictive(odds), said)
    assert float(scaling.scale) == 1


@pytest.mark.parametrize("make", OF_ANSWERS)
def test_answers_all_alike_change_nothing(make: Callable[[], Calibrator]) -> None:
    odds, said = answers(shape=(100, 2))
    said[:, 1] = 1
    pred = BernoulliPredictive(odds)
    with pytest.warns(CalibrationWarning, match=r"labels \[1\].*all yes or all no"):
        calibrator = make().fit(pred, said)
    assert torch.equal(calibrator(pred).draw_logits[..., 1], odds[..., 1])
    assert not torch.allclose(calibrator(pred).draw_logits[..., 0], odds[..., 0])
    with pytest.warns(CalibrationWarning, match="all yes or all no"):
        make().fit(BernoulliPredictive(odds[..., 0]), torch.zeros(100))


def test_answers_in_the_wrong_order_are_told() -> None:
    odds, said = answers()
    with pytest.warns(CalibrationWarning, match="order of the predictions") as caught:
        assert PlattScaling().fit(BernoulliPredictive(odds), 1 - said).scale < 0
    assert caught[0].filename == __file__


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_doing_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1 + seed % 3, 15, 3, generator=generator, dtype=torch.float64) * 10 ** (seed - 2)
    targets = (logits[0] + logits.std() * torch.randn(15, 3, generator=generator)).argmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of them are separable
        for kind in (PlattScaling, BetaCalibration):
            found = kind().fit(BernoulliPredictive(logits), targets[:, None] == torch.arange(3)).diagnostics
            assert found["nll_after"] <= found["nll_before"] + 1e-15


@pytest.mark.parametrize("make", OF_ANSWERS)
def test_certain_answers_stay_certain(make: Callable[[], Calibrator]) -> None:
    odds, said = answers()
    probs = torch.cat([torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), odds[0].sigmoid()])
    said = torch.cat([torch.tensor([0, 1, 0]), said])
    with pytest.warns(CalibrationWarning, match="1 of 403"):
        calibrator = make().fit(Predictive.from_probs(probs), said)
    found = calibrator(Predictive.from_probs(probs)).mean
    assert found[:3].tolist() == [0.0, 1.0, 1.0]
    assert found.isfinite().all()
    assert calibrator.diagnostics["converged"]
    plain = make().fit(Predictive.from_probs(probs[3:]), said[3:])
    torch.testing.assert_close(calibrator.get_buffer("scale"), plain.get_buffer("scale"), rtol=1e-2, atol=1e-2)


def test_draws_without_weight_do_not_count() -> None:
    odds, said = answers(draws=2)
    odds[1] = 100
    by_weight = PlattScaling().fit(BernoulliPredictive(odds, [1, 0]), said)
    assert torch.equal(by_weight.scale, PlattScaling().fit(BernoulliPredictive(odds[:1]), said).scale)


# -- slices, dtypes, state, inputs


@pytest.mark.parametrize("make", OF_ANSWERS)
def test_slices_do_not_change_the_answer(make: Callable[[], Calibrator], monkeypatch: pytest.MonkeyPatch) -> None:
    values, targets = answers(draws=3)
    pred = BernoulliPredictive(values)
    whole = make().fit(pred, targets)
    expected = whole(pred).draw_logits
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 1000)
    sliced = make().fit(pred, targets)
    torch.testing.assert_close(sliced.get_buffer("bias"), whole.get_buffer("bias"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole(pred).draw_logits, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", OF_ANSWERS)
def test_dtypes(make: Callable[[], Calibrator], dtype: torch.dtype) -> None:
    check_dtype(make, *answers(draws=2), dtype)


@pytest.mark.parametrize("make", OF_ANSWERS)
def test_state_loads_into_a_fresh_one(make: Callable[[], Calibrator]) -> None:
    values, targets = answers(shape=(100, 3))
    pred = BernoulliPredictive(values)
    with torch.inference_mode():
        fitted = make().fit(pred, targets)
    fresh = nn.ModuleList([make()])
    assert "not fitted" in repr(fresh)
    fresh.load_state_dict(nn.ModuleList([fitted]).state_dict())
    loaded = fresh[0]
    assert torch.equal(loaded(pred).draw_logits, fitted(pred).draw_logits)
    assert "num_" in repr(loaded)
    loaded.load_state_dict(make().fit(pred[:50], targets[:50]).state_dict())
    assert loaded.to(torch.float64).get_buffer("bias").dtype == torch.float64
    assert not any(buffer.is_inference() for name, buffer in fitted.named_buffers() if name != "is_fitted")
    assert all(not parameter.requires_grad for parameter in fitted.parameters())


@pytest.mark.parametrize("make", OF_ANSWERS)
def test_gradients_reach_the_logits_and_fitting_leaves_none(make: Callable[[], Calibrator]) -> None:
    values, targets = answers()
    values.requires_grad_()
    pred = BernoulliPredictive(values)
    calibrator = make().fit(pred, targets)
    assert not calibrator.get_buffer("bias").requires_grad
    (slope,) = torch.autograd.grad(calibrator(pred).log_prob(targets).sum(), values)
    assert slope.isfinite().all()
    assert slope.abs().max() > 0
    assert values.grad is None


@pytest.mark.parametrize("make", OF_ANSWERS)
def test_predictives_of_answers_that_will_not_do(make: Callable[[], Calibrator]) -> None:
    odds, said = answers(draws=2, shape=(40, 3))
    pred = BernoulliPredictive(odds)
    with pytest.raises(BadInput, match="keep_draws=True"):
        make().fit(pred.reduce(), said)
    fitted = make().fit(pred, said)
    with pytest.raises(BadInput, match=r"\('N', 3\)"):
        fitted(BernoulliPredictive(odds[..., 0]))
    with pytest.raises(BadInput, match="batch shape"):
        fitted(BernoulliPredictive(odds[..., :2]))
    with pytest.raises(BadInput, match="Flatten"):
        make().fit(BernoulliPredictive(odds[..., None]), said[..., None])
    with pytest.raises(BadType, match="VectorScaling"):
        make().fit(CategoricalPredictive(odds), said[:, 0])
    with pytest.raises(BadInput, match="0 or 1"):
        make().fit(pred, 2 * said)
    impossible = Predictive.from_probs([1.0, 1.0])
    with pytest.warns(CalibrationWarning, match="2 of 2"), pytest.raises(BadInput, match="probability zero"):
        make().fit(impossible, [0, 0])


@pytest.mark.parametrize("kind", [PlattScaling, BetaCalibration])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_whole_weights_are_repeated_examples(kind: Callable[[], Calibrator], shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    odds = 2 * torch.randn(3, 200, *shape, generator=generator, dtype=torch.float64)
    answers = (torch.rand(200, *shape, generator=generator) < torch.sigmoid(odds[0] / 2)).long()
    counts = torch.randint(0, 4, (200,), generator=generator)
    weighted = kind().fit(BernoulliPredictive(odds), answers, weights=counts)
    repeated = kind().fit(BernoulliPredictive(odds.repeat_interleave(counts, 1)), answers.repeat_interleave(counts, 0))
    for name in ("scale", "bias"):
        torch.testing.assert_close(weighted.get_buffer(name), repeated.get_buffer(name), rtol=1e-6, atol=1e-6)
    assert weighted.diagnostics["nll_after"] == pytest.approx(repeated.diagnostics["nll_after"], rel=1e-8)
    plain = kind().fit(BernoulliPredictive(odds), answers)
    assert not torch.allclose(plain.get_buffer("bias"), repeated.get_buffer("bias"), rtol=1e-3)
