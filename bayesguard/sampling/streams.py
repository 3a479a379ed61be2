"""Random streams: every random number is a function of a seed and of the place that it is for."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# torch's default generators belong to the whole process: one seeded block at a time.
_DEFAULT_GENERATORS = threading.RLock()


def derive_seed(seed: int, *path: int | str) -> int:
    """Return a 63-bit seed for one place (a draw, a call, a member) under `seed`."""
    digest = hashlib.blake2b(repr((int(seed), *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(device: torch.device | str, seed: int, *path: int | str) -> torch.Generator:
    """Return a fresh generator on `device` for one place under `seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *path))


def default_states(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the default generators that code on `device` may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def seeded_default_generators(device: torch.device, seed: int, *path: int | str) -> Iterator[None]:
    """Run a block on default generators seeded for one place, and give the caller's states back.

    Only for code that cannot be handed a generator: a network's own random calls, a loader's shuffling.
    """
    devices = [] if device.type == "cpu" else [device]
    with (
        _DEFAULT_GENERATORS,
        torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type),
    ):
        torch.set_rng_state(stream("cpu", seed, *path).get_state())
        if device.type == "cuda":
            torch.cuda.set_rng_state(stream(device, seed, *path).get_state(), device)
        yield
