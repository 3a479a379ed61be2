"""UCI regression on the standard splits: RMSE and NLL in the target's own units, beside the published numbers.

The splits are those of Hernández-Lobato and Adams (2015, ICML), which Gal and Ghahramani (2016, ICML) and Lakshminarayanan et
al. (2017, NeurIPS) use: 20 random divisions (protein: 5) into 90 % to train on and 10 % to test on. The network is theirs,
too: one hidden layer of 50 rectified units (protein: 100).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks.cells import Cell, Record, Spread, check_run, collect, measure_all, measure_together, spread
from bayesguard.benchmarks.costs import costs, with_costs
from bayesguard.benchmarks.datasets import Regression, Standardised, regression, standardised
from bayesguard.benchmarks.many_networks import normal_nll, squared_error
from bayesguard.benchmarks.published import UCI as PUBLISHED
from bayesguard.benchmarks.published import UCI_PRECISIONS, UCI_SETS, Published
from bayesguard.benchmarks.tuned_dropout import Kind, Search, tuned
from bayesguard.errors import BadInput
from bayesguard.predictive import Predictive
from bayesguard.predictor import Predictor
from bayesguard.sampling import seeded_default_generators

# Smaller training sets are passed over more often, so that every set takes some thousands of steps; above the first number a
# learning rate that stays at 0.01 leaves training unsettled (naval's RMSE can end above the target's own deviation), and falls
# to 0. Above the second lies protein alone.
_MANY_ROWS = (5000, 40000)
_LABELS = {"rmse": "RMSE", "nll": "NLL (nats)"}


@dataclass(frozen=True)
class Recipe:
    """How a method is trained: epochs on small sets, larger ones and still larger ones, and whether the learning rate always falls.

    `kind` and `search` are of a method whose dropout rate is chosen on held-out rows, for all splits together; others have
    `build`.
    """

    label: str
    epochs: tuple[int, ...]
    learning_rate: float
    batch_size: int
    build: Callable[["Recipe", int, int, int], Predictor] | None = None
    cosine: bool = False
    num_members: int = 1
    kind: Kind | None = None
    search: Search | None = None
    published: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers, as JSON."""
        unsaid = {"build", "kind", "label", "published"} | ({"search"} if self.search is None else set())
        return {name: value for name, value in asdict(self).items() if name not in unsaid}


def recipe_of(method: str, num_rows: int) -> Recipe:
    """Return how a method is trained on so many rows."""
    recipe = METHODS[method]
    # The published protocol of MC dropout keeps Adam's rate.
    return replace(recipe, cosine=recipe.cosine or (recipe.search is None and num_rows > _MANY_ROWS[0]))


def deterministic(recipe: Recipe, num_inputs: int, width: int, seed: int) -> Predictor:
    """One network that tells a mean and a noise."""
    return bg.Deterministic(_mean_and_scale(num_inputs, width, seed), _noise_of_input(), seed=seed)


def ensemble(recipe: Recipe, num_inputs: int, width: int, seed: int) -> Predictor:
    """Several such networks."""
    make = partial(_mean_and_scale, num_inputs, width)
    return bg.DeepEnsemble(make, _noise_of_input(), num_members=recipe.num_members, seed=seed)


def variational(recipe: Recipe, num_inputs: int, width: int, seed: int) -> Predictor:
    """One such network with a normal distribution over every weight."""
    network = _mean_and_scale(num_inputs, width, seed)
    return bg.Variational(network, _noise_of_input(), estimator="local_reparameterisation", num_samples=100, seed=seed)


def dropout(networks: list[nn.Module], scale: float, draws: int, seed: int) -> Predictor:
    """One network that tells a mean, with dropout before both layers, and one noise, in standardised units."""
    network = nn.Sequential(*networks, nn.Flatten(0))
    return bg.MCDropout(network, bg.likelihoods.Gaussian(scale=scale), num_samples=draws, seed=seed)


