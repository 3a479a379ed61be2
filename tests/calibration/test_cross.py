"""Cross-conformal sets and intervals of real predictors: every count by hand, and what is refused."""

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.calibration import Conformal, CrossConformal, cross_conformal, jackknife_plus_after_bootstrap
from bayesguard.errors import BadInput, CalibrationWarning
from bayesguard.likelihoods import Gaussian, HeteroscedasticGaussian

ALPHA = 0.2


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 4, generator=generator(seed))
    return x, (x[:, :3] + torch.randn(rows, 3, generator=generator(seed + 1))).argmax(-1)


def numbers(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 4, generator=generator(seed))
    return x, x.sum(-1, keepdim=True) + torch.randn(rows, 1, generator=generator(seed + 1))


def classifier(seed: int) -> bg.Predictor:
    return bg.Deterministic(nn.Linear(4, 3), seed=seed)


@pytest.fixture(scope="module")
def of_classes() -> CrossConformal:
    return cross_conformal(classifier, classes(60), num_folds=4, score="lac", alpha=ALPHA, epochs=20, batch_size=15)


def test_sets_are_those_of_the_paper(of_classes: CrossConformal) -> None:
    """Romano et al. (2020), eq. 11, one comparison at a time."""
    x, labels = classes(60)
    new = torch.randn(10, 4, generator=generator(9))
    probs = [predictor.predict(x).probs.double() for predictor in of_classes.predictors]
    at_new = [predictor.predict(new).probs.double() for predictor in of_classes.predictors]
    folds = of_classes._plan.unseen.long().argmax(0)
    assert folds.bincount().tolist() == [15] * 4
    for alpha in (0.2, 0.5):
        sets: Tensor = of_classes(new).prediction_set(alpha)
        for row in range(10):
            for label in range(3):
                stranger = sum(
                    bool(1 - probs[int(folds[i])][i, labels[i]] < 1 - at_new[int(folds[i])][row, label])
                    for i in range(60)
                )
                best = torch.stack(at_new).mean(0)[row].argmax() == label
                assert sets[row, label] == (stranger < round((1 - alpha) * 61, 9) or best)


def test_what_a_call_returns(of_classes: CrossConformal) -> None:
    new = torch.randn(10, 4, generator=generator(9))
    pred: Any = of_classes(new)
    mean = torch.stack([predictor.predict(new).probs for predictor in of_classes.predictors]).mean(0)
    assert torch.allclose(pred.probs, mean, atol=1e-6)
    assert torch.equal(pred[3:5].prediction_set(), pred.prediction_set()[3:5])
    assert torch.equal(pickle.loads(pickle.dumps(pred)).prediction_set(), pred.prediction_set())
    assert bool((pred.prediction_set(0.05) >= pred.prediction_set(0.3)).all())
    with pytest.warns(CalibrationWarning, match="60 held-out examples are too few for alpha=0.01"):
        assert bool(pred.prediction_set(0.01).all())


def test_coverage_of_sets_where_networks_learn_by_heart() -> None:
    """Many features and few rows: the score of training rows is the twin that must fail."""
    covered, twin = [], []
    for trial in range(12):
        x = torch.randn(440, 30, generator=generator(trial))
        labels = (x[:, :2] + torch.randn(440, 2, generator=generator(trial + 100))).argmax(-1)
        train, new = (x[:40], labels[:40]), (x[40:], labels[40:])

        def factory(seed: int) -> bg.Predictor:
            return bg.Deterministic(nn.Linear(30, 2), seed=seed)

        settings: dict[str, Any] = {"epochs": 30, "batch_size": 40, "optimizer": lambda p: torch.optim.Adam(p, 0.1)}
        cross = cross_conformal(factory, train, num_folds=5, score="lac", alpha=ALPHA, seed=trial, **settings)
        sets: Any = cross(new[0])
        covered.append(sets.prediction_set().gather(-1, new[1][:, None]).double().mean())
        whole = factory(0)
        whole.fit(train, **settings)
        naive: Any = Conformal("lac", ALPHA).fit(whole.predict(train[0]), train[1])(whole.predict(new[0]))
        twin.append(naive.prediction_set().gather(-1, new[1][:, None]).double().mean())
    found, plain = torch.stack(covered), torch.stack(twin)
    error = 5 * (found.std() / 12**0.5).item()
    assert found.mean() > 1 - ALPHA - error
    assert found.mean() > 1 - 2 * ALPHA
    assert plain.mean() < 1 - ALPHA - error


