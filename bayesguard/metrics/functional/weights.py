"""How many rows weights are worth."""

from torch import Tensor

from bayesguard.checks import as_tensor
from bayesguard.errors import BadInput
from bayesguard.metrics.functional.inputs import element_weights


def effective_sample_size(weights: object) -> Tensor:
    """Return how many equally weighted rows a weighted mean is worth, (sum of w)² / sum of w²: 1 to N, 0-d float64.

    It hangs on no scale: weights that are all equal are worth N rows. Weights that say how often each row was seen are
    worth more than this if they are independent repetitions.

    Args:
        weights: `[N]`, not negative and not all zero.

    Raises:
        BadInput: Another shape, no weights, NaN, infinity or negative weights (with the row), nothing but zeros.

    References:
        L. Kish (1965). Survey sampling. Wiley, section 11.7.

    Examples:
        >>> round(effective_sample_size([1.0, 1.0, 4.0]).item(), 6)
        2.0
    """
    values = as_tensor(weights, "weights")
    if values.dim() != 1 or not len(values):
        raise BadInput(f"weights has shape {tuple(values.shape)}; one weight for each row, [N], is needed")
    checked = element_weights(values, values, len(values), values.device)
    assert checked is not None
    scaled = checked / checked.max()  # squares neither overflow nor vanish
    return scaled.sum().square() / scaled.square().sum()
