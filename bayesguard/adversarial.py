"""Adversarial examples: the fast gradient sign method, also as a smoother of training, and projected gradient descent."""

from collections.abc import Callable

import torch
from torch import Tensor

from bayesguard.checks import check_count
from bayesguard.data import Batch, with_copies
from bayesguard.errors import BadInput
from bayesguard.sampling import stream


def fgsm(loss: Callable[[Batch], Tensor], batch: Batch, epsilon: float | Tensor) -> Batch:
    """Return the batch with its inputs one step up the loss: x' = x + epsilon * sign(d loss / d x).

    Args:
        loss: Objective of a batch.
        batch: Positional inputs that are floating tensors `[N, ...]` are moved; nothing else is.
        epsilon: Size of the step in the input's unit, at least 0: a number, or a tensor that broadcasts
            against the inputs, such as 0.01 of each feature's range, as in the second paper.

    Raises:
        BadInput: If no positional input is floating, or epsilon is negative or of another shape.

    References:
        I. Goodfellow, J. Shlens and C. Szegedy (2015). Explaining and harnessing adversarial examples. ICLR.
        B. Lakshminarayanan, A. Pritzel and C. Blundell (2017). Simple and scalable predictive uncertainty
        estimation using deep ensembles. NeurIPS, section 2.3.

    Examples:
        >>> batch = Batch((torch.tensor([[1.0, -2.0]]),), {}, torch.zeros(1))
        >>> fgsm(lambda b: b.inputs[0].square().sum(), batch, 0.5).inputs[0]
        tensor([[ 1.5000, -2.5000]])
    """
    watched = _watched(batch)
    with torch.enable_grad():
        # Copies: a network may write over its inputs, of which the gradient is wanted.
        return _stepped(watched, loss(with_copies(watched)), epsilon)


def pgd(
    loss: Callable[[Batch], Tensor],
    batch: Batch,
    epsilon: float | Tensor,
    *,
    steps: int = 20,
    step_size: float | Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    random_start: bool = True,
    seed: int = 0,
) -> Batch:
    """Return the batch with its inputs at a high loss within `epsilon` of where they are, in the largest coordinate.

    From a random point of that cube, each step goes along the sign of the gradient and back into the cube.

    Args:
        loss: Objective of a batch.
        batch: Positional inputs that are floating tensors `[N, ...]` are moved; nothing else is.
        epsilon: Radius in the input's unit, as in `fgsm`.
        steps: How many.
        step_size: Of one step; None for 2.5 epsilon / steps, which crosses the cube with a quarter to spare.
        bounds: Least and greatest value that an input may take, such as (0, 1) for images; None for no limits.
        random_start: False to start from the inputs themselves.
        seed: Of the random start.

    Raises:
        BadInput: As `fgsm`; inputs outside of the bounds.

    References:
        A. Madry, A. Makelov, L. Schmidt, D. Tsipras and A. Vladu (2018). Towards deep learning models resistant to
        adversarial attacks. ICLR.

    Examples:
        >>> batch = Batch((torch.tensor([[1.0, -2.0]]),), {}, torch.zeros(1))
        >>> pgd(lambda b: b.inputs[0].square().sum(), batch, 0.5).inputs[0]
        tensor([[ 1.5000, -2.5000]])
    """
    check_count(steps, "steps")
    radius = _checked_step(epsilon)
    size = 2.5 * radius / steps if step_size is None else step_size
    low, high = bounds or (-torch.inf, torch.inf)
    home = _watched(batch)
    moving = [index for index, value in enumerate(home.inputs) if _is_movable(value)]
    cubes = {}
    for index in moving:
        value = home.inputs[index].detach()
        if not bool(((value >= low) & (value <= high)).all()):
            raise BadInput(f"inputs must be within bounds={bounds}, got {value.min():g} to {value.max():g}")
        reach = _spread(radius.to(value), value.shape)
        cubes[index] = (value - reach).clamp(min=low), (value + reach).clamp(max=high)
    current = home
    if random_start:
        current = _replaced(
            home, {i: _uniform(*cube, stream(cube[0].device, seed, "pgd", i)) for i, cube in cubes.items()}
        )
    for _ in range(steps):
        moved = fgsm(loss, current, size)
        current = _replaced(moved, {i: moved.inputs[i].clamp(*cube) for i, cube in cubes.items()})
    return _replaced(current, {i: current.inputs[i].detach() for i in moving})


def _replaced(batch: Batch, values: dict[int, Tensor]) -> Batch:
    return batch._replace(inputs=tuple(values.get(i, value) for i, value in enumerate(batch.inputs)))


def _uniform(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    share = torch.rand(low.shape, generator=generator, device=low.device, dtype=low.dtype)
    return low + share * (high - low)


def adversarial_loss(loss: Callable[[Batch], Tensor], batch: Batch, epsilon: float | Tensor) -> Tensor:
    """Return the loss averaged over the batch and its adversarial twin, (l(x) + l(x')) / 2.

    Lakshminarayanan et al. (2017, algorithm 1) add the two; half of that keeps it a mean per example and has
    the same minimum. Arguments and errors as for `fgsm`.
    """
    watched = _watched(batch)
    clean = loss(with_copies(watched))
    return (clean + loss(with_copies(_stepped(watched, clean, epsilon)))) / 2


def _is_movable(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _watched(batch: Batch) -> Batch:
    if not any(map(_is_movable, batch.inputs)):
        raise BadInput("adversarial examples need a positional input of floating dtype; this batch has none to move")
    return batch._replace(
        inputs=tuple(value.detach().requires_grad_() if _is_movable(value) else value for value in batch.inputs)
    )


def _stepped(watched: Batch, loss: Tensor, epsilon: float | Tensor) -> Batch:
    """Return the inputs a step up; the graph of the loss is kept, for it is part of the objective."""
    step = _checked_step(epsilon)
    places = [index for index, value in enumerate(watched.inputs) if _is_movable(value)]
    moved = list(watched.inputs)
    gradients = torch.autograd.grad(
        loss.sum(), [moved[index] for index in places], retain_graph=True, allow_unused=True
    )
    for index, gradient in zip(places, gradients, strict=True):
        moved[index] = moved[index].detach()
        if gradient is not None:
            moved[index] = moved[index] + _spread(step.to(gradient), gradient.shape) * gradient.sign()
    return watched._replace(inputs=tuple(moved))


def _checked_step(epsilon: float | Tensor) -> Tensor:
    # In double precision: a float32 0.3 would leave the cube of a float64 input.
    step = epsilon if isinstance(epsilon, Tensor) else torch.tensor(epsilon, dtype=torch.float64)
    if not bool((step >= 0).all()):
        raise BadInput(f"epsilon must be at least 0, got {epsilon}")
    return step


def _spread(step: Tensor, shape: torch.Size) -> Tensor:
    try:
        return step.expand(shape)
    except RuntimeError:
        raise BadInput(
            f"epsilon of shape {tuple(step.shape)} does not broadcast against an input of shape {tuple(shape)}; "
            "it must be a number, or have one entry per feature"
        ) from None
