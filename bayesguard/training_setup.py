"""What a training checks and makes before its first step, and leaves as it was after the last."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from bayesguard.checks import check_count, check_positive
from bayesguard.data import Batch, Data, is_one_shot, with_copies
from bayesguard.errors import BadFile, BadInput, BadType
from bayesguard.sampling.agreement import rounding_of
from bayesguard.sampling.memory_order import channels_last

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

_FEW_ROWS = 8
# Settings of an optimizer that say how it computes.
_NOT_OF_THE_RESULT = ("params", "foreach", "fused", "capturable", "differentiable")
_FUSED_DTYPES = (torch.float32, torch.float64)

_WAYS_OUT = (
    "Usual ways out: a lower learning rate, gradient_clip=1.0, standardised inputs and regression targets, "
    'precision="bfloat16" in place of "float16"'
)


def device_of(module: nn.Module) -> torch.device:
    """Return where the inputs of a module have to be: with its first parameter or buffer."""
    tensor = next((tensor for tensor in (*module.parameters(), *module.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def check_settings(
    data: Data, epochs: int, validation: Data, patience: int | None, gradient_clip: float | None
) -> None:
    for name, value in (("data", data), ("validation", validation)):
        if epochs > 1 and is_one_shot(value):
            raise BadInput(
                f"{name} is an iterator: it would run dry after the first of {epochs} epochs; "
                "pass a list of batches or a DataLoader"
            )
    if patience is not None:
        check_count(patience, "patience")
        if validation is None:
            raise BadInput("patience needs validation: early stopping watches the NLL of held-out data")
    if gradient_clip is not None:
        check_positive(gradient_clip, "gradient_clip")


def check_trainable(parameters: Iterable[nn.Parameter]) -> None:
    """Refuse parameters that autograd cannot follow and optimizers cannot write to."""
    if any(parameter.is_inference() for parameter in parameters):
        raise BadInput(
            "the network or its predictor was made inside torch.inference_mode(), whose tensors cannot be trained; make both "
            "outside of it"
        )


def make_optimizer(optimizer: OptimizerFactory | Optimizer | None, parameters: list[nn.Parameter]) -> Optimizer:
    if not parameters:
        raise BadInput("there is nothing to train: no parameter of the module requires gradients")
    check_trainable(parameters)
    if optimizer is None:
        return torch.optim.Adam(parameters, lr=1e-3, fused=can_be_fused(parameters) or None)
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer(parameters) if callable(optimizer) else None
    if not isinstance(made, Optimizer):
        raise BadType(
            f"optimizer must be a function `parameters -> torch.optim.Optimizer`, got {optimizer!r}; "
            "for example functools.partial(torch.optim.SGD, lr=0.1)"
        )
    own = set(map(id, parameters))
    if not all(id(parameter) in own for group in made.param_groups for parameter in group["params"]):
        raise BadInput(
            "optimizer holds parameters that are not trained here (a predictor works on a copy of the network, "
            "unless copy=False): pass a function, as functools.partial(torch.optim.SGD, lr=0.1), not an object"
        )
    # A scheduler that warms up starts at 0, and is made after this.
    if all(float(group.get("initial_lr", group.get("lr", 1.0))) == 0 for group in made.param_groups):
        raise BadInput(
            f"the learning rate of {type(made).__name__} is 0, with which nothing is trained; give it one above 0"
        )
    return made


def make_scheduler(scheduler: SchedulerFactory | None, optimizer: Optimizer) -> LRScheduler | None:
    if scheduler is None:
        return None
    made = scheduler(optimizer) if callable(scheduler) else None
    if not isinstance(made, LRScheduler):
        raise BadType(
            f"scheduler must be a function `optimizer -> LRScheduler`, got {scheduler!r}; "
            "for example functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10)"
        )
    return made


def first_settings(optimizer: Optimizer, scheduler: LRScheduler | None = None) -> dict[str, Any]:
    """Return what an optimizer, or its scheduler, was made with, by name: a file's state would silently replace it.

    Nothing for an optimizer that was used before, whose settings may have changed since.
    """
    if optimizer.state:
        return {}
    if scheduler is not None:
        return {f"{name} of the scheduler": deepcopy(value) for name, value in scheduler.state_dict().items()}
    return {
        f"{name} of parameter group {number}": deepcopy(value)
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name not in _NOT_OF_THE_RESULT
    }


def are_same(a: Any, b: Any) -> bool:
    """Whether two settings are the same, in what both of them say."""
    a, b = (some.tolist() if isinstance(some, Tensor) else some for some in (a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return all(are_same(a[key], b[key]) for key in a.keys() & b.keys())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(are_same, a, b))
    return bool(a == b)


def can_be_fused(parameters: list[nn.Parameter]) -> bool:
    """Whether one kernel may update the parameters: on a CPU, where it is the faster way.

    It walks parameters, gradients and running means in the order of memory. Gradients are laid out as their
    parameters are, but what a checkpoint gives back is contiguous.
    """
    return all(p.device.type == "cpu" and p.dtype in _FUSED_DTYPES and p.is_contiguous() for p in parameters)


def has_convolutions(module: nn.Module) -> bool:
    """Whether a module has two-dimensional convolutions."""
    return any(isinstance(part, nn.Conv2d) for part in module.modules())


def are_images(batch: Batch) -> bool:
    """Whether the one input of a batch is a tensor `[N, C, H, W]` of floats."""
    inputs = batch.inputs
    return len(inputs) == 1 and type(inputs[0]) is Tensor and inputs[0].dim() == 4 and inputs[0].is_floating_point()


def same_channels_last(module: nn.Module, batch: Batch, loss: Callable[[Batch], Tensor]) -> bool:
    """Tell whether a loss in training mode is the same, to rounding, with the channels of images last in memory.

    A network that cuts results with `view` refuses them, and dropout between convolutions would draw its masks in
    another order. Buffers, modes and torch's random numbers are afterwards as they were.
    """
    few = Batch((batch.inputs[0][:_FEW_ROWS],), {}, None if batch.targets is None else batch.targets[:_FEW_ROWS])
    if batch.kwargs or few.num_rows < 2:
        return False
    buffers = [(part._buffers, dict(part._buffers)) for part in module.modules()]
    held = {buffer: buffer.clone() for _, own in buffers for buffer in own.values() if buffer is not None}
    state = torch.get_rng_state()

    def restore() -> None:
        torch.set_rng_state(state)
        for own, before in buffers:
            own.update(before)
        for buffer, numbers in held.items():
            buffer.copy_(numbers)

    def value(batch: Batch) -> Tensor:
        restore()
        return loss(with_copies(batch)).double().sum()

    with torch.no_grad():
        try:
            plain = value(few)
            other = value(few._replace(inputs=(channels_last(few.inputs[0]),)))
            rounding = rounding_of(few.inputs[0].dtype)
            return bool(torch.isclose(plain, other, rtol=rounding, atol=rounding))
        except Exception:  # Networks refuse in many ways; an error that is real comes again in the first step.
            return False
        finally:
            restore()


def autocast_dtype(precision: str | None, device: torch.device) -> torch.dtype | None:
    dtypes = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if precision not in dtypes:
        raise BadInput(f'precision must be None, "bfloat16" or "float16", got {precision!r}')
    if precision == "float16" and device.type != "cuda":
        raise BadInput(f'precision="float16" needs CUDA, and the module is on {device}; use "bfloat16"')
    return dtypes[precision]


def check_finite(value: Tensor, name: str, place: str) -> None:
    if not value.isfinite().all():
        raise BadInput(f"the {name} is {value.tolist()} in {place}; parameters were not updated with it. {_WAYS_OUT}")


def are_finite(gradients: list[Tensor]) -> bool:
    """Whether gradients hold neither NaN nor infinity; False as well where their sum or norm overflows."""
    if all(gradient.device.type == "cpu" for gradient in gradients):
        return all(math.isfinite(gradient.sum().item()) for gradient in gradients)  # Half the time of a norm.
    return bool(nn.utils.get_total_norm(gradients).isfinite())


def finite_numbers(value: Tensor, name: str, place: str) -> list[float]:
    """Return the numbers of a tensor, which are looked at in one go, after `check_finite`."""
    numbers: list[float] = value.reshape(-1).tolist()
    if not all(map(math.isfinite, numbers)):
        check_finite(value, name, place)
    return numbers


def check_fits(state: dict[str, Tensor], module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Compare names, shapes and dtypes before anything is loaded: no module is left half changed."""

    def describe(tensors: dict[str, Any]) -> set[str]:
        return {
            f"{name} {tuple(tensor.shape)} {tensor.dtype}"
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor)
        }

    if differing := sorted(describe(state) ^ describe(module.state_dict())):
        raise BadFile(f"checkpoint {os.fspath(path)} belongs to another module; they differ in {differing[:4]}")


def generators_of(*loaders: Data) -> list[torch.Generator]:
    """Return the random generators that loaders own."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        if isinstance(loader, DataLoader):
            inner = getattr(loader.batch_sampler, "sampler", None)
            for owner in (loader, loader.sampler, loader.batch_sampler, inner):
                if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                    found[id(generator)] = generator
    return list(found.values())


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def no_gradients_left(module: nn.Module) -> Iterator[None]:
    try:
        yield
    finally:
        module.zero_grad(set_to_none=True)
