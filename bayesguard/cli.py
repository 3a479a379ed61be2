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
from bayesguard.errors import BadInput, BayesguardError

app = typer.Typer(
    help="Find out whether a model's confidence can be believed.", no_args_is_help=True, add_completion=False
)
benchmark = typer.Typer(help="Benchmarks that anyone can run.", no_args_is_help=True)
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
        _refuse(error.format_message() or "give a command; --help lists them")


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
    # To draw a resample takes about as long as to compute three metrics of it; groups together are the data once more.
    each = (time.perf_counter() - start) * (1 + num_metrics / 3) * (1 + grouped)
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


@benchmark.command()
def shift(
    data: Annotated[str, typer.Option(help="digits, mnist, fashion_mnist or cifar10.")] = "digits",
    method: Annotated[list[str] | None, typer.Option(help="A method; may be repeated. All by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
    seed: Annotated[int, typer.Option(help="Of the split, the networks, the shifts and the intervals.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Training epochs; the data set's own by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows at most of training and test data.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data; see docs/benchmarks.md.")] = None,
    shift: Annotated[str | None, typer.Option(help="rotation or translation: as the command mnist-shift.")] = None,
) -> None:
    """Calibration on shifted data, before and after temperature scaling."""
    if shift is not None:
        from bayesguard.benchmarks import image_recipes, mnist_shift

        mnist_shift.run(
            data,
            shift,
            methods=method or image_recipes.METHODS,
            device=device,
            out=out,
            epochs=epochs,
            limit=limit,
            data_dir=data_dir,
            progress=True,
        )
        return
    from bayesguard.benchmarks.shift import METHODS, run

    run(
        data,
        methods=method or list(METHODS),
        device=device,
        out=out,
        seed=seed,
        epochs=epochs,
        limit=limit,
        data_dir=data_dir,
    )


@benchmark.command()
def unseen(
    data: Annotated[str, typer.Option(help="digits, mnist, fashion_mnist or cifar10.")] = "digits",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
    seed: Annotated[int, typer.Option(help="Of the split, the networks and the shifts.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Training epochs; the data set's own by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows at most of training and test data.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data; see docs/benchmarks.md.")] = None,
) -> None:
    """Calibration on kinds of shift that calibration never saw."""
    from bayesguard.benchmarks.unseen import run

    run(data, device=device, out=out, seed=seed, epochs=epochs, limit=limit, data_dir=data_dir)


@benchmark.command()
def adversarial(
    data: Annotated[str, typer.Option(help="digits, mnist, fashion_mnist or cifar10.")] = "digits",
    methods: Annotated[str, typer.Option(help="Separated by commas, or all.")] = "all",
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 3,
    attack: Annotated[str, typer.Option(help="pgd or fgsm.")] = "pgd",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
    jobs: Annotated[int | None, typer.Option(help="Processes; one by default.")] = None,
    budget: Annotated[str, typer.Option(help="full, or small for a quick look.")] = "full",
) -> None:
    """Adversarial perturbations of rising radius: does uncertainty rise before accuracy falls?"""
    from bayesguard.benchmarks.adversarial import METHODS, run

    chosen = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
    run(data, methods=chosen, seeds=seeds, attack=attack, device=device, out=out, jobs=jobs, budget=budget)


_Network = Annotated[
    str | None, typer.Option(help="lenet, mlp, lenet5, wide_lenet5 or resnet20; that of the paper by default.")
]
_Methods = Annotated[str, typer.Option(help="Methods, separated by commas, or all.")]
_Seeds = Annotated[int, typer.Option(help="Repetitions, each with its own networks.")]
_Members = Annotated[int | None, typer.Option(help="Networks of the ensemble; 10 by default.")]
_Epochs = Annotated[int | None, typer.Option(help="Training epochs; 20 by default.")]
_Samples = Annotated[int | None, typer.Option(help="Draws in one prediction; 300 by default.")]
_Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
_Out = Annotated[Path, typer.Option(help="Folder for the results.")]
_DataDir = Annotated[Path | None, typer.Option(help="Folder of the data; see docs/benchmarks.md.")]
_Jobs = Annotated[int | None, typer.Option(help="Processes.")]
_Budget = Annotated[str, typer.Option(help="full, or small for a short look.")]


@benchmark.command("mnist-shift")
def shifted_digits(
    data: Annotated[str, typer.Option(help="mnist or fashion_mnist.")] = "mnist",
    shift: Annotated[str, typer.Option(help="rotation or translation.")] = "rotation",
    network: _Network = None,
    methods: _Methods = "all",
    seeds: _Seeds = 1,
    members: _Members = None,
    epochs: _Epochs = None,
    samples: _Samples = None,
    device: _Device = "auto",
    out: _Out = Path("results"),
    data_dir: _DataDir = None,
    jobs: _Jobs = None,
    budget: _Budget = "full",
) -> None:
    """Rotated and translated MNIST by the published protocol."""
    from bayesguard.benchmarks.image_recipes import METHODS
    from bayesguard.benchmarks.mnist_shift import run

    run(
        data,
        shift,
        methods=METHODS if methods == "all" else _names(methods),
        network=network,
        seeds=seeds,
        members=members,
        epochs=epochs,
        samples=samples,
        device=device,
        out=out,
        data_dir=data_dir,
        jobs=jobs,
        budget=budget,
        progress=True,
    )


@benchmark.command()
def ood(
    more: Annotated[
        list[str] | None, typer.Argument(help="More sets, after that of --ood.", metavar="[SET]...")
    ] = None,
    train: Annotated[str, typer.Option(help="mnist, fashion_mnist or cifar10.")] = "mnist",
    ood: Annotated[
        str | None, typer.Option(help="Sets to tell from it, separated by commas or spaces; all by default.")
    ] = None,
    network: _Network = None,
    methods: _Methods = "all",
    seeds: _Seeds = 1,
    members: _Members = None,
    epochs: _Epochs = None,
    samples: _Samples = None,
    device: _Device = "auto",
    out: _Out = Path("results"),
    data_dir: _DataDir = None,
    jobs: _Jobs = None,
    budget: _Budget = "full",
) -> None:
    """Telling images of another kind from test data by uncertainty."""
    from bayesguard.benchmarks.image_recipes import METHODS
    from bayesguard.benchmarks.ood import run

    if more and ood is None:
        raise BadInput(f"got {', '.join(more)} without --ood; write --ood {' '.join(more)}")
    run(
        train,
        None if ood is None else [*_names(ood), *(more or [])],
        methods=METHODS if methods == "all" else _names(methods),
        network=network,
        seeds=seeds,
        members=members,
        epochs=epochs,
        samples=samples,
        device=device,
        out=out,
        data_dir=data_dir,
        jobs=jobs,
        budget=budget,
        progress=True,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@benchmark.command()
def tabular(
    data: Annotated[str, typer.Option(help="adult, adult_few_women, electricity, weather or bike_sharing.")] = "adult",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas, or all.")] = "all",
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data; see docs/benchmarks.md.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes.")] = None,
    budget: Annotated[str, typer.Option(help="full, or small for a quick look.")] = "full",
) -> None:
    """Real tables under natural shift: people by group, and streams that drift."""
    from bayesguard.benchmarks.tabular import METHODS, run

    chosen = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
    run(
        data,
        methods=chosen,
        seeds=seeds,
        device=device,
        out=out,
        data_dir=data_dir,
        jobs=jobs,
        budget=budget,
        progress=True,
    )


@benchmark.command()
def text(
    data: Annotated[str, typer.Option(help="clinc150, or clinc150_domains: two domains left out.")] = "clinc150",
    methods: Annotated[str, typer.Option(help="Separated by commas, or all.")] = "all",
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data; see docs/benchmarks.md.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes; one by default.")] = None,
    budget: Annotated[str, typer.Option(help="full, or small for a quick look.")] = "full",
) -> None:
    """Intents of short queries, and queries out of scope: does the classifier know which is which?"""
    from bayesguard.benchmarks.text import METHODS, run

    chosen = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
    run(
        data,
        methods=chosen,
        seeds=seeds,
        device=device,
        out=out,
        data_dir=data_dir,
        jobs=jobs,
        budget=budget,
        progress=sys.stderr.isatty(),
    )


@benchmark.command()
def noise(
    labels: Annotated[str, typer.Option(help="cifar10h: people's doubt. cifar10n: people's mistakes.")] = "cifar10h",
    methods: Annotated[str, typer.Option(help="Separated by commas, or all.")] = "all",
    seeds: Annotated[int, typer.Option(help="How many, from 0.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data; see docs/benchmarks.md.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes; one by default.")] = None,
    budget: Annotated[str, typer.Option(help="full, for a GPU; small, for a CPU.")] = "full",
) -> None:
    """Human labels of CIFAR-10: doubt to compare with, and mistakes to learn from."""
    from bayesguard.benchmarks.noise import METHODS, run

    chosen = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",")]
    run(
        labels,
        methods=chosen,
        seeds=seeds,
        device=device,
        out=out,
        data_dir=data_dir,
        jobs=jobs,
        budget=budget,
        progress=sys.stderr.isatty(),
    )


@benchmark.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path("benchmarks/results"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("results/benchmarks.html"),
    write: Annotated[
        bool, typer.Option("--write", help="Also write the tables of README.md and docs in this folder anew.")
    ] = False,
) -> None:
    """Every stored result as one page, and the tables of README and docs."""
    from bayesguard.benchmarks.report import run
    from bayesguard.benchmarks.report import write as write_tables

    run(results, out=out)
    if write:
        write_tables(".")


@benchmark.command()
def speed(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    cases: Annotated[str, typer.Option(help="Cases, separated by commas. All by default.")] = "",
    samples: Annotated[str, typer.Option(help="Numbers of draws, separated by commas.")] = "10,50,100",
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: shows that it runs, not how fast.")] = False,
    peers: Annotated[bool, typer.Option(help="Time other libraries as well, where they are installed.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
) -> None:
    """Speed and memory, beside the plain loop, other libraries, and what the arithmetic allows."""
    from bayesguard.benchmarks.speed.runner import CASES, run

    numbers = [_number_of_draws(text) for text in samples.split(",")]
    chosen = [case.strip() for case in cases.split(",")] if cases else list(CASES)
    run(
        device,
        cases=chosen,
        samples=numbers,
        repeats=repeats,
        threads=threads,
        quick=quick,
        peers=peers,
        out=out,
    )


def _number_of_draws(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadInput(f"--samples has {text!r}; write whole numbers separated by commas, as 10,50,100") from None
