"""Standard normal numbers on a CPU, in two thirds to three quarters of the time of torch's.

G. E. P. Box, M. E. Muller (1958). A note on the generation of random normal deviates. Annals of Mathematical
Statistics 29, 610-611: of two uniform numbers one makes a distance, the other a direction.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

# For fewer numbers a generator of their own costs more than it saves.
_FEWEST = 1 << 14
_TO_UNIT = np.float32(2**-32)
_TO_ANGLE = np.float32(math.pi * 2**-31)
_HALF, _MINUS_TWO = np.float32(0.5), np.float32(-2)


def standard_normal_like(like: Tensor) -> Tensor:
    """Return independent standard normal numbers of a vector's size, dtype and device.

    They are a function of the state of torch's default generator, which goes on as with any draw. In float32 on a CPU
    the largest is 6.8: the uniform numbers have 32 bits, where torch's have 24 and end at 5.8.

    Args:
        like: A vector `[P]`.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> noise = standard_normal_like(torch.zeros(100_000))
        >>> noise.shape, bool((noise.square().mean() - 1).abs() < 0.02)
        (torch.Size([100000]), True)
    """
    if like.device.type != "cpu" or like.dtype != torch.float32 or like.numel() < _FEWEST:
        return torch.randn_like(like)
    # 192 bits of the default generator: no two calls share a stream.
    bits = np.random.SFC64(_DefaultGenerator())  # type: ignore[arg-type]  # NumPy's stubs know one class of seeds.
    return box_muller(bits.random_raw(-(-like.numel() // 2)))[: like.numel()]


def box_muller(words: npt.NDArray[np.uint64]) -> Tensor:
    """Return `2 K` standard normal numbers made of `K` random words of 64 bits, in the memory of the words.

    Number `k` and number `K + k` are one point of the plane: its distance from zero comes from one random integer of
    32 bits, its direction from another. torch's logarithms, sines and cosines take two to three times as long as NumPy's.
    """
    pairs = len(words)
    integers, numbers = words.view(np.uint32), words.view(np.float32)
    radius, angle = numbers[:pairs], numbers[pairs:]
    np.copyto(radius, integers[:pairs], casting="unsafe")
    radius += _HALF  # No logarithm of zero.
    radius *= _TO_UNIT
    np.log(radius, out=radius)
    radius *= _MINUS_TWO
    np.sqrt(radius, out=radius)
    np.copyto(angle, integers[pairs:].view(np.int32), casting="unsafe")
    angle *= _TO_ANGLE
    cosine = np.cos(angle)
    np.sin(angle, out=angle)
    angle *= radius
    radius *= cosine
    return torch.from_numpy(numbers)


class _DefaultGenerator(ISeedSequence):
    """Seeds for a bit generator of NumPy's, from torch's default generator."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[Any]:
        size = -(-n_words * np.dtype(dtype).itemsize // 8)
        words = torch.empty(size, dtype=torch.int64, device="cpu").random_(-(2**63), None)
        return words.numpy().view(dtype)[:n_words]
