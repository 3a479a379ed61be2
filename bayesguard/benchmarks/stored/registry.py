"""Which benchmark a result file is of, what it asks, its tables, its figures, and the command that makes it again.

A new benchmark adds an entry to `REGISTRY`. Its key is the word that the names of its files begin with, unless it says `files`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bayesguard.benchmarks import (
    adversarial,
    cifar10_c_tables,
    costs,
    intervals,
    label_shift_tables,
    mnist_shift,
    noise,
    ood,
    shift_methods,
    tabular_tables,
    text_tables,
    uci,
    unseen,
)
from bayesguard.benchmarks.cells import Record
from bayesguard.benchmarks.speed.measure import Spread as Range
from bayesguard.benchmarks.speed.table import Row, tables
from bayesguard.benchmarks.stored import shift_figures, shift_tables, uci_figure
from bayesguard.benchmarks.stored.files import Content
from bayesguard.errors import BadInput

Figures = Callable[[Mapping[str, Content]], str]


class Benchmark(NamedTuple):
    """How the results of one benchmark are shown.

    Attributes:
        title: Of its section.
        question: What was asked.
        table: From what a file holds to Markdown; a line that ends with a colon is the title of the table after it.
        command: From what a file holds to the command that makes it again.
        needs: What has to be there to run it, beside the package.
        figures: From the files that could be read, by name without ending, to markup.
        summary: From the folder to Markdown about all of its files together.
        files: Pattern of the names of its files, without ending, where they do not begin with the key, or another's do, too.
    """

    title: str
    question: str
    table: Callable[[Content], str]
    command: Callable[[Content], str]
    needs: str
    figures: Figures | None = None
    summary: Callable[[Path], str] | None = None
    files: str | None = None


def benchmark_of(stem: str) -> str:
    """Return the key of a file's benchmark from its name without the ending.

    Raises:
        BadInput: No benchmark of that name.
    """
    for key, benchmark in REGISTRY.items():
        if benchmark.files is not None and re.fullmatch(benchmark.files, stem):
            return key
    key = stem.partition("-")[0]
    if key not in REGISTRY or REGISTRY[key].files is not None:
        raise BadInput(f"{stem}.json is of no known benchmark; known are {', '.join(REGISTRY)}")
    return key


def command(name: str, **options: object) -> str:
    """Return a command line; options that are None are left out.

    Examples:
        >>> command("uci", data="yacht", methods=["ensemble", "dropout"], jobs=None)
        'python -m benchmarks.uci --data yacht --methods ensemble,dropout --out results'
    """
    words = ["python", "-m", f"benchmarks.{name}"]
    for option, value in options.items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{option.replace('_', '-')}", text]
    return " ".join([*words, "--out results"])


def _of_cells(records: Sequence[Record], *names: str) -> dict[str, object]:
    """Return the options that every benchmark of cells has, and those of its settings that are named."""
    settings = records[0]["settings"]
    methods = list(dict.fromkeys(record["method"] for record in records))
    budget = settings.get("budget")
    return {
        "methods": methods,
        "seeds": len({record["seed"] for record in records}),
        **{name: settings[name] for name in names},
        "budget": None if budget == "full" else budget,
    }


def _uci(content: Content) -> str:
    options = _of_cells(content["cells"])
    return command("uci", data=content["meta"]["data"], splits=options.pop("seeds"), **options)


def _tabular(content: Content) -> str:
    return command("tabular", data=content["meta"]["data"], **_of_cells(content["cells"]))


def _unseen(content: Content) -> str:
    return command("unseen", data=content["meta"]["data"], seeds=len(content["cells"]))


def _adversarial(content: Content) -> str:
    cells = content["cells"]
    return command("adversarial", data=cells[0]["data"], **_of_cells(cells, "attack"))


def _mnist_shift(content: Content) -> str:
    options = _of_cells(content["cells"], "network", "members", "epochs", "samples", "limit")
    return _own_command("mnist-shift", data=content["meta"]["data"], shift=content["meta"]["shift"], **options)


def _label_shift(content: Content) -> str:
    cells = content["cells"]
    sizes = ("network", "members", "epochs", "limit", "rows", "draws")
    first = min(cell["seed"] for cell in cells) or None
    return _own_command("label-shift", data=content["meta"]["data"], seed=first, **_of_cells(cells, *sizes))


def _own_command(name: str, **options: object) -> str:
    """Return a command that has every option of its benchmark; python -m benchmarks.shift has those of other data, too."""
    return command("shift", **options).replace("python -m benchmarks.shift", f"bayesguard benchmark {name}")


def _label_shift_tables(content: Content) -> str:
    cells = content["cells"]
    return "\n\n".join(
        [f"{label_shift_tables.described(cells)}.", label_shift_tables.tables(cells), label_shift_tables.NOTE]
    )


def _ood(content: Content) -> str:
    cells, train = content["cells"], content["meta"]["train"]
    return command(
        "ood",
        train=train,
        ood=_foreign(content),
        **_of_cells(cells, "network", "members", "epochs", "samples", "limit"),
    )


def _foreign(content: Content) -> list[str]:
    return list(next(iter(content["cells"][0]["values"]["rows"].values()))["ood"])


def _shift(content: Content) -> str:
    meta = content["meta"]
    some = list(meta.get("methods", ()))
    return command(
        "shift",
        data=meta["data"],
        methods=None if some in ([], list(shift_methods.METHODS)) else some,
        seed=meta["seed"],
        epochs=meta.get("epochs"),
        limit=meta.get("limit"),
    )


def _cifar10_c(content: Content) -> str:
    cells = content["cells"]
    budget = cells[0]["settings"]["budget"]
    options = _of_cells(cells, "suite", *(("network", "epochs") if budget == "full" else ()))
    return command(
        "shift", data="cifar10", seed=min(cell["seed"] for cell in cells) or None, augment=_augment(cells), **options
    )


def _augment(cells: Sequence[Record]) -> str | None:
    """The augmentation of training, where it is not the benchmark's own."""
    found: Sequence[str] = [name for cell in cells if (name := cell["settings"].get("augment"))]
    return found[0] if found else None


