"""Draws that depend on one another: their groups go where the draws go, and the Monte-Carlo error is between them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, Poisson

import bayesguard as bg
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import (
    BernoulliPredictive,
    CategoricalPredictive,
    ContinuousPredictive,
    CountPredictive,
    Predictive,
    Reduction,
    SamplePredictive,
    concatenate,
    mixture,
)
from bayesguard.predictive.groups import blocks, error_factor
from bayesguard.predictive.parts import Part, collect

GROUPS = [3, 3, 0, 0, 0, 7, 7]
WEIGHTS = [1.0, 2.0, 0.5, 1.5, 1.0, 3.0, 1.0]
# A twin that is wrong on purpose: the same statistic must see it.
WRONG = pytest.param(True, marks=pytest.mark.xfail(strict=True, raises=AssertionError))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kinds(draws: int = 7, count: int = 4, weights: Any = WEIGHTS) -> list[Predictive]:
    one, several = randn(draws, count), randn(draws, count, 3)
    return [
        CategoricalPredictive(several, weights),
        BernoulliPredictive(one, weights),
        ContinuousPredictive(Normal(one, one.exp()), weights),
        CountPredictive(Poisson(one.exp()), weights),
        SamplePredictive(several, weights),
    ]


def means(pred: Predictive) -> list[Tensor]:
    """The mean of every draw, `[N, ...]` each."""
    if isinstance(pred, CategoricalPredictive):
        return list(pred.draw_logits.softmax(-1))
    if isinstance(pred, BernoulliPredictive):
        return list(pred.draw_logits.sigmoid())
    return list(pred.samples) if isinstance(pred, SamplePredictive) else list(pred.component.mean)


def brute(values: list[Tensor], weights: list[float], groups: list[int]) -> Tensor:
    """The error between groups, term by term."""
    total = sum(weights)
    share = [weight / total for weight in weights]
    mean: Any = sum(w * value for w, value in zip(share, values, strict=True))
    between: Any = 0.0
    spread = 0.0
    for label in set(groups):
        mine = [s for s in range(len(groups)) if groups[s] == label]
        weight = sum(share[s] for s in mine)
        centre: Any = sum(share[s] * values[s] for s in mine)
        between = between + weight * (centre / weight - mean) ** 2
        spread += sum(share[s] ** 2 for s in mine) / weight
    spent = sum(w * w for w in share)
    error: Tensor = (between * spent / (spread - spent)) ** 0.5
    return error


@pytest.mark.parametrize("kind", range(5))
def test_error_between_groups_by_hand(kind: int) -> None:
    pred = kinds()[kind].with_groups(GROUPS)
    torch.testing.assert_close(pred.standard_error, brute(means(pred), WEIGHTS, GROUPS), rtol=1e-10, atol=0)
    single = kinds()[kind].with_groups(range(7))
    assert single.groups is None
    torch.testing.assert_close(single.standard_error, kinds()[kind].standard_error, rtol=0, atol=0)
    torch.testing.assert_close(single.standard_error, brute(means(pred), WEIGHTS, list(range(7))), rtol=1e-10, atol=0)


def test_equal_groups_have_the_textbook_factor() -> None:
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    assert error_factor(weights, blocks(40, 8)) == pytest.approx(1 / 4, rel=1e-12)
    assert error_factor(weights, None) == pytest.approx(1 / 39, rel=1e-12)
    assert error_factor(weights, torch.zeros(40, dtype=torch.long)) == math.inf


@pytest.mark.parametrize("kind", range(5))
def test_groups_go_with_the_draws(kind: int) -> None:
    pred = kinds()[kind].with_groups(GROUPS)
    assert pred.groups is not None
    torch.testing.assert_close(pred[1:3].standard_error, pred.standard_error[1:3], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        pred.to(torch.float32).standard_error.double(), pred.standard_error, rtol=1e-4, atol=1e-6
    )
    again = concatenate([pred[:1], pred[1:]])
    torch.testing.assert_close(again.standard_error, pred.standard_error, rtol=1e-12, atol=0)
    torch.testing.assert_close(pred.reduce().standard_error, pred.standard_error, rtol=1e-12, atol=0)
    with pytest.raises(BadInput, match="groups"):
        concatenate([pred[:1], kinds()[kind][1:]])
    independent = pred.with_groups(None)
    assert independent.groups is None
    assert torch.equal(pred.mean, independent.mean)


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("reduced", [False, True])
def test_groups_of_different_predictives_stay_apart(kind: int, reduced: bool) -> None:
    first, second = kinds()[kind].with_groups(GROUPS), kinds(5, weights=None)[kind]
    parts = [first.reduce(), second.reduce()] if reduced else [first, second]
    labels = [*GROUPS, 10, 11, 12, 13, 14]
    weights = [w / sum(WEIGHTS) for w in WEIGHTS] + [3 / 5] * 5
    found = mixture(parts, [1, 3])
    every = means(first) + means(second)
    torch.testing.assert_close(found.standard_error, brute(every, weights, labels), rtol=1e-10, atol=1e-14)
    members = mixture(parts, [1, 3], groups="members")
    by_member = brute(every, weights, [0] * 7 + [1] * 5)
    torch.testing.assert_close(members.standard_error, by_member, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(members.mean, found.mean, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("cuts", [[8, 16, 8, 4], [16, 20], [36]])
def test_reduction_online_is_reduction_at_once(kind: int, cuts: list[int]) -> None:
    whole = kinds(36, weights=None)[kind].with_groups(blocks(36, 8))
    assert isinstance(whole, (CategoricalPredictive, BernoulliPredictive))
    reduction = Reduction()
    for chunk in whole.draw_logits.split(cuts):
        reduction.update(type(whole)(chunk).with_groups(blocks(len(chunk), 8)))
    found = reduction.result()
    torch.testing.assert_close(found.standard_error, whole.standard_error, rtol=1e-10, atol=0)
    assert found.groups is not None
    assert whole.groups is not None
    assert torch.equal(found.groups, whole.groups)


def test_a_calibrator_of_draws_keeps_the_groups() -> None:
    pred = kinds(16, 40, None)[0].with_groups(blocks(16, 8))
    scaling = bg.calibration.TemperatureScaling()
    scaling.load_state_dict({"temperature": torch.tensor(2.0), "is_fitted": torch.tensor(True)})
    calibrated = scaling(pred)
    assert calibrated.groups is pred.groups
    expected = brute(means(calibrated), [1.0] * 16, [s // 8 for s in range(16)])
    torch.testing.assert_close(calibrated.standard_error, expected, rtol=1e-10, atol=0)


def test_weights_of_zero_have_no_say() -> None:
    logits = randn(6, 4, 3)
    pred = CategoricalPredictive(logits, [1, 1, 1, 1, 0, 0]).with_groups([0, 0, 1, 1, 2, 2])
    without = CategoricalPredictive(logits[:4]).with_groups([0, 0, 1, 1])
    torch.testing.assert_close(pred.standard_error, without.standard_error, rtol=1e-10, atol=0)


def test_bad_groups_are_named() -> None:
    pred = kinds()[0]
    for groups in ([0, 1], [0.5] * 7, [[0] * 7]):
        with pytest.raises(BadInput, match="groups must have one integer for each of the 7 draws"):
            pred.with_groups(groups)
    with pytest.raises(BadType, match="reduced"):
        pred.reduce().with_groups(GROUPS)
    with pytest.raises(BadInput, match="'within' or 'members'"):
        mixture([pred, pred], groups="both")  # type: ignore[arg-type]


def test_parts_of_a_member_are_one_group() -> None:
    draws = [randn(8, 5, 3, seed=seed) for seed in range(4)]
    parts = [Part(CategoricalPredictive(d), 0.25, member) for d, member in zip(draws, (0, 0, 1, 1), strict=True)]
    expected = brute(list(torch.cat(draws).softmax(-1)), [1.0] * 32, [0] * 16 + [1] * 16)
    for keep in (True, False):
        found = collect(iter(parts), keep)
        assert found.has_draws == keep
        torch.testing.assert_close(found.standard_error, expected, rtol=1e-10, atol=0)
    single = [Part(CategoricalPredictive(d[:1]), 0.25, member) for member, d in enumerate(draws)]
    assert not collect(iter(single), False).has_draws
    alone = collect(iter(parts[:2]), True)  # the only member: what is random is its draws
    assert alone.groups is None


# -- statistics

UNITS = 10
WEIGHT = randn(UNITS, 3, seed=11)


def balanced_draws(count: int, generator: torch.Generator) -> Tensor:
    """Logits `[count, 1, 3]` of a network of one layer, each unit dropped in exactly four of eight draws."""
    keep = torch.rand(count // 8, 8, UNITS, generator=generator).argsort(1) >= 4
    outputs: Tensor = (2.0 * keep.reshape(count, UNITS).double()).mm(WEIGHT).unsqueeze(1)
    return outputs


def z_of_claims(claims: Tensor, estimates: Tensor) -> float:
    """By how many of its standard errors the mean squared claim misses the variance of the estimates."""
    count = len(claims)
    found = (estimates - estimates.mean(0)).square() * (count / (count - 1))
    gap = claims.square() - found
    return float((gap.mean(0) / (gap.std(0) / math.sqrt(count))).abs().max())


@pytest.mark.parametrize("independent", [False, WRONG])
def test_claimed_error_is_that_of_balanced_draws(independent: bool) -> None:
    """Over 3,000 seeds of 32 draws; the twin takes the draws for independent and must fail."""
    generator = torch.Generator().manual_seed(1)
    preds = [CategoricalPredictive(balanced_draws(32, generator)) for _ in range(3000)]
    if not independent:
        preds = [pred.with_groups(blocks(32, 8)) for pred in preds]
    claims, found = torch.cat([p.standard_error for p in preds]), torch.cat([p.probs for p in preds])
    assert z_of_claims(claims, found) < 5


@pytest.mark.parametrize("within", [False, WRONG])
def test_claimed_error_of_an_ensemble_of_random_members(within: bool) -> None:
    """Three members of eight draws, over 1,500 ensembles; the twin forgets that draws of a member are alike."""
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(1500, 3, 1, 1, 3, generator=generator, dtype=torch.float64)
    logits = centres + 0.5 * torch.randn(1500, 3, 8, 1, 3, generator=generator, dtype=torch.float64)
    preds = [
        mixture([CategoricalPredictive(member) for member in ensemble], groups="within" if within else "members")
        for ensemble in logits
    ]
    claims, found = torch.cat([p.standard_error for p in preds]), torch.cat([p.probs for p in preds])
    assert z_of_claims(claims, found) < 5
