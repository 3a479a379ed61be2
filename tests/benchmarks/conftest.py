"""No test of the benchmarks downloads anything."""

from typing import NoReturn

import pytest

from bayesguard.benchmarks.data import downloads
from bayesguard.errors import BadInput


@pytest.fixture(autouse=True)
def _no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise BadInput("tests download nothing")

    monkeypatch.setattr(downloads, "retrieve", refuse)
    monkeypatch.delenv("BAYESGUARD_DATA", raising=False)
