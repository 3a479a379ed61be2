"""Evaluation: a predictor against data, clean and shifted, every number with its interval."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from bayesguard.checks import as_tensor, check_count, check_finite, check_level
from bayesguard.data import is_one_shot
from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.bootstrap import basic_interval, bootstrap_weights
from bayesguard.metrics.functional.binned import ReliabilityBins, wilson_interval
from bayesguard.metrics.functional.calibration import bins_of
from bayesguard.metrics.functional.inputs import top_label
from bayesguard.metrics.functional.selective import risk_coverage
from bayesguard.metrics.parts import in_parts, scores_of
from bayesguard.metrics.registry import MetricSpec, Scores, kind_of, specs_for
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictor import Predictor
from bayesguard.results import CLEAN, MEAN, Evaluation, Result
from bayesguard.sampling import derive_seed
from bayesguard.shifting import AnyShift as AnyShift
from bayesguard.shifting import chosen_shifts, shifting

NUM_RESAMPLES = 1000


def evaluate(
    predictor: Predictor | Predictive,
    data: Any,
    *,
    metrics: Sequence[str] | None = None,
    shifts: str | Sequence[AnyShift] | None = None,
    groups: object = None,
    confidence_level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Evaluate predictions against data, clean and shifted.

    Every number has a reverse-percentile ("basic") bootstrap interval over examples, the same 1,000 resamples for all
    of them, clipped to the values that the metric can have. The calibration error of bins is biased upwards, and each
    resample shifts it upwards once more: a percentile interval would double the bias, this one takes it off again. (It
    is no test of perfect calibration: where the true error is 0, its lower end lies above 0 about half of the time.) At
    each severity the mean over shifts has an interval for which all shifts see the same resampled examples.

    Args:
        predictor: A predictor with `data` as in `Predictor.predict`, or a Predictive with `data` its targets.
        data: Data with targets, or targets.
        metrics: Names from `metrics.registry.EVALUATION_METRICS`; None for the defaults of the kind of target.
        shifts: Name of a suite (`shift.suite`) or a list of shifts (see `AnyShift`), applied on the predictor's device to
            the first positional input of each batch; None for clean data only.
        groups: A label for each example `[N]`: results for each group of the clean data.
        confidence_level: Of the intervals.
        num_resamples: Of the bootstrap; 0 for numbers without intervals, whose ends are NaN.
        seed: Of the resamples and of the shifts.
        batch_size: Rows a batch, where `data` holds arrays.
        progress: True for a progress bar on standard error while the bootstrap runs, if that takes seconds.

    Raises:
        BadInput: Unknown metrics, too few resamples for the level, groups of another length or for shuffled data; with
            shifts, data that can be read once only or that come in another order on the next pass.

    Examples:
        >>> evaluation = evaluate(Predictive.from_probs([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1]))
        >>> evaluation.value("accuracy"), round(evaluation.value("ece"), 4)
        (1.0, 0.15)
    """
    check_level(confidence_level, "confidence_level")
    check_num_resamples(num_resamples, confidence_level)
    check_count(seed, "seed", minimum=0)
    chosen = chosen_shifts(shifts, seed)
    if chosen and isinstance(predictor, Predictive):
        raise BadType("shifts need a predictor, which can be asked again; a Predictive only has its answers")
    if chosen and is_one_shot(data):
        raise BadInput("data is an iterator, but shifts read it several times; pass a list of batches or a DataLoader")
    if groups is not None:
        check_order(data, "groups")
    sheet = _Sheet(confidence_level, seed, num_resamples, progress)
    predictive, targets = predictions(predictor, data, batch_size)
    specs = specs_for(predictive, None if metrics is None else list(metrics))
    clean = _answers(predictive, targets)
    # First, while little else is kept: sorting takes more memory than all the rest.
    risk = risk_coverage(clean[0].confidence, 1 - clean[0].right) if clean else None
    sheet.add(CLEAN, 0, None, predictive, targets, specs)
    for label, rows in _groups(groups, len(predictive)):
        sheet.add(CLEAN, 0, label, predictive[rows], targets[rows], specs)
    pooled = {0.0: clean}
    for shift in chosen:
        assert isinstance(predictor, Predictor)
        shifted, same = predictor.predict_with_targets(data, batch_size=batch_size, transform=shifting(shift, seed))
        check_same_targets(targets, same)
        sheet.add(shift.name, shift.severity, None, shifted, same, specs)
        pooled.setdefault(float(shift.severity), []).extend(_answers(shifted, same))
    return Evaluation(
        results=sheet.results(),
        meta={"name": type(predictor).__name__, **_meta(predictive, confidence_level, num_resamples, seed)},
        reliability={severity: _bins(parts, confidence_level) for severity, parts in pooled.items() if parts},
        risk=risk,
        doubt={severity: _doubt(parts) for severity, parts in pooled.items() if parts},
    )


