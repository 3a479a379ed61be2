"""Linear maps of the logits of K classes: their optima against SciPy and scikit-learn, and where there is none."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import optimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from bayesguard.calibration.base import Calibrator
from bayesguard.calibration.linear import DirichletCalibration, MatrixScaling, VectorScaling
from bayesguard.calibration.structured import StructuredScaling
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted
from bayesguard.predictive import CategoricalPredictive, Predictive

Array = npt.NDArray[np.float64]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OF_CLASSES: list[Callable[[], Calibrator]] = [
    VectorScaling,
    lambda: MatrixScaling(0.3, 0.1),
    lambda: DirichletCalibration(0.3, 0.1),
    StructuredScaling,
    lambda: StructuredScaling("vector"),
]


def classes(draws: int = 1, count: int = 400, num: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Over-confident and lopsided logits `[S, N, K]`, and targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, num, generator=generator, dtype=torch.float64)
    honest = logits / 2 + torch.linspace(-1, 1, num, dtype=torch.float64)
    targets = honest.softmax(-1).multinomial(1, generator=generator)[:, 0]
    return logits + torch.randn(draws, count, num, generator=generator, dtype=torch.float64), targets


def centred(logits: Tensor) -> Array:
    return (logits - logits.mean(-1, keepdim=True)).numpy()


def pooled_nll(logits: Array, targets: Array) -> float:
    """Mean of -log of the mean over draws of softmax(logits)[y], `[S, N, K]`, in plain NumPy."""
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    chosen = log_probs[:, np.arange(len(targets)), targets.astype(int)]
    most = chosen.max(0)
    return float(-(most + np.log(np.exp(chosen - most).mean(0))).mean())


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


def test_a_strong_penalty_is_vector_scaling() -> None:
    logits, targets = classes()
    pred = CategoricalPredictive(logits)
    vector = VectorScaling().fit(pred, targets)
    matrix = MatrixScaling(off_diagonal=1e8, bias=0.0).fit(pred, targets)
    torch.testing.assert_close(matrix.weight.diagonal(), vector.scale, atol=1e-3, rtol=0)
    torch.testing.assert_close(matrix(pred).probs, vector(pred).probs, atol=1e-3, rtol=0)


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


# -- where there is no best map


@pytest.mark.parametrize(
    ("make", "sign"), [*((make, 1.0) for make in OF_CLASSES), *((make, -1.0) for make in OF_CLASSES[:3])]
)
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


def test_two_classes_that_fit_ever_better_as_votes() -> None:
    """Of sixteen draws most are right in every example: no logits part the classes, and yet the factor has no end."""
    generator = torch.Generator().manual_seed(0)
    said = torch.arange(120) % 2
    right = torch.rand(16, 120, generator=generator) < 0.9
    odds = 3.0 * torch.where(right, 2 * said - 1, 1 - 2 * said)
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


# -- masks


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


def test_draws_without_weight_do_not_count() -> None:
    logits, targets = classes(draws=2)
    logits[1] = -torch.inf
    logits[1, :, 0] = 0.0
    weighted = VectorScaling().fit(CategoricalPredictive(logits, [1, 0]), targets)
    alone = VectorScaling().fit(CategoricalPredictive(logits[:1]), targets)
    assert torch.equal(weighted.scale, alone.scale)


# -- invariances


def test_dense_tasks() -> None:
    logits, targets = classes(draws=2)
    flat = VectorScaling().fit(CategoricalPredictive(logits), targets)
    dense = VectorScaling().fit(CategoricalPredictive(logits.reshape(2, 20, 5, 4, 4)), targets.reshape(20, 5, 4))
    torch.testing.assert_close(dense.scale, flat.scale, rtol=1e-6, atol=1e-6)
    assert dense(CategoricalPredictive(logits.reshape(2, 20, 5, 4, 4))).batch_shape == (20, 5, 4)


@pytest.mark.parametrize("make", OF_CLASSES)
def test_slices_do_not_change_the_answer(make: Callable[[], Calibrator], monkeypatch: pytest.MonkeyPatch) -> None:
    values, targets = classes(draws=3)
    pred = CategoricalPredictive(values)
    whole = make().fit(pred, targets)
    expected = whole(pred).draw_logits
    for module in ("bayesguard.predictive.numerics", "bayesguard.calibration.map_likelihood"):
        monkeypatch.setattr(f"{module}.BUDGET", 100)  # of 4,800 numbers
        monkeypatch.setattr(f"{module}.CACHED", 1000)
    sliced = make().fit(pred, targets)
    torch.testing.assert_close(sliced.get_buffer("bias"), whole.get_buffer("bias"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole(pred).draw_logits, expected)


# -- dtypes, state, inputs


def check_dtype(make: Callable[[], Calibrator], values: Tensor, targets: Tensor, dtype: torch.dtype) -> None:
    given = values.to(dtype)
    pred = Predictive.from_logits(given, draws=True)
    exact = Predictive.from_logits(given.double(), draws=True)
    calibrator, wide = make().fit(pred, targets), make().fit(exact, targets)
    assert calibrator(pred).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(calibrator.get_buffer("bias"), wide.get_buffer("bias"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(calibrator(pred).mean.double(), wide(exact).mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", OF_CLASSES)
def test_dtypes(make: Callable[[], Calibrator], dtype: torch.dtype) -> None:
    check_dtype(make, *classes(draws=2), dtype)


@pytest.mark.parametrize("make", OF_CLASSES)
def test_autocast_does_not_round_the_matrix(make: Callable[[], Calibrator]) -> None:
    logits, targets = classes()
    pred = CategoricalPredictive(logits.float())
    calibrator = make().fit(pred, targets)
    expected = calibrator(pred).draw_logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(calibrator(pred).draw_logits, expected)


@pytest.mark.parametrize("make", OF_CLASSES)
def test_state_loads_into_a_fresh_one(make: Callable[[], Calibrator]) -> None:
    values, targets = classes()
    pred = CategoricalPredictive(values)
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
    with pytest.raises(BadInput, match="the state is of VectorScaling"):
        MatrixScaling().load_state_dict(fitted.state_dict())


@pytest.mark.parametrize("make", OF_CLASSES)
def test_gradients_reach_the_logits_and_fitting_leaves_none(make: Callable[[], Calibrator]) -> None:
    values, targets = classes()
    values.requires_grad_()
    pred = CategoricalPredictive(values)
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


@pytest.mark.parametrize("kind", [MatrixScaling, DirichletCalibration])
def test_strengths_are_checked(kind: Callable[..., MatrixScaling]) -> None:
    with pytest.raises(BadInput, match="off_diagonal must be at least 0"):
        kind(off_diagonal=-1.0)
    with pytest.raises(BadInput, match="bias must be at least 0"):
        kind(bias=math.nan)
    with pytest.raises(BadType, match="off_diagonal must be a number"):
        kind(off_diagonal="strong")
    assert "off_diagonal=1.0, bias=None" in repr(kind(off_diagonal=1))
