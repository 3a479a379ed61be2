"""What every calibrator is: a map fitted on held-out predictions that makes them honest."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesguard.checks import check_finite, check_labels, check_shape
from bayesguard.errors import BadInput, BadType, NotFitted
from bayesguard.looks import holds
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.base import normalised_weights
from bayesguard.predictive.bernoulli import check_answers
from bayesguard.predictive.numerics import as_given, wide
from bayesguard.sampling import stream
from bayesguard.text_tensors import text_as_tensor, text_of_tensor


class Calibrator(nn.Module, ABC):
    """A map from predictives to predictives, fitted on predictions for held-out examples and their targets.

    What was fitted lies in buffers: it moves with `.to()`, loses no precision there, and is part of `state_dict()`.

    Attributes:
        acts_on: "draws" if the map changes every draw, and so needs them kept; "pooled" if it changes the mixture.
        needs_own_data: Whether it has to be fitted to examples that no calibrator before it was fitted to, because it
            promises a coverage: `Predictor.calibrate` then splits what it is given.
        sized_by_fit: Buffers whose sizes are known after fitting only; a fresh calibrator takes those of a saved state.
        settings: Arguments that what was fitted means nothing without; a state of others is refused.
        shifts: The perturbations under which it has to see the data, too (`fit_shifted`); None for nearly all.
        diagnostics: What the last fit found, by name; empty before.
    """

    acts_on: ClassVar[Literal["draws", "pooled"]]
    needs_own_data: ClassVar[bool] = False
    sized_by_fit: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()
    shifts: Any = None
    is_fitted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("is_fitted", torch.zeros((), dtype=torch.bool, device="cpu"))
        self.diagnostics: dict[str, Any] = {}

    @abstractmethod
    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        """Fit to predictions and targets on one device, without gradients; fill the buffers and `diagnostics`."""

    @abstractmethod
    def _calibrate(self, pred: Predictive) -> Predictive:
        """Apply the fitted map."""

    def _fit_weighted(self, pred: Predictive, targets: Tensor, weights: Tensor, /) -> None:
        """The same where examples count by weights `[N]`, float64 and of mean 1, 0 for some perhaps."""
        raise BadType(
            f"a {type(self).__name__} counts all examples alike, and takes no weights; TemperatureScaling, PlattScaling, "
            "BetaCalibration and conformal prediction take them"
        )

    @property
    def fitted(self) -> bool:
        """Whether `fit` has been called (or a fitted state loaded)."""
        return bool(self.is_fitted)

    def fit(self, pred: Predictive, targets: object, *, weights: object = None) -> Self:
        """Fit on held-out predictions: examples that the network was not trained on.

        Args:
            pred: Predictions for N examples.
            targets: What was observed, one for each element of the predictive's batch shape.
            weights: How much each example counts `[N]`, 0 or more: how much likelier it is where predictions are wanted
                than here (`density_ratio`), or how often it was seen. For some calibrators only.

        Returns:
            The calibrator itself.

        Raises:
            BadInput: No examples, targets of another shape or outside their range (with the row), or bad weights.
            BadType: A predictive of a kind that this calibrator cannot work on, or weights for one that takes none.
        """
        _check_predictive(pred)
        if pred.batch_shape.numel() == 0:
            raise BadInput("pred has no examples; a calibrator needs held-out examples to be fitted on")
        make_buffers_changeable(self)
        with torch.no_grad():
            given = as_given(targets, "targets").detach().to(pred.device)
            if weights is None:
                self._fit(pred, given)
            else:
                own = check_weights(weights, pred.batch_shape[0]).to(pred.device)
                self._fit_weighted(pred, given, own / own.mean())
            self.is_fitted = self.is_fitted.new_tensor(True)
        make_buffers_changeable(self)
        return self

    @property
    def can_adapt(self) -> bool:
        """Whether it follows unlabelled data by `adapt`."""
        return False

    def adapt(self, pred: Predictive) -> Self:
        """Follow new data from predictions for them, without labels: those that this calibrator would be given."""
        raise BadType(f"a {type(self).__name__} does not follow unlabelled data; fit it to labelled ones")

    def fit_shifted(self, preds: Sequence[Predictive], targets: Tensor) -> Self:
        """Fit to predictions for the same examples, undisturbed first and then under each of `shifts`."""
        raise BadType(f"{type(self).__name__} is not fitted to perturbed data")

    def forward(self, pred: Predictive) -> Predictive:
        """Return the calibrated predictive.

        Raises:
            NotFitted: The calibrator was not fitted.
        """
        _check_predictive(pred)
        if not holds(self.is_fitted):
            name = type(self).__name__
            raise NotFitted(f"this {name} is not fitted; call fit(pred, targets) on held-out predictions first")
        return self._calibrate(pred)

    def __call__(self, pred: Predictive) -> Predictive:
        """Return the calibrated predictive."""
        return cast(Predictive, super().__call__(pred))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, and to a wider dtype; not to a narrower one, in which a bound would be another."""

        def moved(value: Tensor) -> Tensor:
            new = fn(value)
            narrower = new.element_size() < value.element_size() and new.device.type != "mps"
            return value.to(new.device) if narrower else new

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.sized_by_fit:
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor):
                setattr(self, name, self.get_buffer(name).new_empty(saved.shape))
        # Older states do not say how their calibrators were made.
        state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_extra_state(self) -> Any:
        """Return how this was made, as bytes: kinds whose buffers look alike must not be taken for one another."""
        return text_as_tensor(self._made_as())

    def set_extra_state(self, state: Any) -> None:
        """Refuse the state of a calibrator of another kind or of other settings."""
        saved = text_of_tensor(state)
        if saved != self._made_as():
            raise BadInput(
                f"the state is of {saved}, and this is {self._made_as()}; make the calibrator as it was made"
            )

    def _made_as(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.settings)})"


