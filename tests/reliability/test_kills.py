"""Kills runs, at random moments and inside the writing of a file, and continues them: they end as one that nobody killed.

    python tests/reliability/test_kills.py any --count 45 --out kills.json

An attempt is a run of one task, in one process or two, with up to five SIGKILLs. Half of them strike at a random moment, the
others just before the n-th time that the run renames, links, removes or syncs a file, or in the middle of writing a checkpoint
or a model. After each kill a checkpoint must be readable if there was one before. In the end the best model, last.ckpt
(weights, averaged weights, optimiser, schedule, counts) and metrics.csv, but for the seconds, must not differ in a bit from
those of a run that was left alone. Of two processes, one is killed; the other must end by itself.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path

import campaign
import pytest
import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a command

from kill_and_resume import differences, make_images
from shapes import write_shapes
from test_semantic import write_scenes

from groupmixformer.tasks.registry import build_task
from groupmixformer.training.recipe import read_recipe
from groupmixformer.training.resume import find_start
from groupmixformer.training.trainer import train

KILLS = 5  # of an attempt
campaign.MOST_SECONDS = 1800.0  # it is a run started up to six times, and of two processes one may wait each time
SMALL = ["--workers", "0", "--device", "cpu", "--epochs", "2", "--grad-accum-steps", "2", "--ema", "0.9", "--save-minutes", "0"]
TASKS = {
    "classification": [
        *("folder", "--model", "test_efficientnet", "--image-size", "32", "--crop-pct", "1.0", "--batch-size", "8"),
        *("--drop-path-rate", "0.2", "--augmentation.mixup", "0.8", "--augmentation.auto-augment", "rand-m9-mstd0.5-inc1"),
    ],
    "detection": [
        *("nuclei", "--model", "test_convnext", "--image-size", "64", "--batch-size", "2", "--detector.max-size", "96"),
        *("--detector.fpn-channels", "16", "--detector.rois-per-image", "16", "--detector.max-detections", "10"),
    ],
    "segmentation": [
        "camvid",
        "--model",
        "test_resnet",
        "--image-size",
        "64",
        "--batch-size",
        "2",
        "--segmenter.channels",
        "16",
    ],
}
POINTS = ("rename", "link", "remove", "sync", "checkpoint", "model")
SECONDS = 330  # that a process may go on after the other was killed


@cache
def place():
    """A folder with the data, and a run of each task that nobody kills."""
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    make_images(folder / "classification", 20)
    write_shapes(folder / "detection", train=8, val=3)
    write_scenes(folder / "segmentation", noise=20, train=8, val=3)
    return folder


def recipe(task, out, *more):
    name, *options = TASKS[task]
    return [name, "--data", str(place() / task), "--out", str(out), *SMALL, *options, *more]


@cache
def whole(task, *more):
    """A run that is left alone, and how long it takes."""
    out, began = place() / f"whole-{task}{''.join(more)}", time.monotonic()
    assert os.waitstatus_to_exitcode(start(recipe(task, out, *more), "")()) == 0, Path(f"{out}.log").read_text()
    return out, time.monotonic() - began


def strike():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point, number):
    """Have this process kill itself just before, or in the middle of, the `number`-th use of a function."""
    owner, name = {
        "rename": (Path, "replace"),
        "link": (os, "link"),
        "remove": (Path, "unlink"),
        "sync": (os, "fsync"),
        "checkpoint": (torch, "save"),
        "model": (safetensors.torch, "save_file"),
    }[point]
    real, left = getattr(owner, name), [number]

    def function(*args, **options):
        left[0] -= 1
        if left[0]:
            return real(*args, **options)
        if point == "checkpoint":
            real(*args, **options)
            args[1].truncate(args[1].tell() // 2)
        elif point == "model":
            real(*args, **options)
            os.truncate(args[1], Path(args[1]).stat().st_size // 2)
        return strike()

    setattr(owner, name, function)


def start(words, point, number=0):
    """Train in a child process; return a function that waits for its end, or with True asks whether it has come."""
    child = os.fork()
    if not child:
        code = 1
        try:
            with Path(f"{words[words.index('--out') + 1]}.log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            torch.set_num_threads(1)
            if point:
                arm(point, number)
            train(read_recipe(words[0], words[1:]), build_task, "auto")
            code = 0
        finally:
            os._exit(code)

    def wait(deadline=None):
        while deadline and time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            time.sleep(0.005)
        if deadline:
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]

    return wait


def no_refusal(attempt):
    """Have an error of any kind fail the campaign: nothing here may be refused."""

    def strict(rng):
        try:
            return attempt(rng)
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    return strict


def draw(rng, seconds):
    """Where the next kill strikes: a point, the number of its use, and a deadline if it is a moment instead."""
    if rng.random() < 0.5:
        return "", 0, time.monotonic() + rng.uniform(0.1, 1.0) * seconds  # in the start-up too
    point = POINTS[rng.integers(len(POINTS))]
    return point, int(rng.integers(1, 3 if point == "model" else 9)), None


@no_refusal
def attempt(rng):
    """Kill a run of one process, and compare its end."""
    task = list(TASKS)[rng.integers(len(TASKS))]
    left_alone, seconds = whole(task)
    run, kills = place() / f"run-{os.getpid()}-{rng.integers(2**40)}", 0
    while True:
        point, number, deadline = draw(rng, seconds) if kills < KILLS else ("", 0, None)
        code = os.waitstatus_to_exitcode(start(recipe(task, run), point, number)(deadline))
        if code == 0:
            break
        if code != -signal.SIGKILL:
            return f"{task}: exit {code}: {Path(f'{run}.log').read_text().strip().splitlines()[-1]}"
        kills += 1
        COUNTS[task, point or "moment"] += 1
        find_start(run)  # readable after every kill; raises ValueError
    different = differences(left_alone, run)
    shutil.rmtree(run)
    Path(f"{run}.log").unlink()
    return f"{task}: {len(different)} values differ, as {different[0]}" if different else "right"


COUNTS: Counter = Counter()  # kills, by where they struck


def children(parent):
    try:
        return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except FileNotFoundError:  # it has just ended
        return []


def alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@no_refusal
def attempt_two_processes(rng):
    """Kill one of two processes, wait until the other has ended too, and compare the end of the run."""
    task = list(TASKS)[rng.integers(len(TASKS))]
    run = place() / f"two-{os.getpid()}-{rng.integers(2**40)}"

    def job(out, point="", number=0):
        argv = [sys.executable, __file__, "train", *recipe(task, out, "--devices", "2"), "--auto-resume"]
        environment = {**os.environ, "KILLS_RUN": f"{point},{number}"}
        with Path(f"{out}.log").open("a") as log:
            return subprocess.Popen(argv, stdout=log, stderr=log, env=environment)

    alone = place() / f"whole-two-{task}"
    if not (alone / "report.html").exists():
        began = time.monotonic()
        assert job(alone).wait() == 0, Path(f"{alone}.log").read_text()
        (alone / "seconds").write_text(str(time.monotonic() - began))
    seconds = float((alone / "seconds").read_text())
    kills = 0
    while True:
        point, number, deadline = draw(rng, seconds) if kills < KILLS else ("", 0, None)
        process = job(run, point, number)
        both = {process.pid}
        while process.poll() is None and (deadline is None or time.monotonic() < deadline):
            both |= set(children(process.pid))
            time.sleep(0.01)
        victim = process.pid
        if process.poll() is None:
            running = sorted(filter(alive, both))  # what a library started has ended
            victim = running[rng.integers(len(running))]
            os.kill(victim, signal.SIGKILL)
        elif process.returncode == 0:
            break
        elif process.returncode != -signal.SIGKILL:
            return f"{task} two: exit {process.returncode}: {Path(f'{run}.log').read_text().strip().splitlines()[-1]}"
        kills += 1
        COUNTS[f"{task} two", point or ("first at a moment" if victim == process.pid else "second at a moment")] += 1
        struck = time.monotonic()
        while process.poll() is None or any(alive(number) for number in both):
            if time.monotonic() - struck > SECONDS:
                for number in both:
                    if alive(number):
                        os.kill(number, signal.SIGKILL)
                return f"{task} two: the other process waited for {SECONDS} s"
            time.sleep(0.05)
        find_start(run)
    different = differences(alone, run)
    shutil.rmtree(run)
    return f"{task} two: {len(different)} values differ, as {different[0]}" if different else "right"


def attempt_any(rng):
    """Two runs of three have one process, the third has two."""
    return (attempt, attempt, attempt_two_processes)[rng.integers(3)](rng)


@pytest.fixture(scope="module", autouse=True)
def _clean():
    yield
    shutil.rmtree(place())


@pytest.mark.slow
def test_runs_that_are_killed_end_as_if_they_had_not_been():
    assert campaign.run(attempt, 3)["failures"] == []


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_of_which_one_is_killed_end_as_if_it_had_not_been():
    assert campaign.run(attempt_two_processes, 1)["failures"] == []


if __name__ == "__main__":
    if "KILLS_RUN" in os.environ:
        from groupmixformer.cli.main import main

        torch.set_num_threads(1)
        where, _, nth = os.environ["KILLS_RUN"].partition(",")
        if where and "LOCAL_RANK" not in os.environ:  # the first of the processes, which writes
            arm(where, int(nth))
        sys.exit(main(sys.argv[1:]))
    try:
        campaigns = {"any": (attempt_any, 45), "one": (attempt, 22), "two": (attempt_two_processes, 3)}
        campaign.main(campaigns, lambda: {"kills": {" ".join(key): count for key, count in sorted(COUNTS.items())}})
    finally:
        shutil.rmtree(place(), ignore_errors=True)
