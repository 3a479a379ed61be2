"""Real tables under natural shift: people by group, and streams that drift away from what was trained on."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks import tabular_tools as tools
from bayesguard.benchmarks.cells import Cell, Record, check_run, collect, measure_all
from bayesguard.benchmarks.tabular_data import LOADERS, Table, load
from bayesguard.benchmarks.tabular_scores import Counts, count_scores
from bayesguard.benchmarks.tabular_tables import report
from bayesguard.calibration import Calibrator, TemperatureScaling, VarianceScaling
from bayesguard.errors import BadInput
from bayesguard.likelihoods import Categorical, HeteroscedasticGaussian, Likelihood
from bayesguard.predictive import Predictive
from bayesguard.predictor import Predictor
from bayesguard.sampling import seeded_default_generators

WIDTH, RATE = 64, 0.1
_DRAWS, _MEMBERS, _BATCH, _RATE_OF_LEARNING = 32, 5, 256, 1e-3
EPOCHS = {"adult": 10, "adult_few_women": 10, "electricity": 20, "weather": 20, "bike_sharing": 60}
_PREDICTED = 4096


class Budget(NamedTuple):
    """How much is done: rows at most of a data set, epochs at most, seeds at most; None for all."""

    limit: int | None
    epochs: int | None
    seeds: int | None


BUDGETS = {"full": Budget(None, None, None), "small": Budget(3000, 2, 1)}


def mlp(num_features: int, num_outputs: int, rate: float, seed: int) -> nn.Module:
    """Two hidden layers of 64 with ReLU and dropout."""
    with seeded_default_generators(torch.device("cpu"), seed, "network"):
        return nn.Sequential(
            nn.Linear(num_features, WIDTH),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Linear(WIDTH, num_outputs),
        )


Build = Callable[[int, Likelihood, int], Predictor]


def _deterministic(num_features: int, likelihood: Likelihood, seed: int) -> Predictor:
    return bg.Deterministic(mlp(num_features, 2, RATE, seed), likelihood, seed=seed)


def _dropout(num_features: int, likelihood: Likelihood, seed: int) -> Predictor:
    return bg.MCDropout(mlp(num_features, 2, RATE, seed), likelihood, num_samples=_DRAWS, seed=seed)


def _ensemble(num_features: int, likelihood: Likelihood, seed: int) -> Predictor:
    make = partial(mlp, num_features, 2, RATE)
    return bg.DeepEnsemble(make, likelihood, num_members=_MEMBERS, seed=seed)


def _variational(num_features: int, likelihood: Likelihood, seed: int) -> Predictor:
    # Its noise is that of the weights; dropout beside it would be counted twice.
    network = mlp(num_features, 2, 0.0, seed)
    return bg.Variational(network, likelihood, estimator="local_reparameterisation", num_samples=_DRAWS, seed=seed)


METHODS: dict[str, Build] = {
    "deterministic": _deterministic,
    "mc_dropout": _dropout,
    "deep_ensemble": _ensemble,
    "variational": _variational,
}


def run(
    data: str = "adult",
    *,
    methods: Sequence[str] = tuple(METHODS),
    seeds: int = 5,
    device: str = "auto",
    out: str | Path = "results",
    data_dir: str | Path | None = None,
    jobs: int | None = None,
    budget: str = "full",
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Train, calibrate and test each method with each seed, print the tables, and write `tabular-<data>.json` under `out`.

    Args:
        data: "adult", "adult_few_women", "electricity", "weather" or "bike_sharing".
        methods: Names from `METHODS`.
        seeds: How many: 0, 1, 2, ...
        device: "auto", "cpu" or "cuda".
        out: Folder for the results; each cell is kept in `tabular-<data>` below it, and not measured again.
        data_dir: Folder of the data; None for that of BAYESGUARD_DATA.
        jobs: Processes; see `cells.measure_all`.
        budget: "full", or "small" for a look at 3,000 rows, two epochs and one seed, whose numbers mean nothing.
        progress: Show a progress bar.
        say: Where the tables go.

    Raises:
        BadInput: An unknown data set, method, device or budget, or data that are not there.
    """
    if data not in LOADERS:
        raise BadInput(f"data must be one of {', '.join(LOADERS)}, got {data!r}")
    check_run(methods, METHODS, budget, seeds)
    limits = BUDGETS[budget]
    epochs = min(EPOCHS[data], limits.epochs or EPOCHS[data])
    cells = [Cell(data, name, seed) for name in methods for seed in range(min(seeds, limits.seeds or seeds))]
    settings = {
        "budget": budget,
        "limit": limits.limit,
        "epochs": epochs,
        "batch_size": _BATCH,
        "learning_rate": _RATE_OF_LEARNING,
        "hidden": [WIDTH, WIDTH],
        "dropout": RATE,
        "draws": _DRAWS,
        "members": _MEMBERS,
    }
    records = measure_all(
        partial(measure, epochs=epochs, limit=limits.limit, data_dir=data_dir),
        cells,
        settings=settings,
        folder=Path(out) / f"tabular-{data}-cells",
        device=device,
        jobs=jobs,
        progress=progress,
    )
    path = Path(out) / f"tabular-{data}.json"
    collect(records, path, benchmark="tabular", data=data, seeds=len(cells) // len(methods), budget=budget)
    say(report(records))
    say(f"wrote {path}")
    return records


def measure(
    cell: Cell, device: torch.device, *, epochs: int, limit: int | None, data_dir: str | Path | None
) -> dict[str, Any]:
    """Measure a cell: what a method says as trained and calibrated, and what the tools for streams or groups add."""
    table = load(cell.data, seed=cell.seed, data_dir=data_dir, limit=limit)
    likelihood: Likelihood = HeteroscedasticGaussian() if table.target else Categorical()
    predictor = METHODS[cell.method](table.num_features, likelihood, cell.seed).to(device)
    start = time.perf_counter()
    predictor.fit(
        table.train.pair, epochs=epochs, batch_size=_BATCH, optimizer=partial(torch.optim.Adam, lr=_RATE_OF_LEARNING)
    )
    trained = time.perf_counter() - start
    held, raw = _answers(predictor, table.calibration.x), _answers(predictor, table.test.x)
    start = time.perf_counter()
    _answers(predictor, table.test.x)
    took = time.perf_counter() - start
    calibrator: Calibrator = VarianceScaling() if table.target else TemperatureScaling()
    predictor.calibrate(table.calibration.pair, calibrator, batch_size=_PREDICTED)
    held_calibrated, calibrated = _answers(predictor, table.calibration.x), _answers(predictor, table.test.x)
    name = "factor" if table.target else "temperature"
    values: dict[str, Any] = {
        "rows": {"train": len(table.train.y), "calibration": len(table.calibration.y), "test": len(table.test.y)},
        "calibrator": {name: float(calibrator.get_buffer(name))},
        "costs": {
            "parameters": sum(p.numel() for p in predictor.parameters()),
            "train_seconds": round(trained, 3),
            "predict_seconds": round(took, 4),
        },
    }
    variants = {"as trained": raw, "calibrated": calibrated}
    if table.in_time:
        return values | _of_stream(table, held, held_calibrated, variants)
    return values | _of_people(table, held, held_calibrated, variants, cell.seed)


def _answers(predictor: Predictor, x: Tensor) -> Predictive:
    return predictor.predict(x, batch_size=_PREDICTED)


def _of_stream(
    table: Table, held: Predictive, held_calibrated: Predictive, variants: dict[str, Predictive]
) -> dict[str, Any]:
    y, held_y = table.test.y, table.calibration.y
    found: dict[str, Any] = {
        "coverage": tools.coverage_in_time(held, held_y, variants["as trained"], y, table),
        "alarm": {name: tools.alarm(pred, y, table) for name, pred in variants.items()},
    }
    if table.target is not None and table.counts is not None:
        scores = {}
        for name, pred in variants.items():
            score = count_scores(Counts(pred, table.target), table.counts)
            scores[name] = {"all": score(slice(None))} | {key: score(rows) for key, rows in table.blocks.items()}
        return found | {"scores": scores}
    scores = {name: tools.by_part(pred, y, table.blocks) for name, pred in variants.items()}
    corrected, shares = tools.corrected_by_block(held_calibrated, held_y, variants["calibrated"], y, table)
    return found | {"scores": scores | {"prior corrected": corrected}, "shares": shares}


def _of_people(
    table: Table, held: Predictive, held_calibrated: Predictive, variants: dict[str, Predictive], seed: int
) -> dict[str, Any]:
    mended, patches = tools.multicalibrated(held_calibrated, variants["calibrated"], table)
    scores, worst = {}, {}
    for name, pred in (variants | {"multicalibrated": mended}).items():
        scores[name], worst[name] = tools.of_groups(pred, table.test.y, table.test.labels, seed)
    coverage, size = tools.coverage_of_groups(held, variants["as trained"], table)
    return {"scores": scores, "worst": worst, "coverage": coverage, "size": size, "patches": patches}
