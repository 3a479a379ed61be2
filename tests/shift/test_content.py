"""Shuffled, blended and covered images: exact, another place for each image, and the same for a seed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bayesguard.errors import BadInput
from bayesguard.shift import Blend, Erasing, ImageShift, PatchShuffle, suite

GRIDS = (2, 3, 4, 6, 8)


def images(*shape: int) -> Tensor:
    """Random images in which no value comes twice."""
    count = torch.Size(shape).numel()
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).div(count).float().reshape(shape)


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (4, 3, 28, 28), (3, 2, 9, 13)])
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_a_shuffle_moves_whole_cells_and_leaves_the_rest(shape: tuple[int, ...], severity: int) -> None:
    batch, n = images(*shape), GRIDS[severity - 1]
    shuffled = PatchShuffle(severity)(batch)
    h, w = shape[2] // n, shape[3] // n
    top, left = (shape[2] - n * h) // 2, (shape[3] - n * w) // 2
    inside = torch.zeros(shape[2:], dtype=torch.bool)
    inside[top : top + n * h, left : left + n * w] = True
    assert torch.equal(shuffled[..., ~inside], batch[..., ~inside])
    places = [
        (slice(top + i * h, top + i * h + h), slice(left + j * w, left + j * w + w)) for i in range(n) for j in range(n)
    ]
    for before, after in zip(batch, shuffled, strict=True):
        taken = []
        for place in places:  # each cell is one of the image's own, with all channels, found by its first value
            source = next(k for k, own in enumerate(places) if before[0][own][0, 0] == after[0][place][0, 0])
            assert torch.equal(after[:, *place], before[:, *places[source]])
            taken.append(source)
        assert sorted(taken) == list(range(n * n))


def test_each_image_is_shuffled_by_itself() -> None:
    batch = images(1, 1, 16, 16).expand(600, -1, -1, -1)
    shuffled = PatchShuffle(1)(batch)
    kinds, counts = shuffled.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 24  # all orders of four cells, about equally often
    error = 5 * (600 / 24 * (1 - 1 / 24)) ** 0.5
    assert (counts - 25).abs().max() < error


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_a_blend_is_a_convex_combination_with_another_row(severity: int) -> None:
    batch = images(40, 3, 5, 4).double()
    weight = (0.2, 0.25, 0.3, 0.35, 0.4)[severity - 1]
    other = (Blend(severity)(batch) - (1 - weight) * batch) / weight
    partner = torch.cdist(other.flatten(1), batch.flatten(1)).argmin(-1)
    assert torch.allclose(other, batch[partner], atol=1e-12)
    assert (partner != torch.arange(40)).all()
    assert sorted(partner.tolist()) == list(range(40))


def test_partners_are_drawn_anew_and_uniformly() -> None:
    batch = torch.eye(5).reshape(5, 5, 1, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([Blend(5)(batch, generator).flatten(1) for _ in range(2000)])
    share = (drawn == 0.4).double().mean(0)
    expected = (1 - torch.eye(5)).double() / 4
    assert (share - expected).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5


def test_a_batch_of_one_cannot_be_blended() -> None:
    with pytest.raises(BadInput, match=r"batch of one.*choose a batch_size"):
        Blend(1)(images(1, 1, 8, 8))
    assert len(Blend(1)(images(0, 1, 8, 8))) == 0


@pytest.mark.parametrize("shape", [(300, 1, 8, 8), (200, 3, 28, 20)])
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_erasing_covers_one_rectangle_with_one_grey(shape: tuple[int, ...], severity: int) -> None:
    batch = torch.full(shape, 2.0).sub(1)
    erased = Erasing(severity)(batch)
    height, width = (max(1, round((0.3, 0.4, 0.5, 0.6, 0.7)[severity - 1] * side)) for side in shape[2:])
    changed = erased != batch
    assert (changed == changed[:, :1]).all()
    rows, columns = changed.any(3)[:, 0], changed.any(2)[:, 0]
    assert (rows.sum(-1) == height).all()
    assert (columns.sum(-1) == width).all()
    assert torch.equal(changed[:, 0], rows[:, :, None] & columns[:, None])
    for marks, length in ((rows, height), (columns, width)):
        first, last = marks.int().argmax(-1), marks.shape[1] - 1 - marks.flip(-1).int().argmax(-1)
        assert (last - first + 1 == length).all()  # without a gap
        assert set(first.tolist()) == set(range(marks.shape[1] - length + 1))  # every place
    greys = torch.stack([one[mark].unique() for one, mark in zip(erased, changed, strict=True)])
    assert greys.shape == (shape[0], 1)
    assert abs(float(greys.mean()) - 0.5) < 5 * (1 / 12 / shape[0]) ** 0.5


@pytest.mark.parametrize("make", [PatchShuffle, Blend, Erasing])
def test_seeds_types_and_severities(make: Any) -> None:
    batch = images(6, 3, 10, 12)
    before = batch.clone()
    for severity in range(1, 6):
        shift: ImageShift = make(severity)
        first = shift(batch)
        assert torch.equal(first, make(severity)(batch))
        assert torch.equal(batch, before)
        assert not torch.equal(first, make(severity, seed=1)(batch))
        generator = shift.generator("cpu")
        assert torch.equal(first, shift(batch, generator))
        assert not torch.equal(first, shift(batch, generator))
        assert shift(batch.half()).dtype == torch.float16
        assert shift(batch.double()).dtype == torch.float64
    for wrong in (0, 6, 1.5):
        with pytest.raises((BadInput, TypeError), match="severity"):
            make(wrong)


def test_grids_need_a_pixel_for_each_cell() -> None:
    with pytest.raises(BadInput, match="8 x 8 pixels at least to be cut into as many cells, got 7 x 20"):
        PatchShuffle(5)(images(2, 1, 7, 20))


def test_the_suite() -> None:
    shifts = suite("content", seed=3)
    assert [(s.name, s.severity) for s in shifts] == [
        (name, severity) for name in ("patch_shuffle", "blend", "erasing") for severity in range(1, 6)
    ]
    assert all(shift.seed == 3 and shift(images(2, 1, 8, 8)).shape == (2, 1, 8, 8) for shift in shifts)
