"""Files come back bit for bit, or not at all."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bayesguard import checkpoint
from bayesguard.checkpoint import load_tree, save_tree
from bayesguard.errors import BadFile, BadType

TREE: dict[Any, Any] = {
    "state": {0: {"step": torch.tensor(3.0), "avg": torch.randn(2, 3, dtype=torch.float64)}, 1: {}},
    "groups": [{"betas": (0.9, 0.999), "lr": 0.1, "fused": None, "amsgrad": False, "params": [0, 1]}],
    "milestones": Counter({3: 1, 5: 2}),
    "nan": [float("inf"), -0.0, 1e-320, 2**70],
    "text": "naïve / \x00 'quotes'",
    ("tuple", 1): torch.zeros(0, 4, dtype=torch.bfloat16),
    "a/b": torch.ones(1),
    "a": {"b": torch.zeros(1)},
    True: torch.tensor([True, False]),
}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def test_g9_a_tree_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_tree(tmp_path / "file", TREE, kind="test")
    loaded = load_tree(tmp_path / "file", kind="test")
    assert _same(TREE, loaded)
    assert not _same({**TREE, "text": "other"}, loaded)


def test_tied_transposed_and_view_tensors_are_saved_as_values(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    tree = {"a": weight, "b": weight, "t": weight.t(), "view": weight[0], "grad": weight.clone().requires_grad_()}
    save_tree(tmp_path / "file", tree, kind="test")
    loaded = load_tree(tmp_path / "file", kind="test")
    assert all(torch.equal(tree[name], loaded[name]) for name in tree)
    assert not loaded["grad"].requires_grad


def test_g2_every_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_tree(path, {"weight": torch.ones(3), 1: [None]}, kind="test")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(BadFile, match="file"):
            load_tree(path, kind="test")


def test_g3_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_tree(path, {"weight": torch.ones(3), 1: [None]}, kind="test")
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded = load_tree(path, kind="test")
        except BadFile as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert _same(loaded, {"weight": torch.ones(3), 1: [None]})


def test_g4_a_newer_file_says_so_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    save_tree(tmp_path / "file", {"x": 1}, kind="test")
    monkeypatch.undo()
    with pytest.raises(BadFile, match=r"format version 2.*install a newer bayesguard"):
        load_tree(tmp_path / "file", kind="test")


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_tree(tmp_path / "file", {"x": 1}, kind="test")
    with pytest.raises(BadFile, match="is a 'test' file, not a 'training' file"):
        load_tree(tmp_path / "file", kind="training")
    save_file({"x": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(BadFile, match="not a bayesguard file"):
        load_tree(tmp_path / "plain", kind="test")
    with pytest.raises(BadFile):
        load_tree(tmp_path, kind="test")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_tree(tmp_path / "missing", kind="test")


@pytest.mark.parametrize("value", [object(), print, {1, 2}, b"bytes", torch.float32])
def test_g1_only_plain_values_are_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(BadType, match="state at 'scheduler/1'"):
        save_tree(tmp_path / "file", {"scheduler": [0, value]}, kind="test")
    assert not list(tmp_path.iterdir())


def test_g6_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    save_tree(path, {"x": 1}, kind="test")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tree(path, {"x": 2}, kind="test")
    assert load_tree(path, kind="test") == {"x": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_g5_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    save_tree(tmp_path / "real", {"x": 1}, kind="test")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_tree(tmp_path / "link", {"x": 2}, kind="test")
    assert (tmp_path / "link").is_symlink()
    assert load_tree(tmp_path / "real", kind="test") == {"x": 2}


_WRITER = """
import sys, torch
from bayesguard.checkpoint import save_tree
while True:
    for value in range(2):
        save_tree(sys.argv[1], {"value": torch.full((100_000,), float(value))}, kind="test")
        print("saved", flush=True)
"""


def test_g7_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(5):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    value = load_tree(path, kind="test")["value"]
    assert value.shape == (100_000,)
    assert value.unique().numel() == 1
