"""Normal numbers made of NumPy's bits: their law up to five standard deviations, independence, and repetition."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from bayesguard.sampling.normal_numbers import box_muller, standard_normal_like

Words = npt.NDArray[np.uint64]
Make = Callable[[Words], Tensor]

_PAIRS = 1 << 20


def words(count: int = _PAIRS, seed: int = 1) -> Words:
    return np.random.SFC64(seed).random_raw(count)


def uniforms(made: Words) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    integers = made.view(np.uint32)
    return integers[: len(made)], integers[len(made) :]


def polar(first: Any, second: Any) -> Tensor:
    """The formula in float64: uniform numbers (0, 1) and [-1/2, 1/2)."""
    radius = np.sqrt(-2 * np.log(first))
    return torch.from_numpy(np.concatenate([radius * np.cos(2 * np.pi * second), radius * np.sin(2 * np.pi * second)]))


def from_16_bits(made: Words) -> Tensor:
    first, second = uniforms(made)
    return polar(((first >> 16) + 0.5) / 2**16, (second >> 16) / 2**16)


def with_half_the_circle(made: Words) -> Tensor:
    first, second = uniforms(made)
    return polar((first + 0.5) / 2**32, second / 2**33)


def with_one_integer(made: Words) -> Tensor:
    first, _ = uniforms(made)
    return polar((first + 0.5) / 2**32, first / 2**32)


def scaled(made: Words) -> Tensor:
    return 1.01 * box_muller(made)


def of_equal_numbers(made: Words) -> Tensor:
    return torch.cat([box_muller(made[: len(made) // 2])] * 2)


def alternating(made: Words) -> Tensor:
    # Of one law, and half of them have the sign of the number before.
    numbers = box_muller(made)
    numbers[1::2] = numbers[1::2].abs() * torch.where(torch.arange(_PAIRS) % 2 == 0, numbers[::2].sign(), 1)
    return numbers


def test_every_word_gives_what_the_formula_does() -> None:
    edges = np.array([0, 1, 2**32 - 1, 2**31, 2**63, 2**64 - 1], dtype=np.uint64)
    made = np.concatenate([edges, words(200_000)])
    first, second = uniforms(made.copy())
    want = polar((first + 0.5) / 2**32, second.view(np.int32) / 2**32)
    got = box_muller(made).double()
    # Near a distance of 0 the uniform number is nearly 1, whose float32 neighbours are 2^-24 apart.
    first_error = 2**-24 / torch.from_numpy(np.sqrt(-2 * np.log((first + 0.5) / 2**32))).repeat(2).clamp_min(2**-12)
    assert bool(((got - want).abs() <= 2 * first_error + 2e-6).all())
    assert got.isfinite().all()
    assert 6.7 < got.abs().max() < 6.8


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """The statistic, in standard deviations of its law above its mean."""
    cells = counts.numel()
    return float((((counts - expected) ** 2 / expected).sum() - (cells - 1)) / math.sqrt(2 * (cells - 1)))


def law(numbers: Tensor) -> float:
    """Whether 1,000 equally probable cells are filled alike."""
    cells = (torch.special.ndtr(numbers.double()) * 1000).long().clamp_max(999)
    return chi_square(torch.bincount(cells, minlength=1000), torch.full((1000,), len(numbers) / 1000.0))


def kolmogorov_smirnov(numbers: Tensor) -> float:
    found = torch.special.ndtr(numbers.double()).sort().values
    ranks = torch.arange(1, len(found) + 1, dtype=torch.float64) / len(found)
    distance = max((ranks - found).max().item(), (found - ranks + 1 / len(found)).max().item())
    return distance * math.sqrt(len(found))


def tails(numbers: Tensor) -> float:
    """The largest deviation of a count beyond 1, 1.5, ..., 4.5 on either side, in standard deviations."""
    worst = 0.0
    for distance in torch.arange(1, 5, 0.5).tolist():
        expected = len(numbers) * math.erfc(distance / math.sqrt(2)) / 2
        for count in ((numbers > distance).sum().item(), (numbers < -distance).sum().item()):
            worst = max(worst, abs(count - expected) / math.sqrt(expected))
    return worst


def dependence(first: Tensor, second: Tensor) -> float:
    """Whether 32 x 32 equally probable cells of two numbers are filled alike."""
    cells = [(torch.special.ndtr(part.double()) * 32).long().clamp_max(31) for part in (first, second)]
    counts = torch.bincount(32 * cells[0] + cells[1], minlength=1024)
    return chi_square(counts, torch.full((1024,), len(first) / 1024.0))


# Of a right generator each statistic exceeds its bound once in 10^6 times or less.
_LARGEST = 5.5


def test_their_law() -> None:
    numbers = box_muller(words())
    assert law(numbers) < _LARGEST
    assert kolmogorov_smirnov(numbers) < 2.7
    assert tails(numbers) < _LARGEST
    for wrong in (scaled, with_half_the_circle):
        twin = wrong(words())
        assert law(twin) > _LARGEST
        assert kolmogorov_smirnov(twin) > 2.7
    assert law(with_one_integer(words())) > _LARGEST


def test_their_tails() -> None:
    blocks = 24
    expected = blocks * 2 * _PAIRS * math.erfc(5 / math.sqrt(2))
    assert 28 < expected < 30  # Between 6 and 65 are found, but for once in 10^6 times.
    beyond = sum(int((box_muller(words(seed=seed)).abs() > 5).sum()) for seed in range(blocks))
    assert 6 <= beyond <= 65
    # Numbers of 16 bits end before.
    assert from_16_bits(words()).abs().max() < 5


@pytest.mark.parametrize("lag", [1, 2, 64, 1000])
def test_numbers_are_independent(lag: int) -> None:
    numbers = box_muller(words())
    assert dependence(numbers[:-lag:1], numbers[lag:]) < _LARGEST
    twin = alternating(words())
    assert lag > 1 or dependence(twin[:-lag], twin[lag:]) > _LARGEST


def test_the_two_numbers_of_a_point_are_independent() -> None:
    for make, is_right in ((box_muller, True), (with_one_integer, False), (of_equal_numbers, False)):
        numbers = make(words())
        assert (dependence(*numbers.chunk(2)) < _LARGEST) == is_right
    # The direction is uniform whatever the distance, and distances have their law: both in finer cells.
    x, y = box_muller(words()).double().chunk(2)
    angle, height = torch.atan2(y, x) / (2 * math.pi) + 0.5, torch.exp(-(x.square() + y.square()) / 2)
    cells = 64 * (64 * angle).long().clamp_max(63) + (64 * height).long().clamp_max(63)
    assert chi_square(torch.bincount(cells, minlength=4096), torch.full((4096,), _PAIRS / 4096)) < _LARGEST


def test_calls_are_independent_and_repeat_themselves() -> None:
    like = torch.zeros(1 << 20)
    torch.manual_seed(3)
    first, second = standard_normal_like(like), standard_normal_like(like)
    assert dependence(first, second) < _LARGEST
    assert dependence(first, first) > _LARGEST
    torch.manual_seed(3)
    assert torch.equal(standard_normal_like(like), first)
    torch.manual_seed(4)
    assert dependence(standard_normal_like(like), first) < _LARGEST


def test_a_generator_state_brings_them_back_and_numpy_is_left_alone() -> None:
    state, of_numpy = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    found = standard_normal_like(torch.zeros(20_001))
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert torch.equal(standard_normal_like(torch.zeros(20_001)), found)
    assert len(found) == 20_001
    now = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(now, of_numpy, strict=True))


@pytest.mark.parametrize("like", [torch.zeros(100), torch.zeros(50_000, dtype=torch.float64)])
def test_few_numbers_and_other_dtypes_are_those_of_torch(like: Tensor) -> None:
    torch.manual_seed(5)
    found = standard_normal_like(like)
    torch.manual_seed(5)
    assert torch.equal(found, torch.randn_like(like))
