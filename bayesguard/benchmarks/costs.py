"""What a method costs: parameters, seconds of training, and the time of a prediction relative to one deterministic pass."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bayesguard.benchmarks.cells import Record, spread
from bayesguard.benchmarks.residual import num_parameters
from bayesguard.predictor import Predictor

_REPEATS = 3


def costs(
    predictor: Predictor, single: Predictor, inputs: Tensor, train_seconds: float, *, repeats: int = _REPEATS
) -> dict[str, float]:
    """Return what a cell keeps as "costs"; the last thing that a cell asks of its predictor.

    Args:
        predictor: Trained.
        single: One network of the kind, deterministic; trained or not.
        inputs: What both predict, on the device of `predictor`.
        train_seconds: Of training.
        repeats: Predictions timed, after one that warms up; the shortest counts.
    """
    device = next(predictor.parameters()).device
    both = [_fastest(each, inputs, repeats) for each in (predictor, single.to(device))]
    return {
        "parameters": num_parameters(predictor),
        "train_seconds": round(train_seconds, 2),
        "relative_time": round(both[0] / both[1], 2),
    }


def cost_table(records: Sequence[Record], labels: Mapping[str, str] | None = None) -> str:
    """Return the costs of each method as Markdown, means over seeds; a dash for cells that were stored without.

    Args:
        records: Cells.
        labels: Names of the methods; None for those of the cells.

    Examples:
        >>> costs = {"parameters": 1234, "train_seconds": 2.5, "relative_time": 5.04}
        >>> print(cost_table([{"method": "ensemble", "values": {"costs": costs}}, {"method": "dropout", "values": {}}]))
        | | parameters | training (s) | prediction, times one pass |
        |---|---|---|---|
        | ensemble | 1,234 | 2.5 | 5.0 |
        | dropout | - | - | - |
    """
    lines = ["| | parameters | training (s) | prediction, times one pass |", "|---" * 4 + "|"]
    for method in dict.fromkeys(record["method"] for record in records):
        own = [found for record in records if record["method"] == method and (found := _kept(record["values"]))]
        cells = ["-"] * 3
        if own:
            seconds, times = (spread([cost[name] for cost in own]).mean for name in ("train_seconds", "relative_time"))
            cells = [f"{own[0]['parameters']:,}", f"{seconds:.{0 if seconds >= 10 else 1}f}", f"{times:.1f}"]
        lines.append(f"| {' | '.join([method if labels is None else labels[method], *cells])} |")
    return "\n".join(lines)


def with_costs(table: str, records: Sequence[Record], labels: Mapping[str, str] | None = None) -> str:
    """Return a table with that of the costs below it, where any cell has them."""
    if not any(_kept(record["values"]) for record in records):
        return table
    return f"{table}\n\nCosts:\n\n{cost_table(records, labels)}"


def _kept(values: Mapping[str, Any]) -> dict[str, float] | None:
    if "relative_prediction_time" in values:  # As CIFAR-10-C was stored before version 0.1.
        return {**values, "relative_time": values["relative_prediction_time"]}
    found: dict[str, float] | None = values.get("costs")
    return found


def _fastest(predictor: Predictor, inputs: Tensor, repeats: int) -> float:
    predictor.predict(inputs)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        # Answers are gathered on the CPU: nothing is still under way afterwards.
        predictor.predict(inputs)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
