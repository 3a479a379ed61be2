"""Estimators of the expected log-likelihood under independent Gaussian weights, as interceptions of layers' calls.

All of them have the same expectation and differ in variance. Whatever call they do not know gets the shared sample.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.sampling.random_weights import Handler, RandomWeights

Estimator = Literal["shared", "local_reparameterisation", "flipout"]


class Moments(NamedTuple):
    """Mean and standard deviation of one parameter."""

    mean: Tensor
    stddev: Tensor


def random_weights(
    estimator: Estimator, samples: Mapping[int, Tensor], moments: Mapping[int, Moments] | None = None
) -> RandomWeights:
    """Return the mode under which a network gives one estimate.

    Args:
        estimator: "shared": one sample of the weights for all examples. "local_reparameterisation": outputs of dense and
            convolutional layers are sampled, each example by itself. "flipout": the sample's deviation from the mean gets
            signs of each example's own.
        samples: A sample for each `id(parameter)`; what the estimator does not cover uses it.
        moments: Means and standard deviations by `id(parameter)`; needed by all estimators but "shared".
    """
    if estimator == "shared":
        return RandomWeights(samples)
    make = _local if estimator == "local_reparameterisation" else _flipout
    return RandomWeights(samples, {func: make(samples, moments or {}) for func in LAYERS})


def check_estimator(estimator: object) -> Estimator:
    """Return the estimator, or raise BadInput."""
    if estimator not in get_args(Estimator):
        raise BadInput(f"estimator must be one of {', '.join(map(repr, get_args(Estimator)))}, got {estimator!r}")
    return estimator  # type: ignore[return-value]


LAYERS: dict[Callable[..., Any], int] = {  # and the axes that a unit's output has behind its channels
    F.linear: 0,
    F.conv1d: 1,
    F.conv2d: 2,
    F.conv3d: 3,
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 2,
    F.conv_transpose3d: 3,
}


def layer_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, Any, Any]:
    """Return input, weight, bias and the rest of a layer's call."""
    rest = dict(kwargs)
    named = dict(zip(("input", "weight", "bias"), args, strict=False))
    for name in ("input", "weight", "bias"):
        if name in rest:
            named[name] = rest.pop(name)
    return named["input"], named["weight"], named.get("bias"), args[3:], rest


def _local(samples: Mapping[int, Tensor], moments: Mapping[int, Moments]) -> Handler:
    """Kingma, Salimans, Welling, 2015, NeurIPS, eq. 6: the outputs of a layer are Gaussian, and independent."""

    def handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias, more, rest = layer_arguments(args, kwargs)
        own, shift = moments.get(id(weight)), moments.get(id(bias))
        if own is None and shift is None:
            return NotImplemented
        mean = func(x, _mean(own, weight), _mean(shift, bias), *more, **rest)
        if own is None:
            own = Moments(weight, torch.zeros_like(weight))
        spread = None if shift is None else shift.stddev.square()
        variance = func(x.square(), own.stddev.square(), spread, *more, **rest)
        # The derivative of a root at 0, where an input is all zeros, would be infinite.
        return mean + variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt() * torch.randn_like(mean)

    return handler


def _flipout(samples: Mapping[int, Tensor], moments: Mapping[int, Moments]) -> Handler:
    """Wen, Vicol, Ba, Tran, Grosse, 2018, ICLR, eq. 3 and 4; the bias is shared."""

    def handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias, more, rest = layer_arguments(args, kwargs)
        if id(weight) not in moments:
            return NotImplemented
        axes = LAYERS[func]
        if x.dim() < 2 + axes:  # One example without an axis: there is nothing to flip apart.
            return NotImplemented
        deviation = samples[id(weight)] - moments[id(weight)].mean
        mean = func(x, moments[id(weight)].mean, samples.get(id(bias), bias), *more, **rest)
        # Signs have an axis for every example (and every position of a dense layer), and none for pixels.
        inner = (1,) * axes
        shape = x.shape[: x.dim() - axes]
        signed = x * _signs(x, (*shape, *inner))
        flipped = func(signed, deviation, None, *more, **rest)
        return mean + flipped * _signs(flipped, (*flipped.shape[: flipped.dim() - axes], *inner))

    return handler


def _mean(moments: Moments | None, own: Tensor | None) -> Tensor | None:
    return own if moments is None else moments.mean


def _signs(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(0.5).mul_(2).sub_(1)
