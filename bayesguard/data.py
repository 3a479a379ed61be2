"""Data as users have them (loaders, iterables, arrays) as one stream of batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset

from bayesguard.checks import Array, as_tensor, check_count
from bayesguard.errors import BadInput, BadType

# What users may hand in: a DataLoader, an iterable of batches, or arrays. No type can say it more narrowly.
Data = Any


class Batch(NamedTuple):
    """The rows of one step: positional inputs, keyword inputs and targets (None where there are none)."""

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Tensor | None

    @property
    def num_rows(self) -> int:
        """The number of examples: of the targets, else of the first input that has rows."""
        for value in (self.targets, *self.inputs, *self.kwargs.values()):
            if isinstance(value, Tensor) and value.dim():
                return value.shape[0]
        raise BadInput("a batch has neither targets nor a tensor input with a row axis: its rows cannot be counted")


def batches(
    data: Data,
    *,
    batch_size: int | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    shuffle_generator: torch.Generator | None = None,
    numpy_dtype: torch.dtype | None = None,
) -> Iterator[Batch]:
    """Iterate over data in any of the accepted forms; nothing is squeezed, cast or dropped.

    Args:
        data: A DataLoader or another iterable of batches; or arrays: a pair `(inputs, targets)`, or inputs
            alone. A batch is `(inputs, targets)`, or inputs alone. Inputs are one tensor, a tuple or list
            (several positional inputs) or a mapping (keyword inputs). A batch that is a mapping has targets
            under `target_key` or `labels`; its input is under `input_key`, or all else are keyword inputs.
        batch_size: Rows per batch of arrays (None for 256); the last may have fewer. A loader makes its own.
        input_key: The entry of a mapping that is the one positional input.
        target_key: The entry of a mapping that is the target.
        shuffle_generator: Draws a new order of the rows of arrays. A loader orders its own rows.
        numpy_dtype: Floating inputs given as NumPy arrays are cast to it; tensors are never cast.

    Returns:
        An iterator over `Batch`es of at least one batch; empty arrays `[0, ...]` are one batch of no rows.

    Raises:
        BadInput: If there are no batches, rows of inputs and targets differ, or a key is unknown.
        BadType: If the data or a batch are of no known form.

    Examples:
        >>> import torch
        >>> [batch.num_rows for batch in batches((torch.zeros(5, 3), torch.zeros(5)), batch_size=2)]
        [2, 2, 1]
    """
    size = check_count(256 if batch_size is None else batch_size, "batch_size")
    if (arrays := _arrays_of(data)) is not None:
        stream = _slices(arrays, size, shuffle_generator)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, Mapping)) and not hasattr(data, "to_numpy"):
        stream = iter(data)
    else:
        raise BadType(
            f"data must be a DataLoader, an iterable of batches, or a pair (inputs, targets) of arrays, "
            f"got {type(data).__name__}{_to_data(data)}"
        )
    return _parsed(stream, data, input_key, target_key, numpy_dtype)


def _to_data(data: object) -> str:
    """Say how something becomes data, where that is known."""
    if hasattr(data, "to_numpy"):
        return "; convert it, as by .to_numpy()"
    if isinstance(data, Dataset):
        return "; wrap it, as by torch.utils.data.DataLoader(dataset, batch_size=256)"
    return "; keyword inputs go with their targets, as ({...}, targets)" if isinstance(data, Mapping) else ""


def is_one_shot(data: Data) -> bool:
    """Return whether the data can be gone through only once, as a generator can.

    Examples:
        >>> is_one_shot(batch for batch in []), is_one_shot([])
        (True, False)
    """
    # Calling iter() to compare would start the workers of a DataLoader and draw from the global generator.
    return isinstance(data, Iterator)


def count_rows(data: Data, *, input_key: str | None = None, target_key: str | None = None) -> int:
    """Return how many rows one pass over the data yields: `drop_last` and samplers are respected.

    A loader with a batch sampler of its own, an iterable data set or another iterable is counted by one pass.

    Raises:
        BadInput: If the data can be gone through only once, or there are no batches.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> count_rows(DataLoader([(0.0, 1)] * 10, batch_size=4, drop_last=True))
        8
    """
    if is_one_shot(data):
        raise BadInput("data is an iterator and counting its rows would use it up: pass a list or a DataLoader")
    rows = known_rows(data)
    if rows is not None:
        return rows
    # The target tells the rows of a batch, which its first entry may not have.
    return sum(batch.num_rows for batch in batches(data, input_key=input_key, target_key=target_key))


def known_rows(data: Data) -> int | None:
    """Return how many rows one pass over the data yields where that can be told without one, else None.

    Examples:
        >>> known_rows(torch.zeros(5, 3)), known_rows([torch.zeros(5, 3)])
        (5, None)
    """
    if (arrays := _arrays_of(data)) is not None:
        return arrays.num_rows
    if isinstance(data, DataLoader) and _batches_by_size(data):
        rows = len(data.sampler)  # type: ignore[arg-type]
        size = int(data.batch_size or 1)
        return rows // size * size if data.drop_last else rows
    return None


def expected_rows(data: Data, first: int) -> int | None:
    """Return about how many rows one pass over the data yields, told without one; None where that cannot be.

    Args:
        data: As in `batches`.
        first: Rows of the first batch, for data whose number of batches alone is known.

    Examples:
        >>> expected_rows([torch.zeros(5, 3)] * 4, 5)
        20
    """
    rows = known_rows(data)
    sized = isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)
    if rows is None and (isinstance(data, (list, tuple)) or (sized and hasattr(data.batch_sampler, "__len__"))):
        return len(data) * first
    return rows


def to_device(batch: Batch, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
    """Return the batch with all that has `.to`, tensors above all, on the device, however deeply nested.

    `non_blocking` copies tensors in pinned memory without waiting for the end; what has another `.to` is waited for.
    """

    if not batch.kwargs and all(type(own) is Tensor and own.device == device for own in (*batch.inputs, batch.targets)):
        return batch

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=non_blocking)
        return leaf.to(device) if hasattr(leaf, "to") else leaf

    return Batch(**map_leaves(batch._asdict(), move))


def with_copies(batch: Batch) -> Batch:
    """Return the batch with copies of its input tensors, for a network that writes over them."""
    return batch._replace(inputs=copied(batch.inputs), kwargs=copied(batch.kwargs))


def copied(inputs: Any) -> Any:
    """Return inputs with copies of their tensors."""
    return map_leaves(inputs, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return inputs as positional and keyword arguments of a network."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def join_inputs(batch: Batch) -> Any:
    """Return a batch's inputs in the form that `Predictor.loss` takes."""
    if batch.kwargs and batch.inputs:
        raise BadInput("a batch has positional and keyword inputs; use one of them")
    return dict(batch.kwargs) if batch.kwargs else batch.inputs


