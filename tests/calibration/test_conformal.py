"""Conformal prediction: the rank, coverage by simulation beside a twin that must fail, scores against brute force."""

import itertools
import math
import pickle
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.calibration import (
    Conformal,
    ConformalDistribution,
    ConformalInterval,
    ConformalQuantile,
    conformal_quantile,
)
from bayesguard.calibration.ranks import conformal_rank, weighted_bounds
from bayesguard.calibration.scores import class_scores, label_scores, row_uniforms
from bayesguard.calibration.split import SplitConformal
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted

ALPHA = 0.1


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The rank.


@pytest.mark.parametrize("alpha", ["0.01", "0.05", "0.1", "0.3", "0.7", "0.9"])
def test_ranks_are_those_of_exact_arithmetic(alpha: str) -> None:
    """Trap 15: in floats the rank for 0.7 of 9 scores is one too high."""
    for count in range(1, 400):
        want = math.ceil((count + 1) * (1 - Fraction(alpha)))
        assert conformal_rank(count, float(alpha)) == want


@pytest.mark.parametrize("count", [20, 100, 1000])
def test_coverage_of_the_quantile(count: int) -> None:
    """Trap E1, with the plain quantile as the twin that must fail where n is small."""
    trials = 10_000 if count == 20 else 2000
    scores = torch.randn(trials, count + 1, dtype=torch.float64, generator=generator(count))
    bounds = torch.tensor([conformal_quantile(row[:-1], ALPHA) for row in scores])
    covered = (scores[:, -1] <= bounds).double().mean().item()
    error = 5 * math.sqrt(ALPHA * (1 - ALPHA) / trials)
    assert 1 - ALPHA - error < covered < 1 - ALPHA + 1 / (count + 1) + error
    if count == 20:
        plain = (scores[:, -1] <= scores[:, :-1].quantile(1 - ALPHA, dim=1)).double().mean().item()
        assert plain < 1 - ALPHA - error


def test_too_few_scores_give_infinity_and_say_how_many() -> None:
    """Trap E1b."""
    with pytest.warns(CalibrationWarning, match="8 held-out examples are too few for alpha=0.1: 9 are needed"):
        assert conformal_quantile(torch.arange(8.0), ALPHA) == math.inf
    assert conformal_quantile(torch.arange(9.0), ALPHA) == 8


@pytest.mark.parametrize("scores", [torch.tensor([1.0, torch.nan]), torch.zeros(0), torch.zeros(2, 2)])
def test_scores_that_are_none(scores: Tensor) -> None:
    with pytest.raises(BadInput):
        conformal_quantile(scores, ALPHA)


# Scores of classes.


def brute(probs: list[float], score: str, u: float, penalty: float = 0.1, free: int = 2) -> list[float]:
    found = []
    for own in probs:
        above = sum(p for p in probs if p > own)
        tied = sum(p for p in probs if p == own)
        rank = sum(p >= own for p in probs)
        if score == "lac":
            found.append(1 - own)
        elif score == "saps":
            found.append(u * max(probs) if rank == 1 else max(probs) + (rank - 2 + u) * penalty)
        else:
            found.append(above + u * tied + (penalty * max(0, rank - free) if score == "raps" else 0))
    return found


@pytest.mark.parametrize("score", ["lac", "aps", "raps", "saps"])
@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.integers(0, 4), min_size=2, max_size=7).filter(any), seed=st.none() | st.integers(0, 9))
def test_scores_against_brute_force(score: Any, values: list[int], seed: int | None) -> None:
    probs = torch.tensor([values], dtype=torch.float64)
    probs = probs / probs.sum()
    u = 1.0 if seed is None else row_uniforms(probs, seed).item()
    want = torch.tensor([brute(probs[0].tolist(), score, u)], dtype=torch.float64)
    got = class_scores(probs, score, penalty=0.1, free_ranks=2, seed=seed)
    assert torch.allclose(got, want, atol=1e-12)
    order = torch.randperm(len(values), generator=generator(0))
    again = class_scores(probs[:, order], score, penalty=0.1, free_ranks=2, seed=seed)
    assert torch.allclose(again, got[:, order], atol=1e-12)


