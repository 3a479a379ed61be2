"""Linear maps of every draw: their optima against SciPy and scikit-learn, and what they do where there is none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from bayesguard.calibration.base import Calibrator
from bayesguard.calibration.linear import (
    BetaCalibration,
    DirichletCalibration,
    MatrixScaling,
    PlattScaling,
    VectorScaling,
)
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive

Array = npt.NDArray[np.float64]
OF_CLASSES: list[Callable[[], Calibrator]] = [
    VectorScaling,
    lambda: MatrixScaling(0.3, 0.1),
    lambda: DirichletCalibration(0.3, 0.1),
]
OF_ANSWERS: list[Callable[[], Calibrator]] = [PlattScaling, lambda: PlattScaling(smooth=True), BetaCalibration]


def classes(draws: int = 1, count: int = 400, num: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Over-confident and lopsided logits `[S, N, K]`, and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, num, generator=generator, dtype=torch.float64)
    honest = logits / 2 + torch.linspace(-1, 1, num, dtype=torch.float64)
    targets = honest.softmax(-1).multinomial(1, generator=generator)[:, 0]
    return logits + torch.randn(draws, count, num, generator=generator, dtype=torch.float64), targets


def answers(draws: int = 1, shape: tuple[int, ...] = (400,), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Over-confident log-odds `[S, ...]`, and answers."""
    generator = torch.Generator().manual_seed(seed)
    odds = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    said = torch.rand(shape, generator=generator, dtype=torch.float64) < torch.sigmoid(odds / 2 + 0.7)
    return odds + torch.randn(draws, *shape, generator=generator, dtype=torch.float64), said.long()


def centred(logits: Tensor) -> Array:
    return (logits - logits.mean(-1, keepdim=True)).numpy()


def pooled_nll(logits: Array, targets: Array) -> float:
    """Mean of -log of the mean over draws of softmax(logits)[y], `[S, N, K]`, in plain NumPy."""
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    chosen = log_probs[:, np.arange(len(targets)), targets.astype(int)]
    most = chosen.max(0)
    return float(-(most + np.log(np.exp(chosen - most).mean(0))).mean())


def pooled_answers(odds: Array, said: Array) -> float:
    return pooled_nll(np.stack([np.zeros_like(odds), odds], -1), said)


def predicted_nll(pred: Predictive, targets: Tensor) -> float:
    return -float(pred.log_prob(targets).double().mean())


# -- exactness


def test_vector_scaling_is_the_optimum() -> None:
    logits, targets = classes()
    scaling = VectorScaling().fit(CategoricalPredictive(logits), targets)
    x, y = centred(logits), targets.numpy()
    best = optimize.minimize(
        lambda at: pooled_nll(x * at[:4] + at[4:], y), np.r_[np.ones(4), np.zeros(4)], options={"gtol": 1e-7}
    )
    assert abs(scaling.diagnostics["nll_after"] - best.fun) < 1e-4
    assert scaling.diagnostics["nll_before"] == pytest.approx(pooled_nll(x, y), rel=1e-9)
    np.testing.assert_allclose(scaling.scale.numpy(), best.x[:4], atol=2e-3)
    np.testing.assert_allclose(scaling.bias.numpy(), best.x[4:] - best.x[4:].mean(), atol=2e-3)


@pytest.mark.parametrize("kind", [MatrixScaling, DirichletCalibration])
def test_without_penalties_it_is_logistic_regression(kind: Callable[..., MatrixScaling]) -> None:
    logits, targets = classes()
    pred = CategoricalPredictive(logits)
    calibrator = kind(off_diagonal=0.0, bias=0.0).fit(pred, targets)
    x = centred(logits)[0] if kind is MatrixScaling else pred.draw_logits[0].numpy()
    peer = LogisticRegression(C=1e10, tol=1e-10, max_iter=10_000).fit(x, targets.numpy())
    best = pooled_nll(peer.decision_function(x)[None], targets.numpy())
    assert abs(calibrator.diagnostics["nll_after"] - best) < 1e-4
    assert calibrator.diagnostics["converged"]
    assert predicted_nll(calibrator(pred), targets) == pytest.approx(calibrator.diagnostics["nll_after"], rel=1e-6)


