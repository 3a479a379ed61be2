"""Integrals over mixtures that have no closed form: Gauss-Legendre on panels that follow the components."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.polynomial import legendre
from torch import Tensor
from torch.distributions import Distribution

from bayesguard.errors import BadInput
from bayesguard.predictive.components import component_log_prob, gaussian_parts, location_and_scale

_NODES = 8
_CUTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # in widths of a component, to both sides
_DOUBLINGS = 40  # of the outermost panels, for tails that fall like a power
# Tried in turn: the number of cuts, and how many of the doublings are made around every component, not only the outermost.
_LADDER = ((128, 0), (512, 0), (2048, 0), (1 << 30, 4), (1 << 30, _DOUBLINGS))
_TOLERANCE = 1e-8
_TOO_HEAVY = (
    "the predictive cannot be integrated: its tails are too heavy (Student's t needs about one degree of freedom) "
    "or its density is not smooth"
)

Array = npt.NDArray[np.float64]


class Panels(NamedTuple):
    """A mixture's density on P panels of Q nodes for every element."""

    cuts: Tensor  # [P + 1, N, ...]
    half_widths: Tensor  # [P, N, ...]
    density: Tensor  # [P, Q, N, ...]


def mixture_log_prob(component: Distribution, weights: Tensor, points: Tensor) -> Tensor:
    """Return the log-density of the mixture at points `[Q, N, ...]`, any number of them for every element."""
    share = weights.log().reshape(-1, *[1] * (points.dim() - 1))
    return (component_log_prob(component, points.unsqueeze(1)) + share).logsumexp(1)


def quadrature_crps(component: Distribution, weights: Tensor, value: Tensor) -> Tensor:
    """Return the integral of (F(x) - 1{x >= y})^2, with F integrated from the density along the panels."""
    panels = _panels(component, weights, value)
    _, gauss, running = (value.new_tensor(table) for table in _rule())
    half = panels.half_widths.unsqueeze(1)
    inside = torch.einsum("ij,pj...->pi...", running, panels.density) * half
    mass = torch.einsum("i,pi...->p...", gauss, panels.density) * panels.half_widths
    # Each tail is summed from its own end: one minus the other would be lost on the wide panels.
    below = (mass.cumsum(0) - mass).unsqueeze(1) + inside
    above = mass.flip(0).cumsum(0).flip(0).unsqueeze(1) - inside
    left = (panels.cuts[1:] <= value).unsqueeze(1)
    scores = torch.einsum("i,pi...->p...", gauss, torch.where(left, below, above).square()) * half.squeeze(1)
    total = scores.sum(0)
    outermost = torch.where(left[0, 0], scores[0], 0.0) + torch.where(left[-1, 0], 0.0, scores[-1])
    if (outermost > _TOLERANCE * total).any():  # the tails go on beyond the panels
        raise BadInput(_TOO_HEAVY)
    return total


def quadrature_entropy(component: Distribution, weights: Tensor) -> Tensor:
    """Return the differential entropy of the mixture, in nats."""
    panels = _panels(component, weights, None)
    gauss = panels.density.new_tensor(_rule()[1])
    inner = torch.einsum("i,pi...->p...", gauss, torch.special.entr(panels.density))
    return (inner * panels.half_widths).sum(0)


def _panels(component: Distribution, weights: Tensor, value: Tensor | None) -> Panels:
    """Panels fine enough that the density integrates to one; few at first, since draws usually overlap."""
    for limit, doublings in _LADDER:
        panels = _evaluate(component, weights, _thinned(_all_cuts(component, doublings), limit), value)
        gauss = panels.density.new_tensor(_rule()[1])
        mass = (torch.einsum("i,pi...->p...", gauss, panels.density) * panels.half_widths).sum(0)
        if ((mass - 1).abs() < _TOLERANCE).all():
            return panels
    raise BadInput(_TOO_HEAVY)


def _all_cuts(component: Distribution, doublings: int) -> Tensor:
    """Sorted points around every component of the mixture, `[P, N, ...]`."""
    centre, width = location_and_scale(component)
    if centre.dim() > len(component.batch_shape):
        centre, width = (part.movedim(-1, 1).flatten(0, 1) for part in (centre, width))
    cuts = [*_CUTS, *(_CUTS[-1] * 2.0**power for power in range(1, doublings + 1))]
    steps = centre.new_tensor([*(-cut for cut in cuts[:0:-1]), *cuts]).reshape(-1, 1, *[1] * (centre.dim() - 1))
    return (centre + steps * width).flatten(0, 1).sort(0).values


def _thinned(points: Tensor, limit: int) -> Tensor:
    if points.shape[0] <= limit:
        return points
    picked = torch.linspace(0, points.shape[0] - 1, limit, dtype=torch.float64, device=points.device)
    return points[picked.round().long()]


def _evaluate(component: Distribution, weights: Tensor, points: Tensor, value: Tensor | None) -> Panels:
    cuts = [points]
    if gaussian_parts(component, weights) is None:
        reach = (points[-1:] - points[:1]) * torch.exp2(
            torch.arange(_DOUBLINGS, dtype=points.dtype, device=points.device)
        ).reshape(-1, *[1] * (points.dim() - 1))
        cuts += [points[:1] - reach, points[-1:] + reach]
    edges = torch.cat(cuts if value is None else [*cuts, value.unsqueeze(0)]).sort(0).values
    half = (edges[1:] - edges[:-1]) / 2
    nodes = points.new_tensor(_rule()[0]).reshape(1, -1, *[1] * (points.dim() - 1))
    places = (edges[:-1] + half).unsqueeze(1) + half.unsqueeze(1) * nodes
    density = mixture_log_prob(component, weights, places.flatten(0, 1)).exp().reshape(places.shape)
    return Panels(edges, half, density)


@lru_cache(maxsize=1)
def _rule() -> tuple[Array, Array, Array]:
    """Nodes and weights on [-1, 1], and the matrix that integrates from -1 to every node."""
    nodes, weights = legendre.leggauss(_NODES)
    degrees = np.arange(_NODES)
    basis = legendre.legvander(nodes, _NODES)
    primitive = np.concatenate([nodes[:, None] + 1, (basis[:, 2:] - basis[:, :-2]) / (2 * degrees[1:] + 1)], axis=1)
    expansion = (basis[:, :-1] * weights[:, None]).T * ((2 * degrees + 1) / 2)[:, None]
    return nodes, weights, primitive @ expansion