@pytest.mark.parametrize("score", ["lac", "aps", "raps", "saps"])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_labels_are_those_of_all_classes(score: Any, seed: int | None, dtype: torch.dtype) -> None:
    tied = torch.randint(1, 5, (1100, 300), generator=generator(5)).to(dtype)  # more rows than one slice holds
    smooth = torch.rand(1100, 300, generator=generator(6), dtype=torch.float64).to(dtype)
    underflown = (200 * smooth).softmax(-1).to(dtype)
    for probs in (tied / tied.sum(-1, keepdim=True), smooth / smooth.sum(-1, keepdim=True), underflown):
        labels = torch.randint(0, 300, (1100,), generator=generator(7))
        every = class_scores(probs, score, penalty=0.1, free_ranks=2, seed=seed)
        own = label_scores(probs, labels, score, penalty=0.1, free_ranks=2, seed=seed)
        assert own.dtype == torch.float64
        assert torch.allclose(own, every.gather(-1, labels[:, None])[:, 0], rtol=0, atol=1e-12)


def test_shares_are_uniform_and_belong_to_their_row() -> None:
    probs = torch.rand(20_000, 5, generator=generator(1)).softmax(-1)
    shares = row_uniforms(probs, 3)
    assert torch.equal(shares[100:110], row_uniforms(probs[100:110], 3))
    assert not torch.equal(shares, row_uniforms(probs, 4))
    statistic = (shares.sort().values - (torch.arange(20_000) + 0.5) / 20_000).abs().max() * 20_000**0.5
    assert statistic < 1.95  # Kolmogorov's distribution at 0.999


# Coverage of the methods.


def classes(rows: int, seed: int) -> tuple[bg.Predictive, Tensor]:
    """An overconfident classifier of five classes."""
    logits = 2 * torch.randn(rows, 5, generator=generator(seed))
    labels = logits.softmax(-1).multinomial(1, generator=generator(seed + 1)).squeeze(-1)
    return bg.Predictive.from_logits(2 * logits), labels


def numbers(rows: int, seed: int) -> tuple[bg.Predictive, Tensor]:
    """A mixture of two draws that is too sure, on targets whose noise depends on the input."""
    x = torch.rand(rows, generator=generator(seed))
    y = x + (0.5 + x) * torch.randn(rows, generator=generator(seed + 1))
    loc = torch.stack([x, x + 0.1])
    return bg.Predictive.from_normal(loc, (0.2 + 0.4 * x).expand(2, -1), draws=True), y


def covers(pred: Any, targets: Tensor, *alpha: float) -> Tensor:
    if hasattr(pred, "prediction_set"):
        members: Tensor = pred.prediction_set(*alpha).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return members
    lower, upper = pred.interval(*alpha)
    covered: Tensor = (lower <= targets) & (targets <= upper)
    return covered


METHODS: dict[str, tuple[Any, Any]] = {
    **{score: (lambda score=score: Conformal(score, ALPHA), classes) for score in ("lac", "aps", "raps", "saps")},
    "aps, not randomised": (lambda: Conformal("aps", ALPHA, randomised=False), classes),
    **{
        score: (lambda score=score: ConformalInterval(score, ALPHA), numbers)
        for score in ("absolute", "normalised", "cdf")
    },
    "quantile": (lambda: ConformalQuantile(ALPHA), numbers),
}


BY_GROUP: dict[str, Any] = {
    **{score: lambda score=score: Conformal(score, ALPHA, by="group") for score in ("lac", "aps", "raps", "saps")},
    "aps, not randomised": lambda: Conformal("aps", ALPHA, by="group", randomised=False),
    **{
        score: lambda score=score: ConformalInterval(score, ALPHA, by_group=True)
        for score in ("absolute", "normalised", "cdf")
    },
    "quantile": lambda: ConformalQuantile(ALPHA, by_group=True),
}
# By number of held-out examples, how many sets of them, and of new examples for each: sigma is below that of 2,000 single
# trials (0.0067) in every case.
TRIALS = {20: (2000, 10), 100: (1000, 5), 1000: (200, 20)}


