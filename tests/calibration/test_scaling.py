"""Temperature scaling; its optimum is compared with exact answers in tests/exactness/test_temperature.py."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesguard.calibration import TemperatureScaling
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive


def problem(draws: int = 5, count: int = 80, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(count, classes, generator=generator)
    targets = (logits + 4 * torch.randn(count, classes, generator=generator)).argmax(-1)
    return logits + 2 * torch.randn(draws, count, classes, generator=generator), targets


def test_one_temperature_for_every_draw() -> None:
    logits, targets = problem()
    pred = CategoricalPredictive(logits, [1, 2, 3, 4, 5])
    scaling = TemperatureScaling().fit(pred, targets)
    calibrated = scaling(pred)
    assert isinstance(calibrated, CategoricalPredictive)
    torch.testing.assert_close(calibrated.draw_logits, (logits / float(scaling.temperature)).log_softmax(-1))
    assert torch.equal(calibrated.weights, pred.weights)
    nll = -float(calibrated.log_prob(targets).double().mean())
    assert nll == pytest.approx(scaling.diagnostics["nll_after"], rel=1e-6)
    assert scaling.diagnostics["nll_before"] == pytest.approx(-float(pred.log_prob(targets).double().mean()), rel=1e-6)
    assert scaling.diagnostics["nll_after"] < scaling.diagnostics["nll_before"]
    assert not scaling.diagnostics["at_bound"]


def test_fitting_again_finds_nothing_left() -> None:
    logits, targets = problem()
    pred = CategoricalPredictive(logits.double())
    calibrated = TemperatureScaling().fit(pred, targets)(pred)
    again = TemperatureScaling().fit(calibrated, targets)
    assert float(again.temperature) == pytest.approx(1.0, abs=1e-5)
    assert again.diagnostics["nll_after"] <= again.diagnostics["nll_before"]


@pytest.mark.parametrize("seed", range(5))
def test_never_worse_than_doing_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 12, 3, generator=generator, dtype=torch.float64) * 10 ** (2 * seed - 4)
    targets = (logits[0] + logits.std() * torch.randn(12, 3, generator=generator)).argmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of them end at a bound
        scaling = TemperatureScaling().fit(CategoricalPredictive(logits), targets)
    assert scaling.diagnostics["nll_after"] <= scaling.diagnostics["nll_before"]


def test_yes_or_no_is_two_classes() -> None:
    logits, targets = problem(classes=2)
    odds = logits[..., 1] - logits[..., 0]
    binary = TemperatureScaling().fit(BernoulliPredictive(odds), targets)
    classes = TemperatureScaling().fit(CategoricalPredictive(logits), targets)
    assert float(binary.temperature) == pytest.approx(float(classes.temperature), rel=1e-5)
    probs = binary(BernoulliPredictive(odds)).mean
    torch.testing.assert_close(probs, classes(CategoricalPredictive(logits)).mean[:, 1], rtol=1e-4, atol=1e-6)


def test_several_labels_and_dense_tasks() -> None:
    logits, targets = problem(classes=2)
    odds = (logits[..., 1] - logits[..., 0]).reshape(5, 40, 2)
    labels = TemperatureScaling().fit(BernoulliPredictive(odds), targets.reshape(40, 2))
    dense = TemperatureScaling().fit(CategoricalPredictive(logits.reshape(5, 10, 4, 2, 2)), targets.reshape(10, 4, 2))
    assert float(labels.temperature) == pytest.approx(float(dense.temperature), rel=1e-5)
    assert labels(BernoulliPredictive(odds)).batch_shape == (40, 2)
    assert dense.diagnostics["num_examples"] == 80


def test_probabilities_and_logits_agree() -> None:
    logits, targets = problem(draws=1)
    by_logits = TemperatureScaling().fit(Predictive.from_logits(logits[0].double()), targets)
    probs = logits[0].double().softmax(-1).numpy()
    by_probs = TemperatureScaling().fit(Predictive.from_probs(probs), targets.numpy())
    assert float(by_probs.temperature) == pytest.approx(float(by_logits.temperature), rel=1e-6)


def test_certain_binary_probabilities() -> None:
    probs = torch.tensor([0.0, 1.0, 0.9, 0.8, 0.3, 0.9])
    answers = torch.tensor([0, 1, 1, 0, 0, 1])
    scaling = TemperatureScaling().fit(Predictive.from_probs(probs), answers)
    found = scaling(Predictive.from_probs(probs)).mean
    assert found[:2].tolist() == [0.0, 1.0]
    assert found.isfinite().all()


def test_float32_loses_nothing() -> None:
    """In float32 some libraries' optimisers do not move at all."""
    logits, targets = problem()
    single = TemperatureScaling().fit(CategoricalPredictive(logits), targets)
    double = TemperatureScaling().fit(CategoricalPredictive(logits.double()), targets)
    assert float(single.temperature) == pytest.approx(float(double.temperature), rel=1e-5)
    assert abs(float(single.temperature) - 1) > 0.1


