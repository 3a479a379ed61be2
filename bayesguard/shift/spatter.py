"""Spatter: drops of water or mud on the lens."""

import math
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from bayesguard.shift.base import image_scale
from bayesguard.shift.blur import smooth, smooth_noise
from bayesguard.shift.colour import tint
from bayesguard.shift.resample import correlate, filter_matrix, separable

WATER, MUD = (175 / 255, 238 / 255, 238 / 255), (63 / 255, 42 / 255, 20 / 255)
FARTHEST = 20  # distances are counted up to here, in pixels of a 32-pixel image
STEEP, GENTLE = 150, 50  # slopes of an outline, of 255 levels: where it may begin, where it goes on
LENGTHS = {1: 1.0, 2: 1.4, 5: 2.1969}  # of moves, by the square of their Euclidean lengths
MOVES = {(y, x): LENGTHS[y * y + x * x] for y in range(-2, 3) for x in range(-2, 3) if y * y + x * x in LENGTHS}
EMBOSS = np.array([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])


def spatter(
    images: Tensor,
    generator: Generator,
    mean: float,
    deviation: float,
    smoothing: float,
    threshold: float,
    strength: float,
    mud: float,
) -> Tensor:
    """Add drops where smoothed noise is over a threshold: pale water that shines at its rims, or brown mud.

    The smoothing is multiplied by the image's scale, and the share of the image that is wet stays. An image
    that came out dry gets one drop (the published script divides zero by zero there). Mud keeps what is left
    of thick drops after another smoothing; a lone pixel is thin on 32 pixels and thick on 8, where mud covers
    four times the share.
    """
    shape = (len(images), 1, *images.shape[-2:])
    noise = torch.randn(shape, generator=generator, device=images.device, dtype=images.dtype)
    liquid = mean + smooth_noise(deviation * noise, smoothing)
    wet = liquid >= liquid.amax((1, 2, 3), keepdim=True).clamp(max=threshold)
    if mud:
        cover = smooth(wet.to(images), strength)
        cover = torch.where(cover < 0.8, 0, cover)
        return (1 - cover) * images + cover * tint(MUD, images)
    drops = torch.where(wet, liquid, 0)
    shine = drops * relief(drops)
    shine = shine / shine.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return images + strength * shine * tint(WATER, images)


def relief(drops: Tensor) -> Tensor:
    """Return the light on drops `[N, 1, H, W]`: the distance to their outlines, equalised and embossed."""
    distance = distance_to(outline(drops), drops.dtype)
    box = [filter_matrix(np.full(3, 1 / 3), n, "mirror") for n in drops.shape[-2:]]
    level = (separable(distance, *box) + 1e-4).floor().long().flatten(1)
    ladder = torch.arange(FARTHEST + 1, device=drops.device)
    share = (level[:, :, None] == ladder).sum(1).cumsum(1).to(distance)
    lowest = share.where(share > 0, share[:, -1:]).amin(1, keepdim=True)
    equalised = (share - lowest) / (share[:, -1:] - lowest).clamp(min=1)
    light = correlate(equalised.gather(1, level).view_as(distance), EMBOSS, "mirror").clamp(0, 1)
    return separable(light, *box)


def outline(liquid: Tensor) -> Tensor:
    """Return the outlines of drops `[N, 1, H, W]` as booleans: the Canny filter.

    References:
        Canny (1986), A computational approach to edge detection, IEEE TPAMI 8(6), with Sobel differences.
    """
    height, width = liquid.shape[-2:]
    level = (255 * liquid).floor()
    sums, steps = np.array([1.0, 2.0, 1.0]), np.array([-1.0, 0.0, 1.0])
    right = separable(level, filter_matrix(sums, height, "nearest"), filter_matrix(steps, width, "nearest"))
    down = separable(level, filter_matrix(steps, height, "nearest"), filter_matrix(sums, width, "nearest"))
    slope = right.abs() + down.abs()
    around = F.pad(slope, (1, 1, 1, 1))

    def beside(y: int, x: int) -> Tensor:
        return around[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width]

    # A pixel is on the outline if the slope peaks there along its own direction, in eighths of a turn; of two
    # equal neighbours the left or upper one is.
    flat, steep = math.tan(math.pi / 8) * right.abs(), math.tan(3 * math.pi / 8) * right.abs()
    falling, rising = torch.maximum(beside(-1, 1), beside(1, -1)), torch.maximum(beside(-1, -1), beside(1, 1))
    diagonal = torch.where(right * down >= 0, slope > rising, slope > falling)
    upright = (slope > beside(-1, 0)) & (slope >= beside(1, 0))
    across = (slope > beside(0, -1)) & (slope >= beside(0, 1))
    peak = torch.where(down.abs() < flat, across, torch.where(down.abs() > steep, upright, diagonal))
    return connected(peak & (slope > STEEP), peak & (slope > GENTLE))


def connected(seeds: Tensor, allowed: Tensor) -> Tensor:
    """Return the pixels of `allowed [N, 1, H, W]` that hang together with `seeds`, corners included."""
    while True:
        grown = (F.max_pool2d(seeds.float(), 3, stride=1, padding=1) > 0) & allowed
        if torch.equal(grown, seeds):
            return seeds
        seeds = grown


def distance_to(rim: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of each pixel to the nearest of `rim [N, 1, H, W]`, in pixels of a 32-pixel image.

    It is the length of the shortest path of straight, diagonal and knight's moves, as OpenCV has it, up to 2 % from
    the Euclidean one; the light on drops shows the difference.

    References:
        Borgefors (1986), Distance transformations in digital images, CVGIP 34(3).
    """
    height, width = rim.shape[-2:]
    far = FARTHEST * image_scale(rim)
    distance = (~rim).to(dtype) * far
    while True:
        around = F.pad(distance, (2, 2, 2, 2), value=far)
        nearer = reduce(
            torch.minimum,
            (around[..., 2 + y : 2 + y + height, 2 + x : 2 + x + width] + length for (y, x), length in MOVES.items()),
            distance,
        )
        if torch.equal(nearer, distance):
            return distance / image_scale(rim)
        distance = nearer
