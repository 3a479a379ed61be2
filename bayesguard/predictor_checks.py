"""What a predictor is asked before it answers: its likelihood, its network's modes, its data, and the memory for draws."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesguard.data import expected_rows
from bayesguard.errors import BadInput, BadType
from bayesguard.likelihoods import Categorical, Likelihood
from bayesguard.predictive import Predictive
from bayesguard.sampling import free_memory


def check_likelihood(likelihood: object) -> Likelihood:
    """Return the likelihood, Categorical where none is given."""
    if likelihood is None:
        return Categorical()
    if not isinstance(likelihood, Likelihood):
        given = likelihood.__name__ if isinstance(likelihood, type) else type(likelihood).__name__
        hint = f": write {given}() with parentheses" if isinstance(likelihood, type) else ""
        raise BadType(f"likelihood must be an object of bayesguard.likelihoods, got {given}{hint}")
    return likelihood


def check_evaluating(network: nn.Module) -> None:
    """Refuse a network of which any part is in training mode."""
    pending, seen = [network], set()
    while pending:  # named_modules() takes several times as long, on every prediction
        module = pending.pop()
        if module.training:
            name = next(name for name, part in network.named_modules() if part is module)
            raise BadInput(
                f"the network ({name or 'its root'}) is in training mode, where predicting would change its batch "
                "statistics and use dropout twice; call predictor.eval() first"
            )
        seen.add(module)
        pending.extend(part for part in module._modules.values() if part is not None and part not in seen)


def check_one_meaning(data: Any) -> None:
    """Raise BadInput for a list of two alike arrays: two batches, of which a pair's reader would drop the second."""
    if not isinstance(data, list) or len(data) != 2 or not all(isinstance(part, (Tensor, np.ndarray)) for part in data):
        return
    first, second = data
    if first.shape == second.shape and first.dtype == second.dtype:
        raise BadInput(
            f"data is a list of two arrays of shape {tuple(first.shape)}, which may be two batches of inputs or inputs with "
            "their targets; pass one array of all inputs, or a tuple (inputs, targets)"
        )


def check_memory(first: Predictive, data: Any) -> None:
    """Refuse to keep draws that would not fit: S x N x K is foreseeable after the first batch."""
    logits = getattr(first, "draw_logits", None)
    if logits is None or (rows := expected_rows(data, len(first))) is None:
        return
    need = logits.numel() * logits.element_size() / max(1, len(first)) * rows
    free = free_memory(torch.device("cpu"))
    if need > free / 2:
        raise BadInput(
            f"keep_draws=True would hold {need / 2**30:.1f} GiB of draws, and {free / 2**30:.1f} GiB are free; use "
            "keep_draws=False (which keeps probabilities, entropies and Monte-Carlo errors), fewer num_samples, or less "
            "data"
        )