@pytest.mark.parametrize(("off_diagonal", "bias"), [(0.1, 0.01), (3.0, 1.0), (1e4, 0.0)])
def test_odir_is_the_mean_square(off_diagonal: float, bias: float) -> None:
    logits, targets = classes(num=3, count=300)
    scaling = MatrixScaling(off_diagonal, bias).double().fit(CategoricalPredictive(logits), targets)
    x, y = centred(logits), targets.numpy()

    def objective(at: Array) -> float:
        matrix, shift = at[:9].reshape(3, 3), at[9:]
        beside = matrix[~np.eye(3, dtype=bool)]
        penalty = off_diagonal * np.square(beside).sum() / 6 + bias * np.square(shift).sum() / 3
        return pooled_nll(x @ matrix.T + shift, y) + float(penalty)

    found = np.r_[scaling.get_buffer("weight").flatten().numpy(), scaling.get_buffer("bias").numpy()]
    best = optimize.minimize(objective, np.r_[np.eye(3).flatten(), np.zeros(3)], options={"gtol": 1e-7})
    assert abs(objective(found) - best.fun) < 1e-4
    # The mean square is not the sum of squares of the authors' code, which is another minimum.
    assert off_diagonal != 3.0 or np.abs(gradient(objective, found)).max() < 1e-4


def test_a_strong_penalty_is_vector_scaling() -> None:
    logits, targets = classes()
    pred = CategoricalPredictive(logits)
    vector = VectorScaling().fit(pred, targets)
    matrix = MatrixScaling(off_diagonal=1e8, bias=0.0).fit(pred, targets)
    torch.testing.assert_close(matrix.weight.diagonal(), vector.scale, atol=1e-3, rtol=0)
    torch.testing.assert_close(matrix(pred).probs, vector(pred).probs, atol=1e-3, rtol=0)


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


# -- several draws


def gradient(objective: Callable[[Array], float], at: Array, step: float = 1e-4) -> Array:
    """Central differences."""
    found = []
    for place in range(len(at)):
        change = np.zeros_like(at)
        change[place] = step
        found.append((objective(at + change) - objective(at - change)) / (2 * step))
    return np.array(found)


@pytest.mark.parametrize("kind", [VectorScaling, lambda: MatrixScaling(0.0, 0.0)])
def test_classes_are_fitted_to_the_pooled_likelihood(kind: Callable[[], Calibrator]) -> None:
    logits, targets = classes(draws=3)
    x, y = centred(logits), targets.numpy()

    def objective(at: Array) -> float:
        if len(at) == 8:
            return pooled_nll(x * at[:4] + at[4:], y)
        return pooled_nll(x @ at[:16].reshape(4, 4).T + at[16:], y)

    def fitted(pred: CategoricalPredictive, labels: Tensor) -> Array:
        calibrator = kind().double().fit(pred, labels)
        factors = calibrator.get_buffer("scale" if isinstance(calibrator, VectorScaling) else "weight")
        return np.r_[factors.flatten().numpy(), calibrator.get_buffer("bias").numpy()]

    found = fitted(CategoricalPredictive(logits), targets)
    assert np.abs(gradient(objective, found)).max() < 1e-5
    # The map that makes the draws honest one by one is another, and leaves the mixture with a slope.
    one_by_one = fitted(CategoricalPredictive(logits.reshape(1, -1, 4)), targets.repeat(3))
    assert np.abs(gradient(objective, one_by_one)).max() > 1e-3


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


