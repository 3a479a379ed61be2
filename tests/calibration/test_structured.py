"""Structured scaling: its optimum against SciPy, its limits, and what it saves where examples are few."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from bayesguard.calibration import MatrixScaling, StructuredScaling, TemperatureScaling, VectorScaling
from bayesguard.calibration.base import Calibrator
from bayesguard.calibration.linear_fit import Coordinates, Diagonal, Matrix, Shrinkage, _Point
from bayesguard.calibration.map_likelihood import MapLikelihood
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.predictive import CategoricalPredictive, Predictive
from tests.calibration.test_linear import Array, centred, classes, gradient, pooled_nll

Kind = Literal["matrix", "vector"]
KINDS: list[Kind] = ["matrix", "vector"]


def fitted(kind: Kind, strength: float, logits: Tensor, targets: Tensor) -> StructuredScaling:
    return StructuredScaling(kind, strength).double().fit(CategoricalPredictive(logits), targets)


def objective_of(
    kind: Kind, strength: float, logits: Tensor, targets: Tensor, powers: tuple[int, int, int] = (1, 1, 1)
) -> Callable[[Array], float]:
    """What is minimised, as the article has it: a function of `W / T` and b, flat, in plain NumPy."""
    temperature = float(TemperatureScaling().double().fit(CategoricalPredictive(logits), targets).temperature)
    x, y, num = centred(logits), targets.numpy(), logits.shape[-1]
    unit = strength / len(y)
    scales = [unit * each**power for each, power in zip((num, num * (num - 1), num), powers, strict=True)]

    def objective(at: Array) -> float:
        bias = at[-num:]
        matrix = np.diag(at[:num]) if kind == "vector" else at[:-num].reshape(num, num)
        own = temperature * np.diagonal(matrix) - 1
        beside = temperature * matrix[~np.eye(num, dtype=bool)]
        penalty = sum(s * np.square(v).sum() for s, v in zip(scales, (own, beside, bias), strict=True))
        ridge = np.square(matrix - np.eye(num) / temperature).sum() + np.square(bias).sum()
        return pooled_nll(x @ matrix.T + bias, y) + float(penalty) + 1e-6 * float(ridge)

    return objective


def flat(scaling: StructuredScaling) -> Array:
    return np.r_[scaling.weight.flatten().numpy(), scaling.bias.numpy()]


# -- exactness


@pytest.mark.parametrize("strength", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_optimum(kind: Kind, strength: float) -> None:
    logits, targets = classes(num=3, count=200)
    objective = objective_of(kind, strength, logits, targets)
    scaling = fitted(kind, strength, logits, targets)
    start = np.r_[np.eye(3).flatten() if kind == "matrix" else np.ones(3), np.zeros(3)]
    best = optimize.minimize(objective, start, options={"gtol": 1e-7})
    assert abs(objective(flat(scaling)) - best.fun) < 1e-10
    np.testing.assert_allclose(flat(scaling), best.x, atol=2e-5)
    assert np.abs(gradient(objective, flat(scaling))).max() < 1e-6
    # Another group's strength is another optimum.
    for powers in ((2, 1, 1), (1, 1, 2), (1, 2, 1))[: 3 if kind == "matrix" else 2]:
        other = objective_of(kind, strength, logits, targets, powers)
        assert np.abs(gradient(other, flat(scaling))).max() > 1e-5
    assert scaling.diagnostics["converged"]
    assert abs(float(scaling.bias.mean())) < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_several_draws_are_fitted_to_the_pooled_likelihood(kind: Kind) -> None:
    logits, targets = classes(num=3, count=300, draws=3)
    objective = objective_of(kind, 1.0, logits, targets)
    assert np.abs(gradient(objective, flat(fitted(kind, 1.0, logits, targets)))).max() < 1e-6
    one_by_one = fitted(kind, 3.0, logits.reshape(1, -1, 3), targets.repeat(3))
    assert np.abs(gradient(objective, flat(one_by_one))).max() > 1e-3


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("kind", [Matrix, Diagonal])
def test_slope_and_curvature_are_those_of_autograd(
    kind: Callable[[MapLikelihood, Shrinkage], Coordinates], draws: int
) -> None:
    logits, targets = classes(draws=draws, count=60)
    weights = torch.full((draws,), 1 / draws, dtype=torch.float64)
    features = VectorScaling._features(logits)
    coordinates = kind(
        MapLikelihood(logits, targets, weights, VectorScaling._features), Shrinkage(0.3, 0.5, 0.2, centre=0.6)
    )

    def value(at: Tensor) -> Tensor:
        factors, bias = coordinates.whole(coordinates.free(at))
        matrix = factors.diag() if factors.dim() == 1 else factors
        own = matrix.diagonal()
        penalty = 0.3 * (own - 0.6).square().sum() + 0.2 * bias.square().sum()
        penalty = penalty + 0.5 * (matrix - own.diag()).square().sum()
        log_probs = (features @ matrix.T + bias).log_softmax(-1)
        picked = log_probs.gather(-1, targets.expand(draws, -1)[..., None])[..., 0]
        return penalty - (picked.logsumexp(0) - math.log(draws)).mean()

    generator = torch.Generator().manual_seed(0)
    at, direction = torch.randn(2, coordinates.size, generator=generator, dtype=torch.float64) / 4
    point = _Point(coordinates, at)
    total, slope = torch.autograd.functional.vjp(value, at)
    _, curved = torch.autograd.functional.hvp(value, at, direction)
    assert point.value == pytest.approx(float(total), rel=1e-12)
    torch.testing.assert_close(point.gradient, slope, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(point.curvature()(direction), curved, rtol=1e-9, atol=1e-12)


# -- limits


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_strong_penalty_is_temperature_scaling(kind: Kind, draws: int) -> None:
    logits, targets = classes(draws=draws)
    pred = CategoricalPredictive(logits)
    temperature = TemperatureScaling().double().fit(pred, targets)
    scaling = fitted(kind, 1e9, logits, targets)
    assert scaling.diagnostics["temperature"] == pytest.approx(float(temperature.temperature), rel=1e-9)
    torch.testing.assert_close(scaling(pred).probs, temperature(pred).probs, atol=1e-6, rtol=0)
    assert (fitted(kind, 1.0, logits, targets)(pred).probs - temperature(pred).probs).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "free"), [("matrix", lambda: MatrixScaling(0.0, 0.0)), ("vector", VectorScaling)])
def test_without_a_penalty_it_is_plain_scaling(kind: Kind, free: Callable[[], Calibrator]) -> None:
    logits, targets = classes()
    pred = CategoricalPredictive(logits)
    expected = free().double().fit(pred, targets)
    scaling = fitted(kind, 0.0, logits, targets)
    torch.testing.assert_close(scaling(pred).probs, expected(pred).probs, atol=1e-4, rtol=0)
    assert scaling.diagnostics["nll_after"] == pytest.approx(expected.diagnostics["nll_after"], abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_of_each_example_changes_nothing(kind: Kind) -> None:
    logits, targets = classes()
    moved = logits + 5 * torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaling, other = (
        StructuredScaling(kind).double().fit(Predictive.from_logits(each[0]), targets) for each in (logits, moved)
    )
    torch.testing.assert_close(other.weight, scaling.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other.bias, scaling.bias, rtol=1e-6, atol=1e-7)


# -- what it is for


def held_out(
    calibrator: Calibrator, reference: Calibrator, count: int, num: int, shift: float, seed: int
) -> tuple[float, float]:
    """Mean difference of the NLL of new examples to that of the reference, and its standard error."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count + 4000, num, generator=generator, dtype=torch.float64)
    honest = logits / 1.5 + shift * torch.linspace(-1, 1, num, dtype=torch.float64)
    targets = honest.softmax(-1).multinomial(1, generator=generator)[:, 0]
    pred, new = (CategoricalPredictive(part[None]) for part in (logits[:count], logits[count:]))
    scores = [one.fit(pred, targets[:count])(new).log_prob(targets[count:]) for one in (reference, calibrator)]
    excess = (scores[0] - scores[1]).double()
    return float(excess.mean()), float(excess.std()) / math.sqrt(len(excess))


