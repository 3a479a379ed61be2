"""A prediction on a device is looked at once, at its end, whatever its draws, and with the errors of a look in place."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bayesguard as bg
from bayesguard.calibration import TemperatureScaling, VarianceScaling
from bayesguard.calibration.base import Calibrator
from bayesguard.errors import BadInput, BayesguardError, BayesguardWarning
from bayesguard.likelihoods import Bernoulli, Categorical, HeteroscedasticGaussian, Likelihood
from bayesguard.looks import with_one_look
from bayesguard.predictive import Predictive
from bayesguard.predictor import Predictor
from tests.networks import mlp
from tests.sampling.test_host_reads import HostReads

ROWS = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


class Copies(TorchFunctionMode):
    """Counts copies to a device, or from it, that the host waits for."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        settings, name = kwargs or {}, getattr(func, "__name__", "")
        places = [value for value in (*args[1:], *settings.values()) if isinstance(value, torch.device)]
        self.count += name in ("cpu", "tolist", "numpy") or (
            name == "to" and bool(places) and not args[0].is_floating_point() and not settings.get("non_blocking")
        )
        return func(*args, **settings)


@contextmanager
def on_a_device() -> Iterator[None]:
    """Let tensors say that they lie on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "is_cpu", property(lambda _: False))
        patch.setattr(Tensor, "is_cuda", property(lambda _: True))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """One prediction in a few hundred has logits that sum to one by chance, and is made twice."""
    torch.manual_seed(0)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let groups of draws be as small as they can, blocks of eight."""
    monkeypatch.setattr("bayesguard.sampling.engine._GROUP_BYTES", 1)


def dropout(likelihood: Likelihood | None = None, classes: int = 3, strategy: Any = "replay") -> bg.MCDropout:
    return bg.MCDropout(mlp(nn.Dropout(0.5), classes=classes).eval(), likelihood, strategy=strategy)


def scaled(predictor: bg.MCDropout, calibrator: Calibrator, **buffers: Tensor) -> bg.MCDropout:
    calibrator.load_state_dict({**buffers, "is_fitted": torch.tensor(True)})
    predictor.calibrators = nn.ModuleList([calibrator])
    return predictor


PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "replay": dropout,
    "vmap": lambda: dropout(strategy="vmap"),
    "fold": lambda: dropout(strategy="fold"),
    "loop": lambda: dropout(strategy="loop"),
    "scaled": lambda: scaled(dropout(), TemperatureScaling(), temperature=torch.tensor(2.0)),
    "yes or no": lambda: dropout(Bernoulli()),
    "real": lambda: dropout(HeteroscedasticGaussian(), 2),
    "real, scaled": lambda: scaled(dropout(HeteroscedasticGaussian(), 2), VarianceScaling(), factor=torch.tensor(2.0)),
    "weights": lambda: bg.Variational(mlp(nn.Identity()).eval()),
    "members": lambda: bg.DeepEnsemble([dropout(), dropout()]),
}


def looks(predictor: Predictor, num_samples: int) -> tuple[int, int, int]:
    """Return the looks of a prediction that reduces its draws, the copies that are waited for, and the groups."""
    groups = len(list(predictor.predictives(ROWS, num_samples=num_samples, seed=0)))
    draws = predictor._draws(num_samples, None, None, None, False)
    with on_a_device(), torch.no_grad(), Copies() as copies, HostReads() as reads:
        predictor._answer((ROWS,), {}, draws, 0)
    return reads.count, copies.count, groups


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("name", PREDICTORS)
def test_looks_do_not_grow_with_the_groups(name: str) -> None:
    predictor = PREDICTORS[name]()
    # The draws of continuous answers are joined under weights, which are looked at once a call; so are members'.
    few, many = looks(predictor, 16), looks(predictor, 64)
    assert many[2] > 2 * few[2] - 1 >= 3
    assert many[:2] == few[:2]
    assert few[0] <= 5
    assert few[1] <= 2


@pytest.mark.usefixtures("small_groups")
def test_one_look_is_enough() -> None:
    assert looks(dropout(), 64) == (1, 0, 8)


class Looking(Categorical):
    """A likelihood that looks at each group by itself."""

    def predictive(self, outputs: Tensor, weights: Tensor | None = None, *, exact: bool = False) -> Predictive:
        assert outputs.sum().item() < torch.inf
        return super().predictive(outputs, weights, exact=exact)


@pytest.mark.usefixtures("small_groups")
def test_a_look_per_group_would_be_counted() -> None:
    predictor = dropout(Looking())
    assert [looks(predictor, samples)[0] for samples in (8, 64)] == [2, 9]


