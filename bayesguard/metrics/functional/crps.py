"""The continuous ranked probability score of every example."""

import torch
from torch import Tensor

from bayesguard.checks import check_finite, check_shape
from bayesguard.predictive import Predictive, SamplePredictive
from bayesguard.predictive.numerics import CACHED, as_given


def crps_of(pred: Predictive, targets: object) -> Tensor:
    """Return the CRPS of every target, float64 of the batch shape; of samples, the fair estimate.

    Raises:
        BadInput: Targets of another shape, NaN or infinity, one sample only.

    References:
        C. Ferro (2014). Fair scores for ensemble forecasts. QJRMS, equation 3.

    Examples:
        >>> crps_of(Predictive.from_samples([[1.0], [2.0], [6.0]]), torch.tensor([3.0]))
        tensor([0.3333], dtype=torch.float64)
    """
    if not isinstance(pred, SamplePredictive) or not _plain(pred):
        return pred.crps(targets).double()
    truth = as_given(targets, "value").detach().to(pred.device)
    check_shape(truth, pred.batch_shape, "value")
    check_finite(truth, "value")
    return _fair(pred.samples, truth)


def _plain(pred: SamplePredictive) -> bool:
    # Samples of one weight need no order of their weights, and values alone sort ten times as fast as with it.
    alike = pred.num_samples > 1 and bool((pred.weights == pred.weights[0]).all())
    return alike and pred.device.type == "cpu" and not pred.samples.requires_grad


def _fair(samples: Tensor, targets: Tensor) -> Tensor:
    """Return mean |x - y| less half the mean distance of two different samples, by sorting: O(S log S)."""
    count = len(samples)
    columns, truth = samples.reshape(count, -1), targets.double().flatten()
    # The sum over i < j of |x_i - x_j| is that of (2 i + 1 - S) x_(i), i = 0..S-1.
    places = (2 * torch.arange(count, dtype=torch.float64, device="cpu") + 1 - count) / (count * (count - 1))
    step = max(1, CACHED // count)
    scores = []
    for start in range(0, columns.shape[1], step):
        ordered = columns[:, start : start + step].t().clone(memory_format=torch.contiguous_format)
        ordered.numpy().sort(-1)  # NumPy sorts with the vector unit
        # Centred at the target: sums of large numbers would lose digits.
        centred = ordered.double() - truth[start : start + step].unsqueeze(-1)
        scores.append(centred.abs().mean(-1) - centred @ places)
    return torch.cat(scores).reshape(targets.shape) if scores else truth.reshape(targets.shape)
