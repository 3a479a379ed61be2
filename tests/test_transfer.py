"""The next batch is on its way while the present one is used, and arrives as it was."""

from collections.abc import Iterator

import pytest
import torch

from bayesguard.data import Batch, batches
from bayesguard.transfer import on_device, one_ahead

INPUTS, TARGETS = torch.arange(14.0).reshape(7, 2), torch.arange(7)


def test_the_next_is_started_before_one_is_handed_out() -> None:
    log: list[str] = []

    def start(item: int) -> int:
        log.append(f"start {item}")
        return item + 10

    def finish(begun: int) -> int:
        log.append(f"finish {begun - 10}")
        return begun - 10

    for item in one_ahead(iter(range(3)), start, finish):
        log.append(f"use {item}")
    assert log == [
        *("start 0", "start 1", "finish 0", "use 0"),
        *("start 2", "finish 1", "use 1"),
        *("finish 2", "use 2"),
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_nothing_is_lost_or_changed_in_order(count: int) -> None:
    assert list(one_ahead(iter(range(count)), lambda x: x, lambda x: x)) == list(range(count))


def test_an_error_of_the_data_is_theirs() -> None:
    def broken() -> Iterator[int]:
        yield 0
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(one_ahead(broken(), lambda x: x, lambda x: x))


def test_on_a_cpu_batches_pass_one_by_one() -> None:
    taken: list[Batch] = []

    def watched() -> Iterator[Batch]:
        for batch in batches((INPUTS, TARGETS), batch_size=3):
            taken.append(batch)
            yield batch

    stream = on_device(watched(), torch.device("cpu"))
    first = next(stream)
    assert len(taken) == 1
    assert torch.equal(first.inputs[0], INPUTS[:3])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_cuda_as_they_were() -> None:
    inputs = torch.randn(50_000, 64)
    data = [({"x": inputs[rows], "name": "kept"}, TARGETS[:1].expand(len(inputs[rows]))) for rows in slices(inputs)]
    found = list(on_device(batches(data), torch.device("cuda")))
    assert all(batch.kwargs["x"].is_cuda and batch.kwargs["name"] == "kept" for batch in found)
    assert torch.equal(torch.cat([batch.kwargs["x"] for batch in found]).cpu(), inputs)


def slices(rows: torch.Tensor) -> list[slice]:
    return [slice(start, start + 999) for start in range(0, len(rows), 999)]
