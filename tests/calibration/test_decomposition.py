"""The parts of a score against known excess losses, loops over the folds, and fits to the rows that are judged."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bayesguard.calibration import (
    Conformal,
    HistogramBinning,
    IsotonicCalibration,
    TemperatureScaling,
    VectorScaling,
    score_decomposition,
)
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M
from bayesguard.metrics.functional.decomposition import ScoreDecomposition
from bayesguard.predictive import Predictive
from bayesguard.sampling import stream

SCORES = ("log", "brier")


def world(count: int, seed: int, classes: int = 4, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits, and labels that are drawn from their softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def items(parts: ScoreDecomposition) -> list[float]:
    return [part.item() for part in parts]


def losses(logits: Tensor, labels: Tensor, score: str) -> Tensor:
    if score == "log":
        return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (logits.softmax(-1) - torch.nn.functional.one_hot(labels, logits.shape[-1])).square().sum(-1)


def expected(logits: Tensor, truth: Tensor, score: str) -> Tensor:
    """The loss of each row under the true probabilities, without noise of labels."""
    classes = torch.arange(logits.shape[-1])
    each = [losses(logits, label.expand(len(logits)), score) for label in classes]
    return (torch.stack(each, -1) * truth).sum(-1)


def by_hand(pred: Predictive, y: Tensor, score: str, folds: int, seed: int) -> list[float]:
    part = torch.randperm(len(y), generator=stream("cpu", seed, "folds")) % folds
    after = torch.empty(len(y), dtype=torch.float64)
    for fold in range(folds):
        scaling = TemperatureScaling().fit(pred[part != fold], y[part != fold])
        after[part == fold] = losses(scaling(pred[part == fold]).logits.double(), y[part == fold], score)
    shares = torch.bincount(y).double() / len(y)
    unc = -sum(p * math.log(p) for p in shares.tolist()) if score == "log" else 1 - sum(p * p for p in shares.tolist())
    before = losses(pred.logits.double(), y, score).mean().item()
    return [before - after.mean().item(), unc - after.mean().item(), unc]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_miscalibration_is_the_excess_loss_of_a_known_map(score: str, factor: float) -> None:
    logits, y = world(40_000, seed=0)
    truth = logits.softmax(-1)
    parts = score_decomposition(Predictive.from_logits(factor * logits), y, score=score)  # type: ignore[arg-type]
    excess = (expected(factor * logits, truth, score) - expected(logits, truth, score)).mean().item()
    noise = (losses(factor * logits, y, score) - losses(logits, y, score)).std() / len(y) ** 0.5
    # Of a temperature that has nothing to mend: the sum over pairs of folds of the products of their scores, in nats.
    fitting = math.sqrt(2 * 5 / 4) / len(y)
    assert abs(parts.miscalibration.item() - excess) < 5 * (float(noise) + fitting)
    if factor != 1:
        assert abs(parts.miscalibration.item()) > 20 * (float(noise) + fitting)  # 0 would have been noticed


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("draws", [1, 3])
def test_parts_are_a_loop_over_the_folds_and_add_up(score: str, draws: int) -> None:
    logits, y = world(90, seed=1)
    noise = torch.randn(draws, *logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pred = Predictive.from_logits(2 * logits + noise, draws=True)
    for folds, seed in ((5, 0), (3, 7), (90, 0)):
        parts = score_decomposition(pred, y, score=score, num_folds=folds, seed=seed)  # type: ignore[arg-type]
        assert items(parts) == pytest.approx(by_hand(pred, y, score, folds, seed), abs=1e-12)
        assert all(part.dtype == torch.float64 and part.dim() == 0 for part in parts)
        assert parts.score.item() == pytest.approx(losses(pred.logits, y, score).mean().item(), abs=1e-12)


def excess_over_truth(decompose: Callable[[Predictive, Tensor], ScoreDecomposition]) -> tuple[float, float]:
    """Mean and standard error, over small data sets, of the miscalibration less what a fit to fresh rows takes away."""
    pool, _ = world(3000, seed=99, classes=3)
    truth, reference = pool.softmax(-1), Predictive.from_probs(pool.softmax(-1))
    errors = []
    for seed in range(120):
        logits, y = world(50, seed, classes=3)
        fresh, labels = world(40, 10_000 + seed, classes=3)
        mended = IsotonicCalibration().fit(Predictive.from_probs(fresh.softmax(-1)), labels)(reference)
        gain = (expected(pool, truth, "brier") - expected(mended.logits.double(), truth, "brier")).mean().item()
        errors.append(decompose(Predictive.from_probs(logits.softmax(-1)), y).miscalibration.item() - gain)
    return statistics.fmean(errors), statistics.stdev(errors) / len(errors) ** 0.5


@pytest.mark.filterwarnings("ignore::bayesguard.CalibrationWarning")
def test_the_estimate_is_that_of_rows_not_seen_and_a_fit_to_the_same_rows_is_not() -> None:
    error, noise = excess_over_truth(
        lambda pred, y: score_decomposition(pred, y, calibrator=IsotonicCalibration(), score="brier")
    )
    assert abs(error) < 5 * noise

    def in_sample(pred: Predictive, y: Tensor) -> ScoreDecomposition:
        after = IsotonicCalibration().fit(pred, y)(pred)
        found, refined = (losses(each.logits.double(), y, "brier").mean() for each in (pred, after))
        return ScoreDecomposition(found - refined, -refined, torch.zeros(()))

    error, noise = excess_over_truth(in_sample)
    assert error > 5 * noise


def test_yes_or_no_is_two_classes() -> None:
    logits, y = world(200, seed=3, classes=2)
    probs = (2 * logits).softmax(-1)
    for score in SCORES:
        two = score_decomposition(probs, y, score=score)  # type: ignore[arg-type]
        one = score_decomposition(probs[:, 1], y, score=score)  # type: ignore[arg-type]
        assert items(one) == pytest.approx(items(two), abs=1e-6)


def test_a_model_that_knows_nothing_has_no_discrimination() -> None:
    _, y = world(3000, seed=4)
    parts = score_decomposition(torch.full((3000, 4), 0.25), y, calibrator=VectorScaling())
    # Frequencies of the other folds cost (K - 1) / 2N more than those of all rows gain.
    assert abs(parts.discrimination.item()) < 5 * 3 / 3000
    assert parts.miscalibration.item() == pytest.approx(math.log(4) - parts.uncertainty.item(), abs=5 * 3 / 3000)


def test_weights_count_rows() -> None:
    logits, y = world(120, seed=5)
    pred = Predictive.from_logits(2 * logits)
    weights = torch.rand(120, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[::3] = 0
    kept = weights > 0
    parts = score_decomposition(pred, y, weights=weights, score="brier")
    assert parts.score.item() == pytest.approx(M.brier_score(pred.probs, y, weights=weights).item(), abs=1e-9)
    for same in (
        score_decomposition(pred[kept], y[kept], weights=weights[kept], score="brier"),
        score_decomposition(pred, y, weights=7 * weights, score="brier"),
    ):
        assert items(same) == pytest.approx(items(parts), abs=1e-9)
    balanced = 1 / torch.bincount(y).double()[y]
    assert score_decomposition(pred, y, weights=balanced).uncertainty.item() == pytest.approx(math.log(4), abs=1e-12)
    with pytest.raises(BadType, match="takes no weights"):
        score_decomposition(pred, y, weights=weights, calibrator=HistogramBinning())


def test_the_calibrator_is_left_as_it_is() -> None:
    logits, y = world(100, seed=6)
    pred = Predictive.from_logits(2 * logits)
    own = TemperatureScaling()
    found = items(score_decomposition(pred, y, calibrator=own))
    assert not own.fitted
    own.fit(pred[:20], y[:20])
    temperature = own.temperature.clone()
    assert items(score_decomposition(pred, y, calibrator=own)) == found
    assert torch.equal(own.temperature, temperature)


def test_probability_zero() -> None:
    logits, y = world(80, seed=8, classes=2)
    probs = logits.softmax(-1)
    probs[3], y[3] = torch.tensor([1.0, 0.0]), 1
    with pytest.warns(UserWarning, match="probability zero"), pytest.raises(BadInput, match=r"row 3 .*score='brier'"):
        score_decomposition(probs, y)
    assert math.isfinite(score_decomposition(probs, y, score="brier", calibrator=IsotonicCalibration()).score)
    parts = score_decomposition(probs, y, calibrator=IsotonicCalibration())
    assert parts.miscalibration.item() == parts.score.item() == math.inf
    assert math.isfinite(parts.discrimination)


def test_bad_input_is_named() -> None:
    logits, y = world(20, seed=7)
    pred = Predictive.from_logits(logits)
    with pytest.raises(BadInput, match="score must be 'log' or 'brier', got 'crps'"):
        score_decomposition(pred, y, score="crps")  # type: ignore[arg-type]
    for folds in (1, 21):
        with pytest.raises(BadInput, match="num_folds"):
            score_decomposition(pred, y, num_folds=folds)
    with pytest.raises(BadInput, match="seed"):
        score_decomposition(pred, y, seed=-1)
    with pytest.raises(BadInput, match="adds sets or intervals"):
        score_decomposition(pred, y, calibrator=Conformal())
    with pytest.raises(BadInput, match="exactly"):
        score_decomposition(pred, y[:10])
    with pytest.raises(BadInput, match=r"labels must be in 0\.\.3"):
        score_decomposition(pred, y + 4)
    with pytest.raises(BadInput, match="sum"):
        score_decomposition(logits, y)
    with pytest.raises(BadType, match="one class"):
        score_decomposition(Predictive.from_normal([0.0], 1.0), [0.0])
    with pytest.raises(BadType, match="Calibrator"):
        score_decomposition(pred, y, calibrator="temperature")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="weights"):
        score_decomposition(pred, y, weights=-torch.ones(20))
