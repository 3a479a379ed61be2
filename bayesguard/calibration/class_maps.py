"""What calibrators share that map the pooled probability of each class, or the confidence, by a fitted function."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from bayesguard.calibration.base import Calibrator
from bayesguard.checks import check_labels
from bayesguard.errors import BadInput, BadType, CalibrationWarning
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.base import normalised_weights
from bayesguard.predictive.bernoulli import check_answers
from bayesguard.predictive.numerics import in_slices, wide

_MARGIN = 1e-5  # by which a kept top class stays above the next: more than the rounding of log-probabilities in float32


class ClassMaps(Calibrator):
    """One map of a probability for each class or label, fitted to the pooled predictive; see the subclasses.

    Attributes:
        points: Where the maps change, `[C, P]` with a row for each of C maps, ends filled up with infinity.
        values: What the maps give there, `[C, V]`, the uniform distribution mixed in.
        num_classes: K of the predictions that it was fitted to, 2 for yes and no.
    """

    acts_on = "pooled"
    sized_by_fit = ("points", "values")
    points: Tensor
    values: Tensor
    num_classes: Tensor
    yes_or_no: Tensor

    def __init__(self, keep_labels: bool) -> None:
        super().__init__()
        if not isinstance(keep_labels, bool):
            raise BadType(f"keep_labels must be True or False, got {type(keep_labels).__name__}")
        self.keep_labels = keep_labels
        for name in ("points", "values"):
            self.register_buffer(name, torch.empty(0, 0, dtype=torch.float64, device="cpu"))
        self.register_buffer("num_classes", torch.zeros((), dtype=torch.long, device="cpu"))
        self.register_buffer("yes_or_no", torch.zeros((), dtype=torch.bool, device="cpu"))

    # -- what each kind says

    @abstractmethod
    def _fit_map(self, scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        """Points and values of one map, fitted to scores in float64 and what came true, both `[M]`."""

    @abstractmethod
    def _mapped(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """The maps' values at float64 scores `[M, C]`, which come from predictions in `dtype`."""

    def _scores(self, pred: CategoricalPredictive | BernoulliPredictive) -> Tensor:
        """What is mapped: of the batch shape, with an axis of classes where each class has a map."""
        return pred.confidence if self.keep_labels else pred.probs

    def _with_uniform(self, values: Tensor, count: int, num_classes: int) -> Tensor:
        """Mix the uniform distribution into a map's values, as one example."""
        return (count * values + 1 / num_classes) / (count + 1)

    # -- what they share

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        pred = _classifier(pred, type(self).__name__)
        scores, hits = self._problem(pred, targets)
        count, columns = scores.shape
        maps = [self._fit_map(wide(scores[:, k]).contiguous(), hits[:, k]) for k in range(columns)]
        values = [self._with_uniform(each, count, pred.num_classes) for _, each in maps]
        self._keep("points", _filled_up((points for points, _ in maps), torch.inf), pred)
        self._keep("values", _filled_up(values, None), pred)
        self.num_classes = self.num_classes.new_tensor(pred.num_classes)
        self.yes_or_no = self.yes_or_no.new_tensor(isinstance(pred, BernoulliPredictive))
        one_sided = int((hits.all(0) | ~hits.any(0)).sum())
        if one_sided:
            _warn_one_sided(one_sided, columns, count, self.keep_labels)
        self.diagnostics = {
            "nll_before": -float(wide(pred.log_prob(targets)).mean()),
            "nll_after": -float(wide(self._calibrate(pred).log_prob(targets)).mean()),
            "num_examples": pred.batch_shape.numel(),
            "num_values": min(len(each) for each in values),
            "num_one_sided": one_sided,
        }

    def _keep(self, name: str, value: Tensor, pred: Predictive) -> None:
        # On the calibrator's device, in a dtype that the predictive's device has too.
        setattr(self, name, value.to(self.is_fitted.device, _wide_dtype(pred)))

    def _problem(self, pred: CategoricalPredictive | BernoulliPredictive, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and whether they came true, `[M, C]`."""
        if isinstance(pred, BernoulliPredictive):
            answers = check_answers(targets, pred.batch_shape, "targets")
        else:
            answers = check_labels(targets, pred.batch_shape, pred.num_classes)
        scores = self._scores(pred)
        if self.keep_labels:
            return _columns(scores, pred), _columns(pred.labels == answers, pred)
        if isinstance(pred, BernoulliPredictive):
            return _columns(scores, pred), _columns(answers == 1, pred)
        classes = torch.arange(pred.num_classes, device=answers.device)
        return scores.flatten(0, -2), answers.flatten().unsqueeze(-1) == classes

    def _calibrate(self, pred: Predictive) -> Predictive:
        pred = _classifier(pred, type(self).__name__)
        self._check_like_fitted(pred)
        compute = self._odds_of if isinstance(pred, BernoulliPredictive) else self._logits_of
        tensors = [tensor.detach() for tensor in (pred.logits, self._scores(pred), pred.labels)]

        def part(rows: slice) -> Tensor:
            logits, scores, labels = (tensor[rows] for tensor in tensors)
            columns = 1 if self.keep_labels and isinstance(pred, CategoricalPredictive) else self.values.shape[0]
            mapped = self._mapped(wide(scores).reshape(-1, columns), pred.dtype)
            return compute(mapped, wide(logits), labels).to(pred.dtype)

        draws = in_slices(part, len(pred), 8 * tensors[0][:1].numel()).unsqueeze(0)
        return pred._rebuild([draws], normalised_weights(None, 1, draws), pred.exact)

    def _logits_of(self, mapped: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        if not self.keep_labels:
            return mapped.log().log_softmax(-1).reshape(logits.shape)
        confidence = mapped.reshape(labels.shape).unsqueeze(-1)
        return _with_confidence(logits.log_softmax(-1), labels.unsqueeze(-1), confidence)

    def _odds_of(self, mapped: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        if not self.keep_labels:
            return mapped.logit().reshape(logits.shape)
        odds = mapped.clamp_min((1 + _MARGIN) / 2).logit().reshape(logits.shape)
        return torch.where(labels == 1, odds, -odds)

    def _check_like_fitted(self, pred: CategoricalPredictive | BernoulliPredictive) -> None:
        name, binary = type(self).__name__, isinstance(pred, BernoulliPredictive)
        if binary != bool(self.yes_or_no):
            kinds = ("CategoricalPredictive", "BernoulliPredictive")
            raise BadType(
                f"this {name} was fitted to a {kinds[not binary]}, got a {kinds[binary]}; "
                "fit another one to held-out predictions of this kind"
            )
        if pred.num_classes != int(self.num_classes):
            raise BadInput(
                f"pred has {pred.num_classes} classes, but this {name} was fitted to {int(self.num_classes)}; "
                "fit it again to held-out predictions of these classes"
            )
        wanted = _num_labels(pred) if binary else 1 if self.keep_labels else pred.num_classes
        if self.values.shape[0] != wanted:
            raise BadInput(
                f"this {name} has {self.values.shape[0]} maps, but pred needs {wanted} with "
                f"keep_labels={self.keep_labels}; use the setting and the number of labels that it was fitted with"
            )

    def extra_repr(self) -> str:
        return f"keep_labels={self.keep_labels}" + ("" if self.fitted else ", not fitted")


def step_values(points: Tensor, values: Tensor, scores: Tensor) -> Tensor:
    """Values at scores `[M, C]` of C step functions with edges `[C, P]`, each closing the step below it, `[C, P + 1]`."""
    place = torch.searchsorted(points.to(scores), scores.T.contiguous())
    return values.to(scores).gather(1, place).T


def _classifier(pred: Predictive, name: str) -> CategoricalPredictive | BernoulliPredictive:
    if not isinstance(pred, (CategoricalPredictive, BernoulliPredictive)):
        raise BadType(
            f"{name} is for classification, got a {type(pred).__name__}; "
            "for predictions of real numbers use CDFCalibration or VarianceScaling"
        )
    return pred


def _num_labels(pred: Predictive) -> int:
    return pred.batch_shape[-1] if len(pred.batch_shape) > 1 else 1


def _columns(value: Tensor, pred: Predictive) -> Tensor:
    """Of the batch shape `[N, ..., L]`, a column for each label of yes or no; of classes, one column."""
    return value.reshape(-1, _num_labels(pred) if isinstance(pred, BernoulliPredictive) else 1)


def _wide_dtype(pred: Predictive) -> torch.dtype:
    return torch.float32 if pred.device.type == "mps" else torch.float64


def _filled_up(rows: Iterable[Tensor], fill: float | None) -> Tensor:
    """Stack rows of different lengths, filled up with a number or with their own last element."""
    rows = list(rows)
    length = max(len(row) for row in rows)
    ends = [row[-1:] if fill is None else row.new_tensor([fill]) for row in rows]
    return torch.stack([torch.cat([row, end.expand(length - len(row))]) for row, end in zip(rows, ends, strict=True)])


def _with_confidence(log_probs: Tensor, top: Tensor, confidence: Tensor) -> Tensor:
    """Give the classes `top` `[..., 1]` the probabilities `confidence`, the others the rest in the ratios they have.

    The confidence is raised where the next class would else come to the top.
    """
    others = log_probs.scatter(-1, top, -torch.inf)
    rest = others.logsumexp(-1, keepdim=True)
    # A rest of probability zero has no ratios: equal shares.
    equal = -log_probs.new_tensor(log_probs.shape[-1] - 1.0).log()
    shares = torch.where(rest == -torch.inf, equal, others - rest)
    second = shares.scatter(-1, top, -torch.inf).amax(-1, keepdim=True).exp()
    confidence = torch.maximum(confidence, second / (1 + second) * (1 + _MARGIN))
    return (shares + torch.log1p(-confidence)).scatter(-1, top, confidence.log())


def _warn_one_sided(count: int, total: int, examples: int, keep_labels: bool) -> None:
    what = (
        "the most probable class was always right, or always wrong"
        if keep_labels
        else "a class without a target, or a label with one answer only"
    )
    warnings.warn(
        f"{count} of {total} maps saw one outcome only among {examples} examples ({what}): all that they know is how "
        "many examples there were. More held-out examples are needed",
        CalibrationWarning,
        stacklevel=4,
    )