def _noise(content: Content) -> str:
    cells = content["cells"]
    return command("noise", labels=content["meta"]["labels"], **_of_cells(cells), augment=_augment(cells))


def _speed(content: Content) -> str:
    machine = content["machine"]
    device = "cuda" if machine["gpu"] else "cpu"
    return command("speed", device=device, repeats=content["repeats"], threads=machine["threads"])


def _ood_tables(content: Content) -> str:
    cells, train = content["cells"], content["meta"]["train"]
    parts = [f"{ood.described(cells)}."]
    parts += [f"{train} against {name}:\n\n{ood.table(cells, train, name)}" for name in _foreign(content)]
    if "fashion_mnist" in _foreign(content) and train == "mnist":
        parts.append(f"Target:\n\n- {ood.target(cells)}")
    parts.append(f"Costs:\n\n{costs.cost_table(cells)}")
    return "\n\n".join(parts)


def _mnist_tables(content: Content) -> str:
    cells, kind = content["cells"], content["meta"]["shift"]
    curves = mnist_shift.curves_of(cells, kind)
    found = mnist_shift.claims(curves, kind)
    told = "\n".join(f"- {'held' if claim.held else 'did not hold'}: {claim.text} ({claim.numbers})" for claim in found)
    shown = [f"Means over all levels of {kind}:", mnist_shift.table(curves), "Claims:", told]
    shown += ["Costs:", costs.cost_table(cells)]
    return "\n\n".join([f"{mnist_shift.described(cells)}.", *shown])


def _text_tables(content: Content) -> str:
    cells = content["cells"]
    head, rule, *rows = text_tables.detection_table(cells).splitlines()
    calibrated = [row for row in rows if "+ temperature" in row]
    titled = {
        "In scope": text_tables.table(cells),
        "Outside every intent, as trained": "\n".join([head, rule, *(row for row in rows if row not in calibrated)]),
        "Outside every intent, calibrated": "\n".join([head, rule, *calibrated]),
        "Costs": text_tables.cost_table(cells),
    }
    return "\n\n".join([*(f"{title}:\n\n{table}" for title, table in titled.items()), content["meta"]["note"]])


def _noise_tables(content: Content) -> str:
    rows = noise.tables(content["cells"], content["meta"]["labels"])
    return f"{rows}\n\nBudget: {content['meta']['budget']} ({content['meta']['protocol']})."


