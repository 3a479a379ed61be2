"""What the library offers beside a calibrated method: for streams, and for groups of people."""

from typing import Any

import torch
from torch import Tensor

import bayesguard as bg
from bayesguard.benchmarks.tabular_data import Labels, Table
from bayesguard.benchmarks.tabular_scores import CLASS_METRICS, class_scores
from bayesguard.calibration import (
    AdaptiveConformal,
    Conformal,
    ConformalInterval,
    DynamicallyTunedConformal,
    Multicalibration,
    PriorCorrection,
)
from bayesguard.predictive import Predictive

ALPHA = 0.1
WINDOW = 500
_FALSE_ALARM = 0.01
# Labels by which conformal sets are made group by group: they divide everybody.
_DIVISION = "sex"

Scores = dict[str, dict[str, float]]


def coverage_in_time(held: Predictive, held_y: Tensor, pred: Predictive, y: Tensor, table: Table) -> Scores:
    """Coverage of 90 % sets or intervals by block: of split conformal prediction, and of two that follow the stream.

    "worst window" is the smallest coverage of 500 consecutive examples, or of all where there are fewer.
    """
    kind = ConformalInterval("normalised", alpha=ALPHA) if table.target else Conformal("lac", alpha=ALPHA)
    split = kind.fit(held, held_y)
    covered = {
        "split": split.p_values(pred, y) > ALPHA,
        "adaptive": AdaptiveConformal(split).run(pred, y),
        "tuned": DynamicallyTunedConformal(split).run(pred, y),
    }
    if isinstance(split, Conformal):
        # The most probable class is in every set.
        covered["split"] = split(pred).prediction_set().gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return {
        rule: {
            "all": _share(inside),
            **{block: _share(inside[rows]) for block, rows in table.blocks.items()},
            "worst window": worst_window(inside, WINDOW),
        }
        for rule, inside in covered.items()
    }


def worst_window(covered: Tensor, length: int) -> float:
    """Return the smallest share of `length` consecutive ones, or of all where there are fewer."""
    values = covered.double()
    return float(values.unfold(0, min(length, len(values)), 1).mean(-1).min())


def alarm(pred: Predictive, y: Tensor, table: Table) -> dict[str, Any]:
    """When the monitor of calibration raised its alarm: the number of the example, from 1, its block, and its reason."""
    monitor = bg.CalibrationMonitor(alpha=_FALSE_ALARM, claim="pit" if table.target else "confidence")
    # What it finds wrong is read at the alarm, not at the end of the stream.
    monitor.update(pred, y)
    at = int(monitor.alarm_at)
    block = next((name for name, rows in table.blocks.items() if rows.start < at <= rows.stop), None)
    if at:
        monitor = bg.CalibrationMonitor(alpha=_FALSE_ALARM, claim=monitor.claim)
        monitor.update(pred[:at], y[:at])
    return {"alarm_at": at, "block": block, "finding": monitor.finding(), "num_examples": len(y)}


def corrected_by_block(
    held: Predictive, held_y: Tensor, pred: Predictive, y: Tensor, table: Table
) -> tuple[Scores, dict[str, dict[str, float]]]:
    """Scores after each block's class shares were estimated from its inputs and corrected to, and those shares."""
    correction = PriorCorrection().fit(held, held_y)
    parts, shares = [], {}
    for block, rows in table.blocks.items():
        correction.adapt(pred[rows])
        parts.append(correction(pred[rows]).probs)
        shares[block] = {"true": _share(y[rows]), "estimated": float(correction.new[1])}
    answers = Predictive.from_probs(torch.cat(parts))
    return by_part(answers, y, table.blocks), shares


def by_part(pred: Predictive, y: Tensor, parts: Any) -> Scores:
    """Scores of classes on all rows and on some parts of them."""
    whole = {"all": class_scores(pred, y)}
    return whole | {name: class_scores(pred[rows], y[rows]) for name, rows in parts.items()}


def members(labels: Labels) -> dict[str, Tensor]:
    """Return the rows of each group, bool `[N]`, named as "sex: Female", in the order of the names."""
    return {
        f"{key}: {value}": torch.tensor([own == value for own in values])
        for key, values in labels.items()
        for value in sorted(set(values))
    }


def of_groups(pred: Predictive, y: Tensor, labels: Labels, seed: int) -> tuple[Scores, dict[str, dict[str, Any]]]:
    """Scores of all and of each group, and by each metric the worst group with its interval for all groups at once."""
    groups = members(labels)
    evaluation = bg.evaluate(pred, y, groups=groups, metrics=list(CLASS_METRICS), seed=seed)
    worst = {}
    for metric in CLASS_METRICS:
        found = evaluation.worst_group(metric)
        worst[metric] = {"group": found.group, "value": found.value, "lower": found.lower, "upper": found.upper}
    scores: Scores = {}
    for result in evaluation.results:
        scores.setdefault(result.group or "all", {})[result.metric] = result.value
    return scores, worst


def multicalibrated(held: Predictive, pred: Predictive, table: Table) -> tuple[Predictive, int]:
    """Return answers calibrated within every group of people, by sex, race and age, and how many patches that took."""
    held_groups, groups = members(table.calibration.labels), members(table.test.labels)
    # A group that nobody held out belongs to has nothing to be fitted to.
    names = [name for name in groups if name in held_groups]
    own, new = (torch.stack([given[name] for name in names], -1) for given in (held_groups, groups))
    fitted = Multicalibration().fit(held, table.calibration.y, groups=own)
    return fitted(pred, groups=new), len(fitted.steps)


def coverage_of_groups(held: Predictive, pred: Predictive, table: Table) -> tuple[Scores, Scores]:
    """Coverage and mean size of 90 % sets, of all and of each group: one bound for all, and one for each sex."""
    codes = {value: code for code, value in enumerate(sorted({*table.test.labels[_DIVISION]}))}
    own, new = (
        torch.tensor([codes.get(value, len(codes)) for value in part.labels[_DIVISION]])
        for part in (table.calibration, table.test)
    )
    split = Conformal("lac", alpha=ALPHA).fit(held, table.calibration.y)
    grouped = Conformal("lac", alpha=ALPHA, by="group").fit(held, table.calibration.y, groups=own)
    sets = {"split": split(pred).prediction_set(), "by sex": grouped(pred, groups=new).prediction_set()}
    coverage: Scores = {}
    size: Scores = {}
    everybody = {"all": torch.ones(len(table.test.y), dtype=torch.bool)}
    for rule, answer in sets.items():
        inside = answer.gather(-1, table.test.y.unsqueeze(-1)).squeeze(-1)
        groups = everybody | members(table.test.labels)
        coverage[rule] = {name: _share(inside[rows]) for name, rows in groups.items()}
        size[rule] = {name: float(answer[rows].double().sum(-1).mean()) for name, rows in groups.items()}
    return coverage, size


def _share(values: Tensor) -> float:
    return float(values.double().mean())
