"""Random bits for masks: one byte says of one unit in which of eight consecutive draws it is dropped.

Within a block of eight draws every unit is dropped equally often (Latin hypercube sampling of each unit over the
draws: M. D. McKay, R. J. Beckman and W. J. Conover, 1979, Technometrics). For a rate p that is floor(8p) or
floor(8p) + 1 times, at random so that every draw by itself drops the unit with probability p. Units are independent of
one another and so are blocks: each single draw has exactly the law of ordinary dropout.
"""

import itertools
import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayesguard.sampling.streams import derive_seed, stream

BLOCK = 8
_SLOTS = 1 << 16


def quantised(rate: float) -> float:
    """Return the drop rate that masks really have: the nearest multiple of 2^-16.

    Rates within 2^-8 of 0 or 1 are kept as they are: their masks are drawn from full-precision uniforms.
    """
    return rate if _needs_uniforms(rate) else round(rate * _SLOTS) / _SLOTS


def _needs_uniforms(rate: float) -> bool:
    return min(rate, 1 - rate) < 2**-8


def dropped_bits(
    shape: tuple[int, ...], rate: float, device: torch.device, seed: int, path: tuple[int, ...], *, balanced: bool
) -> Tensor:
    """Return random bytes of `shape`; bit d is 1 where the unit is dropped in draw d of the block.

    Without `balanced` only bit 0 is used: the mask of a single draw.
    """
    if _needs_uniforms(rate):
        return (_uniforms(shape, device, seed, path) < rate).to(torch.uint8)
    if device.type == "cpu":
        words = _words(shape, seed, path)
        found = np.take(_table(rate), words) if balanced else (words < round(rate * _SLOTS)).view(np.uint8)
        return torch.from_numpy(found).reshape(shape)
    slots = torch.randint(
        _SLOTS, shape, generator=stream(device, seed, *path), dtype=torch.int32, device=device
    ).flatten()
    if not balanced:
        return (slots < round(rate * _SLOTS)).to(torch.uint8).reshape(shape)
    return torch.from_numpy(_table(rate)).to(device).index_select(0, slots).reshape(shape)


def is_balanced(rate: float, balanced: bool) -> bool:
    """Tell whether masks of this rate come in blocks of eight draws."""
    return balanced and not _needs_uniforms(rate)


def _words(shape: tuple[int, ...], seed: int, path: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """Return uniform 16-bit integers, four from each 64-bit output of the generator."""
    count = math.prod(shape)
    raw: npt.NDArray[np.uint64] = np.random.SFC64(derive_seed(seed, *path)).random_raw(-(-count // 4))
    return raw.view(np.uint16)[:count]


def _uniforms(shape: tuple[int, ...], device: torch.device, seed: int, path: tuple[int, ...]) -> Tensor:
    dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    return torch.rand(shape, generator=stream(device, seed, *path), dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _table(rate: float) -> npt.NDArray[np.uint8]:
    """Return 65,536 equally probable patterns; in each of the eight draws a share `rate` of them drops."""
    fewer = int(BLOCK * rate)
    more = round((BLOCK * rate - fewer) * _SLOTS / BLOCK) * BLOCK
    return np.concatenate([_patterns(fewer, _SLOTS - more), _patterns(fewer + 1, more)])


def _patterns(dropped: int, slots: int) -> npt.NDArray[np.uint8]:
    """Return `slots` bytes with `dropped` bits set, as evenly as can be over the patterns and exactly over the bits."""
    if slots == 0:
        return np.empty(0, np.uint8)
    every = [sum(1 << bit for bit in bits) for bits in itertools.combinations(range(BLOCK), dropped)]
    rest = slots % len(every)
    # What is left over goes to whole orbits under rotation: each of those sets every bit equally often.
    extra: list[int] = []
    for orbit in sorted(_orbits(every), key=len, reverse=True):
        if len(extra) + len(orbit) <= rest:
            extra.extend(orbit)
    return np.array(every * (slots // len(every)) + extra, np.uint8)


def _orbits(patterns: list[int]) -> list[list[int]]:
    seen: set[int] = set()
    orbits = []
    for pattern in patterns:
        if pattern not in seen:
            orbit = sorted({((pattern << turn) | (pattern >> (BLOCK - turn))) & 0xFF for turn in range(BLOCK)})
            seen.update(orbit)
            orbits.append(orbit)
    return orbits
