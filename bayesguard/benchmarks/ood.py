"""Images of another kind: does uncertainty tell them from test data? MNIST against Fashion-MNIST, notMNIST and Omniglot.

The published columns are table 3 of Daxberger et al. (2021, Laplace redux): AUROC of the largest probability, and its mean.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bayesguard.benchmarks.cells import Record, Spread, spread
from bayesguard.benchmarks.costs import cost_table
from bayesguard.benchmarks.image_cells import FOREIGN, collect_rows, records_of
from bayesguard.benchmarks.image_recipes import METHODS
from bayesguard.benchmarks.published import LAPLACE_REDUX_MNIST_AUROC, LAPLACE_REDUX_MNIST_CONFIDENCE
from bayesguard.errors import BadInput

TARGET = 0.992
_PUBLISHED_NAMES = {"vanilla": "deterministic", "ensemble": "ensemble", "variational": "variational"}


def run(
    train: str = "mnist",
    ood: Sequence[str] | None = None,
    *,
    methods: Sequence[str] = METHODS,
    out: str | Path = "results",
    say: Callable[[str], None] = print,
    **settings: Any,
) -> list[Record]:
    """Train each method on one set, print how well it tells the others from it, and write `ood-<train>.json`.

    Args:
        train: "mnist", "fashion_mnist" or "cifar10".
        ood: The sets to print, among `image_cells.FOREIGN[train]`; None for all. All are measured.
        methods: Among `image_recipes.METHODS`.
        out: Folder for the results.
        say: Where the tables go.
        settings: As in `image_cells.records_of`.

    Raises:
        BadInput: A set that is not measured, or what `records_of` refuses.
    """
    if train not in FOREIGN:
        raise BadInput(f"train must be one of {', '.join(FOREIGN)}, got {train!r}")
    names = list(FOREIGN[train]) if ood is None else list(ood)
    for name in names:
        if name not in FOREIGN[train]:
            raise BadInput(f"ood must be among {', '.join(FOREIGN[train])} for {train}, got {name!r}")
    records = records_of(train, methods=methods, out=out, **settings)
    path = Path(out) / f"ood-{train}.json"
    write(records, path, train=train)
    say(f"{train}; {described(records)}\n")
    for name in names:
        say(f"{train} against {name}\n\n{table(records, train, name)}\n")
    say(f"{cost_table(records)}\n")
    if train == "mnist" and "fashion_mnist" in names:
        say(f"target: {target(records)}")
    say(f"wrote {path}")
    return records


def write(records: Sequence[Record], path: str | Path, **meta: str) -> None:
    """Keep what concerns the foreign sets, and the quality on test data."""

    def kept(found: dict[str, Any]) -> dict[str, Any] | None:
        if not found["ood"]:
            return None
        return {"clean": found["shifts"]["clean"]["0"], "confidence": found["confidence"], "ood": found["ood"]}

    collect_rows(records, path, kept, **meta)


def described(records: Sequence[Record]) -> str:
    """Say what was run, for the head of the tables."""
    settings = records[0]["settings"]
    rows = "all rows" if settings["limit"] is None else f"{settings['limit']} rows at most"
    return (
        f"{settings['network']}, {settings['epochs']} epochs, {settings['members']} members, {settings['samples']} draws, "
        f"{rows}, {records[0]['device']} (Laplace redux: lenet5 without dropout, 100 epochs, 5 members)"
    )


def of_sets(records: Sequence[Record], name: str, pick: Callable[[dict[str, Any]], float | None]) -> dict[str, Spread]:
    """Return a number about one foreign set for each row of the tables, with its spread over seeds."""
    return {row: spread(numbers) for row, numbers in _values(records, name, pick).items()}


def _values(
    records: Sequence[Record], name: str, pick: Callable[[dict[str, Any]], float | None]
) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for record in records:
        for row, found in record["values"]["rows"].items():
            if found["ood"] and (value := pick(found["ood"][name])) is not None:
                values.setdefault(row, []).append(value)
    return values


def areas(records: Sequence[Record], name: str, score: str) -> dict[str, str]:
    """Return each row's area under the ROC curve in words, with a 95 % interval: over seeds, or over images of one network."""
    errors = _values(records, name, _score(score, "auroc_error"))
    found = {}
    for row, numbers in _values(records, name, _score(score, "auroc")).items():
        area, (error, *_) = spread(numbers), errors.get(row, [math.nan])
        # An interval that is not over seeds: none of them are counted.
        if area.num_values == 1 and not math.isnan(error):
            area = area._replace(lower=area.mean - 1.96 * error, upper=min(1.0, area.mean + 1.96 * error), num_values=0)
        found[row] = area.shown(4)
    return found


def table(records: Sequence[Record], train: str, name: str) -> str:
    """Return the table of one foreign set as Markdown; a dash where a row has no such score or no published number."""
    by_score = {
        "largest probability": "max_probability",
        "entropy": "entropy",
        "mutual information": "mutual_information",
    }
    others = {
        "AUPR-Out": _score("max_probability", "aupr_out"),
        "FPR95": _score("max_probability", "fpr95"),
        "confidence": lambda found: float(found["confidence"]),
    }
    columns = {f"AUROC, {label}": areas(records, name, score) for label, score in by_score.items()}
    spreads = {label: of_sets(records, name, pick) for label, pick in others.items()}
    columns |= {label: {row: value.shown(4) for row, value in found.items()} for label, found in spreads.items()}
    published = {
        "published AUROC": LAPLACE_REDUX_MNIST_AUROC.get(name, {}) if train == "mnist" else {},
        "published confidence": LAPLACE_REDUX_MNIST_CONFIDENCE.get(name, {}) if train == "mnist" else {},
    }
    heads = [*columns, *published, "seeds"]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    first = spreads["confidence"]
    for row in first:
        cells = [values.get(row, "-") for values in columns.values()]
        papers = [values.get(_PUBLISHED_NAMES.get(row, "")) for values in published.values()]
        cells += ["-" if paper is None else f"{paper:.3f}" for paper in papers]
        lines.append(f"| {row} | {' | '.join(cells)} | {first[row].num_values} |")
    return "\n".join(lines)


def target(records: Sequence[Record]) -> str:
    """Say whether the ensemble reached the best published area by the published score, the largest probability."""
    found = of_sets(records, "fashion_mnist", _score("max_probability", "auroc"))
    wanted = f"AUROC of {TARGET} against fashion_mnist by the largest probability"
    if "ensemble" not in found:
        return f"{wanted}: not measured, for the ensemble is not among the methods"
    verdict = "reached" if found["ensemble"].mean >= TARGET else "not reached"
    return f"{wanted}: {verdict}; the ensemble has {areas(records, 'fashion_mnist', 'max_probability')['ensemble']}"


def _score(score: str, number: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda found: found[score].get(number) if score in found else None
