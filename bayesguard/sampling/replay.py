"""Replay: what a network computes before its first random call is computed once and shared by all draws.

No graph is needed. The mode that intercepts dropout records, in the first pass, the result of every call up to the
first random one, by call order; later passes get the recorded results back instead of computing them.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bayesguard.sampling.compaction import Compaction, version_of
from bayesguard.sampling.forward import Forward
from bayesguard.sampling.intercept import Intercept, Kernel
from bayesguard.sampling.masks import MaskSource, PassesDiffer


class _Dead:
    """A result that nobody held any more when the prefix ended: only its shape can matter."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    def placeholder(self) -> Tensor:
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)


class Tape:
    """The calls of a prefix with their results, and what guards them."""

    def __init__(self) -> None:
        self.calls: list[tuple[Kernel, Any]] = []
        self.complete = False
        self.head: Any = None
        # The inputs of all its passes; None as long as there are none.
        self.forward: Forward | None = None
        self._kept: list[tuple[Tensor, int]] = []

    def record(self, func: Kernel, result: Any) -> None:
        """Note one call of the prefix without keeping its tensors alive."""
        leaves, spec = pytree.tree_flatten(result)
        watched = [weakref.ref(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        shapes = [_Dead(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        self.calls.append((func, (watched, shapes, spec)))

    def close(self) -> None:
        """End the prefix: keep the results that are still alive, and note their versions."""
        self.calls = [(func, self._settle(*noted)) for func, noted in self.calls]
        if self.forward is not None:
            self._kept.extend((tensor, version_of(tensor)) for tensor in self.forward.tensors())
        self.complete = True

    def _settle(self, watched: list[Any], shapes: list[_Dead | None], spec: Any) -> tuple[list[Any], Any]:
        leaves = []
        for item, shape in zip(watched, shapes, strict=True):
            alive = item() if shape is not None else item
            if shape is not None and alive is not None:
                self._kept.append((alive, version_of(alive)))
            leaves.append(shape if shape is not None and alive is None else alive)
        return leaves, spec

    def result(self, index: int, func: Kernel) -> Any:
        """Return what call number `index` gave, after checking that it is the same call."""
        if index >= len(self.calls) or self.calls[index][0] != func:
            raise PassesDiffer("a pass made other calls before its first random one")
        leaves, spec = self.calls[index][1]
        return pytree.tree_unflatten([leaf.placeholder() if isinstance(leaf, _Dead) else leaf for leaf in leaves], spec)

    def keep_head(self, result: Any) -> Any:
        """Keep what the first random call computed before its first mask."""
        self.head = result
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self._kept.extend((tensor, version_of(tensor)) for tensor in tensors)
        return result

    @property
    def num_bytes(self) -> int:
        """The size of what is kept."""
        return sum(tensor.numel() * tensor.element_size() for tensor, _ in self._kept)

    @property
    def changed(self) -> bool:
        """Whether a kept result was changed in place since the prefix ended."""
        return any(version_of(tensor) != version for tensor, version in self._kept)


class _OnTape(Intercept):
    """A pass that shares its prefix with others through a tape."""

    def __init__(
        self,
        masks: MaskSource,
        tape: Tape,
        selected: frozenset[str] | None,
        compaction: Compaction | None,
        **more: Any,
    ) -> None:
        super().__init__(masks, selected, compaction, **more)
        self.tape = tape
        self._at_first = False

    def first_random(self, func: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the first random call, which may ask `once` for what no draw changes."""
        self._at_first = True
        result = super().call(func, args, kwargs)
        self._at_first = False
        return result

    def once(self, compute: Callable[[], Any]) -> Any:
        if not self._at_first:
            return compute()
        self._at_first = False
        return self.tape.keep_head(compute()) if self.tape.head is None else self.tape.head


class Recorder(_OnTape):
    """The first pass: computes everything and records the prefix on a tape."""

    def call(self, func: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.tape.complete:
            return super().call(func, args, kwargs)
        if self.is_random(func):
            # A handler may turn out to draw nothing; ending the prefix there costs speed, never truth.
            self.tape.close()
            return self.first_random(func, args, kwargs)
        result = super().call(func, args, kwargs)
        self.tape.record(func, result)
        return result


class Player(_OnTape):
    """A later pass: the prefix comes from the tape, the rest is computed."""

    def __init__(
        self,
        masks: MaskSource,
        tape: Tape,
        selected: frozenset[str] | None,
        compaction: Compaction | None,
        **more: Any,
    ) -> None:
        super().__init__(masks, tape, selected, compaction, **more)
        self.position = 0
        self.in_prefix = True

    def call(self, func: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.in_prefix:
            return super().call(func, args, kwargs)
        if self.is_random(func):
            if self.position != len(self.tape.calls):
                raise PassesDiffer("a pass reached its first random call earlier than the recorded one")
            self.in_prefix = False
            return self.first_random(func, args, kwargs)
        result = self.tape.result(self.position, func)
        self.position += 1
        return result
