"""Intents of short queries, and queries that no intent fits: does the classifier know which is which?

The task of Larson et al. (2019, EMNLP) with CLINC150, for which google/uncertainty-baselines has published numbers: accuracy and
calibration on queries in scope, and how well uncertainty tells those out of scope from them. Out-of-scope queries are the
positives of every detection metric.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.benchmarks.cells import Cell, Record, check_run, collect, measure_all
from bayesguard.benchmarks.data.text import PADDING, Queries, intents
from bayesguard.benchmarks.networks import seeded
from bayesguard.benchmarks.text_tables import MAX_ERROR, NOTE, cost_table, detection_table, table
from bayesguard.calibration import SelectiveClassifier
from bayesguard.errors import BadInput
from bayesguard.metrics.functional import (
    accuracy,
    area_under_precision_recall,
    expected_calibration_error,
    false_positive_rate_at,
    ood_auroc,
)
from bayesguard.predictive import Predictive
from bayesguard.predictor import Predictor

DATA = ("clinc150", "clinc150_domains")


@dataclass(frozen=True)
class Settings:
    """How the network is built and trained."""

    buckets: int = 2**15
    width: int = 64
    hidden: int = 256
    dropout: float = 0.3
    epochs: int = 12
    batch_size: int = 512
    learning_rate: float = 5e-3
    num_members: int = 5
    num_samples: int = 32


BUDGETS = {"full": Settings(), "small": Settings(buckets=2**10, width=16, hidden=32, epochs=2, num_samples=8)}


class NGramNetwork(nn.Module):
    """The mean of the queries' n-gram vectors, a hidden layer, dropout before both layers: `[N, L]` -> logits `[N, K]`."""

    def __init__(self, settings: Settings, num_classes: int) -> None:
        super().__init__()
        self.grams = nn.EmbeddingBag(settings.buckets, settings.width, mode="mean", padding_idx=PADDING)
        self.head = nn.Sequential(
            nn.Dropout(settings.dropout),
            nn.Linear(settings.width, settings.hidden),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.hidden, num_classes),
        )

    def forward(self, queries: Tensor) -> Tensor:
        logits: Tensor = self.head(self.grams(queries))
        return logits


Make = Callable[[int], nn.Module]


def _deterministic(make: Make, settings: Settings, seed: int) -> Predictor:
    return bg.Deterministic(seeded(make, seed), seed=seed)


def _mc_dropout(make: Make, settings: Settings, seed: int) -> Predictor:
    return bg.MCDropout(seeded(make, seed), num_samples=settings.num_samples, seed=seed)


def _deep_ensemble(make: Make, settings: Settings, seed: int) -> Predictor:
    return bg.DeepEnsemble(make, num_members=settings.num_members, seed=seed)


def _variational(make: Make, settings: Settings, seed: int) -> Predictor:
    network = seeded(make, seed)
    return bg.Variational(
        network, subset_of_weights="last_layer", init_scale=0.05, num_samples=settings.num_samples, seed=seed
    )


METHODS: dict[str, Callable[[Make, Settings, int], Predictor]] = {
    "deterministic": _deterministic,
    "mc_dropout": _mc_dropout,
    "deep_ensemble": _deep_ensemble,
    "variational": _variational,
}