def drawn_apart(start: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    """Yield batches whose loader and data draw from torch's default generator, and leave it as it was in between."""
    state, stream = torch.get_rng_state(), None
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            # A loader's iterator draws a seed, even where it shuffles nothing.
            stream = stream or start()
            batch = next(stream, None)
            state = torch.get_rng_state()
        if batch is None:
            return
        yield batch


def bootstrap(data: Data, seed: int) -> Data:
    """Return as many rows as `data` has, drawn with replacement (Efron, 1979), in the form that `data` has.

    Args:
        data: A pair of arrays, or a DataLoader over a map-style data set; the rebuilt loader keeps batch
            size, shuffling, workers and collation, and shares the data set: no rows are copied.
        seed: Which rows are drawn. Nothing else depends on it.

    Raises:
        BadInput: If the rows cannot be drawn by number: iterables of batches, custom samplers.

    Examples:
        >>> inputs, targets = bootstrap((torch.arange(4.0), torch.arange(4.0)), seed=0)
        >>> inputs.shape, torch.equal(inputs, targets)
        (torch.Size([4]), True)
    """
    generator = torch.Generator().manual_seed(seed)
    if (arrays := _arrays_of(data)) is not None:
        if not arrays.num_rows:
            raise BadInput("data has no rows: there is nothing to draw from")
        rows = torch.randint(arrays.num_rows, (arrays.num_rows,), generator=generator)
        drawn = _rows(arrays.tree, rows)
        return drawn if arrays.has_targets else drawn[0]
    if not isinstance(data, DataLoader) or not _batches_by_size(data) or not _visits_every_row(data):
        raise BadInput(
            "bootstrap needs a pair of arrays, or a DataLoader over map-style data, in order or shuffled: "
            "rows of other data cannot be drawn by number. Pass one of these, or resample the data yourself"
        )
    size = len(data.dataset)  # type: ignore[arg-type]
    if not size:
        raise BadInput("data has no rows: there is nothing to draw from")
    drawn_rows = torch.randint(size, (size,), generator=generator).tolist()
    return _rebuilt(data, Subset(data.dataset, drawn_rows))


class _Arrays(NamedTuple):
    """Arrays of equal rows: `(inputs, targets)` or `(inputs,)`; inputs: an array, a sequence or a mapping."""

    tree: tuple[Any, ...]
    num_rows: int

    @property
    def has_targets(self) -> bool:
        return len(self.tree) == 2


def _is_array(value: object) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def leaves(tree: Any) -> list[Any]:
    """Return what is not a mapping, a tuple or a list in a tree of these."""
    if isinstance(tree, (tuple, list, Mapping)):
        items = tree.values() if isinstance(tree, Mapping) else tree
        return [leaf for item in items for leaf in leaves(item)]
    return [tree]


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Return the tree with `function` applied to every leaf; mappings become dicts, sequences stay."""
    if isinstance(tree, Mapping):
        return {key: map_leaves(item, function) for key, item in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_leaves(item, function) for item in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_leaves(item, function) for item in tree)
    return function(tree)


def _arrays_of(data: Data) -> _Arrays | None:
    """Return data given as arrays after a check of their rows; None for anything else."""
    if _is_array(data):
        tree: tuple[Any, ...] = (data,)
    elif isinstance(data, (tuple, list)) and len(data) == 2 and _is_array(data[1]):
        tree = tuple(data)
        if not all(map(_is_array, leaves(data[0]))):
            raise BadType("the inputs of a pair (inputs, targets) must be arrays; convert them, as by .to_numpy()")
    elif isinstance(data, tuple) and len(data) == 2 and _is_array(data[0]):
        raise BadType(
            f"the targets of a pair (inputs, targets) must be an array, got {type(data[1]).__name__}; "
            "convert them, as by numpy.asarray"
        )
    elif isinstance(data, tuple) and len(data) > 2 and all(map(_is_array, data)):
        raise BadInput(
            f"data is a tuple of {len(data)} arrays; a pair (inputs, targets) is needed: several inputs go together, as "
            "((first, second), targets). Batches of inputs go into a list"
        )
    else:
        return None
    shapes = [tuple(array.shape) for array in leaves(tree)]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise BadInput(f"arrays of inputs and targets must have the same number of rows, got shapes {shapes}")
    return _Arrays(tree, shapes[0][0])


def _take(array: Array, rows: slice | Tensor) -> Array:
    """Return rows of an array, in the kind it has."""
    if isinstance(rows, slice):
        return array[rows]
    # Whole rows are copied; indexing would copy number by number.
    return array.index_select(0, rows.to(array.device)) if isinstance(array, Tensor) else array[rows.numpy()]


def _rows(tree: Any, rows: slice | Tensor) -> Any:
    return map_leaves(tree, lambda array: _take(array, rows))


def _slices(arrays: _Arrays, batch_size: int, generator: torch.Generator | None) -> Iterator[object]:
    order = None if generator is None else torch.randperm(arrays.num_rows, generator=generator)
    for start in range(0, max(arrays.num_rows, 1), batch_size):
        window = slice(start, start + batch_size)
        rows = window if order is None else order[window]
        taken = _rows(arrays.tree, rows)
        yield taken if arrays.has_targets else taken[0]


def _parsed(
    stream: Iterator[object],
    data: Data,
    input_key: str | None,
    target_key: str | None,
    numpy_dtype: torch.dtype | None,
) -> Iterator[Batch]:
    index = -1
    for index, item in enumerate(stream):
        yield _parse(item, f"batch {index}", input_key, target_key, numpy_dtype)
    if index < 0:
        raise BadInput(_why_empty(data))


def _why_empty(data: Data) -> str:
    if is_one_shot(data):
        return "data is an iterator that has run dry: pass a list of batches or a DataLoader, to be read again"
    if isinstance(data, DataLoader) and data.drop_last:
        return "data yields no batches: drop_last=True drops all its rows; take a smaller batch_size"
    return "data yields no batches: at least one is needed"


def _parse(
    item: Any, name: str, input_key: str | None, target_key: str | None, numpy_dtype: torch.dtype | None
) -> Batch:
    """Turn one item of a loader into a Batch."""
    inputs, targets = _split(item, name, input_key, target_key)

    def converted(leaf: Any) -> Any:
        if not isinstance(leaf, np.ndarray):
            return leaf
        tensor = as_tensor(leaf, f"inputs of {name}")
        return tensor.to(numpy_dtype) if tensor.is_floating_point() and numpy_dtype is not None else tensor

    inputs = map_leaves(inputs, converted)
    keyword = inputs if isinstance(inputs, dict) else {}
    positional = () if isinstance(inputs, dict) else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    batch = Batch(positional, keyword, None if targets is None else as_tensor(targets, f"targets of {name}"))
    _check_rows(batch, name)
    return batch


def _split(item: Any, name: str, input_key: str | None, target_key: str | None) -> tuple[Any, Any]:
    """Return inputs and targets of a batch, which may be a mapping, a pair or inputs alone."""
    if isinstance(item, Mapping):
        return _split_mapping(item, name, input_key, target_key)
    if _is_array(item):
        item = (item,)
    if not isinstance(item, (tuple, list)):
        raise BadType(f"{name} is of type {type(item).__name__}; a batch is (inputs, targets), a mapping or a tensor")
    if item and all(isinstance(value, (int, float)) for value in item):
        raise BadType(
            f"{name} is a {type(item).__name__} of numbers; pass rows as one array, as by numpy.asarray(data)"
        )
    if len(item) not in (1, 2):
        raise BadInput(
            f"{name} has {len(item)} parts; a batch is (inputs, targets): "
            "several inputs go together as a tuple, ((first, second), targets)"
        )
    if target_key is not None or (input_key is not None and not isinstance(item[0], Mapping)):
        raise BadInput(f"input_key and target_key are for batches that are mappings; {name} is (inputs, targets)")
    inputs = item[0] if input_key is None else (_entry(item[0], input_key, "input_key", name),)
    return inputs, item[1] if len(item) == 2 else None


def _split_mapping(
    item: Mapping[str, Any], name: str, input_key: str | None, target_key: str | None
) -> tuple[Any, Any]:
    if target_key is None and "labels" in item:
        target_key = "labels"
    targets = None if target_key is None else _entry(item, target_key, "target_key", name)
    if input_key is not None:
        return (_entry(item, input_key, "input_key", name),), targets
    return {key: value for key, value in item.items() if key != target_key}, targets


def _entry(item: Mapping[str, Any], key: str, argument: str, name: str) -> Any:
    if key not in item:
        raise BadInput(f"{argument} is {key!r}, but {name} has the keys {sorted(map(str, item))}")
    return item[key]


def _check_rows(batch: Batch, name: str) -> None:
    """Check that targets have the rows of an input; one without rows (a graph) may stand beside it."""
    if batch.targets is None:
        return
    if not batch.targets.dim():
        raise BadInput(
            f"targets of {name} have no row axis; a batch of one has targets of shape (1,). Single examples become batches "
            "by torch.utils.data.DataLoader(data, batch_size=256)"
        )
    tensors = [value for value in (*batch.inputs, *batch.kwargs.values()) if isinstance(value, Tensor)]
    if tensors and not any(value.dim() and value.shape[0] == batch.targets.shape[0] for value in tensors):
        shapes = [tuple(value.shape) for value in tensors]
        raise BadInput(f"{name} has {batch.targets.shape[0]} rows of targets, but inputs of shape {shapes}")


def _batches_by_size(loader: DataLoader[Any]) -> bool:
    """Return whether torch's own batch sampler cuts batches of a known number of rows."""
    by_size = not isinstance(loader.dataset, IterableDataset) and type(loader.batch_sampler) is BatchSampler
    return by_size and hasattr(loader.sampler, "__len__")


def _visits_every_row(loader: DataLoader[Any]) -> bool:
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return isinstance(sampler, torch.utils.data.SequentialSampler)


def _rebuilt(loader: DataLoader[Any], dataset: Subset[Any]) -> DataLoader[Any]:
    """Return a loader over another data set with the settings of this one."""
    shuffled = loader.sampler if isinstance(loader.sampler, RandomSampler) else None
    workers = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        sampler=RandomSampler(dataset, generator=shuffled.generator) if shuffled is not None else None,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        **(workers if loader.num_workers else {}),  # type: ignore[arg-type]
    )
