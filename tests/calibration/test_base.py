"""What every calibrator does; the traps are in tests/traps/test_d_calibrators.py."""

import pytest
import torch
from torch import Tensor, nn

from bayesguard.calibration import Calibrator, TemperatureScaling
from bayesguard.errors import BadType
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
    assert set(calibrator.state_dict()) == {"is_fitted", "seen"}


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


def test_fit_inside_inference_mode() -> None:
    with torch.inference_mode():
        logits = torch.tensor([[4.0, 0.0]] * 3 + [[0.0, 4.0]])
        scaling = TemperatureScaling().fit(Predictive.from_logits(logits), [0, 0, 1, 1])
    scaling.fit(Predictive.from_logits(logits), [0, 0, 1, 1])
    assert not scaling.temperature.is_inference()


def test_not_a_predictive() -> None:
    with pytest.raises(BadType, match=r"Predictive\.from_logits"):
        TemperatureScaling().fit(torch.zeros(3, 2), [0, 1, 0])  # type: ignore[arg-type]


def test_weights_are_refused_where_all_examples_count_alike() -> None:
    pred = Predictive.from_probs([[0.5, 0.5], [0.2, 0.8]])
    with pytest.raises(BadType, match="a Doubting counts all examples alike"):
        Doubting().fit(pred, [1, 0], weights=[1.0, 2.0])
