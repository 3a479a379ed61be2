"""Figures of evaluations: matplotlib's object interface, so that no global state is touched.

Colours are those of Okabe and Ito (2008), told apart by people with any colour vision, and never the only difference:
markers and line styles differ too.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.metrics.registry import EVALUATION_METRICS
from bayesguard.results import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
Evaluations = Evaluation | Mapping[str, Evaluation]


def reliability_diagram(evaluations: Evaluations, severities: Sequence[float] | None = None) -> "Figure":
    """Draw what came true against what was promised, one panel a label, with intervals and with counts below.

    For classes that is accuracy against confidence, for yes or no the share of yes against its probability. Points below
    the diagonal promise too much. Shifts of a severity are pooled; each example counts once in the intervals.

    Args:
        evaluations: One evaluation, or several by label.
        severities: Lines; None for clean data and, where there are any, the middle and the largest severity.

    Raises:
        BadInput: An evaluation without class predictions, or without such a severity.
    """
    named = _named(evaluations)
    chosen = _severities(named) if severities is None else list(severities)
    columns = min(3, len(named))
    rows = -(-len(named) // columns)
    figure = _figure(4.6 * columns, 5.0 * rows + 0.5)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=(3, 1) * rows)
    handles: list[Any] = []
    for place, (label, evaluation) in enumerate(named.items()):
        row, column = divmod(place, columns)
        axes = (figure.add_subplot(grid[2 * row, column]), figure.add_subplot(grid[2 * row + 1, column]))
        handles = _reliability(*axes, evaluation, chosen)
        axes[0].set_title(label)
    _legend(figure, handles, [_data_name(severity) for severity in chosen])
    return figure


def metric_against_severity(evaluations: Evaluations, metric: str = "ece") -> "Figure":
    """Draw a metric against severity, one line a label, with intervals as bands.

    Raises:
        BadInput: An evaluation without this metric.
    """
    named = _named(evaluations)
    figure = _figure(7.0, 4.4 + 0.22 * len(named))
    _legend(figure, _severity_lines(figure.add_subplot(), named, metric), list(named))
    return figure


def risk_coverage(evaluations: Evaluations) -> "Figure":
    """Draw the error rate among the answers kept against the share kept, the surest first."""
    named = _named(evaluations)
    figure = _figure(6.0, 4.4 + 0.22 * len(named))
    axes = figure.add_subplot()
    handles = []
    for index, (label, evaluation) in enumerate(named.items()):
        if evaluation.risk is None:
            raise BadInput(f"{label or 'the evaluation'} has no class predictions, so no risk-coverage curve")
        style = _style(index) | {"marker": None}
        handles += axes.plot(_list(evaluation.risk.coverage), _list(evaluation.risk.risk), label=label, **style)
    axes.set(xlabel="coverage (share of answers kept)", ylabel="error rate among them", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    _legend(figure, handles, list(named))
    return figure


def uncertainty_histograms(evaluation: Evaluation) -> "Figure":
    """Draw the total uncertainty of right and wrong answers, and of clean and the most shifted data: apart is good."""
    if not evaluation.doubt:
        raise BadInput("the evaluation has no class predictions, so no right and wrong answers")
    shifted = max(evaluation.doubt) > 0
    figure = _figure(11.0 if shifted else 6.0, 4.2)
    _right_and_wrong(figure.add_subplot(1, 1 + shifted, 1), evaluation)
    if shifted:
        severity = max(evaluation.doubt)
        both = {
            "clean": torch.cat(evaluation.doubt[0]),
            f"severity {severity:g}": torch.cat(evaluation.doubt[severity]),
        }
        _histograms(figure.add_subplot(1, 2, 2), both, "clean and shifted data")
    return figure


def overview(evaluation: Evaluation) -> "Figure":
    """Draw what there is of one evaluation: reliability, risk against coverage, uncertainty, and the way under shift.

    For predictions of numbers, only the first metric against severity.
    """
    if not evaluation.doubt or evaluation.risk is None:
        return metric_against_severity(evaluation, evaluation.metrics[0])
    shifted = len(evaluation.severities) > 1
    figure = _figure(10.0 if shifted else 14.0, 9.0 if shifted else 4.6)
    grid = (
        figure.add_gridspec(4, 2, height_ratios=(3, 1, 2, 2))
        if shifted
        else figure.add_gridspec(2, 3, height_ratios=(3, 1))
    )
    top, bottom = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    handles = _reliability(top, bottom, evaluation, _severities({"": evaluation}))
    top.set_title("reliability")
    if shifted:
        names = [_data_name(severity) for severity in _severities({"": evaluation})]
        top.legend(handles, names, frameon=False, fontsize="small")
    risk = figure.add_subplot(grid[:2, 1])
    risk.plot(_list(evaluation.risk.coverage), _list(evaluation.risk.risk), color=COLOURS[0])
    risk.set(
        xlabel="coverage (share of answers kept)",
        ylabel="error rate among them",
        title="risk against coverage, clean data",
    )
    risk.set_xlim(0, 1)
    risk.set_ylim(bottom=0)
    _right_and_wrong(figure.add_subplot(grid[2:, 0] if shifted else grid[:, 2]), evaluation)
    if shifted:
        metric = "ece" if "ece" in evaluation.metrics else evaluation.metrics[0]
        axes = figure.add_subplot(grid[2:, 1])
        _severity_lines(axes, {"": evaluation}, metric)
        axes.set_title("mean over shifts")
    return figure


def _severity_lines(axes: "Axes", named: Mapping[str, Evaluation], metric: str) -> list[Any]:
    handles = []
    ticks: set[float] = set()
    for index, (label, evaluation) in enumerate(named.items()):
        severities = evaluation.severities
        results = [evaluation.result(metric, severity) for severity in severities]
        style = _style(index)
        handles += axes.plot(severities, [result.value for result in results], label=label, **style)
        lower, upper = [result.lower for result in results], [result.upper for result in results]
        axes.fill_between(severities, lower, upper, color=style["color"], alpha=0.13, linewidth=0)
        ticks.update(severities)
    spec = EVALUATION_METRICS[metric]
    better = {"lower": ", lower is better", "higher": ", higher is better", "none": ""}[spec.direction]
    axes.set(xlabel="severity of shift (0: clean)", ylabel=f"{spec.label}{better}")
    axes.set_xticks(sorted(ticks), [f"{severity:g}" for severity in sorted(ticks)])
    if spec.direction == "lower" and spec.bounds[0] == 0:
        axes.set_ylim(bottom=0)
    return handles


def _reliability(top: "Axes", bottom: "Axes", evaluation: Evaluation, severities: Sequence[float]) -> list[Any]:
    """Draw the points of some severities and, below, how many answers each stands for."""
    handles = []
    top.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for index, severity in enumerate(severities):
        if severity not in evaluation.reliability:
            raise BadInput(
                f"the evaluation has no reliability bins at severity {severity:g}; it has "
                f"{', '.join(f'{s:g}' for s in evaluation.reliability) or 'none, for it has no class predictions'}"
            )
        bins = evaluation.reliability[severity]
        filled = bins.count > 0
        x, y = bins.confidence[filled], bins.accuracy[filled]
        errors = torch.stack([y - bins.accuracy_lower[filled], bins.accuracy_upper[filled] - y]).clamp_min(0)
        style = _style(index) | {"markersize": 4.5, "linewidth": 1.2}
        handles.append(top.errorbar(_list(x), _list(y), yerr=errors.tolist(), elinewidth=0.8, capsize=1.5, **style))
        edges = [*_list(bins.lower), float(bins.upper[-1])]
        bottom.stairs(
            _list(bins.count.double()), edges, color=style["color"], linewidth=1.2, linestyle=style["linestyle"]
        )
    binary = evaluation.meta["kind"] == "binary"
    # A little room, so that points on the edges are seen whole.
    top.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share of yes" if binary else "accuracy")
    top.tick_params(labelbottom=False)
    bottom.set(
        xlabel="probability of yes" if binary else "confidence", ylabel="answers", xlim=(-0.02, 1.02), yscale="log"
    )
    bottom.set_ylim(bottom=0.7)
    return handles


def _right_and_wrong(axes: "Axes", evaluation: Evaluation) -> None:
    right, wrong = evaluation.doubt[0]
    _histograms(axes, {"right": right, "wrong": wrong}, "right and wrong answers, clean data")


def _histograms(axes: "Axes", named: Mapping[str, Tensor], title: str) -> None:
    top = max([1e-6, *(float(values.max()) for values in named.values() if len(values))])
    edges = [top * step / 20 for step in range(21)]
    for index, (name, values) in enumerate(named.items()):
        if len(values):
            counts = torch.histc(values.double(), 20, 0, top)
            axes.stairs(
                _list(counts / len(values)),
                edges,
                fill=True,
                facecolor=(COLOURS[index], 0.3),
                edgecolor=COLOURS[index],
                hatch=("", "///")[index % 2],
                linewidth=1.5,
                label=f"{name} ({len(values)})",
            )
    axes.set(xlabel="total uncertainty (nats)", ylabel="share of answers", title=title, xlim=(0, top))
    axes.legend(frameon=False)


def _data_name(severity: float) -> str:
    return "clean" if severity == 0 else f"severity {severity:g}"


def _severities(named: Mapping[str, Evaluation]) -> list[float]:
    severities = next(iter(named.values())).severities
    if len(severities) < 3:
        return severities
    return [severities[0], severities[len(severities) // 2], severities[-1]]


def _named(evaluations: Evaluations) -> Mapping[str, Evaluation]:
    if isinstance(evaluations, Evaluation):
        return {"": evaluations}
    if not evaluations:
        raise BadInput("evaluations is empty; at least one is needed")
    return evaluations


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": ("-", "--")[index % 2],
        "markersize": 5,
        "linewidth": 1.5,
    }


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(figure: "Figure", handles: list[Any], labels: list[str]) -> None:
    """Put one legend below all panels, where it hides nothing."""
    if any(labels):
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=3 if len(labels) == 3 else min(2, len(labels)),
            frameon=False,
        )


def _list(tensor: Tensor) -> list[float]:
    values: list[float] = tensor.tolist()
    return values
