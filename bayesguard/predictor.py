"""Predictor: a network with a way of drawing functions from a posterior; calling it gives a Predictive."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from bayesguard.adaptive import Stopping, check_stopping, draw_until
from bayesguard.calibration import Calibrator, TemperatureScaling
from bayesguard.calibration.base import check_order, fit_in_turn, make_buffers_changeable
from bayesguard.checks import check_count
from bayesguard.data import Batch, batches, drawn_apart, is_one_shot, join_inputs, known_rows, split_inputs
from bayesguard.errors import BadInput, BadType
from bayesguard.layers import BayesianLayer
from bayesguard.likelihoods import Likelihood
from bayesguard.looks import with_one_look
from bayesguard.predictive import Gathering, Predictive
from bayesguard.predictive.groups import blocks
from bayesguard.predictive.parts import Part as Part
from bayesguard.predictive.parts import collect
from bayesguard.predictor_checks import check_evaluating, check_likelihood, check_memory, check_one_meaning
from bayesguard.sampling import Forward, Select, own_network
from bayesguard.sampling.same_numbers import copies, same_numbers
from bayesguard.shifting import chosen_shifts, shifting
from bayesguard.transfer import on_device

if TYPE_CHECKING:
    from bayesguard.history import History


_VALIDATION_DRAWS = 8

# Which predictor a calibrator was last fitted for.
_USERS: weakref.WeakKeyDictionary[Calibrator, weakref.ref["Predictor"]] = weakref.WeakKeyDictionary()


class Options(TypedDict, total=False):
    """The arguments that every predictor takes."""

    output: Select
    input_key: str | None
    target_key: str | None
    copy: bool
    seed: int


class Predictor(nn.Module, ABC):
    """Base of every method: what it stores, how it is trained (`loss`), how it draws outputs (`output_chunks`).

    Args:
        network: Any `nn.Module`; its outputs are raw (logits, a location, ...), examples first. It is copied, so
            that nothing done here changes the caller's network.
        likelihood: What the outputs say about the target; None for `likelihoods.Categorical()`.
        num_samples: Draws from the posterior in one prediction.
        output: Which part of the network's output to use: a key, an index or a callable; None for all of it.
        input_key: Key of the inputs in batches that are mappings; None for `(inputs, targets)` batches, or for
            mappings that carry `labels`, whose other entries are then keyword arguments.
        target_key: Key of the targets in batches that are mappings.
        copy: False to work on the given network itself.
        seed: Seed of this predictor's random numbers. Predictions repeat themselves for the same seed.

    Attributes:
        can_continue: Whether `output_chunks` takes `first_draw` and `draws_per_chunk`, so that draws can go on where
            they ended.
        takes_bayesian_layers: Whether the method takes networks of `bayesguard.layers`.
        is_reweightable: Whether draws weighted by the likelihood of one more row stand for the posterior with that row:
            where they come from a posterior over what was fitted, not where masks or seeds are all they differ in.
    """

    can_continue: ClassVar[bool] = False
    takes_bayesian_layers: ClassVar[bool] = False
    is_reweightable: ClassVar[bool] = False

    def __init__(
        self,
        network: nn.Module,
        likelihood: Likelihood | None = None,
        *,
        num_samples: int = 1,
        output: Select = None,
        input_key: str | None = None,
        target_key: str | None = None,
        copy: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = own_network(network, copy=copy)
        if not self.takes_bayesian_layers:
            _refuse_bayesian_layers(self.network, type(self).__name__)
        self.likelihood = deepcopy(check_likelihood(likelihood))
        self.num_samples = check_count(num_samples, "num_samples")
        self.output, self.input_key, self.target_key = output, input_key, target_key
        self.seed = check_count(seed, "seed", minimum=0)
        self.calibrators = nn.ModuleList()
        # A predictor is made to predict; only a network that is not a copy keeps the mode it has.
        self.training = False
        for part in (self.likelihood, self.calibrators):
            part.eval()

    # What a method has to say.

    @abstractmethod
    def output_chunks(
        self, *inputs: Any, num_samples: int, seed: int, offset: int = 0, **kwargs: Any
    ) -> Iterator[Tensor]:
        """Yield raw outputs `[s, N, ...]` of consecutive draws until there are `num_samples`.

        `offset` is the index of the first example in the data, for methods that treat examples apart. Chunks end where
        a block of `draws_per_block` draws does. Methods that set `can_continue` take two arguments more: `first_draw`,
        its index, and `draws_per_chunk`, the most draws in a chunk (None for as many as fit).
        """

    @abstractmethod
    def draw(self, seed: int) -> nn.Module:
        """Return one function of the posterior: deterministic, differentiable, usable across batches."""

    @property
    @abstractmethod
    def strategy(self) -> str:
        """How the last prediction was computed."""

    def loss(self, inputs: Any, targets: Tensor, *, num_data: int) -> Tensor:
        """Return the training objective of one batch: the mean per example, in nats.

        For people with a training loop of their own; the network should be in training mode there.

        Args:
            inputs: A tensor `[N, ...]`, a tuple of them (positional inputs), or a mapping (keyword inputs).
            targets: What the likelihood takes.
            num_data: Rows of the whole training set; methods whose objective has a prior divide it by this.
        """
        check_count(num_data, "num_data")
        positional, keywords = split_inputs(inputs)
        outputs = Forward(self.network, positional, keywords, self.output)()
        return self.likelihood.loss(outputs, targets)

    def explain(self) -> str:
        """Say how the last prediction was computed and why; methods that measure say what it costs, too."""
        return f"strategy: {self.strategy}"

    # What every method inherits.

    def forward(
        self,
        *inputs: Any,
        num_samples: int | None = None,
        seed: int | None = None,
        offset: int = 0,
        tolerance: float | None = None,
        max_samples: int | None = None,
        **kwargs: Any,
    ) -> Predictive:
        """Return the predictive distribution of each example, with its draws.

        Args:
            inputs: The network's positional inputs, tensors `[N, ...]` or NumPy arrays.
            num_samples: Draws; None for the predictor's own number.
            seed: Seed of the draws; None for the predictor's own. The same seed gives the same draws.
            offset: Index of the first example, where a batch is part of something longer.
            tolerance: Draw for each example until the standard error of all its class probabilities is this at most,
                looking after every eight draws; None for the same number of draws for all. The answer is then reduced
                (it has no draws), and `draws_used` tells how many each example took. For classification.
            max_samples: Draws at which an example stops in any case, its `standard_error` perhaps above the
                tolerance; None for four times `num_samples`.
            kwargs: The network's keyword inputs.

        Raises:
            BadInput: Inputs without examples' axis, outputs that are not finite, a network in training mode; a
                tolerance for a method or a target that cannot have one.
            IdenticalDraws: A stochastic method whose draws are all the same.
        """
        draws = self._draws(num_samples, seed, tolerance, max_samples, None)
        with without_gradients():
            return self._calibrated(self._answer(inputs, kwargs, draws, offset), "pooled")

    def draw_outputs(
        self, *inputs: Any, num_samples: int | None = None, seed: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Return raw outputs `[S, N, ...]`, before the likelihood and any calibration."""
        with without_gradients():
            positional, keywords = self._prepare(inputs, kwargs)
            samples, seed = self._samples(num_samples), self._seed(seed)
            return torch.cat(list(self.output_chunks(*positional, num_samples=samples, seed=seed, **keywords)))

    def predictives(self, *inputs: Any, num_samples: int, seed: int, offset: int = 0, **kwargs: Any) -> Iterator[Part]:
        """Yield predictives over consecutive groups of draws, each with its share of the whole mixture."""
        block = self.draws_per_block
        for outputs in self.output_chunks(*inputs, num_samples=num_samples, seed=seed, offset=offset, **kwargs):
            # Of less than two blocks the error is told as if draws were independent, which balanced ones improve on.
            groups = blocks(len(outputs), block) if num_samples >= 2 * block else None
            yield Part(self._predictive(outputs, groups), len(outputs) / num_samples)

    @property
    def draws_per_block(self) -> int:
        """How many consecutive draws depend on one another; blocks of them are independent. 1: all draws are."""
        return 1

    @property
    def is_positional(self) -> bool:
        """Whether an example's draws depend on where it stands in the data, as with masks of its own."""
        return False

    @property
    def is_exact(self) -> bool:
        """Whether the draws are the whole posterior, so that predictions carry no Monte-Carlo error."""
        return False

    @property
    def num_chains(self) -> int:
        """How many chains, members or seeds the draws come from, one after another."""
        return 1

    def weight_draws(self, num_samples: int | None = None, seed: int | None = None) -> dict[str, Tensor]:
        """Return the weights of each draw by name, `[S, *shape]`; nothing for methods that do not sample weights."""
        return {}

    def to_inference_data(self, data: Any, **settings: Any) -> Any:
        """Return draws, log-likelihoods and data for ArviZ; see `bayesguard.inference_data.to_inference_data`."""
        from bayesguard.inference_data import to_inference_data

        return to_inference_data(self, data, **settings)

    def predict(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        keep_draws: bool = False,
        num_samples: int | None = None,
        seed: int | None = None,
        tolerance: float | None = None,
        max_samples: int | None = None,
        progress: bool | None = None,
    ) -> Predictive:
        """Return the predictives of a whole data set, streamed batch by batch and gathered on the CPU.

        Args:
            data: A DataLoader, any iterable of batches, a pair of arrays `(inputs, targets)`, or an array of inputs.
                It is read once; targets are not used.
            batch_size: Rows a batch, where `data` holds arrays (default 256).
            keep_draws: Keep every draw (S times the memory) instead of reducing them as they come. Regression and
                count predictives keep theirs always, because their cdf needs them.
            num_samples: Draws; None for the predictor's own number.
            seed: Seed of the draws; None for the predictor's own.
            tolerance: Draw for each example until its standard error is this at most; see `forward`.
            max_samples: Draws at which an example stops in any case; None for four times `num_samples`.
            progress: True for a progress bar.

        Raises:
            BadInput: No data, a list of two arrays that may be two batches or inputs with targets, or draws to keep that
                would not fit into memory (the message has the size).
        """
        check_one_meaning(data)
        draws = self._draws(num_samples, seed, tolerance, max_samples, keep_draws)
        return self._stream(data, batch_size, draws, progress)[0]

    def predict_with_targets(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        keep_draws: bool = False,
        num_samples: int | None = None,
        seed: int | None = None,
        tolerance: float | None = None,
        max_samples: int | None = None,
        progress: bool | None = None,
        transform: Callable[[Batch, int], Batch] | None = None,
    ) -> tuple[Predictive, Tensor]:
        """Return the predictives of a data set and its targets from one pass, so that rows stay aligned.

        Arguments as in `predict`; `transform(batch, offset)` may change a batch that is already on the device.
        """
        draws = self._draws(num_samples, seed, tolerance, max_samples, keep_draws)
        predictive, targets = self._stream(data, batch_size, draws, progress, transform)
        if len(targets) == 0:
            raise BadInput("data has no targets; batches must be (inputs, targets)")
        return predictive, torch.cat(targets)

    def calibrate(
        self, data: Any, *calibrators: Calibrator, batch_size: int | None = None, append: bool = False
    ) -> Self:
        """Fit calibrators to held-out data, in one pass over it, and use them from now on.

        Args:
            data: Held-out data, never the training set: a DataLoader, an iterable of batches, or a pair of arrays.
            calibrators: Fitted one after another, each on what the ones before it leave; default
                `calibration.TemperatureScaling()`. One that promises a coverage (conformal prediction) after others gets
                a random half of the data for itself, and the others the other half; `diagnostics["num_examples"]` of
                each tells. Earlier ones are replaced.
            batch_size: Rows a batch, where `data` is a pair of arrays.
            append: Keep the calibrators that are there and fit these on top: for data that were split by hand.

        Raises:
            BadInput: A calibrator after one that promises a coverage, which would undo the promise.
        """
        chosen = calibrators or (TemperatureScaling(),)
        for calibrator in chosen:
            if not isinstance(calibrator, Calibrator):
                raise BadType(f"calibrators must be bayesguard.calibration objects, got {type(calibrator).__name__}")
        _leave_copies(chosen)
        before = self.calibrators
        kept = [*before] if append else []
        check_order([*kept, *chosen])
        if not append:
            self.forget_calibration()
        try:
            predictive, targets = self.predict_with_targets(data, batch_size=batch_size, keep_draws=True)
            fit_in_turn(chosen, predictive, targets, self.seed, self._under_shifts(data, chosen, batch_size))
        except BaseException:
            self.calibrators = before
            raise
        self.calibrators = nn.ModuleList(calibrator.to(self._device) for calibrator in (*kept, *chosen)).eval()
        make_buffers_changeable(self.calibrators)
        _USERS.update((calibrator, weakref.ref(self)) for calibrator in chosen)
        return self

    def adapt(self, data: Any, *, batch_size: int | None = None) -> Self:
        """Let calibrators follow unlabelled data: `PriorCorrection`, and `ShiftAwareScaling` with mode="set".

        Args:
            data: Data of the new kind; targets are not used.
            batch_size: Rows a batch, where `data` is an array.

        Raises:
            BadInput: No calibrator that follows unlabelled data.
        """
        if not any(calibrator.can_adapt for calibrator in self.calibrators):
            raise BadInput(
                "no calibrator follows unlabelled data; calibrate with PriorCorrection() or ShiftAwareScaling('set') first"
            )
        whole: list[Any] = list(self.calibrators)
        try:
            for place, calibrator in enumerate(whole):
                if calibrator.can_adapt:
                    # What this one would be given: the answers of those before it.
                    self.calibrators = nn.ModuleList(whole[:place]).eval()
                    calibrator.adapt(self.predict(data, batch_size=batch_size))
        finally:
            self.calibrators = nn.ModuleList(whole).eval()
        make_buffers_changeable(self.calibrators)
        return self

    def _under_shifts(self, data: Any, chosen: Sequence[Calibrator], batch_size: int | None) -> list[Predictive]:
        """Predictions for the data under each shift that a calibrator asks for."""
        asked = [calibrator for calibrator in chosen if calibrator.shifts is not None]
        if not asked:
            return []
        if len(asked) > 1:
            raise BadInput(f"{len(asked)} calibrators ask for shifts; one is enough")
        if is_one_shot(data):
            raise BadInput("data are passed through many shifts, and can be read once only; hand in a loader or arrays")
        draws = any(calibrator.acts_on == "draws" for calibrator in chosen)
        shifts = chosen_shifts(asked[0].shifts, self.seed)
        return [
            self.predict_with_targets(
                data, batch_size=batch_size, keep_draws=draws, transform=shifting(shift, self.seed)
            )[0]
            for shift in shifts
        ]

    def fit(
        self,
        data: Any,
        *,
        epochs: int,
        validation: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        precision: str | None = None,
        gradient_clip: float | None = None,
        patience: int | None = None,
        checkpoint: str | Path | None = None,
        progress: bool | None = None,
        batch_size: int | None = None,
    ) -> "History":
        """Train the network (and what the likelihood learns) on `data`; the loop is `bayesguard.training.fit`.

        Args:
            data: Training data: a DataLoader, a re-iterable of batches, or a pair of arrays (shuffled each epoch).
            epochs: Passes over the data.
            validation: Held-out data; its NLL in nats is recorded after each epoch.
            optimizer: `parameters -> Optimizer`, e.g. `functools.partial(torch.optim.SGD, lr=0.1)`; None for Adam.
            scheduler: `optimizer -> LRScheduler`, stepped once an epoch.
            precision: None, "bfloat16" or "float16": the dtype of autocast.
            gradient_clip: Largest norm of the gradient.
            patience: Stop after this many epochs without a better validation NLL, and keep the best weights.
            checkpoint: File written after each epoch; where it exists, training goes on from it to the same bits.
            progress: True for a progress bar.
            batch_size: Rows a batch, where `data` is a pair of arrays; None for 256.

        Calibrators that were fitted to the network as it was are dropped.
        """
        from bayesguard.training import fit

        def objective(batch: Batch, num_data: int) -> Tensor:
            return self.loss(join_inputs(batch), batch.targets, num_data=num_data)  # type: ignore[arg-type]

        with self.calibration_dropped():
            return fit(
                self,
                objective,
                data,
                epochs=epochs,
                validation=validation,
                validation_loss=self.validation_loss,
                optimizer=optimizer,
                scheduler=scheduler,
                precision=precision,
                gradient_clip=gradient_clip,
                patience=patience,
                checkpoint=checkpoint,
                progress=progress,
                seed=self.seed,
                input_key=self.input_key,
                target_key=self.target_key,
                batch_size=batch_size,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        start = f"{prefix}calibrators."
        saved = len({key.removeprefix(start).split(".")[0] for key in state_dict if key.startswith(start)})
        _, strict, *_, messages = rest
        if strict and saved > len(self.calibrators):
            messages.append(
                f"the state has {saved} calibrators and this predictor {len(self.calibrators)}: before loading, append "
                "new ones of the same kinds, as predictor.calibrators.append(bayesguard.calibration.TemperatureScaling())"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Copies and pickles hold calibrators of their own; a shallow copy holds somebody else's.
        calibrators: Any = self.calibrators
        for calibrator in calibrators:
            if _user_of(calibrator) is None:
                _USERS[calibrator] = weakref.ref(self)

    def forget_calibration(self) -> None:
        """Drop the calibrators: what was fitted to other weights says nothing about these."""
        self.calibrators = nn.ModuleList().eval()

    @contextmanager
    def calibration_dropped(self) -> Iterator[None]:
        """Train in a block without calibrators; an error before any weight changed gives them back."""
        before = self.calibrators
        self.forget_calibration()
        kept = copies([*self.parameters(), *self.buffers()]) if before else []
        try:
            yield
        except BaseException:
            if before and same_numbers(kept, [*self.parameters(), *self.buffers()]):
                self.calibrators = before
            raise

    @torch.no_grad()
    def validation_loss(self, data: Any, batch_size: int | None = None) -> float:
        """Return the mean NLL per example, in nats, of the network's plain outputs (no draws, no calibration)."""
        total, rows = 0.0, 0
        for batch in self._batches(data, batch_size):
            if batch.targets is None:
                raise BadInput("data has no targets; batches must be (inputs, targets)")
            # Data may be views of what was given, and are read again in the next epoch.
            outputs = Forward(self.network, batch.inputs, batch.kwargs, self.output, copies=True)()
            total -= self.likelihood.log_prob(outputs, batch.targets).double().sum().item()
            rows += len(outputs)
        return total / rows

    def mixture_loss(self, data: Any, batch_size: int | None = None) -> float:
        """Return the mean NLL per example, in nats, of the mixture over eight draws (no calibration)."""
        draws = min(_VALIDATION_DRAWS, self._samples(None))
        predictive, targets = self.predict_with_targets(data, batch_size=batch_size, num_samples=draws)
        return -predictive.log_prob(targets).double().sum().item() / len(targets)

    # How it is done.

    @property
    def _device(self) -> torch.device:
        tensor = next((tensor for tensor in (*self.parameters(), *self.buffers())), None)
        return torch.device("cpu") if tensor is None else tensor.device

    def _samples(self, num_samples: int | None) -> int:
        return self.num_samples if num_samples is None else check_count(num_samples, "num_samples")

    def _seed(self, seed: int | None) -> int:
        return self.seed if seed is None else check_count(seed, "seed", minimum=0)

    def _prepare(self, inputs: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turn inputs into plain tensors like the parameters, after checking that the network is ready."""
        check_evaluating(self.network)

        def convert(value: Any) -> Any:
            if not isinstance(value, np.ndarray):
                # A tensor made in inference mode could not be changed in place by the network's first layer.
                return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
            tensor = torch.from_numpy(np.ascontiguousarray(value))
            reference = next(self.network.parameters(), None)
            dtype = reference.dtype if reference is not None and tensor.is_floating_point() else tensor.dtype
            return tensor.to(self._device, dtype)

        return tuple(map(convert, inputs)), {name: convert(value) for name, value in kwargs.items()}

    def _draws(
        self,
        num_samples: int | None,
        seed: int | None,
        tolerance: float | None,
        max_samples: int | None,
        keep: bool | None,
    ) -> "_Draws":
        """Check how to draw; `keep` None keeps the draws where they can be."""
        samples, seed = self._samples(num_samples), self._seed(seed)
        if tolerance is None:
            if max_samples is not None:
                raise BadInput("max_samples bounds the draws that a tolerance= asks for; without one use num_samples=")
            return _Draws(samples, seed, keep is None or keep, None)
        if keep:
            raise BadInput("keep_draws=True needs as many draws for each example; leave out tolerance= or keep_draws=")
        if self.is_exact or not self.can_continue:
            why = "its answers have no Monte-Carlo error" if self.is_exact else "its draws cannot be continued"
            raise BadInput(f"tolerance= is not for {type(self).__name__}: {why}; leave it out")
        return _Draws(samples, seed, False, check_stopping(tolerance, max_samples, samples, self.draws_per_block))

    def _answer(self, inputs: Iterable[Any], kwargs: Mapping[str, Any], draws: "_Draws", offset: int) -> Predictive:
        """One predictive of all the draws of a batch, before calibrators of the mixture."""
        positional, keywords = self._prepare(inputs, kwargs)
        if draws.stopping is None:
            settings = {"num_samples": draws.num_samples, "seed": draws.seed, "offset": offset}
            return with_one_look(lambda: collect(self.predictives(*positional, **settings, **keywords), draws.keep))

        def continued(forward: Forward, first: int, count: int) -> Iterator[Predictive]:
            more = {"num_samples": count, "seed": draws.seed, "offset": offset}
            more |= {"first_draw": first, "draws_per_chunk": step}
            return map(self._predictive, self.output_chunks(*forward.inputs, **more, **forward.kwargs))

        step = draws.stopping.step
        forward = Forward(self.network, positional, keywords, self.output)
        return draw_until(forward, continued, draws.stopping, drop_rows=not self.is_positional)

    def _predictive(self, outputs: Tensor, groups: Tensor | None = None) -> Predictive:
        predictive = self.likelihood.predictive(outputs, exact=self.is_exact)
        return self._calibrated(predictive if groups is None else predictive._grouped(groups), "draws")

    def _calibrated(self, predictive: Predictive, stage: str) -> Predictive:
        # Not `self.calibrators`, which torch looks for in three places; this is asked twice in a prediction.
        held: Any = self._modules["calibrators"]
        for calibrator in held._modules.values():
            if calibrator.acts_on == stage:
                predictive = calibrator(predictive)
        return predictive

    def _batches(self, data: Any, batch_size: int | None) -> Iterator[Batch]:
        reference = next(self.network.parameters(), None)
        start = partial(
            batches,
            data,
            batch_size=batch_size,
            input_key=self.input_key,
            target_key=self.target_key,
            numpy_dtype=None if reference is None else reference.dtype,
        )
        draws_nothing = isinstance(data, (tuple, list, Tensor, np.ndarray))
        return on_device(start() if draws_nothing else drawn_apart(start), self._device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _stream(
        self,
        data: Any,
        batch_size: int | None,
        draws: "_Draws",
        progress: bool | None,
        transform: Callable[[Batch, int], Batch] | None = None,
    ) -> tuple[Predictive, list[Tensor]]:
        gathering = Gathering(known_rows(data), "cpu")
        targets: list[Tensor] = []
        offset = 0
        for batch in with_progress(self._batches(data, batch_size), progress, "predict"):
            if transform is not None:
                batch = transform(batch, offset)
            predictive = self._answer(batch.inputs, batch.kwargs, draws, offset)
            if offset == 0 and draws.keep:
                check_memory(predictive, data)
            gathering.add(predictive)
            offset += len(predictive)
            if batch.targets is not None:
                targets.append(batch.targets.cpu())
        return self._calibrated(gathering.result(), "pooled"), targets

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}, seed={self.seed}"


def without_gradients() -> AbstractContextManager[Any]:
    """Switch gradients off for a block, and inference mode, whose tensors nobody could change later."""
    if not torch.is_inference_mode_enabled():
        return torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS
    both = ExitStack()
    both.enter_context(torch.inference_mode(False))
    both.enter_context(torch.no_grad())
    return both


_AS_IT_IS = nullcontext()


def _user_of(calibrator: Calibrator) -> "Predictor | None":
    reference = _USERS.get(calibrator)
    return None if reference is None else reference()


def _leave_copies(calibrators: Sequence[Calibrator]) -> None:
    """Give those who use calibrators that are to be fitted anew copies of them as they are."""
    for calibrator in calibrators:
        if (user := _user_of(calibrator)) is not None:
            own = (deepcopy(held) if held is calibrator else held for held in user.calibrators)
            user.calibrators = nn.ModuleList(own).eval()


def _refuse_bayesian_layers(network: nn.Module, method: str) -> None:
    """Raise BadInput where layers would draw weights anew at each call, unknown to the method."""
    if isinstance(network, Predictor):
        return
    if isinstance(network, BayesianLayer):
        raise BadInput(
            f"the network has Bayesian layers, which draw their weights at each call: {method} does not know of that. Use "
            "bayesguard.Variational(network), which takes them, or the network of plain layers"
        )
    for child in network.children():
        _refuse_bayesian_layers(child, method)


def with_progress(items: Iterator[Batch], progress: bool | None, description: str) -> Iterable[Batch]:
    """Show a progress bar where one is wanted."""
    if not progress:
        return items
    from tqdm import tqdm

    bar: Iterable[Batch] = tqdm(items, desc=description, leave=False)
    return bar


class _Draws(NamedTuple):
    """How a prediction draws: how often, from which seed, whether draws are kept, and when to stop early."""

    num_samples: int
    seed: int
    keep: bool
    stopping: Stopping | None