def test_duplicated_data_and_order_do_not_matter() -> None:
    logits, targets = problem()
    once = TemperatureScaling().fit(CategoricalPredictive(logits), targets)
    twice = TemperatureScaling().fit(CategoricalPredictive(torch.cat([logits, logits], 1)), torch.cat([targets] * 2))
    assert float(twice.temperature) == pytest.approx(float(once.temperature), rel=1e-6)
    errors = once.diagnostics["standard_error"], twice.diagnostics["standard_error"]
    assert errors[0] / errors[1] == pytest.approx(np.sqrt(2), rel=1e-5)


def test_chunks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = problem()
    whole = TemperatureScaling().fit(CategoricalPredictive(logits), targets)
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 200)
    assert float(TemperatureScaling().fit(CategoricalPredictive(logits), targets).temperature) == pytest.approx(
        float(whole.temperature), rel=1e-7
    )


def test_a_sample_of_rows_is_enough_for_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = problem(count=2000)
    whole = TemperatureScaling().fit(CategoricalPredictive(logits), targets)
    monkeypatch.setattr("bayesguard.calibration.scaling.BUDGET", 8 * 20 * 100)
    assert float(TemperatureScaling().fit(CategoricalPredictive(logits), targets).temperature) == pytest.approx(
        float(whole.temperature), rel=1e-7
    )


def test_draws_without_weight_do_not_count() -> None:
    logits, targets = problem(draws=2)
    logits[1] = -torch.inf
    logits[1, :, 0] = 0.0
    weighted = TemperatureScaling().fit(CategoricalPredictive(logits, [1, 0]), targets)
    alone = TemperatureScaling().fit(CategoricalPredictive(logits[:1]), targets)
    assert float(weighted.temperature) == float(alone.temperature)


def test_predictives_that_will_not_do() -> None:
    logits, targets = problem()
    with pytest.raises(BadInput, match="keep_draws=True"):
        TemperatureScaling().fit(CategoricalPredictive(logits).reduce(), targets)
    fitted = TemperatureScaling().fit(CategoricalPredictive(logits), targets)
    with pytest.raises(BadInput, match="keep_draws=True"):
        fitted(CategoricalPredictive(logits).reduce())
    with pytest.raises(BadType, match="for classification"):
        TemperatureScaling().fit(Predictive.from_normal(torch.zeros(3), 1.0), torch.zeros(3))


def test_every_target_impossible() -> None:
    pred = Predictive.from_probs([[1.0, 0.0], [1.0, 0.0]])
    with pytest.warns(CalibrationWarning, match="2 of 2"), pytest.raises(BadInput, match="probability zero"):
        TemperatureScaling().fit(pred, [1, 1])


