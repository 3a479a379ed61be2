"""A few numbers as Python's floats: the same answers as by torch, and torch wherever somebody watches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, few
from bayesguard.predictive.few import are_few, pooled_of_few

SHAPES = [(5, 1, 3), (3, 4, 5), (2, 3, 2, 4), (2, 2, 2, 2, 3)]
Kind = type[CategoricalPredictive] | type[BernoulliPredictive]


def logits_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def by_torch(monkeypatch: pytest.MonkeyPatch, kind: Kind, logits: Tensor, weights: Any = None) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(few, "_FEW", 0)
        return answers(kind(logits, weights))


def answers(pred: Any) -> dict[str, Tensor]:
    return {"probs": pred.probs, "log_probs": pred._log_probs}


def agree(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    tolerance = 1e-12 if want["probs"].dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    return all(
        got[name].dtype == want[name].dtype
        and got[name].shape == want[name].shape
        and torch.allclose(got[name], want[name], rtol=tolerance, atol=tolerance)
        for name in want
    )


@pytest.mark.parametrize("kind", [CategoricalPredictive, BernoulliPredictive])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_floats_give_what_torch_gives(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, dtype: torch.dtype, shape: tuple[int, ...], weighted: bool
) -> None:
    logits = logits_of(shape, dtype)
    weights = torch.arange(1.0, 1.0 + shape[0]) if weighted else None
    pred = kind(logits, weights)
    assert are_few(logits)
    assert agree(answers(pred), by_torch(monkeypatch, kind, logits, weights))
    # The twins: other weights, and logits off by a thousandth.
    assert not agree(answers(pred), by_torch(monkeypatch, kind, logits, torch.arange(3.0, 3.0 + 2 * shape[0], 2)))
    assert not agree(answers(pred), by_torch(monkeypatch, kind, logits * 1.001, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_mixture_however_it_is_asked_for(dtype: torch.dtype) -> None:
    """The mixture alone, after its moments, and reduced: the same bits; a row does not depend on those beside it."""
    for kind in (CategoricalPredictive, BernoulliPredictive):
        logits = logits_of((4, 3, 4), dtype)
        alone, after = kind(logits), kind(logits)
        assert are_few(alone._draw_log_probs(slice(None)))
        after.uncertainty()
        for other in (after, alone.reduce()):
            assert torch.equal(alone.probs, other.probs)
            assert torch.equal(alone.logits, other.logits)
        for row in range(3):
            assert torch.equal(alone[row]._log_probs, alone._log_probs[row : row + 1])


@pytest.mark.parametrize("value", [-2000.0, -torch.inf])
def test_what_is_too_small_for_a_float_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    logits = logits_of((3, 2, 4))
    assert pooled_of_few(logits.log_softmax(-1), None) is not None
    logits[:, 1, 2] = value
    assert pooled_of_few(logits.log_softmax(-1), None) is None
    pred = CategoricalPredictive(logits)
    assert agree(answers(pred), by_torch(monkeypatch, CategoricalPredictive, logits))
    assert pred.logits[1, 2] < -600


def test_what_is_no_mixture_is_left_to_torch() -> None:
    log_probs = logits_of((3, 2, 4)).log_softmax(-1)
    for place in ((0, 0, 0), (2, 1, 3)):
        broken = log_probs.clone()
        broken[place] = torch.nan
        assert pooled_of_few(broken, None) is None
    assert pooled_of_few(log_probs + 1000, None) is None
    assert pooled_of_few(log_probs - 1000, None) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch itself calls it
def test_gradients_and_tangents_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, direction = logits_of((3, 2, 4)), logits_of((3, 2, 4), scale=1.0)

    def first(x: Tensor) -> Tensor:
        return CategoricalPredictive(x).probs[0, 0]

    with monkeypatch.context() as patch:
        patch.setattr(few, "_FEW", 0)
        want = torch.func.jvp(first, (logits,), (direction,))[1]
    assert abs(want) > 1e-3
    (gradient,) = torch.autograd.grad(first(given := logits.clone().requires_grad_()), given)
    assert torch.allclose((gradient * direction).sum(), want)
    assert torch.allclose((torch.func.grad(first)(logits) * direction).sum(), want)
    assert torch.allclose(torch.func.jvp(first, (logits,), (direction,))[1], want)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(first(forward_ad.make_dual(logits, direction))).tangent
    assert torch.allclose(tangent, want)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_whoever_watches_sees_torch() -> None:
    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    x = logits_of((3, 1, 4))
    assert are_few(x)
    with Watching():
        assert not are_few(x)
    assert not are_few(torch.nn.Parameter(x))
    assert not are_few(x.expand(20, 3, 1, 4))
    assert not are_few(x[:, :0])
    traced: Any = torch.jit.trace(lambda y: CategoricalPredictive(y).probs, (x,), check_trace=False)
    other = logits_of((3, 1, 4), scale=1.0)
    assert torch.allclose(traced(other), CategoricalPredictive(other).probs)


def test_equal_weights_are_made_when_asked_for() -> None:
    pred: Any = CategoricalPredictive._of_finite(logits_of((4, 2, 3)), False)
    with torch.inference_mode():
        assert torch.equal(pred.weights, torch.full((4,), 0.25, dtype=torch.float64))
    assert not pred.weights.is_inference()
    assert pred.weights is pred.weights
    assert pred.num_samples == pred.reduce().num_samples == pred[0].num_samples == 4
    # Weights that somebody has changed are those that count.
    other: Any = CategoricalPredictive._of_finite(pred.draw_logits, False)
    other.weights = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(other.probs, pred.draw_logits[0].exp())
    assert not torch.allclose(pred.probs, pred.draw_logits[0].exp())
