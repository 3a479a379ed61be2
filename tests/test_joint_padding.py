"""The padding row of a table is no more trained together than apart."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard import joint
from bayesguard.data import Batch

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BATCH = Batch((X,), {}, torch.arange(12) % 3)


class LooksUp(nn.Module):
    """Rows by what the member itself has computed."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.inner, self.table = nn.Linear(4, 3), nn.Embedding(4, 3, padding_idx=padding)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        outputs: Tensor = hidden + self.table((hidden > 0).sum(-1))
        return outputs


@pytest.mark.parametrize("padding", [None, 1, -2])
def test_gradients_are_those_of_each_member_alone(padding: int | None) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        members = [bg.Deterministic(LooksUp(padding).double()) for _ in range(3)]
    alone = deepcopy(members)
    stacked = joint.StackedMembers(members)
    stacked.loss(BATCH, 12).sum().backward()
    gradients = {name: own.grad for name, own in stacked.named_parameters()}
    for place, member in enumerate(alone):
        joint.member_loss(member, BATCH, 12).backward()
        for name, own in member.named_parameters():
            together = gradients[name.replace(".", "/")]
            assert together is not None
            assert own.grad is not None
            assert torch.allclose(together[place], own.grad, rtol=0, atol=1e-12), name
