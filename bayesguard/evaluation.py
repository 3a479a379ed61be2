"""Evaluation: a predictor against data, clean and shifted, every number with its interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from bayesguard.checks import as_tensor, check_count, check_finite, check_level, to_shape
from bayesguard.data import Batch, is_one_shot
from bayesguard.errors import BadInput, BadType
from bayesguard.grouping import Grouping, cluster_index
from bayesguard.metrics.functional.binned import BinnedSums, ReliabilityBins, bin_index, wilson_interval
from bayesguard.metrics.functional.calibration import bins_of
from bayesguard.metrics.functional.inputs import top_label
from bayesguard.metrics.functional.selective import risk_coverage
from bayesguard.metrics.parts import in_parts
from bayesguard.metrics.registry import kind_of, specs_for
from bayesguard.metrics.scores import NUM_BINS
from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive, Predictive
from bayesguard.predictive.numerics import slices
from bayesguard.predictor import Predictor
from bayesguard.results import CLEAN, Answers, Evaluation
from bayesguard.sheet import NUM_RESAMPLES, Interval, Sheet
from bayesguard.shifting import AnyShift as AnyShift
from bayesguard.shifting import chosen_shifts, shifting


def evaluate(
    predictor: Predictor | Predictive,
    data: Any,
    *,
    metrics: Sequence[str] | None = None,
    shifts: str | Sequence[AnyShift | str] | None = None,
    groups: object = None,
    clusters: object = None,
    interval: Interval | None = None,
    confidence_level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Evaluate predictions against data, clean and shifted.

    Every number has a bootstrap interval over examples, the same 1,000 resamples for all of them, clipped to the values
    that the metric can have: the reverse-percentile ("basic") one, and for a sum of absolute gaps (`ece`,
    `quantile_error`) the inverted test of `metrics.bootstrap.inverted_interval`, since noise adds to such a sum. At each
    severity the mean over shifts has an interval for which all shifts see the same resampled examples.

    Args:
        predictor: A predictor with `data` as in `Predictor.predict`, or a Predictive with `data` its targets.
        data: Data with targets, or targets.
        metrics: Names from `metrics.registry.EVALUATION_METRICS`; None for the defaults of the kind of target.
        shifts: Name of a suite (`shift.suite`) or a list of names and shifts (see `AnyShift`), applied on the predictor's device
            to the first positional input of each batch; None for clean data only.
        groups: Results for groups of the clean data, by a label for each example `[N]`; by a function of the inputs of a
            batch that returns labels; by a column of tabular inputs, as its number, or as `(number, bins)` for bins of
            equal mass; or by a mapping of names to any of these, or to boolean masks `[N]`, whose groups may overlap.
        clusters: A label for each example `[N]`, such as the patient that a row is of: examples that belong together are
            resampled together. Where there are such, intervals without it are too narrow.
        interval: "basic", "percentile" or "bca" for every number; None for the choice above. Neither of the last two is for
            calibration errors: they cover too seldom.
        confidence_level: Of the intervals.
        num_resamples: Of the bootstrap; 0 for numbers without intervals, whose ends are NaN.
        seed: Of the resamples and of the shifts.
        batch_size: Rows a batch, where `data` holds arrays.
        progress: True for a progress bar on standard error while the bootstrap runs, if that takes seconds.

    Raises:
        BadInput: Unknown metrics or interval, too few resamples for the level, groups or clusters of another length or for
            shuffled data; with shifts, data that can be read once only or that come in another order on the next pass.

    Examples:
        >>> evaluation = evaluate(Predictive.from_probs([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1]))
        >>> evaluation.value("accuracy"), round(evaluation.value("ece"), 4)
        (1.0, 0.15)
    """
    check_level(confidence_level, "confidence_level")
    check_count(seed, "seed", minimum=0)
    chosen = chosen_shifts(shifts, seed)
    if chosen and isinstance(predictor, Predictive):
        raise BadType("shifts need a predictor, which can be asked again; a Predictive only has its answers")
    if chosen and is_one_shot(data):
        raise BadInput("data is an iterator, but shifts read it several times; pass a list of batches or a DataLoader")
    check_num_resamples(num_resamples, confidence_level)
    if isinstance(metrics, str):
        raise BadType(f"metrics must be a list of names, got the text {metrics!r}; write [{metrics!r}]")
    if interval not in (None, "basic", "percentile", "bca"):
        raise BadInput(f"interval must be 'basic', 'percentile', 'bca' or None, got {interval!r}")
    grouping = _grouping(groups, predictor, data)
    if clusters is not None:
        check_order(data, "clusters")
    read = grouping.read if grouping is not None and grouping.needs_inputs else None
    predictive, targets = predictions(predictor, data, batch_size, read)
    count = len(predictive)
    clustering = None if clusters is None else cluster_index(clusters, count)
    sheet = Sheet(confidence_level, seed, interval, clustering, num_resamples=num_resamples, progress=progress)
    specs = specs_for(predictive, None if metrics is None else list(metrics))
    clean = _answers(predictive, targets)
    # First, while little else is kept: sorting takes more memory than all the rest.
    risk = risk_coverage(clean[0].confidence, 1 - clean[0].right) if clean else None
    sheet.add(CLEAN, 0, predictive, targets, specs)
    members = [] if grouping is None else grouping.rows(count)
    for name, rows in members:
        sheet.add_group(name, rows, predictive, targets, specs)
    pooled = {0.0: clean}
    for shift in chosen:
        assert isinstance(predictor, Predictor)
        shifted, same = predictor.predict_with_targets(data, batch_size=batch_size, transform=shifting(shift, seed))
        check_same_targets(targets, same)
        sheet.add(shift.name, shift.severity, shifted, same, specs)
        pooled.setdefault(float(shift.severity), []).extend(_answers(shifted, same))
    results, joint = sheet.results()
    del sheet  # what the metrics kept of millions of rows leaves room for the diagrams
    return Evaluation(
        results=results,
        simultaneous=joint,
        meta={
            "name": type(predictor).__name__,
            **_meta(predictive, confidence_level, num_resamples, seed),
            "interval": interval,
        },
        reliability={severity: _bins(parts, confidence_level) for severity, parts in pooled.items() if parts},
        risk=risk,
        doubt={severity: _doubt(parts) for severity, parts in pooled.items() if parts},
        answers=clean[0] if clean else None,
        by_class=_by_class(predictive, targets),
        by_group={label: _by_group(clean[0], rows, len(predictive)) for label, rows in members if clean},
    )


