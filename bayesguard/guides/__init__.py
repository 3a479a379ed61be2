"""Approximate posteriors of weights: the families that variational inference and the Bayesian layers choose from."""

from collections.abc import Callable
from typing import Any

from bayesguard.errors import BadInput
from bayesguard.guides.base import Guide as Guide
from bayesguard.guides.correlated import FullNormal as FullNormal
from bayesguard.guides.correlated import LowRankNormal as LowRankNormal
from bayesguard.guides.correlated import MatrixNormal as MatrixNormal
from bayesguard.guides.flow import InverseAutoregressive as InverseAutoregressive
from bayesguard.guides.mean_field import Delta as Delta
from bayesguard.guides.mean_field import MeanFieldNormal as MeanFieldNormal
from bayesguard.guides.mean_field import Radial as Radial
from bayesguard.weights import Weights

# By the names that users type.
FAMILIES: dict[str, Callable[..., Guide]] = {
    "normal": MeanFieldNormal,
    "low_rank": LowRankNormal,
    "full": FullNormal,
    "radial": Radial,
    "matrix_normal": MatrixNormal,
    "flow": InverseAutoregressive,
    "delta": Delta,
}


def make_guide(family: str | Callable[[Weights], Guide], weights: Weights, **settings: Any) -> Guide:
    """Return a guide over the weights, by the name of its family or from a factory `weights -> Guide`.

    Raises:
        BadInput: A name that is not known, or a factory of something else.
    """
    if isinstance(family, str):
        if family not in FAMILIES:
            raise BadInput(f"guide must be one of {', '.join(map(repr, FAMILIES))} or a factory, got {family!r}")
        return FAMILIES[family](weights, **(settings if family != "delta" else {}))
    guide = family(weights, **settings)
    if not isinstance(guide, Guide):
        raise BadInput(f"guide must make a bayesguard.guides.Guide from the weights, it made a {type(guide).__name__}")
    return guide
