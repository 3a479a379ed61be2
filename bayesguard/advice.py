"""What to do about it: rules that go from an evaluation's numbers, with their intervals, to a remedy.

A rule speaks only where its interval leaves no doubt at the evaluation's level and the effect is large enough to matter.
Where a rule looks at many groups or classes, intervals are widened for their number (Bonferroni).
"""

from collections.abc import Callable
from typing import NamedTuple

from bayesguard.metrics.functional.null import CalibrationErrorNull, null_of
from bayesguard.results import Evaluation, Result
from bayesguard.summaries import Estimate, class_gaps, confidence_gap, error_auroc, group_gaps, normal_quantile

_POINT = 0.01  # a smaller gap is not worth a remedy, however sure one is of it
_FEW_ERRORS = 10

_TEMPERATURE = """predictor.calibrate(held_out, bg.calibration.TemperatureScaling())
# or, on arrays:
scaling = bg.calibration.TemperatureScaling().fit(bg.Predictive.from_probs(held_out_probs), held_out_labels)
calibrated = scaling(bg.Predictive.from_probs(probs))"""
_VECTOR = "predictor.calibrate(held_out, bg.calibration.VectorScaling())"
_ISOTONIC = "predictor.calibrate(held_out, bg.calibration.IsotonicCalibration(keep_labels=True))"
_BINARY = "predictor.calibrate(held_out, bg.calibration.BetaCalibration())"
_SHIFT = 'predictor.calibrate(held_out, bg.calibration.ShiftAwareScaling("point", shifts=perturbations))'
_ENSEMBLE = "predictor = bg.DeepEnsemble(make_network, num_members=5)  # then predictor.fit(train)"
_INTERVALS = """predictor.calibrate(held_out, bg.calibration.VarianceScaling())
# or, with a guarantee of the coverage:
predictor.calibrate(held_out, bg.calibration.ConformalInterval("normalised", alpha=0.1))"""
_BY_GROUP = """sets = bg.calibration.Conformal("aps", by="group").fit(held_out_pred, held_out_labels, groups=held_out_groups)
sets(pred, groups=groups).prediction_set()"""


class Advice(NamedTuple):
    """One finding.

    Attributes:
        rule: Name of the rule.
        finding: What the numbers say.
        remedy: What to do.
        code: How, in Python; empty where there is nothing to run.
    """

    rule: str
    finding: str
    remedy: str
    code: str = ""


def advise(evaluation: Evaluation) -> list[Advice]:
    """Return what the numbers of an evaluation say should be done; nothing where no rule applies.

    Examples:
        >>> from bayesguard import Predictive, evaluate
        >>> sure = Predictive.from_probs([[0.99, 0.01]] * 100)
        >>> [advice.rule for advice in advise(evaluate(sure, [0] * 70 + [1] * 30))]
        ['over-confident', 'errors not found', 'class shares']
    """
    found = [rule(evaluation) for rule in _RULES]
    return [advice for advice in found if advice is not None]


def chance_of(evaluation: Evaluation) -> CalibrationErrorNull | None:
    """Return what the calibration error of the clean data would be by chance; None without class predictions.

    None also for dense ones, whose elements are not independent.
    """
    answers = evaluation.answers
    if answers is None or len(answers.promised) != evaluation.meta["num_examples"]:
        return None
    return null_of(answers.promised, seed=evaluation.meta["seed"])


def _confidence(evaluation: Evaluation) -> Advice | None:
    """Over- or under-confident on average."""
    if evaluation.answers is None:
        return None
    gap = confidence_gap(evaluation.answers, evaluation.meta["num_examples"], evaluation.meta["confidence_level"])
    size = f"by {_points(gap)}: mean confidence {evaluation.answers.confidence.double().mean().item():.1%}, accuracy "
    size += f"{evaluation.answers.right.mean().item():.1%}."
    if gap.lower > 0 and gap.value >= _POINT:
        remedy = "Fit one temperature on held-out data that the network was not trained on. Answers stay as they are."
        return Advice("over-confident", f"Over-confident {size}", remedy, _TEMPERATURE)
    if gap.upper < 0 and gap.value <= -_POINT:
        remedy = (
            "Fit one temperature on held-out data; it will be below 1. If members of an ensemble were calibrated one by "
            "one, calibrate their mixture instead: averaging takes confidence away."
        )
        return Advice("under-confident", f"Under-confident {size}", remedy, _TEMPERATURE)
    return None


