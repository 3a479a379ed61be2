"""The commands `bayesguard benchmark ...`: what each may be told. The work is done by the modules of the same names."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from bayesguard.errors import BadInput

benchmark = typer.Typer(help="Benchmarks that anyone can run.", no_args_is_help=True)

Methods = Annotated[str, typer.Option(help="Methods, separated by commas, or all.")]
Seeds = Annotated[int, typer.Option(help="Repetitions, each with its own networks.")]
Seed = Annotated[int, typer.Option(help="Of the split, the networks, the shifts and the intervals.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Out = Annotated[Path, typer.Option(help="Folder for the results.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder of the data; see docs/benchmarks.md.")]
Jobs = Annotated[int | None, typer.Option(help="Processes; one by default.")]
Budget = Annotated[str, typer.Option(help="full, or small for a short look.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Training epochs; the data set's own by default.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Rows at most of training and test data.")]
AUGMENT_HELP = "of the training images: none, flip_crop, augmix, randaugment or mixup"
LimitOfParts = Annotated[int | None, typer.Option(min=1, help="Rows of each part at most.")]
Images = Annotated[str, typer.Option(help="digits, mnist, fashion_mnist or cifar10.")]
Network = Annotated[
    str | None, typer.Option(help="lenet, mlp, lenet5, wide_lenet5 or resnet20; that of the paper by default.")
]
Members = Annotated[int | None, typer.Option(help="Networks of the ensemble; 10 by default.")]
Samples = Annotated[int | None, typer.Option(help="Draws in one prediction; 300 by default.")]
RESULTS = Path("results")
RESULT_FILES = Path("benchmarks/results")


@benchmark.command()
def shift(
    data: Images = "digits",
    method: Annotated[list[str] | None, typer.Option(help="A method; may be repeated. All by default.")] = None,
    methods: Methods = "all",
    device: Device = "auto",
    out: Out = RESULTS,
    seed: Seed = 0,
    epochs: Epochs = None,
    limit: Limit = None,
    data_dir: DataDir = None,
    budget: Annotated[str, typer.Option(help="full, or small for a short look; cifar10: cpu as well.")] = "full",
    suite: Annotated[str | None, typer.Option(help="cifar10 only: cifar10-c-ovadia (default) or cifar10-c.")] = None,
    network: Annotated[
        str | None, typer.Option(help="cifar10: resnet20 (default), resnet18, ...; --shift: as its command.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="cifar10 and --shift: how many; one by default, three of labels.")
    ] = None,
    jobs: Jobs = None,
    shift: Annotated[
        str | None, typer.Option(help="rotation or translation, as the command mnist-shift; labels, as label-shift.")
    ] = None,
    augment: Annotated[str | None, typer.Option(help=f"cifar10 only: {AUGMENT_HELP}; flip_crop by default.")] = None,
) -> None:
    """Calibration on shifted data, before and after temperature scaling."""
    named = [*(method or []), *([] if methods == "all" else _some(methods, "methods"))]
    common: dict[str, Any] = {"device": device, "out": out, "epochs": epochs, "limit": limit, "data_dir": data_dir}
    if shift == "labels":
        from bayesguard.benchmarks import label_shift as labels

        for name, value in (("suite", suite), ("augment", augment)):
            if value is not None:
                raise BadInput(f"--{name} is not for --shift labels; leave it out")
        sizes: dict[str, Any] = {
            "network": network,
            "seed": seed,
            "jobs": jobs,
            "budget": budget,
            "progress": _watched(),
        }
        labels.run(data, methods=named or labels.METHODS, seeds=3 if seeds is None else seeds, **sizes, **common)
        return
    if shift is not None:
        from bayesguard.benchmarks import image_recipes, mnist_shift

        refused = {"suite": suite, "seed": seed or None, "augment": augment}
        if only := [name for name, value in refused.items() if value is not None]:
            raise BadInput(f"--{only[0]} is not for --shift {shift}; use the command mnist-shift, or leave it out")
        sizes = {"seeds": 1 if seeds is None else seeds, "jobs": jobs, "budget": budget, "progress": _watched()}
        chosen = named or image_recipes.METHODS
        mnist_shift.run(data, shift, methods=chosen, network=network, **sizes, **common)
        return
    from bayesguard.benchmarks.cifar10_c import run_shift

    run_shift(
        data,
        methods=named or None,
        budget=budget,
        seed=seed,
        suite=suite,
        network=network,
        seeds=seeds,
        jobs=jobs,
        augment=augment,
        progress=_watched(),
        **common,
    )


@benchmark.command()
def unseen(
    data: Images = "digits",
    seeds: Seeds = 1,
    device: Device = "auto",
    out: Out = RESULTS,
    jobs: Jobs = None,
    epochs: Epochs = None,
    limit: Limit = None,
    data_dir: DataDir = None,
) -> None:
    """Calibration on kinds of shift that calibration never saw."""
    from bayesguard.benchmarks.unseen import run

    given: dict[str, Any] = {"epochs": epochs, "limit": limit, "data_dir": data_dir}
    run(data, seeds=seeds, device=device, out=out, jobs=jobs, progress=_watched(), **given)


@benchmark.command()
def adversarial(
    data: Images = "digits",
    methods: Methods = "all",
    seeds: Seeds = 3,
    attack: Annotated[str, typer.Option(help="pgd or fgsm.")] = "pgd",
    device: Device = "auto",
    out: Out = RESULTS,
    jobs: Jobs = None,
    budget: Budget = "full",
) -> None:
    """Adversarial perturbations of rising radius: does uncertainty rise before accuracy falls?"""
    from bayesguard.benchmarks.adversarial import METHODS, run

    chosen = _chosen(methods, METHODS)
    common: dict[str, Any] = {"device": device, "out": out, "jobs": jobs, "budget": budget, "progress": _watched()}
    run(data, methods=chosen, seeds=seeds, attack=attack, **common)


@benchmark.command("mnist-shift")
def mnist_shift(
    data: Annotated[str, typer.Option(help="mnist or fashion_mnist.")] = "mnist",
    shift: Annotated[str, typer.Option(help="rotation or translation.")] = "rotation",
    network: Network = None,
    methods: Methods = "all",
    seeds: Seeds = 1,
    members: Members = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs; 20 by default.")] = None,
    samples: Samples = None,
    limit: LimitOfParts = None,
    device: Device = "auto",
    out: Out = RESULTS,
    data_dir: DataDir = None,
    jobs: Jobs = None,
    budget: Budget = "full",
) -> None:
    """Rotated and translated MNIST by the published protocol."""
    from bayesguard.benchmarks.image_recipes import METHODS
    from bayesguard.benchmarks.mnist_shift import run

    run(
        data,
        shift,
        methods=_chosen(methods, METHODS),
        network=network,
        seeds=seeds,
        members=members,
        epochs=epochs,
        samples=samples,
        limit=limit,
        device=device,
        out=out,
        data_dir=data_dir,
        jobs=jobs,
        budget=budget,
        progress=_watched(),
    )


@benchmark.command("label-shift")
def label_shift(
    data: Images = "mnist",
    network: Annotated[
        str | None, typer.Option(help="lenet5, mlp, ..., resnet20; that of the data by default.")
    ] = None,
    methods: Methods = "all",
    seeds: Seeds = 3,
    seed: Annotated[int, typer.Option(help="The first of the seeds.")] = 0,
    members: Annotated[int | None, typer.Option(help="Networks of the ensemble; 5 by default.")] = None,
    epochs: Epochs = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Training rows at most.")] = None,
    rows: Annotated[int | None, typer.Option(help="Test rows of a draw; 1,000 by default, 200 for digits.")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws for each shift and seed; 10 by default.")] = None,
    device: Device = "auto",
    out: Out = RESULTS,
    data_dir: DataDir = None,
    jobs: Jobs = None,
    budget: Budget = "full",
) -> None:
    """Other class shares than in training: what correction of the prior repairs."""
    from bayesguard.benchmarks.label_shift import METHODS, run

    run(
        data,
        methods=_chosen(methods, METHODS),
        seeds=seeds,
        seed=seed,
        network=network,
        members=members,
        epochs=epochs,
        limit=limit,
        rows=rows,
        draws=draws,
        device=device,
        out=out,
        data_dir=data_dir,
        jobs=jobs,
        budget=budget,
        progress=_watched(),
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
    network: Network = None,
    methods: Methods = "all",
    seeds: Seeds = 1,
    members: Members = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs; 20 by default.")] = None,
    samples: Samples = None,
    limit: LimitOfParts = None,
    device: Device = "auto",
    out: Out = RESULTS,
    data_dir: DataDir = None,
    jobs: Jobs = None,
    budget: Budget = "full",
) -> None:
    """Telling images of another kind from test data by uncertainty."""
    from bayesguard.benchmarks.image_recipes import METHODS
    from bayesguard.benchmarks.ood import run

    if more and ood is None:
        raise BadInput(f"got {', '.join(more)} without --ood; write --ood {' '.join(more)}")
    run(
        train,
        None if ood is None else [*_some(ood, "ood"), *(more or [])],
        methods=_chosen(methods, METHODS),
        network=network,
        seeds=seeds,
        members=members,
        epochs=epochs,
        samples=samples,
        limit=limit,
        device=device,
        out=out,
        data_dir=data_dir,
        jobs=jobs,
        budget=budget,
        progress=_watched(),
    )


@benchmark.command()
def uci(
    data: Annotated[str, typer.Option(help="boston, concrete, energy, kin8nm, ..., or all.")] = "concrete",
    methods: Methods = "all",
    splits: Annotated[
        int | None, typer.Option(help="The first so many of the published splits; all by default.")
    ] = None,
    device: Device = "cpu",
    out: Out = RESULTS,
    data_dir: DataDir = None,
    jobs: Jobs = None,
    budget: Budget = "full",
) -> None:
    """UCI regression on the standard splits, beside the published numbers."""
    from bayesguard.benchmarks.datasets import regression
    from bayesguard.benchmarks.published import UCI_SETS
    from bayesguard.benchmarks.uci import METHODS, num_splits, run

    names = UCI_SETS if data == "all" else [data]
    # Protein has fewer splits than the others, which take hours.
    for name in names if data == "all" else ():
        num_splits(regression(name, data_dir=data_dir), splits, budget)
    for name in names:
        run(
            name,
            methods=_chosen(methods, METHODS),
            splits=splits,
            device=device,
            out=out,
            data_dir=data_dir,
            jobs=jobs,
            budget=budget,
            progress=_watched(),
        )


@benchmark.command()
def tabular(
    data: Annotated[str, typer.Option(help="adult, adult_few_women, electricity, weather or bike_sharing.")] = "adult",
    methods: Methods = "all",
    seeds: Seeds = 5,
    device: Device = "auto",
    out: Out = RESULTS,
    data_dir: DataDir = None,
    jobs: Jobs = None,
    budget: Budget = "full",
) -> None:
    """Real tables under natural shift: people by group, and streams that drift."""
    from bayesguard.benchmarks.tabular import METHODS, run

    chosen = _chosen(methods, METHODS)
    _run_cells(run, data, chosen, seeds, device, out, data_dir, jobs, budget)


@benchmark.command()
def text(
    data: Annotated[str, typer.Option(help="clinc150, or clinc150_domains: two domains left out.")] = "clinc150",
    methods: Methods = "all",
    seeds: Seeds = 3,
    device: Device = "auto",
    out: Out = RESULTS,
    data_dir: DataDir = None,
    jobs: Jobs = None,
    budget: Budget = "full",
) -> None:
    """Intents of short queries, and queries out of scope: does the classifier know which is which?"""
    from bayesguard.benchmarks.text import METHODS, run

    chosen = _chosen(methods, METHODS)
    _run_cells(run, data, chosen, seeds, device, out, data_dir, jobs, budget)


@benchmark.command()
def noise(
    labels: Annotated[str, typer.Option(help="cifar10h: people's doubt. cifar10n: people's mistakes.")] = "cifar10h",
    methods: Methods = "all",
    seeds: Seeds = 3,
    device: Device = "auto",
    out: Out = RESULTS,
    data_dir: DataDir = None,
    jobs: Jobs = None,
    budget: Annotated[str, typer.Option(help="full, for a GPU; small, for a CPU.")] = "full",
    augment: Annotated[str, typer.Option(help=f"{AUGMENT_HELP[:1].upper()}{AUGMENT_HELP[1:]}.")] = "none",
) -> None:
    """Human labels of CIFAR-10: doubt to compare with, and mistakes to learn from."""
    from bayesguard.benchmarks.noise import METHODS, run

    chosen = _chosen(methods, METHODS)
    _run_cells(partial(run, augment=augment), labels, chosen, seeds, device, out, data_dir, jobs, budget)


@benchmark.command()
def intervals(
    runs: Annotated[int, typer.Option(help="Data sets of each setting.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the data and of the resamples.")] = 0,
    out: Out = RESULTS,
) -> None:
    """How often the intervals of `evaluate` cover, by simulation."""
    from bayesguard.benchmarks.intervals import run

    run(runs=runs, seed=seed, out=out)


@benchmark.command()
def speed(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    cases: Annotated[str, typer.Option(help="Cases, separated by commas. All by default.")] = "",
    samples: Annotated[str, typer.Option(help="Numbers of draws, separated by commas.")] = "10,50,100",
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: shows that it runs, not how fast.")] = False,
    peers: Annotated[bool, typer.Option(help="Time other libraries as well, where they are installed.")] = True,
    out: Out = RESULTS,
) -> None:
    """Speed and memory, beside the plain loop, other libraries, and what the arithmetic allows."""
    from bayesguard.benchmarks.speed.runner import CASES, run

    numbers = [_number_of_draws(text) for text in samples.split(",")]
    chosen = _names(cases) if cases else list(CASES)
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


@benchmark.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of the result files.")] = RESULT_FILES,
    out: Annotated[Path, typer.Option(help="The page to write.")] = RESULTS / "benchmarks.html",
    write: Annotated[
        bool,
        typer.Option("--write", help="Also write the tables and figures of README.md and docs in this folder anew."),
    ] = False,
) -> None:
    """Every stored result as one page, and the tables and figures of README and docs."""
    from bayesguard.benchmarks.report import run
    from bayesguard.benchmarks.report import write as write_tables

    run(results, out=out)
    if write:
        write_tables(".")


def _run_cells(
    run: Any,
    data: str,
    methods: Sequence[str],
    seeds: int,
    device: str,
    out: Path,
    data_dir: Path | None,
    jobs: int | None,
    budget: str,
) -> None:
    run(
        data,
        methods=methods,
        seeds=seeds,
        device=device,
        out=out,
        data_dir=data_dir,
        jobs=jobs,
        budget=budget,
        progress=_watched(),
    )


def _chosen(methods: str, known: Sequence[str] | dict[str, Any]) -> list[str]:
    return list(known) if methods == "all" else _names(methods)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _some(text: str, option: str) -> list[str]:
    """Return the names of an option whose absence means all: an empty text must not."""
    if not (names := _names(text)):
        raise BadInput(
            f"--{option} has {text!r}, which names nothing; write names separated by commas, or leave it out"
        )
    return names


def _watched() -> bool:
    return sys.stderr.isatty()


def _number_of_draws(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadInput(f"--samples has {text!r}; write whole numbers separated by commas, as 10,50,100") from None
