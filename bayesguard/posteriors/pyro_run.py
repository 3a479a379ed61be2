"""Running a Pyro program once under one sample of its posterior, with a parameter store of its own."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesguard.checks import bad_row
from bayesguard.errors import BadInput, BadType, IdenticalDraws, NotFitted
from bayesguard.posteriors.pyro_program import NetworkProgram, WeightGuide, parameters_for_store
from bayesguard.pyro_scope import pyro_scope

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Run(NamedTuple):
    """One run of a program: the observed site's distribution, what the model returned, and its latent values by site."""

    distribution: Any
    returned: Any
    latents: dict[str, Tensor]


class PyroProgram(nn.Module):
    """A model with a guide or samples, and the parameters that both take from Pyro's store.

    Args:
        model: The Pyro model.
        guide: The Pyro guide; None with samples.
        samples: Samples of the posterior `{site: [S, *shape]}`; empty with a guide.
        observed: Name of the observed site.
        from_prior: Latent sites that the model draws for itself.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None,
        samples: Mapping[str, Tensor],
        observed: str,
        from_prior: Sequence[str],
    ) -> None:
        super().__init__()
        for part in (model, guide):
            _refuse_closures(part)
        self.model, self.guide = model, guide
        self.observed, self.from_prior = observed, frozenset(from_prior)
        self.sites = list(samples)
        for number, value in enumerate(samples.values()):
            self.register_buffer(f"samples_{number}", value.detach().clone())
        self.names: list[str] = []
        self.values = nn.ParameterList()
        self.constraints: list[Any] = []
        self._take_from_store()
        # Names under which modules register parameters of their own; found by running the program once.
        self._claimed: set[str] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PyroProgram":
        # An AutoGuide forgets its model, and the list that it is part of, when it is copied: the original, too.
        guides = _auto_guides(self)
        kept = [(guide._model, guide.master) for guide in guides]
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        # Transforms remember their last results, with graphs that cannot be copied.
        for tensor in _cached_tensors(self):
            memo[id(tensor)] = tensor.detach().clone()
        try:
            made.__dict__.update(deepcopy(self.__dict__, memo))
        finally:
            for guide, (model, master) in zip(guides, kept, strict=True):
                guide._model, guide.master = model, master
        for guide, (model, _) in zip(_auto_guides(made), kept, strict=True):
            guide._model = deepcopy(model, memo)
        return made

    def _take_from_store(self) -> None:
        """Copy the parameters of the user's store that are not those of the program's own modules."""
        import pyro

        state = pyro.get_param_store().get_state()
        own = set(map(id, self.parameters()))
        for name, value in state["params"].items():
            if id(value) not in own:
                self._add(name, value, state["constraints"][name])

    def _add(self, name: str, value: Tensor, constraint: Any) -> None:
        self.names.append(name)
        self.values.append(nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
        self.constraints.append(constraint)

    @contextmanager
    def store(self, *, adopt: bool = False) -> Iterator[None]:
        """Run Pyro calls on the program's own parameters.

        Args:
            adopt: Take parameters that the program makes in the block into its own, to train them.

        Raises:
            NotFitted: The program made a parameter that it did not have: one that was never trained.
        """
        import pyro

        claimed = self._claimed or set()
        kept = [k for k, name in enumerate(self.names) if name not in claimed]
        params = {**self._registered(), **{self.names[k]: self.values[k] for k in kept}}
        with pyro_scope(params, {self.names[k]: self.constraints[k] for k in kept}):
            yield
            self._look_for_new(pyro.get_param_store().get_state(), adopt)

    def _registered(self) -> dict[str, Tensor]:
        """Our own programs' parameters: in the store already, they are used whatever their memory format is."""
        programs = [part for part in (self.model, self.guide) if isinstance(part, (NetworkProgram, WeightGuide))]
        return {name: value for part in programs for name, value in parameters_for_store(part).items()}

    def _look_for_new(self, state: Any, adopt: bool) -> None:
        own = set(map(id, self.parameters()))
        new = [name for name, value in state["params"].items() if id(value) not in own]
        if new and not adopt:
            raise NotFitted(
                f"the program makes the parameters {', '.join(new)} anew, which were not in Pyro's store when the predictor "
                "was made: train first (or call fit), and make the predictor after that"
            )
        inside = [name for name in new if "$$$" in name]
        if inside:
            raise BadInput(
                f"a function calls pyro.module, whose parameters ({', '.join(inside)}) cannot be trained here; write the "
                "program as a torch.nn.Module or PyroModule that has the network, or train with pyro.infer.SVI first"
            )
        for name in new:
            self._add(name, state["params"][name], state["constraints"][name])

    @property
    def is_primed(self) -> bool:
        """Whether the program has been run: see `prime`."""
        return self._claimed is not None

    def prime(self, arguments: Arguments, with_targets: Arguments, *, adopt: bool = False) -> None:
        """Let a guide make its parameters, and learn which names modules claim in the store; once."""
        import pyro

        if not adopt:
            self._check_trained()
        with torch.no_grad(), _bad_rows_named(arguments):
            # In an empty store, so that nothing of the same name in the user's is written into the modules.
            with pyro_scope(self._registered()):
                if self.guide is not None:
                    self.guide(*with_targets[0], **with_targets[1])
                with _watching(self.observed):
                    self.model(*arguments[0], **arguments[1])
                own = set(map(id, self.parameters()))
                state = pyro.get_param_store().get_state()
                claimed = {name for name, value in state["params"].items() if id(value) in own}
            self._claimed = claimed
            # What the guide has made is in training mode, whatever the rest is in.
            for part in self.children():
                part.train(self.training)
            with self.store(adopt=adopt):
                self.run(arguments, 0)

    @torch.no_grad()
    def targets_for(self, arguments: Arguments) -> Tensor:
        """Return targets that the model draws from its prior for given inputs."""
        from pyro import poutine

        with pyro_scope():
            trace = poutine.trace(self.model).get_trace(*arguments[0], **arguments[1])
        site: Any = trace.nodes[self.observed]
        targets: Tensor = site["value"]
        return targets

    @property
    def num_kept(self) -> int:
        """How many samples of the posterior there are; 0 with a guide."""
        return len(self.get_buffer("samples_0")) if self.sites else 0

    def run(self, arguments: Arguments, index: int) -> Run:
        """Run the model under one sample of the posterior: number `index` of the samples, or one of the guide's.

        To be called inside of `store()`. Random numbers come from torch's default generator.
        """
        from pyro import poutine

        inputs, kwargs = arguments
        if self.guide is None:
            given = {site: self.get_buffer(f"samples_{k}")[index] for k, site in enumerate(self.sites)}
            model = poutine.condition(self.model, data=given)
        else:
            self._check_trained()
            guided = poutine.trace(self.guide).get_trace(*inputs, **kwargs)
            given = _latents_of_guide(guided)
            model = poutine.replay(self.model, trace=guided)
        with _bad_rows_named(arguments), _watching(self.observed, given):
            trace = poutine.trace(model).get_trace(*inputs, **kwargs)
        self._check_sites(trace, given)
        site: Any = trace.nodes[self.observed]
        shared = {frame.name for frame in site["cond_indep_stack"]}
        sites: dict[str, Any] = {name: trace.nodes[name] for name in given}
        latents = {
            name: node["value"].detach()
            for name, node in sites.items()
            if not shared & {frame.name for frame in node["cond_indep_stack"]}
        }
        return Run(site["fn"], trace.nodes["_RETURN"]["value"], latents)

    def _check_trained(self) -> None:
        for guide in _auto_guides(self):
            if guide.prototype_trace is None:
                raise NotFitted(
                    f"the {type(guide).__name__} was never trained; call fit(data) first, or pyro.infer.SVI"
                )

    def _check_sites(self, trace: Any, given: Mapping[str, Any]) -> None:
        """Raise where posterior and model do not have the same sites: Pyro would quietly draw from the prior."""
        sites = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
        kind = "guide" if self.guide is not None else "posterior"
        if self.observed not in sites:
            raise BadInput(f"the model has no site {self.observed!r}; observed= must be one of {', '.join(sites)}")
        if self.observed in given:
            raise BadInput(
                f"the {kind} has the observed site {self.observed!r}: an AutoGuide that was first called without targets "
                "takes it for a latent one; call it with them, or call fit"
            )
        stray = [name for name in given if name not in sites or sites[name]["infer"].get("_deterministic")]
        if stray:
            raise BadInput(
                f"the {kind} has {', '.join(stray)}, which the model does not draw; it has {', '.join(sites)}"
            )
        latent = [name for name, node in sites.items() if name in given or _is_latent(node)]
        missing = [name for name in latent if name not in {*given, *self.from_prior, self.observed}]
        if missing:
            raise BadInput(
                f"the {kind} has nothing for {', '.join(missing)}, which would be drawn from the prior; add it, or name it in "
                "from_prior= if it is noise of each example"
            )
        if latent in ([], [self.observed]):
            raise IdenticalDraws("the model has no latent site, so every draw would be the same; use bg.Deterministic")

    def extra_repr(self) -> str:
        return f"observed={self.observed!r}, parameters from the store: {', '.join(self.names) or 'none'}"


