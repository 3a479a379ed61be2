"""The page: self-contained, escaped, and with the evaluation's numbers."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard import report
from bayesguard.errors import BadInput
from bayesguard.predictive import Predictive
from bayesguard.results import Evaluation, show

NASTY = '<script>alert("x")</script> & co'


class Double:
    """A shift with a name that would be markup."""

    name, severity = "<b>double</b>", 1.0

    def __call__(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return 2 * inputs


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    VOID = ("meta", "img", "br", "hr", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > 0).long()
    return bg.evaluate(
        bg.Deterministic(nn.Linear(2, 2)), (x, labels), shifts=[Double()], groups=["<i>g</i>"] * 40, seed=11
    )


@pytest.fixture(scope="module")
def page(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "page.html"
    report.to_html({NASTY: evaluation, "other": evaluation}, path, title=NASTY)
    return path.read_text(encoding="utf-8")


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def test_page_is_whole_and_well_formed(page: str) -> None:
    tags = parsed(page)
    assert tags.open == []
    assert page.startswith("<!doctype html>")


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    assert "http://" not in page
    assert "https://" not in page
    for tag, attributes in parsed(page).seen:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"@import|url\(", page)
    assert "default-src 'none'" in page


def test_every_text_is_escaped(page: str) -> None:
    for raw in (NASTY, "<i>g</i>", "<b>double</b>"):
        assert raw not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;double&lt;/b&gt;" in page
    assert "group &lt;i&gt;g&lt;/i&gt;" in page


def test_numbers_settings_and_words_are_there(page: str, evaluation: Evaluation) -> None:
    for result in (evaluation.result("nll"), evaluation.result("ece", 1)):
        value, _, interval = show(result).partition(" ")
        assert f"{value} <small>{interval}</small>" in page
    assert "<th>seed</th><td>11</td>" in page
    for words in ("Lower is better", "What the words mean", "Negative log-likelihood", "prefers-color-scheme: dark"):
        assert words in page


def test_figures_are_pictures_with_captions(page: str) -> None:
    images = [attributes for tag, attributes in parsed(page).seen if tag == "img"]
    assert len(images) == page.count("<figcaption>") >= 5
    for image in images:
        data = (image["src"] or "").removeprefix("data:image/png;base64,")
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
        assert image["alt"]


def test_predictions_of_numbers_and_undefined_metrics(tmp_path: Path) -> None:
    numbers = bg.evaluate(Predictive.from_normal([0.0, 0.0], [1.0, 1.0]), [3.0, 4.0])
    right = bg.evaluate(Predictive.from_probs([[0.9, 0.1]] * 2), [0, 0], metrics=["error_auroc"])
    for evaluation in (numbers, right):
        evaluation.to_html(tmp_path / "page.html")
        assert parsed((tmp_path / "page.html").read_text()).open == []
    assert "undefined" in (tmp_path / "page.html").read_text()


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="empty"):
        report.to_html({}, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
