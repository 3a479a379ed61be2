"""Pyro without traces: its stack of handlers belongs to one thread at a time, and the user's parameter store stays."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Pyro's handlers and its parameter store belong to the whole process.
_PYRO = threading.RLock()


@contextmanager
def pyro_scope(params: dict[str, Any] | None = None, constraints: dict[str, Any] | None = None) -> Iterator[None]:
    """Run a block of Pyro calls alone, with a parameter store of its own.

    Args:
        params: What is in that store at first: unconstrained values by name; None for nothing.
        constraints: The constraints of those that have one.
    """
    import pyro
    from torch.distributions.constraints import real

    named = dict(params or {})
    state: Any = {"params": named, "constraints": {**dict.fromkeys(named, real), **(constraints or {})}}
    with _PYRO, pyro.get_param_store().scope(state):
        yield
