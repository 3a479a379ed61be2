"""The training loop: what `Predictor.fit` runs, and what comes of it."""

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bayesguard.adversarial import adversarial_loss as adversarial_loss
from bayesguard.adversarial import fgsm as fgsm
from bayesguard.checkpoint import load_tree, save_tree
from bayesguard.checks import check_count, check_writable
from bayesguard.data import Batch, Data, batches, count_rows, is_one_shot, known_rows, to_device, with_copies
from bayesguard.errors import BadFile, BadInput
from bayesguard.history import Epoch as Epoch
from bayesguard.history import History as History
from bayesguard.predictive.numerics import keep_freed_memory
from bayesguard.sampling import seeded_default_generators, stream
from bayesguard.sampling.memory_order import channels_last
from bayesguard.training_setup import (
    OptimizerFactory,
    are_finite,
    are_images,
    are_same,
    autocast_dtype,
    check_finite,
    check_fits,
    check_settings,
    device_of,
    finite_numbers,
    first_settings,
    generators_of,
    has_convolutions,
    make_optimizer,
    make_scheduler,
    modes_kept,
    no_gradients_left,
    same_channels_last,
)
from bayesguard.training_setup import (
    SchedulerFactory as SchedulerFactory,
)

Loss = Callable[[Batch, int], Tensor]
Clip = Callable[[list[nn.Parameter], float], Tensor]

_CHECKPOINT = "training checkpoint"


@torch.inference_mode(False)
def fit(
    module: nn.Module,
    loss: Loss,
    data: Data,
    *,
    epochs: int,
    validation: Data = None,
    validation_loss: Callable[[Data], float] | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    scheduler: SchedulerFactory | None = None,
    precision: str | None = None,
    gradient_clip: float | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    seed: int = 0,
    input_key: str | None = None,
    target_key: str | None = None,
    batch_size: int | None = None,
    clip: Clip = nn.utils.clip_grad_norm_,
) -> History:
    """Train the parameters of a module; all that is random follows from `seed`, the caller's streams rest.

    The module trains in training mode and ends in the modes it had, without gradients, even after an error.
    With a checkpoint, an interrupted training goes on to the same bits on the same device, provided that
    kernels are deterministic and the data draw random numbers from torch only.

    Args:
        module: Holds the parameters; those that require gradients are trained.
        loss: `(batch, num_data) -> Tensor`: mean objective per example, in nats, or a vector of them, one for
            each of several independent parts of the module: the sum is descended, the mean recorded.
        data: As in `bayesguard.data.batches`; arrays are shuffled anew each epoch. An iterator, which is read
            into memory, serves one epoch.
        epochs: Passes over the data, those of the checkpoint included.
        validation: Held-out data.
        validation_loss: Mean NLL of `validation`, in nats, called in eval mode; None for the mean of `loss`.
        optimizer: `parameters -> Optimizer`; None for Adam with a learning rate of 1e-3. A ready optimizer
            must hold parameters of this very module.
        scheduler: `optimizer -> LRScheduler`, stepped once an epoch (on the validation NLL, for
            ReduceLROnPlateau).
        precision: None, "bfloat16" or "float16" (CUDA only, with loss scaling): the dtype of autocast.
        gradient_clip: Largest norm of the whole gradient.
        patience: Stop after this many epochs without a lower validation NLL, and go back to the best weights.
            Without it the last weights stay.
        checkpoint: A file written after every epoch; where it exists, training goes on from it. One that has
            `epochs` epochs or more, or was stopped early, is only loaded. Settings and the number of examples must
            be the file's.
        progress: True for a progress bar.
        seed: Seed of shuffling, dropout and all else that torch draws.
        input_key: As in `bayesguard.data.batches`.
        target_key: As in `bayesguard.data.batches`.
        batch_size: Rows per batch of arrays.
        clip: `(parameters, norm) -> norms before`; clips gradients in place.

    Raises:
        BadInput: Settings that cannot be used; data without rows or targets; a loss or gradient that is NaN
            or infinite (the parameters are then as they were before that step).
        BadFile: A checkpoint that is damaged or belongs to another module.

    Examples:
        >>> line = nn.Linear(1, 1)
        >>> rows = torch.linspace(-1, 1, 20).reshape(-1, 1)
        >>> history = fit(line, lambda batch, n: (line(*batch.inputs) - batch.targets).square().mean(),
        ...               (rows, 2 * rows), epochs=50, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        >>> len(history), round(line.weight.item(), 3)
        (50, 2.0)
    """
    check_count(epochs, "epochs")
    check_settings(data, epochs, validation, patience, gradient_clip)
    if checkpoint is not None:
        check_writable(checkpoint)
    if is_one_shot(data):
        data = list(data)
    run = _Run(
        module=module,
        loss=loss,
        data=data,
        validation=validation,
        validation_loss=validation_loss,
        device=device_of(module),
        seed=seed,
        precision=precision,
        gradient_clip=math.inf if gradient_clip is None else float(gradient_clip),
        clip=clip,
        patience=patience,
        batching={"batch_size": batch_size, "input_key": input_key, "target_key": target_key},
    )
    run.prepare(optimizer, scheduler)
    with modes_kept(module), no_gradients_left(module), _progress_bar(progress, run, epochs) as bar:
        run.resume(checkpoint)
        bar.update(len(run.epochs) * run.num_data)
        while len(run.epochs) < epochs and not run.is_stale:
            run.train_epoch(bar)
            run.save(checkpoint)
        if run.best is not None:
            module.load_state_dict(run.best)
    return History(tuple(run.epochs), stopped_early=len(run.epochs) < epochs)


