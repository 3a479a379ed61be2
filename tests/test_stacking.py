"""Stacking: optimal weights, certified, and a mixture that is a predictor."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.errors import BadInput, BadType
from bayesguard.stacking import stacking_weights
from bayesguard.testing import check_predictor

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class Known(nn.Module):
    """Sure of the answer where the second input has one sign, and rather wrong elsewhere."""

    def __init__(self, sign: float, strength: float = 4.0) -> None:
        super().__init__()
        self.sign, self.strength = sign, nn.Parameter(torch.tensor(strength))

    def forward(self, x: Tensor) -> Tensor:
        known = (self.sign * x[:, 1] > 0).to(x.dtype)
        score = (self.strength * known - (1 - known)) * x[:, 0].sign()
        return torch.stack([-score, score], dim=-1)


def score(predictor: bg.Predictor) -> float:
    return predictor.predict((X, Y)).log_prob(Y).mean().item()


def test_weights_are_the_best_of_a_grid() -> None:
    scores = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = stacking_weights(scores)
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    mixtures = torch.logaddexp(scores[0].unsqueeze(1) + grid.log(), scores[1].unsqueeze(1) + (1 - grid).log()).mean(0)
    assert abs(found.weights[0].item() - grid[mixtures.argmax()].item()) < 2e-4
    mixed = (found.weights.log().unsqueeze(1) + scores).logsumexp(0).mean()
    assert mixed >= mixtures.max() - found.gap
    assert found.gap < 1e-6


def test_many_predictors_meet_the_conditions_of_the_optimum() -> None:
    scores = torch.randn(6, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = stacking_weights(scores)
    gradient = (scores - (found.weights.log().unsqueeze(1) + scores).logsumexp(0)).exp().mean(1)
    assert bool((gradient < 1 + 1e-6).all())
    assert bool((gradient[found.weights > 0.01] > 1 - 1e-3).all())


def test_a_perfect_model_beside_noise() -> None:
    stacked = bg.stack(
        {"good": bg.Deterministic(Known(1, 6.0)), "noise": bg.Deterministic(Known(1, -6.0))},
        (X[X[:, 1] > 0], Y[X[:, 1] > 0]),
    )
    assert stacked.named_weights["good"] > 0.999


def test_two_experts_beat_each_of_them() -> None:
    experts = [bg.Deterministic(Known(sign)) for sign in (1.0, -1.0)]
    stacked = bg.stack(experts, (X, Y))
    assert score(stacked) > max(map(score, experts)) + 0.1
    assert stacked.is_exact
    twice = bg.stack([*experts, experts[0]], (X, Y))
    assert torch.allclose(twice(X).probs, stacked(X).probs, atol=1e-3)


def test_the_answer_is_the_weighted_mixture() -> None:
    experts = [bg.Deterministic(Known(sign)) for sign in (1.0, -1.0)]
    stacked = bg.stack(experts, (X, Y))
    want = sum(w * expert(X).probs for w, expert in zip(stacked.weights.float(), experts, strict=True))
    assert torch.allclose(stacked(X).probs, torch.as_tensor(want), atol=1e-6)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.5), nn.Linear(16, 2))


def test_the_contract() -> None:
    members = {"dropout": bg.MCDropout(network(), num_samples=6), "weights": bg.Variational(network(), num_samples=6)}
    check_predictor(bg.stack(members, (X, Y)), X[:8], Y[:8])


def test_regression() -> None:
    targets = X[:, :1] + 0.1
    members = [bg.Deterministic(nn.Linear(2, 1), bg.likelihoods.Gaussian(scale=s)) for s in (0.5, 2.0)]
    pred = bg.stack(members, (X, targets))(X)
    assert pred.mean.shape == (60, 1)
    assert bool(pred.log_prob(targets).isfinite().all())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bg.stack([bg.Deterministic(Known(1))], (X, Y)), BadInput, "two predictors at least"),
        (lambda: bg.stack([X, Y], (X, Y)), BadType, "must be a bayesguard predictor"),  # type: ignore[list-item]
        (lambda: stacking_weights(torch.zeros(3)), BadInput, r"\[M, N\]"),
        (lambda: stacking_weights(torch.full((2, 2), -torch.inf)), BadInput, "row 0 has density zero"),
    ],
)
def test_what_is_refused(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_kinds_that_cannot_be_mixed() -> None:
    members = [
        bg.Deterministic(nn.Linear(2, 1), bg.likelihoods.Gaussian()),
        bg.Deterministic(nn.Linear(2, 1), bg.likelihoods.Poisson()),
    ]
    with pytest.raises(BadType, match="cannot be mixed"):
        bg.stack(members, (X, torch.ones(60, 1)))


def test_a_stack_is_not_fitted() -> None:
    stacked = bg.stack([bg.Deterministic(Known(sign)) for sign in (1.0, -1.0)], (X, Y))
    with pytest.raises(BadInput, match="is not fitted"):
        stacked.fit((X, Y), epochs=1)
