"""Predictives of real numbers; their values are compared with brute force in tests/exactness."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Beta,
    Categorical,
    Gamma,
    Gumbel,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
)

from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import ContinuousPredictive, Predictive


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(df: float = 3.0, draws: int = 4, count: int = 6) -> ContinuousPredictive:
    return ContinuousPredictive(StudentT(torch.tensor(df), randn(draws, count), randn(draws, count).exp()))


@pytest.mark.parametrize("level", [1e-9, 0.1, 0.5, 0.99, 1 - 1e-6])
def test_quantile_inverts_cdf(level: float) -> None:
    component = Gumbel(randn(4, 6).double(), randn(4, 6).exp().double())  # one that the library does not know
    for pred in (student().to(torch.float64), ContinuousPredictive(component)):
        torch.testing.assert_close(
            pred.cdf(pred.icdf(level)), torch.full((6,), level, dtype=torch.float64), rtol=1e-9, atol=1e-13
        )


def test_quantiles_of_each_element_and_their_ends() -> None:
    pred = Predictive.from_normal(torch.zeros(4), 1.0)
    levels = torch.tensor([0.0, 0.5, 0.975, 1.0], dtype=torch.float64)
    assert pred.icdf(levels).tolist() == pytest.approx([-torch.inf, 0.0, 1.959964, torch.inf], abs=1e-6)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(BadInput, match=r"\[0, 1\]"):
            pred.icdf(bad)


def test_quantile_between_far_modes() -> None:
    pred = ContinuousPredictive(Normal(torch.tensor([[-1e6], [1e6]]).double(), 1e-3))
    low, middle, high = (float(pred.icdf(q)) for q in (0.25, 0.5, 0.75))
    assert low == pytest.approx(-1e6, rel=1e-12)
    assert -1e6 < middle < 1e6
    assert high == pytest.approx(1e6, rel=1e-12)


def test_interval_holds_its_mass() -> None:
    pred = student()
    lower, upper = pred.interval(0.2)
    torch.testing.assert_close(pred.cdf(upper) - pred.cdf(lower), torch.full((6,), 0.8))
    for bad in (0.0, 1.0):
        with pytest.raises(BadInput, match="alpha"):
            pred.interval(bad)


def test_float32_far_from_zero_keeps_its_quantiles() -> None:
    pred = Predictive.from_normal(torch.tensor([1e6]), 1.0)
    assert float(pred.icdf(0.975)) == pytest.approx(1e6 + 1.96, abs=0.07)


@pytest.mark.parametrize("family", ["student", "laplace"])
def test_crps_is_minimal_on_average_for_the_truth(family: str) -> None:
    """A proper score: the mean over 4,000 targets is smaller for the distribution that they come from."""
    count = 4000
    zeros, ones = torch.zeros(1, count), torch.ones(1, count)

    def make(scale: float) -> ContinuousPredictive:
        return ContinuousPredictive(
            Laplace(zeros, scale * ones) if family == "laplace" else StudentT(torch.tensor(3.0), zeros, scale * ones)
        )

    y = make(1.0).sample(seed=0)
    truth, wide, narrow = (make(scale)[:200].crps(y[:200]).mean() for scale in (1.0, 2.0, 0.5))
    assert truth < min(wide, narrow)


def test_crps_at_extreme_targets() -> None:
    pred = student()
    for far in (-1e8, 1e8):
        torch.testing.assert_close(pred.crps(torch.full((6,), far)), torch.full((6,), 1e8), rtol=1e-6, atol=0.0)


def test_crps_of_separated_narrow_members() -> None:
    """Eight far spikes: nearly the CRPS of eight points, (mean |x - y|) - (mean |x - x'|) / 2."""
    loc = torch.tensor([-1000.0, -500.0, -3.0, 0.0, 1.0, 40.0, 700.0, 5000.0]).double().unsqueeze(1)
    pred = ContinuousPredictive(Laplace(loc, 1e-4))
    y = torch.tensor([10.0]).double()
    points = (loc - y).abs().mean() - (loc - loc.T).abs().mean() / 2
    torch.testing.assert_close(pred.crps(y)[0], points, rtol=1e-6, atol=0.0)


def test_cauchy_has_a_crps_and_heavier_tails_are_refused() -> None:
    cauchy = ContinuousPredictive(StudentT(torch.ones(1, 1).double(), 0.0, 1.0))
    # the integral of F^2 over the negative half line and its mirror, 2 log(2) / pi
    assert float(cauchy.crps([0.0])) == pytest.approx(2 * math.log(2) / math.pi, rel=1e-8)
    for df in (0.4, 0.6):  # the first has an infinite score, the second's converges too slowly
        with pytest.raises(BadInput, match="tails"):
            ContinuousPredictive(StudentT(torch.full((1, 1), df), 0.0, 1.0)).crps([0.0])


def test_many_draws_are_thinned_first() -> None:
    loc = randn(100, 2).double()
    gaussian = ContinuousPredictive(Normal(loc, 1.0))
    almost = ContinuousPredictive(StudentT(torch.tensor(1e9).double(), loc, torch.ones(100, 2).double()))
    y = torch.tensor([0.3, -2.0]).double()
    torch.testing.assert_close(almost.crps(y), gaussian.crps(y), rtol=1e-7, atol=0.0)
    torch.testing.assert_close(almost.entropy(), gaussian.entropy(), rtol=1e-7, atol=0.0)


def test_chunks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    y = randn(6, seed=3)
    expected = [student().log_prob(y), student().crps(y), student().icdf(0.3), student().entropy()]
    monkeypatch.setattr("bayesguard.predictive.numerics.BUDGET", 10)
    found = [student().log_prob(y), student().crps(y), student().icdf(0.3), student().entropy()]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_moments_that_do_not_exist_are_not_made_up() -> None:
    total, aleatoric, epistemic = student(df=1.5).uncertainty()
    assert aleatoric.isinf().all()
    assert total.isinf().all()
    assert epistemic.isfinite().all()
    assert student(df=1.0).mean.isnan().all()


def test_outputs_of_an_example_come_from_one_draw() -> None:
    """Two outputs that are equal in every draw are equal in every sample."""
    loc = torch.tensor([-5.0, 5.0]).reshape(2, 1, 1).expand(2, 3, 2)
    drawn = ContinuousPredictive(Normal(loc, 1e-3)).sample((100,), seed=0)
    assert (drawn[..., 0].sign() == drawn[..., 1].sign()).all()
    assert (drawn[:, 0, 0].sign() != drawn[:, 1, 0].sign()).any()  # but examples are drawn apart


def test_joint_density_of_one_output_is_the_density() -> None:
    y = randn(6, seed=3)
    torch.testing.assert_close(student().joint_log_prob(y), student().log_prob(y))


def test_gradients_reach_the_parameters() -> None:
    loc = randn(3, 5).requires_grad_()
    pred = ContinuousPredictive(Normal(loc, torch.ones(3, 5)))
    for value in (pred.log_prob(torch.zeros(5)), pred.crps(torch.zeros(5)), pred.mean, pred.entropy()):
        (gradient,) = torch.autograd.grad(value.sum(), loc)
        assert gradient.isfinite().all()
        assert (gradient != 0).any()


@pytest.mark.parametrize(
    ("component", "error"),
    [
        (Normal(torch.zeros(3), 1.0), BadInput),
        (Normal(torch.zeros(0, 3), 1.0), BadInput),
        (Poisson(torch.ones(2, 3)), BadType),
        (Gamma(torch.ones(2, 3), 1.0), BadType),
        (Beta(torch.ones(2, 3), 1.0), BadType),
        (MultivariateNormal(torch.zeros(2, 3, 2), torch.eye(2)), BadType),
        (torch.zeros(2, 3), BadType),
    ],
    ids=str,
)
def test_components_that_will_not_do(component: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        ContinuousPredictive(component)  # type: ignore[arg-type]


def test_bad_parameters_are_named_with_their_row() -> None:
    scale = torch.ones(2, 4)
    scale[1, 2] = -1.0
    with pytest.raises(BadInput, match=r"scale.*row 2"):
        ContinuousPredictive(Normal(torch.zeros(2, 4), scale, validate_args=False))
    mixing, inner = Categorical(logits=torch.zeros(2, 4, 3)), torch.ones(2, 4, 3)
    inner[0, 3, 1] = torch.nan
    with pytest.raises(BadInput, match="row 3"):
        ContinuousPredictive(MixtureSameFamily(mixing, Normal(inner, 1.0, validate_args=False), validate_args=False))


def test_targets_that_are_not_finite() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(BadInput, match="row 2"):
            student().log_prob([0.0, 0.0, bad, 0.0, 0.0, 0.0])


def test_half_precision_parameters_are_widened() -> None:
    pred = ContinuousPredictive(Normal(torch.zeros(2, 3).half(), torch.ones(2, 3).half()))
    assert pred.dtype == pred.mean.dtype == torch.float32
