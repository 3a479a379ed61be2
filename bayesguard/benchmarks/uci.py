"""UCI regression on the standard splits: RMSE and NLL in the target's own units, beside the published numbers.

The splits are those of Hernández-Lobato and Adams (2015, ICML), which Gal and Ghahramani (2016, ICML) and Lakshminarayanan et
al. (2017, NeurIPS) use: 20 random divisions (protein: 5) into 90 % to train on and 10 % to test on. The network is theirs,
too: one hidden layer of 50 rectified units (protein: 100).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks.cells import Cell, Record, Spread, check_run, collect, measure_all, spread
from bayesguard.benchmarks.datasets import Standardised, regression, standardised
from bayesguard.benchmarks.published import UCI as PUBLISHED
from bayesguard.benchmarks.published import UCI_SETS, Published
from bayesguard.errors import BadInput
from bayesguard.predictive import Predictive
from bayesguard.predictor import Predictor
from bayesguard.sampling import seeded_default_generators

# Training sets below it are passed over more often, so that every set takes some thousands of steps; above it a learning rate
# that stays at 0.01 leaves training unsettled (naval's RMSE can end above the target's own deviation), and falls to 0.
_MANY_ROWS = 5000
_LABELS = {"rmse": "RMSE", "nll": "NLL (nats)"}


@dataclass(frozen=True)
class Recipe:
    """How a method is trained: epochs of small sets and of large ones, and whether the learning rate falls to 0 on all."""

    label: str
    build: Callable[["Recipe", int, int, int], Predictor]
    epochs: tuple[int, int]
    learning_rate: float
    batch_size: int
    cosine: bool = False
    num_members: int = 1
    dropout: float = 0.0
    published: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers, as JSON."""
        return {name: value for name, value in asdict(self).items() if name not in ("build", "label", "published")}


def recipe_of(method: str, num_rows: int) -> Recipe:
    """Return how a method is trained on so many rows."""
    recipe = METHODS[method]
    return replace(recipe, cosine=recipe.cosine or num_rows > _MANY_ROWS)


def deterministic(recipe: Recipe, num_inputs: int, width: int, seed: int) -> Predictor:
    """One network that tells a mean and a noise."""
    return bg.Deterministic(_mean_and_scale(recipe, num_inputs, width, seed), _noise_of_input(), seed=seed)


def ensemble(recipe: Recipe, num_inputs: int, width: int, seed: int) -> Predictor:
    """Several such networks."""
    make = partial(_mean_and_scale, recipe, num_inputs, width)
    return bg.DeepEnsemble(make, _noise_of_input(), num_members=recipe.num_members, seed=seed)


def dropout(recipe: Recipe, num_inputs: int, width: int, seed: int) -> Predictor:
    """One network that tells a mean, with dropout before both layers, and one noise, which is learned."""
    network = _built(seed, num_inputs, width, 1, recipe.dropout)
    return bg.MCDropout(nn.Sequential(network, nn.Flatten(0)), bg.likelihoods.Gaussian(), num_samples=200, seed=seed)


def dropout_ensemble(recipe: Recipe, num_inputs: int, width: int, seed: int) -> Predictor:
    """Several networks that tell a mean and a noise, each with its dropout left on."""
    members = [
        bg.MCDropout(
            _mean_and_scale(recipe, num_inputs, width, 1000 * seed + k), _noise_of_input(), num_samples=20, seed=k
        )
        for k in range(recipe.num_members)
    ]
    return bg.DeepEnsemble(members, seed=seed)


METHODS = {
    "deterministic": Recipe("Deterministic", deterministic, (40, 40), 0.01, 100),
    "dropout": Recipe("MC dropout", dropout, (1000, 200), 0.003, 128, cosine=True, dropout=0.01, published="dropout"),
    "ensemble": Recipe("Deep ensemble", ensemble, (40, 40), 0.01, 100, num_members=5, published="ensemble"),
    "dropout_ensemble": Recipe(
        "Deep ensemble with dropout", dropout_ensemble, (400, 40), 0.01, 100, cosine=True, num_members=5, dropout=0.01
    ),
}


