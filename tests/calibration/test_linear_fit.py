"""The search for a linear map of K classes: its penalties, cross-validation, invariance and end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from bayesguard.calibration.linear import DirichletCalibration, MatrixScaling, VectorScaling
from bayesguard.calibration.map_likelihood import MapLikelihood
from bayesguard.errors import CalibrationWarning
from bayesguard.predictive import CategoricalPredictive
from tests.calibration.test_linear import OF_CLASSES, Array, centred, classes, gradient, pooled_nll, predicted_nll


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


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), which=st.integers(0, len(OF_CLASSES) - 1))
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


def test_a_search_that_is_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = classes()
    monkeypatch.setattr("bayesguard.calibration.trust_region._MOST_PRODUCTS", 1)
    monkeypatch.setattr("bayesguard.calibration.linear_fit.fit_map.__defaults__", (1e-6, 2))
    with pytest.warns(CalibrationWarning, match="did not converge in 2 iterations") as caught:
        scaling = VectorScaling().fit(CategoricalPredictive(logits), targets)
    assert caught[0].filename == __file__
    assert not scaling.diagnostics["converged"]
    assert scaling.diagnostics["nll_after"] <= scaling.diagnostics["nll_before"]


def test_weak_penalties_on_few_examples_converge() -> None:
    """100 numbers of which 500 examples tell little: plain LBFGS needs thousands of iterations."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 10, generator=generator)
    targets = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    probs = (1.5 * logits).softmax(-1).double()
    found = DirichletCalibration(1e-3, 1e-3).double().fit(CategoricalPredictive.from_probs(probs), targets)
    x, classes_of = probs.log(), torch.arange(10)

    def objective(at: torch.Tensor) -> torch.Tensor:
        matrix, shift = at[:, :10], at[:, 10]
        nll = torch.nn.functional.cross_entropy(x @ matrix.T + shift, targets)
        beside = matrix[classes_of[:, None] != classes_of]
        ridge = (matrix - torch.eye(10)).square().sum() + shift.square().sum()
        return nll + 1e-3 * beside.square().mean() + 1e-3 * shift.square().mean() + 1e-6 * ridge

    at = torch.cat([found.weight, found.bias[:, None]], 1).double().requires_grad_()
    value = objective(at)
    (slope,) = torch.autograd.grad(value, at)
    assert slope.norm() < 2e-6
    assert found.diagnostics["converged"]
    assert found.diagnostics["iterations"] < 300


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("diagonal", [True, False])
def test_curvature_is_that_of_autograd(draws: int, diagonal: bool) -> None:
    logits, targets = classes(draws=draws, count=40)
    logits[:, :5, 3] = -torch.inf
    targets[:5] = 0
    weights = torch.arange(1.0, draws + 1).double()
    likelihood = MapLikelihood(logits, targets, weights / weights.sum(), VectorScaling._features)
    generator = torch.Generator().manual_seed(0)
    shape = (4,) if diagonal else (4, 4)
    factors, bias, by_factors, by_bias = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, (4,), shape, (4,))
    )

    def nll(factors: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        mapped_to = (VectorScaling._features(logits) @ (factors.diag() if diagonal else factors).T) + bias
        log_probs = mapped_to.masked_fill(logits == -torch.inf, -1e9).log_softmax(-1)
        own = log_probs.gather(-1, targets.expand(draws, -1)[..., None])[..., 0]
        return -(own + likelihood.weights.log()[:, None]).logsumexp(0).mean()

    _, want = torch.autograd.functional.hvp(nll, (factors, bias), (by_factors, by_bias))
    got = likelihood.curvature(factors, bias)(by_factors, by_bias)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)
    _, slope = torch.autograd.functional.vjp(nll, (factors, bias))
    for one, other in zip(likelihood(factors, bias)[1:], slope, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)