@cache
def trials(data: Any, count: int) -> tuple[Any, Tensor, Any, Tensor]:
    """Held-out and new examples of every trial, one trial after another."""
    held, fresh = TRIALS[count][0] * count, TRIALS[count][0] * TRIALS[count][1]
    pred, targets = data(held + fresh, count)
    return pred[:held], targets[:held], pred[held:], targets[held:]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", TRIALS)
def test_coverage(method: str, count: int) -> None:
    """Trap E1: all trials at once, each a group; the plain quantile, and the predictive's own sets, must fail."""
    data, (sets, new) = METHODS[method][1], TRIALS[count]
    pred, targets, fresh, answers = trials(data, count)
    fitted = BY_GROUP[method]().fit(pred, targets, groups=torch.arange(sets).repeat_interleave(count))
    groups = torch.arange(sets).repeat_interleave(new)
    # By p-values first: sets that are never empty cover a little more.
    inside = fitted.p_values(fresh, answers, groups=groups) > ALPHA
    shares = inside.double().reshape(sets, new).mean(1)
    sigma = (shares.std() / sets**0.5).item()
    assert sigma < math.sqrt(ALPHA * (1 - ALPHA) / 2000)
    assert 1 - ALPHA - 5 * sigma < shares.mean() < 1 - ALPHA + 1 / (count + 1) + 5 * sigma
    covered = covers(fitted(fresh, groups=groups), answers)
    # In float32 a cdf near 1 and its inverse are apart by rounding.
    assert (covered < inside).double().mean() < 1e-3
    assert (covered > inside).double().mean() < (0.1 if data is classes else 1e-3)
    assert covers(fresh, answers, ALPHA).double().mean() < 1 - ALPHA - 5 * sigma
    if count == 20:
        plain = fitted.scores.reshape(sets, count).quantile(1 - ALPHA, dim=1)
        scores = fitted._score(fresh, answers).reshape(sets, new)
        assert (scores <= plain.unsqueeze(-1)).double().mean() < 1 - ALPHA - 5 * sigma


def test_each_class_is_covered() -> None:
    """Overall coverage hides a rare class that is never in its set."""
    shares: dict[str, list[Tensor]] = {"class": [], "all": []}
    for trial in range(60):
        logits = torch.randn(1000, 3, generator=generator(trial)) + torch.tensor([2.0, 2.0, -1.0])
        labels = (logits - torch.tensor([0.0, 0.0, -1.5])).softmax(-1).multinomial(1, generator=generator(trial + 9999))
        pred, labels = bg.Predictive.from_logits(logits), labels.squeeze(-1)
        for by in ("class", "all"):
            sets = Conformal("lac", ALPHA, by=by).fit(pred[:500], labels[:500])(pred[500:]).prediction_set()
            rare = labels[500:] == 2
            shares[by].append(sets[rare, 2].double().mean())
    covered = {by: torch.stack(values) for by, values in shares.items()}
    error = 5 * (covered["class"].std() / 60**0.5).item()
    assert covered["class"].mean() > 1 - ALPHA - error
    assert covered["all"].mean() < 1 - ALPHA - error


def test_each_group_is_covered_and_an_unknown_one_gets_everything() -> None:
    pred, y = numbers(4000, 5)
    groups = (y.argsort().argsort() % 2).long()
    y = torch.where(groups == 1, 3 * y, y)
    fitted = ConformalInterval("absolute", ALPHA, by_group=True).fit(pred[:2000], y[:2000], groups=groups[:2000])
    lower, upper = fitted(pred[2000:], groups=groups[2000:]).interval()
    covered = ((lower <= y[2000:]) & (y[2000:] <= upper)).double()
    for group in (0, 1):
        here = covered[groups[2000:] == group]
        assert abs(here.mean() - 0.9) < 5 * math.sqrt(0.09 / len(here) * 2)
    with pytest.warns(CalibrationWarning, match="0 held-out examples of group 7"):
        lower, upper = fitted(pred[:3], groups=torch.tensor([0, 7, 1])).interval()
    assert upper.isinf().tolist() == [False, True, False]
    with pytest.raises(BadInput, match="groups= goes with by_group=True"):
        fitted(pred)


