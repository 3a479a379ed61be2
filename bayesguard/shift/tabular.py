"""Noise on the features of a table, in units that the user gives."""

import torch
from torch import Tensor

from bayesguard.checks import as_tensor, check_finite, check_shape
from bayesguard.errors import BadInput, BadType
from bayesguard.shift.base import Shift, check_severity

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # standard deviation of the noise in units of `scale`, severities 1 to 5


class FeatureNoise(Shift):
    """Independent Gaussian noise on every feature, in units of the feature's own scale.

    Severities 1 to 5 are noise of 0.1, 0.25, 0.5, 0.75 and 1 times `scale`. The scale comes from the user,
    from the training data: one computed from the shifted batch would differ from batch to batch. There is no
    published table; these shares are this library's own.

    Args:
        severity: 1 to 5.
        scale: the standard deviation of each feature over the training data, shaped like a row;
            0 leaves a feature (a category, an identifier) as it is.
        seed: of the default generator; see `Shift`.

    Raises:
        BadInput: a severity that is not 1 to 5, a scale that is negative or not finite; on a call, features
            that are not finite or whose rows do not have the shape of `scale`.

    Examples:
        >>> import torch
        >>> noisy = FeatureNoise(2, scale=torch.tensor([10.0, 0.0]))(torch.zeros(3, 2))
        >>> noisy[:, 1]
        tensor([0., 0., 0.])
    """

    def __init__(self, severity: int, scale: object, seed: int = 0) -> None:
        level = check_severity(severity)
        self.scale = as_tensor(scale, "scale").detach().clone()
        check_finite(self.scale, "scale")
        if (self.scale < 0).any():
            raise BadInput(f"scale must not be negative, got {self.scale.min().item():g}; pass X_train.std(0)")
        super().__init__("feature_noise", level, seed)

    def __call__(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return noisy features `[N, ...]` of the same shape, dtype and device."""
        features = as_tensor(inputs, "features")
        if not features.is_floating_point():
            raise BadType(f"features must be floating point, got dtype {features.dtype}; convert with .float()")
        check_finite(features, "features")
        check_shape(self.scale, features.shape[1:], "scale")
        stream = self._stream(generator, features.device)
        dtype = torch.promote_types(features.dtype, torch.float32)
        noise = torch.randn(features.shape, generator=stream, device=features.device, dtype=dtype)
        share = SHARES[int(self.severity) - 1]
        return (features.detach() + share * self.scale.to(noise) * noise).to(features.dtype)
