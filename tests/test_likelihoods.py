"""Likelihoods: densities against scipy, targets checked, predictives of the right kind."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import bayesguard as bg
from bayesguard import likelihoods
from bayesguard.errors import BadInput, BadType, BayesguardWarning
from bayesguard.predictive import CategoricalPredictive


def test_categorical_log_prob_is_the_log_softmax() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, 3, 2, 1, 1])
    want = torch.stack([row.exp().div(row.exp().sum()).log()[label] for row, label in zip(logits, labels, strict=True)])
    assert torch.allclose(likelihoods.Categorical().log_prob(logits, labels), want)


def test_autocast_leaves_a_categorical_log_density_as_it_is() -> None:
    logits = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(12).reshape(6, 2) % 3
    likelihood = likelihoods.Categorical()
    want = likelihood.distribution(logits).log_prob(labels)
    for outputs, tolerance in ((logits, 1e-14), (logits.float(), 1e-6)):
        with torch.autocast("cpu", torch.bfloat16):
            got = likelihood.log_prob(outputs, labels)
        assert got.dtype == outputs.dtype
        assert got.shape == labels.shape
        assert torch.allclose(got.double(), want, rtol=tolerance, atol=tolerance)


def test_classes_first_are_moved_last() -> None:
    outputs = torch.randn(2, 4, 3, 3)
    targets = torch.randint(0, 4, (2, 3, 3))
    first, last = likelihoods.Categorical(class_dim=1), likelihoods.Categorical()
    want = last.log_prob(outputs.movedim(1, -1), targets)
    assert torch.equal(first.log_prob(outputs, targets), want)
    pred = first.predictive(outputs.unsqueeze(0).expand(3, -1, -1, -1, -1))
    assert pred.batch_shape == (2, 3, 3)
    assert isinstance(pred, bg.predictive.CategoricalPredictive)
    assert pred.num_classes == 4


def test_bernoulli_density_against_scipy() -> None:
    logits, y = torch.randn(6, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])
    want = torch.from_numpy(stats.bernoulli.logpmf(y.numpy(), logits.sigmoid().numpy()))
    assert torch.allclose(likelihoods.Bernoulli().log_prob(logits, y), want)


def test_real_densities_against_scipy() -> None:
    outputs = torch.randn(6, 2, dtype=torch.float64)
    y = torch.randn(6, dtype=torch.float64)
    loc, scale = outputs[:, 0].numpy(), torch.nn.functional.softplus(outputs[:, 1]).numpy()
    cases: list[tuple[likelihoods.Likelihood, Tensor, object]] = [
        (likelihoods.Gaussian(scale=0.7).double(), outputs[:, 0], stats.norm(loc, 0.7)),
        (likelihoods.HeteroscedasticGaussian(), outputs, stats.norm(loc, scale)),
        (likelihoods.StudentT(3.0), outputs, stats.t(3.0, loc, scale)),
    ]
    for likelihood, raw, reference in cases:
        want = torch.from_numpy(reference.logpdf(y.numpy()))  # type: ignore[attr-defined]
        assert torch.allclose(likelihood.log_prob(raw, y), want, atol=1e-7), likelihood


def test_poisson_density_against_scipy() -> None:
    log_rate, y = torch.randn(5, dtype=torch.float64), torch.tensor([0, 1, 2, 5, 3])
    want = torch.from_numpy(stats.poisson.logpmf(y.numpy(), log_rate.exp().numpy()))
    assert torch.allclose(likelihoods.Poisson().log_prob(log_rate, y), want)


@pytest.mark.parametrize("df", [100.0, 1e4, 1e6, 1e9])
def test_many_degrees_of_freedom_keep_their_digits_in_float32(df: float) -> None:
    outputs, y = torch.tensor([[0.0, 1.0], [3.0, -2.0]]), torch.tensor([0.5, 2.9])
    scale = torch.nn.functional.softplus(outputs[:, 1].double()).numpy()
    want = torch.from_numpy(stats.t(df, outputs[:, 0].numpy(), scale).logpdf(y.numpy()))
    got = likelihoods.StudentT(df).log_prob(outputs, y)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, atol=1e-6)


@pytest.mark.parametrize("rate", [1e2, 1e4, 1e6])
def test_large_counts_keep_their_digits_in_float32(rate: float) -> None:
    log_rate, y = torch.tensor([rate]).log(), torch.tensor([round(1.01 * rate)])
    want = torch.from_numpy(stats.poisson.logpmf(y.numpy(), log_rate.double().exp().numpy()))
    assert torch.allclose(likelihoods.Poisson().log_prob(log_rate, y).double(), want, rtol=1e-6)


@pytest.mark.parametrize("count", [0, 3])
def test_a_rate_of_zero_in_float32_has_a_gradient(count: int) -> None:
    log_rate = torch.tensor([-110.0, -1000.0], requires_grad=True)
    loss = likelihoods.Poisson().loss(log_rate, torch.tensor([count, count]))
    loss.backward()
    assert loss.item() == pytest.approx(count * 555.0 + math.lgamma(count + 1))
    assert log_rate.grad is not None
    assert log_rate.grad.tolist() == [-count / 2, -count / 2]


def test_a_noise_that_would_be_another_is_refused() -> None:
    with pytest.raises(BadInput, match="scale must be at least 1e-06, got 1e-08"):
        likelihoods.Gaussian(scale=1e-8)


def test_learned_noise_finds_the_residuals_scale() -> None:
    """The maximum-likelihood noise is the root mean square of the residuals."""
    residuals = torch.tensor([0.5, -1.5, 1.0, 2.0, -0.25])
    likelihood = likelihoods.Gaussian()
    optimizer = torch.optim.LBFGS(likelihood.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = likelihood.loss(torch.zeros(5), residuals)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(likelihood.scale, residuals.square().mean().sqrt(), rtol=1e-4)


def test_beta_nll_at_one_has_the_gradient_of_a_squared_error() -> None:
    """Seitzer et al. 2022, section 4: with beta = 1 the location's gradient is that of (y - mu)^2 / 2."""
    outputs = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(7, dtype=torch.float64)
    likelihoods.HeteroscedasticGaussian(beta=1.0).loss(outputs, y).backward()
    want = (outputs[:, 0] - y).detach() / 7
    assert outputs.grad is not None
    assert torch.allclose(outputs.grad[:, 0], want)