@pytest.mark.parametrize("kind", KINDS)
def test_few_examples_of_many_classes_learn_little_by_heart(kind: Kind) -> None:
    """150 examples of 20 classes: where a temperature is right, and where classes are a little off as well."""
    weak = StructuredScaling("matrix", 1e-3) if kind == "matrix" else VectorScaling()
    cost, error = held_out(StructuredScaling(kind), TemperatureScaling(), count=150, num=20, shift=0.0, seed=0)
    plain, its_error = held_out(weak, TemperatureScaling(), count=150, num=20, shift=0.0, seed=0)
    assert cost < 0.01 + 5 * error
    assert plain > 0.03 + 5 * its_error
    cost, error = held_out(StructuredScaling(kind), TemperatureScaling(), count=150, num=20, shift=0.6, seed=0)
    plain, its_error = held_out(weak, TemperatureScaling(), count=150, num=20, shift=0.6, seed=0)
    assert cost < -5 * error
    assert plain > 5 * its_error


@pytest.mark.parametrize("kind", KINDS)
def test_many_examples_get_what_a_temperature_cannot_give(kind: Kind) -> None:
    worse, error = held_out(StructuredScaling(kind), TemperatureScaling(), count=4000, num=6, shift=1.0, seed=0)
    assert worse < -5 * error - 0.05
    plain = MatrixScaling(0.0, 0.0) if kind == "matrix" else VectorScaling()
    worse, error = held_out(StructuredScaling(kind), plain, count=4000, num=6, shift=1.0, seed=0)
    assert worse < 5 * error


