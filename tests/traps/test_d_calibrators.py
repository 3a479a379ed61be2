"""Traps of calibrators."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bayesguard.calibration import TemperatureScaling
from bayesguard.errors import BadInput, BadType, CalibrationWarning, NotFitted
from bayesguard.predictive import BernoulliPredictive, Predictive

INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


def mixed(count: int = 40, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits with right and wrong answers."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, classes, generator=generator)
    noisy = logits + 4 * torch.randn(count, classes, generator=generator)
    return logits, noisy.argmax(-1)


def test_d1_separable_set_keeps_identity_and_warns() -> None:
    logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    scaling = TemperatureScaling()
    with pytest.warns(CalibrationWarning, match="every target is the top class"):
        scaling.fit(Predictive.from_logits(logits), logits.argmax(-1))
    assert float(scaling.temperature) == 1.0
    assert scaling.diagnostics["at_bound"]


def test_d1_all_wrong_stops_at_the_bound_and_warns() -> None:
    logits = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    scaling = TemperatureScaling()
    with pytest.warns(CalibrationWarning, match="bound"):
        scaling.fit(Predictive.from_logits(logits), logits.argmin(-1))
    assert float(scaling.temperature) == pytest.approx(100.0)
    assert scaling.diagnostics["at_bound"]


def test_d1_tiny_logits_stop_at_the_lower_bound() -> None:
    logits, targets = mixed()
    with pytest.warns(CalibrationWarning, match="bound"):
        scaling = TemperatureScaling().fit(Predictive.from_logits(1e-5 * logits), targets)
    assert float(scaling.temperature) == pytest.approx(0.01)


def test_d2_optimum_far_from_one() -> None:
    """The copied optimiser with fixed steps stops at 1.85 where the optimum is 37.3."""
    logits, targets = mixed()
    near = TemperatureScaling().fit(Predictive.from_logits(logits), targets)
    logits = logits * (37.3 / float(near.temperature))
    far = TemperatureScaling().fit(Predictive.from_logits(logits), targets)
    assert float(far.temperature) == pytest.approx(37.3, rel=1e-5)


def test_d3_masked_classes() -> None:
    logits, targets = mixed()
    masked = torch.cat([logits, torch.full((len(logits), 2), -torch.inf)], dim=-1)
    plain = TemperatureScaling().fit(Predictive.from_logits(logits), targets)
    scaling = TemperatureScaling().fit(Predictive.from_logits(masked), targets)
    assert float(scaling.temperature) == float(plain.temperature)
    assert torch.equal(scaling(Predictive.from_logits(masked)).probs[:, 3:], torch.zeros(len(logits), 2))
    for bad in (torch.nan, torch.inf):
        logits[7, 1] = bad
        with pytest.raises(BadInput, match="row 7"):
            Predictive.from_logits(logits)


def test_d3_target_that_every_draw_masks_is_left_out_with_a_warning() -> None:
    logits, targets = mixed()
    plain = TemperatureScaling().fit(Predictive.from_logits(logits[1:]), targets[1:])
    logits[0, targets[0]] = -torch.inf
    with pytest.warns(CalibrationWarning, match="1 of 40 targets"):
        scaling = TemperatureScaling().fit(Predictive.from_logits(logits), targets)
    assert float(scaling.temperature) == pytest.approx(float(plain.temperature), rel=1e-6)
    assert scaling.diagnostics["num_excluded"] == 1


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda y: y.index_fill(0, torch.tensor([3]), -100), BadInput),
        (lambda y: y.index_fill(0, torch.tensor([3]), 3), BadInput),
        (lambda y: nn.functional.one_hot(y, 3), BadInput),
        (lambda y: nn.functional.one_hot(y, 3).float(), BadType),
        (lambda y: y.float(), BadType),
        (lambda y: y[:, None], BadInput),
    ],
)
def test_d4_labels(change: object, error: type[Exception]) -> None:
    logits, targets = mixed()
    assert callable(change)
    with pytest.raises(error):
        TemperatureScaling().fit(Predictive.from_logits(logits), change(targets))


def test_d4_message_names_label_and_row() -> None:
    logits, targets = mixed()
    targets[5] = -100
    with pytest.raises(BadInput, match="label -100 in row 5"):
        TemperatureScaling().fit(Predictive.from_logits(logits), targets)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_d5_every_integer_dtype(dtype: torch.dtype) -> None:
    logits, targets = mixed(classes=200)
    targets = targets % 100  # int8 holds no more, and overflows against 200 classes
    expected = TemperatureScaling().fit(Predictive.from_logits(logits), targets)
    found = TemperatureScaling().fit(Predictive.from_logits(logits), targets.to(dtype))
    assert float(found.temperature) == float(expected.temperature)


def test_d6_d7_rows_that_do_not_match() -> None:
    logits, targets = mixed()
    with pytest.raises(BadInput, match="shape"):
        TemperatureScaling().fit(Predictive.from_logits(logits), targets[:-1])
    with pytest.raises(BadInput, match="no examples"):
        TemperatureScaling().fit(Predictive.from_logits(logits)[:0], targets[:0])


def test_d6_d7_pairs_stay_aligned_under_one_permutation() -> None:
    logits, targets = mixed()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))
    first = TemperatureScaling().fit(Predictive.from_logits(logits), targets)
    second = TemperatureScaling().fit(Predictive.from_logits(logits)[order], targets[order])
    assert float(first.temperature) == pytest.approx(float(second.temperature), rel=1e-6)


def test_d8_class_absent_from_the_calibration_set() -> None:
    logits, targets = mixed(classes=5)
    kept = targets < 4
    pred = Predictive.from_logits(logits)
    scaling = TemperatureScaling().fit(pred[kept], targets[kept])
    probs = scaling(pred).numpy()["probs"]
    assert probs.shape == (40, 5)
    assert (probs > 0).all()


def test_d9_one_class_is_refused() -> None:
    with pytest.raises(BadInput, match="BernoulliPredictive"):
        Predictive.from_logits(torch.zeros(4, 1))


def test_d9_perfectly_separated_binary() -> None:
    odds = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    pred = Predictive.from_logits(odds)
    with pytest.warns(CalibrationWarning):
        scaling = TemperatureScaling().fit(pred, odds > 0)
    assert scaling(pred).mean.tolist() == pred.mean.tolist()
    assert float(scaling.temperature) == 1.0


def test_d10_unfitted() -> None:
    with pytest.raises(NotFitted, match="fit"):
        TemperatureScaling()(Predictive.from_logits(torch.zeros(4, 2)))


def test_d11_logits_inside_the_unit_interval_are_logits() -> None:
    logits = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    found = torch.from_numpy(Predictive.from_logits(logits).numpy()["probs"])
    assert torch.allclose(found, logits.softmax(-1))
    with pytest.raises(BadInput, match="from_logits"):
        Predictive.from_probs(torch.tensor([[0.7, 0.3], [2.0, -1.0]]))


def test_d12_model_is_left_as_it_was() -> None:
    torch_generator = torch.Generator().manual_seed(0)
    network = nn.Linear(4, 3).train()
    before = copy.deepcopy(network.state_dict())
    logits = network(torch.randn(50, 4, generator=torch_generator))
    targets = (logits + torch.randn(50, 3, generator=torch_generator)).argmax(-1)
    scaling = TemperatureScaling().fit(Predictive.from_logits(3 * logits), targets)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(buffer.requires_grad for buffer in scaling.buffers())
    calibrated = scaling(BernoulliPredictive.from_logits(logits[:, 0]))
    assert calibrated.mean.requires_grad  # applying the map does not cut the graph
