"""Every form of data comes out as the same batches, and what cannot be read says why."""

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from bayesguard.data import Batch, batches, bootstrap, count_rows, is_one_shot, known_rows, to_device
from bayesguard.errors import BadInput, BadType

INPUTS = torch.arange(14.0).reshape(7, 2)
TARGETS = torch.arange(7)


def _rows(stream: Iterator[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    seen = list(stream)
    return torch.cat([b.inputs[0] for b in seen]), torch.cat([b.targets for b in seen if b.targets is not None])


@pytest.mark.parametrize(
    "data",
    [
        (INPUTS, TARGETS),
        [INPUTS.numpy(), TARGETS.numpy()],
        DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=3),
        [(INPUTS[:4], TARGETS[:4]), (INPUTS[4:], TARGETS[4:])],
        [(INPUTS[:4].numpy(), TARGETS[:4].tolist()), (INPUTS[4:], TARGETS[4:])],
        [{"labels": TARGETS, "x": INPUTS}],
    ],
    ids=["tensors", "numpy", "loader", "list", "mixed", "mapping"],
)
def test_every_form_gives_the_same_rows(data: Any) -> None:
    key = "x" if isinstance(data[0] if isinstance(data, list) else None, dict) else None
    inputs, targets = _rows(batches(data, batch_size=3, input_key=key))
    assert torch.equal(inputs, INPUTS)
    assert torch.equal(targets, TARGETS)
    assert count_rows(data) == 7


def test_a18_ragged_single_and_empty_batches_keep_their_axes() -> None:
    sizes = [(b.inputs[0].shape, b.num_rows) for b in batches((INPUTS, TARGETS), batch_size=3)]
    assert sizes == [((3, 2), 3), ((3, 2), 3), ((1, 2), 1)]
    (empty,) = batches((INPUTS[:0], TARGETS[:0]))
    assert empty.inputs[0].shape == (0, 2)
    assert empty.num_rows == 0
    assert count_rows((INPUTS[:0], TARGETS[:0])) == 0


def test_a14_several_and_keyword_inputs_pass_untouched() -> None:
    (pair,) = batches(((INPUTS, INPUTS + 1), TARGETS))
    assert torch.equal(pair.inputs[1], INPUTS + 1)
    (named,) = batches([UserDict({"input_ids": INPUTS, "note": "kept", "labels": TARGETS})])
    assert named.inputs == ()
    assert set(named.kwargs) == {"input_ids", "note"}
    assert torch.equal(named.targets, TARGETS) if named.targets is not None else False
    (mapped,) = batches([({"a": INPUTS, "b": INPUTS}, TARGETS)])
    assert set(mapped.kwargs) == {"a", "b"}
    (keyed,) = batches([{"image": INPUTS, "digit": TARGETS, "id": TARGETS}], input_key="image", target_key="digit")
    assert len(keyed.inputs) == 1
    assert keyed.kwargs == {}
    (graph,) = batches([((INPUTS, torch.eye(3)), TARGETS)])
    assert graph.num_rows == 7


def test_inputs_alone_have_no_targets() -> None:
    for data in (INPUTS, INPUTS.numpy(), [INPUTS], DataLoader(TensorDataset(INPUTS), batch_size=7)):
        (batch,) = batches(data)
        assert batch.targets is None
        assert torch.equal(batch.inputs[0], INPUTS)


def test_dtypes_are_kept_unless_numpy_inputs_are_asked_to_follow() -> None:
    doubles = INPUTS.double().numpy()
    (kept,) = batches((doubles, TARGETS.numpy().astype(np.int16)))
    assert kept.inputs[0].dtype == torch.float64
    assert kept.targets is not None
    assert kept.targets.dtype == torch.int16
    (followed,) = batches(((doubles, np.arange(7)), TARGETS), numpy_dtype=torch.float32)
    assert [value.dtype for value in followed.inputs] == [torch.float32, torch.int64]
    (tensor,) = batches((INPUTS.double(), TARGETS), numpy_dtype=torch.float32)
    assert tensor.inputs[0].dtype == torch.float64


def test_shuffling_is_a_permutation_that_repeats_itself_and_keeps_pairs() -> None:
    def shuffled(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _rows(batches((INPUTS, TARGETS), batch_size=2, shuffle_generator=torch.Generator().manual_seed(seed)))

    inputs, targets = shuffled(1)
    assert torch.equal(targets, shuffled(1)[1])
    assert not torch.equal(targets, shuffled(2)[1])
    assert torch.equal(inputs, INPUTS[targets])
    assert torch.equal(targets.sort().values, TARGETS)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ((INPUTS, TARGETS[:6]), {}, "same number of rows"),
        ((INPUTS, torch.tensor(1)), {}, "same number of rows"),
        ([(INPUTS, TARGETS[:6]), (INPUTS, TARGETS)], {}, "batch 0 has 6 rows of targets"),
        ([(INPUTS[:1], torch.tensor(1))], {}, "no row axis"),
        ([(INPUTS, INPUTS, TARGETS)], {}, "has 3 parts"),
        ([{"x": INPUTS}], {"input_key": "y"}, "input_key is 'y', but batch 0 has the keys"),
        ([{"x": INPUTS}], {"target_key": "y"}, "target_key is 'y'"),
        ([(INPUTS, TARGETS)], {"target_key": "y"}, "for batches that are mappings"),
        ([], {}, "yields no batches"),
        (DataLoader(TensorDataset(INPUTS), batch_size=8, drop_last=True), {}, "drop_last"),
        (iter(()), {}, "run dry"),
        ((INPUTS, TARGETS), {"batch_size": 0}, "batch_size"),
    ],
)
def test_unusable_data_are_named(data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        list(batches(data, **settings))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "data must be"),
        ("path", "data must be"),
        ({"x": INPUTS}, "data must be"),
        (["ab"], "batch 0 is of type str"),
        ((INPUTS, [0] * 7), "convert them"),
        ((["a"], TARGETS), "must be arrays"),
        ([(np.array(["a"]), TARGETS[:1])], "must hold numbers"),
    ],
)
def test_unknown_forms_are_named(data: Any, message: str) -> None:
    with pytest.raises(BadType, match=message):
        list(batches(data))


