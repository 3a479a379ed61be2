"""The calibration error of chance against sums over all outcomes, and the p-values of calibrated predictions."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M
from bayesguard.metrics.functional.null import _law_of_hits

CONFIDENCES = st.lists(st.one_of(st.sampled_from([0.5, 0.6, 0.9, 1.0]), st.floats(0.5, 1)), min_size=1, max_size=8)


def both(confidences: list[float]) -> Tensor:
    top = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([top, 1 - top], -1)


def made(rows: int, classes: int = 10, seed: int = 0, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).softmax(-1)


def labels_of(probs: Tensor, seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(probs, count, replacement=True, generator=generator).t()


@settings(max_examples=20, deadline=None)
@given(confidences=CONFIDENCES, num_bins=st.integers(1, 20))
def test_mean_and_draws_are_those_of_all_outcomes(confidences: list[float], num_bins: int) -> None:
    probs = both(confidences)
    mean, possible = 0.0, []
    for labels in itertools.product((0, 1), repeat=len(confidences)):
        chance = math.prod(p if y == 0 else 1 - p for p, y in zip(confidences, labels, strict=True))
        error = M.expected_calibration_error(probs, torch.tensor(labels), num_bins=num_bins).item()
        mean += chance * error
        if chance > 0:
            possible.append(error)
    null = M.calibration_error_null(probs, num_bins=num_bins, num_resamples=20)
    assert null.mean.item() == pytest.approx(mean, abs=1e-12)
    assert null.mean.dtype == null.errors.dtype == torch.float64
    assert null.errors.shape == (20,)
    apart = (null.errors.unsqueeze(-1) - torch.tensor(possible, dtype=torch.float64)).abs().amin(-1)
    assert apart.max() < 1e-12


@settings(max_examples=60, deadline=None)
@given(chances=st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_law_of_hits_is_the_recursion(chances: list[float]) -> None:
    law = [1.0]
    for p in chances:
        law = [(law[k] if k < len(law) else 0) * (1 - p) + (law[k - 1] if k else 0) * p for k in range(len(law) + 1)]
    ours = _law_of_hits(torch.tensor(chances, dtype=torch.float64))
    torch.testing.assert_close(ours, torch.tensor(law, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 65_537])
def test_law_of_equal_chances_is_binomial(count: int) -> None:
    ours = _law_of_hits(torch.full((count,), 0.3, dtype=torch.float64))
    wanted = torch.from_numpy(stats.binom.pmf(range(count + 1), count, 0.3))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("rows", "wanted"), [(200, 0.085), (1000, 0.038), (10_000, 0.012)])
def test_the_floor_that_the_docs_name(rows: int, wanted: float) -> None:
    means = torch.stack([M.calibration_error_null(made(rows, seed=seed)).mean for seed in range(10)])
    rounded = 0.0005
    assert abs(means.mean() - wanted) < rounded + 5 * means.std() / math.sqrt(len(means))


def resampled(probs: Tensor, count: int) -> Tensor:
    """The error for labels drawn from the probabilities, set by set."""
    return torch.stack([M.expected_calibration_error(probs, labels) for labels in labels_of(probs, 1, count)])


@pytest.mark.parametrize("rows", [30, 400])
def test_draws_have_the_law_of_drawn_labels(rows: int) -> None:
    probs = made(rows, classes=4)
    null, brute = M.calibration_error_null(probs, num_resamples=4000), resampled(probs, 1000)
    for errors in (null.errors, brute):
        assert abs(errors.mean() - null.mean) < 5 * errors.std() / math.sqrt(len(errors))
    assert stats.ks_2samp(null.errors.numpy(), brute.numpy()).pvalue > 1e-4
    # The test sees a law that is wrong: that of labels drawn from flatter probabilities.
    wrong = torch.stack([M.expected_calibration_error(probs, labels) for labels in labels_of(probs.sqrt(), 1, 1000)])
    assert stats.ks_2samp(null.errors.numpy(), wrong.numpy()).pvalue < 1e-4


def p_values(probs: Tensor, labels: Tensor) -> Tensor:
    """One for each set of labels, from draws of its own: p-values of one null share its noise."""
    nulls = (M.calibration_error_null(probs, num_resamples=199, seed=seed) for seed in range(len(labels)))
    errors = (M.expected_calibration_error(probs, some) for some in labels)
    return torch.stack([null.p_value(error) for null, error in zip(nulls, errors, strict=True)])


def test_p_values_of_calibrated_predictions_are_uniform_and_of_others_small() -> None:
    probs = made(300)
    found = p_values(probs, labels_of(probs, 3, 150))
    assert stats.kstest(found.numpy(), "uniform").pvalue > 1e-4
    found = p_values(probs, labels_of(probs.sqrt(), 3, 20))
    assert found.max() < 0.05


def test_p_value_is_the_rank() -> None:
    null = M.calibration_error_null(both([0.75] * 4), num_bins=1, num_resamples=99)
    assert null.p_value(1.0).item() == 0.01
    assert null.p_value(0).item() == 1.0
    # Four rows have few errors: those drawn that equal the observed one count, however it was rounded.
    quarter = M.expected_calibration_error(both([0.75] * 4).float(), [0, 0, 0, 0], num_bins=1)
    share = (null.errors > 0.2).double().mean().item()
    assert null.p_value(quarter).item() == pytest.approx((1 + 99 * share) / 100)
    assert null.quantile(0.5) == null.errors.quantile(0.5)


def test_seed_order_shape_and_sure_rows() -> None:
    probs = made(60, classes=3)
    null = M.calibration_error_null(probs, num_resamples=50)
    assert torch.equal(null.errors, M.calibration_error_null(probs, num_resamples=50).errors)
    assert not torch.equal(null.errors, M.calibration_error_null(probs, num_resamples=50, seed=1).errors)
    dense = M.calibration_error_null(probs.reshape(6, 10, 3), num_resamples=50)
    assert torch.equal(null.errors, dense.errors)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert M.calibration_error_null(probs[order][:, [2, 0, 1]]).mean.item() == pytest.approx(
        null.mean.item(), abs=1e-14
    )
    sure = M.calibration_error_null([[1.0, 0.0]] * 5)
    assert sure.mean.item() == 0.0
    assert sure.errors.max().item() == 0.0
    state = torch.get_rng_state()
    M.calibration_error_null(probs)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_lower_precision_is_binned_as_the_error_is(dtype: torch.dtype) -> None:
    probs = both([0.6] * 10 + [0.8] * 10).to(dtype)  # on the edges of ten bins
    null = M.calibration_error_null(probs, num_bins=10)
    bins = M.reliability_bins(probs, [0] * 20, num_bins=10)
    assert bins.count.tolist()[5::2][:2] == [10.0, 10.0]
    apart = [M.calibration_error_null(part, num_bins=1).mean.item() for part in probs.split(10)]
    assert null.mean.item() == pytest.approx(sum(apart) / 2, abs=1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(BadInput, match="no distribution in row 1"):
        M.calibration_error_null([[0.5, 0.5], [0.5, 0.6]])
    with pytest.raises(BadInput, match="at least two classes"):
        M.calibration_error_null([0.5, 0.6])
    with pytest.raises(BadInput, match="at least one row"):
        M.calibration_error_null(torch.zeros(0, 2))
    with pytest.raises(BadType, match="floating point"):
        M.calibration_error_null([[1, 0]])
    for name in ("num_bins", "num_resamples"):
        with pytest.raises(BadInput, match=f"{name} must be at least 1"):
            M.calibration_error_null([[0.5, 0.5]], **{name: 0})
    with pytest.raises(BadInput, match="seed"):
        M.calibration_error_null([[0.5, 0.5]], seed=-1)
    null = M.calibration_error_null([[0.5, 0.5]])
    with pytest.raises(BadInput, match="level"):
        null.quantile(1.0)
    with pytest.raises(BadInput, match="error has NaN"):
        null.p_value(math.nan)