def dropout_ensemble(networks: list[nn.Module], factor: float, draws: int, seed: int) -> Predictor:
    """Networks that tell a mean and a noise, each with its dropout left on, and one factor on all their noise."""
    members = [
        bg.MCDropout(network, _noise_of_input(), num_samples=draws)
        if any(isinstance(layer, nn.Dropout) for layer in network.modules())
        else bg.Deterministic(network, _noise_of_input())
        for network in networks
    ]
    predictor = bg.DeepEnsemble(members, seed=seed)
    scaling = bg.calibration.VarianceScaling()
    scaling.load_state_dict({"factor": torch.tensor(factor), "is_fitted": torch.tensor(True)})
    predictor.calibrators.append(scaling)
    return predictor


METHODS = {
    "deterministic": Recipe("Deterministic", (40, 40), 0.01, 100, deterministic),
    "dropout": Recipe(
        "MC dropout",
        (4000, 4000, 2000),
        0.001,
        128,
        kind=Kind(dropout, squared_error),
        search=Search((0.005, 0.01, 0.05, 0.1), draws=512, final_draws=2048, epochs=(4000, 500, 250)),
        published="dropout",
    ),
    "variational": Recipe("Variational", (400, 40), 0.01, 100, variational, cosine=True),
    "ensemble": Recipe("Deep ensemble", (40, 40), 0.01, 100, ensemble, num_members=5, published="ensemble"),
    "dropout_ensemble": Recipe(
        "Deep ensemble with dropout",
        (1000, 100, 50),
        0.01,
        100,
        cosine=True,
        num_members=5,
        kind=Kind(dropout_ensemble, normal_nll, num_outputs=2),
        search=Search((0.0, 0.005, 0.01, 0.05, 0.1), draws=64, final_draws=200, epochs=(1000, 50, 25)),
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
    count, num_rows = num_splits(rows, splits, budget), len(rows.targets) - len(rows.test_index[0])
    records: list[Record] = []
    how: dict[str, Any] = {"folder": Path(out) / "uci", "device": device, "progress": progress}
    for name in methods:
        recipe = recipe_of(name, num_rows)
        cells = [Cell(data, name, split) for split in range(count)]
        how["settings"] = {**recipe.settings(), "budget": budget}
        if recipe.search is None:
            records += measure_all(
                partial(measure, data_dir=data_dir, small=budget == "small"), cells, jobs=jobs, **how
            )
        else:
            records += measure_together(
                partial(measure_tuned, data_dir=data_dir, small=budget == "small"), cells, **how
            )
    say(f"\n{table(records)}\n")
    path = Path(out) / f"uci-{data}.json"
    collect(records, path, benchmark="uci", data=data, budget=budget)
    say(f"wrote {path}")
    return records


def num_splits(rows: Regression, splits: int | None, budget: str) -> int:
    """Return how many splits of a set are measured, or raise BadInput where it has fewer than were asked for."""
    available = len(rows.test_index)
    count = 1 if budget == "small" else available if splits is None else splits
    if not 1 <= count <= available:
        raise BadInput(f"splits must be from 1 to {available} for {rows.name}, got {splits}")
    return count


def measure(
    cell: Cell, device: torch.device, *, data_dir: str | Path | None = None, small: bool = False
) -> dict[str, Any]:
    """Train a method on one split and test it."""
    split = standardised(regression(cell.data, data_dir=data_dir), cell.seed)
    x, y = torch.from_numpy(split.train_inputs), torch.from_numpy(split.train_targets)
    recipe = recipe_of(cell.method, len(x))
    assert recipe.build is not None
    predictor = recipe.build(recipe, x.shape[1], _width(cell.data), cell.seed).to(device)
    epochs = _epochs(recipe.epochs, len(x), small)
    start = time.perf_counter()
    predictor.fit(
        (x, y),
        epochs=epochs,
        batch_size=recipe.batch_size,
        optimizer=partial(torch.optim.Adam, lr=recipe.learning_rate),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs) if recipe.cosine else None,
    )
    return _tested(predictor, split, time.perf_counter() - start, _width(cell.data))


def measure_tuned(
    cells: Sequence[Cell], device: torch.device, *, data_dir: str | Path | None = None, small: bool = False
) -> list[dict[str, Any]]:
    """Train a method on all splits together, each with a rate of its own, and test it; its time is shared out equally."""
    data = cells[0].data
    rows = regression(data, data_dir=data_dir)
    splits = [standardised(rows, cell.seed) for cell in cells]
    num_rows = len(splits[0].train_targets)
    recipe = recipe_of(cells[0].method, num_rows)
    assert recipe.kind is not None
    assert recipe.search is not None
    start = time.perf_counter()
    found = tuned(
        recipe.kind._replace(num_members=recipe.num_members),
        replace(recipe.search, draws=64, final_draws=64) if small else recipe.search,
        splits,
        partial(_decay, UCI_PRECISIONS[data]),
        width=_width(data),
        epochs=_epochs(recipe.epochs, num_rows, small),
        search_epochs=_epochs(recipe.search.epochs or recipe.epochs, num_rows, small),
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        cosine=recipe.cosine,
    )
    seconds = (time.perf_counter() - start) / len(cells)
    return [
        {
            **_tested(own.predictor.to(device), split, seconds, _width(data)),
            "rate": own.rate,
            **_noise(recipe.kind, own.scale, split),
        }
        for own, split in zip(found, splits, strict=True)
    ]


def _noise(kind: Kind, scale: float, split: Standardised) -> dict[str, float]:
    """Return what was chosen of the noise: its scale in the target's own unit, or the factor on what is told."""
    return {"scale": scale * split.target_sd} if kind.num_outputs == 1 else {"factor": scale}


def _decay(precision: float, num_rows: int) -> float:
    """Return l^2 / (2 N tau), where l = 0.01 is the prior's length scale (Gal and Ghahramani 2016, eq. 7)."""
    return 0.01**2 / (2 * num_rows * precision)


def _width(data: str) -> int:
    return 100 if data == "protein" else 50


def _epochs(by_size: Sequence[int], num_rows: int, small: bool) -> int:
    size = sum(num_rows > bound for bound in _MANY_ROWS)
    return 2 if small else by_size[min(size, len(by_size) - 1)]


def _tested(predictor: Predictor, split: Standardised, seconds: float, width: int) -> dict[str, Any]:
    inputs, targets = torch.from_numpy(split.test_inputs), torch.from_numpy(split.test_targets)
    single = bg.Deterministic(_mean_and_scale(inputs.shape[1], width, 0), _noise_of_input())
    return {
        **scores(*predictor.predict_with_targets((inputs, targets)), split),
        "costs": costs(predictor, single, inputs[:1000], seconds),
    }


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
    """Return the table as Markdown: ours as mean, standard error and standard deviation over splits, then the paper's; and costs."""
    data = records[0]["data"]
    heads = [f"{label}, mean ± s.e. (s.d.) | published, ± s.e." for label in _LABELS.values()]
    lines = [f"| | {' | '.join(heads)} |", "|---|---|---|---|---|"]
    for name, recipe in METHODS.items():
        own = {metric: found(records, name, metric) for metric in _LABELS}
        cells = [recipe.label]
        for metric, value in own.items():
            own_cell = "" if value is None else f"{_shown(value.mean, value.error)} ({value.deviation:.2g})"
            cells += [own_cell, _published(recipe, metric, data)]
        if any(own.values()):
            lines.append(f"| {' | '.join(cells)} |")
    return with_costs("\n".join(lines), records, {name: recipe.label for name, recipe in METHODS.items()})


def found(records: Sequence[Record], method: str, metric: str) -> Spread | None:
    """Return the spread over splits of a method's metric; None where it was not measured."""
    values = [record["values"][metric] for record in records if record["method"] == method]
    return spread(values) if values else None


def summary(folder: str | Path) -> str:
    """Return what the result files `uci-*.json` in a folder say of all sets together, as Markdown.

    A method holds the published number where its mean is no worse than that by more than one published standard error, and is
    ahead of all where its NLL is below the last row.
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
    lowest = [_shown(best_published(data), None) for data in UCI_SETS]
    lines.append(f"| *published: the lowest NLL (nats) of all* | {' | '.join(lowest)} |")
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


def _mean_and_scale(num_inputs: int, width: int, seed: int) -> nn.Module:
    with seeded_default_generators(torch.device("cpu"), seed, "network"):
        return nn.Sequential(nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, 2))
