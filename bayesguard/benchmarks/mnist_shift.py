"""Rotated and translated MNIST by the protocol of Ovadia et al. (2019): accuracy, NLL, Brier and ECE at every step.

The paper prints these curves as a figure (1) and no numbers; what its text says of their order is checked here.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bayesguard.benchmarks.cells import Record, Spread, spread
from bayesguard.benchmarks.costs import cost_table
from bayesguard.benchmarks.image_cells import FOREIGN, SHIFTS, collect_rows, records_of
from bayesguard.benchmarks.image_recipes import METHODS
from bayesguard.errors import BadFile, BadInput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUALITIES = ("accuracy", "nll", "brier", "ece")
# "Strong" is not defined in the paper: here it is a quarter turn and more.
STRONG = 90
DPI = 120

Curves = dict[str, list[dict[str, dict[int, float]]]]


class Claim(NamedTuple):
    """Something that the paper's text says, with the numbers that decide whether it held here."""

    text: str
    held: bool
    numbers: str


def run(
    data: str = "mnist",
    shift: str = "rotation",
    *,
    methods: Sequence[str] = METHODS,
    out: str | Path = "results",
    say: Callable[[str], None] = print,
    **settings: Any,
) -> list[Record]:
    """Measure each method under a shift, print the table and the claims, and write `shift-<data>-<shift>.json` and a figure.

    Args:
        data: "mnist" or "fashion_mnist".
        shift: "rotation" or "translation".
        methods: Among `image_recipes.METHODS`.
        out: Folder for the results.
        say: Where the table goes.
        settings: As in `image_cells.records_of`.

    Raises:
        BadInput: An unknown shift, or what `records_of` refuses.
    """
    if shift not in SHIFTS:
        raise BadInput(f"shift must be one of {', '.join(SHIFTS)}, got {shift!r}")
    if data not in FOREIGN or data == "cifar10":
        raise BadInput(f"data must be mnist or fashion_mnist for {shift}, got {data!r}")
    records = records_of(data, methods=methods, out=out, **settings)
    path = Path(out) / f"shift-{data}-{shift}.json"
    write(records, path, data=data, shift=shift)
    curves = curves_of(records, shift)
    say(f"{data}, {shift}; {described(records)}\n")
    say(f"{table(curves)}\n")
    say(f"{cost_table(records)}\n")
    for claim in claims(curves, shift):
        say(f"{'held' if claim.held else 'did not hold'}: {claim.text} ({claim.numbers})")
    draw(path, path.with_suffix(".png"))
    say(f"\nwrote {path} and {path.with_suffix('.png')}")
    return records


def write(records: Sequence[Record], path: str | Path, **meta: str) -> None:
    """Keep the curves of one shift, without what the same cells say of other sets."""
    kinds = ("clean", meta["shift"])
    collect_rows(records, path, lambda found: {"shifts": {kind: found["shifts"][kind] for kind in kinds}}, **meta)


def curves_of(records: Sequence[Record], shift: str) -> Curves:
    """Return for each row of the table, and each seed, every measure by level of the shift; 0 is undisturbed."""
    curves: Curves = {}
    for record in records:
        for row, found in record["values"]["rows"].items():
            levels = {0: found["shifts"]["clean"]["0"]}
            levels |= {int(level): values for level, values in found["shifts"][shift].items()}
            curves.setdefault(row, []).append(
                {name: {level: values[name] for level, values in levels.items()} for name in QUALITIES}
            )
    return curves


def over_shifts(curves: Curves, row: str, name: str, least: int = 1) -> Spread:
    """Return the mean of a measure over the levels from `least` on, with its spread over seeds."""
    return spread([_mean(seed[name], least) for seed in curves[row]])


def _mean(levels: Mapping[int, float], least: int) -> float:
    chosen = [value for level, value in levels.items() if level >= least]
    return math.fsum(chosen) / len(chosen)