class Given(Predictor):
    """Hands out draws `[S, N, ...]` that are given, in groups of two."""

    def __init__(self, draws: Tensor, likelihood: Likelihood | None = None) -> None:
        super().__init__(nn.Identity(), likelihood, num_samples=len(draws))
        self.draws, self.runs = draws, 0

    def output_chunks(
        self, *inputs: Any, num_samples: int, seed: int, offset: int = 0, **more: Any
    ) -> Iterator[Tensor]:
        self.runs += 1
        yield from self.draws.split(2)

    def draw(self, seed: int) -> nn.Module:
        raise NotImplementedError

    strategy = "given"


def given(likelihood: Likelihood | None = None, *places: tuple[int, int, float], classes: int = 3) -> Given:
    """Draws for five examples, with some of their rows replaced by one number."""
    draws = torch.randn(8, 5, classes, generator=torch.Generator().manual_seed(1)) * 3
    for draw, row, value in places:
        draws[draw, row] = value
    return Given(draws, likelihood)


def nearly(draws: Tensor) -> Given:
    """Logits of which the first row of each group sums to one, and no other does."""
    draws = draws.clone()
    draws[::2, 0, 0] += 1 - draws[::2, 0].sum(-1)
    return Given(draws)


class Refusing(TemperatureScaling):
    """A calibrator that fails in its own way where something is wrong."""

    def _calibrate(self, pred: Predictive) -> Predictive:
        if not math.isfinite(pred.draw_logits.sum().item()):
            raise ZeroDivisionError("what NaN did here")
        return super()._calibrate(pred)


def refusing() -> Given:
    predictor = given(None, (4, 3, math.nan))
    calibrator = Refusing()
    calibrator.load_state_dict({"temperature": torch.tensor(2.0), "is_fitted": torch.tensor(True)})
    predictor.calibrators = nn.ModuleList([calibrator])
    return predictor


def unfitted() -> Given:
    predictor = given()
    predictor.calibrators = nn.ModuleList([TemperatureScaling()])
    return predictor


WRONG: dict[str, Callable[[], Given]] = {
    "NaN": lambda: given(None, (5, 3, math.nan)),
    "NaN in two groups": lambda: given(None, (6, 1, math.nan), (3, 4, math.nan)),
    "infinity": lambda: given(None, (7, 2, math.inf)),
    "all masked": lambda: given(None, (2, 4, -math.inf)),
    "probabilities": lambda: Given(given().draws.softmax(-1)),
    "probabilities in one group": lambda: Given(torch.cat([given().draws[:6], given().draws[6:].softmax(-1)])),
    "NaN, yes or no": lambda: given(Bernoulli(), (3, 0, math.nan)),
    "NaN, real": lambda: given(HeteroscedasticGaussian(), (4, 2, math.nan), classes=2),
    "NaN, and another error": refusing,
    "not fitted": unfitted,
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("keep", [True, False])
def test_errors_are_those_of_a_look_in_place(name: str, keep: bool) -> None:
    def ask() -> Predictive:
        predictor = WRONG[name]()
        return predictor._answer((torch.zeros(5, 3),), {}, predictor._draws(None, None, None, None, keep), 0)

    with pytest.raises(BayesguardError) as wanted:
        ask()
    with on_a_device(), pytest.raises(type(wanted.value), match=f"^{re.escape(str(wanted.value))}$"):
        ask()


def test_an_error_without_a_condition_is_raised_as_it_is() -> None:
    def fail() -> None:
        raise ZeroDivisionError("of its own")

    with on_a_device(), pytest.raises(ZeroDivisionError, match="of its own"):
        with_one_look(fail)


def test_a_suspicion_alone_is_no_error() -> None:
    draws = given().draws
    for predictor, runs in ((Given(draws), 1), (nearly(draws), 2)):
        want = predictor(torch.zeros(5, 3)).probs
        predictor.runs = 0
        with on_a_device():
            assert torch.allclose(predictor(torch.zeros(5, 3)).probs, want, rtol=1e-6)
        assert predictor.runs == runs


def test_the_warning_of_a_sigmoid_is_given() -> None:
    draws = given(classes=40).draws.sigmoid()
    with on_a_device(), pytest.warns(BayesguardWarning, match="look like probabilities"):
        Given(draws, Bernoulli())(torch.zeros(5, 3))


def test_outside_of_a_prediction_looks_are_had_in_place() -> None:
    with on_a_device():
        with_one_look(lambda: given()(torch.zeros(5, 3)))
        with pytest.raises(BadInput, match="row 3"):
            Categorical().predictive(given(None, (5, 3, math.nan)).draws)
