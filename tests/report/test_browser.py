"""The page in a real browser: it loads, its console is silent, and the slider moves the numbers to the right ones."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import bayesguard as bg
from bayesguard import report
from bayesguard.metrics.functional.binned import wilson_interval
from bayesguard.predictive import Predictive

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium found: apt-get install chromium")
LABELS = ("sure </script>", "honest")


def opened(path: Path, fragment: str = "") -> tuple[str, str]:
    """Return the document after its script ran, and what the browser had to say about the page."""
    assert BROWSER is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path.parent / 'profile'}"]
    options += ["--virtual-time-budget=2000", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *options, f"file://{path}{fragment}"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def shown(document: str, row: int) -> dict[str, str]:
    names = ("share", "rate", "interval", "kept", "wrong")
    return {name: re.findall(rf'id="{name}-{row}">(.*?)</', document)[0] for name in names}


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return 2 * torch.randn(1500, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def labels(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1).multinomial(1, generator=torch.Generator().manual_seed(1)).squeeze(-1)


@pytest.fixture(scope="module")
def page(logits: torch.Tensor, labels: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("browser") / "page.html"
    predictions = (Predictive.from_logits(2 * logits), Predictive.from_logits(logits))
    report.to_html({k: bg.evaluate(p, labels) for k, p in zip(LABELS, predictions, strict=True)}, path)
    return path


def expected(
    logits: torch.Tensor, labels: torch.Tensor, threshold: float
) -> tuple[float, float, float, float, int, int]:
    """Share answered, error rate and its interval in percent, answered and wrong, by a plain loop."""
    confidence, answer = logits.softmax(-1).max(-1)
    pairs = [(c, a == b) for c, a, b in zip(confidence.tolist(), answer.tolist(), labels.tolist(), strict=True)]
    kept = [right for c, right in pairs if c >= threshold]
    wrong = kept.count(False)
    lower, upper = wilson_interval(torch.tensor(float(wrong)), torch.tensor(float(len(kept))), 0.95)
    share, rate = 100 * len(kept) / len(pairs), 100 * wrong / len(kept)
    return share, rate, 100 * lower.item(), 100 * upper.item(), len(kept), wrong


@pytest.mark.parametrize(
    ("fragment", "threshold"), [("", 0.95), ("#threshold=0.8", 0.8), ("#threshold=0.9985", 0.9985)]
)
def test_slider_moves_the_numbers(
    fragment: str, threshold: float, page: Path, logits: torch.Tensor, labels: torch.Tensor
) -> None:
    document, console = opened(page, fragment)
    assert console == ""
    assert f'id="threshold-now" for="threshold">{threshold}<' in document
    assert f'href="#threshold={threshold}"' in document
    for row, factor in enumerate((2, 1)):
        share, rate, lower, upper, kept, wrong = expected(factor * logits, labels, threshold)
        found = shown(document, row)
        assert (found["kept"], found["wrong"]) == (f"{kept:,}", f"{wrong:,}")
        limits = found["interval"].strip("[]").split(", ")
        for text, value in zip((found["share"], found["rate"], *limits), (share, rate, lower, upper), strict=True):
            assert float(text.removesuffix("%")) == pytest.approx(value, abs=0.0501)
        (ring,) = re.findall(rf'<circle id="now-{row}".*?>', document)
        assert 'visibility="visible"' in ring
        # The ring lies on the curve: left edge and width of the frame are those of the diagram.
        assert float(re.findall(r'cx="(.*?)"', ring)[0]) == pytest.approx(52 + 298 * kept / 1500, abs=0.01)


def test_nothing_answered_and_links_without_meaning(page: Path) -> None:
    document, console = opened(page, "#threshold=1")
    assert console == ""
    assert shown(document, 1)["rate"] == "no answers"
    document, console = opened(page, "#threshold=abc")
    assert console == ""
    assert 'for="threshold">0.95<' in document


def test_hover_texts_replace_titles(page: Path) -> None:
    document, _ = opened(page)
    assert "<title>" not in document.partition("<body>")[2]
    assert document.count('data-tip="') > 50
    assert 'tabindex="0"' in document


def test_the_console_is_read(page: Path) -> None:
    """The twin: a page whose script is not the one that its policy names."""
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace('"use strict";', '"use strict"; null.x;'))
    _, console = opened(broken)
    assert "Content Security Policy" in console
