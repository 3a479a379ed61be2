"""What the pages show runs: the Python blocks of each page, one after another, and the README's quick start."""

import re
from pathlib import Path

import matplotlib
import pyro
import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])

# A page that shows no code has nothing to run.
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text()]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_on_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # pages make networks without a seed, as readers do
    matplotlib.use("agg")
    namespace: dict[str, object] = {"__name__": "page"}
    # A page may train by Pyro itself, whose parameters live in one store for the whole process.
    with pyro.get_param_store().scope():
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_names_both_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make benchmark" in text
    assert "make test" in text
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^benchmark:", makefile, re.MULTILINE)
    assert re.search(r"^test:", makefile, re.MULTILINE)