def predictions(
    predictor: Predictor | Predictive, data: Any, batch_size: int | None = None
) -> tuple[Predictive, Tensor]:
    """Return predictions with their targets, from a predictor and data, or a Predictive and targets."""
    if isinstance(predictor, Predictive):
        predictive, targets = predictor.to("cpu"), as_tensor(data, "data").cpu()
    elif isinstance(predictor, Predictor):
        predictive, targets = predictor.predict_with_targets(data, batch_size=batch_size)
    else:
        raise BadType(
            f"predictor must be a Predictor or a Predictive, got {type(predictor).__name__}; wrap a network, as by "
            "bayesguard.Deterministic(network), or arrays, as by bayesguard.Predictive.from_probs(probs)"
        )
    if tuple(targets.shape) != tuple(predictive.batch_shape):
        raise BadInput(
            f"the targets have shape {tuple(targets.shape)}, but the predictions are for {tuple(predictive.batch_shape)}; "
            "shapes must match exactly (with a Predictive, data are its targets)"
        )
    if len(predictive) == 0:
        raise BadInput("data has no examples; there is nothing to evaluate")
    check_finite(targets, "targets")
    return predictive, targets


def check_same_targets(targets: Tensor, again: Tensor) -> None:
    """Raise BadInput if a further pass gave other targets: pairs would be of different examples."""
    if targets.shape != again.shape or not torch.equal(targets, again):
        raise BadInput(
            "data gave other targets, or another order, on a further pass, and nothing would be paired; use a loader with "
            "shuffle=False"
        )


def check_order(data: Any, why: str) -> None:
    """Raise BadInput for a loader that shuffles, where rows have to be in a known order."""
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
        raise BadInput(f"data is shuffled, and {why} go by the order of its rows; use a loader with shuffle=False")


def check_num_resamples(num_resamples: int, confidence_level: float) -> None:
    """Raise BadInput for fewer resamples than leave one beyond each end of an interval; 0 asks for no intervals."""
    needed = math.ceil(2 / (1 - confidence_level) - 1e-6)
    if 0 < check_count(num_resamples, "num_resamples", minimum=0) < needed:
        raise BadInput(
            f"num_resamples is {num_resamples}, too few for intervals of level {confidence_level:g}; pass at least "
            f"{needed}, or 0 for numbers without intervals"
        )


def interval(
    value: float, resampled: Tensor, confidence_level: float, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float]:
    """Return the basic interval, widened where it would miss the value itself; NaN without a value or resamples."""
    if math.isnan(value) or not len(resampled):
        return math.nan, math.nan
    lower, upper = basic_interval(value, resampled, confidence_level, bounds)
    return min(lower, value), max(upper, value)


class _Cell(NamedTuple):
    """What is kept of one metric of one set of predictions."""

    shift: str
    severity: float
    group: str | None
    spec: MetricSpec
    scores: Scores


class _Answers(NamedTuple):
    """Class predictions as the diagrams see them, flat: confidence and whether right, promise and outcome, entropy."""

    confidence: Tensor
    right: Tensor
    promised: Tensor
    outcome: Tensor
    total: Tensor