def _is_latent(node: Any) -> bool:
    from pyro.poutine.util import site_is_subsample

    return not node["is_observed"] and not site_is_subsample(node)


def _latents_of_guide(trace: Any) -> dict[str, Tensor]:
    return {
        name: node["value"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and _is_latent(node) and not node["infer"].get("is_auxiliary")
    }


def _watching(observed: str, given: Iterable[str] = ()) -> Any:
    """Return a handler under which the observed site draws nothing, and samples of another shape than the model's raise."""
    from pyro.poutine.messenger import Messenger

    class Watching(Messenger):
        def _pyro_sample(self, message: Any) -> None:
            if message["name"] == observed and message["value"] is None:
                # Only its distribution is wanted.
                message["value"] = torch.zeros(message["fn"].shape())
                message["done"] = True

        def _pyro_post_sample(self, message: Any) -> None:
            if message["name"] in names:
                want, got = message["fn"].shape(), message["value"].shape
                if want != got:
                    raise BadInput(
                        f"a sample of {message['name']!r} has shape {tuple(got)}, the model draws {tuple(want)}"
                    )

    names = set(given)
    return Watching()


def scaled(program: Callable[..., Any], observed: str, rows: int, num_data: int) -> Callable[..., Any]:
    """Return a model or guide in which what belongs to single examples counts for `num_data` of them, not for `rows`.

    The plate of the observed site says what that is. A program that scales by itself (a plate with a subsample) is left.

    Raises:
        BadInput: The program scales to another number of rows.
    """
    from pyro.poutine.messenger import Messenger

    class Scaling(Messenger):
        def _pyro_sample(self, message: Any) -> None:
            plates = [frame for frame in message["cond_indep_stack"] if frame.vectorized and frame.size == rows]
            if not plates and message["name"] != observed:
                return
            scale = float(message["scale"])
            if abs(scale * rows - num_data) <= 1e-6 * num_data:
                return
            if scale != 1:
                raise BadInput(
                    f"the program scales {message['name']!r} by {scale:g}: {rows} rows stand for {scale * rows:g}, and "
                    f"num_data is {num_data}"
                )
            message["scale"] = message["scale"] * (num_data / rows)

    return Scaling()(program)


def take_apart(posterior: Any) -> tuple[Callable[..., Any] | None, dict[str, Tensor], int]:
    """Return the guide, or the samples and of how many chains they are.

    Raises:
        BadInput: Samples that are no tensors `[S, ...]` of one length.
        BadType: Neither a guide, nor samples, nor an MCMC run.
    """
    if isinstance(posterior, Mapping):
        lengths = {name: len(value) for name, value in posterior.items() if isinstance(value, Tensor) and value.dim()}
        if not posterior or len(lengths) < len(posterior) or len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise BadInput(f"posterior samples must be tensors [S, ...] of one S for each site, got {lengths}")
        return None, dict(posterior), 1
    if hasattr(posterior, "get_samples"):
        grouped = posterior.get_samples(group_by_chain=True)
        chains = len(next(iter(grouped.values())))
        return None, {name: value.reshape(-1, *value.shape[2:]) for name, value in grouped.items()}, chains
    if callable(posterior):
        return posterior, {}, 1
    raise BadType(
        f"posterior must be a guide, samples {{site: tensor}} or a pyro.infer.MCMC, got {type(posterior).__name__}"
    )


def _cached_tensors(program: nn.Module) -> list[Tensor]:
    found = []
    for module in program.modules():
        for value in vars(module).values():
            values = value if isinstance(value, tuple) else (value,)
            found += [tensor for tensor in values if isinstance(tensor, Tensor) and not tensor.is_leaf]
    return found


def _auto_guides(program: nn.Module) -> list[Any]:
    from pyro.infer.autoguide import AutoGuide

    return [module for module in program.modules() if isinstance(module, AutoGuide)]


def _refuse_closures(program: Any) -> None:
    """Raise where a function uses a PyroModule from outside: it could not be copied, and Pyro would write into it."""
    from pyro.nn import PyroModule

    if not inspect.isfunction(program):
        return
    outside = inspect.getclosurevars(program)
    found = [name for name, value in {**outside.globals, **outside.nonlocals}.items() if isinstance(value, PyroModule)]
    if found:
        raise BadInput(
            f"{program.__name__} uses the PyroModule {found[0]!r} from outside, of which the predictor would have no copy; "
            "make the program a PyroModule that contains it"
        )


@contextmanager
def _bad_rows_named(arguments: Arguments) -> Iterator[None]:
    """Raise BadInput with the row where Pyro's refusal comes from an input that is not finite."""
    try:
        yield
    except ValueError as error:
        for value in (*arguments[0], *arguments[1].values()):
            if isinstance(value, Tensor) and value.dim() and not bool(value.isfinite().all()):
                row = bad_row(~value.isfinite())
                raise BadInput(
                    f"inputs are not finite in row {row}, and the program refuses what comes of it"
                ) from error
        raise
