"""Conformity scores of labels and the hash of rows, against the plain formulas in wider numbers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayesguard.calibration.scores import _hash, label_scores, row_uniforms

SCORES = ["lac", "aps", "raps", "saps"]
ROWS, CLASSES = 1100, 300  # more rows than a slice holds


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tied(dtype: torch.dtype) -> Tensor:
    counts = torch.randint(0, 4, (ROWS, CLASSES), generator=generator(1)).to(dtype)  # a quarter of them zero
    return counts / counts.sum(-1, keepdim=True)


def one_class(dtype: torch.dtype) -> Tensor:
    return torch.eye(CLASSES, dtype=dtype)[torch.randint(0, CLASSES, (ROWS,), generator=generator(2))]


def far_down(dtype: torch.dtype) -> Tensor:
    return (200 * torch.rand(ROWS, CLASSES, generator=generator(3), dtype=torch.float64)).softmax(-1).to(dtype)


def flat(dtype: torch.dtype) -> Tensor:
    return torch.full((ROWS, CLASSES), 1 / CLASSES, dtype=dtype)


def plain(probs: Tensor, labels: Tensor, score: str, share: Tensor) -> Tensor:
    """The formulas as they are written, on all pairs' comparisons in float64."""
    probs = probs.double()
    own = probs[torch.arange(len(probs)), labels]
    above, equal = probs > own[:, None], probs == own[:, None]
    rank = (above.sum(-1) + equal.sum(-1)).double()
    if score == "lac":
        return 1 - own
    if score == "saps":
        top = probs.max(-1).values
        return torch.where(rank == 1, share * top, top + (rank - 2 + share) * 0.1)
    mass = torch.where(above, probs, 0).sum(-1) + share * torch.where(equal, probs, 0).sum(-1)
    return mass + 0.1 * (rank - 2).clamp_min(0) if score == "raps" else mass


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [tied, one_class, far_down, flat])
def test_scores_of_labels_are_the_formulas(score: Any, seed: int | None, dtype: torch.dtype, kind: Any) -> None:
    probs, labels = kind(dtype), torch.randint(0, CLASSES, (ROWS,), generator=generator(4))
    labels[::3] = probs.argmax(-1)[::3]
    share = torch.ones(ROWS, dtype=torch.float64) if seed is None else row_uniforms(probs, seed)
    found = label_scores(probs, labels, score, penalty=0.1, free_ranks=2, seed=seed)
    assert found.dtype == torch.float64
    wanted = plain(probs, labels, score, share)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-13)
    # What must fail: sums in float32, and ties that are taken for more probable or left out.
    if score in ("aps", "raps") and kind is far_down and dtype == torch.float32:
        own = probs.gather(-1, labels[:, None])
        assert not torch.allclose((probs * (probs > own)).sum(-1).double(), wanted, rtol=0, atol=1e-13)
    if score != "lac" and seed is not None and kind is flat:
        assert not torch.allclose(found, plain(probs, labels, score, torch.ones_like(share)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_of_each_row_alone_and_keep_no_graph(score: Any) -> None:
    probs = far_down(torch.float32).requires_grad_()
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator(5))
    found = label_scores(probs, labels, score, penalty=0.1, free_ranks=2, seed=0)
    assert not found.requires_grad
    for row in (0, 500, ROWS - 1):
        alone = label_scores(probs[[row]], labels[[row]], score, penalty=0.1, free_ranks=2, seed=0)
        assert torch.allclose(alone, found[[row]], rtol=0, atol=1e-14)


def splitmix(row: list[int], seed: int) -> int:
    """The hash in Python's integers, which neither overflow nor have a sign bit."""
    every = 2**64 - 1

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & every
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & every
        return value ^ (value >> 31)

    return mix(sum(mix((bits + seed) & every) for bits in row) & every)


def test_the_hash_is_the_same_in_numpy_in_torch_and_in_exact_integers() -> None:
    bits = torch.randint(-(2**31), 2**31, (7, 50), generator=generator(6))
    for seed in (0, 3, 2**40):
        ours = _hash(bits.numpy().copy(), seed)
        assert np.array_equal(ours, _hash(bits.clone(), seed).numpy())
        assert [value % 2**64 for value in ours.tolist()] == [splitmix(row, seed) for row in bits.tolist()]


def test_the_hash_leaves_its_rows_as_they_are_and_knows_no_order() -> None:
    probs = torch.rand(50, 6, generator=generator(7))
    before = probs.clone()
    shares = row_uniforms(probs, 1)
    assert torch.equal(probs, before)
    assert torch.equal(row_uniforms(probs.flip(-1), 1), shares)
    assert torch.equal(row_uniforms(probs.T.contiguous().T, 1), shares)
    assert torch.equal(row_uniforms(probs.double(), 1), shares)
    assert row_uniforms(probs[:0], 1).shape == (0,)