def test_beta_changes_the_loss_and_no_density() -> None:
    outputs, y = torch.randn(4, 2), torch.randn(4)
    plain, beta = likelihoods.HeteroscedasticGaussian(), likelihoods.HeteroscedasticGaussian(beta=0.5)
    assert torch.equal(plain.log_prob(outputs, y), beta.log_prob(outputs, y))
    assert plain.loss(outputs, y) != beta.loss(outputs, y)


def test_loss_is_the_mean_over_examples_of_the_sum_over_outputs() -> None:
    outputs, y = torch.randn(4, 3), torch.randn(4, 3)
    likelihood = likelihoods.Gaussian(scale=1.0)
    assert torch.allclose(likelihood.loss(outputs, y), -likelihood.log_prob(outputs, y).sum(dim=1).mean())


def test_probabilities_are_refused_where_logits_belong() -> None:
    probs = torch.randn(6, 4).softmax(dim=-1)
    with pytest.raises(BadInput, match=r"outputs are probabilities.*leave the softmax out"):
        likelihoods.Categorical().loss(probs, torch.zeros(6, dtype=torch.long))
    with pytest.raises(BadInput, match="outputs are probabilities"):
        likelihoods.Categorical().predictive(probs.unsqueeze(0))


def test_d11_logits_between_0_and_1_stay_logits() -> None:
    logits = torch.rand(6, 4)
    pred = likelihoods.Categorical().predictive(logits.unsqueeze(0))
    assert torch.allclose(pred.mean, logits.softmax(dim=-1))