class _Sheet:
    """The cells of an evaluation, resampled together at the end."""

    def __init__(self, confidence_level: float, seed: int, num_resamples: int, progress: bool | None) -> None:
        self.confidence_level, self.seed = confidence_level, seed
        self.num_resamples, self.progress = num_resamples, progress
        self.cells: list[_Cell] = []

    def add(
        self,
        shift: str,
        severity: float,
        group: str | None,
        predictive: Predictive,
        targets: Tensor,
        specs: Sequence[MetricSpec],
    ) -> None:
        """Keep what the metrics need of some predictions."""
        for spec, scores in zip(specs, scores_of(specs, predictive, targets), strict=True):
            self.cells.append(_Cell(shift, severity, group, spec, scores))

    def results(self) -> tuple[Result, ...]:
        """Return every cell's number, then the means over the shifts of each severity."""
        values = [cell.scores.value() for cell in self.cells]
        resampled = self._resample()
        results = [
            self._result(cell, value, again) for cell, value, again in zip(self.cells, values, resampled, strict=True)
        ]
        return (*results, *self._means(values, resampled))

    def _resample(self) -> list[Tensor]:
        """Return every cell's values over the resamples; the examples of a group are resampled among themselves."""
        from tqdm import tqdm

        parts: list[list[Tensor]] = [[] for _ in self.cells]
        groups = dict.fromkeys(cell.group for cell in self.cells)
        total = len(groups) * self.num_resamples
        # Without a delay every short evaluation would flash a bar.
        with tqdm(total=total, desc="bootstrap", leave=False, delay=2, disable=not self.progress) as bar:
            for group in groups if self.num_resamples else ():
                places = [place for place, cell in enumerate(self.cells) if cell.group == group]
                count = self.cells[places[0]].scores.num_examples
                seed = self.seed if group is None else derive_seed(self.seed, "group", group)
                for weights in bootstrap_weights(count, self.num_resamples, seed):
                    for place in places:
                        parts[place].append(self.cells[place].scores.resample(weights))
                    bar.update(len(weights))
        return [torch.cat(part) if part else torch.empty(0, dtype=torch.float64) for part in parts]

    def _means(self, values: list[float], resampled: list[Tensor]) -> list[Result]:
        together: dict[tuple[float, str], list[int]] = {}
        for index, cell in enumerate(self.cells):
            if cell.shift != CLEAN:
                together.setdefault((cell.severity, cell.spec.name), []).append(index)
        means = []
        for (severity, _), places in sorted(together.items()):
            cell = self.cells[places[0]]._replace(shift=MEAN, severity=severity)
            value = sum(values[place] for place in places) / len(places)
            means.append(self._result(cell, value, torch.stack([resampled[place] for place in places]).mean(0)))
        return means

    def _result(self, cell: _Cell, value: float, resampled: Tensor) -> Result:
        limits = interval(value, resampled, self.confidence_level, cell.spec.bounds)
        count = cell.scores.num_examples
        return Result(cell.shift, cell.severity, cell.group, cell.spec.name, value, *limits, count)


def _groups(groups: Any, count: int) -> list[tuple[str, Tensor]]:
    if groups is None:
        return []
    labels = [str(label) for label in (groups.tolist() if hasattr(groups, "tolist") else groups)]
    if len(labels) != count:
        raise BadInput(f"groups has {len(labels)} labels for {count} examples; one label an example is needed")
    return [
        (name, torch.tensor([index for index, label in enumerate(labels) if label == name]))
        for name in sorted(set(labels))
    ]


def _answers(predictive: Predictive, targets: Tensor) -> list[_Answers]:
    """Return what the diagrams need, once; nothing for predictions of numbers, which are neither right nor wrong."""
    if not isinstance(predictive, CategoricalPredictive | BernoulliPredictive):
        return []
    confidence, right, total, *binary = in_parts(_part_answers, predictive, targets)
    promised, outcome = binary or (confidence, right)
    return [_Answers(confidence, right, promised, outcome, total)]


def _part_answers(predictive: Predictive, targets: Tensor) -> list[Tensor]:
    total = predictive.uncertainty().total.flatten()
    if isinstance(predictive, CategoricalPredictive):
        return [*top_label(predictive.probs.flatten(0, -2), targets.long().flatten()), total]
    confidence, right = predictive.confidence.flatten(), (predictive.labels == targets).double().flatten()
    # As for the calibration error of yes or no: what is promised is the probability of yes.
    return [confidence, right, total, predictive.probs.flatten(), targets.double().flatten()]


def _bins(parts: list[_Answers], confidence_level: float) -> ReliabilityBins:
    """Return the bins of several shifts pooled; each shows the same examples, which count once in the intervals."""
    promised, outcome = (torch.cat([getattr(part, name) for part in parts]) for name in ("promised", "outcome"))
    bins = bins_of(promised, outcome, 15, "width", confidence_level)
    count = bins.count / len(parts)
    limits = wilson_interval(bins.accuracy * count, count, confidence_level)
    return replace(bins, accuracy_lower=limits[0], accuracy_upper=limits[1])


def _doubt(parts: list[_Answers]) -> tuple[Tensor, Tensor]:
    total, right = (torch.cat([getattr(part, name) for part in parts]) for name in ("total", "right"))
    return total[right == 1], total[right == 0]


def _meta(predictive: Predictive, confidence_level: float, num_resamples: int, seed: int) -> dict[str, Any]:
    from bayesguard import __version__

    return {
        "kind": kind_of(predictive),
        "num_examples": len(predictive),
        "confidence_level": confidence_level,
        "num_resamples": num_resamples,
        "seed": seed,
        "bayesguard": __version__,
        "torch": torch.__version__,
    }
