"""Draws to a tolerance: the slow way gives the same numbers, examples do not depend on each other, errors are honest."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard import adaptive
from bayesguard.errors import BadInput, BadType, IdenticalDraws
from bayesguard.predictive import concatenate, mixture
from bayesguard.predictor import Predictor
from tests.networks import mlp

UNITS = 12


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class OneLayer(Predictor):
    """Dropout of one half before the last layer, independent or with each unit dropped in four of eight draws."""

    can_continue = True

    def __init__(self, weight: Tensor, likelihood: Any = None, block: int = 8, **options: Any) -> None:
        network = nn.Linear(UNITS, weight.shape[0], bias=False).double()
        network.weight.data = weight
        super().__init__(network, likelihood, **options)
        self.block = block
        self.starts: list[tuple[int, int]] = []  # rows and first draw of every beginning

    def output_chunks(
        self,
        *inputs: Any,
        num_samples: int,
        seed: int,
        offset: int = 0,
        first_draw: int = 0,
        draws_per_chunk: int | None = None,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        (x,) = inputs
        self.starts.append((len(x), first_draw))
        for start in range(first_draw, first_draw + num_samples, 8):
            generator = torch.Generator().manual_seed(seed * 100_003 + start)
            order = torch.rand(8, len(x) if self.is_positional else 1, UNITS, generator=generator)
            keep = order.argsort(0) >= 4 if self.block == 8 else order >= 0.5
            count = min(8, first_draw + num_samples - start)
            yield self.network(2 * keep[:count] * x)

    def draw(self, seed: int) -> nn.Module:
        return self.network

    @property
    def draws_per_block(self) -> int:
        return self.block

    @property
    def strategy(self) -> str:
        return "loop"


WEIGHT = 1.2 * randn(3, UNITS, seed=1)
X = randn(40, UNITS, seed=2).relu() * torch.linspace(0.05, 1.5, 40, dtype=torch.float64).unsqueeze(1)


def slowly(probs: Tensor, tolerance: float, most: int, block: int) -> tuple[int, Tensor, Tensor]:
    """Draws used, mean and squared error of one example from probabilities `[most, ..., K]`, looked at from scratch."""
    count = 8
    while True:
        seen = probs[:count]
        mean = seen.mean(0)
        independent = (seen - mean).square().mean(0) / (count - 1)
        if block == 1:
            error = independent * (1 + 16 / (count - 1))
        else:
            groups = seen.split(block)
            between = sum(len(g) / count * (g.mean(0) - mean).square() for g in groups)
            error = (4 * independent + between) / (4 + len(groups) - 1)
        if error.max() <= tolerance**2 or count >= most:
            return count, mean, error
        count = min(count + 8, most)


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("most", [8, 60, 128])
def test_every_example_is_drawn_as_if_alone(block: int, most: int) -> None:
    predictor = OneLayer(WEIGHT, block=block)
    pred = predictor(X, tolerance=0.03, max_samples=most)
    probs = predictor.draw_outputs(X, num_samples=most).softmax(-1)
    for n in range(len(X)):
        used, mean, error = slowly(probs[:, n], 0.03, most, block)
        assert int(pred.draws_used[n]) == used
        torch.testing.assert_close(pred.probs[n], mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pred.standard_error[n], error.sqrt(), rtol=1e-10, atol=1e-12)
        same = predictor(X[n : n + 1], num_samples=used)
        torch.testing.assert_close(pred[n].mean, same.mean, rtol=1e-10, atol=1e-12)
        for a, b in zip(pred[n].uncertainty(), same.uncertainty(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    if most == 128:
        assert len(pred.draws_used.unique()) > 4


def test_other_examples_do_not_matter() -> None:
    predictor = OneLayer(WEIGHT)
    whole = predictor(X, tolerance=0.03, max_samples=128)
    for rows in (slice(0, 1), slice(30, 40), slice(None, None, 3)):
        part = predictor(X[rows], tolerance=0.03, max_samples=128)
        assert torch.equal(part.draws_used, whole.draws_used[rows])
        torch.testing.assert_close(part.probs, whole.probs[rows], rtol=1e-12, atol=0)
        torch.testing.assert_close(part.standard_error, whole.standard_error[rows], rtol=1e-10, atol=1e-14)


def test_predict_and_call_agree() -> None:
    predictor = OneLayer(WEIGHT)
    whole = predictor(X, tolerance=0.03, max_samples=128)
    streamed = predictor.predict(X, batch_size=7, tolerance=0.03, max_samples=128)
    assert torch.equal(streamed.draws_used, whole.draws_used)
    torch.testing.assert_close(streamed.probs, whole.probs, rtol=1e-12, atol=0)
    with_targets, _ = predictor.predict_with_targets((X, torch.arange(40) % 3), tolerance=0.03, max_samples=128)
    assert torch.equal(with_targets.draws_used, whole.draws_used)


def test_rows_that_are_done_leave_the_batch_a_few_times_only() -> None:
    predictor = OneLayer(WEIGHT)
    pred = predictor(X, tolerance=0.02, max_samples=400)
    rows = [rows for rows, _ in predictor.starts]
    assert 2 <= len(rows) <= 1 + math.log2(len(X))
    assert all(2 * after < before for before, after in itertools.pairwise(rows))
    for left, first in predictor.starts[1:]:
        assert left == int((pred.draws_used > first).sum())


class Apart(OneLayer):
    """Examples that have draws of their own by their place in the batch."""

    @property
    def is_positional(self) -> bool:
        return True


def test_rows_stay_where_their_place_decides_their_draws() -> None:
    predictor = Apart(WEIGHT)
    predictor(X, tolerance=0.02, max_samples=400)
    assert predictor.starts == [(40, 0)]


def test_tolerance_is_met_or_the_most_is_drawn() -> None:
    pred = OneLayer(WEIGHT, num_samples=16)(X, tolerance=0.03)
    capped = pred.draws_used == 64
    assert (pred.standard_error.amax(-1)[~capped] <= 0.03).all()
    assert capped.any()
    assert pred.draws_used.min() >= 8
    assert pred.num_samples == 64


def test_draws_used_goes_with_the_examples() -> None:
    pred = OneLayer(WEIGHT)(X, tolerance=0.03, max_samples=128)
    used = pred.draws_used
    assert used.dtype == torch.long
    assert torch.equal(pred[3:9].draws_used, used[3:9])
    assert torch.equal(pred[used > 8].draws_used, used[used > 8])
    assert torch.equal(concatenate([pred[:5], pred[5:]]).draws_used, used)
    single = pred.to(torch.float32)
    assert torch.equal(single.draws_used, used)
    assert single.draws_used.dtype == torch.long
    torch.testing.assert_close(single.standard_error.double(), pred.standard_error, rtol=1e-6, atol=0)
    plain = OneLayer(WEIGHT)(X, num_samples=24)
    assert plain.draws_used.tolist() == plain.reduce().draws_used.tolist() == [24] * 40
    assert bg.Predictive.from_normal([0.0, 1.0], 1.0).draws_used.tolist() == [1, 1]
    with pytest.raises(BadInput, match="cannot be mixed"):
        mixture([pred, pred])
    with pytest.raises(BadInput, match="cannot be joined"):
        concatenate([pred, OneLayer(WEIGHT)(X, num_samples=128).with_groups(None).reduce()])


def test_yes_or_no_with_several_labels_and_no_rows() -> None:
    predictor = OneLayer(WEIGHT, bg.likelihoods.Bernoulli())
    pred = predictor(X, tolerance=0.04, max_samples=128)
    probs = predictor.draw_outputs(X, num_samples=128).sigmoid()
    for n in range(len(X)):
        used, mean, error = slowly(probs[:, n], 0.04, 128, 8)
        assert int(pred.draws_used[n]) == used
        torch.testing.assert_close(pred.probs[n], mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pred.standard_error[n], error.sqrt(), rtol=1e-10, atol=1e-12)
    assert predictor(X[:0], tolerance=0.04).draws_used.shape == (0,)


def test_the_tolerance_is_one_of_calibrated_probabilities() -> None:
    predictor = OneLayer(WEIGHT)
    scaling = bg.calibration.TemperatureScaling()
    scaling.load_state_dict({"temperature": torch.tensor(3.0), "is_fitted": torch.tensor(True)})
    predictor.calibrators.append(scaling)
    pred = predictor(X, tolerance=0.02, max_samples=128)
    probs = (predictor.draw_outputs(X, num_samples=128) / 3).softmax(-1)
    for n in range(len(X)):
        assert int(pred.draws_used[n]) == slowly(probs[:, n], 0.02, 128, 8)[0]


@pytest.mark.parametrize("lucky", [False, True])
@pytest.mark.parametrize(("block", "tolerance"), [(8, 0.02), (1, 0.06)])
def test_the_error_of_what_stopped_is_within_the_tolerance(
    block: int, tolerance: float, lucky: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean squared error of 6,000 answers to one question; the twin stops wherever the plain estimate is low."""
    if lucky:
        monkeypatch.setattr(adaptive, "_PRIOR", 1e-9)
        monkeypatch.setattr(adaptive, "_INFLATION", 0)
    predictor = Apart(randn(2, UNITS, seed=3), block=block)
    x = randn(1, UNITS, seed=5).abs().expand(6000, -1)
    truth = predictor(x, num_samples=160, seed=1).reduce().probs.mean(0)
    pred = predictor(x, tolerance=tolerance, max_samples=1024)
    assert (pred.standard_error <= tolerance).all()
    squared = (pred.probs[:, 0] - truth[0]).square()
    z = float((squared.mean() - tolerance**2) / (squared.std() / math.sqrt(len(squared))))
    assert z > 5 if lucky else z < 5


