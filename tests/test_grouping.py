"""Groups by labels, masks, functions and columns are the same groups; clusters are numbered."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import bayesguard as bg
from bayesguard.errors import BadInput, BadType
from bayesguard.grouping import cluster_index
from bayesguard.predictive import Predictive
from bayesguard.results import Evaluation


def data(rows: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 2, generator=generator)
    x[:, 1] = (x[:, 1] * 2).round()
    return x, (x[:, 0] + torch.randn(rows, generator=generator) > 0).long()


def linear() -> bg.Predictor:
    network = nn.Linear(2, 2, bias=False)
    network.weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    return bg.Deterministic(network)


def found(data: Any, groups: Any, predictor: Any = None) -> dict[str, tuple[float, float, float, int]]:
    evaluation = bg.evaluate(predictor or linear(), data, metrics=["nll"], groups=groups)
    rows = [result for result in evaluation.results if result.group is not None]
    return {str(row.group): (row.value, row.lower, row.upper, row.num_examples) for row in rows}


def test_every_form_gives_the_same_groups() -> None:
    x, y = data()
    labels = x[:, 1].tolist()
    wanted = found((x, y), labels)
    assert set(wanted) == {str(label) for label in labels}
    assert found((x, y), x[:, 1].numpy()) == wanted
    assert found((x, y), 1) == wanted
    assert found((x, y), -1) == wanted
    assert found((x, y), np.int64(1)) == wanted
    assert found((x, y), lambda inputs: inputs[:, 1]) == wanted
    batches = [(x[:13], y[:13]), (x[13:], y[13:])]
    assert found(batches, lambda inputs: inputs[:, 1].numpy()) == wanted
    once: Iterator[Any] = iter(batches)
    assert found(once, 1) == wanted
    values = {name: row[0] for name, row in wanted.items()}
    named = found((x, y), {"side": labels, "again": 1})
    assert {name: row[0] for name, row in named.items() if name.startswith("side=")} == {
        f"side={name}": value for name, value in values.items()
    }
    assert {name.partition("=")[0] for name in named} == {"side", "again"}


def test_masks_may_overlap() -> None:
    x, y = data()
    left, old = x[:, 0] < 0, x[:, 1] > 0
    both = found((x, y), {"left": left, "old": old.numpy()})
    assert {name: row[3] for name, row in both.items()} == {"left": int(left.sum()), "old": int(old.sum())}
    assert both["old"][0] == pytest.approx(found((x, y), old.tolist())["True"][0])
    with pytest.raises(BadInput, match="mask without"):
        found((x, y), {"none": torch.zeros(60, dtype=torch.bool)})


def test_quantile_bins_are_of_equal_mass_and_never_part_ties() -> None:
    x, y = data()
    bins = found((x, y), (0, 4))
    assert [row[3] for row in bins.values()] == [15, 15, 15, 15]
    assert [name[:4] for name in bins] == ["1: [", "2: (", "3: (", "4: ("]
    ends = np.sort(x[:, 0].double().numpy())[[14, 29, 44]]
    for number, (name, row) in enumerate(bins.items()):
        inside = np.digitize(x[:, 0].double().numpy(), ends, right=True) == number
        assert name.startswith(f"{number + 1}: ")
        assert row[0] == pytest.approx(found((x, y), inside.tolist())["True"][0])
    ties = found((x, y), (1, 10))
    assert sum(row[3] for row in ties.values()) == 60
    labels = x[:, 1].tolist()
    assert all(row[3] >= min(labels.count(label) for label in labels) for row in ties.values())
    assert len(ties) <= len(set(labels))


def test_groups_that_cannot_be_read() -> None:
    x, y = data()
    pred = linear().predict((x, y))
    with pytest.raises(BadType, match="only has its answers"):
        bg.evaluate(pred, y, groups=0)
    with pytest.raises(BadInput, match=r"columns 0\.\.1"):
        found((x, y), 2)
    with pytest.raises(BadInput, match="number of quantile bins"):
        found((x, y), (0, 1))
    with pytest.raises(BadInput, match="returned 3 labels for a batch of 60"):
        found((x, y), lambda inputs: inputs[:3, 0])
    with pytest.raises(BadType, match="labels must be"):
        found((x, y), "label")
    with pytest.raises(BadInput, match=r"groups\['a'\] has 3 labels"):
        found((x, y), {"a": [0, 1, 2]})
    with pytest.raises(BadInput, match="two groups of one name"):
        found((x, y), {"a": y, "a=1": y == 1})
    with pytest.raises(BadInput, match="empty"):
        found((x, y), {})
    images = bg.Deterministic(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(BadInput, match="tabular"):
        found((torch.rand(60, 1, 2, 2), y), 0, images)
    bad = x.clone()
    bad[5, 1] = math.nan
    with pytest.raises(BadInput, match="row 5"):
        bg.evaluate(bg.Deterministic(First()), (bad, y), groups=(1, 2))


class First(nn.Module):
    """Logits of the first column alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([-x[:, 0], x[:, 0]], -1)