def predictions(
    predictor: Predictor | Predictive,
    data: Any,
    batch_size: int | None = None,
    transform: Callable[[Batch, int], Batch] | None = None,
) -> tuple[Predictive, Tensor]:
    """Return predictions with their targets, from a predictor and data, or a Predictive and targets."""
    if isinstance(predictor, Predictive):
        predictive, targets = predictor.to("cpu"), as_tensor(data, "data").cpu()
    elif isinstance(predictor, Predictor):
        predictive, targets = predictor.predict_with_targets(data, batch_size=batch_size, transform=transform)
    else:
        raise BadType(
            f"predictor must be a Predictor or a Predictive, got {type(predictor).__name__}; wrap a network, as by "
            "bayesguard.Deterministic(network), or arrays, as by bayesguard.Predictive.from_probs(probs)"
        )
    if tuple(targets.shape) != tuple(predictive.batch_shape):
        raise BadInput(
            f"the targets have shape {tuple(targets.shape)}, but the predictions are for {tuple(predictive.batch_shape)}; "
            f"shapes must match exactly (with a Predictive, data are its targets){_to_labels(predictive, targets)}"
        )
    if len(predictive) == 0:
        raise BadInput("data has no examples; there is nothing to evaluate")
    check_finite(targets, "targets")
    return predictive, targets


def _to_labels(predictive: Predictive, targets: Tensor) -> str:
    """Say how targets of the wrong shape become right ones, where that shows."""
    if tuple(targets.shape) == (*predictive.batch_shape, getattr(predictive, "num_classes", None)):
        return ": for one-hot targets pass the class index, targets.argmax(-1)"
    return to_shape(targets.shape, predictive.batch_shape, "targets")


def check_same_targets(targets: Tensor, again: Tensor) -> None:
    """Raise BadInput if a further pass gave other targets: pairs would be of different examples."""
    if targets.shape != again.shape or not torch.equal(targets, again):
        raise BadInput(
            "data gave other targets, or another order, on a further pass, and nothing would be paired; use a loader with "
            "shuffle=False"
        )