def test_mixed_classes_need_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3000, 3, generator=generator, dtype=torch.float64)
    targets = (logits + logits.roll(1, -1)).softmax(-1).multinomial(1, generator=generator)[:, 0]
    pred = CategoricalPredictive(logits[None])
    matrix, vector = (StructuredScaling(kind).fit(pred, targets).diagnostics["nll_after"] for kind in KINDS)
    assert matrix < vector - 0.1


# -- where there is no best map, and inputs


def test_a_temperature_at_its_bound_is_told() -> None:
    logits, _ = classes()
    with pytest.warns(CalibrationWarning, match="bound") as caught:
        scaling = StructuredScaling("vector", 100.0).fit(CategoricalPredictive(logits), logits[0].argmin(-1))
    assert caught[0].filename == __file__
    assert scaling.diagnostics["temperature"] == pytest.approx(100)
    assert scaling.diagnostics["nll_after"] < scaling.diagnostics["nll_before"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_without_targets_is_like_the_mean_of_the_others(kind: Kind) -> None:
    logits, targets = classes(count=600, num=5)
    seen = (targets != 0) & (targets != 3)
    scaling = fitted(kind, 1.0, logits[:, seen], targets[seen])
    assert scaling.bias[[0, 3]].tolist() == [0.0, 0.0]
    own = scaling.weight.diagonal() if kind == "matrix" else scaling.weight
    assert float(own[0]) == float(own[3])
    assert float(own[0]) == pytest.approx(float(own[[1, 2, 4]].mean()), abs=0.1)
    assert scaling.diagnostics["converged"]


def test_arguments_are_checked() -> None:
    with pytest.raises(BadInput, match='kind must be "matrix" or "vector", got \'full\''):
        StructuredScaling("full")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="strength must be at least 0"):
        StructuredScaling(strength=-1)
    with pytest.raises(BadInput, match="strength must be at least 0"):
        StructuredScaling(strength=math.nan)
    with pytest.raises(BadType, match="strength must be a number"):
        StructuredScaling(strength="strong")  # type: ignore[arg-type]
    assert repr(StructuredScaling("vector", 2)) == 'StructuredScaling("vector", strength=2, not fitted)'


@pytest.mark.parametrize("kind", KINDS)
def test_targets_that_many_numbers_could_tell_apart_are_still_calibrated(kind: Kind) -> None:
    """Twice as large logits would score better where they were fitted; the penalty, not the data, is what stops them."""
    logits, targets = classes(num=8, count=20)
    pred = CategoricalPredictive(logits)
    with pytest.warns(CalibrationWarning, match="separable"):
        MatrixScaling(0.0, 0.0).fit(pred, targets)
    scaling = fitted(kind, 1.0, logits, targets)
    assert not scaling.diagnostics["separable"]
    assert scaling.diagnostics["nll_after"] < TemperatureScaling().fit(pred, targets).diagnostics["nll_after"]
