"""Figures: the artists hold the evaluation's numbers, nothing global is touched, and nothing is cut."""

import io
import sys
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard import plots
from bayesguard.errors import BadInput
from bayesguard.predictive import Predictive
from bayesguard.results import Evaluation


class Noise:
    """A shift of some severity."""

    def __init__(self, severity: float) -> None:
        self.name, self.severity = "noise", severity

    def __call__(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return inputs + self.severity * torch.randn(inputs.shape, generator=generator)


@pytest.fixture(scope="module")
def shifted() -> Evaluation:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 2, generator=generator)
    network = nn.Linear(2, 3)
    network.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    return bg.evaluate(bg.Deterministic(network), (x, network(x).argmax(-1)), shifts=[Noise(1), Noise(2), Noise(3)])


@pytest.fixture(scope="module")
def clean() -> Evaluation:
    return bg.evaluate(Predictive.from_probs([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]), [0, 0, 1, 1])


def points(figure: Any, panel: int = 0, line: int = 0) -> list[list[float]]:
    return [list(map(float, axis)) for axis in figure.axes[panel].get_lines()[line].get_data()]


def test_reliability_points_intervals_and_counts(shifted: Evaluation) -> None:
    figure = plots.reliability_diagram(shifted, severities=[0])
    bins = shifted.reliability[0]
    filled = bins.count > 0
    top, bottom = figure.axes
    # The first line is the diagonal.
    assert points(figure, line=0) == [[0, 1], [0, 1]]
    assert points(figure, line=1) == [bins.confidence[filled].tolist(), bins.accuracy[filled].tolist()]
    bars = top.containers[0].lines[2][0].get_segments()  # type: ignore[attr-defined]
    drawn = [[bar[0][1], bar[1][1]] for bar in bars]
    for (low, high), lower, upper in zip(
        drawn, bins.accuracy_lower[filled].tolist(), bins.accuracy_upper[filled].tolist(), strict=True
    ):
        assert (low, high) == pytest.approx((lower, upper))
    (steps,) = bottom.patches
    assert steps.get_data().values.tolist() == bins.count.tolist()  # type: ignore[attr-defined]


def test_reliability_has_a_panel_a_label(shifted: Evaluation, clean: Evaluation) -> None:
    figure = plots.reliability_diagram({"one": shifted, "two": shifted})
    assert [axes.get_title() for axes in figure.axes[::2]] == ["one", "two"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clean", "severity 2", "severity 3"]
    with pytest.raises(BadInput, match="severity 4"):
        plots.reliability_diagram(shifted, severities=[4])
    assert len(plots.reliability_diagram(clean).axes) == 2


def test_reliability_of_yes_or_no_says_so() -> None:
    evaluation = bg.evaluate(Predictive.from_probs([0.1, 0.9]), torch.tensor([0, 1]))
    top, bottom = plots.reliability_diagram(evaluation).axes
    assert (top.get_ylabel(), bottom.get_xlabel()) == ("share of yes", "probability of yes")


def test_metric_against_severity(shifted: Evaluation) -> None:
    figure = plots.metric_against_severity({"a": shifted, "b": shifted}, "nll")
    results = [shifted.result("nll", severity) for severity in (0, 1, 2, 3)]
    assert points(figure) == [[0, 1, 2, 3], [result.value for result in results]]
    vertices = np.asarray(figure.axes[0].collections[0].get_paths()[0].vertices)
    band = {(x, y) for x, y in vertices.tolist()}
    assert {(result.severity, result.lower) for result in results} <= band
    assert {(result.severity, result.upper) for result in results} <= band
    assert figure.axes[0].get_ylabel() == "NLL (nats), lower is better"
    styles = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in figure.axes[0].get_lines()]
    assert all(first != second for column in zip(*styles, strict=True) for first, second in pairwise(column))
    with pytest.raises(BadInput, match="crps"):
        plots.metric_against_severity(shifted, "crps")


def test_risk_coverage(clean: Evaluation) -> None:
    assert points(plots.risk_coverage(clean)) == [[0.25, 0.5, 0.75, 1.0], [0, 0, 0, 0.25]]


def test_histograms_add_up_and_name_their_sides(shifted: Evaluation, clean: Evaluation) -> None:
    right, wrong = shifted.doubt[0]
    figure = plots.uncertainty_histograms(shifted)
    left, beside = figure.axes
    names = [text.get_text() for text in left.get_legend().get_texts()]  # type: ignore[union-attr]
    assert names[0] == f"right ({len(right)})"
    assert len(wrong) + len(right) == 80
    heights = [patch.get_data().values.sum() for axes in (left, beside) for patch in axes.patches]  # type: ignore[attr-defined]
    assert heights == pytest.approx([1] * len(heights))
    assert beside.get_title() == "clean and shifted data"
    assert len(plots.uncertainty_histograms(clean).axes) == 1


def test_overview_of_each_kind(shifted: Evaluation, clean: Evaluation) -> None:
    assert len(shifted.plot().axes) == 5
    assert len(clean.plot().axes) == 4
    numbers = bg.evaluate(Predictive.from_normal([0.0, 0.0], [1.0, 1.0]), [3.0, 4.0])
    assert len(numbers.plot().axes) == 1
    for draw in (plots.reliability_diagram, plots.risk_coverage, plots.uncertainty_histograms):
        with pytest.raises(BadInput, match="class predictions"):
            draw(numbers)


def test_nothing_to_draw() -> None:
    with pytest.raises(BadInput, match="empty"):
        plots.reliability_diagram({})


def test_nothing_global_is_touched(shifted: Evaluation) -> None:
    before = dict(mpl.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    shifted.plot()
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_saved_figures_hold_every_label(shifted: Evaluation, tmp_path: Any) -> None:
    shifted.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    figure = plots.metric_against_severity({"a label": shifted, "a much longer label with T=1.23": shifted})
    figure.savefig(io.BytesIO(), format="png")
    width, height = figure.bbox.width, figure.bbox.height
    for artist in (figure.axes[0].xaxis.label, figure.axes[0].yaxis.label, figure.legends[0]):
        box = artist.get_window_extent()
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= width
        assert box.y1 <= height
