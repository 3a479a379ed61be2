"""Files of nested state without pickle: safetensors, the structure as JSON, a checksum over everything."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bayesguard.checks import check_writable
from bayesguard.errors import BadFile, BadType

FORMAT_VERSION = 1

# The only things that a file can make: no name in a file is ever looked up anywhere else.
_CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "dict": dict, "counter": Counter}


def save_tree(path: str | os.PathLike[str], tree: Any, *, kind: str) -> None:
    """Write nested state to one file, all or nothing: an interrupted write leaves the file that was there.

    Args:
        path: The file; its folder must exist.
        tree: Dicts (with any of these as keys), lists, tuples, numbers, strings, None, booleans and tensors.
        kind: What the file is; `load_tree` asks for the same kind.

    Raises:
        BadType: If the tree holds anything else; the message has its place.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_tree(f"{folder}/state", {3: (torch.ones(2), None)}, kind="example")
        ...     load_tree(f"{folder}/state", kind="example")
        {3: (tensor([1., 1.]), None)}
    """
    check_writable(os.path.realpath(path))
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(tree, "", tensors))
    metadata = {"format": "bayesguard", "version": str(FORMAT_VERSION), "kind": kind, "structure": structure}
    metadata["sha256"] = _checksum(metadata, tensors)
    _write(Path(os.path.realpath(path)), save(tensors, metadata))


def load_tree(path: str | os.PathLike[str], *, kind: str) -> Any:
    """Read what `save_tree` wrote; tensors are on the CPU, equal bit for bit.

    Raises:
        BadFile: If the file is damaged, cut short, of another kind or from a newer version.
        FileNotFoundError: If there is no such file.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_header(path, metadata, kind)
            # Copies: what is mapped would change, or vanish, with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if metadata.pop("sha256", "") != _checksum(metadata, tensors):
            raise BadFile(f"{os.fspath(path)} is damaged: its checksum does not fit; use an older copy")
        return _decode(json.loads(metadata["structure"]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError, RuntimeError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(f"{os.fspath(path)} is damaged or not a bayesguard file: {error}") from error


def _check_header(path: str | os.PathLike[str], metadata: dict[str, str], kind: str) -> None:
    """Look at the version first: nothing else of a newer file can be relied upon."""
    if metadata.get("format") != "bayesguard":
        raise BadFile(f"{os.fspath(path)} is not a bayesguard file")
    if (version := int(metadata["version"])) > FORMAT_VERSION:
        raise BadFile(
            f"{os.fspath(path)} has format version {version}, this bayesguard reads up to {FORMAT_VERSION}: "
            "install a newer bayesguard"
        )
    if metadata["kind"] != kind:
        raise BadFile(f"{os.fspath(path)} is a {metadata['kind']!r} file, not a {kind!r} file")


def _encode(tree: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return JSON for the tree: scalars as they are, all else as [kind, content]; tensors are put aside."""
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, Tensor):
        name = place if place not in tensors else f"{place}#{len(tensors)}"
        # A copy of its own: tied weights share memory, which the format refuses.
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return ["tensor", name]
    if isinstance(tree, dict):
        items = [
            [_encode(key, place, tensors), _encode(value, f"{place}/{key}" if place else str(key), tensors)]
            for key, value in tree.items()
        ]
        return ["counter" if isinstance(tree, Counter) else "dict", items]
    if isinstance(tree, (list, tuple)):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return [kind, [_encode(value, f"{place}/{i}", tensors) for i, value in enumerate(tree)]]
    raise BadType(f"state at {place!r} is of type {type(tree).__name__}; a file holds only tensors and plain values")


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, list):
        return node
    kind, content = node
    if kind == "tensor":
        return tensors[content]
    container = _CONTAINERS[kind]
    if issubclass(container, dict):
        return container({_decode(key, tensors): _decode(value, tensors) for key, value in content})
    return container(_decode(value, tensors) for value in content)


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of everything that a file says."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step that survives a crash: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
