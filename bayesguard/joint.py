"""Training networks of one architecture in one vectorised pass: many small steps become one large one."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, optim
from torch.func import functional_call, stack_module_state, vmap
from torch.overrides import TorchFunctionMode

from bayesguard import likelihoods
from bayesguard.data import Batch, Data, join_inputs, map_leaves, to_device, with_copies
from bayesguard.errors import BadInput
from bayesguard.history import History
from bayesguard.predictor import Predictor
from bayesguard.sampling import seeded_default_generators
from bayesguard.sampling.agreement import first_line, rounding_of
from bayesguard.sampling.alike import same_values, why_not_alike
from bayesguard.sampling.batched_calls import Unbatchable
from bayesguard.sampling.members import TrainedBatch
from bayesguard.training import fit
from bayesguard.training_setup import OptimizerFactory, device_of, make_optimizer, modes_kept

_FEW_ROWS = 8

MemberLoss = Callable[[nn.Module, Batch, int], Tensor]

# Each number is updated from its own gradient alone: stacked members cannot feel one another.
_ELEMENTWISE = (
    optim.SGD,
    optim.ASGD,
    optim.Rprop,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
)


def member_loss(member: nn.Module, batch: Batch, num_data: int) -> Tensor:
    """Return `member.loss(inputs, targets, num_data=num_data)`."""
    join_inputs(batch)  # Refuses a batch with inputs of both kinds.
    inputs = batch.kwargs or (batch.inputs[0] if len(batch.inputs) == 1 else batch.inputs)
    value: Tensor = member.loss(inputs, batch.targets, num_data=num_data)  # type: ignore[operator]
    return value


class StackedMembers(nn.Module):
    """The parameters and buffers of M modules, stacked `[M, ...]` and trained as one module.

    Every member gets the gradient of its own loss, and random numbers of its own. The modules themselves are only
    read; `write_back` changes them.

    Args:
        modules: Of one architecture (`can_train_jointly` tells).
        loss: `(member, batch, num_data) -> Tensor`: the objective of one member, mean per example, in nats.
        are_alike: `why_not_alike` has just found nothing; False to look here.

    Raises:
        BadInput: If the modules cannot be stacked.
    """

    def __init__(
        self, modules: Sequence[nn.Module], loss: MemberLoss = member_loss, *, are_alike: bool = False
    ) -> None:
        super().__init__()
        if not are_alike and (reason := why_not_alike(modules) or _hooks_of_gradients(modules)):
            raise BadInput(f"the members cannot be trained jointly: {reason}; train them one after another")
        parameters, buffers = stack_module_state(list(modules))
        for name, parameter in parameters.items():
            self.register_parameter(_key(name), nn.Parameter(parameter.detach(), parameter.requires_grad))
        for name, buffer in buffers.items():
            self.register_buffer(_key(name), buffer)
        self._names = (list(parameters), list(buffers))
        # In a tuple, so that torch takes neither for a submodule. The copy is what functional_call borrows: were
        # it a live member, a second thread would find foreign weights in it.
        self._members = tuple(modules)
        self._skeleton = (_Objective(deepcopy(modules[0]), loss),)
        self.why_not_batched = _why_not_batched(modules, loss)
        self._batch: TrainedBatch | None = None
        self.is_compared = False

    @property
    def skeleton(self) -> nn.Module:
        """The copy of one of the modules whose code runs."""
        return self._skeleton[0]

    def loss(self, batch: Batch, num_data: int) -> Tensor:
        """Return the members' objectives on one batch, `[M]`: an objective for `bayesguard.training.fit`.

        The networks run as one batched product where `why_not_batched` is empty, under `vmap` where not.
        """
        if not self.why_not_batched and not self.is_compared:
            self.why_not_batched, self.is_compared = self._disagreement(batch, num_data), True
        return self._vmapped(batch, num_data) if self.why_not_batched else self._batched(batch, num_data)

    def _disagreement(self, batch: Batch, num_data: int) -> str:
        """Say how the batched losses of a few rows differ from the members' own; dropout rests meanwhile."""
        # functional_call leaves a module that is used under two names with numbers that it was lent.
        lent = deepcopy(self._skeleton[0])
        try:
            with torch.no_grad(), _NoDropout():
                got = self._batched(_few_rows(batch), num_data)
                own = [self._own_loss(lent, index, _few_rows(batch), num_data) for index in range(len(got))]
                want = torch.stack(own)
        except Unbatchable as error:
            return str(error)
        tolerance = rounding_of(want.dtype)
        same = torch.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
        return "" if same else "the batched losses differ from those of the members one by one"

    def _own_loss(self, objective: nn.Module, index: int, batch: Batch, num_data: int) -> Tensor:
        tensors = {f"member.{name}": getattr(self, _key(name))[index] for names in self._names for name in names}
        value: Tensor = functional_call(objective, tensors, (batch, num_data))[0]
        return value

    def _batched(self, batch: Batch, num_data: int) -> Tensor:
        member: Any = self._skeleton[0].member
        count = len(self._members)
        if batch.kwargs or len(batch.inputs) != 1 or batch.targets is None:
            raise Unbatchable("the network takes more than one input")
        if self._batch is None:
            stacked = {id(own): getattr(self, _key(name)) for name, own in member.named_parameters()}
            self._batch = TrainedBatch(member.network, stacked, count)
        outputs = self._batch(batch.inputs[0])
        targets = batch.targets.expand(count, *batch.targets.shape).flatten(0, 1)
        log_prob = member.likelihood.log_prob(outputs.flatten(0, 1), targets)
        return log_prob.reshape(count, -1).sum(1) / -max(1, batch.num_rows)

    def _vmapped(self, batch: Batch, num_data: int) -> Tensor:
        parameters, buffers = ({name: getattr(self, _key(name)) for name in names} for names in self._names)

        def objective(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            own = {f"member.{name}": tensor for name, tensor in (*parameters.items(), *buffers.items())}
            value: tuple[Tensor, dict[str, Tensor]] = functional_call(self._skeleton[0], own, (batch, num_data))
            return value

        with _FixedPadding():
            losses, after = vmap(objective, randomness="different")(parameters, buffers)
        for name, buffer in after.items():
            # Batch statistics changed in place are there already; a buffer that was replaced is put in its place.
            self._buffers[_key(name)] = buffer.detach()
        return losses

    def train(self, mode: bool = True) -> "StackedMembers":
        """Set the mode in which the members are trained; the modules themselves keep theirs."""
        super().train(mode)
        self._skeleton[0].train(mode)
        return self

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy parameters and buffers into the modules."""
        for index, member in enumerate(self._members):
            for name, tensor in (*member.named_parameters(), *member.named_buffers()):
                tensor.copy_(getattr(self, _key(name))[index])


class _NoDropout(TorchFunctionMode):
    """Makes dropout pass everything on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        return args[0] if func is nn.functional.dropout else func(*args, **(kwargs or {}))


class _FixedPadding(TorchFunctionMode):
    """Gives the padding row of a table no gradient.

    torch's vmap looks for it in the first member's table alone, where members look up rows of their own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func is not nn.functional.embedding:
            return outputs
        given = dict(zip(("input", "weight", "padding_idx"), args, strict=False)) | (kwargs or {})
        if (padding := given.get("padding_idx")) is None:
            return outputs
        is_padding = given["input"] == padding % given["weight"].shape[0]
        return torch.where(is_padding.unsqueeze(-1), outputs.detach(), outputs)


def _why_not_batched(modules: Sequence[nn.Module], loss: MemberLoss) -> str:
    """Return why the members' objective is not that of a predictor whose likelihood has nothing to learn."""
    first = modules[0]
    if loss is not member_loss or not isinstance(first, Predictor) or type(first).loss is not Predictor.loss:
        return "the objective is not the plain one of a predictor"
    if first.output is not None:
        return "a part of the network's output is used"
    if any(True for _ in (*first.likelihood.parameters(), *first.likelihood.buffers(), *first.network.buffers())):
        return "the network has buffers, or the likelihood something to learn"
    if type(first.likelihood).__module__ != likelihoods.__name__ or getattr(first.likelihood, "beta", None):
        return "the likelihood's loss is its own"
    if any(part._forward_hooks or part._forward_pre_hooks for part in first.modules()):
        return "the network has forward hooks"
    return ""


class _Objective(nn.Module):
    """A member's loss as a forward pass, with the buffers as they are after it."""

    def __init__(self, member: nn.Module, loss: MemberLoss) -> None:
        super().__init__()
        self.member = member
        self.loss_of = loss

    def forward(self, batch: Batch, num_data: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_of(self.member, batch, num_data), dict(self.member.named_buffers())


class Trial(NamedTuple):
    """Why members cannot be trained jointly (empty where they can), and whether as one batched product."""

    reason: str
    is_batched: bool


def can_train_jointly(
    modules: Sequence[nn.Module],
    batch: Batch | None = None,
    *,
    loss: MemberLoss = member_loss,
    optimizer: OptimizerFactory | optim.Optimizer | None = None,
) -> tuple[bool, str]:
    """Return whether `fit_jointly` gives what training one after another would, and why not.

    Args:
        modules: The members.
        batch: A batch to try the vectorised pass on, which alone shows whether every operation allows it.
        loss: As for `StackedMembers`.
        optimizer: As for `fit`: one that looks at whole tensors, such as LBFGS, would mix the members.

    Examples:
        >>> can_train_jointly([nn.Linear(2, 1), nn.Linear(3, 1)])
        (False, 'parameter weight differs in shape, dtype, device or requires_grad')
    """
    reason = try_jointly(modules, batch, loss=loss, optimizer=optimizer).reason
    return not reason, reason


def try_jointly(
    modules: Sequence[nn.Module],
    batch: Batch | None = None,
    *,
    loss: MemberLoss = member_loss,
    optimizer: OptimizerFactory | optim.Optimizer | None = None,
) -> Trial:
    """Return why `fit_jointly` cannot be used, empty where it can, and in which form; as `can_train_jointly`."""
    reason = why_not_alike(modules) or _hooks_of_gradients(modules) or _why_not_elementwise(optimizer, modules)
    return Trial(reason, False) if reason or batch is None else _one_step(modules, batch, loss)


def fit_jointly(
    modules: Sequence[nn.Module],
    data: Data,
    *,
    epochs: int,
    loss: MemberLoss = member_loss,
    validation: Data = None,
    validation_loss: Callable[[nn.Module, Data], float] | None = None,
    optimizer: OptimizerFactory | None = None,
    compared: bool = False,
    **settings: Any,
) -> History:
    """Train members of one architecture together, each as if it were alone with the same batches.

    The learning rate, early stopping and the loss scale of "float16" are common to all: they follow the mean over
    the members. The history has means over the members. Gradients are clipped member by member.

    Args:
        modules: The members, changed in place.
        data: As for `fit`; every member sees the same batches.
        epochs: As for `fit`.
        loss: `(member, batch, num_data) -> Tensor`, mean per example, in nats.
        validation: Held-out data.
        validation_loss: `(member, validation) -> float`, mean NLL in nats; None for the mean of `loss`.
        optimizer: As for `fit`; one that updates every number from its own gradient alone, as Adam and SGD do.
        compared: `try_jointly` has just found that the batched losses are the members' own; False to look here.
        settings: Other arguments of `fit`.

    Raises:
        BadInput: As for `fit`; if the members differ in more than their numbers, or the optimizer mixes them.
    """
    stacked = StackedMembers(modules, loss, are_alike=compared)
    if reason := _why_not_elementwise(optimizer, modules):
        raise BadInput(f"the members cannot be trained jointly: {reason}; train them one after another")
    stacked.is_compared = compared

    def mean_nll(held_out: Data) -> float:
        stacked.write_back()
        return sum(_nll_in_eval_mode(member, held_out) for member in modules) / len(modules)

    def _nll_in_eval_mode(member: nn.Module, held_out: Data) -> float:
        with modes_kept(member):
            return float(validation_loss(member.eval(), held_out))  # type: ignore[misc]

    try:
        return fit(
            stacked,
            stacked.loss,
            data,
            epochs=epochs,
            validation=validation,
            validation_loss=None if validation_loss is None else mean_nll,
            optimizer=optimizer,
            clip=clip_member_gradients,
            **settings,
        )
    finally:
        stacked.write_back()


def clip_member_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale each member's whole gradient down to `max_norm` in place; return the norms before, `[M]`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(1)
    norms = torch.stack([torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients])
    total = torch.linalg.vector_norm(norms, dim=0)
    if max_norm == torch.inf:
        return total
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.reshape(-1, *[1] * (gradient.dim() - 1)).to(gradient.dtype))
    return total


def _key(name: str) -> str:
    # A dot would make torch look for a submodule.
    return name.replace(".", "/")


def _hooks_of_gradients(modules: Sequence[nn.Module]) -> str:
    """Say which hooks would see the gradients of all members in place of one's, or none."""
    for module in modules:
        for name, part in module.named_modules():
            if part._backward_hooks or part._backward_pre_hooks:
                return f"{name or 'a member'} has backward hooks"
        for name, parameter in module.named_parameters():
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                return f"parameter {name} has hooks"
    return ""


def _why_not_elementwise(optimizer: OptimizerFactory | optim.Optimizer | None, modules: Sequence[nn.Module]) -> str:
    """Return why an optimizer of stacked parameters `[M, ...]` would not do what one for each member does."""
    if isinstance(optimizer, optim.Optimizer):
        return "a ready optimizer holds the members' own parameters"
    if optimizer is None:
        return ""
    own = [nn.Parameter(p.detach()) for p in modules[0].parameters() if p.requires_grad]
    made = make_optimizer(optimizer, own)
    # A class derived from one of these may do anything, and so may hooks.
    if type(made) not in _ELEMENTWISE or made._optimizer_step_pre_hooks or made._optimizer_step_post_hooks:
        return f"{type(made).__name__} may mix what is stacked"
    stacked = [nn.Parameter(p.new_empty(len(modules), *p.shape)) for p in own]
    try:
        same = same_values(_groups(made, own), _groups(make_optimizer(optimizer, stacked), stacked))
    except Exception as error:
        return f"the optimizer cannot be made for stacked parameters: {error}"
    return "" if same else "the optimizer treats parameters by their shape, and those of all members have an axis more"


def _groups(optimizer: optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Return the settings of an optimizer's groups, parameters by their number."""
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    return [{**group, "params": [numbers[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def _one_step(modules: Sequence[nn.Module], batch: Batch, loss: MemberLoss) -> Trial:
    """Try one step with a few rows on a copy of the members."""
    device = device_of(modules[0])
    try:
        stacked = StackedMembers(modules, loss, are_alike=True).train()
        # Copied in the modes of the pass, to see what it leaves; a list may be changed in place.
        untouched = deepcopy(modules[0]).train()
        with seeded_default_generators(device, 0, "trial"):
            batch = _few_rows(to_device(batch, device))
            stacked.loss(batch, num_data=batch.num_rows).sum().backward()
    except Exception as error:  # Every operation fails in its own way; the loop will show the error if it is real.
        return Trial(f"the vectorised pass fails with {type(error).__name__}: {first_line(error)}", False)
    if reason := why_not_alike([untouched, stacked.skeleton.member]):  # type: ignore[list-item]
        return Trial(f"a pass leaves something behind, which the members would not keep: {reason}", False)
    return Trial("", not stacked.why_not_batched)


def _few_rows(batch: Batch) -> Batch:
    """Return copies of the first rows of a batch, whose first axis all its tensors share."""
    rows = batch.num_rows

    def cut(leaf: Any) -> Any:
        return leaf[:_FEW_ROWS] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == rows else leaf

    return with_copies(Batch(**map_leaves(batch._asdict(), cut)))