def table(curves: Curves) -> str:
    """Return the table as Markdown: undisturbed, and means over all levels of the shift."""
    lines = [
        "| | accuracy, clean | Brier, clean | ECE, clean | accuracy, shifted | NLL, shifted | Brier, shifted "
        "| ECE, shifted | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, seeds in curves.items():
        clean = [spread([seed[name][0] for seed in seeds]) for name in ("accuracy", "brier", "ece")]
        shifted = [over_shifts(curves, row, name) for name in QUALITIES]
        cells = " | ".join(value.shown() for value in (*clean, *shifted))
        lines.append(f"| {row} | {cells} | {len(seeds)} |")
    return "\n".join(lines)


def claims(curves: Curves, shift: str) -> list[Claim]:
    """Return what the paper's section 4.1 says of the order of the methods, as far as the methods are there.

    On means over seeds. The first two are about rotation only.
    """
    found = []
    others = [row for row in METHODS if row in curves and row != "variational"] + ["temperature"] * (
        "temperature" in curves
    )
    if shift == "rotation" and "variational" in curves and others:
        accuracy = {row: spread([seed["accuracy"][0] for seed in curves[row]]).mean for row in ("variational", *others)}
        brier = {row: over_shifts(curves, row, "brier", STRONG).mean for row in ("variational", *others)}
        found += [
            _lowest("variational is the least accurate on undisturbed data", accuracy),
            _lowest(f"variational has the lowest Brier score at {STRONG} degrees and more", brier),
        ]
    if "temperature" in curves:
        reference = over_shifts(curves, "temperature", "brier").mean
        for row in METHODS[1:]:
            if row in curves:
                ours = over_shifts(curves, row, "brier").mean
                text = f"{row} has a lower Brier score under shift than temperature scaling"
                found.append(Claim(text, ours < reference, f"{ours:.3f} and {reference:.3f}"))
    return found


def _lowest(text: str, values: Mapping[str, float]) -> Claim:
    (_, first), *rest = values.items()
    name, other = min(rest, key=lambda pair: pair[1])
    return Claim(text, first < other, f"{first:.4f}; the lowest of the others {other:.4f}, {name}")


def described(records: Sequence[Record]) -> str:
    """Say what was run, for the head of a table."""
    settings, device = records[0]["settings"], records[0]["device"]
    rows = "all rows" if settings["limit"] is None else f"{settings['limit']} rows at most"
    return (
        f"{settings['network']}, {settings['epochs']} epochs, {settings['members']} members, {settings['samples']} draws, "
        f"{rows}, {device} (the paper: lenet, 20 epochs, 10 members, 300 draws)"
    )


def draw(result: str | Path, path: str | Path) -> None:
    """Draw a result file; see `figure`.

    Raises:
        BadFile: A file that is no result of this benchmark.
    """
    try:
        drawn = figure(json.loads(Path(result).read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise BadFile(f"{result} is not the result of a shift benchmark ({error}); run it again") from None
    drawn.savefig(path, dpi=DPI)


def figure(content: Mapping[str, Any]) -> "Figure":
    """Return accuracy, Brier score and ECE against the shift, a line a method: figure 1 of the paper."""
    from matplotlib.figure import Figure

    shift = content["meta"]["shift"]
    curves = curves_of(content["cells"], shift)
    canvas = Figure(figsize=(12, 4.4), layout="constrained")
    axes = canvas.subplots(1, 3)
    unit = "degrees" if shift == "rotation" else "pixels"
    for axis, (name, label) in zip(
        axes, (("accuracy", "Accuracy"), ("brier", "Brier score"), ("ece", "ECE")), strict=True
    ):
        for number, (row, seeds) in enumerate(curves.items()):
            levels = sorted(seeds[0][name])
            means = [math.fsum(seed[name][level] for seed in seeds) / len(seeds) for level in levels]
            style = "--" if " + " in row else "-"
            axis.plot(levels, means, style, marker="o", markersize=3, label=row, color=f"C{number}")
        axis.set(xlabel=f"{shift.capitalize()} ({unit})", ylabel=label)
        axis.grid(alpha=0.3)
    canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return canvas