def test_mc_dropout_draws_to_a_tolerance() -> None:
    predictor = bg.MCDropout(mlp(nn.Dropout(0.5)), num_samples=16)
    x = randn(30, 8).float()
    pred = predictor(x, tolerance=0.05)
    assert (pred.standard_error.amax(-1)[pred.draws_used < 64] <= 0.05).all()
    for n in (0, 11, 29):
        same = predictor(x[n : n + 1], num_samples=int(pred.draws_used[n]))
        torch.testing.assert_close(pred.probs[n : n + 1], same.probs, rtol=1e-4, atol=1e-6)


class Ignored(nn.Module):
    """Dropout whose result is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        nn.functional.dropout(x, 0.5)
        return self.body(x)


def test_masks_that_reach_nothing_are_not_taken_for_certainty() -> None:
    with pytest.raises(IdenticalDraws):
        bg.MCDropout(Ignored())(randn(4, 8).float(), tolerance=0.01)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tolerance": 0.0}, BadInput, "tolerance must be a positive number"),
        ({"tolerance": math.nan}, BadInput, "tolerance must be a positive number"),
        ({"tolerance": "0.1"}, BadType, "tolerance must be a number"),
        ({"tolerance": 0.1, "max_samples": 7}, BadInput, "max_samples must be at least 8"),
        ({"max_samples": 64}, BadInput, "without one use num_samples="),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OneLayer(WEIGHT)(X, **settings)


class Overflowing(OneLayer):
    """Its outputs are infinite from the third block on."""

    def output_chunks(self, *inputs: Any, **settings: Any) -> Iterator[Tensor]:
        for index, chunk in enumerate(super().output_chunks(*inputs, **settings)):
            yield chunk * math.inf if settings["first_draw"] + 8 * index >= 16 else chunk


def test_a_draw_that_is_not_finite_is_an_error_that_says_how_rows_are_counted() -> None:
    with pytest.raises(BadInput, match="NaN or infinity in row") as caught:
        Overflowing(WEIGHT)(X, tolerance=0.01, max_samples=64)
    assert "still being drawn" in "".join(caught.value.__notes__)


def test_what_cannot_be_drawn_to_a_tolerance_says_why() -> None:
    x = randn(4, 8).float()
    with pytest.raises(BadInput, match=r"not for Deterministic: its answers have no Monte-Carlo error"):
        bg.Deterministic(mlp())(x, tolerance=0.1)
    with pytest.raises(BadInput, match=r"not for DeepEnsemble: its draws cannot be continued"):
        bg.DeepEnsemble([mlp(), mlp()])(x, tolerance=0.1)
    with pytest.raises(BadInput, match="a ContinuousPredictive has none"):
        OneLayer(WEIGHT, bg.likelihoods.Gaussian(1.0))(X, tolerance=0.1)
    with pytest.raises(BadInput, match="keep_draws=True"):
        OneLayer(WEIGHT).predict(X, tolerance=0.1, keep_draws=True)
