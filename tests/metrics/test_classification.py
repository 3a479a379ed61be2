"""Accuracy, NLL and Brier against scikit-learn and loops."""

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics import functional as M
from bayesguard.predictive import Predictive


def made(rows: int = 200, classes: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(-1).to(dtype), torch.randint(classes, (rows,), generator=generator)


def test_accuracy_and_nll_against_sklearn() -> None:
    probs, targets = made()
    assert M.accuracy(probs, targets).item() == pytest.approx(accuracy_score(targets, probs.argmax(-1)))
    theirs = log_loss(targets.numpy(), probs.numpy(), labels=range(4))
    assert M.negative_log_likelihood(probs.log(), targets).item() == pytest.approx(theirs, rel=1e-12)


def test_nll_is_not_clipped() -> None:
    log_probs = torch.tensor([[0.0, -torch.inf], [-200.0, 0.0]], dtype=torch.float64)
    assert M.negative_log_likelihood(log_probs, [1, 0]).item() == math.inf
    assert M.negative_log_likelihood(log_probs, [0, 0]).item() == 100.0
    assert M.negative_log_likelihood(log_probs, [1, 0], weights=[0, 2]).item() == 200.0


def test_nll_of_predictives() -> None:
    probs, targets = made()
    pred = Predictive.from_probs(probs)
    assert M.negative_log_likelihood(pred, targets).item() == pytest.approx(
        M.negative_log_likelihood(probs.log(), targets).item(), rel=1e-9
    )
    normal = Predictive.from_normal(torch.zeros(3, 2), torch.ones(3, 2))
    y = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    wanted = 0.5 * math.log(2 * math.pi) + 0.5 * (1 + 4) / 6
    assert M.negative_log_likelihood(normal, y).item() == pytest.approx(wanted, rel=1e-6)
    weighted = M.negative_log_likelihood(normal, y, weights=[0, 1, 0])
    assert weighted.item() == pytest.approx(0.5 * math.log(2 * math.pi) + 1, rel=1e-6)


def test_brier_against_a_loop() -> None:
    probs, targets = made(50)
    loop = sum(math.fsum((float(probs[n, k]) - (int(targets[n]) == k)) ** 2 for k in range(4)) for n in range(50))
    assert M.brier_score(probs, targets).item() == pytest.approx(loop / 50, rel=1e-12)
    assert M.brier_score([[0.0, 1.0]], [0]).item() == 2.0


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_murphy_parts_add_up_and_are_what_they_say(num_bins: int) -> None:
    probs, targets = made(300)
    parts = M.brier_decomposition(probs, targets, num_bins=num_bins)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bin
    assert total.item() == pytest.approx(M.brier_score(probs, targets).item(), abs=1e-13)
    reliability = resolution = uncertainty = 0.0
    for k in range(4):
        p, y = probs[:, k], (targets == k).double()
        base = y.mean().item()
        uncertainty += base * (1 - base)
        for b in range(num_bins):
            rows = (p > b / num_bins) & (p <= (b + 1) / num_bins)
            if rows.any():
                share = rows.double().mean().item()
                reliability += share * (p[rows].mean() - y[rows].mean()).item() ** 2
                resolution += share * (y[rows].mean().item() - base) ** 2
    assert parts.reliability.item() == pytest.approx(reliability, abs=1e-12)
    assert parts.resolution.item() == pytest.approx(resolution, abs=1e-12)
    assert parts.uncertainty.item() == pytest.approx(uncertainty, abs=1e-12)


def test_murphy_has_nothing_within_bins_of_one_value() -> None:
    probs = torch.tensor([[0.8, 0.2]] * 6 + [[0.3, 0.7]] * 4, dtype=torch.float64)
    parts = M.brier_decomposition(probs, [0, 0, 0, 0, 1, 1, 1, 1, 1, 0])
    assert parts.within_bin.item() == pytest.approx(0.0, abs=1e-15)
    assert parts.uncertainty.item() == pytest.approx(0.5)
    assert parts.reliability.item() == pytest.approx(2 * (0.6 * (0.8 - 4 / 6) ** 2 + 0.4 * (0.3 - 0.25) ** 2))


def test_weights_are_repetitions() -> None:
    probs, targets = made(40)
    weights = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(1))
    rows = torch.arange(40).repeat_interleave(weights)
    for function in (M.accuracy, M.brier_score):
        again = function(probs[rows], targets[rows])
        assert function(probs, targets, weights=weights).item() == pytest.approx(again.item(), abs=1e-12)
    ours = M.negative_log_likelihood(probs.log(), targets, weights=weights)
    assert ours.item() == pytest.approx(M.negative_log_likelihood(probs[rows].log(), targets[rows]).item())
    for a, b in zip(
        M.brier_decomposition(probs, targets, weights=weights),
        M.brier_decomposition(probs[rows], targets[rows]),
        strict=True,
    ):
        assert a.item() == pytest.approx(b.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_the_values_of_its_probabilities(dtype: torch.dtype) -> None:
    probs, targets = made(3000, 10, dtype)
    exact = probs.double()
    right = (exact.argmax(-1) == targets).double().mean()
    assert M.accuracy(probs, targets).item() == pytest.approx(right.item(), abs=1e-12)
    brier = (exact - torch.nn.functional.one_hot(targets, 10)).square().sum(-1).mean()
    assert M.brier_score(probs, targets).item() == pytest.approx(brier.item(), abs=1e-12)
    logs = made(3000, 10)[0].log().to(dtype)
    picked = -logs.double()[torch.arange(3000), targets].mean()
    assert M.negative_log_likelihood(logs, targets).item() == pytest.approx(picked.item(), abs=1e-12)


def test_a_row_that_rounding_put_above_one_is_a_distribution() -> None:
    assert M.accuracy(torch.tensor([[1.0000002, 0.0]]), [0]).item() == 1.0


def test_bad_input_is_named() -> None:
    with pytest.raises(BadInput, match=r"row 1.*log_softmax"):
        M.negative_log_likelihood([[math.log(0.5)] * 2, [2.0, 1.0]], [0, 0])
    with pytest.raises(BadInput, match="NaN"):
        M.negative_log_likelihood([[0.0, math.nan]], [0])
    with pytest.raises(BadType, match="floating"):
        M.accuracy(torch.tensor([[1, 0]]), [0])
    with pytest.raises(BadInput, match=r"NaN.*row 1"):
        M.brier_score([[0.5, 0.5], [math.nan, 0.5]], [0, 0])
    with pytest.raises(BadInput, match="label 2"):
        M.negative_log_likelihood(torch.zeros(1, 1), [2])
