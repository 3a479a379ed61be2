"""Calibration of groups, against loops and SciPy, and coverage of the worst group's interval by simulation."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from bayesguard.errors import BadInput, BadType
from bayesguard.metrics.functional import expected_calibration_error, group_calibration
from bayesguard.metrics.functional.groups import gaps


def example(count: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(count, 3, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    labels = probs.multinomial(1, generator=generator)[:, 0]
    return probs, labels, torch.rand(count, 4, generator=generator) < torch.tensor([0.7, 0.4, 0.2, 0.05])


def test_every_number_of_every_group_by_itself() -> None:
    probs, labels, groups = example()
    found = group_calibration(probs, labels, groups, num_bins=5, confidence_level=0.9)
    for g in range(4):
        rows = [i for i in range(400) if groups[i, g]]
        right = [bool(probs[i].argmax() == labels[i]) for i in rows]
        sure = np.mean([float(probs[i].max()) for i in rows])
        assert int(found.rows[g]) == len(rows)
        assert float(found.accuracy[g]) == pytest.approx(np.mean(right))
        assert float(found.confidence[g]) == pytest.approx(sure)
        assert float(found.gap[g]) == pytest.approx(np.mean(right) - sure)
        exact = binomtest(sum(right), len(rows)).proportion_ci(1 - 0.1 / 4, "exact")
        assert float(found.lower[g] + found.confidence[g]) == pytest.approx(exact.low, abs=1e-9)
        assert float(found.upper[g] + found.confidence[g]) == pytest.approx(exact.high, abs=1e-9)
        alone = expected_calibration_error(probs[rows], labels[rows], num_bins=5, norm="l2", debiased=True)
        assert float(found.error[g]) == pytest.approx(float(alone), abs=1e-12)
        assert 0 <= found.error_lower[g] <= found.error_upper[g] <= 1
    assert int(found.worst) == int(found.gap.abs().argmax())
    bounds = [(max(low, -high, 0), max(high, -low)) for low, high in zip(found.lower, found.upper, strict=True)]
    assert float(found.worst_lower) == float(max(low for low, _ in bounds))
    assert float(found.worst_upper) == float(max(high for _, high in bounds))
    assert found.worst_lower <= found.worst_gap <= found.worst_upper


def test_labels_are_columns_and_overlap_is_allowed() -> None:
    probs, labels, _ = example()
    named = torch.arange(400) % 3 * 5
    columns = torch.stack([named == 0, named == 5, named == 10], -1)
    first, second = group_calibration(probs, labels, named), group_calibration(probs, labels, columns)
    assert first.group.tolist() == [0, 5, 10]
    assert all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    again = group_calibration(probs[order], labels[order], named[order])
    torch.testing.assert_close(again.error, first.error)
    torch.testing.assert_close(again.lower, first.lower)


def test_the_worst_groups_interval_covers_and_the_unadjusted_does_not() -> None:
    """Of 22 groups that overlap, with chances that differ from row to row."""
    generator = torch.Generator().manual_seed(0)
    confidence = 0.5 + 0.5 * torch.rand(2000, generator=generator, dtype=torch.float64)
    chances = (confidence + 0.1 * (torch.rand(2000, generator=generator) - 0.5)).clamp(0, 1)
    groups = torch.nn.functional.one_hot(torch.arange(2000) % 20, 22).bool()
    groups[:, 20], groups[:, 21] = torch.arange(2000) < 1000, torch.arange(2000) % 3 == 0
    truth = (chances - confidence) @ groups.double() / groups.sum(0)
    alpha, runs = 0.1, 1000

    def coverage(level: float) -> tuple[float, float, float]:
        """Of all gaps at once, of the gap that looks worst, and of the largest true gap."""
        hits = []
        for _ in range(runs):
            found = gaps(confidence, chances.bernoulli(generator=generator), groups, level)
            inside = (found.lower <= truth) & (truth <= found.upper)
            largest = found.worst_lower <= truth.abs().max() <= found.worst_upper
            hits.append([bool(inside.all()), bool(inside[found.worst]), bool(largest)])
        return tuple(np.mean(hits, axis=0).tolist())

    noise = 5 * math.sqrt(alpha * (1 - alpha) / runs)
    assert min(coverage(alpha)) > 1 - alpha - noise
    unadjusted = coverage(22 * alpha)  # each group by itself at level 1 - alpha
    assert max(unadjusted[:2]) < 1 - alpha - noise


def test_sure_and_empty_groups() -> None:
    probs = torch.tensor([[1.0, 0.0]]).repeat(10, 1)
    groups = torch.stack([torch.arange(10) < 5, torch.zeros(10).bool()], -1)
    found = group_calibration(probs, torch.zeros(10).long(), groups)
    assert found.rows.tolist() == [5, 0]
    assert float(found.upper[0]) == 0
    assert float(found.lower[0]) == pytest.approx(0.025 ** (1 / 5) - 1)  # all of five right: only one group has rows
    assert found.gap[1].isnan()
    assert found.error[1].isnan()
    assert int(found.worst) == 0
    assert float(found.worst_lower) == 0


def test_inputs_that_will_not_do() -> None:
    probs, labels, groups = example()
    with pytest.raises(BadType, match="groups must be bool"):
        group_calibration(probs, labels, groups.double())
    with pytest.raises(BadInput, match="groups has shape"):
        group_calibration(probs, labels, groups[:-1])
    with pytest.raises(BadInput, match="groups has shape"):
        group_calibration(probs, labels, groups[:, 0])
    with pytest.raises(BadInput, match="no row in any group"):
        group_calibration(probs, labels, torch.zeros_like(groups))
    with pytest.raises(BadInput, match="confidence_level"):
        group_calibration(probs, labels, groups, confidence_level=1.0)
    with pytest.raises(BadInput, match=r"\[N, K\] is needed"):
        group_calibration(probs[None], labels[None], groups)
