"""Gaussians with correlated weights: low rank plus diagonal, full covariance, matrix normal."""

import torch
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal

from bayesguard.checks import check_count
from bayesguard.errors import BadInput
from bayesguard.guides.base import LOG_2_PI, Guide, log_initial_scales
from bayesguard.weights import Weights

# A covariance of more weights than this takes more memory than any network that it could be for.
_MAX_FULL = 10_000


class LowRankNormal(Guide):
    """A Gaussian with covariance D (I + F F^T) D, D diagonal (Ong, Nott, Smith, 2018, JCGS, section 3).

    Args:
        weights: The parameters, P numbers.
        rank: Columns of F `[P, rank]`.
        init_scale: First standard deviation of every weight.
        relative: `init_scale` is a share of each weight's size instead.
    """

    is_odd = True

    def __init__(self, weights: Weights, rank: int = 10, init_scale: float = 0.01, *, relative: bool = False) -> None:
        super().__init__(weights)
        rank = min(check_count(rank, "rank"), weights.size)
        log_scale = log_initial_scales(weights, init_scale, relative)
        self.log_scale = nn.Parameter(log_scale)
        # Columns that start at zero would all have the same gradient of zero, and stay there.
        start = torch.randn(weights.size, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        # In units of the row's scale, so that steps of one size suit it and `log_scale`.
        self.factor = nn.Parameter(0.1 * start.to(log_scale) / rank**0.5)

    @property
    def noise_size(self) -> int:
        return self.weights.size + self.factor.shape[1]

    def perturb(self, noise: Tensor) -> Tensor:
        return self.log_scale.exp() * (noise[: self.weights.size] + self.factor @ noise[self.weights.size :])

    def distribution(self) -> LowRankMultivariateNormal:
        """Return the distribution of all weights as one vector `[P]`."""
        factor = self.log_scale.exp().unsqueeze(-1) * self.factor
        diagonal = (2 * self.log_scale).exp()
        return LowRankMultivariateNormal(self.weights.flatten(), factor, diagonal, validate_args=False)

    def entropy(self) -> Tensor:
        return self.distribution().entropy()

    def variance(self) -> Tensor:
        return (2 * self.log_scale).exp() * (1 + self.factor.square().sum(-1))


class FullNormal(Guide):
    """A Gaussian with a covariance of its own for every pair of weights, for small networks and last layers.

    Args:
        weights: The parameters, at most 10,000 numbers.
        init_scale: First standard deviation of every weight.
        relative: `init_scale` is a share of each weight's size instead.
    """

    is_odd = True

    def __init__(self, weights: Weights, init_scale: float = 0.01, *, relative: bool = False) -> None:
        super().__init__(weights)
        if weights.size > _MAX_FULL:
            raise BadInput(
                f'guide="full" is over {weights.size:,} weights, whose covariance has {weights.size**2:,} numbers; use '
                f'subset_of_weights="last_layer", guide="low_rank", or at most {_MAX_FULL:,} weights'
            )
        self.log_scale = nn.Parameter(log_initial_scales(weights, init_scale, relative))
        # Below the diagonal, in units of the row's scale, row by row.
        self.lower = nn.Parameter(self.log_scale.new_zeros(weights.size * (weights.size - 1) // 2).detach())

    def _factor(self) -> Tensor:
        size = self.weights.size
        rows, columns = torch.tril_indices(size, size, -1, device=self.lower.device)
        unit = torch.eye(size, dtype=self.lower.dtype, device=self.lower.device)
        return self.log_scale.exp().unsqueeze(-1) * unit.index_put((rows, columns), self.lower)

    def perturb(self, noise: Tensor) -> Tensor:
        return self._factor() @ noise

    def covariance(self) -> Tensor:
        """Return the covariance matrix `[P, P]`."""
        factor = self._factor()
        return factor @ factor.T

    def entropy(self) -> Tensor:
        return self.log_scale.sum() + self.weights.size * (LOG_2_PI + 1) / 2

    def variance(self) -> Tensor:
        return self._factor().square().sum(-1)


class MatrixNormal(Guide):
    """For each matrix a covariance of its rows and one of its columns (Louizos, Welling, 2016, ICML, eq. 3).

    Tensors of more axes are matrices of shape `[first, rest]`; vectors have independent Gaussians.
    """

    is_odd = True

    def __init__(self, weights: Weights, init_scale: float = 0.01, *, relative: bool = False) -> None:
        super().__init__(weights)
        parts = log_initial_scales(weights, init_scale, relative)
        # Scales of rows and of columns multiply: each has half of the logarithm.
        self.log_scales = nn.ParameterList()
        self.lowers = nn.ParameterList()
        for own in weights.split(parts):
            matrix = own.reshape(len(own), -1) if own.dim() > 1 else own.reshape(-1, 1)
            sides = [matrix.mean(1) / 2, matrix.mean(0) / 2] if own.dim() > 1 else [own.reshape(-1)]
            for side in sides:
                self.log_scales.append(nn.Parameter(side.clone()))
                if own.dim() > 1:
                    self.lowers.append(nn.Parameter(side.new_zeros(len(side) * (len(side) - 1) // 2)))

    def _factors(self) -> list[tuple[Tensor, ...]]:
        """For each tensor the two triangular factors, or the scales of a vector."""
        scales, lowers, factors = iter(self.log_scales), iter(self.lowers), []
        for tensor in self.weights.tensors():
            if tensor.dim() > 1:
                factors.append(tuple(_triangle(next(scales), next(lowers)) for _ in range(2)))
            else:
                factors.append((next(scales).exp(),))
        return factors

    def perturb(self, noise: Tensor) -> Tensor:
        parts = []
        for own, factors in zip(self.weights.split(noise), self._factors(), strict=True):
            if len(factors) == 1:
                parts.append(factors[0] * own.reshape(-1))
            else:
                parts.append((factors[0] @ own.reshape(len(own), -1) @ factors[1].T).reshape(-1))
        return torch.cat(parts)

    def entropy(self) -> Tensor:
        total, scales = self.log_scales[0].new_zeros(()), iter(self.log_scales)
        for tensor in self.weights.tensors():
            if tensor.dim() > 1:
                rows, columns = next(scales), next(scales)
                total = total + len(columns) * rows.sum() + len(rows) * columns.sum()
            else:
                total = total + next(scales).sum()
        return total + self.weights.size * (LOG_2_PI + 1) / 2

    def variance(self) -> Tensor:
        parts = []
        for factors in self._factors():
            if len(factors) == 1:
                parts.append(factors[0].square())
            else:
                rows, columns = (factor.square().sum(-1) for factor in factors)
                parts.append((rows.unsqueeze(-1) * columns).reshape(-1))
        return torch.cat(parts)


def _triangle(log_scale: Tensor, lower: Tensor) -> Tensor:
    size = len(log_scale)
    rows, columns = torch.tril_indices(size, size, -1, device=lower.device)
    unit = torch.eye(size, dtype=lower.dtype, device=lower.device)
    return log_scale.exp().unsqueeze(-1) * unit.index_put((rows, columns), lower)
