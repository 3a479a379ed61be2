"""Batches on their way to the device: on CUDA the next is copied while the present one is used."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from bayesguard.data import Batch, leaves, map_leaves, to_device

Item = TypeVar("Item")
Begun = TypeVar("Begun")


def on_device(stream: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on the device; on CUDA copied from pinned memory, one batch ahead, on a stream of their own."""
    if device.type != "cuda":
        return (to_device(batch, device) for batch in stream)
    copies = torch.cuda.Stream(device)

    def start(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        pinned = Batch(**map_leaves(batch._asdict(), _pinned))
        # What is on the device already may still be computed there.
        copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            return to_device(pinned, device, non_blocking=True), copies.record_event()

    def finish(started: tuple[Batch, torch.cuda.Event]) -> Batch:
        batch, copied = started
        present = torch.cuda.current_stream(device)
        present.wait_event(copied)
        for leaf in leaves(batch._asdict()):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(present)  # its memory is not to be used again while this stream reads it
        return batch

    return one_ahead(stream, start, finish)


def one_ahead(items: Iterator[Item], start: Callable[[Item], Begun], finish: Callable[[Begun], Item]) -> Iterator[Item]:
    """Yield `finish(start(item))` of every item, in order, where the next is started before one is handed out.

    Examples:
        >>> log = []
        >>> for item in one_ahead(iter("ab"), lambda x: log.append(f"start {x}") or x, lambda x: x):
        ...     log.append(f"use {item}")
        >>> log
        ['start a', 'start b', 'use a', 'use b']
    """
    begun: list[Begun] = []
    for item in items:
        begun.append(start(item))
        if len(begun) > 1:
            yield finish(begun.pop(0))
    for last in begun:
        yield finish(last)


def _pinned(leaf: Any) -> Any:
    on_host = isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout == torch.strided
    return leaf.pin_memory() if on_host and leaf.numel() and not leaf.is_pinned() else leaf