class _Stream(IterableDataset[tuple[torch.Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        yield from ((row, index) for index, row in enumerate(INPUTS))


def test_d7_rows_are_counted_as_they_will_come() -> None:
    dataset = TensorDataset(INPUTS, TARGETS)
    assert count_rows(DataLoader(dataset, batch_size=3, drop_last=True)) == 6
    assert count_rows(DataLoader(dataset, batch_size=3, shuffle=True)) == 7
    assert count_rows(DataLoader(dataset, batch_size=3, sampler=WeightedRandomSampler([1.0] * 7, 11))) == 11
    assert count_rows(DataLoader(dataset, batch_sampler=[[0, 1], [2]])) == 3
    assert count_rows(DataLoader(_Stream(), batch_size=3)) == 7
    with pytest.raises(BadInput, match="use it up"):
        count_rows(batch for batch in [(INPUTS, TARGETS)])


def test_d6_asking_about_a_loader_starts_nothing() -> None:
    loader = DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=3, shuffle=True)
    before = torch.get_rng_state()
    assert not is_one_shot(loader)
    count_rows(loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert is_one_shot(iter([]))


def test_to_device_moves_what_is_nested_and_keeps_the_rest() -> None:
    batch = Batch((INPUTS, [INPUTS, {"a": INPUTS}]), {"mask": INPUTS, "name": "x", "none": None}, None)
    moved = to_device(batch, "meta")
    assert moved.inputs[0].device.type == moved.inputs[1][1]["a"].device.type == "meta"
    assert moved.kwargs["mask"].device.type == "meta"
    assert moved.kwargs["name"] == "x"
    assert moved.targets is None


def test_bootstrap_draws_rows_with_replacement_and_keeps_pairs() -> None:
    inputs, targets = bootstrap((INPUTS, TARGETS.numpy()), seed=3)
    assert isinstance(targets, np.ndarray)
    assert torch.equal(inputs, INPUTS[torch.from_numpy(targets)])
    expected = torch.randint(7, (7,), generator=torch.Generator().manual_seed(3))
    assert np.array_equal(targets, expected.numpy())
    assert not np.array_equal(targets, bootstrap((INPUTS, TARGETS), seed=4)[1].numpy())
    (first, second), labels = bootstrap(((INPUTS, INPUTS + 1), TARGETS), seed=3)
    assert torch.equal(first + 1, second)
    assert torch.equal(first, INPUTS[labels])


def _collate(rows: list[Any]) -> Any:
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def test_bootstrap_rebuilds_a_loader_with_its_settings() -> None:
    dataset: Dataset[Any] = TensorDataset(INPUTS, TARGETS)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(dataset, batch_size=3, shuffle=True, drop_last=True, collate_fn=_collate, generator=generator)
    drawn = bootstrap(loader, seed=5)
    assert (drawn.batch_size, drawn.drop_last, drawn.collate_fn) == (3, True, _collate)
    assert isinstance(drawn.sampler, RandomSampler)
    assert drawn.sampler.generator is generator
    assert isinstance(drawn.dataset, Subset)
    assert drawn.dataset.dataset is dataset
    expected = torch.randint(7, (7,), generator=torch.Generator().manual_seed(5)).tolist()
    in_order = bootstrap(DataLoader(dataset, batch_size=3), seed=5)
    assert _rows(batches(in_order))[1].tolist() == expected


@pytest.mark.parametrize(
    "data",
    [
        [(INPUTS, TARGETS)],
        DataLoader(_Stream(), batch_size=3),
        DataLoader(TensorDataset(INPUTS), batch_size=3, sampler=WeightedRandomSampler([1.0] * 7, 7)),
        DataLoader(TensorDataset(INPUTS), batch_sampler=[[0, 1]]),
    ],
    ids=["list", "stream", "weighted", "batch sampler"],
)
def test_bootstrap_refuses_rows_that_have_no_number(data: Any) -> None:
    with pytest.raises(BadInput, match="bootstrap needs"):
        bootstrap(data, seed=0)


def test_rows_are_known_without_a_pass_or_not_at_all() -> None:
    dataset = TensorDataset(INPUTS, TARGETS)
    assert known_rows((INPUTS, TARGETS)) == known_rows(INPUTS) == known_rows(DataLoader(dataset, batch_size=2)) == 7
    assert known_rows(DataLoader(dataset, batch_size=2, drop_last=True)) == 6
    assert known_rows([(INPUTS, TARGETS)]) is None
    assert known_rows(iter([(INPUTS, TARGETS)])) is None


def test_what_is_no_tensor_moves_by_its_own_method() -> None:
    class Graph:
        def to(self, device: Any) -> str:
            return f"moved to {device}"

    batch = to_device(Batch((Graph(), INPUTS), {}, None), "cpu", non_blocking=True)
    assert batch.inputs[0] == "moved to cpu"
    assert torch.equal(batch.inputs[1], INPUTS)