@dataclass
class _Run:
    """A training under way: what it is given, and the state that a checkpoint holds."""

    module: nn.Module
    loss: Loss
    data: Data
    validation: Data
    validation_loss: Callable[[Data], float] | None
    device: torch.device
    seed: int
    precision: str | None
    gradient_clip: float
    clip: Clip
    patience: int | None
    batching: dict[str, Any]

    def prepare(self, optimizer: OptimizerFactory | Optimizer | None, scheduler: SchedulerFactory | None) -> None:
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(optimizer, self.parameters)
        self.made_with = first_settings(self.optimizer)
        self.scheduler = make_scheduler(scheduler, self.optimizer)
        if self.scheduler is not None:
            self.made_with |= first_settings(self.optimizer, self.scheduler)
        self.autocast_dtype = autocast_dtype(self.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")
        self.generators = generators_of(self.data, self.validation)
        self.batching["numpy_dtype"] = self.parameters[0].dtype
        if self.device.type == "cpu":
            keep_freed_memory()
        self.has_convolutions = self.device.type == "cpu" and has_convolutions(self.module)
        self.channels_last: bool | None = None
        self.epochs: list[Epoch] = []
        self.best: dict[str, Any] | None = None
        with self._random_streams("count"):
            keys = {key: self.batching[key] for key in ("input_key", "target_key")}
            self.num_data = count_rows(self.data, **keys)
        if not self.num_data:
            raise BadInput("data has no rows to train on (drop_last=True drops a batch that is not full)")
        if self.validation is not None and known_rows(self.validation) == 0:
            raise BadInput("validation has no rows; leave it out, or hand in held-out data")

    @property
    def is_stale(self) -> bool:
        """Whether the last `patience` epochs brought no lower validation NLL."""
        best = History(tuple(self.epochs)).best_epoch
        return self.patience is not None and best is not None and len(self.epochs) - best >= self.patience

    def train_epoch(self, bar: Any) -> None:
        number, started = len(self.epochs) + 1, time.perf_counter()
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        bar.set_description(f"epoch {number}", refresh=False)
        self.module.train()
        total, rows = 0.0, 0
        # A sampler that orders rows by the epoch draws those of the first for ever where nobody tells it.
        for sampler in (getattr(self.data, "sampler", None), getattr(self.data, "batch_sampler", None)):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(number)
        with self._random_streams("epoch", number):
            order = stream("cpu", self.seed, "order", number)
            for index, batch in enumerate(batches(self.data, shuffle_generator=order, **self.batching)):
                if batch.num_rows:
                    total += batch.num_rows * self._step(batch, f"epoch {number}, batch {index}")
                    rows += batch.num_rows
                    if not bar.disable:
                        bar.set_postfix(loss=total / rows, refresh=False)
                        bar.update(batch.num_rows)
        nll = self._validate()
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(total / rows if nll is None else nll)
        elif self.scheduler is not None:
            self.scheduler.step()
        self.epochs.append(Epoch(number, total / rows, nll, learning_rate, time.perf_counter() - started))
        if self.patience is not None and History(tuple(self.epochs)).best_epoch == number:
            self.best = deepcopy(dict(self.module.state_dict()))

    def _step(self, batch: Batch, place: str) -> float:
        """Take one step of the optimizer and return the loss before it."""
        if batch.targets is None:
            raise BadInput(f"{place} has no targets; batches are (inputs, targets), or mappings with target_key")
        batch = to_device(batch, self.device)
        if self._is_channels_last(batch):
            batch = batch._replace(inputs=(channels_last(batch.inputs[0]),))
        values: list[list[float]] = []

        def closure() -> Tensor:
            for parameter in self.parameters:
                parameter.grad = None
            # A block a call: autocast keeps cast weights until its block ends, and a step changes them.
            with self._autocast():
                # A module may write over its inputs, which are the caller's data or needed again.
                value = self.loss(with_copies(batch), self.num_data)
            values.append(finite_numbers(value.detach(), "loss", place))
            total = value if value.dim() == 0 else value.sum()
            self.scaler.scale(total).backward()
            self._clip_gradients(place)
            return total.detach()

        if self.scaler.is_enabled():
            closure()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step(closure)  # type: ignore[arg-type]
        return math.fsum(values[0]) / len(values[0])

    def _is_channels_last(self, batch: Batch) -> bool:
        """Whether images go in with the channels last in memory: to be found out with the first batch."""
        if not self.has_convolutions or not are_images(batch):
            return False
        if self.channels_last is None:
            with self._random_streams("trial"):
                self.channels_last = same_channels_last(self.module, batch, lambda b: self.loss(b, self.num_data))
        return self.channels_last

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _clip_gradients(self, place: str) -> None:
        self.scaler.unscale_(self.optimizer)
        dense = [p for p in self.parameters if p.grad is not None and p.grad.layout is torch.strided]
        if self.gradient_clip < math.inf and any(p.grad is not None and p.grad.is_sparse for p in self.parameters):
            raise BadInput(
                f"gradient_clip needs dense gradients, and a parameter has a sparse one in {place}: leave gradient_clip out, "
                "or make the embedding with sparse=False"
            )
        # Multiplying with 1 would be a second pass over the gradients.
        if self.gradient_clip == math.inf and (
            self.scaler.is_enabled() or are_finite([p.grad for p in dense if p.grad is not None])
        ):
            return
        norms = self.clip(dense, self.gradient_clip)
        # Loss scaling overflows now and then, and skips those steps by itself.
        if not self.scaler.is_enabled():
            check_finite(norms, "norm of the gradient", place)

    @torch.no_grad()
    def _validate(self) -> float | None:
        if self.validation is None:
            return None
        self.module.eval()
        with self._random_streams("validation"):
            nll = float((self.validation_loss or self._mean_loss)(self.validation))
        if math.isnan(nll):
            raise BadInput(f"the validation NLL is NaN after epoch {len(self.epochs) + 1}; look for NaN in validation")
        return nll

    def _mean_loss(self, data: Data) -> float:
        total, rows = 0.0, 0
        for batch in batches(data, **self.batching):
            value = self.loss(with_copies(to_device(batch, self.device)), self.num_data)
            total, rows = total + batch.num_rows * float(value.double().mean()), rows + batch.num_rows
        return total / rows

    def _random_streams(self, *path: str | int) -> Any:
        return seeded_default_generators(self.device, self.seed, "fit", *path)

    # The checkpoint. Each epoch seeds its streams from (seed, epoch), so no state of theirs is needed.

    def save(self, path: str | os.PathLike[str] | None) -> None:
        if path is None:
            return
        state = {
            "settings": self._settings(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "module": dict(self.module.state_dict()),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": [generator.get_state() for generator in self.generators],
            "channels last": self.channels_last,
        }
        save_tree(path, state, kind=_CHECKPOINT)

    def resume(self, path: str | os.PathLike[str] | None) -> None:
        """Go on from the file, or write a first one: a missing folder shows before the first epoch."""
        if path is None:
            return None
        if not os.path.exists(path):
            return self.save(path)
        state = load_tree(path, kind=_CHECKPOINT)
        for name, mine in self._settings().items():
            # Files of earlier versions do not say how many examples there were, or what the optimizer was made with.
            if not are_same(theirs := state["settings"].get(name, mine), mine):
                raise BadInput(
                    f"checkpoint {os.fspath(path)} was written with {name}={theirs!r}, "
                    f"this training has {mine!r}: use the same, or another file"
                )
        check_fits(state["module"], self.module, path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise BadFile(f"checkpoint {os.fspath(path)} is of an optimizer over other parameters: {error}") from error
        self.module.load_state_dict(state["module"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved)
        self.channels_last = state.get("channels last")
        self.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        self.best = state["best"] if self.patience is not None else None
        return None

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a training to be the same."""
        return {
            "seed": self.seed,
            "precision": self.precision,
            "optimizer": type(self.optimizer).__name__,
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "early stopping": self.patience is not None,
            "generators": len(self.generators),
            "examples": self.num_data,
            **self.made_with,
        }


def _progress_bar(progress: bool | None, run: _Run, epochs: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=epochs * run.num_data, unit=" rows", disable=not progress)
