"""What linear calibrators of draws share: buffers whose shapes only fitting tells, and what is said about bad data."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from bayesguard.calibration.base import Calibrator
from bayesguard.errors import BadInput, CalibrationWarning
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.numerics import slices

RIDGE = 1e-6  # on squared distances from the identity map: where the likelihood has no minimum, it gives one
TOLERANCE = 1e-6  # of the norm of the gradient of the mean NLL
BOUND = 100.0  # of a factor: nobody's logits are off by more

Features = Callable[[Tensor], Tensor]


class Fitted(Calibrator):
    """Factors and biases, one for each class or label of what it was fitted to; a fresh one loads any number of them."""

    acts_on = "draws"
    bias: Tensor
    sized_by_fit = ("scale", "bias")  # the factors, and what is added

    def __init__(self) -> None:
        super().__init__()
        for name in self.sized_by_fit:
            # float32, which every device has; at an optimum the likelihood is flat to second order in its rounding.
            self.register_buffer(name, torch.empty(0, dtype=torch.float32, device="cpu"))

    def _store(self, factors: Tensor, bias: Tensor) -> None:
        with torch.inference_mode(False):  # else a later load_state_dict could not write to it
            for name, value in zip(self.sized_by_fit, (factors, bias), strict=True):
                setattr(self, name, self.get_buffer(name).new_empty(value.shape).copy_(value))

    def _kept_draws(self, pred: CategoricalPredictive | BernoulliPredictive) -> Tensor:
        if not pred.has_draws:
            raise BadInput(
                f"pred was reduced, its {pred.num_samples} draws are gone, and {type(self).__name__} acts on every draw; "
                "predict with keep_draws=True"
            )
        return pred.draw_logits

    def _changed(self, pred: Predictive, draws: Tensor, change: Features) -> Predictive:
        """Change all draws of `pred`, one slice of examples after another."""
        cost = 8 * draws[:, :1].numel()
        return pred._rebuild([torch.cat([change(draws[:, rows]) for rows in slices(len(pred), cost)], dim=1)])


def check_possible(excluded: int, count: int) -> None:
    """Warn of targets that are impossible in every draw; raise BadInput if all are."""
    if excluded:
        warn(
            f"{excluded} of {count} targets have probability zero in every draw: no calibration of their logits changes "
            "that, and they were left out of the fit; their NLL is infinite"
        )
    if excluded == count:
        raise BadInput("every target has probability zero in every draw; are the targets those of the predictions?")


def first_few(where: Tensor) -> str:
    """Return the first five places where a mask is true, and how many more there are."""
    places = where.nonzero()[:, 0].tolist()
    return f"{places[:5]}" + (f" and {len(places) - 5} more" if len(places) > 5 else "")


def warn(message: str) -> None:
    """Warn the caller of `fit`, from a function that `_fit` calls."""
    warnings.warn(message, CalibrationWarning, stacklevel=5)