@pytest.mark.parametrize("score", ["absolute", "normalised"])
def test_intervals_after_the_bootstrap_by_hand(score: Any) -> None:
    x, y = numbers(30)
    y = torch.cat([y, -2 * y], dim=-1)
    likelihood = HeteroscedasticGaussian() if score == "normalised" else Gaussian()

    def network(_: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Unflatten(-1, (2, 2))) if score == "normalised" else nn.Linear(4, 2)

    ensemble = bg.DeepEnsemble(network, likelihood, num_members=12, bootstrap=True, seed=3)
    ensemble.fit((x, y), epochs=3, batch_size=10)
    cross = jackknife_plus_after_bootstrap(ensemble, (x, y), score=score, alpha=ALPHA)
    new = torch.randn(5, 4, generator=generator(8))
    lower, upper = cross(new).interval(ALPHA)
    assert lower.shape == (5, 2)
    members: list[Any] = [member.predict(x) for member in ensemble.members]
    at_new: list[Any] = [member.predict(new) for member in ensemble.members]
    rows = [ensemble.member_data((torch.arange(30), torch.arange(30)), m)[0].tolist() for m in range(12)]

    def mixed(preds: list[Any], out: list[int], row: int, column: int) -> tuple[float, float]:
        means = torch.stack([preds[m].mean[row, column].double() for m in out])
        variances = torch.stack([preds[m].variance[row, column].double() for m in out])
        spread = (variances.mean() + means.var(unbiased=False)).sqrt().item() if score == "normalised" else 1.0
        return means.mean().item(), spread

    for column in range(2):
        for point in range(5):
            below, above = [], []
            for i in range(30):
                out = [m for m in range(12) if i not in rows[m]]
                centre, unit = mixed(members, out, i, column)
                residual = abs(y[i, column].item() - centre) / unit
                centre, unit = mixed(at_new, out, point, column)
                below.append(centre - unit * residual)
                above.append(centre + unit * residual)
            # 31 * 0.2 = 6.2 and 31 * 0.8 = 24.8
            assert lower[point, column].item() == pytest.approx(sorted(below)[5], rel=1e-5, abs=1e-5)
            assert upper[point, column].item() == pytest.approx(sorted(above)[24], rel=1e-5, abs=1e-5)


def test_coverage_of_intervals() -> None:
    def factory(seed: int) -> bg.Predictor:
        return bg.Deterministic(nn.Linear(4, 1), Gaussian(), seed=seed)

    x, y = numbers(2100, 4)
    settings: dict[str, Any] = {"epochs": 20, "batch_size": 25, "optimizer": lambda p: torch.optim.Adam(p, 0.05)}
    cross = cross_conformal(factory, (x[:100], y[:100]), num_folds=5, alpha=0.1, **settings)
    lower, upper = cross((x[100:], y[100:])).interval()
    covered = ((lower <= y[100:]) & (y[100:] <= upper)).double().mean()
    # Of one training set of 100: by its own luck and by that of 2,000 new rows.
    assert abs(covered - 0.9) < 5 * math.sqrt(0.09 / 100 + 0.09 / 2000)


def test_the_same_seed_gives_the_same_folds_and_predictors() -> None:
    first, again, other = (
        cross_conformal(classifier, classes(20), num_folds=2, alpha=0.5, epochs=1, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.scores, again.scores)
    assert not torch.equal(first._plan.unseen, other._plan.unseen)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_conformal(classifier, classes(5), num_folds=6, epochs=1), "num_folds must be between 2"),
        (lambda: cross_conformal(classifier, classes(5), num_folds=1, epochs=1), "num_folds must be between 2"),
        (lambda: cross_conformal(classifier, classes(5), 2, score="absolute", epochs=1), "is for numbers"),
        (lambda: CrossConformal([classifier(0)], classes(5), torch.ones(1, 5).bool()), "no row can be scored"),
        (lambda: CrossConformal([classifier(0)], classes(5), torch.zeros(2, 5).bool()), "seen has shape"),
        (
            lambda: jackknife_plus_after_bootstrap(bg.DeepEnsemble(lambda _: nn.Linear(4, 3)), classes(5)),
            "make it with DeepEnsemble",
        ),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        call()
