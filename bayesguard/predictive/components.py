"""Torch distributions as components of a mixture: their parameters, their cdf, their samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import (
    Distribution,
    Laplace,
    MixtureSameFamily,
    Normal,
    Poisson,
    StudentT,
    constraints,
)

from bayesguard.checks import bad_row, check_finite
from bayesguard.errors import BadInput, BadType
from bayesguard.looks import holds
from bayesguard.predictive.numerics import wide
from bayesguard.predictive.student import gaussian_cdf, student_cdf, student_log_prob

Map = Callable[[Tensor], Tensor]


def parameters(component: Distribution) -> dict[str, Tensor]:
    """Return the parameters of a distribution by name, each expanded to its batch shape (mixtures: one axis more).

    Raises:
        BadType: The distribution cannot be taken apart.
    """
    if isinstance(component, MixtureSameFamily):
        inner = component.component_distribution
        shape = inner.batch_shape
        named = {f"inner_{name}": value for name, value in parameters(inner).items()}
        return {"logits": component.mixture_distribution.logits.expand(shape), **named}
    names = [name for name in component.arg_constraints if isinstance(component.__dict__.get(name), Tensor)]
    if "logits" in names and "probs" in names:
        names.remove("probs")
    if not names or component.event_shape:
        raise BadType(
            f"{type(component).__name__} cannot be a component: it must be univariate, its parameters attributes; "
            "Normal, Laplace, StudentT, Poisson and MixtureSameFamily of these are known to work"
        )
    return {name: getattr(component, name).expand(component.batch_shape) for name in names}


def rebuild(component: Distribution, values: dict[str, Tensor]) -> Distribution:
    """Return a distribution of the same family with other parameters, named as by `parameters`."""
    if isinstance(component, MixtureSameFamily):
        inner = {name.removeprefix("inner_"): value for name, value in values.items() if name != "logits"}
        mixing = CategoricalDistribution(logits=values["logits"], validate_args=False)
        members = rebuild(component.component_distribution, inner)
        return MixtureSameFamily(mixing, members, validate_args=False)
    family: Callable[..., Distribution] = type(component)
    return family(**values, validate_args=False)


def map_parameters(component: Distribution, change: Map) -> Distribution:
    """Return the same distribution with every parameter changed, as by indexing or conversion."""
    return rebuild(component, {name: change(value) for name, value in parameters(component).items()})


def check_parameters(component: Distribution) -> None:
    """Raise BadInput naming parameter and row where a parameter of `[S, N, ...]` is not finite or not allowed."""
    mixture = isinstance(component, MixtureSameFamily)
    inner = component.component_distribution if isinstance(component, MixtureSameFamily) else component
    for name, value in parameters(component).items():
        check_finite(value, name, allow_negative_infinity=mixture and name == "logits", row_axis=1)
        allowed = inner.arg_constraints.get(name.removeprefix("inner_") if mixture else name)
        if allowed is None or constraints.is_dependent(allowed) or (mixture and name == "logits"):
            continue
        good = allowed.check(value)
        if good.shape == value.shape and not holds(good.all()):
            row = bad_row(~good.movedim(1, 0))
            raise BadInput(f"{name} must satisfy {allowed}, the component of row {row} does not")


def component_log_prob(component: Distribution, value: Tensor) -> Tensor:
    """Return the log-density under every component; `value` broadcasts with the batch shape."""
    if isinstance(component, MixtureSameFamily):
        inner = component_log_prob(component.component_distribution, value.unsqueeze(-1))
        return (component.mixture_distribution.logits + inner).logsumexp(-1)
    if isinstance(component, StudentT):
        z = (value - component.loc) / component.scale
        return student_log_prob(z, component.df) - component.scale.log()
    return component.log_prob(value)


def component_cdf(component: Distribution, value: Tensor) -> Tensor:
    """Return P(Y <= value) under every component; `value` broadcasts with the batch shape."""
    if isinstance(component, MixtureSameFamily):
        inner = component_cdf(component.component_distribution, value.unsqueeze(-1))
        return (component.mixture_distribution.probs * inner).sum(-1)
    if isinstance(component, StudentT):
        return student_cdf((value - component.loc) / component.scale, component.df)
    if isinstance(component, Poisson):
        below = torch.special.gammaincc(value.floor().clamp_min(0) + 1, component.rate)
        return torch.where(value < 0, 0.0, below)
    if isinstance(component, Normal):
        return gaussian_cdf((value - component.loc) / component.scale)
    if isinstance(component, Laplace):
        z = (value - component.loc) / component.scale
        tail = (-z.abs()).exp() / 2
        return torch.where(z > 0, 1 - tail, tail)
    try:
        return component.cdf(value)
    except NotImplementedError:
        raise BadType(
            f"{type(component).__name__} has no cdf, so there are no quantiles, intervals or coverage"
        ) from None


def location_and_scale(component: Distribution) -> tuple[Tensor, Tensor]:
    """Return a centre and a width of every component (and member of a mixture): where its mass is, roughly."""
    if isinstance(component, MixtureSameFamily):
        return location_and_scale(component.component_distribution)
    if hasattr(component, "loc") and hasattr(component, "scale"):
        shape = component.batch_shape
        return component.loc.expand(shape), component.scale.expand(shape)
    return component.mean, component.stddev


def gaussian_parts(component: Distribution, weights: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return weights, means and scales `[R, N, ...]` if the mixture is one of R Gaussians for every element."""
    shape = component.batch_shape
    share = weights.reshape(-1, *[1] * (len(shape) - 1))
    if isinstance(component, Normal):
        return share.expand(shape), component.loc.expand(shape), component.scale.expand(shape)
    if isinstance(component, MixtureSameFamily) and isinstance(component.component_distribution, Normal):
        inner = component.component_distribution
        parts = share.unsqueeze(-1) * component.mixture_distribution.probs, inner.loc, inner.scale
        flat = [part.expand(inner.batch_shape).movedim(-1, 1).flatten(0, 1) for part in parts]
        return flat[0], flat[1], flat[2]
    return None


