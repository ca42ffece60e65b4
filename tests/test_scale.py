"""Training on several processes: they compute what one does, and stop, die and continue together."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kill_and_resume import differences, kill_and_resume, scalars
from safetensors.torch import load_file

from groupmixformer import load_checkpoint
from groupmixformer.cli import main
from groupmixformer.training import read_metrics

SCRIPT = str(Path(__file__).parent / "run_frozen.py")
HELD_OUT = 29  # which no number of processes divides
STEPS = 20  # of 16 pictures, in two epochs
OPTIONS = [
    *("--variant", "mobile", "--image_size", "32", "--crop_pct", "1.0", "--epochs", "2", "--workers", "0", "--device", "cpu"),
    *("--schedule.name", "constant", "--schedule.warmup_epochs", "0.5", "--optimizer.lr_batch", "16", "--log_steps", "1"),
    *("--augmentation.auto_augment", "rand-m9-mstd0.5-inc1", "--augmentation.random_erasing", "0.25"),
]
TIMEOUT = 600  # a job that hangs fails


@pytest.fixture(scope="session")
def pictures(write_digits, tmp_path_factory):
    root = write_digits(tmp_path_factory.mktemp("pictures"), ["zero", "one"], train=80, val=15)
    next((root / "val" / "one").iterdir()).unlink()
    return root


def torchrun(processes, *more):
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *more]


def start(launcher, out, *argv, **environment):
    """Start `gmf`; what it says goes to a file beside the run."""
    log = Path(f"{out}.log")
    with log.open("a") as file:
        command = [*launcher, SCRIPT, "train", "folder", "--out", str(out), *OPTIONS, *(str(word) for word in argv)]
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
def paused(folder, launcher, out, *argv, at=(1, 3), processes=2):
    """Start a job and wait until each process has come to a batch of an epoch; give the job and the numbers of the processes."""
    folder.mkdir()
    job = start(launcher, out, *argv, PAUSE_AT=f"{at[0]} {at[1]} {folder}")
    files = [folder / f"paused-{rank}" for rank in range(processes)]
    wait_for(lambda: all(file.exists() for file in files), job)
    job.go = (folder / "go").touch
    job.numbers = [int(file.read_text()) for file in files]
    try:
        yield job
    finally:
        for number in {job.process.pid, *job.numbers}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        job.process.wait()


@pytest.fixture(scope="session")
def finished(pictures, tmp_path_factory):
    """Give a finished run of 16 pictures a step by the way it was launched."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(how):
        out, more = root / how, ["--data", pictures]
        if how == "one process":
            finish(start([sys.executable], out, *more, "--batch_size", 16))
        elif how == "two nodes":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            place = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port}")
            launchers = [torchrun(1, *place, f"--node-rank={rank}") for rank in range(2)]
            finish(*(start(launcher, out, *more, "--batch_size", 8) for launcher in launchers))
        else:
            strategy = {"torchrun": "ddp", "fsdp": "fsdp"}[how]
            finish(start(torchrun(2, "--standalone"), out, *more, "--batch_size", 8, "--strategy", strategy))
        return out

    return run


HOW = ["torchrun", pytest.param("two nodes", marks=pytest.mark.slow), pytest.param("fsdp", marks=pytest.mark.slow)]


@pytest.mark.parametrize("how", HOW)
def test_processes_compute_what_one_does(finished, how):
    one, many = finished("one process"), finished(how)
    losses = scalars(one, "loss")
    assert len(losses) == STEPS
    assert scalars(many, "loss") == pytest.approx(losses, abs=1e-4)
    for first, second in zip(read_metrics(one), read_metrics(many), strict=True):
        assert first["val_images"] == second["val_images"] == HELD_OUT
        assert first["val_top1"] == second["val_top1"]
        for name in ("loss", "val_loss", "lr", "step"):
            assert second[name] == pytest.approx(first[name], abs=1e-4)


