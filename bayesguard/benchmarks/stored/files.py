"""Result files: which there are, and when, where, with what and in how long each was made."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bayesguard.errors import BadFile

Content = dict[str, Any]
_UNKNOWN = "not recorded"


class Facts(NamedTuple):
    """What a reader has to know of a run, in words."""

    device: str
    date: str
    versions: str
    seeds: str
    time: str


def read(path: Path) -> Content:
    """Return what a result file holds.

    Raises:
        BadFile: A file that cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path.name} cannot be read ({error}); run its benchmark again, or delete it") from None
    if not isinstance(content, dict):
        raise BadFile(f"{path.name} holds a {type(content).__name__} where results are a JSON object; run it again")
    return content


def facts(content: Content) -> Facts:
    """Return when, where, with what and in how long a file was made; what it does not say is "not recorded".

    Examples:
        >>> facts({"meta": {"device": "cpu", "seed": 0, "torch": "2.6.0", "version": "0.1"}}).versions
        'bayesguard 0.1, torch 2.6.0'
    """
    cells = content.get("cells")
    if not cells:
        return _of_one_run({**content.get("machine", {}), **content.get("meta", {})})
    seconds = sum(cell["seconds"] for cell in cells)
    return Facts(
        _listed(cell["device"] for cell in cells),
        _ends(cell["date"] for cell in cells),
        _listed(_versions(cell["versions"]) for cell in cells),
        numbers(cell["seed"] for cell in cells),
        f"{duration(seconds)} in {len(cells)} cells",
    )


def numbers(seeds: Iterable[int]) -> str:
    """Return numbers in words.

    Examples:
        >>> numbers([0, 1, 2, 1]), numbers([4]), numbers([1, 3])
        ('0 to 2', '4', '1, 3')
    """
    found = sorted(set(seeds))
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))


def duration(seconds: float) -> str:
    """Return a time in its natural unit.

    Examples:
        >>> duration(4.23), duration(150), duration(7300)
        ('4.2 s', '2.5 min', '2.0 h')
    """
    for size, unit in ((3600, "h"), (120, "min")):
        if seconds >= size:
            return f"{seconds / (3600 if unit == 'h' else 60):.1f} {unit}"
    return f"{seconds:.1f} s"


def _of_one_run(meta: dict[str, Any]) -> Facts:
    versions = meta.get("versions") or {
        "bayesguard": meta.get("bayesguard") or meta.get("version"),
        "torch": meta.get("torch"),
    }
    device = meta.get("device") or meta.get("gpu") or meta.get("cpu")
    if device and "threads" in meta:
        device += f", {meta['threads']} thread{'s' if meta['threads'] != 1 else ''}"
    return Facts(
        device or _UNKNOWN,
        meta.get("date") or _UNKNOWN,
        _versions({name: version for name, version in versions.items() if version}) or _UNKNOWN,
        str(meta.get("seed", _UNKNOWN)),
        duration(meta["seconds"]) if "seconds" in meta else _UNKNOWN,
    )


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _listed(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def _ends(dates: Iterable[str]) -> str:
    found = sorted(set(dates))
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"
