"""Training networks of one architecture in one vectorised pass: many small steps become one large one."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.func import functional_call, stack_module_state, vmap

from bayesguard.data import Batch, Data, to_device
from bayesguard.errors import BadInput
from bayesguard.history import History
from bayesguard.sampling import seeded_default_generators
from bayesguard.training import fit
from bayesguard.training_setup import OptimizerFactory, device_of, make_optimizer, modes_kept

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

    Raises:
        BadInput: If the modules cannot be stacked.
    """

    def __init__(self, modules: Sequence[nn.Module], loss: MemberLoss = member_loss) -> None:
        super().__init__()
        if reason := _why_not_alike(modules):
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

    def loss(self, batch: Batch, num_data: int) -> Tensor:
        """Return the members' objectives on one batch, `[M]`: an objective for `bayesguard.training.fit`."""
        parameters, buffers = ({name: getattr(self, _key(name)) for name in names} for names in self._names)

        def objective(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            own = {f"member.{name}": tensor for name, tensor in (*parameters.items(), *buffers.items())}
            value: tuple[Tensor, dict[str, Tensor]] = functional_call(self._skeleton[0], own, (batch, num_data))
            return value

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


class _Objective(nn.Module):
    """A member's loss as a forward pass, with the buffers as they are after it."""

    def __init__(self, member: nn.Module, loss: MemberLoss) -> None:
        super().__init__()
        self.member = member
        self.loss_of = loss

    def forward(self, batch: Batch, num_data: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_of(self.member, batch, num_data), dict(self.member.named_buffers())


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
    reason = _why_not_alike(modules) or _why_not_elementwise(optimizer)
    if not reason and batch is not None:
        reason = _why_it_fails(modules, batch, loss)
    return not reason, reason


def fit_jointly(
    modules: Sequence[nn.Module],
    data: Data,
    *,
    epochs: int,
    loss: MemberLoss = member_loss,
    validation: Data = None,
    validation_loss: Callable[[nn.Module, Data], float] | None = None,
    optimizer: OptimizerFactory | None = None,
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
        settings: Other arguments of `fit`.

    Raises:
        BadInput: As for `fit`; if the members differ in more than their numbers, or the optimizer mixes them.
    """
    if reason := _why_not_elementwise(optimizer):
        raise BadInput(f"the members cannot be trained jointly: {reason}; train them one after another")
    stacked = StackedMembers(modules, loss)

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
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.reshape(-1, *[1] * (gradient.dim() - 1)).to(gradient.dtype))
    return total


def _key(name: str) -> str:
    # A dot would make torch look for a submodule.
    return name.replace(".", "/")


def _why_not_elementwise(optimizer: OptimizerFactory | optim.Optimizer | None) -> str:
    if isinstance(optimizer, optim.Optimizer):
        return "a ready optimizer holds the members' own parameters"
    made = make_optimizer(optimizer, [nn.Parameter(torch.zeros(1))])
    return "" if isinstance(made, _ELEMENTWISE) else f"{type(made).__name__} may mix what is stacked"


def _why_not_alike(modules: Sequence[nn.Module]) -> str:
    """Return in what members differ beyond their numbers; what is not known to be the same counts as different."""
    if not modules:
        return "there are none"
    first = modules[0]
    owned = [parameter for module in modules for parameter in module.parameters()]
    if len(set(map(id, owned))) != len(owned):
        return "members share parameters"
    for name, part in first.named_modules():
        if isinstance(part, nn.RNNBase):
            return f"vmap has no rule for {type(part).__name__} ({name or 'the member itself'})"
    for other in modules[1:]:
        if reason := _difference(first, other):
            return reason
    return ""


def _difference(first: nn.Module, other: nn.Module) -> str:
    ours, theirs = dict(first.named_modules()), dict(other.named_modules())
    if {name: type(part) for name, part in ours.items()} != {name: type(part) for name, part in theirs.items()}:
        return "members are of different classes"
    for kind, a, b in (
        ("parameter", dict(first.named_parameters()), dict(other.named_parameters())),
        ("buffer", dict(first.named_buffers()), dict(other.named_buffers())),
    ):
        for name in sorted(a.keys() | b.keys()):
            if name not in a or name not in b or _form(a[name]) != _form(b[name]):
                return f"{kind} {name} differs in shape, dtype, device or requires_grad"
    for name, part in ours.items():
        mine, its = _attributes(part), _attributes(theirs[name])
        for attribute in sorted(mine.keys() | its.keys()):
            if not _same(mine.get(attribute), its.get(attribute)):
                return f"attribute {name + '.' if name else ''}{attribute} differs"
    return ""


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds beside parameters, buffers and submodules: rates, modes, functions, hooks."""
    held = ("_parameters", "_buffers", "_modules")
    return {name: value for name, value in vars(module).items() if name not in held}


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return _form(a) == _form(b) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (bool, int, float, complex, str, bytes, set, frozenset, torch.dtype, torch.device)):
        return bool(a == b)
    # Two objects of one class are the same if what they hold is; functions and generators only if they are one.
    return hasattr(a, "__dict__") and not callable(a) and _same(vars(a), vars(b))


def _why_it_fails(modules: Sequence[nn.Module], batch: Batch, loss: MemberLoss) -> str:
    """Try one vectorised step on a copy of the members."""
    device = device_of(modules[0])
    try:
        stacked = StackedMembers(modules, loss).train()
        with seeded_default_generators(device, 0, "trial"):
            stacked.loss(to_device(batch, device), num_data=batch.num_rows).sum().backward()
    except Exception as error:  # Every operation fails in its own way; the loop will show the error if it is real.
        return f"the vectorised pass fails with {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""