def run(
    data: str = "clinc150",
    *,
    methods: Sequence[str] = tuple(METHODS),
    seeds: int = 3,
    device: str = "auto",
    out: str | Path = "results",
    data_dir: str | Path | None = None,
    jobs: int | None = None,
    budget: str = "full",
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """Train and test every method with every seed, print the table, and write `text-<data>.json` under `out`.

    Args:
        data: "clinc150", or "clinc150_domains" with two domains left out of training; see
            `bayesguard.benchmarks.data.text.intents`.
        methods: Names of `METHODS`.
        seeds: How many, from 0.
        device: "auto", "cpu" or "cuda".
        out: Folder for the results. Cells that were measured are kept in `text` below it, and not measured again.
        data_dir: Folder of the data; None for `BAYESGUARD_DATA`, or the download.
        jobs: Processes; see `bayesguard.benchmarks.cells.measure_all`.
        budget: "full", or "small" for a tiny network and two epochs: it shows that everything runs, no more.
        progress: Show a progress bar.
        say: Where the table goes.

    Returns:
        A record for each cell.

    Raises:
        BadInput: An unknown data set, method or budget, or no seeds.
    """
    if data not in DATA:
        raise BadInput(f"data must be {' or '.join(DATA)}, got {data!r}")
    check_run(methods, METHODS, budget, seeds)
    settings = BUDGETS[budget]
    records = measure_all(
        partial(measure, settings=settings, data_dir=data_dir),
        [Cell(data, name, seed) for name in methods for seed in range(seeds)],
        settings={**asdict(settings), "budget": budget},
        folder=Path(out) / "text",
        device=device,
        jobs=jobs,
        progress=progress,
    )
    say(f"\n{table(records)}\n\n{detection_table(records)}\n\n{cost_table(records)}\n\nBudget: {budget}. {NOTE}\n")
    path = Path(out) / f"text-{data}.json"
    collect(records, path, benchmark="text", data=data, budget=budget, positives="out of scope", note=NOTE)
    say(f"wrote {path}")
    return records


def measure(
    cell: Cell, device: torch.device, *, settings: Settings, data_dir: str | Path | None = None
) -> dict[str, Any]:
    """Train one method with one seed, and test it as trained and with temperature scaling."""
    queries = intents(cell.data, seed=cell.seed, buckets=settings.buckets, data_dir=data_dir)
    build = METHODS[cell.method]
    predictor = build(lambda _: NGramNetwork(settings, queries.num_classes), settings, cell.seed).to(device)
    start = time.perf_counter()
    predictor.fit(
        queries.train,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=partial(torch.optim.Adam, lr=settings.learning_rate),
    )
    trained = time.perf_counter() - start
    as_trained = answers(predictor, queries)
    predictor.calibrate(queries.validation)
    start = time.perf_counter()
    predictor.predict(queries.test[0])
    return {
        "as_trained": as_trained,
        "calibrated": answers(predictor, queries),
        "temperature": float(predictor.calibrators[0].temperature),  # type: ignore[arg-type]
        "left_out": list(queries.left_out),
        "num_parameters": sum(parameter.numel() for parameter in predictor.parameters()),
        "training_seconds": round(trained, 3),
        "prediction_seconds": round(time.perf_counter() - start, 4),
    }


def answers(predictor: Predictor, queries: Queries) -> dict[str, Any]:
    """Return the metrics of a trained predictor, by name."""
    held, held_labels = predictor.predict_with_targets(queries.validation)
    inside, labels = predictor.predict_with_targets(queries.test)
    selective = SelectiveClassifier(max_error=MAX_ERROR).fit(held, held_labels)
    answered, given = selective(inside)
    found: dict[str, Any] = {
        "accuracy": float(accuracy(inside.probs, labels)),
        "nll": float(-inside.log_prob(labels).double().mean()),
        "ece": float(expected_calibration_error(inside.probs, labels)),
        "answered": float(answered.double().mean()),
        "answered_error": float((given != labels)[answered].double().mean()) if bool(answered.any()) else None,
        "outside": {},
    }
    for name, part in queries.outside.items():
        outside = predictor.predict(part)
        found["outside"][name] = {
            **detection(inside, outside),
            "answered": float(selective(outside).answered.double().mean()),
        }
    return found


def detection(inside: Predictive, outside: Predictive) -> dict[str, dict[str, float]]:
    """Return AUROC, AUPRC and FPR95 of each score of uncertainty; the rows of `outside` are the positives.

    AUPRC is the average precision, which depends on the share of positives. FPR95 is the share of `inside` that is flagged
    where 95 % of `outside` are. Mutual information is left out where the predictive has none.
    """
    both = scores(inside), scores(outside)
    return {
        name: {
            "auroc": float(ood_auroc(both[0][name], both[1][name])),
            "auprc": float(area_under_precision_recall(both[0][name], both[1][name], positive="out")),
            "fpr95": float(false_positive_rate_at(both[0][name], both[1][name], positive="out")),
        }
        for name in both[0]
    }


def scores(pred: Predictive) -> dict[str, Tensor]:
    """Return what is larger for less certain answers: minus the log of the largest probability, entropy, information."""
    parts = pred.uncertainty()
    found = {"max_probability": -pred.logits.double().log_softmax(-1).amax(-1), "entropy": parts.total}
    return found if pred.num_samples == 1 else {**found, "mutual_information": parts.epistemic}
