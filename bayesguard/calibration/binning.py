"""Calibration of pooled class probabilities by maps without a formula: histogram binning and isotonic regression."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from bayesguard.calibration.base import Calibrator
from bayesguard.checks import check_count, check_labels
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

    # -- what they share

    def _fit(self, pred: Predictive, targets: Tensor) -> None:
        pred = _classifier(pred, type(self).__name__)
        scores, hits = self._problem(pred, targets)
        count, columns = scores.shape
        maps = [self._fit_map(wide(scores[:, k]).contiguous(), hits[:, k]) for k in range(columns)]
        # The uniform distribution counts as one example.
        values = [(count * each + 1 / pred.num_classes) / (count + 1) for _, each in maps]
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
        if self.keep_labels:
            return _columns(pred.confidence, pred), _columns(pred.labels == answers, pred)
        if isinstance(pred, BernoulliPredictive):
            return _columns(pred.probs, pred), _columns(answers == 1, pred)
        classes = torch.arange(pred.num_classes, device=answers.device)
        return pred.probs.flatten(0, -2), answers.flatten().unsqueeze(-1) == classes

    def _calibrate(self, pred: Predictive) -> Predictive:
        pred = _classifier(pred, type(self).__name__)
        self._check_like_fitted(pred)
        compute = self._odds_of if isinstance(pred, BernoulliPredictive) else self._logits_of
        tensors = [tensor.detach() for tensor in (pred.logits, pred.mean, pred.labels, pred.confidence)]

        def part(rows: slice) -> Tensor:
            logits, probs, labels, confidence = (tensor[rows] for tensor in tensors)
            scores = confidence if self.keep_labels else probs
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


class HistogramBinning(ClassMaps):
    """Replace every probability by how often answers with a probability in its bin came true.

    Several classes: each class has bins of its own, one against the rest, and the K results are divided by their sum.
    `keep_labels=True` bins the confidence instead, the probability of the most probable class (one map for all
    classes): the others keep the ratios among themselves, and the most probable class stays the most probable, which
    holds the confidence above that of the runner-up whatever the bin says. Yes or no: `[N]` has one map, `[N, ..., L]`
    one for each of the L labels of the last axis.

    The value of a bin with h of n answers true is `(h + m) / (n + 1)`: its mean prediction m (of an empty bin, its
    centre) counts as one example. Then the uniform distribution is mixed in as one example of the M that were fitted to,
    `(M v + 1/K) / (M + 1)`, so that a class without held-out examples keeps a probability above zero. (With
    `keep_labels=True` a class that the predictive rules out stays so.)

    The map acts on the mixture, and its answer has one draw: what the draws disagreed about is gone, the epistemic
    uncertainty is 0. The Monte-Carlo error of what came in is not carried over: `standard_error` is infinite, unless
    that was exact.

    Args:
        num_bins: The most bins a map may have; ties may leave fewer of equal mass.
        binning: "mass": about equally many examples a bin, cut by rank, equal probabilities never apart, edges midway
            between neighbours. "width": bin b is (b/B, (b+1)/B], and 0 belongs to the first.
        keep_labels: Whether the most probable class stays the most probable.

    Attributes:
        diagnostics: `nll_before` and `nll_after` (nats, mean), `num_examples`, `num_values` (bins of the map with the
            fewest), `num_one_sided` (maps that saw one outcome only).

    References:
        Zadrozny and Elkan, 2001, ICML; Guo, Pleiss, Sun, Weinberger, 2017, ICML, sections 4.1 and 4.2.

    Examples:
        >>> pred = Predictive.from_probs([0.8, 0.8, 0.8, 0.8, 0.3, 0.3])
        >>> binning = HistogramBinning(num_bins=2).fit(pred, torch.tensor([1, 1, 0, 0, 0, 1]))
        >>> binning(Predictive.from_probs([0.9, 0.1])).probs  # (2 + 0.8) / 5 and (1 + 0.3) / 3, mixed with 1/2
        tensor([0.5514, 0.4429])
    """

    def __init__(
        self, num_bins: int = 15, binning: Literal["mass", "width"] = "mass", *, keep_labels: bool = False
    ) -> None:
        super().__init__(keep_labels)
        self.num_bins = check_count(num_bins, "num_bins")
        if binning not in ("mass", "width"):
            raise BadInput(f"binning must be 'mass' or 'width', got {binning!r}")
        self.binning = binning

    def _fit_map(self, scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        if self.binning == "mass":
            edges = _equal_mass_edges(scores, self.num_bins)
        else:
            edges = torch.arange(1, self.num_bins, dtype=scores.dtype, device=scores.device) / self.num_bins
        place = torch.searchsorted(edges, scores)
        count, true, total = (
            scores.new_zeros(len(edges) + 1).index_add_(0, place, each.to(scores.dtype))
            for each in (torch.ones_like(scores), hits, scores)
        )
        ends = torch.cat([scores.new_zeros(1), edges, scores.new_ones(1)])
        prediction = torch.where(count > 0, total / count.clamp_min(1), (ends[1:] + ends[:-1]) / 2)
        return edges, (true + prediction) / (count + 1)

    def _problem(self, pred: CategoricalPredictive | BernoulliPredictive, targets: Tensor) -> tuple[Tensor, Tensor]:
        scores, hits = super()._problem(pred, targets)
        return (_off_edges(scores, self.num_bins, pred.dtype) if self.binning == "width" else scores), hits

    def _mapped(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        if self.binning == "width":
            scores = _off_edges(scores, self.num_bins, dtype)
        place = torch.searchsorted(self.points.to(scores), scores.T.contiguous())
        return self.values.to(scores).gather(1, place).T

    def extra_repr(self) -> str:
        return f"num_bins={self.num_bins}, binning={self.binning!r}, {super().extra_repr()}"


class IsotonicCalibration(ClassMaps):
    """Replace every probability by an increasing function of itself, fitted by least squares to what came true.

    The function is that of pool-adjacent-violators: constant on blocks, linear between them, and constant beyond the
    smallest and the largest probability that it was fitted to. Several classes: each class has a function of its own,
    one against the rest, and the K results are divided by their sum. `keep_labels=True` maps the confidence instead,
    the probability of the most probable class (one map for all classes): the others keep the ratios among themselves,
    and the most probable class stays the most probable, which holds the confidence above that of the runner-up whatever
    the map says. Yes or no: `[N]` has one map, `[N, ..., L]` one for each of the L labels of the last axis.

    The outermost blocks are usually 0 and 1. So that no answer is impossible or sure, the uniform distribution is mixed
    in as one example of the M that were fitted to: `(M v + 1/K) / (M + 1)`. (With `keep_labels=True` a class that the
    predictive rules out stays so.)

    The map acts on the mixture, and its answer has one draw: what the draws disagreed about is gone, the epistemic
    uncertainty is 0. The Monte-Carlo error of what came in is not carried over: `standard_error` is infinite, unless
    that was exact.

    Args:
        keep_labels: Whether the most probable class stays the most probable.

    Attributes:
        diagnostics: `nll_before` and `nll_after` (nats, mean), `num_examples`, `num_values` (points of the map with the
            fewest), `num_one_sided` (maps that saw one outcome only).

    References:
        Zadrozny and Elkan, 2002, KDD (section 4: several classes).

    Examples:
        >>> pred = Predictive.from_probs([0.1, 0.2, 0.6, 0.7, 0.9])
        >>> isotonic = IsotonicCalibration().fit(pred, torch.tensor([0, 1, 0, 1, 1]))
        >>> isotonic(pred).probs  # 0, 1/2, 1/2, 1, 1, mixed with 1/2
        tensor([0.0833, 0.5000, 0.5000, 0.9167, 0.9167])
    """

    def __init__(self, *, keep_labels: bool = False) -> None:
        super().__init__(keep_labels)

    def _fit_map(self, scores: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        from sklearn.isotonic import IsotonicRegression

        fitted = IsotonicRegression(out_of_bounds="clip").fit(scores.cpu().numpy(), hits.cpu().double().numpy())
        points, values = (torch.from_numpy(each).to(scores) for each in (fitted.X_thresholds_, fitted.y_thresholds_))
        # One point is not enough to interpolate between: equal scores, one value.
        return (points, values) if len(points) > 1 else (torch.cat([points, points + 1]), values.repeat(2))

    def _mapped(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        points, values, rows = self.points.to(scores), self.values.to(scores), scores.T.contiguous()
        place = (torch.searchsorted(points, rows, right=True) - 1).clamp(0, points.shape[1] - 2)
        left, right = points.gather(1, place), points.gather(1, place + 1)
        share = ((rows - left) / (right - left)).clamp(0, 1)  # 0 where the next point is infinity
        return torch.lerp(values.gather(1, place), values.gather(1, place + 1), share).T


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


def _equal_mass_edges(scores: Tensor, num_bins: int) -> Tensor:
    """Edges between bins of about equally many scores; equal scores all go where the middle of them goes."""
    distinct, counts = scores.unique(return_counts=True)
    middle_rank = counts.cumsum(0) - counts.to(scores) / 2
    bins = (middle_rank * num_bins / len(scores)).floor()
    last = bins[1:] != bins[:-1]
    below, above = distinct[:-1][last], distinct[1:][last]
    middle = below + (above - below) / 2
    return torch.where(middle < above, middle, below)  # between neighbouring floats there is no middle


def _off_edges(scores: Tensor, num_bins: int, dtype: torch.dtype) -> Tensor:
    """Scores in float64, exactly on an edge b/B where only the rounding of `dtype` keeps them from it.

    A probability of 3/10 may come out of its logarithm above that, and would miss the bin that it closes.
    """
    values = wide(scores)
    edge = (values * num_bins).round() / num_bins
    return torch.where((values - edge).abs() <= 8 * torch.finfo(dtype).eps, edge, values)


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