def test_weights_repair_a_shift_of_the_inputs() -> None:
    """Held-out inputs are uniform, new ones are at the noisy end."""
    plain: list[Tensor] = []
    weighted: list[Tensor] = []
    for trial in range(40):
        x = torch.rand(3000, generator=generator(trial), dtype=torch.float64)
        x[2000:] = x[2000:].sqrt()  # density 2x
        y = x * torch.randn(3000, generator=generator(trial + 777), dtype=torch.float64)
        pred = bg.Predictive.from_normal(torch.zeros(3000).double(), 1.0)
        for kind, found in (("plain", plain), ("weighted", weighted)):
            weights = {} if kind == "plain" else {"weights": 2 * x[:2000]}
            fitted = ConformalInterval("absolute", ALPHA).fit(pred[:2000], y[:2000], **weights)
            new = {} if kind == "plain" else {"weights": 2 * x[2000:]}
            lower, upper = fitted(pred[2000:], **new).interval()
            found.append(((lower <= y[2000:]) & (y[2000:] <= upper)).double().mean())
    error = 5 * (torch.stack(weighted).std() / 40**0.5).item()
    assert abs(torch.stack(weighted).mean() - 0.9) < error + 1 / 1000
    assert torch.stack(plain).mean() < 0.9 - error
    assert fitted.diagnostics["effective_examples"] == pytest.approx(1500, rel=0.1)


def test_equal_weights_change_nothing() -> None:
    scores = torch.randn(57, dtype=torch.float64, generator=generator(0)).sort().values
    bounds = weighted_bounds(scores, torch.ones(57).double(), torch.ones(3).double(), ALPHA)
    assert bool((bounds == conformal_quantile(scores, ALPHA)).all())
    with pytest.warns(CalibrationWarning, match="1 of 2 new examples weigh more"):
        found = weighted_bounds(scores, torch.ones(57).double(), torch.tensor([1.0, 1000.0]).double(), ALPHA)
    assert found[1] == torch.inf


def test_a_saved_state_knows_that_there_were_weights() -> None:
    pred, y = bg.Predictive.from_normal(torch.zeros(99), 1.0), torch.randn(99, generator=generator(8))
    weighted, plain = ConformalInterval().fit(pred, y, weights=torch.ones(99)), ConformalInterval().fit(pred, y)
    for fitted in (weighted, plain):
        state = fitted.state_dict()
        loaded = ConformalInterval()
        loaded.load_state_dict(state)
        assert bool(loaded.is_weighted) == (fitted is weighted)
    with pytest.raises(BadInput, match="weights= is needed where fit had weights"):
        loaded(pred, weights=torch.ones(99))
    # A state of 1.0 says so only where weights differ.
    old = ConformalInterval().fit(pred, y, weights=torch.linspace(0.5, 1.5, 99)).state_dict()
    del old["is_weighted"]
    loaded.load_state_dict(old)
    assert loaded.is_weighted


def test_weights_that_leave_too_little_are_refused() -> None:
    pred, y = numbers(500, 1)
    weights = torch.full((500,), 1e-9)
    weights[:3] = 1.0
    with pytest.raises(BadInput, match=r"are worth 3\.0 equal ones"):
        ConformalInterval("cdf").fit(pred, y, weights=weights)
    fitted = ConformalInterval("cdf").fit(pred, y)
    with pytest.raises(BadInput, match="equal ones"):
        fitted.fit(pred, y, weights=weights)
    fitted(pred)  # what was fitted before stays


# What the calibrated predictive is.


