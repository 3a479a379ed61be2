"""Which way a prediction takes, where a clock would decide."""

from typing import Any

import pytest
import torch

from bayesguard.posteriors import ensemble_prediction, weight_outputs
from bayesguard.sampling.choice import Choice


def choose_way(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Let ensembles and draws of weights take that way where it is a candidate, and the loop elsewhere."""

    def fastest(candidates: dict[str, Any], device: torch.device) -> Choice:
        chosen = way if way in candidates else "loop"
        return Choice(chosen, {name: float(name != chosen) for name in candidates})

    monkeypatch.setattr(ensemble_prediction, "fastest", fastest)
    monkeypatch.setattr(weight_outputs, "fastest", fastest)
