"""Training on several processes: they compute what one does, and stop, die and continue together."""

import contextlib
import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import kill_and_resume
import pytest
import run_frozen
import torch
from kill_and_resume import differences, scalars
from safetensors.torch import load_file

from groupmixformer import load_checkpoint
from groupmixformer.cli.main import main
from groupmixformer.tasks.classification.training import Classification
from groupmixformer.training.recipe import read_recipe
from groupmixformer.training.trainer import read_metrics, train

HELD_OUT = 29  # which no number of processes divides
STRATEGY = {"torchrun": [], "fsdp": ["--strategy", "fsdp", "--epochs", "1", "--ema", "null"]}  # it takes long on CPUs
OPTIONS = [
    *("--variant", "mobile", "--image_size", "32", "--crop_pct", "1.0", "--epochs", "2", "--workers", "0", "--device", "cpu"),
    *("--schedule.name", "constant", "--schedule.warmup_epochs", "0.5", "--optimizer.lr_batch", "16", "--log_steps", "1"),
    *("--augmentation.auto_augment", "rand-m9-mstd0.5-inc1", "--augmentation.random_erasing", "0.25", "--drop_path_rate", "0"),
    *("--ema", "0.9"),
]
TIMEOUT = 600  # a job that hangs fails


@pytest.fixture(scope="session")
def images(write_digits, tmp_path_factory):
    root = write_digits(tmp_path_factory.mktemp("images"), ["zero", "one"], train=80, val=15)
    next((root / "val" / "one").iterdir()).unlink()
    return root


def torchrun(processes, *more):
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *more]


def start(launcher, out, *argv, **environment):
    """Start `gmf`; what it says goes to a file beside the run."""
    log = Path(f"{out}.log")
    with log.open("a") as file:
        command = [
            *launcher,
            run_frozen.__file__,
            "train",
            "folder",
            "--out",
            str(out),
            *OPTIONS,
            *(str(word) for word in argv),
        ]
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    return SimpleNamespace(process=process, log=log, wait=functools.partial(process.wait, TIMEOUT))


def finish(*jobs):
    for job in jobs:
        assert job.wait() == 0, job.log.read_text()


def wait_for(condition, *jobs):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        assert all(job.process.poll() is None for job in jobs), jobs[0].log.read_text()
        time.sleep(0.05)