@pytest.mark.parametrize("how", HOW)
def test_what_processes_share_is_said_once(finished, how):
    words = Path(f"{finished(how)}.log").read_text()
    assert words.count("BatchNorm is not synchronised over the processes") == 1
    assert words.count("total batch 16 = 8 images x 2 processes x 1 accumulated") == 1
    assert words.count("epoch 2/2") == 1
    assert words.count("top-1") == 1
    assert "not synchronised" not in Path(f"{finished('one process')}.log").read_text()


@pytest.mark.parametrize("how", HOW)
def test_the_model_of_processes_is_a_whole_one(finished, how):
    run = finished(how)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    weights = {n.removeprefix("model."): v for n, v in checkpoint["state_dict"].items() if n.startswith("model.")}
    best, last = load_checkpoint(run).state_dict(), read_metrics(run)[-1]
    assert {n: v.shape for n, v in best.items()} == {n: v.shape for n, v in weights.items()}
    if last["val_top1"] > read_metrics(run)[0]["val_top1"]:
        assert all(torch.equal(best[n], weights[n]) for n in best)
    one = load_file(finished("one process") / "model.safetensors")
    for name, value in best.items():
        torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_killed_processes_continue_as_if_they_had_not_been(pictures, finished, tmp_path):
    out, more = tmp_path / "run", ["--data", pictures, "--batch_size", 8, "--save_minutes", 0]
    with paused(tmp_path / "pause", [sys.executable], out, *more, "--devices", 2):  # without torchrun; killed at the end
        pass
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["Loaders"]["done"]) == (1, 3)
    finish(start(torchrun(2, "--standalone"), out, *more, "--resume"))
    assert differences(finished("torchrun"), out) == []


@pytest.mark.slow
def test_a_terminated_job_is_saved_and_continues(pictures, finished, tmp_path):
    out, more = tmp_path / "run", ["--data", pictures, "--batch_size", 8, "--strategy", "fsdp"]
    with paused(tmp_path / "pause", torchrun(2, "--standalone"), out, *more) as job:
        job.process.send_signal(signal.SIGTERM)
        wait_for(lambda: job.log.read_text().count("SIGTERM: saving after this step") == 2)
        job.go()
        assert job.wait() != 0
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert (checkpoint["epoch"], checkpoint["Loaders"]["done"]) == (1, 4)
    assert job.log.read_text().count(f"continue with gmf train {out}/recipe.yaml --resume") == 1
    finish(start(torchrun(2, "--standalone"), out, *more, "--resume"))
    assert differences(finished("fsdp"), out) == []


@pytest.mark.slow
def test_what_ends_one_process_ends_the_job(pictures, write_digits, tmp_path):
    data = write_digits(tmp_path / "data", ["zero", "one"], train=16, val=2)
    bad = next((data / "train" / "one").iterdir())
    bad.write_bytes(b"not a picture")
    job = start(torchrun(2, "--standalone"), tmp_path / "run", "--data", data, "--variant", "test_resnet", "--batch_size", 4)
    assert job.wait() != 0
    words = job.log.read_text()
    assert f"1 of 32 training pictures cannot be read, more than bad_limit (0.10%) allows: {bad}" in words
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_sharded_weights_cannot_be_averaged(pictures, tmp_path, capsys):
    argv = ["train", "folder", "--data", str(pictures), "--out", str(tmp_path / "run"), *OPTIONS, "--batch_size", "16"]
    assert main([*argv, "--strategy", "fsdp", "--ema", "0.9"]) == 1
    result = capsys.readouterr()
    assert result.err.strip() == ("gmf: error: strategy fsdp shards the weights and cannot average them: set ema to null")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1])
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(tmp_path, workers):
    result = kill_and_resume(tmp_path, kills=3, workers=workers)
    assert result["kills"] == 3
    assert result["resumed_inside_an_epoch"] > 0
    assert result["different"] == []
