"""Which rows are taken for probabilities, what becomes of them, and the way back."""

import pytest
import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.predictive import CategoricalPredictive, Predictive
from bayesguard.predictive.categorical import _are_distributions
from bayesguard.predictive.combine import Reduction, concatenate
from bayesguard.predictive.numerics import CACHED, unfilled


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_that_sum_to(total: float, count: int, classes: int, dtype: torch.dtype) -> Tensor:
    rows = torch.rand(count, classes, generator=generator(classes), dtype=torch.float64) + 0.01
    return (total * rows / rows.sum(-1, keepdim=True)).to(dtype)


def is_distribution(row: Tensor) -> bool:
    """The rule as it is promised, in float64."""
    wide = row.double()
    return bool((wide >= 0).all() and (wide <= 1).all() and abs(float(wide.sum()) - 1) <= 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 1000, 50_000])
def test_the_quick_look_decides_what_float64_decides(classes: int, dtype: torch.dtype) -> None:
    """Within rounding of 1e-3, where rows pass and fail, and of 5e-4, where the quick look hands over."""
    decided, quick = [], []
    for border in (1e-3, 5e-4):
        for sign in (-1, 1):
            for off in (-3e-8, -1e-8, -1e-12, 0.0, 1e-12, 1e-8, 3e-8):
                for row in rows_that_sum_to(1 + sign * (border + off), 12, classes, dtype):
                    assert _are_distributions(row[None]) == is_distribution(row)
                    if border == 1e-3:
                        decided.append(is_distribution(row))
                        quick.append(bool((row.sum() - 1).abs() <= 1e-3))
    assert set(decided) == {True, False}
    # What must fail: the border itself in float32, which takes what float64 refuses, or the other way round.
    assert (quick != decided) == (dtype == torch.float32 and classes > 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_at_the_ends(dtype: torch.dtype) -> None:
    above = torch.nextafter(torch.ones((), dtype=dtype), torch.full((), 2.0, dtype=dtype))
    below = -torch.finfo(dtype).tiny
    for row in ([1.0, 0.0], [1.0, -0.0], [1.0, 9e-4], [1 - 9e-4, 0.0]):
        assert _are_distributions(torch.tensor([row], dtype=dtype))
    for row in ([float(above), 0.0], [1.0, below], [0.5, float("nan")], [float("inf"), 0.0], [1.0, 1.1e-3]):
        values = torch.tensor([[0.5, 0.5], row], dtype=dtype)
        assert not _are_distributions(values)
        with pytest.raises(BadInput, match="row 1"):
            Predictive.from_probs(values)


def test_one_bad_row_behind_many_good_ones_is_found() -> None:
    rows = 2 * CACHED // 100 + 7
    probs = rows_that_sum_to(1, rows, 100, torch.float32)
    Predictive.from_probs(probs)
    probs[rows - 1] *= 1.002
    with pytest.raises(BadInput, match=f"row {rows - 1} "):
        Predictive.from_probs(probs)


def test_no_rows_are_no_error() -> None:
    assert Predictive.from_probs(torch.empty(0, 3)).probs.shape == (0, 3)
    with pytest.raises(BadInput):
        Predictive.from_probs(torch.empty(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draws", [False, True])
def test_logarithms_are_those_of_the_whole(draws: bool, dtype: torch.dtype) -> None:
    shape = (3, CACHED // 500, 400) if draws else (CACHED // 200, 400)  # several slices of them
    probs = (30 * torch.randn(shape, generator=generator(0), dtype=dtype)).softmax(-1)
    probs[..., 0, 1:] = 0
    probs[..., 0, 0] = 1
    wanted = probs.log().log_softmax(-1)
    found = Predictive.from_probs(probs, draws=draws).draw_logits
    assert found.dtype == dtype
    assert torch.equal(found, wanted if draws else wanted[None])
    crossed = Predictive.from_probs(probs.mT.contiguous().mT, draws=draws)
    assert torch.equal(crossed.draw_logits, found)


def test_gradients_pass() -> None:
    probs = rows_that_sum_to(1, 5, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: Predictive.from_probs(values / values.sum(-1, True)).probs, probs)


@pytest.mark.parametrize("classes", [3, 1000])
def test_probabilities_of_one_draw_are_those_of_its_mixture_to_rounding(classes: int) -> None:
    logits = 8 * torch.randn(40, classes, generator=generator(1))
    logits[0, 1:] = -torch.inf
    pred = Predictive.from_logits(logits)
    exact = logits.double().softmax(-1)
    assert (pred.probs - exact).abs().max() <= 2.4e-7
    assert torch.allclose(pred.probs.double(), exact, rtol=2e-5, atol=0)
    assert (pred.probs.double().sum(-1) - 1).abs().max() <= 1e-6
    assert (pred.logits.exp() - pred.probs).abs().max() <= 2.4e-7
    assert pred.probs[0].tolist() == [1.0] + [0.0] * (classes - 1)
    wide = Predictive.from_logits(logits.double())
    assert torch.allclose(wide.probs, exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("classes", [3, 17, 1000])
def test_one_draw_has_the_same_bits_on_every_way(classes: int) -> None:
    probs = (3 * torch.randn(600, classes, generator=generator(2))).softmax(-1)
    pred = Predictive.from_probs(probs)
    assert isinstance(pred, CategoricalPredictive)
    whole = pred.probs
    alone = torch.cat([Predictive.from_probs(row[None]).probs for row in probs])
    reduction = Reduction()
    reduction.update(pred)
    ways = [
        pred.reduce().probs,
        alone,
        torch.cat([pred[row].probs for row in range(600)]),
        pred[torch.arange(599, -1, -1)].probs.flip(0),
        concatenate([pred[:7], pred[7:]]).probs,
        Predictive.from_probs(probs[None], draws=True).probs,
        reduction.result().probs,
    ]
    assert all(torch.equal(way, whole) for way in ways)
    pred.uncertainty()  # its moments, which another way might be taken from
    assert torch.equal(pred.probs, whole)
    assert torch.equal(pred.labels, whole.argmax(-1))
    assert torch.equal(pred.confidence, whole.amax(-1))


def test_unfilled_memory_is_of_the_same_kind() -> None:
    for dtype in (torch.float32, torch.float64):
        like = torch.zeros(6, 5, dtype=dtype).T.requires_grad_()
        made = unfilled(like)
        assert (made.shape, made.dtype, made.device) == (like.shape, dtype, like.device)
        assert made.is_contiguous()
        assert not made.requires_grad
