"""Atomic writes: what was there stays until what replaces it is complete."""

import os
import signal
import stat
import subprocess
import sys

import pytest
import torch

from groupmixformer.files import atomic_write, write_file
from groupmixformer.training.callbacks import AtomicCheckpoints

DYING = """
import os, signal, sys
from pathlib import Path
from groupmixformer.files import atomic_write

with atomic_write(*map(Path, sys.argv[1:])) as folder:
    (folder / "weights").write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def old(tmp_path):
    """Two files that belong together."""
    paths = tmp_path / "weights", tmp_path / "config"
    for path in paths:
        path.write_text("old")
    return paths


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_files_take_their_places_and_what_else_was_written_goes(old, tmp_path):
    with atomic_write(*old) as folder:
        for name in ("weights", "config", "scratch"):
            (folder / name).write_text("new")
        assert contents(tmp_path) == {"weights": "old", "config": "old"}
    assert {path.name for path in tmp_path.iterdir()} == {"weights", "config"}
    assert contents(tmp_path) == {"weights": "new", "config": "new"}


def write_the_first(old):
    with atomic_write(*old) as folder:
        (folder / "weights").write_text("new")
        raise OSError("no space left")


def forget_one(old):
    with atomic_write(old[1]) as folder:
        (folder / "weights").write_text("new")


@pytest.mark.parametrize("fail", [write_the_first, forget_one])
def test_an_error_in_the_middle_changes_nothing(old, tmp_path, fail):
    with pytest.raises(OSError, match=r"no space left|No such file"):
        fail(old)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"weights": "old", "config": "old"}


def test_a_process_killed_in_the_middle_changes_nothing_and_the_next_one_clears_up(old, tmp_path):
    killed = subprocess.run([sys.executable, "-c", DYING, *map(str, old)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3  # what it left
    assert contents(tmp_path) == {"weights": "old", "config": "old"}
    write_file(old[1], "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"weights": "old", "config": "new"}


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(tmp_path, monkeypatch):
    def fill_the_disk(checkpoint, file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    path, checkpoints = tmp_path / "checkpoints" / "last.ckpt", AtomicCheckpoints(tmp_path, {}, True)
    checkpoints.save_checkpoint({"step": 1}, path)
    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match=r"last\.ckpt: could not be written: No space left .*; intact are checkpoints/last\.ckpt"):
        checkpoints.save_checkpoint({"step": 2}, path)
    assert [path.name for path in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask_whatever_a_library_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "file", tmp_path / "folder") as folder:
            (folder / "file").touch(mode=0o600)
            (folder / "folder").mkdir()
            (folder / "folder" / "inner").touch(mode=0o700)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()} == {mode}
