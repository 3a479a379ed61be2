"""Which shifts are meant: a suite by its name, several, one's own, and each once."""

import pytest

from bayesguard.errors import BadInput, BadType
from bayesguard.shift import Corruption, suite
from bayesguard.shifting import chosen_shifts


def test_names_and_shifts_may_be_mixed() -> None:
    own = Corruption("fog", severity=2)
    found = chosen_shifts(["content", own, "rotation"], seed=3)
    named = [*suite("content", 3), own, *suite("rotation", 3)]
    assert [(shift.name, shift.severity) for shift in found] == [(shift.name, shift.severity) for shift in named]
    assert all(getattr(shift, "seed", None) == 3 for shift in found if shift is not own)
    assert len(chosen_shifts("content", 0)) == len(suite("content"))
    assert chosen_shifts(None, 0) == []


def test_what_is_refused() -> None:
    with pytest.raises(BadInput, match="'rotation' at severity 1; every shift and severity may be there once"):
        chosen_shifts(("images", "rotation"), 0)
    with pytest.raises(BadInput, match=r"name must be one of .*; got 'contents'"):
        chosen_shifts(("images", "contents"), 0)
    with pytest.raises(BadType, match="shifts has a float"):
        chosen_shifts([1.0], 0)  # type: ignore[list-item]
