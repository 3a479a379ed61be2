"""Every stored result as one page."""

import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple, TypeVar

from bayesguard.benchmarks.stored.files import Content, Facts, facts, read
from bayesguard.benchmarks.stored.registry import REGISTRY, Benchmark, benchmark_of
from bayesguard.errors import BadFile, BayesguardError
from bayesguard.report.page import document
from bayesguard.report.tables import table

T = TypeVar("T")


class Shown(NamedTuple):
    """One result file, ready to be shown."""

    stem: str
    key: str
    content: Content
    markdown: str
    command: str
    facts: Facts


def stored(folder: Path) -> tuple[list[Shown], list[str]]:
    """Return the result files of a folder that can be shown, and a line about each that cannot."""
    found, problems = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(shown(path))
        except BayesguardError as error:
            problems.append(str(error))
    return found, problems


def shown(path: Path) -> Shown:
    """Read a result file and make its tables.

    Raises:
        BadFile: A file that cannot be read, or lacks what its benchmark writes.
        BadInput: A file of no known benchmark.
    """
    key, content = benchmark_of(path.stem), read(path)
    benchmark = REGISTRY[key]
    return made(
        lambda: Shown(path.stem, key, content, benchmark.table(content), benchmark.command(content), facts(content)),
        path.name,
    )


def made(make: Callable[[], T], name: str) -> T:
    """Return what is made from a result file; whatever its content makes go wrong is about the file.

    Raises:
        BadFile: Names the file and what went wrong.
    """
    try:
        return make()
    except Exception as error:
        raise BadFile(
            f"{name} cannot be shown ({type(error).__name__}: {error}); it is damaged or of another version: run its "
            "benchmark again"
        ) from error


def page(folder: Path) -> tuple[str, list[str]]:
    """Return the page, and a line about each file that could not be shown."""
    found, problems = stored(folder)
    sections = []
    for key, benchmark in REGISTRY.items():
        own = [item for item in found if item.key == key]
        if own:
            text, failed = _section(key, benchmark, own, folder)
            sections.append((key, benchmark.title, text))
            problems += failed
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in sections)
    faults = "".join(f"<li>{escape(line)}</li>" for line in problems)
    body = [
        "<h1>Benchmarks</h1>",
        f'<p class="note">{len(found)} result files. Every number on this page is read from them; the command under each '
        f"makes it again.</p><ul>{links}</ul>",
        f'<div class="advice"><p><strong>Not shown</strong></p><ul>{faults}</ul></div>' if faults else "",
        *(text for _, _, text in sections),
    ]
    return document("Benchmarks", body), problems


def tables_of(markdown: str) -> list[tuple[str, str]]:
    """Return the paragraphs of Markdown in order as (title, text); a line ending in a colon is the title of a table or list after it.

    Examples:
        >>> tables_of("A note.\\n\\nThe sums:\\n\\n| a |\\n|---|\\n| 1 |")
        [('', 'A note.'), ('The sums', '| a |\\n|---|\\n| 1 |')]
    """
    found: list[tuple[str, str]] = []
    title = ""
    for paragraph in re.split(r"\n{2,}", markdown.strip()):
        if title and not paragraph.startswith(("|", "- ")):
            found.append(("", f"{title}:"))
            title = ""
        if paragraph.endswith(":") and "\n" not in paragraph:
            title = paragraph.removesuffix(":")
            continue
        found.append((title, paragraph))
        title = ""
    return [*found, ("", f"{title}:")] if title else found


def markup(markdown: str, *, folded: bool = False) -> str:
    """Return Markdown of paragraphs, lists and tables as markup.

    Args:
        markdown: What a benchmark's tables are.
        folded: Leave only the first table open.
    """
    parts, num_tables = [], 0
    for title, text in tables_of(markdown):
        if not text.startswith("|"):
            parts += [_prose(f"{title}:")] if title else []
            parts.append(_prose(text))
            continue
        num_tables += 1
        if folded and num_tables > 1:
            parts.append(f"<details><summary>{_words(title or 'more')}</summary>{_table(text)}</details>")
        else:
            parts.append((f'<p class="note">{_words(title)}</p>' if title else "") + _table(text))
    return "".join(parts)


def _section(key: str, benchmark: Benchmark, own: Sequence[Shown], folder: Path) -> tuple[str, list[str]]:
    parts = [f'<h2 id="{key}">{escape(benchmark.title)}</h2><p class="note">{escape(benchmark.question)}</p>']
    problems = []
    extras: list[tuple[str, Callable[[], str]]] = []
    if (summary := benchmark.summary) is not None:
        extras.append(("summary", lambda: markup(summary(folder))))
    if (figures := benchmark.figures) is not None:
        extras.append(("figures", lambda: figures({item.stem: item.content for item in own})))
    for name, make in extras:
        try:
            parts.append(made(make, f"the {name} of {key}"))
        except BadFile as error:
            problems.append(str(error))
    for item in own:
        # The summary says it in one table, and so does a figure.
        inner = markup(item.markdown, folded=True) + _facts(item)
        if benchmark.summary is not None:
            parts.append(f"<details><summary>{escape(item.stem)}</summary>{inner}</details>")
        else:
            parts.append((f"<h3>{escape(item.stem)}</h3>" if len(own) > 1 else "") + inner)
    return "".join(parts), problems


def _facts(item: Shown) -> str:
    known = {**item.facts._asdict(), "needs": REGISTRY[item.key].needs.replace("`", "")}
    told = "; ".join(f"{name}: {escape(value)}" for name, value in known.items())
    return f'<p class="note">{told[0].upper()}{told[1:]}.</p><pre class="command"><code>{escape(item.command)}</code></pre>'


def _table(text: str) -> str:
    head, _, *rows = [_cells(line) for line in text.splitlines()]
    return table(
        head[1:], [(_words(row[0]), "".join(f"<td>{_words(cell)}</td>" for cell in row[1:])) for row in rows], head[0]
    )


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def _prose(text: str) -> str:
    lines = text.splitlines()
    if all(line.startswith("- ") for line in lines):
        return "<ul>" + "".join(f"<li>{_words(line[2:])}</li>" for line in lines) + "</ul>"
    return f'<p class="note">{_words(text)}</p>'


def _words(text: str) -> str:
    """Return a line with its emphasis, and what stands in square brackets or after ± smaller."""
    found = re.sub(r"\*([^*]+)\*", r"<em>\1</em>", escape(text, quote=False))
    return re.sub(r"(\[-?[0-9.]+, -?[0-9.]+\]|± [0-9.]+)", r"<small>\1</small>", found)
