"""The tables of the benchmark, in Markdown, made from its records alone."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from bayesguard.benchmarks.cells import Record, spread
from bayesguard.benchmarks.stored.files import numbers
from bayesguard.benchmarks.tabular_scores import CLASS_METRICS, COUNT_METRICS
from bayesguard.benchmarks.tabular_tools import WINDOW

METHOD_NAMES = {
    "deterministic": "Deterministic",
    "mc_dropout": "MCDropout",
    "deep_ensemble": "DeepEnsemble",
    "variational": "Variational",
}
METRIC_NAMES = {
    "accuracy": "accuracy",
    "nll": "NLL (nats)",
    "brier": "Brier",
    "ece": "ECE",
    "rmse": "RMSE (hires)",
    "crps": "CRPS (hires)",
    "coverage_90": "coverage of 90 % intervals",
    "width_90": "width of 90 % intervals (hires)",
}
RULE_NAMES = {
    "split": "split conformal",
    "adaptive": "AdaptiveConformal",
    "tuned": "DynamicallyTunedConformal",
    "by sex": "by sex",
}
NO_PAPER = "There are no published numbers for this protocol, and so no column beside ours."

Values = dict[str, Any]


def report(records: Sequence[Record]) -> str:
    """Return all tables of one data set's records, with a note on what the intervals are."""
    first = records[0]["values"]
    of_counts, of_stream = "rmse" in first["scores"]["as trained"]["all"], "alarm" in first
    metrics = COUNT_METRICS if of_counts else CLASS_METRICS
    tables = [("All test rows", overall(records, metrics))]
    if of_stream:
        shown = ("nll", "crps", "coverage_90") if of_counts else ("accuracy", "nll", "ece")
        tables += [(f"{METRIC_NAMES[metric]} by block", by_block(records, metric)) for metric in shown]
        tables += [
            ("Coverage of 90 % conformal answers by block", coverage(records)),
            ("CalibrationMonitor", alarms(records)),
        ]
        if "shares" in first:
            tables.append(("Share of class 1 by block, and as PriorCorrection estimates it", shares(records)))
    else:
        tables += [("Groups", groups(records)), ("Worst groups", worst(records))]
    tables.append(("Costs", costs(records)))
    return "\n\n".join([note(records), *(f"{title}:\n\n{table}" for title, table in tables)])


def note(records: Sequence[Record]) -> str:
    """Say what was run, and what the numbers are."""
    seeds = sorted({record["seed"] for record in records})
    rows, settings = records[0]["values"]["rows"], records[0]["settings"]
    small = "" if settings["budget"] == "full" else f" Budget {settings['budget']}: these numbers mean nothing."
    return (
        f"{records[0]['data']}: {rows['train']} rows to train, {rows['calibration']} to calibrate, {rows['test']} to test; "
        f"{settings['epochs']} epochs; {len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({numbers(seeds)}). Mean ± half of the 95 % t interval "
        f"over seeds. {NO_PAPER}{small}"
    )


def overall(records: Sequence[Record], metrics: Sequence[str]) -> str:
    """Methods and variants by metrics, on all test rows."""
    rows = [
        [name, variant, *(_over(own, lambda v, m=metric, k=variant: v["scores"][k]["all"][m]) for metric in metrics)]  # type: ignore[misc]
        for name, own in _by_method(records)
        for variant in own[0]["scores"]
    ]
    return markdown(["", "", *(METRIC_NAMES[metric] for metric in metrics)], rows)


def by_block(records: Sequence[Record], metric: str) -> str:
    """Methods and variants by blocks, one metric."""
    blocks = _blocks(records)
    rows = [
        [name, variant, *(_over(own, lambda v, b=block, k=variant: v["scores"][k][b][metric]) for block in blocks)]  # type: ignore[misc]
        for name, own in _by_method(records)
        for variant in own[0]["scores"]
    ]
    return markdown(["", "", *blocks], rows)


def coverage(records: Sequence[Record]) -> str:
    """Methods and rules by blocks, and the worst stretch."""
    blocks = ["all", *_blocks(records), "worst window"]
    rows = [
        [name, RULE_NAMES[rule], *(_over(own, lambda v, b=block, r=rule: v["coverage"][r][b]) for block in blocks)]  # type: ignore[misc]
        for name, own in _by_method(records)
        for rule in own[0]["coverage"]
    ]
    return markdown(["", "", *blocks[:-1], f"worst {WINDOW} in a row"], rows)


def alarms(records: Sequence[Record]) -> str:
    """When the monitor raised its alarm: the median example over the seeds that had one, with the range."""
    rows = []
    for name, own in _by_method(records):
        for variant in own[0]["alarm"]:
            found = [values["alarm"][variant] for values in own]
            raised = [alarm for alarm in found if alarm["alarm_at"]]
            at = sorted(alarm["alarm_at"] for alarm in raised)
            when = f"{median(at):g} ({at[0]} to {at[-1]})" if at else "never"
            where = ", ".join(dict.fromkeys(str(alarm["block"]) for alarm in raised))
            why = ", ".join(dict.fromkeys(alarm["finding"] for alarm in raised))
            rows.append([name, variant, f"{len(raised)} of {len(found)}", when, where, why])
    return markdown(["", "", "seeds with an alarm", "at example", "in block", "finding"], rows)


