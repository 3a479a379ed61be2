"""Attention works in place on scores of its own: the same bits as without, nothing that others hold, and less memory."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bayesguard.sampling import Forward, Sampler, kernels

ROWS, STEPS, WIDTH = 8, 16, 8
X = torch.randn(ROWS, STEPS, WIDTH, generator=torch.Generator().manual_seed(0))


def drawn(network: nn.Module, x: Tensor = X, strategy: Any = "replay", draws: int = 3, **settings: Any) -> Tensor:
    sampler = Sampler(strategy=strategy, **settings)
    with torch.no_grad():
        return torch.cat(list(sampler.chunks(Forward(network, (x,), {}), num_samples=draws, seed=0)))


@contextmanager
def never_in_place() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_is_plain", lambda tensor: False)
        yield


class Attention(nn.Module):
    """Attention with dropout, which keeps all that it hands over, and scores of its own."""

    def __init__(self, mask: Tensor | None, causal: bool = False) -> None:
        super().__init__()
        self.mask, self.causal = mask, causal
        self.kept: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        scores = heads @ heads.mT
        weights = scores.softmax(-1)
        own = F.dropout(weights, 0.2) @ heads
        given = [heads, scores, weights, *([] if self.mask is None else [self.mask])]
        self.kept += [(tensor, tensor.clone()) for tensor in given]
        mine = F.scaled_dot_product_attention(heads, heads, heads, self.mask, 0.3, is_causal=self.causal)
        return (own + mine).transpose(1, 2).flatten(2)


MASKS = {
    "none": None,
    "booleans": torch.ones(STEPS, STEPS, dtype=torch.bool).tril(),
    "added": torch.zeros(STEPS, STEPS).masked_fill(torch.ones(STEPS, STEPS).triu(2) > 0, -1e9),
    "of each head": torch.ones(1, 2, 1, STEPS, dtype=torch.bool).index_fill(3, torch.tensor([2]), False),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("strategy", ["loop", "replay", "vmap", "fold"])
def test_attention_in_place_changes_no_bit_and_nothing_that_is_kept(name: str, strategy: str) -> None:
    network = Attention(MASKS[name], causal=name == "none")
    with never_in_place():
        want = drawn(network, strategy=strategy)
    assert torch.equal(drawn(network, strategy=strategy), want)
    if strategy != "vmap":  # whose tensors have no numbers outside of it
        assert network.kept
        assert all(torch.equal(tensor, copy) for tensor, copy in network.kept)


class Mapped(nn.Module):
    """Attention inside a transform of the network's own."""

    def forward(self, x: Tensor) -> Tensor:
        attend = partial(F.scaled_dot_product_attention, dropout_p=0.3)
        return torch.vmap(lambda rows: attend(rows, rows, rows), in_dims=1, out_dims=1, randomness="different")(
            x.unsqueeze(1)
        )[:, 0]


def test_attention_inside_vmap() -> None:
    with never_in_place():
        want = drawn(Mapped())
    assert torch.equal(drawn(Mapped()), want)


def test_other_numbers() -> None:
    network = Attention(MASKS["booleans"])
    for dtype in (torch.float64, torch.bfloat16):
        x = X.to(dtype)
        with never_in_place():
            want = drawn(network, x)
        assert torch.equal(drawn(network, x), want)
    with torch.autocast("cpu", torch.bfloat16):
        with never_in_place():
            want = drawn(network)
        assert torch.equal(drawn(network), want)


def gradient() -> Tensor:
    x = X.clone().requires_grad_()
    (outputs,) = Sampler(strategy="loop").chunks(Forward(Attention(None), (x,), {}), num_samples=2, seed=0)
    outputs.square().sum().backward()
    assert x.grad is not None
    return x.grad


def test_gradients_are_those_of_work_out_of_place() -> None:
    with never_in_place():
        want = gradient()
    assert torch.equal(gradient(), want)


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def peak_of(network: nn.Module, x: Tensor) -> int:
    """Return the peak of draws, once the sampler knows the network."""
    sampler, forward = Sampler(strategy="replay"), Forward(network, (x,), {})
    with torch.no_grad():
        list(sampler.chunks(forward, num_samples=2, seed=0))
        with Live() as live:
            list(sampler.chunks(forward, num_samples=2, seed=0))
    return live.peak


def test_attention_holds_its_scores_once() -> None:
    class Only(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.3)

    x = torch.randn(6, 2, 128, 4)
    scores = 4 * 6 * 2 * 128 * 128
    assert scores < peak_of(Only(), x) < 1.8 * scores
    with never_in_place():
        assert peak_of(Only(), x) > 2 * scores