@pytest.mark.parametrize("make", OF_CLASSES)
def test_every_draw_is_mapped_and_the_rest_is_kept(make: Callable[[], Calibrator]) -> None:
    logits, targets = classes(draws=4)
    pred = CategoricalPredictive(logits, [1, 2, 3, 4]).with_groups([0, 0, 1, 1])
    calibrator = make().fit(pred, targets)
    calibrated = calibrator(pred)
    assert isinstance(calibrated, CategoricalPredictive)
    assert torch.equal(calibrated.weights, pred.weights)
    assert calibrated.groups is not None
    assert calibrated.groups.tolist() == [0, 0, 1, 1]
    for draw in range(4):
        alone = calibrator(CategoricalPredictive(logits[draw : draw + 1]))
        torch.testing.assert_close(alone.draw_logits[0], calibrated.draw_logits[draw])
    mixed = torch.tensordot(pred.weights, calibrated.draw_logits.exp(), dims=1)
    torch.testing.assert_close(calibrated.probs, mixed)
    assert predicted_nll(calibrated, targets) == pytest.approx(calibrator.diagnostics["nll_after"], rel=1e-6)
    assert calibrator.diagnostics["nll_after"] < calibrator.diagnostics["nll_before"] - 0.01
    assert calibrator.diagnostics["gradient_norm"] <= 1e-6
    assert calibrator(CategoricalPredictive(logits[:1], exact=True)).exact


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


# -- recovery


def information(nll: Callable[[Tensor], Tensor], at: Tensor, count: int) -> Tensor:
    """Standard errors by the observed information; directions in which the likelihood is flat have none."""
    second = torch.autograd.functional.hessian(nll, at)
    return torch.linalg.pinv(count * second, hermitian=True, rtol=1e-9).diagonal().clamp_min(0).sqrt()


class _Uncentred(VectorScaling):
    """Wrong: the constant of each example is left in, so that a factor means something else."""

    @staticmethod
    def _features(draws: Tensor) -> Tensor:
        return draws.double()


@pytest.mark.parametrize(("kind", "right"), [(VectorScaling, True), (_Uncentred, False)])
def test_a_known_vector_is_found(kind: type[VectorScaling], right: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    logits = logits - logits.mean(-1, keepdim=True)
    scale, bias = torch.tensor([0.3, 0.5, 0.8]).double(), torch.tensor([-0.5, 1.0, -0.5]).double()
    targets = (logits * scale + bias).softmax(-1).multinomial(1, generator=generator)[:, 0]
    found = kind().double().fit(CategoricalPredictive(logits[None]), targets)
    at = torch.cat([found.scale, found.bias])

    def nll(at: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits * at[:3] + at[3:], targets)

    off = (at - torch.cat([scale, bias])).abs() / information(nll, at, 20_000)
    assert (off < 5).all() == right


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


# -- where there is no best map


@pytest.mark.parametrize("make", OF_CLASSES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_separable_classes_change_nothing(make: Callable[[], Calibrator], sign: float) -> None:
    """All right, and for two classes all wrong: with negative factors that is all right again."""
    logits = sign * torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 2.5]])
    pred = Predictive.from_logits(logits)
    with pytest.warns(CalibrationWarning, match="separable"):
        calibrator = make().fit(pred, [0, 1, 0, 1])
    torch.testing.assert_close(calibrator(pred).probs, pred.probs)
    assert calibrator.diagnostics["separable"]
    assert calibrator.diagnostics["nll_after"] == calibrator.diagnostics["nll_before"]


