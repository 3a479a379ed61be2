"""Pyro without traces: its stack of handlers belongs to one thread at a time, and the user's parameter store stays."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Pyro's handlers and its parameter store belong to the whole process.
_PYRO = threading.RLock()


@contextmanager
def pyro_scope() -> Iterator[None]:
    """Run a block of Pyro calls alone, with an empty parameter store of its own."""
    import pyro

    with _PYRO, pyro.get_param_store().scope():
        yield