def run(
    data: str = "concrete",
    *,
    methods: Sequence[str] = tuple(METHODS),
    splits: int | None = None,
    device: str = "cpu",
    out: str | Path = "results",
    data_dir: str | Path | None = None,
    jobs: int | None = None,
    budget: str = "full",
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Train and test every method on every split, print the table, and write `uci-<data>.json` under `out`.

    Args:
        data: Name of a set; see `bayesguard.benchmarks.datasets.regression`.
        methods: Names of `METHODS`.
        splits: The first so many of the published splits; None for all.
        device: "auto", "cpu" or "cuda". The networks are so small that the CPU is the faster one.
        out: Folder for the results. Cells that were measured are kept in `uci` below it, and not measured again.
        data_dir: Folder of the data; None for `BAYESGUARD_DATA`, or the download.
        jobs: Processes; see `bayesguard.benchmarks.cells.measure_all`.
        budget: "full", or "small" for one split and two epochs: it shows that everything runs, no more.
        progress: Show a progress bar.
        say: Where the table goes.

    Returns:
        A record for each cell: RMSE, NLL of the mixture, and NLL of the normal law with its mean and variance.

    Raises:
        BadInput: An unknown set, method or budget.
    """
    check_run(methods, METHODS, budget)
    rows = regression(data, data_dir=data_dir)
    available, num_rows = len(rows.test_index), len(rows.targets) - len(rows.test_index[0])
    count = 1 if budget == "small" else available if splits is None else splits
    if not 1 <= count <= available:
        raise BadInput(f"splits must be from 1 to {available} for {data}, got {splits}")
    records: list[Record] = []
    for name in methods:
        records += measure_all(
            partial(measure, data_dir=data_dir, small=budget == "small"),
            [Cell(data, name, split) for split in range(count)],
            settings={**recipe_of(name, num_rows).settings(), "budget": budget},
            folder=Path(out) / "uci",
            device=device,
            jobs=jobs,
            progress=progress,
        )
    say(f"\n{table(records)}\n")
    path = Path(out) / f"uci-{data}.json"
    collect(records, path, benchmark="uci", data=data, budget=budget)
    say(f"wrote {path}")
    return records


def measure(
    cell: Cell, device: torch.device, *, data_dir: str | Path | None = None, small: bool = False
) -> dict[str, float]:
    """Train a method on one split and test it."""
    split = standardised(regression(cell.data, data_dir=data_dir), cell.seed)
    x, y, test_x, test_y = (torch.from_numpy(part) for part in split[:4])
    recipe = recipe_of(cell.method, len(x))
    width = 100 if cell.data == "protein" else 50
    predictor = recipe.build(recipe, x.shape[1], width, cell.seed).to(device)
    epochs = 2 if small else recipe.epochs[len(x) > _MANY_ROWS]
    predictor.fit(
        (x, y),
        epochs=epochs,
        batch_size=recipe.batch_size,
        optimizer=partial(torch.optim.Adam, lr=recipe.learning_rate),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs) if recipe.cosine else None,
    )
    predictive, targets = predictor.predict_with_targets((test_x, test_y))
    return scores(predictive, targets, split)


def scores(predictive: Predictive, targets: Tensor, split: Standardised) -> dict[str, float]:
    """Return RMSE and NLL in the target's own units, from standardised predictions and targets."""
    error = predictive.mean.double() - targets.double()
    variance = predictive.variance.double()
    normal = 0.5 * ((2 * math.pi * variance).log() + error.square() / variance)
    unit = math.log(split.target_sd)
    return {
        "rmse": float(error.square().mean().sqrt()) * split.target_sd,
        "nll": float(-predictive.log_prob(targets).double().mean()) + unit,
        "nll_normal": float(normal.mean()) + unit,
    }


def table(records: Sequence[Record]) -> str:
    """Return the table as Markdown: ours as mean and standard error over splits, then the paper's."""
    data = records[0]["data"]
    lines = ["| | RMSE | published | NLL (nats) | published |", "|---|---|---|---|---|"]
    for name, recipe in METHODS.items():
        own = {metric: found(records, name, metric) for metric in _LABELS}
        cells = [recipe.label]
        for metric, value in own.items():
            cells += ["" if value is None else _shown(value.mean, value.error), _published(recipe, metric, data)]
        if any(own.values()):
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def found(records: Sequence[Record], method: str, metric: str) -> Spread | None:
    """Return the spread over splits of a method's metric; None where it was not measured."""
    values = [record["values"][metric] for record in records if record["method"] == method]
    return spread(values) if values else None


def summary(folder: str | Path) -> str:
    """Return what the result files `uci-*.json` in a folder say of all sets together, as Markdown.

    A method holds the published number where its mean is no worse than that by more than one published standard error.
    """
    import json

    lines = ["| | " + " | ".join(UCI_SETS) + " |", "|---" * (len(UCI_SETS) + 1) + "|"]
    kept = {
        name: json.loads(path.read_text())["cells"]
        for name in UCI_SETS
        if (path := Path(folder) / f"uci-{name}.json").is_file()
    }
    for metric, label in _LABELS.items():
        for name, recipe in METHODS.items():
            means = {data: found(cells, name, metric) for data, cells in kept.items()}
            row = [_shown(mean.mean, mean.error) if (mean := means.get(data)) else "" for data in UCI_SETS]
            lines.append(f"| {recipe.label}, {label} | {' | '.join(row)} |")
        for source, title in (("dropout", "MC dropout"), ("ensemble", "Deep ensemble")):
            row = [_shown(*PUBLISHED[metric][source][data]) for data in UCI_SETS]
            lines.append(f"| *published: {title}, {label}* | {' | '.join(row)} |")
    return "\n".join(lines)


def holds(ours: Spread, published: Published) -> bool:
    """Whether a mean is at most one published standard error worse than the published mean."""
    return ours.mean <= published.mean + (published.error or 0.0)


def best_published(data: str) -> float:
    """Return the lowest NLL that any of the published methods has on these splits."""
    return min(column[data].mean for column in PUBLISHED["nll"].values())


def _published(recipe: Recipe, metric: str, data: str) -> str:
    return "" if recipe.published is None else _shown(*PUBLISHED[metric][recipe.published][data])


def _shown(mean: float, error: float | None) -> str:
    digits = 4 if abs(mean) < 0.1 else 2
    return f"{mean:.{digits}f}" + ("" if error is None or math.isnan(error) else f" ± {error:.{digits}f}")


def _noise_of_input() -> bg.likelihoods.Likelihood:
    return bg.likelihoods.HeteroscedasticGaussian()


def _mean_and_scale(recipe: Recipe, num_inputs: int, width: int, seed: int) -> nn.Module:
    return _built(seed, num_inputs, width, 2, recipe.dropout)


def _built(seed: int, num_inputs: int, width: int, num_outputs: int, rate: float) -> nn.Module:
    before, between = ([nn.Dropout(rate)] if rate else [] for _ in range(2))
    with seeded_default_generators(torch.device("cpu"), seed, "network"):
        layers = [*before, nn.Linear(num_inputs, width), nn.ReLU(), *between, nn.Linear(width, num_outputs)]
    return nn.Sequential(*layers)