def shares(records: Sequence[Record]) -> str:
    """True share of class 1 in each block, and each method's estimate."""
    blocks = _blocks(records)
    rows = [["true", *(f"{records[0]['values']['shares'][block]['true']:.3f}" for block in blocks)]]
    for name, own in _by_method(records):
        rows.append([name, *(_over(own, lambda v, b=block: v["shares"][b]["estimated"]) for block in blocks)])  # type: ignore[misc]
    return markdown(["", *blocks], rows)


def groups(records: Sequence[Record]) -> str:
    """Groups of people: NLL and ECE of every method as calibrated, and one method's coverage of 90 % sets."""
    methods = _by_method(records)
    shown = next((pair for pair in methods if pair[0] == "DeepEnsemble"), methods[0])
    header = [""]
    header += [f"{name}: {metric}" for metric in ("NLL", "ECE") for name, _ in methods]
    header += [
        f"{shown[0]}: {what} {RULE_NAMES[rule]}" for what in ("coverage,", "set size,") for rule in ("split", "by sex")
    ]
    rows = []
    for group in methods[0][1][0]["scores"]["calibrated"]:
        row = [group]
        for metric in ("nll", "ece"):
            row += [_over(own, lambda v, m=metric, g=group: v["scores"]["calibrated"][g][m]) for _, own in methods]  # type: ignore[misc]
        for what in ("coverage", "size"):
            row += [_over(shown[1], lambda v, w=what, r=rule, g=group: v[w][r][g]) for rule in ("split", "by sex")]  # type: ignore[misc]
        rows.append(row)
    return markdown(header, rows)


def worst(records: Sequence[Record]) -> str:
    """The worst group by NLL and by ECE: how often which, its value over seeds, and the joint interval of the first seed."""
    rows = []
    for name, own in _by_method(records):
        for variant in own[0]["worst"]:
            row = [name, variant]
            for metric in ("nll", "ece"):
                found = [values["worst"][variant][metric] for values in own]
                first = found[0]
                names = [str(entry["group"]) for entry in found]
                counted = ", ".join(f"{group} ({names.count(group)})" for group in dict.fromkeys(names))
                interval = f"{first['value']:.3f} [{first['lower']:.3f}, {first['upper']:.3f}]"
                row += [counted, number([entry["value"] for entry in found]), interval]
            rows.append([*row, str([values["patches"] for values in own]) if variant == "multicalibrated" else ""])
    columns = ["worst group (seeds)", "value", "first seed [joint 95 %]"]
    header = [f"{metric}: {column}" for metric in ("NLL", "ECE") for column in columns]
    return markdown(["", "", *header, "patches by seed"], rows)


def costs(records: Sequence[Record]) -> str:
    """Parameters, seconds of training, and the time of a prediction beside that of the deterministic network."""
    methods = _by_method(records)
    one = next(
        (median(v["costs"]["predict_seconds"] for v in own) for name, own in methods if name == "Deterministic"),
        math.nan,
    )
    rows = []
    for name, own in methods:
        took = median(v["costs"]["predict_seconds"] for v in own)
        ratio = "" if math.isnan(one) else f"{took / one:.1f}"
        trained = median(v["costs"]["train_seconds"] for v in own)
        calibrator = next(iter(own[0]["calibrator"]))
        fitted = _over(own, lambda v, c=calibrator: v["calibrator"][c])  # type: ignore[misc]
        rows.append([name, str(own[0]["costs"]["parameters"]), f"{trained:.1f}", f"{took:.3f}", ratio, fitted])
    header = [
        "",
        "parameters",
        "training (s)",
        "prediction (s)",
        "times one network",
        next(iter(methods[0][1][0]["calibrator"])),
    ]
    return markdown(header, rows)


def number(values: Sequence[float | None]) -> str:
    """Return "mean ± half of the 95 % interval", or the mean alone of one value; infinite or undefined ones are counted."""
    defined = [value for value in values if value is not None]
    if len(defined) < len(values) or not defined:
        return f"not finite in {len(values) - len(defined)} of {len(values)}"
    found = spread(defined)
    digits = 3 if abs(found.mean) < 100 else 1
    if found.num_values == 1:
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} ± {found.upper - found.mean:.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; a first cell that repeats the one above is left empty."""
    lines = [header, ["---"] * len(header)]
    above = None
    for row in rows:
        lines.append(["" if row[0] == above else row[0], *row[1:]])
        above = row[0]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_method(records: Sequence[Record]) -> list[tuple[str, list[Values]]]:
    """Return the values of each method over its seeds, in the order of the records."""
    names = dict.fromkeys(record["method"] for record in records)
    return [
        (METHOD_NAMES[name], [record["values"] for record in records if record["method"] == name]) for name in names
    ]


def _blocks(records: Sequence[Record]) -> list[str]:
    return [block for block in records[0]["values"]["scores"]["as trained"] if block != "all"]


def _over(values: Sequence[Values], read: Callable[[Values], float | None]) -> str:
    return number([read(own) for own in values])
