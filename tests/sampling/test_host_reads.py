"""No strategy that a GPU may use asks for a number on the host while it draws: there it would wait for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bayesguard.sampling import Forward, Sampler
from tests.networks import Attention, Residual, mlp

# What needs numbers before it can go on, or has a result whose size depends on them.
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}


class HostReads(TorchDispatchMode):
    """Counts operations that a device would have to be waited for.

    Integers that are made of no tensor, and what is made of them alone, lie in the host's memory on every device: the
    numbers of groups of draws.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self._of_host: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_host = all(id(value) in self._of_host for value in given)
        self.count += func.overloadpacket.__name__ in WAITING and not on_host
        result = func(*args, **(kwargs or {}))
        if on_host and isinstance(result, Tensor) and not result.is_floating_point():
            self._of_host[id(result)] = result
        return result


def reads(network: nn.Module, x: Tensor, strategy: Any, **settings: Any) -> int:
    """Return the host's reads of 24 draws in three chunks, once the engine knows the network."""
    sampler, forward = Sampler(strategy=strategy, **settings), Forward(network.eval(), (x,), {})
    with torch.no_grad():
        list(sampler.chunks(forward, num_samples=24, seed=1, chunk=8))
        with HostReads() as mode:
            assert len(list(sampler.chunks(forward, num_samples=24, seed=2, chunk=8))) == 3
    return mode.count


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(nn.Dropout(0.5)), (6, 8)),
    "residual": (Residual, (6, 1, 8, 8)),
    "attention": (Attention, (6, 5, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("strategy", ["loop", "replay", "vmap", "fold"])
@pytest.mark.parametrize("per_example", [False, True])
def test_draws_are_made_without_a_look(name: str, strategy: Any, per_example: bool) -> None:
    make, shape = NETWORKS[name]
    assert reads(make(), torch.randn(shape), strategy, per_example=per_example) == 0


class Looks(nn.Module):
    """A network that asks for a number itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.body(x)
        return outputs * (1 + 0 * outputs.sum().item())


def test_a_look_would_be_counted() -> None:
    assert reads(Looks(), torch.randn(6, 8), "replay") == 24