def check_order(data: Any, why: str) -> None:
    """Raise BadInput for a loader that shuffles, where rows have to be in a known order."""
    if isinstance(data, DataLoader) and _shuffles(data):
        raise BadInput(f"data is shuffled, and {why} go by the order of its rows; use a loader with shuffle=False")


def _shuffles(loader: DataLoader[Any]) -> bool:
    # A loader that was given batches says nothing of their order itself.
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, DistributedSampler):
        return bool(sampler.shuffle)
    return isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler)


def check_num_resamples(num_resamples: int, confidence_level: float) -> None:
    """Raise BadInput for fewer resamples than leave one beyond each end of an interval; 0 asks for no intervals."""
    needed = math.ceil(2 / (1 - confidence_level) - 1e-6)
    if 0 < check_count(num_resamples, "num_resamples", minimum=0) < needed:
        raise BadInput(
            f"num_resamples is {num_resamples}, too few for intervals of level {confidence_level:g}; pass at least "
            f"{needed}, or 0 for numbers without intervals"
        )


def _grouping(groups: object, predictor: object, data: Any) -> Grouping | None:
    if groups is None:
        return None
    grouping = Grouping(groups)
    if grouping.needs_inputs and isinstance(predictor, Predictive):
        raise BadType("groups by a function or a column need a predictor and inputs; a Predictive only has its answers")
    if grouping.needs_order:
        check_order(data, "groups")
    return grouping


def _answers(predictive: Predictive, targets: Tensor) -> list[Answers]:
    """Return what the diagrams need, once; nothing for predictions of numbers, which are neither right nor wrong."""
    if not isinstance(predictive, CategoricalPredictive | BernoulliPredictive):
        return []
    confidence, right, total, *binary = in_parts(_part_answers, predictive, targets)
    promised, outcome = binary or (confidence, right)
    return [Answers(confidence, right, promised, outcome, total)]


def _part_answers(predictive: Predictive, targets: Tensor) -> list[Tensor]:
    total = predictive.uncertainty().total.flatten()
    if isinstance(predictive, CategoricalPredictive):
        return [*top_label(predictive.probs.flatten(0, -2), targets.long().flatten()), total]
    confidence, right = predictive.confidence.flatten(), (predictive.labels == targets).double().flatten()
    # As for the calibration error of yes or no: what is promised is the probability of yes.
    return [confidence, right, total, predictive.probs.flatten(), targets.double().flatten()]


def _by_class(predictive: Predictive, targets: Tensor) -> BinnedSums | None:
    if not isinstance(predictive, CategoricalPredictive):
        return None
    whole: BinnedSums | None = None
    # In parts: the probabilities of all examples, and those above the first bin, would be more than the predictions.
    each = predictive.num_classes + 16 * min(predictive.num_classes, NUM_BINS)
    for rows in slices(len(predictive), each * predictive.batch_shape[1:].numel()):
        part = predictive if rows.stop - rows.start == len(predictive) else predictive[rows]
        sums = BinnedSums.of_classes(part.probs.flatten(0, -2), targets[rows].long().flatten(), NUM_BINS)
        whole = sums if whole is None else whole + sums
    return whole


def _by_group(answers: Answers, rows: Tensor, count: int) -> BinnedSums:
    """Return the sums over bins of some examples; dense ones have several answers each."""
    promised, outcome = (values.reshape(count, -1)[rows].flatten() for values in (answers.promised, answers.outcome))
    return BinnedSums.of(promised, outcome, bin_index(promised, NUM_BINS, "width"), NUM_BINS)


def _bins(parts: list[Answers], confidence_level: float) -> ReliabilityBins:
    """Return the bins of several shifts pooled; each shows the same examples, which count once in the intervals."""
    promised, outcome = (_joined(parts, name) for name in ("promised", "outcome"))
    bins = bins_of(promised, outcome, NUM_BINS, "width", confidence_level)
    count = bins.count / len(parts)
    limits = wilson_interval(bins.accuracy * count, count, confidence_level)
    return replace(bins, accuracy_lower=limits[0], accuracy_upper=limits[1])


def _doubt(parts: list[Answers]) -> tuple[Tensor, Tensor]:
    total, right = (_joined(parts, name) for name in ("total", "right"))
    return total[right == 1], total[right == 0]


def _joined(parts: list[Answers], name: str) -> Tensor:
    """Return what several shifts have of a name; what one has is not copied."""
    tensors = [getattr(part, name) for part in parts]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


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