def make_buffers_changeable(calibrator: nn.Module) -> None:
    """Replace buffers that were made in the caller's inference mode, which nobody could load or fit anew outside of it."""
    with torch.inference_mode(False):
        for part in calibrator.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_inference():
                    part._buffers[name] = buffer.clone()


def _check_predictive(pred: object) -> None:
    if not isinstance(pred, Predictive):
        raise BadType(
            f"pred must be a Predictive, got {type(pred).__name__}; "
            "make one with Predictive.from_logits or Predictive.from_probs"
        )


def check_weights(weights: object, count: int) -> Tensor:
    """Return weights of examples `[count]` in float64, or raise what is wrong with them."""
    values = as_given(weights, "weights").detach().double()
    check_shape(values, (count,), "weights")
    check_finite(values, "weights")
    if not bool((values >= 0).all()) or not bool((values > 0).any()):
        raise BadInput("weights must be 0 or more, and some of them positive")
    return values


def class_columns(pred: Predictive, asked: Calibrator, hint: str = "") -> Tensor:
    """Return probabilities `[N, K]` of one class of several, or of no and yes, for each example.

    Raises:
        BadType: Another kind of predictive, or several targets an example; `hint` says what to use for those.
    """
    if isinstance(pred, CategoricalPredictive) and len(pred.batch_shape) == 1:
        return pred.probs
    if isinstance(pred, BernoulliPredictive) and len(pred.batch_shape) == 1:
        yes = wide(pred.probs)
        return torch.stack([1 - yes, yes], dim=-1)
    raise BadType(
        f"{type(asked).__name__} is for one class (or yes and no) an example, got a {type(pred).__name__} of batch shape "
        f"{tuple(pred.batch_shape)}{hint}"
    )


def class_labels(pred: Predictive, targets: Tensor) -> Tensor:
    """Return targets of `class_columns` as int64 `[N]`: labels, or answers 0 and 1 of any dtype; else raise."""
    if isinstance(pred, BernoulliPredictive):
        return check_answers(targets, pred.batch_shape, "targets")
    assert isinstance(pred, CategoricalPredictive)
    return check_labels(targets, pred.batch_shape, pred.num_classes)


def class_log_probs(pred: Predictive, asked: Calibrator) -> Tensor:
    """Return the logarithms of `class_columns` in float64, from logits: those of probabilities next to 0 and 1, too."""
    class_columns(pred, asked)
    logits = wide(pred.logits.detach())
    if isinstance(pred, BernoulliPredictive):
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], -1)
    return logits.log_softmax(-1)


def from_class_log_probs(pred: Predictive, log_probs: Tensor) -> Predictive:
    """Return a predictive like `pred` with other `class_log_probs`, normalised where they are of several classes."""
    if isinstance(pred, BernoulliPredictive):
        log_probs = log_probs[:, 1] - log_probs[:, 0]
    draws = log_probs.to(pred.device, pred.dtype).unsqueeze(0)
    return pred._rebuild([draws], normalised_weights(None, 1, draws), pred.exact)


def check_order(calibrators: Sequence[Calibrator]) -> None:
    """Raise BadInput where a calibrator stands behind one whose promise it would undo, or is there twice."""
    if len(set(map(id, calibrators))) < len(calibrators):
        raise BadInput(
            "one calibrator object is there twice, and holds what it was fitted to last: make an object for each place, as "
            "TemperatureScaling(), VectorScaling()"
        )
    for first, later in itertools.pairwise(calibrators):
        if first.needs_own_data:
            raise BadInput(
                f"{type(later).__name__} comes after {type(first).__name__}, whose coverage it would undo; put the one that "
                "promises a coverage last"
            )
        if first.acts_on == "pooled" and later.acts_on == "draws":
            raise BadInput(
                f"{type(later).__name__} acts on draws, and comes after {type(first).__name__}, which acts on their mixture; "
                "put it first"
            )


def fit_in_turn(
    calibrators: Sequence[Calibrator],
    pred: Predictive,
    targets: Tensor,
    seed: int,
    shifted: Sequence[Predictive] = (),
) -> None:
    """Fit calibrators one after another; a last one that promises a coverage gets a random half for itself.

    Args:
        calibrators: In their order.
        pred: Predictions for N examples.
        targets: Theirs.
        seed: Of the halves.
        shifted: Predictions for the same examples under each shift, for calibrators that ask for them.
    """
    *first, last = calibrators
    if not first or not last.needs_own_data:
        _fit_all(calibrators, [pred, *shifted], targets)
        return
    order = torch.randperm(len(pred), generator=stream("cpu", seed, "calibration")).to(pred.device)
    half = len(pred) // 2
    ours, own = order[:half], order[half:]
    if not half:
        raise BadInput(f"{len(pred)} examples cannot be shared between {len(calibrators)} calibrators")
    _fit_all(first, [one[ours] for one in (pred, *shifted)], targets[ours.to(targets.device)])
    held = pred[own]
    for calibrator in first:
        held = calibrator(held)
    last.fit(held, targets[own.to(targets.device)])


def _fit_all(calibrators: Sequence[Calibrator], preds: list[Predictive], targets: Tensor) -> None:
    for calibrator in calibrators:
        if calibrator.shifts is None:
            calibrator.fit(preds[0], targets)
        else:
            calibrator.fit_shifted(preds, targets)
        preds = [calibrator(pred) for pred in preds]
