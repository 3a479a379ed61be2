"""What memory is free, what a pass takes, and what to do when there is none."""

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device (2 GiB where nobody can tell)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2 << 30


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an out-of-memory error of any device from others."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give freed blocks back before the next try."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def storages_of(network: nn.Module) -> frozenset[int]:
    """Return the addresses of a network's own parameters and buffers."""
    own = (*network.parameters(), *network.buffers())
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in own)


class _Results(TorchDispatchMode):
    """Notes the bytes of the largest result of any operation that is no view of the network's own tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self._own = storages_of(network)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self._own:
            self.largest = max(self.largest, result.nbytes)
        return result


def bytes_between(network: nn.Module, one_row: Callable[[], Any]) -> int:
    """Return the bytes of the largest layer's input and output in a pass of one row, if both are as large."""
    with _Results(network) as results:
        one_row()
    return 2 * results.largest