def test_votes_that_no_temperature_ends_get_the_mildest_one() -> None:
    """Sixteen draws, of which most name the target: the likelihood grows down to T = 0, but hardly."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    right = torch.rand(16, 120, generator=generator) < 0.9
    named = torch.where(right, labels, (labels + 1) % 3)
    logits = torch.nn.functional.one_hot(named, 3).double() * 3
    pred = Predictive.from_logits(logits, draws=True)
    with pytest.warns(CalibrationWarning, match="every draw is a vote"):
        scaling = TemperatureScaling().fit(pred, labels)

    def nll(temperature: float) -> float:
        return -Predictive.from_logits(logits / temperature, draws=True).log_prob(labels).mean().item()

    # Chi-square of one degree of freedom: 1.92 nats in all between the best and the one that is taken.
    assert scaling.diagnostics["at_bound"]
    assert abs(120 * (nll(float(scaling.temperature)) - nll(0.05)) - 1.92) < 0.01
    assert 0.05 < scaling.temperature < 1


@pytest.mark.parametrize("draws", [1, 5])
def test_whole_weights_are_repeated_examples(draws: int) -> None:
    logits, targets = problem(draws)
    counts = torch.randint(0, 4, (80,), generator=torch.Generator().manual_seed(1))
    pred = CategoricalPredictive(logits.double())
    weighted = TemperatureScaling().fit(pred, targets, weights=3.5 * counts)
    repeated = TemperatureScaling().fit(
        CategoricalPredictive(logits.double().repeat_interleave(counts, 1)), targets.repeat_interleave(counts)
    )
    assert float(weighted.temperature) == pytest.approx(float(repeated.temperature), rel=1e-7)  # as float32 keeps it
    for name in ("nll_before", "nll_after"):
        assert weighted.diagnostics[name] == pytest.approx(repeated.diagnostics[name], rel=1e-8)
    plain = TemperatureScaling().fit(pred, targets)
    assert float(plain.temperature) != pytest.approx(float(repeated.temperature), rel=1e-3)
    alike = TemperatureScaling().fit(pred, targets, weights=torch.full((80,), 2.0))
    assert float(alike.temperature) == pytest.approx(float(plain.temperature), rel=1e-7)
    assert alike.diagnostics["standard_error"] == pytest.approx(plain.diagnostics["standard_error"], rel=1e-7)


def test_weights_of_examples_with_several_labels() -> None:
    logits, targets = problem(classes=2)
    odds, answers = (logits[..., 1] - logits[..., 0]).double().reshape(5, 40, 2), targets.reshape(40, 2)
    counts = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(1))
    weighted = TemperatureScaling().fit(BernoulliPredictive(odds), answers, weights=counts)
    repeated = TemperatureScaling().fit(
        BernoulliPredictive(odds.repeat_interleave(counts, 1)), answers.repeat_interleave(counts, 0)
    )
    assert float(weighted.temperature) == pytest.approx(float(repeated.temperature), rel=1e-7)


def test_the_temperature_of_inputs_that_have_moved() -> None:
    """The logits are too large by a factor that grows with x; weights are the exact ratio of N(1, 1) to N(0, 1)."""

    def inputs(mean: float, count: int, seed: int) -> tuple[Tensor, Predictive, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = mean + torch.randn(count, generator=generator, dtype=torch.float64)
        logits = 2 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
        labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
        return x, Predictive.from_logits(logits * (0.5 * x).exp().unsqueeze(1)), labels

    x, pred, labels = inputs(0.0, 20_000, 0)
    _, moved, truth = inputs(1.0, 20_000, 1)
    weighted = TemperatureScaling().fit(pred, labels, weights=(x - 0.5).exp())
    wanted, plain = TemperatureScaling().fit(moved, truth), TemperatureScaling().fit(pred, labels)
    tolerance = 5 * np.hypot(weighted.diagnostics["standard_error"], wanted.diagnostics["standard_error"])
    # Errors follow x, and so do weights: the information is not quite that of the effective number.
    assert abs(float(weighted.temperature - wanted.temperature)) < 1.5 * tolerance
    assert abs(float(plain.temperature - wanted.temperature)) > 3 * tolerance


@pytest.mark.parametrize("weights", [torch.ones(79), -torch.ones(80), torch.zeros(80), torch.full((80,), torch.nan)])
def test_bad_weights(weights: Tensor) -> None:
    logits, targets = problem()
    with pytest.raises(BadInput, match="weights"):
        TemperatureScaling().fit(CategoricalPredictive(logits), targets, weights=weights)


@pytest.mark.parametrize("every", [28, 2])
def test_many_draws_and_classes_whose_mistakes_few_rows_do_not_show(every: int) -> None:
    """Of so many draws and classes a search may start from some rows only; here every 2nd or 28th has no mistake."""
    generator, rows = torch.Generator().manual_seed(0), torch.arange(3000)
    labels = rows % 150
    logits = 4 * torch.nn.functional.one_hot(labels, 150) + torch.randn(32, 3000, 150, generator=generator)
    mistaken = (rows % 5 == 3) & (rows % every != 0)
    targets = torch.where(mistaken, (labels + 1) % 150, labels)
    scaling = TemperatureScaling().fit(CategoricalPredictive(logits), targets)
    grid = torch.linspace(0.8, 1.25, 10)
    pooled = torch.stack([-(logits / at).softmax(-1).mean(0)[rows, targets].log().mean() for at in grid])
    assert scaling.diagnostics["nll_after"] < float(pooled.min()) + 1e-5
    assert float(scaling.temperature) != 1.0