def sample_component(component: Distribution, generator: torch.Generator | None) -> Tensor:
    """Return one sample of every element, from `generator` or from torch's global one."""
    if generator is None:
        return component.sample()
    shape, device = component.batch_shape, generator.device

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    def gamma(concentration: Tensor) -> Tensor:
        drawn: Tensor = torch._standard_gamma(concentration.expand(shape).contiguous(), generator)
        return drawn.clamp_min(torch.finfo(drawn.dtype).tiny)

    dtype = next(iter(parameters(component).values())).dtype
    if isinstance(component, MixtureSameFamily):
        probs = component.mixture_distribution.probs
        probs = probs.expand(component.component_distribution.batch_shape)
        picked = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
        member = picked.reshape(*probs.shape[:-1], 1)
        chosen = map_parameters(component.component_distribution, lambda p: p.gather(-1, member).squeeze(-1))
        return sample_component(chosen, generator)
    if isinstance(component, Normal):
        return component.loc + component.scale * normal()
    if isinstance(component, StudentT):
        chi2_over_df = 2 * gamma(component.df / 2) / component.df
        return component.loc + component.scale * normal() * chi2_over_df.rsqrt()
    if isinstance(component, Poisson):
        return torch.poisson(component.rate, generator=generator)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device).to(dtype)
    try:
        # 0 would be sent to minus infinity.
        return component.icdf(uniform.clamp(torch.finfo(dtype).tiny, 1 - torch.finfo(dtype).eps))
    except NotImplementedError:
        raise BadType(
            f"{type(component).__name__} cannot be sampled with a seed; leave it out for torch's global generator"
        ) from None


def widened(component: Distribution) -> Distribution:
    """Return the component with float64 parameters."""
    return map_parameters(component, wide)
