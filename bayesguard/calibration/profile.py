"""How far a temperature can be from the best before the data tell them apart: its profile-likelihood interval."""

from __future__ import annotations

import math

from bayesguard.calibration.likelihood import PooledLikelihood

_CHI_SQUARE_95 = 3.841458820694124  # of one degree of freedom
_TRUSTED = 0.05  # of the best 1/T: nearer than this an expansion to third order errs by less than 1e-3 of the step
_CLOSE = (
    1e-3  # of the distance from the best, or from 0: what is left after so small a step of Newton's is about its square
)
_MOST_PASSES = 100


def profile_end(likelihood: PooledLikelihood, best: float, bound: float) -> float:
    """Return the end towards `bound` of the 95 % interval of 1/T around the best: `2 N (NLL(end) - NLL(best)) = 3.84`.

    0 or infinity if the interval reaches the bound. N is the likelihood's `worth`. Of many logits the end comes from the
    derivatives at the minimum, without another pass over them, if it is near enough for that.

    References:
        W. Q. Meeker, L. A. Escobar (1995). Teaching about approximate confidence regions based on maximum likelihood
        estimation. The American Statistician 49.
    """
    rise = _CHI_SQUARE_95 / (2 * likelihood.worth)
    at, trusted = _expected(likelihood, best, bound, rise)
    if trusted:
        return at
    most = likelihood.near(best).nll + rise
    inside, outside = best, bound
    for _ in range(_MOST_PASSES):
        here = likelihood(at)
        gap = here.nll - most
        if gap <= 0 and at == bound:
            break
        inside, outside = (at, outside) if gap <= 0 else (inside, at)
        following = at - gap / here.first if here.first else math.nan
        if not min(inside, outside) <= following <= max(inside, outside):
            # The bound itself is tried first where the likelihood hardly rises towards it.
            following = bound if outside == bound and gap <= 0 else math.sqrt(inside * outside)
        if abs(following - at) <= _CLOSE * min(abs(at - best), at) or abs(inside - outside) < 1e-9 * best:
            return following
        at = following
    return math.inf if bound > 1 else 0.0


def _expected(likelihood: PooledLikelihood, best: float, bound: float, rise: float) -> tuple[float, bool]:
    """Return where the end lies by the derivatives at the best, and whether they are enough to tell."""
    here = likelihood.near(best)
    if not here.second > 0:
        return (1.0 if min(best, bound) < 1 < max(best, bound) else bound), False
    step = math.copysign(math.sqrt(2 * rise / here.second), bound - best)
    bend = step * likelihood.third(best) / (6 * here.second)
    known = abs(bend) < 0.25  # NaN if the likelihood was computed at one place only
    end = best + step * (1 - bend if known else 1)
    end = min(max(end, min(best, bound)), max(best, bound))
    # At a bound of the search the likelihood has a slope, and its derivatives there tell less.
    known = known and end != bound and abs(here.first * step) < 1e-3 * rise
    return end, known and likelihood.many and abs(end - best) < _TRUSTED * best
