"""Integrals over mixtures that have no closed form: Gauss-Legendre on panels that follow the components."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
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
_CUTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)  # in widths of a component, to both sides
_FIRST = (*(0.75 * step for step in range(13)), 11.0, 14.0)
_NEAR = 5  # of them that are cuts around the narrowest components, too
_DOUBLINGS = 40  # of the outermost panels, for tails that fall like a power
# Tried in turn: the number of cuts, and how many of the doublings are made around every component, not only the outermost.
_LADDER = ((128, 0), (512, 0), (2048, 0), (1 << 30, 4), (1 << 30, _DOUBLINGS))
_TOLERANCE = 1e-8
_IN_CACHE = 1 << 16  # elements of an intermediate of several passes
TOO_HEAVY = (
    "the predictive cannot be integrated: its tails are too heavy (Student's t needs about one degree of freedom) "
    "or its density is not smooth"
)

Array = npt.NDArray[np.float64]


class Panels(NamedTuple):
    """A density on P panels of Q nodes for every element, and what can be integrated with it."""

    cuts: Tensor  # [P + 1, N, ...]
    density: Tensor  # [P, Q, N, ...]
    endless: bool  # whether the tails may go on beyond the panels

    @property
    def half_widths(self) -> Tensor:
        """Of the panels, `[P, N, ...]`."""
        return (self.cuts[1:] - self.cuts[:-1]) / 2

    @property
    def nodes(self) -> Tensor:
        """Where the density is known, `[P, Q, N, ...]`."""
        half = self.half_widths.unsqueeze(1)
        return self.cuts[:-1].unsqueeze(1) + half * (1 + _along(_rule().nodes, self.density))

    def integrals(self, values: Tensor) -> Tensor:
        """Return the integrals `[P, N, ...]` over each panel of what is `[P, Q, N, ...]` at the nodes."""
        return torch.einsum("i,pi...->p...", values.new_tensor(_rule().weights), values) * self.half_widths

    def tails(self) -> tuple[Tensor, Tensor]:
        """Return the mass below and above every node, each `[P, Q, N, ...]` and summed from its own end.

        One minus the other would be lost on the wide panels.
        """
        running = self.density.new_tensor(_rule().running)
        inside = torch.einsum("ij,pj...->pi...", running, self.density) * self.half_widths.unsqueeze(1)
        mass = self.integrals(self.density)
        below = (mass.cumsum(0) - mass).unsqueeze(1) + inside
        return below, mass.flip(0).cumsum(0).flip(0).unsqueeze(1) - inside

    def entropy(self) -> Tensor:
        """Return the differential entropy `[N, ...]` in nats."""
        return self.integrals(torch.special.entr(self.density)).sum(0)

    def crps(self, value: Tensor) -> Tensor:
        """Return the integral of (F(x) - 1{x >= y})^2 for targets `[N, ...]` that are among the cuts."""
        left = (self.cuts[1:] <= value).unsqueeze(1)
        scores = self.integrals(torch.where(left, *self.tails()).square())
        total = scores.sum(0)
        ends = torch.where(left[0, 0], scores[0], 0.0) + torch.where(left[-1, 0], 0.0, scores[-1])
        if self.endless and (ends > _TOLERANCE * total).any():
            raise BadInput(TOO_HEAVY)
        return total

    def moments(self, largest_end: float) -> Tensor:
        """Return mean and variance on a last axis; NaN where more than a share of one lies in the outermost panels."""
        # From the middle, not from 0: an error of the mass would move a mean that is far from 0.
        middle = self.cuts[len(self.cuts) // 2]
        offset = self.nodes - middle
        shift = self.integrals(offset * self.density).sum(0)
        parts = [self.integrals(each * self.density) for each in (offset.abs(), (offset - shift).square())]
        moments = torch.stack([middle + shift, parts[1].sum(0)], -1)
        ends = torch.stack([part[0] + part[-1] - largest_end * part.sum(0) for part in parts], -1)
        return moments.masked_fill(ends > 0, torch.nan) if self.endless else moments

    def quantiles(self, levels: Tensor) -> Tensor:
        """Return points `[J, N, ...]` near the quantiles at levels `[J]`, to about 1e-5 of a width.

        By cubic interpolation of the nodes as a function of the logit of the mass below, which is nearly straight in tails.
        """
        tiny = torch.finfo(levels.dtype).tiny
        below, above = (mass.clamp_min(tiny).flatten(0, 1) for mass in self.tails())
        nodes, logits = self.nodes.flatten(0, 1), below.log() - above.log()
        rises = below * above / self.density.clamp_min(tiny).flatten(0, 1)  # of the nodes, for one of the logit
        wanted = _along(levels.logit(), nodes[:, None]).squeeze(0).expand(-1, *nodes.shape[1:])
        place = _searched(logits, wanted).clamp(1, len(nodes) - 1)
        (x0, t0, m0), (x1, t1, m1) = (
            [each.gather(0, at) for each in (nodes, logits, rises)] for at in (place - 1, place)
        )
        gap, rise = (t1 - t0).clamp_min(tiny), x1 - x0
        share = ((wanted - t0) / gap).clamp(0, 1)
        # The cubic is monotone where no slope is above that of three chords (Fritsch and Carlson, 1980, SIAM JNA 17).
        m0, m1 = (torch.minimum(slope * gap, 3 * rise) for slope in (m0, m1))
        bend = share * (1 - share) * ((1 - share) * m0 - share * m1)
        return x0 + share.square() * (3 - 2 * share) * rise + bend

    def places_among(self, points: Tensor) -> Tensor:
        """Return how many of ascending points `[J, N, ...]`, at which panels end, lie left of each, `[P, N, ...]`."""
        return _searched(points, (self.cuts[1:] + self.cuts[:-1]) / 2)

    def split(self, points: Tensor) -> Panels:
        """Return the panels cut at further points `[J, N, ...]` between the outermost cuts.

        The density is interpolated by polynomials of degree 7, of the ratio to an exponential function on each panel: so
        its relative error is as small where it falls by many orders of magnitude as in the middle.
        """
        tiny = torch.finfo(self.density.dtype).tiny
        rule = _rule()
        cuts = torch.cat([self.cuts, points]).sort(0).values
        middles = (cuts[1:] + cuts[:-1]) / 2
        place = (_searched(self.cuts, middles) - 1).clamp(0, len(self.density) - 1)
        half = self.half_widths.clamp_min(tiny)
        ends = self.density[:, [0, -1]].clamp_min(tiny).log()
        falls = (ends[:, :1] - ends[:, 1:]) / (rule.nodes[-1] - rule.nodes[0])
        ratio = self.density * (falls * _along(rule.nodes, self.density)).exp()
        powers = torch.einsum("kq,pq...->kp...", ratio.new_tensor(rule.powers), ratio)
        # The new nodes, where the old panel goes from -1 to 1.
        width = half.gather(0, place)
        centre = (middles - ((self.cuts[1:] + self.cuts[:-1]) / 2).gather(0, place)) / width
        reach = (cuts[1:] - cuts[:-1]) / 2 / width
        local = centre.unsqueeze(1) + reach.unsqueeze(1) * _along(rule.nodes, self.density)
        density = torch.zeros_like(local)
        for power in powers.flip(0):
            density = torch.addcmul(power.gather(0, place).unsqueeze(1), density, local)
        falls = falls.squeeze(1).gather(0, place).unsqueeze(1)
        # Where the density is nothing next to its neighbours, a polynomial may fall below it.
        return Panels(cuts, density.clamp_min(0) * (-falls * local).exp(), self.endless)


def panels_of(
    component: Distribution, weights: Tensor, value: Tensor | None = None, *, lifted: bool = False
) -> Iterator[Panels]:
    """Yield panels on which the mixture's density integrates to one, ever finer, with a cut at `value` `[N, ...]`.

    Args:
        component: The components of the mixture, draws first.
        weights: Theirs, `[S]`.
        value: A further cut for every element.
        lifted: What is far out in the tails counts as well. The first panels are then fewer than usual, and it is for the
            caller to tell whether they will do.

    Raises:
        BadInput: There are no finer ones.
    """
    far = [_first_cuts(component)] if lifted else []
    several = (torch.cat([_thinned(_all_cuts(component, doublings), limit), *far]) for limit, doublings in _LADDER)
    for cuts in itertools.chain(far, several):
        panels = _evaluate(component, weights, cuts, value)
        if ((panels.integrals(panels.density).sum(0) - 1).abs() < _TOLERANCE).all():
            yield panels
    raise BadInput(TOO_HEAVY)


def mixture_log_prob(component: Distribution, weights: Tensor, points: Tensor) -> Tensor:
    """Return the log-density of the mixture at points `[Q, N, ...]`, any number of them for every element."""
    return (component_log_prob(component, points.unsqueeze(1)) + _along(weights.log(), points[:, None])).logsumexp(1)


def quadrature_crps(component: Distribution, weights: Tensor, value: Tensor) -> Tensor:
    """Return the integral of (F(x) - 1{x >= y})^2, with F integrated from the density along the panels."""
    return next(panels_of(component, weights, value)).crps(value)


def quadrature_entropy(component: Distribution, weights: Tensor) -> Tensor:
    """Return the differential entropy of the mixture, in nats."""
    return next(panels_of(component, weights)).entropy()


def _density(component: Distribution, weights: Tensor, points: Tensor) -> Tensor:
    parts = gaussian_parts(component, weights)
    if parts is None:
        return mixture_log_prob(component, weights, points).exp()
    share, loc, scale = parts
    rate = math.sqrt(0.5) / scale
    height = share * rate / math.sqrt(math.pi)
    pieces = points.unsqueeze(1).split(max(1, _IN_CACHE // max(1, loc.numel())))
    return torch.cat([((-((some - loc) * rate).square()).exp() * height).sum(1) for some in pieces])


def _first_cuts(component: Distribution) -> Tensor:
    """Points around the widest components in the tails, in the middle around the narrowest as well."""
    cuts = _cuts(component, _FIRST)
    lowest, highest, zero = cuts.amin(0), cuts.amax(0), len(_FIRST) - 1
    parts = [lowest[: zero + 1], highest[zero:]]
    if len(cuts) > 1:
        parts += [highest[zero - _NEAR : zero], lowest[zero + 1 : zero + 1 + _NEAR]]
    return torch.cat(parts)


def _all_cuts(component: Distribution, doublings: int) -> Tensor:
    """Sorted points around every component of the mixture, `[P, N, ...]`."""
    steps = [*_CUTS, *(_CUTS[-1] * 2.0**power for power in range(1, doublings + 1))]
    return _cuts(component, steps).flatten(0, 1).sort(0).values


def _cuts(component: Distribution, steps: Sequence[float]) -> Tensor:
    """Points `[R, P, N, ...]` around each of R components, at these distances in widths to both sides."""
    centre, width = location_and_scale(component)
    if centre.dim() > len(component.batch_shape):
        centre, width = (part.movedim(-1, 1).flatten(0, 1) for part in (centre, width))
    sides = [*(-step for step in steps[:0:-1]), *steps]
    return centre.unsqueeze(1) + _along(sides, centre.unsqueeze(1)) * width.unsqueeze(1)


def _thinned(points: Tensor, limit: int) -> Tensor:
    if points.shape[0] <= limit:
        return points
    picked = torch.linspace(0, points.shape[0] - 1, limit, dtype=torch.float64, device=points.device)
    return points[picked.round().long()]


def _evaluate(component: Distribution, weights: Tensor, points: Tensor, value: Tensor | None) -> Panels:
    endless = gaussian_parts(component, weights) is None
    if endless:
        lowest, highest = points.amin(0, keepdim=True), points.amax(0, keepdim=True)
        reach = (highest - lowest) * _along([2.0**power for power in range(_DOUBLINGS)], points[None])[0]
        points = torch.cat([lowest - reach, points, highest + reach])
    edges = (points if value is None else torch.cat([points, value.unsqueeze(0)])).sort(0).values
    nodes = Panels(edges, edges.new_empty(0, 0, *edges.shape[1:]), endless).nodes
    density = _density(component, weights, nodes.flatten(0, 1)).reshape(nodes.shape)
    return Panels(edges, density, endless)


def _along(values: object, like: Tensor) -> Tensor:
    """Numbers along the second axis of a tensor, `[1, Q, 1, ...]`."""
    return torch.as_tensor(values, dtype=like.dtype, device=like.device).reshape(1, -1, *[1] * (like.dim() - 2))


def _searched(table: Tensor, wanted: Tensor) -> Tensor:
    """How many of the ascending `[P, N, ...]` are at or below each of `[J, N, ...]`."""
    last = (each.detach().movedim(0, -1).contiguous() for each in (table, wanted))
    return torch.searchsorted(*last, right=True).movedim(-1, 0)


class _Rule(NamedTuple):
    nodes: Array  # on [-1, 1]
    weights: Array
    running: Array  # integrates from -1 to every node
    powers: Array  # the polynomial through the nodes, by powers from 0


@lru_cache(maxsize=1)
def _rule() -> _Rule:
    nodes, weights = legendre.leggauss(_NODES)
    degrees = np.arange(_NODES)
    basis = legendre.legvander(nodes, _NODES)
    primitive = np.concatenate([nodes[:, None] + 1, (basis[:, 2:] - basis[:, :-2]) / (2 * degrees[1:] + 1)], axis=1)
    expansion = (basis[:, :-1] * weights[:, None]).T * ((2 * degrees + 1) / 2)[:, None]
    powers: Array = np.linalg.inv(np.vander(nodes, increasing=True)).astype(np.float64)
    return _Rule(nodes, weights, primitive @ expansion, powers)