@pytest.mark.parametrize("make", OF_CLASSES[:2])
def test_one_separable_class_of_several_is_named(make: Callable[[], Calibrator]) -> None:
    """Not for Dirichlet calibration: log-probabilities are 0 at most, and the penalised bias bounds the map."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (600,), generator=generator)
    logits = torch.randn(600, 3, generator=generator)
    logits[:, 0] = torch.where(targets == 0, 6.0, -6.0)
    with pytest.warns(CalibrationWarning, match=r"classes \[0\] are separable"):
        calibrator = make().fit(Predictive.from_logits(logits), targets)
    assert calibrator.diagnostics["nll_after"] < calibrator.diagnostics["nll_before"]
    assert calibrator(Predictive.from_logits(logits)).probs.isfinite().all()


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
    with pytest.warns(CalibrationWarning, match="separable"):
        VectorScaling().fit(CategoricalPredictive(torch.stack([-odds, odds], -1)), said)


def test_a_class_without_targets_keeps_its_bias() -> None:
    logits, targets = classes(count=600, num=5)
    seen = (targets != 0) & (targets != 3)
    logits, targets = logits[:, seen], targets[seen]
    pred = CategoricalPredictive(logits)
    vector = VectorScaling().fit(pred, targets)
    matrix = MatrixScaling(0.1, 0.1).fit(pred, targets)
    dirichlet = DirichletCalibration(0.1, 0.1).fit(pred, targets)
    for calibrator in (vector, matrix, dirichlet):
        assert calibrator.bias[[0, 3]].tolist() == [0.0, 0.0]
        assert abs(float(calibrator.bias.mean())) < 1e-6
        probs = calibrator(pred).probs
        assert probs.isfinite().all()
        assert (probs.mean(0) > 0.01).all()
        assert calibrator.diagnostics["converged"]
        assert calibrator.diagnostics["nll_after"] < calibrator.diagnostics["nll_before"]
    assert vector.scale[0] == vector.scale[3]
    assert float(vector.scale[0]) == pytest.approx(float(vector.scale[[1, 2, 4]].mean()), rel=1e-6)
    assert (matrix.weight[[1, 2, 4]][:, [0, 3]] == 0).all()


def test_one_class_only() -> None:
    logits, _ = classes(count=50)
    for make in OF_CLASSES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calibrator = make().fit(CategoricalPredictive(logits), torch.ones(50, dtype=torch.long))
        assert calibrator(CategoricalPredictive(logits)).probs.isfinite().all()
        assert calibrator.diagnostics["nll_after"] <= calibrator.diagnostics["nll_before"]
        assert (calibrator.get_buffer("bias") == 0).all()


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


def test_a_search_that_is_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = classes()
    monkeypatch.setattr("bayesguard.calibration.linear._ROUND", 2)
    monkeypatch.setattr("bayesguard.calibration.linear._minimise.__defaults__", (1e-6, 2))
    with pytest.warns(CalibrationWarning, match="did not converge in 2 iterations"):
        scaling = VectorScaling().fit(CategoricalPredictive(logits), targets)
    assert not scaling.diagnostics["converged"]
    assert scaling.diagnostics["nll_after"] <= scaling.diagnostics["nll_before"]


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_doing_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1 + seed % 3, 15, 3, generator=generator, dtype=torch.float64) * 10 ** (seed - 2)
    targets = (logits[0] + logits.std() * torch.randn(15, 3, generator=generator)).argmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of them are separable
        for make in OF_CLASSES:
            found = make().fit(CategoricalPredictive(logits), targets).diagnostics
            assert found["nll_after"] <= found["nll_before"]
        for kind in (PlattScaling, BetaCalibration):
            found = kind().fit(BernoulliPredictive(logits), targets[:, None] == torch.arange(3)).diagnostics
            assert found["nll_after"] <= found["nll_before"] + 1e-15


# -- masks and certainties


@pytest.mark.parametrize("make", OF_CLASSES)
def test_masked_classes_stay_masked(make: Callable[[], Calibrator]) -> None:
    logits, targets = classes(draws=2, num=4)
    rows = torch.arange(len(targets)) % 3 == 0
    masked = torch.zeros(len(targets), 4, dtype=torch.bool)
    masked[rows, (targets[rows] + 1) % 4] = True
    logits = logits.masked_fill(masked, -torch.inf)
    pred = CategoricalPredictive(logits)
    calibrator = make().fit(pred, targets)
    found = calibrator(pred).draw_logits
    assert not found.isnan().any()
    assert torch.equal(found == -torch.inf, masked.expand(2, -1, -1))
    assert calibrator.diagnostics["converged"]
    assert math.isfinite(calibrator.diagnostics["nll_after"])
    # A masked class is as if it were not there.
    narrow = VectorScaling().fit(CategoricalPredictive(logits[:, ~rows][..., :3]), targets[~rows].clamp_max(2))
    wide = VectorScaling()
    extra = torch.full_like(logits[:, ~rows][..., :1], -torch.inf)
    wide.fit(CategoricalPredictive(torch.cat([logits[:, ~rows][..., :3], extra], -1)), targets[~rows].clamp_max(2))
    torch.testing.assert_close(wide.scale[:3], narrow.scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", OF_CLASSES)
def test_impossible_targets_are_left_out(make: Callable[[], Calibrator]) -> None:
    logits, targets = classes()
    without = make().fit(CategoricalPredictive(logits[:, 2:]), targets[2:])
    logits[:, torch.arange(2), targets[:2]] = -torch.inf
    with pytest.warns(CalibrationWarning, match="2 of 400"):
        calibrator = make().fit(CategoricalPredictive(logits), targets)
    assert calibrator.diagnostics["num_excluded"] == 2
    assert calibrator.diagnostics["num_examples"] == 398
    torch.testing.assert_close(calibrator.get_buffer("bias"), without.get_buffer("bias"))
    pred = Predictive.from_probs([[1.0, 0.0], [1.0, 0.0]])
    with pytest.warns(CalibrationWarning, match="2 of 2"), pytest.raises(BadInput, match="probability zero"):
        make().fit(pred, [1, 1])


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
    logits, targets = classes(draws=2)
    logits[1] = -torch.inf
    logits[1, :, 0] = 0.0
    weighted = VectorScaling().fit(CategoricalPredictive(logits, [1, 0]), targets)
    alone = VectorScaling().fit(CategoricalPredictive(logits[:1]), targets)
    assert torch.equal(weighted.scale, alone.scale)
    odds, said = answers(draws=2)
    odds[1] = 100
    by_weight = PlattScaling().fit(BernoulliPredictive(odds, [1, 0]), said)
    assert torch.equal(by_weight.scale, PlattScaling().fit(BernoulliPredictive(odds[:1]), said).scale)


# -- invariances


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), which=st.integers(0, 2))
def test_order_of_rows_and_of_classes_does_not_matter(seed: int, which: int) -> None:
    logits, targets = classes(draws=2, count=150, seed=seed)
    rows = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
    columns = torch.randperm(4, generator=torch.Generator().manual_seed(seed + 1))
    first = OF_CLASSES[which]().fit(CategoricalPredictive(logits), targets)
    other = OF_CLASSES[which]().fit(CategoricalPredictive(logits[:, rows]), targets[rows])
    torch.testing.assert_close(other.get_buffer("bias"), first.get_buffer("bias"), atol=1e-4, rtol=0)
    renamed = OF_CLASSES[which]().fit(CategoricalPredictive(logits[..., columns]), columns.argsort()[targets])
    torch.testing.assert_close(renamed.get_buffer("bias"), first.get_buffer("bias")[columns], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        renamed(CategoricalPredictive(logits[..., columns])).probs,
        first(CategoricalPredictive(logits)).probs[:, columns],
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("kind", [MatrixScaling, DirichletCalibration])
def test_cross_validation_depends_on_the_examples_only(kind: Callable[[], MatrixScaling]) -> None:
    logits, targets = classes(num=3, count=300)
    first = kind().fit(CategoricalPredictive(logits), targets)
    again = kind().fit(CategoricalPredictive(logits), targets)
    assert torch.equal(first.weight, again.weight)
    other = kind().fit(CategoricalPredictive(logits.flip(1)), targets.flip(0))
    assert other.diagnostics["off_diagonal"] == first.diagnostics["off_diagonal"]
    assert other.diagnostics["bias"] == first.diagnostics["bias"]
    torch.testing.assert_close(other.weight, first.weight, atol=1e-4, rtol=0)


def test_cross_validation_chooses_what_fits_new_data() -> None:
    """Many classes and few examples: the free matrix learns them by heart, and the chosen one does not."""
    logits, targets = classes(num=8, count=600)
    pred, fitted, held = CategoricalPredictive(logits), slice(0, 200), slice(200, 600)
    free = MatrixScaling(0.0, 0.0).fit(pred[fitted], targets[fitted])
    chosen = MatrixScaling().fit(pred[fitted], targets[fitted])
    assert predicted_nll(chosen(pred[held]), targets[held]) < predicted_nll(free(pred[held]), targets[held]) - 0.02
    assert chosen.diagnostics["off_diagonal"] >= 10
    kept = MatrixScaling(off_diagonal=5.0).fit(pred[fitted], targets[fitted])
    assert kept.diagnostics["off_diagonal"] == 5.0
    kept = MatrixScaling(bias=0.5).fit(pred[fitted], targets[fitted])
    assert kept.diagnostics["bias"] == 0.5


def test_where_mixing_classes_helps_cross_validation_lets_it() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 2000, 3, generator=generator, dtype=torch.float64)
    targets = (logits[0] + logits[0].roll(1, -1)).softmax(-1).multinomial(1, generator=generator)[:, 0]
    assert MatrixScaling().fit(CategoricalPredictive(logits), targets).diagnostics["off_diagonal"] <= 1


def test_too_few_examples_to_choose_by() -> None:
    pred = CategoricalPredictive(torch.tensor([[[2.0, 0.0, 0.0]] * 5]))
    scaling = MatrixScaling().fit(pred, [0, 1, 2, 0, 0])
    assert scaling.diagnostics["off_diagonal"] == 1e5
    torch.testing.assert_close(scaling(pred).probs[0], torch.tensor([0.6, 0.2, 0.2]), atol=1e-3, rtol=0)


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


def test_dense_tasks() -> None:
    logits, targets = classes(draws=2)
    flat = VectorScaling().fit(CategoricalPredictive(logits), targets)
    dense = VectorScaling().fit(CategoricalPredictive(logits.reshape(2, 20, 5, 4, 4)), targets.reshape(20, 5, 4))
    torch.testing.assert_close(dense.scale, flat.scale, rtol=1e-6, atol=1e-6)
    assert dense(CategoricalPredictive(logits.reshape(2, 20, 5, 4, 4))).batch_shape == (20, 5, 4)


@pytest.mark.parametrize("make", OF_CLASSES + OF_ANSWERS)
def test_slices_do_not_change_the_answer(make: Callable[[], Calibrator], monkeypatch: pytest.MonkeyPatch) -> None:
    binary = make in OF_ANSWERS
    values, targets = answers(draws=3) if binary else classes(draws=3)
    pred = BernoulliPredictive(values) if binary else CategoricalPredictive(values)
    whole = make().fit(pred, targets)
    expected = whole(pred).draw_logits
    for module in ("bayesguard.predictive.numerics", "bayesguard.calibration.linear"):
        monkeypatch.setattr(f"{module}.BUDGET", 1000)
    sliced = make().fit(pred, targets)
    torch.testing.assert_close(sliced.get_buffer("bias"), whole.get_buffer("bias"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole(pred).draw_logits, expected)


# -- dtypes, state, inputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", OF_CLASSES + OF_ANSWERS)
def test_dtypes(make: Callable[[], Calibrator], dtype: torch.dtype) -> None:
    binary = make in OF_ANSWERS
    values, targets = answers(draws=2) if binary else classes(draws=2)
    given = values.to(dtype)
    pred = Predictive.from_logits(given, draws=True)
    exact = Predictive.from_logits(given.double(), draws=True)
    calibrator, wide = make().fit(pred, targets), make().fit(exact, targets)
    assert calibrator(pred).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(calibrator.get_buffer("bias"), wide.get_buffer("bias"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(calibrator(pred).mean.double(), wide(exact).mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", OF_CLASSES)
def test_autocast_does_not_round_the_matrix(make: Callable[[], Calibrator]) -> None:
    logits, targets = classes()
    pred = CategoricalPredictive(logits.float())
    calibrator = make().fit(pred, targets)
    expected = calibrator(pred).draw_logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(calibrator(pred).draw_logits, expected)


@pytest.mark.parametrize("make", OF_CLASSES + OF_ANSWERS)
def test_state_loads_into_a_fresh_one(make: Callable[[], Calibrator]) -> None:
    binary = make in OF_ANSWERS
    values, targets = answers(shape=(100, 3)) if binary else classes()
    pred = BernoulliPredictive(values) if binary else CategoricalPredictive(values)
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


def test_state_of_another_kind_is_refused() -> None:
    logits, targets = classes()
    fitted = VectorScaling().fit(CategoricalPredictive(logits), targets)
    with pytest.raises(RuntimeError, match="weight"):
        MatrixScaling().load_state_dict(fitted.state_dict())


@pytest.mark.parametrize("make", OF_CLASSES + OF_ANSWERS)
def test_gradients_reach_the_logits_and_fitting_leaves_none(make: Callable[[], Calibrator]) -> None:
    binary = make in OF_ANSWERS
    values, targets = answers() if binary else classes()
    values.requires_grad_()
    pred = BernoulliPredictive(values) if binary else CategoricalPredictive(values)
    calibrator = make().fit(pred, targets)
    assert not calibrator.get_buffer("bias").requires_grad
    (slope,) = torch.autograd.grad(calibrator(pred).log_prob(targets).sum(), values)
    assert slope.isfinite().all()
    assert slope.abs().max() > 0
    assert values.grad is None


@pytest.mark.parametrize("make", OF_CLASSES)
def test_predictives_of_classes_that_will_not_do(make: Callable[[], Calibrator]) -> None:
    logits, targets = classes(draws=2)
    pred = CategoricalPredictive(logits)
    with pytest.raises(NotFitted):
        make()(pred)
    with pytest.raises(BadInput, match="keep_draws=True"):
        make().fit(pred.reduce(), targets)
    fitted = make().fit(pred, targets)
    with pytest.raises(BadInput, match="keep_draws=True"):
        fitted(pred.reduce())
    with pytest.raises(BadInput, match="3 classes"):
        fitted(CategoricalPredictive(logits[..., :3]))
    with pytest.raises(BadType, match="PlattScaling"):
        make().fit(Predictive.from_logits(torch.zeros(3)), [0, 1, 0])
    with pytest.raises(BadType, match="PlattScaling"):
        fitted(Predictive.from_normal(torch.zeros(3), 1.0))
    with pytest.raises(BadInput, match="row 7"):
        make().fit(pred, torch.where(torch.arange(400) == 7, 4, targets))
    with pytest.raises(BadType, match="integer class labels"):
        make().fit(pred, targets.double())
    with pytest.raises(BadInput, match="shape"):
        make().fit(pred, targets[:, None])


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


@pytest.mark.parametrize("kind", [MatrixScaling, DirichletCalibration])
def test_strengths_are_checked(kind: Callable[..., MatrixScaling]) -> None:
    with pytest.raises(BadInput, match="off_diagonal must be at least 0"):
        kind(off_diagonal=-1.0)
    with pytest.raises(BadInput, match="bias must be at least 0"):
        kind(bias=math.nan)
    with pytest.raises(BadType, match="off_diagonal must be a number"):
        kind(off_diagonal="strong")
    assert "off_diagonal=1.0, bias=None" in repr(kind(off_diagonal=1))
