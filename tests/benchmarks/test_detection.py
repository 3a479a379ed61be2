"""Detection scores and areas against exact answers."""

import math

import pytest
import torch

from bayesguard.benchmarks.detection import detection, scores
from bayesguard.errors import BadInput
from bayesguard.predictive import Predictive


def test_scores_by_hand() -> None:
    pred = Predictive.from_probs(torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.3, 0.3]]))
    found = scores(pred)  # type: ignore[arg-type]
    assert list(found) == ["max_probability", "entropy"]
    assert torch.allclose(found["max_probability"].exp(), torch.tensor([0.3, 0.6], dtype=torch.float64), atol=1e-6)
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert float(found["entropy"][0]) == pytest.approx(entropy, abs=1e-5)


def test_probabilities_near_one_are_told_apart() -> None:
    pred = Predictive.from_logits(torch.tensor([[40.0, 0.0], [30.0, 0.0], [3e8, 0.0]]))
    inner, outer, certain = scores(pred)["max_probability"]  # type: ignore[arg-type]
    assert certain < inner < outer
    assert bool(torch.isfinite(certain))


def test_mixtures_have_their_mutual_information() -> None:
    draws = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.1, 0.9], [0.5, 0.5]]])
    found = scores(Predictive.from_probs(draws, draws=True))  # type: ignore[arg-type]
    expected = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    assert found["mutual_information"].tolist() == pytest.approx([expected, 0.0], abs=1e-5)


def test_areas_by_hand() -> None:
    inside = {"entropy": torch.tensor([0.1, 0.2, 0.4])}
    found = detection(inside, {"entropy": torch.tensor([0.3])})["entropy"]
    assert found["auroc"] == pytest.approx(2 / 3)
    assert found["aupr_out"] == pytest.approx(0.5)
    assert found["aupr_in"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert found["fpr95"] == 1.0


def test_the_error_of_an_area_is_that_over_rows_of_both_sets() -> None:
    """Against the spread of the area over many samples from two normal distributions."""
    generator = torch.Generator().manual_seed(0)
    inner, outer = (torch.randn(600, size, generator=generator, dtype=torch.float64) for size in (80, 50))
    found = [detection({"s": inside}, {"s": outside + 1})["s"] for inside, outside in zip(inner, outer, strict=True)]
    areas, errors = (torch.tensor([one[name] for one in found]) for name in ("auroc", "auroc_error"))
    # A standard deviation of 600 values has a relative error of 1 / sqrt(1200) = 0.029.
    assert float(errors.mean()) == pytest.approx(float(areas.std()), rel=0.1)
    # The twin: as if only one of the two sets were drawn.
    assert float(errors.mean()) != pytest.approx(float(areas.std()) / 2**0.5, rel=0.1)


def test_different_scores() -> None:
    with pytest.raises(BadInput, match="must be the same"):
        detection({"a": torch.zeros(1)}, {"b": torch.zeros(1)})