def _uneven(evaluation: Evaluation) -> Advice | None:
    """The calibration error is more than chance, but confidence is right on average."""
    chance = chance_of(evaluation)
    if chance is None or "ece" not in evaluation.metrics or _confidence(evaluation) is not None:
        return None
    error, floor = evaluation.value("ece"), chance.mean.item()
    if chance.p_value(error).item() >= 1 - evaluation.meta["confidence_level"] or error - floor < _POINT:
        return None
    if evaluation.meta["kind"] == "binary":
        return Advice(
            "unevenly wrong",
            f"Probabilities of yes are off, though confidence is right on average: the ECE is {error:.3f}, where chance alone "
            f"gives {floor:.3f} (p = {chance.p_value(error).item():.3f}).",
            "Fit a map on held-out data that can also move all probabilities of yes up or down.",
            _BINARY,
        )
    return Advice(
        "unevenly wrong",
        f"Confidence is right on average, but not in its parts: the ECE is {error:.3f}, where chance alone gives "
        f"{floor:.3f} (p = {chance.p_value(error).item():.3f}). One temperature will not mend this.",
        "Use a more flexible map on held-out data: one factor a class, or a step function if there are thousands of examples.",
        f"{_VECTOR}\n# or\n{_ISOTONIC}",
    )


def _few_examples(evaluation: Evaluation) -> Advice | None:
    """The calibration error of so few examples is mostly chance."""
    chance = chance_of(evaluation)
    if chance is None or "ece" not in evaluation.metrics:
        return None
    error, floor = evaluation.value("ece"), chance.mean.item()
    clear = chance.p_value(error).item() < 1 - evaluation.meta["confidence_level"]
    if floor < _POINT or (clear and floor < error / 2):
        return None
    count = evaluation.meta["num_examples"]
    needed = float(f"{count * (floor / _POINT) ** 2:.1g}")
    return Advice(
        "few examples",
        f"The ECE of {error:.3f} says little: with {count} examples, perfectly honest confidences would show "
        f"{floor:.3f} on average, and up to {chance.quantile(0.95).item():.3f} in 95 of 100 cases.",
        f"Judge by NLL or Brier, which have no such floor, or evaluate on more data: about {needed:,.0f} examples would "
        "bring the floor down to 0.01.",
    )


def _errors(evaluation: Evaluation) -> Advice | None:
    """Confidence does not tell right from wrong answers, or there are too few errors to know."""
    answers = evaluation.answers
    if answers is None:
        return None
    wrong = int((answers.right == 0).sum())
    if min(wrong, len(answers.right) - wrong) < _FEW_ERRORS:
        kind = "wrong" if wrong < _FEW_ERRORS else "right"
        number = min(wrong, len(answers.right) - wrong)
        return Advice(
            "few errors",
            f"Only {number} of {len(answers.right)} answers are {kind}: whether confidence tells right from wrong cannot "
            "be seen.",
            "Evaluate on more data, or on harder data.",
        )
    area = error_auroc(answers, evaluation.meta["num_examples"], evaluation.meta["confidence_level"])
    if area.lower > 0.5:
        return None
    return Advice(
        "errors not found",
        f"Confidence does not find the errors: a wrong answer is less confident than a right one with probability "
        f"{area.value:.2f} [{area.lower:.2f}, {area.upper:.2f}]; 0.5 is chance.",
        "Do not hand doubtful answers to people on the strength of this confidence. A calibrator will not help, for it "
        "keeps the order: ask several networks, whose disagreement is a sign of its own.",
        _ENSEMBLE,
    )


def _classes(evaluation: Evaluation) -> Advice | None:
    """A class is promised more, or less, often than it comes."""
    if evaluation.by_class is None:
        return None
    gaps = class_gaps(evaluation)
    clear = [place for place, gap in enumerate(gaps) if _is_clear(gap)]
    if not clear:
        return None
    worst = max(clear, key=lambda place: abs(gaps[place].value))
    way = "more" if gaps[worst].value > 0 else "less"
    share = (evaluation.by_class.hits[worst].sum() / evaluation.by_class.count[worst].sum()).item()
    others = f" ({len(clear) - 1} more classes are off.)" if len(clear) > 1 else ""
    return Advice(
        "class shares",
        f"Class {worst} is promised {way} often than it comes: in {share + gaps[worst].value:.1%} of cases on average, "
        f"it comes in {share:.1%}; a gap of {_points(gaps[worst])}.{others}",
        "If the shares of the classes have changed since training, correct the prior (it adapts to unlabelled data); "
        "if not, give each class a factor of its own.",
        f"predictor.calibrate(held_out, bg.calibration.PriorCorrection())\n# or\n{_VECTOR}",
    )