@pytest.mark.parametrize("method", METHODS)
def test_all_else_is_as_it_was(method: str) -> None:
    make, data = METHODS[method]
    pred, targets = data(120, 3)
    calibrated: Any = make().fit(pred, targets)(pred)
    assert isinstance(calibrated, type(pred))
    assert torch.equal(calibrated.mean, pred.mean)
    assert torch.equal(calibrated.log_prob(targets), pred.log_prob(targets))
    part = calibrated[10:20]
    whole = covers(calibrated, targets)
    assert torch.equal(covers(part, targets[10:20]), whole[10:20])
    assert torch.equal(covers(pickle.loads(pickle.dumps(calibrated)), targets), whole)
    # Rounded otherwise, the one answer that is the bound itself may change sides.
    assert (covers(calibrated.to(torch.float64), targets) != whole).sum() <= 1
    if data is classes:
        assert bool(calibrated.prediction_set().gather(-1, pred.probs.argmax(-1, keepdim=True)).all())


@pytest.mark.parametrize("method", METHODS)
def test_states_and_smaller_alphas(method: str) -> None:
    make, data = METHODS[method]
    pred, targets = data(300, 3)
    fitted = make().fit(pred, targets)
    loaded = make()
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(covers(loaded(pred), targets), covers(fitted(pred), targets))
    if method == "quantile":
        with pytest.raises(BadInput, match=r"was fitted for alpha=0\.1, not 0\.2"):
            fitted(pred).interval(0.2)
        return
    answer: Any = fitted(pred)
    if data is classes:
        assert bool((answer.prediction_set(0.05) >= answer.prediction_set(0.3)).all())
    else:
        assert bool((answer.interval(0.05)[1] >= answer.interval(0.3)[1]).all())


def test_a_predictor_with_a_temperature_and_sets() -> None:
    torch.manual_seed(0)
    x = torch.randn(600, 4)
    labels = (x @ torch.randn(4, 3) + torch.randn(600, 3)).argmax(-1)
    predictor = bg.Deterministic(nn.Linear(4, 3))
    predictor.fit((x[:200], labels[:200]), epochs=20, batch_size=50)
    predictor.calibrate((x[200:400], labels[200:400]), bg.calibration.TemperatureScaling(), Conformal("lac", 0.2))
    sets = predictor(x[400:]).prediction_set()
    covered = sets.gather(-1, labels[400:].unsqueeze(-1)).double().mean()
    assert abs(covered - 0.8) < 0.15
    # Each stage has rows of its own.
    fitted: Any = list(predictor.calibrators)
    used = [calibrator.diagnostics["num_examples"] for calibrator in fitted]
    assert used == [100, 100]


def test_a_promise_comes_last_and_splits_by_hand_are_possible() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(400, 4), torch.randint(3, (400,))
    predictor = bg.Deterministic(nn.Linear(4, 3))
    with pytest.raises(BadInput, match="whose coverage it would undo"):
        predictor.calibrate((x, labels), Conformal(), bg.calibration.TemperatureScaling())
    predictor.calibrate((x[:200], labels[:200]))
    before = predictor(x).probs
    predictor.calibrate((x[200:], labels[200:]), Conformal("lac"), append=True)
    assert torch.equal(predictor(x).probs, before)
    assert len(predictor.calibrators) == 2
    with pytest.raises(BadInput, match="whose coverage it would undo"):
        predictor.calibrate((x, labels), append=True)
    assert len(predictor.calibrators) == 2


def test_several_targets_are_covered_each() -> None:
    loc = torch.zeros(400, 2)
    y = torch.randn(400, 2, generator=generator(0)) * torch.tensor([1.0, 3.0])
    pred = bg.Predictive.from_normal(loc, torch.tensor([1.0, 3.0]).expand(400, 2))
    lower, upper = ConformalInterval("normalised", ALPHA).fit(pred[:200], y[:200])(pred[200:]).interval()
    assert lower.shape == (200, 2)
    assert abs(((lower <= y[200:]) & (y[200:] <= upper)).double().mean() - 0.9) < 0.08


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "calibrator",
    [
        ConformalInterval("absolute"),
        ConformalInterval("normalised"),
        ConformalInterval("cdf"),
        ConformalQuantile(0.3),
        ConformalDistribution("absolute"),
    ],
)
def test_answers_on_an_end_are_held(calibrator: Any, dtype: torch.dtype) -> None:
    """Targets of few values are the ends of intervals; rounding of an end would lose all that are equal to it."""
    whole = torch.randint(-3, 4, (200,), generator=generator(0)).double()
    for scale, unit in itertools.product((0.07, 0.7, 1.3, 3.0), (0.7, 1.0)):
        pred = bg.Predictive.from_normal(torch.full((200,), 0.3, dtype=dtype), torch.tensor(scale, dtype=dtype))
        held = covers(calibrator.fit(pred, unit * whole)(pred), unit * whole, 0.3)
        assert held.sum() >= conformal_rank(200, 0.3)


