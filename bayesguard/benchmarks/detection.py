"""How well a predictive's uncertainty tells data of another kind from test data, in the conventions of the literature."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.metrics.functional.ood import area_under_precision_recall, false_positive_rate_at
from bayesguard.metrics.functional.selective import ood_auroc
from bayesguard.predictive.categorical import CategoricalPredictive
from bayesguard.summaries import area_and_influence

Scores = dict[str, Tensor]


def scores(pred: CategoricalPredictive) -> Scores:
    """Return scores `[N]` that are larger where the predictive knows less.

    "max_probability" orders rows by falling largest probability: the value is the logarithm of what the other classes have,
    so that probabilities near 1 are told apart. "entropy" is that of the mixture, "mutual_information" (mixtures
    only) what its draws disagree about.
    """
    log_probs = pred.logits.double().log_softmax(-1)
    others = log_probs.scatter(-1, log_probs.argmax(-1, keepdim=True), -torch.inf)
    # A second class that float64 cannot hold either is further in than anything else.
    found = {"max_probability": others.logsumexp(-1).clamp_min(-1e6), "entropy": pred.uncertainty().total}
    return found | {"mutual_information": pred.uncertainty().epistemic} if pred.num_samples > 1 else found


def detection(inside: Mapping[str, Tensor], outside: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return for each score its AUROC with its standard error, the areas under precision and recall on either side, and FPR95.

    "auroc" is the chance that a row of the other data has the larger score, ties counting half; its error is that over rows of
    both sets (DeLong et al. 1988, Biometrics), of one trained network; "aupr_out" takes those as
    positives, "aupr_in" the test data; "fpr95" is the share of the other data that a threshold accepts which accepts
    95 % of the test data.
    """
    if inside.keys() != outside.keys():
        raise BadInput(
            f"inside has the scores {', '.join(inside)}, outside {', '.join(outside)}; they must be the same"
        )
    return {
        name: {
            "auroc": float(ood_auroc(inside[name], outside[name])),
            "auroc_error": _error(inside[name], outside[name]),
            "aupr_out": float(area_under_precision_recall(inside[name], outside[name], positive="out")),
            "aupr_in": float(area_under_precision_recall(inside[name], outside[name], positive="in")),
            "fpr95": float(false_positive_rate_at(inside[name], outside[name], positive="in")),
        }
        for name in inside
    }


def _error(inside: Tensor, outside: Tensor) -> float:
    values = torch.cat([inside, outside]).cpu()
    outer = torch.arange(len(values)) >= len(inside)
    _, influence = area_and_influence(values, outer)
    return math.sqrt(
        sum(
            float(part.square().sum()) * len(part) / max(1, len(part) - 1)
            for part in influence.split([len(inside), len(outside)])
        )
    )
