"""Training inside of the caller's `torch.inference_mode()` is that outside of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bayesguard as bg
from bayesguard.errors import BadInput
from bayesguard.predictor import Predictor

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randn(12, 1, generator=torch.Generator().manual_seed(1))


def _network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 1)


EPOCHS = {"epochs": 2}
MAKE: dict[str, tuple[Callable[[], Predictor], dict[str, Any]]] = {
    "deterministic": (lambda: bg.Deterministic(_network(), bg.likelihoods.Gaussian()), EPOCHS),
    "variational": (lambda: bg.Variational(_network(), bg.likelihoods.Gaussian()), EPOCHS),
    "joint": (lambda: bg.DeepEnsemble(_network, bg.likelihoods.Gaussian(), num_members=2, joint=True), EPOCHS),
    "apart": (lambda: bg.DeepEnsemble(_network, bg.likelihoods.Gaussian(), num_members=2, joint=False), EPOCHS),
    "hmc": (
        lambda: bg.HMC(_network(), bg.likelihoods.Gaussian(1.0)),
        {"num_samples": 4, "warmup": 4, "num_chains": 1, "map_steps": 3},
    ),
}


@pytest.mark.filterwarnings("ignore::bayesguard.errors.ConvergenceWarning")
@pytest.mark.parametrize("kind", list(MAKE))
def test_training_is_that_outside(kind: str) -> None:
    make, settings = MAKE[kind]
    inside, outside = make(), make()
    outside.fit((X, Y), **settings)
    with torch.inference_mode():
        inside.fit((X.clone(), Y.clone()), **settings)
    for got, want in zip(inside.parameters(), outside.parameters(), strict=True):
        assert torch.equal(got, want)
        assert not got.is_inference()


@pytest.mark.parametrize("kind", list(MAKE))
def test_what_was_made_inside_is_refused(kind: str) -> None:
    make, settings = MAKE[kind]
    with torch.inference_mode():
        made = make()
    with pytest.raises(BadInput, match=r"made inside torch.inference_mode"):
        made.fit((X, Y), **settings)


@pytest.mark.filterwarnings("ignore::bayesguard.errors.CalibrationWarning")
@pytest.mark.parametrize("made_inside", [False, True])
def test_what_is_calibrated_inside_can_be_loaded_and_calibrated_outside(made_inside: bool) -> None:
    torch.manual_seed(0)
    predictor, targets = bg.Deterministic(nn.Linear(3, 2)), (Y[:, 0] > 0).long()
    calibrator = bg.calibration.TemperatureScaling()
    with torch.inference_mode():
        if made_inside:
            calibrator = bg.calibration.TemperatureScaling()
        predictor.calibrate((X, targets), calibrator)
    state = {name: value.clone() for name, value in predictor.state_dict().items()}
    assert not any(value.is_inference() for value in predictor.state_dict().values())
    predictor.load_state_dict(state)
    predictor.calibrate((X, targets), calibrator)
    assert torch.allclose(calibrator.temperature, state["calibrators.0.temperature"])