@pytest.mark.parametrize("draws", [5, 10, 51])
def test_the_cdf_of_samples_keeps_its_promise(draws: int) -> None:
    """Between two samples and beyond the last one all answers have the same score, and the samples are no ends of theirs."""
    samples, y = torch.randn(draws, 2000, generator=generator(1)), torch.randn(2000, generator=generator(2))
    pred = bg.Predictive.from_samples(samples)
    calibrated = ConformalInterval("cdf").fit(pred[:1000], y[:1000])(pred[1000:])
    for alpha in (0.1, 0.3, 0.5):
        assert covers(calibrated, y[1000:], alpha).double().mean() > 1 - alpha - 5 * math.sqrt(2 * alpha / 1000)
    assert covers(calibrated, y[1000:], 0.5).double().mean() < 0.75  # not everything


def test_the_cdf_of_sure_predictives_keeps_its_promise() -> None:
    """Far out, cdfs of many answers are one number: of counts 0, of a mapped cdf next to 1 the last digits."""
    y = 5 * torch.randn(400, dtype=torch.float64, generator=generator(3))
    normal = bg.Predictive.from_normal(torch.zeros(400, dtype=torch.float64), 1.0)
    mapped = bg.predictive.RecalibratedPredictive(normal, [0.0, 1e-9, 1 - 1e-9, 1.0], [0.0, 0.3, 0.7, 1.0])
    far = bg.predictive.CountPredictive(torch.distributions.Poisson(torch.full((1, 400), 2000.0)))
    for pred, answers in ((normal, y), (mapped, y), (normal.to(torch.float32), y), (far, y.abs().round())):
        calibrated = ConformalInterval("cdf").fit(pred, answers)(pred)
        for alpha in (0.1, 0.3, 0.5):
            assert covers(calibrated, answers, alpha).sum() >= conformal_rank(400, alpha)


PRED, LABELS = classes(50, 0)
REAL, Y = numbers(50, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Conformal("margin"), BadInput, "score must be one of 'lac', 'aps'"),  # type: ignore[arg-type]
        (lambda: Conformal(alpha=1.0), BadInput, "alpha must be strictly between"),
        (lambda: Conformal(by="row"), BadInput, "by must be"),  # type: ignore[arg-type]
        (lambda: Conformal(penalty=-1.0), BadInput, "penalty must be"),
        (lambda: Conformal().fit(REAL, Y), BadType, "for numbers use ConformalInterval"),
        (lambda: ConformalInterval().fit(PRED, LABELS), BadType, "use Conformal for classes"),
        (lambda: ConformalInterval("width"), BadInput, "score must be one of 'absolute'"),  # type: ignore[arg-type]
        (lambda: Conformal()(PRED), NotFitted, "not fitted"),
        (lambda: Conformal().fit(PRED, LABELS + 9), BadInput, "labels must be in"),
        (lambda: Conformal().fit(PRED, LABELS, groups=LABELS), BadInput, "goes with by_group"),
        (lambda: Conformal(by="group").fit(PRED, LABELS, groups=LABELS.float()), BadType, "integers"),
        (lambda: Conformal().fit(PRED, LABELS, weights=-torch.ones(50)), BadInput, "0 or more"),
        (lambda: ConformalInterval().fit(REAL, torch.where(Y > 0, Y, torch.nan)), BadInput, "targets"),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_every_kind_is_a_calibrator() -> None:
    assert issubclass(Conformal, SplitConformal)
    assert all(kind.needs_own_data for kind in (Conformal, ConformalInterval, ConformalQuantile))
