"""The command line: `bayesguard evaluate predictions.npz`, `bayesguard benchmark shift`."""

import math
import operator
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import bayesguard as bg
from bayesguard.benchmarks.commands import benchmark
from bayesguard.checks import check_writable
from bayesguard.errors import BadInput, BayesguardError

app = typer.Typer(
    help="Find out whether a model's confidence can be believed.", no_args_is_help=True, add_completion=False
)
app.add_typer(benchmark, name="benchmark")

# Examples times resamples from which on the bootstrap takes about ten seconds.
_LONG = 200_000_000
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a threshold was crossed, 2 bad input (one line on stderr)."""
    given = None if arguments is None else list(arguments)
    try:
        sys.exit(app(args=given, prog_name="bayesguard", standalone_mode=False) or 0)
    except (BayesguardError, OSError, ImportError) as error:
        _refuse(str(error))
    except Exception as error:
        # Usage errors are typer's own, in whichever copy of click it carries.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message() or "give a command; --help lists them"
        _refuse(message + _given(error, sys.argv[1:] if given is None else given, message))


def _given(error: Exception, arguments: Sequence[str], message: str) -> str:
    """Return what was given for the option that a usage error is about, where typer's message does not say it."""
    names = [name for name in getattr(getattr(error, "param", None), "opts", []) if name.startswith("-")]
    values: list[str] = []
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            values += [value] if equals else arguments[place + 1 : place + 2]
    return f", got {values[-1]!r}" if values and repr(values[-1]) not in message else ""


def _refuse(message: str) -> NoReturn:
    print(f"bayesguard: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bayesguard {bg.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="A .npz, .csv or .parquet file.")],
    targets: Annotated[str | None, typer.Option(help="Array or column of the targets.")] = None,
    groups: Annotated[str | None, typer.Option(help="Array or column of group labels.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="A metric; may be repeated.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the numbers.")] = None,
    fail_if: Annotated[list[str] | None, typer.Option(help='Such as "ece>0.05"; may be repeated.')] = None,
    seed: Annotated[int, typer.Option(help="Seed of the intervals.")] = 0,
    num_resamples: Annotated[int, typer.Option(help="Of the bootstrap; 0 for numbers without intervals.")] = 1000,
) -> None:
    """Evaluate predictions kept in a file: probabilities or logits with labels, or real predictions with targets."""
    from bayesguard.metrics.registry import specs_for
    from bayesguard.tables import read_predictions

    limits = [_limit(text) for text in fail_if or []]
    for path in (html, json):
        if path is not None:
            check_writable(path)
    predictive, truth, labels = read_predictions(predictions, targets, groups)
    chosen = metric or [spec.name for spec in specs_for(predictive)]
    names = list(dict.fromkeys([*chosen, *(name for name, _, _ in limits)]))
    _announce(len(predictive), len(names), num_resamples, labels is not None)
    evaluation = bg.evaluate(
        predictive,
        truth,
        groups=labels,
        metrics=names,
        num_resamples=num_resamples,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    print(evaluation.table())
    if json is not None:
        evaluation.to_json(json)
    if html is not None:
        evaluation.to_html(html, title=predictions.name)
    crossed = [
        f"{name}{sign}{limit:g} (it is {value:.4g})"
        for name, sign, limit in limits
        # A number that is undefined keeps no promise.
        if math.isnan(value := evaluation.value(name)) or _OPERATORS[sign](value, limit)
    ]
    if crossed:
        print(f"crossed: {', '.join(crossed)}")
        raise typer.Exit(1)


def _announce(num_examples: int, num_metrics: int, num_resamples: int, grouped: bool) -> None:
    """Say on standard error how long the bootstrap will take, if that is long."""
    if num_examples * num_resamples < _LONG:
        return
    from bayesguard.metrics.bootstrap import bootstrap_weights

    start = time.perf_counter()
    next(bootstrap_weights(num_examples, 1, seed=0))
    # To draw a resample takes about as long as to compute six metrics of it; groups together are the data once more.
    each = (time.perf_counter() - start) * (1 + num_metrics / 6) * (1 + grouped)
    print(
        f"bayesguard: {num_resamples:,} resamples of {num_examples:,} examples will take about "
        f"{num_resamples * each:.0f} s; --num-resamples 0 gives the numbers without intervals at once",
        file=sys.stderr,
    )


def _limit(text: str) -> tuple[str, str, float]:
    match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*", text)
    try:
        if match is None:
            raise ValueError
        return match[1], match[2], float(match[3])
    except ValueError:
        raise BadInput(
            f'--fail-if has {text!r}; write a metric, one of > >= < <= and a number, as "ece>0.05"'
        ) from None
