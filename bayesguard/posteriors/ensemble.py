"""Deep ensembles: networks trained from different starts, and the mixture of what they say.

B. Lakshminarayanan, A. Pritzel and C. Blundell (2017). Simple and scalable predictive uncertainty estimation using
deep ensembles. NeurIPS. The prediction is the mixture of the members' distributions (section 2.4), never their
averaged parameters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import torch
from torch import Tensor, nn

from bayesguard.adversarial import adversarial_loss
from bayesguard.checks import check_count
from bayesguard.data import Batch, bootstrap, copied, join_inputs, split_inputs
from bayesguard.errors import BadFile, BadInput, BadType
from bayesguard.likelihoods import Bernoulli, Categorical, HeteroscedasticGaussian, Likelihood, Poisson, StudentT
from bayesguard.looks import with_one_look
from bayesguard.posteriors.deterministic import Deterministic
from bayesguard.posteriors.ensemble_prediction import MemberOutputs, check_same_shape
from bayesguard.predictive import Predictive
from bayesguard.predictive.parts import collect
from bayesguard.predictor import Options, Part, Predictor, without_gradients
from bayesguard.predictor_checks import check_likelihood
from bayesguard.sampling import derive_seed, seeded_default_generators
from bayesguard.sampling.choice import cost_line, memory_line

if TYPE_CHECKING:
    from bayesguard.history import History

# Likelihoods without parameters or buffers, and the one setting on which their predictive depends.
_STATELESS: dict[type[Likelihood], str | None] = {
    Categorical: "class_dim",
    Bernoulli: None,
    HeteroscedasticGaussian: None,
    StudentT: "df",
    Poisson: None,
}

_NUM_MEMBERS = 5

Members = Sequence[nn.Module] | Callable[[int], nn.Module]


class DeepEnsemble(Predictor):
    """The equal-weight mixture of several networks, or of several predictors (an ensemble of MC-dropout networks).

    Args:
        members: A list of trained networks or predictors, or a factory `seed -> network` called once a member, on
            random streams of the member's own.
        likelihood: What the outputs say about the target; each member learns its own copy. None for
            `likelihoods.Categorical()`; members that are predictors keep theirs.
        num_members: Members that a factory makes; None for five.
        bootstrap: Train each member on a resample of the data of the same size.
        adversarial_epsilon: Step of the adversarial examples that smooth the training (section 2.3 of the paper,
            1 % of each feature's range there): a number or a tensor per feature; None for none.
        joint: Train the members in one vectorised pass: "auto" where they are small and alike, True, or False.
        n_jobs: Members trained at a time, each in a process of joblib's.
        options: `output`, `input_key`, `target_key`, `copy`, `seed`: see `Predictor`.

    Raises:
        BadInput: No members, two of them with identical parameters, or a list of another length than `num_members`.

    Examples:
        >>> import torch
        >>> ensemble = DeepEnsemble(lambda seed: torch.nn.Linear(4, 3), num_members=5)
        >>> ensemble(torch.ones(2, 4)).num_samples
        5
    """

    def __init__(
        self,
        members: Members,
        likelihood: Likelihood | None = None,
        *,
        num_members: int | None = None,
        bootstrap: bool = False,
        adversarial_epsilon: float | Tensor | None = None,
        joint: bool | Literal["auto"] = "auto",
        n_jobs: int = 1,
        **options: Unpack[Options],
    ) -> None:
        seed = options.get("seed", 0)
        networks = _make_networks(members, num_members, seed)
        wrapped = [_wrap(network, likelihood, options, index) for index, network in enumerate(networks)]
        _check_different(wrapped)
        # The members are copies already, where copies were asked for.
        owned, options["copy"] = options.get("copy", True), False
        super().__init__(nn.ModuleList(wrapped), wrapped[0].likelihood, num_samples=len(wrapped), **options)
        self.bootstrap, self.adversarial_epsilon = bootstrap, adversarial_epsilon
        self.joint, self.n_jobs = joint, check_count(n_jobs, "n_jobs")
        self._member_outputs = MemberOutputs(owned)
        self.network.training = False
        # The members' likelihoods speak for themselves; a second copy here would be trained by nobody.
        self.likelihood.requires_grad_(False)

    @classmethod
    def from_checkpoints(
        cls,
        paths: Sequence[str | Path],
        network: nn.Module | Callable[[], nn.Module],
        likelihood: Likelihood | None = None,
        **options: Any,
    ) -> Self:
        """Build an ensemble from state dicts saved with safetensors, one file a member.

        Args:
            paths: Files written by `safetensors.torch.save_file(network.state_dict(), path)`.
            network: The architecture, or a factory of it.
            likelihood: As for the class.
            options: As for the class.

        Raises:
            BadFile: A file that is damaged, or of another network.
        """
        if isinstance(paths, (str, Path)):
            raise BadType(f"paths must be a list of files, one a member, got {str(paths)!r}; write [{str(paths)!r}]")
        return cls([_load_member(path, network) for path in paths], likelihood, **options)

    @property
    def members(self) -> list[Predictor]:
        """The members, each a predictor."""
        held = self.network._modules.values()
        # The second question is one to an abstract class, which takes long.
        return [member for member in held if type(member) is Deterministic or isinstance(member, Predictor)]

    def loss(self, inputs: Any, targets: Tensor, *, num_data: int) -> Tensor:
        """Return the sum of the members' objectives on one batch: each member gets its own gradient."""
        # A network may write over its inputs.
        losses = [self.member_loss(member, copied(inputs), targets, num_data) for member in self.members]
        return torch.stack(losses).sum()

    def output_chunks(
        self, *inputs: Any, num_samples: int, seed: int, offset: int = 0, **kwargs: Any
    ) -> Iterator[Tensor]:
        """Yield the members' raw outputs, `num_samples` draws in all where they are random."""
        outputs = self._member_outputs(self.members, inputs, kwargs)
        if outputs is not None:
            yield outputs
            return
        first: Tensor | None = None
        for index, member in enumerate(self.members):
            own = derive_seed(seed, "member", index)
            samples = self._member_samples(member, num_samples)
            for outputs in member.output_chunks(*inputs, num_samples=samples, seed=own, offset=offset, **kwargs):
                first = outputs if first is None else first
                check_same_shape(first, outputs, index)
                yield outputs

    def predictives(self, *inputs: Any, num_samples: int, seed: int, offset: int = 0, **kwargs: Any) -> Iterator[Part]:
        """Yield the members' predictives, each member with an equal share of the mixture."""
        members = self.members
        outputs = self._member_outputs(members, inputs, kwargs)
        if outputs is not None:
            yield from self._parts_of(members, outputs)
            return
        for index, member in enumerate(members):
            own = derive_seed(seed, "member", index)
            samples = self._member_samples(member, num_samples)
            for part in member.predictives(*inputs, num_samples=samples, seed=own, offset=offset, **kwargs):
                yield Part(self._calibrated(part.predictive, "draws"), part.share / len(members), index)

    def _parts_of(self, members: list[Predictor], outputs: Tensor) -> Iterator[Part]:
        """Yield the predictives of the members' outputs `[M, N, ...]`: one for all where they read them alike."""
        if _read_alike(members):
            yield Part(self._calibrated(members[0].likelihood.predictive(outputs), "draws"), 1.0)
            return
        for index, (member, own) in enumerate(zip(members, outputs, strict=True)):
            predictive = member.likelihood.predictive(own.unsqueeze(0), exact=True)
            predictive = member._calibrated(member._calibrated(predictive, "draws"), "pooled")
            yield Part(self._calibrated(predictive, "draws"), 1 / len(members), index)

    def draw_outputs(
        self, *inputs: Any, num_samples: int | None = None, seed: int | None = None, **kwargs: Any
    ) -> Tensor:
        self._samples(num_samples), self._seed(seed)
        with without_gradients():
            outputs = self._member_outputs.batched(self.members, inputs, kwargs)
        if outputs is None:
            return super().draw_outputs(*inputs, num_samples=num_samples, seed=seed, **kwargs)
        return outputs

    def _answer(self, inputs: Iterable[Any], kwargs: Mapping[str, Any], draws: Any, offset: int) -> Predictive:
        inputs = tuple(inputs)
        # Members of a batched product that is in use are known to be in eval mode.
        members = self.members
        outputs = self._member_outputs.batched(members, inputs, kwargs)
        if outputs is None or draws.stopping is not None:
            return super()._answer(inputs, kwargs, draws, offset)
        if draws.keep and _read_alike(members):
            # Not `.likelihood`, as in `_calibrated`.
            likelihood: Any = members[0]._modules["likelihood"]
            return self._calibrated(likelihood.predictive(outputs), "draws")
        return with_one_look(lambda: collect(self._parts_of(members, outputs), draws.keep))

    @property
    def num_chains(self) -> int:
        """The number of members."""
        return len(self.members)

    def weight_draws(self, num_samples: int | None = None, seed: int | None = None) -> dict[str, Tensor]:
        """Return the members' parameters by name, `[M, *shape]`; nothing where they differ, or are random themselves."""
        named = [dict(member.network.named_parameters()) for member in self.members]
        shapes = [{name: p.shape for name, p in own.items()} for own in named]
        if any(not member.is_exact for member in self.members) or any(own != shapes[0] for own in shapes):
            return {}
        return {name: torch.stack([own[name].detach() for own in named]) for name in named[0]}

    def draw(self, seed: int) -> nn.Module:
        """Return one function of one member, both chosen by the seed."""
        index = derive_seed(seed, "which member") % len(self.members)
        return self.members[index].draw(seed)

    @property
    def strategy(self) -> str:
        plan = self._member_outputs.last
        if plan is not None and plan.way in ("batched", "vmap"):
            how = "as one batched product" if plan.way == "batched" else "at once under vmap"
            return f"{len(self.members)} members {how} ({plan.reason})"
        if plan is not None and plan.reason:
            order = ", channels last in memory" if plan.way == "channels last" else ""
            return f"{len(self.members)} members one after another{order} ({plan.reason})"
        strategies = dict.fromkeys(member.strategy for member in self.members)
        return f"{len(self.members)} members one after another, each: {', '.join(strategies)}"

    def explain(self) -> str:
        """Say how the last prediction was computed and why; where ways were timed, what it costs and what memory it takes."""
        plan, lines = self._member_outputs.last, [super().explain()]
        if plan is not None and plan.plain_pass is not None:
            lines.append(cost_line(f"{len(self.members)} members", plan.seconds, plan.plain_pass))
            lines.append(memory_line(plan.memory))
        return "\n".join(lines)

    def fit(self, data: Any, **settings: Any) -> "History":
        """Train every member; arguments as in `Predictor.fit`, and a checkpoint file a member.

        The members are trained in one vectorised pass where that pays, otherwise one after another, or `n_jobs` at
        a time. Their histories are in the result, `history.members`.
        """
        from bayesguard.posteriors.ensemble_training import fit_members

        with ExitStack() as dropped:
            for predictor in (self, *self.members):
                dropped.enter_context(predictor.calibration_dropped())
            return fit_members(self, data, **settings)

    def member_data(self, data: Any, index: int) -> Any:
        """Return what member number `index` is trained on."""
        return bootstrap(data, derive_seed(self.seed, "bootstrap", index)) if self.bootstrap else data

    def member_loss(self, member: Predictor, inputs: Any, targets: Tensor, num_data: int) -> Tensor:
        """Return one member's objective on one batch, with its adversarial twin where that was asked for."""

        def loss(batch: Batch) -> Tensor:
            return member.loss(join_inputs(batch), batch.targets, num_data=num_data)  # type: ignore[arg-type]

        batch = Batch(*split_inputs(inputs), targets)
        if self.adversarial_epsilon is None:
            return loss(batch)
        return adversarial_loss(loss, batch, self.adversarial_epsilon)

    def validation_loss(self, data: Any, batch_size: int | None = None) -> float:
        """Return the mean over members of their NLL per example, in nats."""
        return sum(member.validation_loss(data, batch_size) for member in self.members) / len(self.members)

    def _member_samples(self, member: Predictor, num_samples: int) -> int:
        # The ensemble's own number counts its members; a random member then uses its own number of draws.
        return member.num_samples if num_samples == self.num_samples else max(1, num_samples // len(self.members))


def _make_networks(members: Members, num_members: int | None, seed: int) -> list[nn.Module]:
    if isinstance(members, nn.Module) and not isinstance(members, nn.ModuleList):
        raise BadType(
            "members is one network; an ensemble needs a list of networks, or a factory `seed -> network` "
            "(copies of one network would all be the same)"
        )
    if callable(members) and not isinstance(members, nn.ModuleList):
        count = check_count(_NUM_MEMBERS if num_members is None else num_members, "num_members")
        return [_make_network(members, derive_seed(seed, "member", index) % 2**31) for index in range(count)]
    networks = list(members)
    if not networks:
        raise BadInput("members is empty; an ensemble needs at least one network")
    if num_members is not None and num_members != len(networks):
        raise BadInput(
            f"num_members={num_members} was asked for, and members is a list of {len(networks)}: leave num_members out, or "
            "hand in a factory `seed -> network`"
        )
    return networks


def _make_network(factory: Callable[[int], nn.Module], seed: int) -> nn.Module:
    # Most factories initialise from torch's default generator and ignore the seed that they are given.
    with seeded_default_generators(torch.device("cpu"), seed):
        try:
            return factory(seed)
        except TypeError as error:
            # Only of the call itself: an error from within has a frame more.
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise
            raise BadType(f"members must be a factory that takes a seed, as `lambda seed: make()`: {error}") from error


def _wrap(network: nn.Module, likelihood: Likelihood | None, options: Options, index: int) -> Predictor:
    if isinstance(network, Predictor):
        if likelihood is not None:
            raise BadInput(f"members[{index}] is a predictor with a likelihood of its own; leave likelihood out")
        return deepcopy(network) if options.get("copy", True) else network
    if not isinstance(network, nn.Module):
        raise BadType(f"members[{index}] must be a torch.nn.Module or a predictor, got {type(network).__name__}")
    return Deterministic(network, check_likelihood(likelihood), **options)


def _check_different(members: Sequence[Predictor]) -> None:
    """Refuse members that are copies of one another: their disagreement would be a confident zero."""
    states = [
        [tensor for tensor in member.network.state_dict().values() if isinstance(tensor, Tensor)] for member in members
    ]
    for later in range(len(states)):
        for earlier in range(later):
            if states[later] and _same(states[earlier], states[later]):
                raise BadInput(
                    f"members {earlier} and {later} have identical parameters; train each from an initialisation of "
                    "its own, or pass a factory `seed -> network`"
                )


def _read_alike(members: Sequence[Predictor]) -> bool:
    """Whether the members' likelihoods are one, which learns nothing, and no member has a calibrator."""
    first: Any = members[0]._modules["likelihood"]
    kind = type(first)
    if kind not in _STATELESS:
        return False
    name = _STATELESS[kind]
    for member in members:
        held: Any = member._modules
        own = held["likelihood"]
        if type(own) is not kind or (name is not None and vars(own)[name] != vars(first)[name]):
            return False
        if held["calibrators"]._modules:  # len() of a list of modules is code in Python
            return False
    return True


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _load_member(path: str | Path, network: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise BadInput(
            f"checkpoint {str(path)!r} is not a .safetensors file; files that can run code are not read: load it "
            "yourself and save the state dict with safetensors.torch.save_file"
        )
    fresh = deepcopy(network) if isinstance(network, nn.Module) else network()
    try:
        fresh.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise BadFile(f"checkpoint {str(path)!r} is damaged or not of safetensors: {error}") from error
    except RuntimeError as error:
        raise BadFile(f"checkpoint {str(path)!r} belongs to another network: {error}") from error
    return fresh
