"""ShiftAwareScaling: families that it never saw, undisturbed data left alone, and the same class always."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.calibration import Conformal, ShiftAwareScaling, TemperatureScaling, shift_aware
from bayesguard.calibration.environments import Group, best_temperature, pooled_log_probs, signs_of, statistics_of
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted
from bayesguard.metrics.functional import expected_calibration_error

ROWS = 1500


def world(strength: float, seed: int, kind: str = "noise") -> tuple[bg.Predictive, Tensor]:
    """Five draws that see the truth through more noise the stronger the shift is, and take themselves for clear."""
    generator = torch.Generator().manual_seed(seed)
    truth = 3 * torch.randn(ROWS, 4, generator=generator)
    labels = truth.softmax(-1).multinomial(1, generator=generator).squeeze(-1)
    fade = 1 / (1 + strength) if kind == "noise" else 1 / (1 + strength) ** 0.7
    noise = 3 * (1 - fade**2) ** 0.5 * torch.randn(ROWS, 4, generator=generator)
    own = 0.5 * strength * torch.randn(5, ROWS, 4, generator=generator)
    return bg.Predictive.from_logits(fade * truth + noise + own, draws=True), labels


def joined(strengths: list[float], seed: int, kind: str = "noise") -> tuple[bg.Predictive, Tensor, Tensor]:
    parts = [world(strength, seed + k, kind) for k, strength in enumerate(strengths)]
    environments = torch.arange(len(parts)).repeat_interleave(ROWS)
    return bg.predictive.concatenate([p for p, _ in parts]), torch.cat([y for _, y in parts]), environments


STRENGTHS = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0]


def error(pred: Any, labels: Tensor) -> float:
    return float(expected_calibration_error(pred.probs, labels))


@pytest.mark.parametrize("mode", ["point", "set"])
def test_an_unseen_kind_of_shift(mode: Any) -> None:
    pred, labels, environments = joined([k / 10 for k in range(25)], 0)
    scaling = ShiftAwareScaling(mode).fit(pred, labels, environments=environments)
    plain = TemperatureScaling().fit(*world(0.0, 0))
    gains = []
    for strength in (0.5, 1.0, 1.8):
        new, truth = world(strength, 900 + int(10 * strength), kind="other")
        if mode == "set":
            scaling.adapt(new)
        gains.append((error(scaling(new), truth), error(plain(new), truth)))
    ours, theirs = (sum(values) for values in zip(*gains, strict=True))
    assert ours < (0.5 if mode == "set" else 0.8) * theirs
    clean, truth = world(0.0, 77)
    if mode == "set":
        scaling.adapt(clean)
    assert error(scaling(clean), truth) < error(plain(clean), truth) + 0.02


def test_the_constraint_on_undisturbed_data_matters() -> None:
    pred, labels, environments = joined(STRENGTHS, 0)
    found = ShiftAwareScaling().fit(pred, labels, environments=environments).diagnostics
    assert found["clean_ece"] <= found["clean_ece_upper"]
    assert found["perturbed_ece"] < found["perturbed_ece_with_one_temperature"]


def faded(strength: float, seed: int) -> tuple[bg.Predictive, Tensor]:
    """A perturbation that makes draws doubt, and costs next to no accuracy: doubt is exaggerated there."""
    pred, labels = world(0.0, seed)
    own = 0.15 * strength * torch.randn(5, ROWS, 4, generator=torch.Generator().manual_seed(seed + 1))
    return bg.Predictive.from_logits(pred.logits / (1 + strength) + own, draws=True), labels


@pytest.mark.parametrize("mode", ["point", "set"])
def test_perturbations_must_take_accuracy_down_to_chance(mode: Any) -> None:
    mild = [world(0.0, 0), *(faded(strength, 10 + k) for k, strength in enumerate((0.3, 0.6, 1.0, 1.5)))]
    strong = [*mild, *(world(strength, 20 + k) for k, strength in enumerate((1.0, 2.0, 3.0, 5.0)))]

    def fitted(parts: list[tuple[bg.Predictive, Tensor]]) -> ShiftAwareScaling:
        environments = torch.arange(len(parts)).repeat_interleave(ROWS)
        preds, labels = zip(*parts, strict=True)
        return ShiftAwareScaling(mode).fit(
            bg.predictive.concatenate(preds), torch.cat(labels), environments=environments
        )

    with pytest.warns(CalibrationWarning, match="too mild"):
        twin = fitted(mild)
    ours = fitted(strong)  # warnings are errors
    accuracies = [float((pred.labels == labels).double().mean()) for pred, labels in strong]
    assert ours.diagnostics["clean_accuracy"] == accuracies[0]
    assert ours.diagnostics["lowest_accuracy"] == min(accuracies)
    assert twin.diagnostics["lowest_accuracy"] == min(accuracies[1:5]) > (accuracies[0] + 0.25) / 2
    plain = TemperatureScaling().fit(*mild[0])

    def answer(scaling: ShiftAwareScaling, new: bg.Predictive) -> bg.Predictive:
        return (scaling.adapt(new) if mode == "set" else scaling)(new)

    gains, harms, costs = [], [], []
    for seed in range(8):
        new, truth = world(1.5, 1000 + seed, kind="other")
        errors = [error(answer(scaling, new), truth) for scaling in (ours, twin)] + [error(plain(new), truth)]
        gains.append(errors[2] - errors[0])
        harms.append(errors[1] - errors[2])
        assert torch.equal(answer(ours, new).labels, new.labels)
        clean, truth = world(0.0, 2000 + seed)
        costs.append(error(answer(ours, clean), truth) - error(plain(clean), truth))
    for values in (gains, harms):  # with strong ones it helps, and with mild ones alone it does harm
        each = torch.tensor(values)
        assert each.mean() > 5 * each.std() / math.sqrt(len(values))
    assert sum(costs) / len(costs) < 0.01
    if mode == "point":
        assert ours.diagnostics["clean_ece"] <= ours.diagnostics["clean_ece_upper"]


def mixed() -> tuple[bg.Predictive, Tensor, Tensor]:
    """Two kinds of perturbation: one that takes accuracy, and one that only makes draws doubt."""
    parts = [world(0.0, 0), *(faded(strength, 10 + k) for k, strength in enumerate((0.3, 0.6, 1.0, 1.5)))]
    parts += [world(strength, 20 + k) for k, strength in enumerate((0.3, 0.6, 1.0, 2.0, 3.0, 5.0))]
    preds, labels = zip(*parts, strict=True)
    return bg.predictive.concatenate(preds), torch.cat(labels), torch.arange(len(parts)).repeat_interleave(ROWS)


def test_its_own_seed_hardly_moves_the_temperature_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pred, labels, environments = mixed()
    # Surer than anything seen: what a set's temperature is there hangs on how the map goes on.
    new = [bg.Predictive.from_logits(1.7 * world(strength, 970 + k)[0].logits) for k, strength in enumerate((0.5, 1.5))]
    seeds = 24

    def deviation() -> float:
        """Of the log-temperature over seeds."""
        found = []
        for seed in range(seeds):
            scaling = ShiftAwareScaling("set", seed=seed).fit(pred, labels, environments=environments)
            found.append(torch.stack([scaling.adapt(batch).temperature.log() for batch in new]))
        return float(torch.stack(found).var(0).mean().sqrt())

    # The two sets go together: no more degrees of freedom than one would have.
    low, high = (math.sqrt((seeds - 1) / chi2.ppf(level, seeds - 1)) for level in (0.999, 0.001))
    assert deviation() * high < 0.1
    monkeypatch.setattr(shift_aware, "_WIDTH", 2.0)  # narrow, with the ridge that leaving environments out chose
    monkeypatch.setattr(shift_aware, "_SET_RIDGE", 1e-3)
    assert deviation() * low > 0.1


def test_a_smooth_map_leaves_undisturbed_sets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pred, labels, environments = joined([k / 10 for k in range(25)], 0)

    def found() -> dict[str, Any]:
        return ShiftAwareScaling("set").fit(pred, labels, environments=environments).diagnostics

    ours = found()
    assert ours["clean_share"] > 1
    assert ours["clean_ece"] <= ours["clean_ece_upper"]
    monkeypatch.setattr(shift_aware, "_MOST_SHARE", 1)
    twin = found()
    assert twin["clean_ece"] > twin["clean_ece_upper"] == ours["clean_ece_upper"]


def test_the_map_of_sets_by_brute_force() -> None:
    pred, labels, environments = mixed()
    scaling = ShiftAwareScaling("set").fit(pred, labels, environments=environments)
    log_probs = pooled_log_probs(pred)
    signs = signs_of(pred, log_probs)
    targets, owners = [], []
    for number in environments.unique().tolist():
        rows = environments == number
        count = 16 if number == 0 else 4
        targets += [math.log(best_temperature(Group(log_probs[rows], labels[rows], signs[rows])))] * count
        owners += [number] * count
    wanted, groups = torch.tensor(targets, dtype=torch.float64), torch.tensor(owners)
    centred = wanted - wanted.mean()
    apart = (scaling.sets.unsqueeze(1) - scaling.sets).square().sum(-1)
    width = 16 * apart[apart > 0].sqrt().median()
    kernel = (-apart / (2 * width**2)).exp()

    ridge = torch.where(groups == 0, 3e-3 / scaling.diagnostics["clean_share"], 3e-3).double()

    def solved(kept: Tensor) -> Tensor:
        return torch.linalg.solve(kernel[kept][:, kept] + ridge[kept].diag(), centred[kept])

    assert torch.allclose(scaling.set_weights, solved(torch.ones_like(groups).bool()), atol=1e-6)
    left_out = torch.cat(
        [
            centred[groups == number] - kernel[groups == number][:, groups != number] @ solved(groups != number)
            for number in groups.unique()
        ]
    )
    assert scaling.diagnostics["log_temperature_rmse"] == pytest.approx(
        float(left_out.square().mean().sqrt()), rel=1e-5
    )
    new, _ = world(0.8, 5)
    inside = pooled_log_probs(new)
    own = (statistics_of(signs_of(new, inside), inside) - scaling.set_scale[0]) / scaling.set_scale[1]
    want = wanted.mean() + (-(own - scaling.sets).square().sum(-1) / (2 * width**2)).exp() @ scaling.set_weights
    assert float(want) < max(targets)
    assert float(scaling.adapt(new).temperature.log()) == pytest.approx(float(want), abs=1e-6)


def test_the_polynomial_term_by_term() -> None:
    parts = [world(0.0, 0), world(1.0, 1), world(2.0, 2)]
    sizes = [1500, 900, 400]
    preds = [pred[:size] for (pred, _), size in zip(parts, sizes, strict=True)]
    labels = torch.cat([labels[:size] for (_, labels), size in zip(parts, sizes, strict=True)])
    environments = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    scaling = ShiftAwareScaling().fit(bg.predictive.concatenate(preds), labels, environments=environments)
    signs = [signs_of(pred, pooled_log_probs(pred)) for pred in preds]
    # Undisturbed data count as often as all perturbed ones.
    parts_of = (0.5, 0.25, 0.25)
    centre = torch.stack([part * own.mean(0) for part, own in zip(parts_of, signs, strict=True)]).sum(0)
    squares = [part * (own - centre).square().mean(0) for part, own in zip(parts_of, signs, strict=True)]
    spread = torch.stack(squares).sum(0).sqrt()
    assert torch.allclose(scaling.centre, centre)
    assert torch.allclose(scaling.spread, spread)
    new, _ = world(0.7, 5)
    log_probs = pooled_log_probs(new)
    found = scaling(new).logits.double().squeeze(0).log_softmax(-1)
    c = scaling.coefficients.tolist()
    assert len(c) == 10
    assert all(abs(value) > 1e-6 for value in c)
    for row, own in enumerate(signs_of(new, log_probs)[:40]):
        u = [min(4.0, max(-4.0, float(value))) for value in (own - scaling.centre) / scaling.spread]
        linear = c[0] + c[1] * u[0] + c[2] * u[1] + c[3] * u[2]
        square = c[4] * u[0] ** 2 + c[5] * u[0] * u[1] + c[6] * u[0] * u[2]
        square += c[7] * u[1] ** 2 + c[8] * u[1] * u[2] + c[9] * u[2] ** 2
        temperature = math.exp(math.log(20) * math.tanh((linear + square / 4) / math.log(20)))
        assert torch.allclose(found[row], (log_probs[row] / temperature).log_softmax(-1), atol=1e-5)


def test_a_state_of_the_linear_temperature_loads() -> None:
    pred, labels, environments = joined(STRENGTHS, 0)
    scaling = ShiftAwareScaling().fit(pred, labels, environments=environments)
    scaling.coefficients[4:] = 0
    state = scaling.state_dict()
    loaded = ShiftAwareScaling()
    loaded.load_state_dict({**state, "coefficients": state["coefficients"][:4]})
    new, _ = world(1.0, 5)
    assert torch.equal(loaded(new).probs, scaling(new).probs)
    with pytest.raises(RuntimeError, match="size mismatch for coefficients"):
        loaded.load_state_dict({**state, "coefficients": state["coefficients"][:5]})


@pytest.mark.parametrize("mode", ["point", "set"])
def test_the_class_stays_and_states_load(mode: Any) -> None:
    pred, labels, environments = joined(STRENGTHS, 0)
    scaling = ShiftAwareScaling(mode).fit(pred, labels, environments=environments)
    new, _ = world(1.0, 5)
    if mode == "set":
        before = scaling(new).probs
        clean = (new.logits.double() / scaling.clean_temperature).softmax(-1).float()
        assert torch.allclose(before, clean, atol=1e-6)
        scaling.adapt(new)
        assert not torch.equal(scaling(new).probs, before)
    assert torch.equal(scaling(new).labels, new.labels)
    loaded = ShiftAwareScaling(mode)
    loaded.load_state_dict(scaling.state_dict())
    assert torch.equal(loaded(new).probs, scaling(new).probs)
    assert torch.allclose(scaling(new[:7]).probs, scaling(new).probs[:7])


def test_a_masked_class_changes_nothing_and_impossible_targets_are_left_out() -> None:
    pred, labels, environments = joined([0.0, 0.5, 1.0, 2.0], 0)
    wider = bg.Predictive.from_logits(F.pad(pred.draw_logits, (0, 1), value=-torch.inf), draws=True)
    plain = ShiftAwareScaling().fit(pred, labels, environments=environments)
    masked = ShiftAwareScaling().fit(wider, labels, environments=environments)
    assert torch.allclose(masked(wider).probs[:, :4], plain(pred).probs, atol=1e-4)
    wrong = labels.clone()
    wrong[::7] = 4
    with pytest.warns(CalibrationWarning, match="858 of 6000 targets have probability zero in every draw"):
        left = ShiftAwareScaling().fit(wider, wrong, environments=environments)
    kept = wrong != 4
    want = ShiftAwareScaling().fit(pred[kept], labels[kept], environments=environments[kept])
    assert torch.allclose(left(wider).probs[:, :4], want(pred).probs, atol=1e-4)


def test_the_best_temperature_is_that_of_temperature_scaling() -> None:
    logits = 4 * torch.randn(800, 5, generator=torch.Generator().manual_seed(0))
    labels = (logits / 3).softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(1)).squeeze(-1)
    pred = bg.Predictive.from_logits(logits)
    group = Group(pred.logits.double(), labels, torch.zeros(800, 3))
    want = float(TemperatureScaling().fit(pred, labels).temperature)
    assert best_temperature(group) == pytest.approx(want, rel=1e-3)


def test_a_predictor_passes_its_data_through_the_shifts() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(240, 1, 8, 8), torch.arange(240) % 3
    images[:, 0, :4] += labels[:, None, None] / 3
    images = images.clamp(0, 1)
    predictor = bg.Deterministic(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    predictor.fit((images, labels), epochs=10, batch_size=40)
    shifts: list[Any] = [bg.shift.Corruption("gaussian_noise", severity) for severity in (1, 3, 5)]
    shifts += bg.shift.pairs(bg.shift.suite("images"), 2)
    scaling = ShiftAwareScaling(shifts=shifts)
    predictor.calibrate((images, labels), TemperatureScaling(), scaling, Conformal("lac"))
    assert scaling.diagnostics["num_environments"] == 6
    fitted: Any = list(predictor.calibrators)
    assert fitted[0].diagnostics["num_examples"] == fitted[2].diagnostics["num_examples"] == 120
    assert predictor(images).prediction_set().shape == (240, 3)
    with pytest.raises(BadInput, match="can be read once only"):
        predictor.calibrate(iter([(images, labels)]), ShiftAwareScaling(shifts=shifts))


def test_dense_predictions_are_refused_by_name() -> None:
    network, maps = nn.Conv2d(1, 3, 1), bg.likelihoods.Categorical(class_dim=1)
    shifts: list[Any] = [bg.shift.Corruption("contrast", severity) for severity in (1, 3)]
    images, labels = torch.rand(6, 1, 8, 8), torch.zeros(6, 8, 8, dtype=torch.long)
    with pytest.raises(
        BadType, match=r"one class of several an example, got a CategoricalPredictive of batch shape \(18, 8"
    ):
        bg.Deterministic(network, maps).calibrate((images, labels), ShiftAwareScaling(shifts=shifts))


def test_a_predictor_adapts_to_unlabelled_data() -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(240, 1, 8, 8), torch.arange(240) % 3
    images[:, 0, :4] = (images[:, 0, :4] + labels[:, None, None] / 3).clamp(0, 1)
    predictor = bg.Deterministic(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    predictor.fit((images, labels), epochs=10, batch_size=40)
    shifts: list[Any] = ["content", *(bg.shift.Corruption("gaussian_noise", severity) for severity in (1, 3, 5))]
    scaling = ShiftAwareScaling("set", shifts=shifts)
    predictor.calibrate((images, labels), TemperatureScaling(), scaling)
    batch = bg.shift.Corruption("contrast", 5)(images)
    before = predictor.predict(batch)
    predictor.adapt(batch)
    plain = bg.Deterministic(predictor.network)
    plain.calibrators = nn.ModuleList([next(iter(predictor.calibrators))]).eval()
    want = ShiftAwareScaling("set")
    want.load_state_dict(scaling.state_dict())
    assert torch.equal(want.adapt(plain.predict(batch)).temperature, scaling.temperature)
    assert not torch.equal(predictor.predict(batch).probs, before.probs)
    assert len(predictor.calibrators) == 2
    with pytest.raises(BadInput, match="no calibrator follows unlabelled data"):
        plain.adapt(batch)


PRED, LABELS, ENVIRONMENTS = joined([0.0, 0.5, 1.0], 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ShiftAwareScaling("batch"), BadInput, "mode must be"),  # type: ignore[arg-type]
        (lambda: ShiftAwareScaling().fit(PRED, LABELS), BadInput, "pass environments="),
        (lambda: ShiftAwareScaling().fit(PRED, LABELS, environments=ENVIRONMENTS + 1), BadInput, "must have 0"),
        (lambda: ShiftAwareScaling().fit(PRED, LABELS, environments=ENVIRONMENTS[:5]), BadInput, "shape"),
        (lambda: ShiftAwareScaling("set").adapt(PRED), NotFitted, "not fitted"),
        (
            lambda: ShiftAwareScaling().fit(PRED, LABELS, environments=ENVIRONMENTS).adapt(PRED),
            BadInput,
            'adapt is for mode="set"',
        ),
        (
            lambda: ShiftAwareScaling("set").fit(PRED, LABELS, environments=ENVIRONMENTS).adapt(PRED[:50]),
            BadInput,
            "need 100 at least",
        ),
        (
            lambda: ShiftAwareScaling().fit(bg.Predictive.from_normal([0.0], [1.0]), [0.0], environments=[0]),
            BadType,
            "one class of several",
        ),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