@contextlib.contextmanager
def paused(folder, launcher, out, *argv, at, processes=2, **environment):
    """Start a job and wait until each process has come to a batch of an epoch; in the end, kill them all."""
    folder.mkdir()
    job = start(launcher, out, *argv, PAUSE_AT=f"{at[0]} {at[1]} {folder}", **environment)
    files = [folder / f"paused-{rank}" for rank in range(processes)]
    wait_for(lambda: all(file.exists() for file in files), job)
    job.go = (folder / "go").touch
    job.numbers = [int(file.read_text()) for file in files]
    try:
        yield job
    finally:
        running = job.process.poll() is None  # or else its processes' numbers may be another's by now
        for number in {job.process.pid, *job.numbers} if running else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        job.process.wait()


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """Give a finished run of 16 images a step by the way it was launched; the workers of pytest share them."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    root.mkdir(exist_ok=True)

    def launch(how, out):
        if how == "one process":  # in this one: to start another takes as long as the training
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Classification, "training_step", run_frozen.training_step)
                train(read_recipe("folder", ["--out", str(out), *OPTIONS, "--data", str(images), "--batch_size", "16"]))
        elif how == "two nodes":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            place = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}")
            launchers = [torchrun(1, *place, f"--node-rank={rank}") for rank in range(2)]
            finish(*(start(launcher, out, "--data", images, "--batch_size", 8) for launcher in launchers))
        else:
            finish(start(torchrun(2, "--standalone"), out, "--data", images, "--batch_size", 8, *STRATEGY[how]))

    def run(how):
        out = root / how
        with Path(f"{out}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not lock.seek(0) and not lock.read():
                launch(how, out)
                lock.write("done")
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    ["torchrun", pytest.param("two nodes", marks=pytest.mark.exhaustive), pytest.param("fsdp", marks=pytest.mark.exhaustive)],
)
def test_processes_compute_what_one_does(finished, how):
    one, many = finished("one process"), finished(how)
    rows = read_metrics(many)
    steps = 10 * len(rows)
    losses = scalars(one, "loss")
    assert len(losses) == 20
    assert scalars(many, "loss") == pytest.approx(losses[:steps], abs=1e-4)
    validated = ["val_loss", "val_top1"] if how != "fsdp" else []  # which has no averaged weights
    for first, second in zip(read_metrics(one), rows, strict=how != "fsdp"):
        assert first["val_images"] == second["val_images"] == HELD_OUT
        for name in ("loss", "lr", "step", *validated):
            assert second[name] == pytest.approx(first[name], abs=1e-4)

    checkpoint = torch.load(many / "checkpoints" / "last.ckpt", weights_only=True)
    prefix = "model." if how == "fsdp" else "average.module."
    weights = {n.removeprefix(prefix): v for n, v in checkpoint["state_dict"].items() if n.startswith(prefix)}
    best = load_checkpoint(many).state_dict()
    assert {n: v.shape for n, v in best.items()} == {n: v.shape for n, v in weights.items()}
    if rows[-1]["val_top1"] > max([row["val_top1"] for row in rows[:-1]], default=0):
        assert all(torch.equal(best[n], weights[n]) for n in best)
    if how != "fsdp":
        for name, value in load_file(one / "model.safetensors").items():
            # Where a gradient is almost zero, AdamW turns the rounding of its sign into a step: single weights differ by more.
            apart = (best[name] - value).float().norm() / value.float().norm().clamp_min(1e-3)
            assert apart <= 1e-3, (name, apart)

    words = Path(f"{many}.log").read_text()  # of both processes
    assert f"top-1 {max(row['val_top1'] for row in rows):.2%}" in words  # what the kept model is measured at afterwards
    once = ("total batch 16 = 8 images x 2 processes x 1 accumulated", "epoch 1/", "top-1")
    for line in ("BatchNorm is not synchronised over the processes", *once):
        assert words.count(line) == 1


@pytest.mark.slow
def test_killed_processes_continue_as_if_they_had_not_been(images, tmp_path):
    more = ["--data", images, "--variant", "test_efficientnet", "--batch_size", 4, "--accumulate", 2, "--ema", 0.9]
    more += ["--drop_path_rate", 0.2, "--augmentation.mixup", 0.8, "--save_minutes", 0]
    whole, killed, learn = tmp_path / "whole", tmp_path / "killed", {"LEARN_STATISTICS": "1"}
    undisturbed = start(torchrun(2, "--standalone"), whole, *more, **learn)
    with paused(tmp_path / "pause", [sys.executable], killed, *more, "--devices", 2, at=(1, 7), **learn):
        pass  # killed without any torchrun
    finish(undisturbed)
    checkpoint = torch.load(killed / "checkpoints" / "last.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["Loaders"]["done"]) == (1, 6)
    finish(start(torchrun(2, "--standalone"), killed, *more, "--resume", **learn))
    assert differences(whole, killed) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", pytest.param("fsdp", marks=pytest.mark.exhaustive)])
def test_a_terminated_job_is_saved_and_continues(images, finished, tmp_path, how):
    out, more = tmp_path / "run", ["--data", images, "--batch_size", 8, *STRATEGY[how]]
    with paused(tmp_path / "pause", torchrun(2, "--standalone"), out, *more, at=(0, 3)) as job:
        job.process.send_signal(signal.SIGTERM)
        wait_for(lambda: job.log.read_text().count("SIGTERM: saving after this step") == 2, job)
        job.go()
        assert job.wait() != 0
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["Loaders"]["done"]) == (0, 4)
    assert job.log.read_text().count(f"continue with gmf train {out}/recipe.yaml --resume") == 1
    finish(start(torchrun(2, "--standalone"), out, *more, "--resume"))
    assert differences(finished(how), out) == []


@pytest.fixture
def few(write_digits, tmp_path):
    """32 images for training, of which 2 cannot be read, and the names of those."""
    data = write_digits(tmp_path / "data", ["zero", "one"], train=16, val=2)
    bad = [str(data / "train" / name / "5.png") for name in ("one", "zero")]
    for path in bad:
        Path(path).write_bytes(b"not an image")
    return data, bad


@pytest.mark.slow
def test_what_ends_one_process_ends_the_job(few, tmp_path):
    data, bad = few
    more = ["--data", data, "--variant", "test_resnet", "--batch_size", 4, "--bad_limit", "0.031"]
    job = start(torchrun(2, "--standalone"), tmp_path / "run", *more)
    assert job.wait() != 0
    words = job.log.read_text()
    assert "of 32 training images cannot be read, more than bad_limit (3.10%) allows" in words
    assert any(f"allows: {path}" in words for path in bad)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_images_that_no_process_alone_finds_too_many_end_the_epoch(few, tmp_path):
    data, _ = few
    more = ["--data", data, "--variant", "test_resnet", "--batch_size", 4, "--bad_limit", "0.05", "--epochs", 1]
    job = start(torchrun(2, "--standalone"), tmp_path / "run", *more)
    assert job.wait() != 0
    assert "2 of 32 training images cannot be read, more than bad_limit (5.00%) allows" in job.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.exhaustive)])
def test_what_happens_to_one_process_counts_for_all(few, tmp_path, strategy):
    data, bad = few
    more = ["--data", data, "--variant", "test_resnet", "--batch_size", 4, "--bad_limit", "0.1", "--strategy", strategy]
    more += ["--ema", "null" if strategy == "fsdp" else 0.9]
    finish(start(torchrun(2, "--standalone"), tmp_path / "run", *more, POISON_AT="0 2 1"))
    rows = read_metrics(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows] == [1, 1]
    assert [row["unreadable"] for row in rows] == [2, 2]
    lines = (tmp_path / "run" / "unreadable.txt").read_text().splitlines()
    assert sorted(line.split(":")[0] for line in lines) == bad
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert sorted(line.split(":")[0] for line in last["counts"]["unreadable"]) == bad


def test_sharded_weights_cannot_be_averaged(images, tmp_path, capsys):
    argv = ["train", "folder", "--data", str(images), "--out", str(tmp_path / "run"), *OPTIONS, "--batch_size", "16"]
    assert main([*argv, "--strategy", "fsdp", "--ema", "0.9"]) == 1
    result = capsys.readouterr()
    assert result.err.strip() == ("gmf: error: strategy fsdp shards the weights and cannot average them: set ema to null")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(tmp_path):
    argv = [sys.executable, kill_and_resume.__file__, "--kills", "3", "--images", "48"]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=TIMEOUT)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == 3
    assert result["resumed_inside_an_epoch"] > 0
    assert result["different"] == []
