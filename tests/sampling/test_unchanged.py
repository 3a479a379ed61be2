"""Members that change themselves in a pass keep what they would have kept of a pass of their own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesguard as bg
from bayesguard.data import Batch
from bayesguard.joint import can_train_jointly
from bayesguard.sampling.batched_calls import Unbatchable
from bayesguard.sampling.unchanged import unchanged

ROWS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


class Counting(nn.Module):
    """Counts its passes in an attribute or a buffer, or remembers what it answered last."""

    counted: Tensor
    seen: Tensor

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.what, self.passes = what, 0
        self.register_buffer("counted", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "attribute":
            self.passes += 1
        if self.what == "buffer":
            self.counted = self.counted + 1
        y: Tensor = self.last(torch.relu(self.first(x)))
        if self.what == "output":
            self.seen = y.relu()
        return y


def members(what: str) -> bg.DeepEnsemble:
    torch.manual_seed(0)
    return bg.DeepEnsemble([Counting(what) for _ in range(4)])


@pytest.mark.parametrize("what", ["attribute", "buffer", "output"])
def test_predictions_leave_each_member_what_its_own_pass_leaves(what: str) -> None:
    together = members(what)
    networks: list[Any] = [member.network for member in together.members]
    for _ in range(3):
        together(ROWS)
    assert "one after another" in together.explain()
    assert "changes its attributes or replaces a buffer" in together.explain()
    for network in networks:
        assert network.counted.shape == ()
        assert (network.passes, network.counted) == (networks[1].passes, networks[1].counted)
        assert (network.passes > 0) == (what == "attribute")
        assert (network.counted > 0) == (what == "buffer")
        if what == "output":
            with torch.no_grad():
                torch.testing.assert_close(network.seen, network.last(network.first(ROWS).relu()).relu())


def test_a_network_that_changes_nothing_is_batched() -> None:
    together = members("")
    together(ROWS)
    assert "changes" not in together.explain()


def replace_all(network: Counting) -> None:
    network.counted = torch.ones(4)
    network.first.weight = nn.Parameter(torch.zeros(6, 4))
    network.passes = 7
    network.new = 1  # type: ignore[assignment]


def fail(network: Counting) -> None:
    replace_all(network)
    raise ValueError("of its own")


@pytest.mark.parametrize(
    ("run", "error", "words"), [(replace_all, Unbatchable, "changes its attributes"), (fail, ValueError, "of its own")]
)
def test_what_was_replaced_is_put_back(run: Any, error: type[Exception], words: str) -> None:
    network = Counting()
    counted, weight = network.counted, network.first.weight
    with pytest.raises(error, match=words), unchanged(network):
        run(network)
    assert network.counted is counted
    assert network.first.weight is weight
    assert network.passes == 0
    assert not hasattr(network, "new")
    with unchanged(network):
        network.passes = int("0")


@pytest.mark.parametrize(("what", "jointly"), [("", True), ("buffer", True), ("attribute", False)])
def test_members_that_count_in_an_attribute_are_trained_one_after_another(what: str, jointly: bool) -> None:
    together = members(what)
    can, reason = can_train_jointly(list(together.members), Batch((ROWS,), {}, LABELS))
    assert can is jointly
    assert can or reason == (
        "a pass leaves something behind, which the members would not keep: attribute network.passes differs"
    )
    together.fit((ROWS, LABELS), epochs=2, batch_size=4)
    networks: list[Any] = [member.network for member in together.members]
    assert [network.passes for network in networks] == [4 * (what == "attribute")] * 4
    assert [float(network.counted) for network in networks] == [4 * (what == "buffer")] * 4