def _adversarial_tables(content: Content) -> str:
    by_radius, onsets, *costs = adversarial.table(content["cells"]).split("\n\n")
    titled = ["By radius:", by_radius, "Where entropy rises and accuracy falls, by seed:", onsets, *costs]
    return "\n\n".join(titled)


def speed_rows(content: Content) -> list[Row]:
    """Return the rows of a speed file."""
    kept = [{name: value for name, value in row.items() if name in Row.__dataclass_fields__} for row in content["rows"]]
    return [Row(**{**row, "value": Range(**row["value"])}) for row in kept]


REGISTRY: dict[str, Benchmark] = {
    "shift": Benchmark(
        "Calibration under shift",
        "A network is trained and calibrated on clean data; is its confidence still to be believed when the data drift away?",
        shift_tables.of_evaluations,
        _shift,
        "digits: nothing; other data: their images",
        shift_figures.of_evaluations,
    ),
    "cifar10-c": Benchmark(
        "CIFAR-10-C",
        "Every method on CIFAR-10 under corruptions, beside the published numbers.",
        lambda content: cifar10_c_tables.table(content["cells"]),
        _cifar10_c,
        "CIFAR-10; CUDA, but for smaller budgets",
        shift_figures.of_evaluations,
        files=r"shift-cifar10-c.*",
    ),
    "mnist-shift": Benchmark(
        "Rotated and translated MNIST",
        "The same for digits that are turned or moved (Ovadia et al. 2019, NeurIPS, section 4.1).",
        _mnist_tables,
        _mnist_shift,
        "MNIST",
        shift_figures.of_levels,
        files=r"shift-\w+-(rotation|translation)",
    ),
    "label-shift": Benchmark(
        "Label shift",
        "The classes look as they did, and only their shares have changed; what does correction of the prior repair?",
        _label_shift_tables,
        _label_shift,
        "digits: nothing; other data: their images",
        files=r"label-shift-\w+",
    ),
    "unseen": Benchmark(
        "Kinds of shift that calibration never saw",
        "A family of perturbations is left out of calibration and tested on, each in turn.",
        lambda content: unseen.table(content["cells"]),
        _unseen,
        "digits: nothing; other data: their images",
    ),
    "ood": Benchmark(
        "Images of another kind",
        "How well uncertainty tells images of another data set from test data.",
        _ood_tables,
        _ood,
        "the data sets named",
    ),
    "uci": Benchmark(
        "UCI regression",
        "RMSE and negative log-likelihood on the standard splits, beside the published numbers.",
        lambda content: uci.table(content["cells"]),
        _uci,
        "the data set named",
        uci_figure.dots,
        uci.summary,
    ),
    "tabular": Benchmark(
        "Tables under natural shift",
        "Groups of people, and streams that drift away from what was trained on.",
        lambda content: tabular_tables.report(content["cells"]),
        _tabular,
        "the data set named",
    ),
    "text": Benchmark(
        "Queries out of scope",
        "A network sorts short queries into intents; does it know which belong to none?",
        _text_tables,
        lambda content: command("text", data=content["meta"]["data"], **_of_cells(content["cells"])),
        "CLINC150, Banking77",
    ),
    "noise": Benchmark(
        "Labels by people",
        "Is the doubt of a network that of people, and what do people's mistakes do to calibration?",
        _noise_tables,
        _noise,
        "CIFAR-10 with CIFAR-10H or CIFAR-10N",
    ),
    "adversarial": Benchmark(
        "Adversarial radii",
        "Does uncertainty rise before accuracy falls, when images are changed against the method?",
        _adversarial_tables,
        _adversarial,
        "digits: nothing; other data: their images",
    ),
    "intervals": Benchmark(
        "Coverage of intervals",
        "How often the 95 % intervals of evaluations hold the true number of a model that is known, in %.",
        lambda content: intervals.table(content["coverage"]),
        lambda content: command("intervals", runs=content["meta"]["runs"], seed=content["meta"]["seed"]),
        "nothing",
    ),
    "speed": Benchmark(
        "Speed and memory",
        "What uncertainty costs: ratios to the plain way, beside other libraries and what the arithmetic allows.",
        lambda content: tables(speed_rows(content)),
        _speed,
        "the other libraries: extra `peers`",
    ),
}
