"""Fills the disk of a run, a small tmpfs: it ends in a line that names a file, loses nothing, and goes on with more room.

    python tests/reliability/test_disk_full.py --count 60 --out disk_full.json

An attempt mounts a tmpfs, which takes the rights of root, trains an epoch in it, leaves a random number of free bytes and
trains on. Where it may not mount, no file may become larger than a random size (RLIMIT_FSIZE), which the outcome "noted" tells.
"""

import contextlib
import functools
import io
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import campaign
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a command

from kill_and_resume import differences, make_images

from groupmixformer.cli.main import main
from groupmixformer.run_folder import RunFolder, read_metrics
from groupmixformer.tasks.registry import build_task
from groupmixformer.training.recipe import read_recipe
from groupmixformer.training.resume import find_start
from groupmixformer.training.trainer import train

OPTIONS = ["--model", "test_resnet", "--image-size", "32", "--crop-pct", "1.0", "--batch-size", "8", "--workers", "0"]
OPTIONS += ["--device", "cpu", "--save-minutes", "0"]


@functools.cache
def place():
    """A folder with the data, a run of one epoch, and one of two that had all the room."""
    folder = Path(tempfile.mkdtemp(prefix="full-"))
    make_images(folder / "data", 12)
    for epochs in (1, 2):
        train(read_recipe("folder", words(folder, folder / f"{epochs}", epochs)), build_task)
    return folder


def words(folder, out, epochs):
    return ["--data", str(folder / "data"), "--out", str(out), *OPTIONS, "--epochs", str(epochs)]


def size(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def tmpfs(folder):
    """Mount a tmpfs; give a function that sets its size. Or None, where this is not permitted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True).returncode == 0
    try:
        yield (lambda room: subprocess.run(["mount", "-o", f"remount,size={room}", folder], check=True)) if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)
        shutil.rmtree(folder)


@contextlib.contextmanager
def small_files(most):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def attempt(rng):
    source, folder = place(), Path(tempfile.mkdtemp(prefix="full-"))
    with tmpfs(folder / "disk") as set_size:
        run = shutil.copytree(source / "1", folder / "disk" / "run")
        before, kept = read_metrics(run), size(folder / "disk")
        needed = size(source / "2" / "checkpoints") // 2  # another last.ckpt, besides the two that stay
        if set_size:
            set_size(kept + int(rng.integers(0, needed * 1.05)) // 4096 * 4096)
            limit = contextlib.nullcontext()
        else:
            limit = small_files(int(rng.integers(0, (run / "checkpoints" / "last.ckpt").stat().st_size)))
        said = io.StringIO()
        with limit, contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(["train", str(run / "recipe.yaml"), "--resume", "--epochs", "2"])
        lines = said.getvalue().strip().splitlines()
        if code and not (
            code == 1 and lines[-1].startswith("gmf: error: ") and str(run) in lines[-1] and "Traceback" not in lines
        ):
            return f"exit {code}: {lines[-1]}"
        if code and not ("the disk is full" in lines[-1] or "larger than files may be" in lines[-1]):
            return f"another reason: {lines[-1]}"
        RunFolder(run).read_weights()
        if find_start(run).damage or read_metrics(run)[: len(before)] != before:
            return f"lost: {find_start(run).damage or 'metrics.csv'}"
        if left := list(run.rglob("*.part")):
            return f"left: {left}"
        if set_size:
            set_size("64m")
        with contextlib.redirect_stderr(io.StringIO()):
            train(read_recipe("folder", words(source, run, 2)), build_task, resume=True)
        different = differences(source / "2", run)
        if different:
            return f"{len(different)} values differ, as {different[0]}"
    folder.rmdir()
    return ("refused" if code else "right") if set_size else "noted"


@pytest.fixture(scope="module", autouse=True)
def _clean():
    yield
    shutil.rmtree(place())


@pytest.mark.slow
def test_a_full_disk_loses_nothing():
    assert campaign.run(attempt, 8)["failures"] == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        campaign.main({"disk full": (attempt, 60)})
    finally:
        shutil.rmtree(place(), ignore_errors=True)
