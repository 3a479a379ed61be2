"""What every calibrator does; the traps are in tests/traps/test_d_calibrators.py."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesguard.calibration import (
    BBQ,
    AdaptiveConformal,
    Calibrator,
    Conformal,
    ConformalInterval,
    HistogramBinning,
    IsotonicCalibration,
    MatrixScaling,
    Multicalibration,
    PriorCorrection,
    SelectiveClassifier,
    StructuredScaling,
    TemperatureScaling,
)
from bayesguard.errors import BadInput, BadType
from bayesguard.predictive import Predictive


class Doubting(Calibrator):
    """The least calibrator: it learns how many examples it saw."""

    acts_on = "pooled"
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        assert not torch.is_grad_enabled()
        self.seen.fill_(len(targets))

    def _calibrate(self, pred: Predictive) -> Predictive:
        return pred


def test_a_calibrator_of_ones_own() -> None:
    pred = Predictive.from_probs([[0.5, 0.5]])
    calibrator = Doubting()
    assert calibrator.diagnostics == {}
    assert calibrator.fit(pred, [1]) is calibrator
    assert calibrator.fitted
    assert calibrator(pred) is pred
    assert set(calibrator.state_dict()) == {"is_fitted", "seen", "_extra_state"}


def test_state_moves_and_loads() -> None:
    logits = torch.tensor([[4.0, 0.0]] * 3 + [[0.0, 4.0]])
    fitted = TemperatureScaling().fit(Predictive.from_logits(logits), [0, 0, 1, 1])
    other = TemperatureScaling()
    other.load_state_dict(fitted.state_dict())
    assert other.fitted
    assert float(other.temperature) == float(fitted.temperature)
    assert float(nn.ModuleList([fitted]).to(torch.float64)[0].get_buffer("temperature")) == float(other.temperature)
    assert "temperature=" in repr(fitted)
    assert "not fitted" in repr(TemperatureScaling())


def test_a_state_of_another_kind_or_of_other_settings_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    pred = Predictive.from_logits(3 * torch.randn(90, 3, generator=generator))
    targets = pred.probs.multinomial(1, generator=generator)[:, 0]
    kinds: list[Calibrator] = [HistogramBinning(), IsotonicCalibration(), BBQ(), Conformal(), Conformal("lac")]
    kinds += [Conformal(seed=1), MatrixScaling(1.0, 1.0), StructuredScaling()]
    fitted = [kind.fit(pred, targets) for kind in kinds]
    for one in fitted:
        for other in fitted:
            loaded = nn.ModuleList([deepcopy(other)])
            if one is other:
                loaded.load_state_dict(nn.ModuleList([one]).state_dict())
                continue
            with pytest.raises(
                BadInput, match=r"the state is of .*, and this is .*; make the calibrator as it was made"
            ):
                loaded.load_state_dict(nn.ModuleList([one]).state_dict())
    numbers, real = Predictive.from_normal(torch.zeros(90), 1.0), torch.randn(90, generator=generator)
    with pytest.raises(
        BadInput, match=r"of ConformalInterval\(score='cdf', by_group=False\), and this is .*'absolute'"
    ):
        ConformalInterval("absolute").load_state_dict(ConformalInterval("cdf").fit(numbers, real).state_dict())


def test_a_state_that_does_not_say_how_it_was_made_still_loads() -> None:
    pred = Predictive.from_probs(torch.rand(90, 3, generator=torch.Generator().manual_seed(0)).softmax(-1))
    fitted = Conformal("lac").fit(pred, torch.arange(90) % 3)
    old = {name: value for name, value in fitted.state_dict().items() if name != "_extra_state"}
    loaded = Conformal("lac")
    loaded.load_state_dict(old)
    assert torch.equal(loaded(pred).prediction_set(), fitted(pred).prediction_set())


def test_fit_inside_inference_mode() -> None:
    with torch.inference_mode():
        logits = torch.tensor([[4.0, 0.0]] * 3 + [[0.0, 4.0]])
        scaling = TemperatureScaling().fit(Predictive.from_logits(logits), [0, 0, 1, 1])
    scaling.load_state_dict(TemperatureScaling().fit(Predictive.from_logits(2 * logits), [0, 0, 1, 1]).state_dict())
    scaling.fit(Predictive.from_logits(logits), [0, 0, 1, 1])
    assert not scaling.temperature.is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_fitted_keeps_its_precision(dtype: torch.dtype) -> None:
    """In half precision the bound is one of few numbers, and coverage another one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 20, generator=generator)
    labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    pred = Predictive.from_logits(logits)
    for calibrator in (TemperatureScaling(), Conformal("aps"), Conformal("lac"), PriorCorrection()):
        before: Any = calibrator.fit(pred, labels)(pred)
        after: Any = nn.ModuleList([calibrator]).to(dtype)[0](pred)
        assert torch.equal(after.probs, before.probs)
        assert torch.equal(after.prediction_set(0.01), before.prediction_set(0.01))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
def test_answers_of_any_dtype(dtype: torch.dtype) -> None:
    """Networks that say yes or no are trained on floats, tables hold bools; log_prob takes both."""
    odds = torch.linspace(-4, 4, 200)
    pred, answers = Predictive.from_logits(odds), (odds + torch.arange(200) % 7 > 2).long()
    given = answers.to(dtype)
    for kind in (PriorCorrection, lambda: Conformal("lac"), lambda: Conformal("lac", by="class")):
        want, got = (kind().fit(pred, each).state_dict() for each in (answers, given))
        assert all(torch.equal(want[name].nan_to_num(), value.nan_to_num()) for name, value in got.items())
    sets = Conformal("lac").fit(pred, answers)
    assert torch.equal(sets.p_values(pred, given), sets.p_values(pred, answers))
    assert torch.equal(AdaptiveConformal(sets).run(pred, given), AdaptiveConformal(sets).run(pred, answers))
    thresholds = [SelectiveClassifier(0.3).fit(pred, each).threshold for each in (answers, given)]
    assert thresholds[0] == thresholds[1]
    everybody = torch.ones(200, 1, dtype=torch.bool)
    steps = [Multicalibration().fit(pred, each, groups=everybody).steps for each in (answers, given)]
    assert torch.equal(*steps)


def test_not_a_predictive() -> None:
    with pytest.raises(BadType, match=r"Predictive\.from_logits"):
        TemperatureScaling().fit(torch.zeros(3, 2), [0, 1, 0])  # type: ignore[arg-type]


def test_weights_are_refused_where_all_examples_count_alike() -> None:
    pred = Predictive.from_probs([[0.5, 0.5], [0.2, 0.8]])
    with pytest.raises(BadType, match="a Doubting counts all examples alike"):
        Doubting().fit(pred, [1, 0], weights=[1.0, 2.0])
