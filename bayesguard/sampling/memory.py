"""What memory is free, and what to do when there is none."""

import gc
import os

import torch


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
