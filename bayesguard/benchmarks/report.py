"""`python -m benchmarks.report`: every stored result as one page, and tables and figures of README and docs from the same files."""

from collections.abc import Callable
from pathlib import Path

from bayesguard.benchmarks.stored.blocks import rewritten
from bayesguard.benchmarks.stored.docs_figures import FIGURES, checksum, drawn, save, stored_checksum
from bayesguard.benchmarks.stored.page import page
from bayesguard.errors import BadInput, BayesguardError
from bayesguard.results import write_text


def run(
    results: str | Path = "benchmarks/results",
    *,
    out: str | Path = "results/benchmarks.html",
    say: Callable[[str], None] = print,
) -> Path:
    """Write every stored result as one page, and name the files that cannot be shown.

    Args:
        results: Folder of the result files.
        out: The page to write.
        say: Where the lines go.

    Raises:
        BadInput: No result files.
    """
    folder, path = Path(results), Path(out)
    if not any(folder.glob("*.json")):
        raise BadInput(f"{folder} has no result files (*.json); run a benchmark with --out {folder}")
    text, problems = page(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    for line in problems:
        say(line)
    say(f"wrote {path}")
    return path


def pages(root: str | Path) -> list[Path]:
    """Return the pages of a repository that may hold tables: README.md, and docs with what is below it."""
    return [path for path in (Path(root) / "README.md", *sorted((Path(root) / "docs").rglob("*.md"))) if path.is_file()]


def write(root: str | Path = ".", *, say: Callable[[str], None] = print) -> list[Path]:
    """Write tables and figures of README and docs anew from `benchmarks/results`, and return the files that changed.

    Of the figures those that a page shows, where what they show has changed.

    Raises:
        BadInput: A table that is not among the results, or a folder that is not the repository's.
        BadFile: A result file that cannot be shown.
    """
    results = Path(root) / "benchmarks" / "results"
    if not results.is_dir():
        raise BadInput(f"{results} does not exist; run --write in the folder of the repository")
    changed, shown = [], set()
    for path in pages(root):
        text = path.read_text(encoding="utf-8")
        shown |= {name for name in FIGURES if f"figures/{name})" in text}
        try:
            new = rewritten(text, results)
        except BayesguardError as error:
            raise type(error)(f"{path}: {error}") from error
        if new != text:
            write_text(path, new)
            changed.append(path)
            say(f"wrote {path}")
    for name in sorted(shown):
        figure, path = drawn(name, results), Path(root) / "docs" / "figures" / name
        if stored_checksum(path) != checksum(figure):
            path.parent.mkdir(parents=True, exist_ok=True)
            save(name, figure, path)
            changed.append(path)
            say(f"wrote {path}")
    if not changed:
        say("every table and figure is as the results are")
    return changed