def test_what_is_read_off_the_inputs_needs_no_order() -> None:
    x, y = data()
    shuffled: DataLoader[Any] = DataLoader(
        TensorDataset(x, y), batch_size=16, shuffle=True, generator=torch.Generator()
    )
    wanted = found((x, y), 1)
    again = found(shuffled, 1)
    assert {name: row[0] for name, row in again.items()} == pytest.approx({k: row[0] for k, row in wanted.items()})
    with pytest.raises(BadInput, match="groups go by the order"):
        bg.evaluate(linear(), shuffled, groups=y)
    with pytest.raises(BadInput, match="clusters go by the order"):
        bg.evaluate(linear(), shuffled, clusters=y)


def test_clusters_are_numbered() -> None:
    assert cluster_index(["b", "a", "b"], 3).tolist() == [0, 1, 0]
    assert cluster_index(torch.tensor([7, 7, 2]), 3).tolist() == [0, 0, 1]
    with pytest.raises(BadInput, match="clusters has 2 labels"):
        cluster_index([0, 1], 3)
    with pytest.raises(BadInput, match="one cluster"):
        cluster_index([0, 0], 2)


def worst(seed: int) -> Evaluation:
    """Twenty groups of 50 coins, all predicted alike: none is worse than another."""
    targets = torch.randint(2, (1000,), generator=torch.Generator().manual_seed(seed))
    predictive = Predictive.from_probs(torch.full((1000,), 0.7, dtype=torch.float64))
    return bg.evaluate(predictive, targets, metrics=["accuracy"], groups=torch.arange(1000) % 20, seed=seed)


def test_the_interval_of_the_worst_group_knows_that_it_was_picked() -> None:
    joint = own = 0.0
    for seed in range(60):
        evaluation = worst(seed)
        picked = evaluation.worst_group("accuracy")
        joint += (picked.upper < 0.5) / 60
        own += (evaluation.result("accuracy", group=picked.group).upper < 0.5) / 60
    # The tail of 0.05 within five standard errors of a share of 60. By itself each of 20 groups misses in 0.025.
    bound = 0.05 + 5 * math.sqrt(0.05 * 0.95 / 60)
    assert joint < bound
    assert own > bound


def test_joint_intervals_hold_the_own_ones() -> None:
    evaluation = worst(0)
    for row in evaluation.simultaneous:
        own = evaluation.result("accuracy", group=row.group)
        assert row.lower < own.lower < own.value == row.value < own.upper < row.upper
    one = bg.evaluate(Predictive.from_normal([0.0, 1.0], [1.0, 1.0]), [0.3, 0.2], groups=[1, 1], metrics=["nll"])
    assert one.worst_group("nll").group == "1"


@pytest.mark.parametrize("missing", [None, math.nan, pytest.importorskip("pandas").NA])
def test_a_missing_label_is_none(missing: Any) -> None:
    labels = ["a", missing, "b", missing]
    pred, y = Predictive.from_probs([[0.9, 0.1]] * 4), torch.tensor([0, 1, 0, 1])
    with pytest.raises(BadInput, match="clusters has no label in row 1"):
        bg.evaluate(pred, y, clusters=labels)
    with pytest.raises(BadInput, match="groups has no label in row 1"):
        bg.evaluate(pred, y, groups=labels)


@pytest.mark.parametrize("name", ["subset", "weighted", "batches", "distributed"])
def test_labels_by_place_need_rows_in_order(name: str) -> None:
    x, y = data()
    rows = TensorDataset(x, y)
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, dict[str, Any]] = {
        "subset": {"sampler": SubsetRandomSampler(range(60), generator)},
        "weighted": {"sampler": WeightedRandomSampler([1.0] * 60, 60, generator=generator)},
        "batches": {"batch_sampler": BatchSampler(RandomSampler(rows, generator=generator), 8, False)},
        "distributed": {"sampler": DistributedSampler(rows, num_replicas=1, rank=0)},
    }
    loader = DataLoader(rows, **settings[name])
    with pytest.raises(BadInput, match="groups go by the order"):
        bg.evaluate(linear(), loader, groups=y)
    with pytest.raises(BadInput, match="clusters go by the order"):
        bg.evaluate(linear(), loader, clusters=y)


def test_batches_in_order_have_groups() -> None:
    x, y = data()
    rows = TensorDataset(x, y)
    in_order = DataLoader(rows, batch_sampler=BatchSampler(SequentialSampler(rows), 8, False))
    for loader in (in_order, DataLoader(rows, sampler=DistributedSampler(rows, 1, 0, shuffle=False))):
        assert found(loader, y) == found((x, y), y)