def _groups(evaluation: Evaluation) -> Advice | None:
    """A group's promises are further off than those of all."""
    gaps = group_gaps(evaluation)
    clear = {name: gap for name, gap in gaps.items() if _is_clear(gap)}
    if not clear or evaluation.answers is None:
        return None
    name, gap = max(clear.items(), key=lambda item: abs(item[1].value))
    overall = (evaluation.answers.promised.double() - evaluation.answers.outcome).mean().item()
    if gap.lower <= overall <= gap.upper:
        return None  # this group is as the others are
    what = "the probability of yes" if evaluation.meta["kind"] == "binary" else "confidence"
    return Advice(
        "group off",
        f"In group {name} {what} is too {'high' if gap.value > 0 else 'low'}, by {_points(gap)}.",
        "Calibrate with held-out examples of this group, or promise a coverage for each group by itself.",
        _BY_GROUP if evaluation.meta["kind"] == "categorical" else "",
    )


def _worse_group(evaluation: Evaluation) -> Advice | None:
    """A group has a clearly worse proper score than all examples together."""
    metric = next((name for name in ("nll", "crps", "brier", "rmse") if name in evaluation.metrics), None)
    rows = [row for row in evaluation.results if row.metric == metric and row.group is not None]
    if metric is None or len(rows) < 2:
        return None
    overall = evaluation.result(metric)
    level = evaluation.meta["confidence_level"]
    wider = normal_quantile(1 - (1 - level) / len(rows)) / normal_quantile(level)
    worse = [row for row in rows if row.value - wider * (row.value - row.lower) > overall.upper]
    if not worse:
        return None
    worst = max(worse, key=lambda row: row.value)
    return Advice(
        "worse group",
        f"Group {worst.group} is worse than the rest: {metric.upper()} {_interval(worst)}, of all examples {_interval(overall)}.",
        "Look at examples of it: labels that are wrong, inputs that are rare in training. More training data of this group "
        "helps more than any calibration.",
    )


def _shift(evaluation: Evaluation) -> Advice | None:
    """The calibration error, or the coverage, is clearly worse on the most shifted data."""
    severity = evaluation.severities[-1]
    if severity == 0:
        return None
    if "ece" in evaluation.metrics:
        clean, moved = evaluation.result("ece"), evaluation.result("ece", severity)
        if moved.lower <= clean.upper or moved.value - clean.value < _POINT:
            return None
        remedy = (
            "Fit a scaling that follows the signs of a shift, on held-out data under perturbations like those to be expected; "
            "or ask several networks, whose mixture becomes less sure where they disagree."
        )
        return Advice("falls apart under shift", _moved("ECE", clean, moved), remedy, f"{_SHIFT}\n# or\n{_ENSEMBLE}")
    if "coverage_90" in evaluation.metrics:
        clean, moved = evaluation.result("coverage_90"), evaluation.result("coverage_90", severity)
        if moved.upper >= min(0.9, clean.lower) or clean.value - moved.value < _POINT:
            return None
        remedy = "Ask several networks; if the truth comes in later, let the intervals follow it (AdaptiveConformal)."
        return Advice(
            "falls apart under shift", _moved("The coverage of 90 % intervals", clean, moved), remedy, _ENSEMBLE
        )
    return None


def _coverage(evaluation: Evaluation) -> Advice | None:
    """Intervals of numbers hold too few, or too many, of the targets."""
    if "coverage_90" not in evaluation.metrics:
        return None
    found = evaluation.result("coverage_90")
    if abs(found.value - 0.9) < _POINT or found.lower <= 0.9 <= found.upper:
        return None
    narrow = found.value < 0.9
    return Advice(
        "intervals too narrow" if narrow else "intervals too wide",
        f"The 90 % intervals hold {found.value:.1%} [{found.lower:.1%}, {found.upper:.1%}] of the targets: they are too "
        f"{'narrow' if narrow else 'wide'}.",
        "Scale them on held-out data.",
        _INTERVALS,
    )


_RULES: tuple[Callable[[Evaluation], Advice | None], ...] = (
    _confidence,
    _uneven,
    _coverage,
    _errors,
    _shift,
    _classes,
    _groups,
    _worse_group,
    _few_examples,
)


def _is_clear(gap: Estimate) -> bool:
    return (gap.lower > 0 or gap.upper < 0) and abs(gap.value) >= _POINT


def _points(gap: Estimate) -> str:
    low, high = sorted((abs(gap.lower), abs(gap.upper)))
    return f"{100 * abs(gap.value):.1f} points [{100 * low:.1f}, {100 * high:.1f}]"


def _interval(result: Result) -> str:
    return f"{result.value:.3f} [{result.lower:.3f}, {result.upper:.3f}]"


def _moved(name: str, clean: Result, moved: Result) -> str:
    return f"{name} goes from {_interval(clean)} on clean data to {_interval(moved)} at severity {moved.severity:g}."
