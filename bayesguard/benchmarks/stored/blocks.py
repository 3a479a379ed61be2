"""Tables of pages of Markdown that are made from result files: what stands between `<!-- table: uci -->` and `<!-- end -->`."""

import re
from pathlib import Path

from bayesguard.benchmarks.speed.table import as_markdown
from bayesguard.benchmarks.stored.files import read
from bayesguard.benchmarks.stored.page import made, shown, stored, tables_of
from bayesguard.benchmarks.stored.registry import REGISTRY, speed_rows
from bayesguard.benchmarks.stored.shift_tables import markdown
from bayesguard.errors import BadFile, BadInput

_BLOCK = re.compile(
    r"^(<!-- table: ([^>\n]+?) -->\n)((?:(?!<!-- table: ).)*?)^(<!-- end -->)$", re.DOTALL | re.MULTILINE
)
_OPENING = re.compile(r"^<!-- table: ", re.MULTILINE)
_CHOICE = "speed-cpu, a choice"
_COMMANDS = "commands"
_CHOSEN = (
    "MC dropout, MLP 784-1024-1024-10, N=512, S=50, masks shared",
    "MC dropout, LeNet, N=512, S=50",
    "MC dropout, ResNet-18, N=128, S=50",
    "one of 48 draws, 60 modules (20 x Linear(256), ReLU, Dropout), N=32",
    "ensemble prediction, LeNet, N=512, M=10",
    "ensemble training, MLP 784-400-400-10, M=10",
    "variational training step, MLP 784-400-400-10, N=128",
    "variational prediction, MLP 784-400-400-10, N=128, S=20",
    "variational training step, ResNet-20, N=128",
    "peak memory of predict, ResNet-18, S=50",
    "temperature fit, 50000 x 1000 float32",
)


def rewritten(text: str, folder: Path) -> str:
    """Return a page with the tables that the results in `folder` make.

    Raises:
        BadInput: A block that does not end, or that names no table.
        BadFile: A result file that cannot be shown.
    """
    if len(_OPENING.findall(text)) != len(_BLOCK.findall(text)):
        raise BadInput("a block that begins with <!-- table: ... --> does not end; write <!-- end --> after it")
    return _BLOCK.sub(lambda block: f"{block[1]}\n{table(block[2], folder)}\n\n{block[4]}", text)


def table(name: str, folder: Path) -> str:
    """Return the table of that name as Markdown.

    Args:
        name: A benchmark with a summary of all of its files (`uci`), a file (`unseen-digits`), a file and the title of one
            of its tables (`shift-digits, ECE by severity`), or `commands` for those that make all files again.
        folder: Where the result files lie.

    Raises:
        BadInput: No such benchmark, file or title.
        BadFile: A result file that cannot be shown.
    """
    summary = REGISTRY[name].summary if name in REGISTRY else None
    if summary is not None:
        return made(lambda: summary(folder), f"the summary of {name}")
    if name == _COMMANDS:
        return _commands(folder)
    stem, _, title = (part.strip() for part in name.partition(","))
    path = folder / f"{stem}.json"
    if not path.is_file():
        raise BadInput(
            f"the table {name!r} is made from {path}, which does not exist; run its benchmark, or mend the name"
        )
    if name == _CHOICE:
        return _choice(path)
    markdown = shown(path).markdown
    if not title:
        return markdown
    titled = {found: text for found, text in tables_of(markdown) if found}
    if title not in titled:
        raise BadInput(f"{path.name} has no table {title!r}; there are {', '.join(titled)}")
    return titled[title]


def _choice(path: Path) -> str:
    rows = {row.name: row for row in made(lambda: speed_rows(read(path)), path.name)}
    missing = [name for name in _CHOSEN if name not in rows]
    if missing:
        raise BadInput(f"{path.name} has no row {missing[0]!r}; run the benchmark of speed in full")
    return as_markdown([rows[name] for name in _CHOSEN])


def _commands(folder: Path) -> str:
    found, problems = stored(folder)
    if problems:
        raise BadFile(problems[0])
    rows = [
        [f"`{item.command}`", REGISTRY[item.key].needs, item.facts.time, item.facts.device, item.facts.date]
        for key in REGISTRY
        for item in found
        if item.key == key
    ]
    return markdown(["command", "needs", "took", "on", "made"], rows)
