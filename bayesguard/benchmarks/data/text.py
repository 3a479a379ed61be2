"""Short queries with their intents, as numbers: hashed n-grams of words and of letters.

The queries are those of CLINC150 (Larson et al. 2019, EMNLP), with its own division into train, validation and test and its
queries outside every intent, and of Banking77 (Casanueva et al. 2020), which a network trained on CLINC150 has not seen.
"""

import zlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayesguard.benchmarks.files import read
from bayesguard.errors import BadInput

PADDING = 0
_LETTERS = (3, 4, 5)

Labelled = tuple[Tensor, Tensor]


class Queries(NamedTuple):
    """Queries `[N, L]` of n-gram numbers with intents `[N]`, and by name the queries that no intent fits."""

    train: Labelled
    validation: Labelled
    test: Labelled
    outside: dict[str, Tensor]
    num_classes: int
    left_out: tuple[str, ...]


def intents(name: str, *, seed: int = 0, buckets: int = 2**15, data_dir: str | Path | None = None) -> Queries:
    """Return CLINC150 in numbers.

    Args:
        name: "clinc150": all 150 intents; outside are its out-of-scope test queries and the test queries of Banking77.
            "clinc150_domains": two of the ten domains are left out of training, and their test queries are outside.
        seed: Which two domains: `2 * seed` and the next, modulo their number. Five seeds leave each out once.
        buckets: Numbers that n-grams are hashed to.
        data_dir: Folder of the data; see `bayesguard.benchmarks.files.read`.

    Raises:
        BadInput: An unknown name, or a file that is not there.
    """
    if name not in ("clinc150", "clinc150_domains"):
        raise BadInput(f"data must be clinc150 or clinc150_domains, got {name!r}")
    file = read("text/clinc150.npz", data_dir)
    domain, domains = file["class_domain"], [str(name) for name in file["domain_name"]]
    if name == "clinc150":
        left_out: tuple[int, ...] = ()
        outside = {
            "out of scope": hashed(file["text_oos_test"], buckets),
            "Banking77": hashed(read("text/banking77.npz", data_dir)["text_test"], buckets),
        }
    else:
        left_out = left_out_domains(seed, len(domains))
        away = np.isin(domain[file["y_test"]], left_out)
        outside = {"left-out domains": hashed(file["text_test"][away], buckets)}
    kept = ~np.isin(domain, left_out)
    train, validation, test = (
        _labelled(file[f"text_{part}"], file[f"y_{part}"], kept, buckets) for part in ("train", "val", "test")
    )
    return Queries(train, validation, test, outside, int(kept.sum()), tuple(domains[place] for place in left_out))


def left_out_domains(seed: int, num_domains: int) -> tuple[int, ...]:
    """Return the two domains that are left out of training.

    Examples:
        >>> left_out_domains(1, 10), left_out_domains(5, 10)
        ((2, 3), (0, 1))
    """
    return (2 * seed) % num_domains, (2 * seed + 1) % num_domains


def n_grams(query: str) -> list[str]:
    """Return the n-grams of a query: words, pairs of words, and three to five letters of each word with its edges.

    Examples:
        >>> n_grams("to me")
        ['to', 'me', 'to me', '<to', 'to>', '<to>', '<me', 'me>', '<me>']
    """
    words = query.lower().split()
    found = [*words, *(f"{first} {second}" for first, second in pairwise(words))]
    for word in words:
        edged = f"<{word}>"
        found += [edged[at : at + size] for size in _LETTERS for at in range(len(edged) - size + 1)]
    return found


def hashed(queries: Iterable[str], buckets: int) -> Tensor:
    """Return the n-grams of each query as numbers from 1 to `buckets - 1`, `[N, L]`, short rows filled with 0.

    The hash is CRC-32, so that the numbers are the same everywhere.
    """
    rows: list[Sequence[int]] = [
        [1 + zlib.crc32(gram.encode()) % (buckets - 1) for gram in n_grams(str(query))] for query in queries
    ]
    table = torch.full((len(rows), max(map(len, rows), default=0)), PADDING)
    for place, row in enumerate(rows):
        table[place, : len(row)] = torch.tensor(row, dtype=torch.long)
    return table


def _labelled(
    texts: npt.NDArray[np.str_], labels: npt.NDArray[np.uint8], kept: npt.NDArray[np.bool_], buckets: int
) -> Labelled:
    """The queries of the intents that are kept, with these numbered anew."""
    rows, numbers = kept[labels], np.cumsum(kept) - 1
    return hashed(texts[rows], buckets), torch.from_numpy(numbers[labels[rows]].astype(np.int64))
