"""The page: self-contained, escaped, and with the evaluation's numbers."""

import base64
import hashlib
import json
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

NASTY = '</script><script>alert("x")</script> & co'


class Double:
    """A shift with a name that would be markup."""

    name, severity = "<b>double</b>", 1.0

    def __call__(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return 2 * inputs


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

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
        assert tag not in ("iframe", "object", "base", "form")
        assert "style" not in attributes  # the policy would refuse it
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert not re.search(r"@import|url\(|eval\(|innerHTML", page)


def test_policy_names_the_one_script_and_the_one_style(page: str) -> None:
    policy = next(
        a["content"] or "" for tag, a in parsed(page).seen if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag, pattern in (("script", r"<script>(.*?)</script>"), ("style", r"<style>(.*?)</style>")):
        (text,) = re.findall(pattern, page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_every_text_is_escaped(page: str) -> None:
    for raw in (NASTY, "<i>g</i>", "<b>double</b>"):
        assert raw not in page
    assert "&lt;script&gt;" in page
    # One script that runs, one that only holds data: a label opens and closes none.
    assert page.count("<script") == page.count("</script") == 2
    json.loads(re.findall(r'id="thresholds">(.*?)</script>', page)[0])
    assert "&lt;b&gt;double&lt;/b&gt;" in page
    assert "group &lt;i&gt;g&lt;/i&gt;" in page


def test_numbers_settings_and_words_are_there(page: str, evaluation: Evaluation) -> None:
    for result in (evaluation.result("nll"), evaluation.result("ece", 1)):
        value, _, interval = show(result).partition(" ")
        assert f"{value} <small>{interval}</small>" in page
    assert re.search(r'<th scope="row">seed</th><td[^>]*>11</td>', page)
    for words in ("Lower is better", "What the words mean", "Negative log-likelihood", "prefers-color-scheme: dark"):
        assert words in page


def test_diagrams_have_names_tables_have_scopes(page: str) -> None:
    seen = parsed(page).seen
    charts = [attributes for tag, attributes in seen if tag == "svg" and attributes.get("class") == "chart"]
    assert len(charts) > 10
    assert all(attributes["aria-label"] and attributes["role"] == "img" for attributes in charts)
    assert all(attributes["scope"] in ("row", "col") for tag, attributes in seen if tag == "th")
    (slider,) = [attributes for tag, attributes in seen if tag == "input"]
    assert f'<label for="{slider["id"]}">' in page
    assert set(re.findall(r"<summary>(Numbers.*?)</summary>", page)) == {"Numbers", "Numbers (clean)"}
    numbered = [attributes["id"] for _, attributes in seen if "id" in attributes]
    assert len(set(numbered)) == len(numbered)


def test_no_coordinate_is_undefined(page: str) -> None:
    for tag, attributes in parsed(page).seen:
        for name in ("d", "x", "y", "cx", "cy", "width", "height", "x1", "x2", "y1", "y2"):
            assert not re.search(r"nan|inf", attributes.get(name) or ""), (tag, attributes)


def test_predictions_of_numbers_and_undefined_metrics(tmp_path: Path) -> None:
    numbers = bg.evaluate(Predictive.from_normal([0.0, 0.0], [1.0, 1.0]), [3.0, 4.0])
    right = bg.evaluate(Predictive.from_probs([[0.9, 0.1]] * 2), [0, 0], metrics=["error_auroc"])
    for evaluation in (numbers, right):
        evaluation.to_html(tmp_path / "page.html")
        assert parsed((tmp_path / "page.html").read_text()).open == []
    assert "undefined" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("probs", [[0.9], [1.0, 1.0], [0.0, 1.0]])
def test_few_and_certain_answers(probs: list[float], tmp_path: Path) -> None:
    bg.evaluate(Predictive.from_probs([[p, 1 - p] for p in probs]), [0] * len(probs)).to_html(tmp_path / "a.html")
    bg.evaluate(Predictive.from_probs(probs), [1] * len(probs)).to_html(tmp_path / "b.html")
    for name in ("a.html", "b.html"):
        assert parsed((tmp_path / name).read_text()).open == []


def test_dense_predictions(tmp_path: Path) -> None:
    probs = torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    evaluation = bg.evaluate(Predictive.from_probs(probs), torch.zeros(6, 4, dtype=torch.long), groups=list("aabbcc"))
    evaluation.to_html(tmp_path / "page.html")
    assert '"elements":4' in (tmp_path / "page.html").read_text()


def test_size_stays_small_for_many_examples_classes_and_groups(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(5_000, 100, generator=generator).mul(3).softmax(-1)
    labels = probs.multinomial(1, generator=generator).squeeze(-1)
    groups = (torch.arange(5_000) % 40).tolist()
    evaluation = bg.evaluate(Predictive.from_probs(probs), labels, metrics=["accuracy"], groups=groups)
    report.to_html({"one": evaluation, "two": evaluation, "three": evaluation}, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 1_500_000


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="empty"):
        report.to_html({}, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_group_of_one_has_no_interval(tmp_path: Path) -> None:
    pred = Predictive.from_probs([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    evaluation = bg.evaluate(pred, torch.tensor([0, 1, 1]), groups=["a", "a", "b"])
    path = tmp_path / "page.html"
    for shown in (evaluation, bg.evaluate(pred[:1], torch.tensor([0]))):
        shown.to_html(path)
        text = re.sub("<(style|script|dl).*?</\\1>", "", path.read_text(), flags=re.DOTALL)
        assert "nan" not in text
