"""What classification predictives share: one mixture, however it is asked for."""

import pytest
import torch

from bayesguard.predictive import BernoulliPredictive, CategoricalPredictive


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draws", [1, 7])
def test_probabilities_do_not_depend_on_what_was_asked_before(draws: int, dtype: torch.dtype) -> None:
    """The mixture alone, with its moments, and reduced: the same bits, far down as well."""
    logits = 30 * torch.randn(draws, 5, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    logits[:, 0, 1] = -2000.0
    alone, after = CategoricalPredictive(logits), CategoricalPredictive(logits)
    after.uncertainty()
    for other in (after, alone.reduce()):
        assert torch.equal(alone.logits, other.logits)
        assert torch.equal(alone.probs, other.probs)
    labels = BernoulliPredictive(logits)
    assert torch.equal(labels.probs, labels.reduce().probs)
