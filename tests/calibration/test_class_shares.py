"""Shares by maximum of the posterior against brute force, and the test of a shift: exact, of the right level, and strong."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import f, ttest_1samp, ttest_ind
from torch import Tensor

from bayesguard.calibration.class_shares import MeanTest, mean_test, most_likely_shares

OLD = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
NEW = torch.tensor([0.4, 0.2, 0.4], dtype=torch.float64)
CENTRES = 1.5 * torch.eye(3, dtype=torch.float64)


def predictions(shares: Tensor, rows: int, seed: int, power: float = 1.0) -> Tensor:
    """The posterior of a Gaussian mixture under `OLD`, of rows of these shares; calibrated where `power` is 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = shares.multinomial(rows, replacement=True, generator=generator)
    x = CENTRES[labels] + torch.randn(rows, 3, dtype=torch.float64, generator=generator)
    return (power * (OLD.log() - (x.unsqueeze(1) - CENTRES).square().sum(-1) / 2)).softmax(-1)


def penalised(shares: Tensor, probs: Tensor, centre: Tensor, strength: float) -> float:
    return float((probs @ (shares / OLD)).log().sum() + strength * (centre * shares.log()).sum())


@pytest.mark.parametrize("strength", [0.5, 3.0, 40.0])
def test_the_maximum_is_that_of_brute_force(strength: float) -> None:
    probs, centre = predictions(NEW, 60, 0), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)

    def loss(free: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
        logits = torch.cat([torch.from_numpy(free), torch.zeros(1, dtype=torch.float64)])
        return -penalised(logits.softmax(0), probs, centre, strength)

    best = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-13, "maxiter": 5000})
    want = torch.cat([torch.from_numpy(best.x), torch.zeros(1, dtype=torch.float64)]).softmax(0)
    found = most_likely_shares(probs, OLD, centre, strength)
    assert torch.allclose(found, want, atol=1e-6)
    assert not torch.allclose(most_likely_shares(probs, OLD, centre, 2 * strength), want, atol=1e-3)


def test_two_classes_along_the_line() -> None:
    score = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).square()
    probs, old = torch.stack([score, 1 - score], -1), torch.tensor([0.4, 0.6], dtype=torch.float64)

    def loss(share: float) -> float:
        shares = torch.tensor([share, 1 - share], dtype=torch.float64)
        return -float((probs @ (shares / old)).log().sum() + 2 * (old * shares.log()).sum())

    best = minimize_scalar(loss, bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-10})
    assert float(most_likely_shares(probs, old, old, 2)[0]) == pytest.approx(best.x, abs=1e-7)


def test_the_prior_fades_and_never_rules_out() -> None:
    sure = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    for rows in (1, 10, 1000):
        found = most_likely_shares(sure.expand(rows, 3), OLD, OLD, 3)
        assert torch.allclose(found, (rows * sure[0] + 3 * OLD) / (rows + 3), atol=1e-9)


def against(held: Tensor, probs: Tensor) -> MeanTest:
    centred = held - held.mean(0)
    found = mean_test(probs, held.mean(0), centred.T @ centred, len(held))
    assert found is not None
    return found


def test_of_two_classes_it_is_the_t_test() -> None:
    score = torch.rand(70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = torch.stack([score, 1 - score], -1)
    found, want = against(both[:50], both[50:]), ttest_ind(score[:50], score[50:])
    assert found.p_value == pytest.approx(want.pvalue, rel=1e-10)
    assert found.ratio == pytest.approx(want.statistic**2, rel=1e-10)
    known = mean_test(both, torch.tensor([0.4, 0.6]).double(), torch.zeros(2, 2).double(), 0)
    assert known is not None
    assert known.p_value == pytest.approx(ttest_1samp(score, 0.4).pvalue, rel=1e-6)


def test_of_three_classes_it_is_the_formula_whichever_class_is_left_out() -> None:
    held, new = predictions(OLD, 40, 0), predictions(NEW, 30, 1)
    for kept in ([0, 1], [0, 2], [1, 2]):
        first, second = held[:, kept].numpy(), new[:, kept].numpy()
        pooled = (39 * np.cov(first.T) + 29 * np.cov(second.T)) / 68
        gap = second.mean(0) - first.mean(0)
        want = gap @ np.linalg.inv(pooled) @ gap / (1 / 40 + 1 / 30) * 67 / (68 * 2)
        assert against(held, new).ratio == pytest.approx(want, rel=1e-9)
        assert against(held, new).p_value == pytest.approx(f.sf(want, 2, 67), rel=1e-9)


def test_what_cannot_be_tested() -> None:
    probs = predictions(OLD, 5, 0)
    assert mean_test(probs[:2], OLD, torch.zeros(3, 3).double(), 0) is None
    assert mean_test(probs[:1].expand(9, 3), probs[0], torch.zeros(3, 3).double(), 9) is None
    assert mean_test(probs[:3], OLD, torch.zeros(3, 3).double(), 0) is not None


def rejected(test: Callable[[Tensor, Tensor], bool], shares: Tensor, power: float) -> float:
    trials = 1500
    pairs = ((predictions(OLD, 150, 2 * s, power), predictions(shares, 100, 2 * s + 1, power)) for s in range(trials))
    return sum(test(held, new) for held, new in pairs) / trials


def by_mean(held: Tensor, new: Tensor) -> bool:
    return against(held, new).p_value < 0.05


def by_likelihood(held: Tensor, new: Tensor) -> bool:
    """2 (L(shares found) - L(old shares)), by the law of chi-square of 2 degrees."""
    found = most_likely_shares(new, OLD, OLD, 0.01)
    return 2 * float((new @ (found / OLD)).log().sum()) > 5.991


def by_mean_believed(held: Tensor, new: Tensor) -> bool:
    """As if the held-out mean had no error."""
    centred, many = held - held.mean(0), 10_000
    found = mean_test(new, held.mean(0), centred.T @ centred * many, len(held) * many)
    assert found is not None
    return found.p_value < 0.05


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_the_level_is_kept_calibrated_or_not(power: float) -> None:
    tolerance = 4 * (0.05 * 0.95 / 1500) ** 0.5
    rate = partial(rejected, shares=OLD, power=power)
    assert abs(rate(by_mean) - 0.05) < tolerance
    assert rate(by_mean_believed) > 0.05 + 2 * tolerance
    # The likelihood believes the probabilities: its level is right where they are.
    assert (abs(rate(by_likelihood) - 0.05) < tolerance) == (power == 1)


def test_a_shift_is_found() -> None:
    rate = rejected(by_mean, NEW, 1.0)
    assert rate > 0.5
    # As often as the likelihood finds it, which knows the old shares: the held-out mean has an error of its own.
    assert rate > 0.6 * rejected(by_likelihood, NEW, 1.0)