def test_a_sigmoid_at_the_end_is_warned_of() -> None:
    with pytest.warns(BayesguardWarning, match="leave it out"):
        likelihoods.Bernoulli().predictive(torch.rand(1, 100))


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "message"),
    [
        (likelihoods.Categorical(), torch.randn(3, 2), torch.tensor([0, 1, 2]), r"label 2 in row 2.*0\.\.1"),
        (likelihoods.Categorical(), torch.randn(3, 2), torch.tensor([0, -100, 1]), "label -100 in row 1"),
        (likelihoods.Categorical(), torch.randn(3, 2), torch.tensor([[0], [1], [1]]), r"shape \(3, 1\)"),
        (likelihoods.Categorical(), torch.randn(3, 1), torch.tensor([0, 0, 0]), "use likelihoods.Bernoulli"),
        (likelihoods.Categorical(), torch.randn(3), torch.tensor([0, 0, 0]), "no axis -1 of classes"),
        (
            likelihoods.Bernoulli(),
            torch.randn(3),
            torch.tensor([0.0, 0.5, 1.0]),
            "other than 0 and 1 in row 1",
        ),
        (likelihoods.Gaussian(), torch.randn(3, 1), torch.randn(3), r"shape \(3,\), but \(3, 1\) is needed"),
        (
            likelihoods.Gaussian(),
            torch.randn(3),
            torch.tensor([0.0, torch.nan, 1.0]),
            "NaN or infinity in row 1",
        ),
        (likelihoods.HeteroscedasticGaussian(), torch.randn(3), torch.randn(3), "last axis of size 2"),
        (likelihoods.StudentT(), torch.randn(3, 3), torch.randn(3), "last axis of size 2"),
        (likelihoods.Poisson(), torch.randn(3), torch.tensor([1.0, -1.0, 2.0]), "not a count in row 1"),
        (likelihoods.Poisson(), torch.randn(3), torch.tensor([1.0, 2.5, 2.0]), "not a count in row 1"),
    ],
)
def test_bad_targets_are_named(
    likelihood: likelihoods.Likelihood, outputs: Tensor, targets: Tensor, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        likelihood.log_prob(outputs, targets)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(BadInput, match="class_dim is 0"):
        likelihoods.Categorical(class_dim=0)
    with pytest.raises(BadInput, match="scale must be a positive number, got -1"):
        likelihoods.Gaussian(scale=-1.0)
    with pytest.raises(BadInput, match=r"beta must lie in 0\.\.1"):
        likelihoods.HeteroscedasticGaussian(beta=2.0)
    with pytest.raises(BadInput, match="df must be a positive number"):
        likelihoods.StudentT(df=0.0)
    with pytest.raises(BadType, match="one-hot"):
        likelihoods.Categorical().log_prob(torch.randn(2, 3), torch.eye(3)[:2])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_d5_every_integer_dtype_is_a_label(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 2, 1]).to(dtype)
    assert likelihoods.Categorical().log_prob(torch.randn(3, 3), labels).shape == (3,)


def test_half_precision_outputs_are_widened() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob = likelihoods.Categorical().log_prob(torch.randn(3, 10).bfloat16(), torch.tensor([1, 2, 3]))
    assert log_prob.dtype == torch.float32


@pytest.mark.parametrize("rows", [2, 600])
def test_one_look_at_logits_finds_what_the_predictive_refuses(rows: int) -> None:
    """A finite sum stands for finite numbers; masks and sums that overflow are no errors, few rows or many."""
    logits = torch.randn(2, rows, 4, generator=torch.Generator().manual_seed(0))
    masked, huge = logits.clone(), logits.clone()
    masked[:, 0, 1] = -torch.inf
    huge[:, :, 2] = 3e38
    for given in (logits, masked, huge, logits.double(), logits.half()):
        found = likelihoods.Categorical().predictive(given)
        want = CategoricalPredictive(given)
        assert torch.equal(found.probs, want.probs)
        assert torch.equal(found.draw_logits, want.draw_logits)
        assert torch.equal(found.weights, want.weights)
    for bad in (torch.nan, torch.inf):
        wrong = masked.clone()
        wrong[1, 1, 0] = bad
        with pytest.raises(BadInput, match="row 1"):
            likelihoods.Categorical().predictive(wrong)
    masked[0, 1] = -torch.inf
    with pytest.raises(BadInput, match=r"every class masked.*row 1"):
        likelihoods.Categorical().predictive(masked)


def test_logits_of_a_likelihood_of_ones_own_are_used() -> None:
    class Halved(likelihoods.Categorical):
        def logits(self, outputs: Tensor, *, draws: bool = False) -> Tensor:
            return super().logits(outputs, draws=draws) / 2

    outputs = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Halved().predictive(outputs).probs, (outputs[0] / 2).softmax(-1))
