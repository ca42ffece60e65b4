"""Runs that are continued: elsewhere, otherwise, or from a damaged checkpoint; and folders that two runs want."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_and_resume import differences

from groupmixformer.cli.main import main
from groupmixformer.deploy.model_card import read_card_info, render_card
from groupmixformer.run import Run
from groupmixformer.run_folder import read_metrics
from groupmixformer.tasks.classification.training import ClassificationModule
from groupmixformer.tasks.registry import build_task
from groupmixformer.training.claim import LOCK, Claim
from groupmixformer.training.loaders import TrainSampler
from groupmixformer.training.recipe import read_history, read_recipe
from groupmixformer.training.resume import find_start
from groupmixformer.training.trainer import train

SMALL = ["--image-size", "32", "--crop-pct", "1.0", "--batch-size", "8", "--workers", "0", "--device", "cpu", "--epochs", "1"]
TINY = [*SMALL, "--model", "test_resnet"]


def options(data, out, *more):
    return ["--data", str(data), "--out", str(out), *TINY, *(str(word) for word in more)]


def fit(data, out, *more, resume=False):
    return train(read_recipe("folder", options(data, out, *more)), build_task, resume)


def gmf(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def last_line(result):
    return result.err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A run of two epochs: copy it before changing it."""
    return fit(photos, tmp_path_factory.mktemp("resume") / "run", "--epochs", "2")


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


# The position inside an epoch


@settings(deadline=None)
@given(
    samples=st.integers(0, 120),
    parts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=4),
)
def test_no_sample_is_shown_twice_whatever_batches_and_processes_continue_an_epoch(samples, parts):
    shown = []
    for number, (batch_size, world_size, batches) in enumerate(parts):
        left = samples - len(shown)
        mine = []
        for rank in range(world_size):
            order = TrainSampler(samples, batch_size, seed=3, rank=rank, world_size=world_size)
            order.skip = len(shown)
            mine.append([index for _, index in order])
        assert len({len(part) for part in mine}) == 1  # or processes would wait for each other
        if number < len(parts) - 1:
            if len(mine[0]) <= batches * batch_size:
                return  # the epoch ends before it could be stopped
            mine = [part[: batches * batch_size] for part in mine]
        elif left >= batch_size * world_size:
            assert left - sum(map(len, mine)) < batch_size * world_size  # left out as in any epoch
        shown += [index for part in mine for index in part]
    assert len(shown) == len(set(shown))
    whole = TrainSampler(samples, 1, seed=3)
    assert set(shown) == {index for _, index in list(whole)[: len(shown)]}


@pytest.mark.parametrize(
    ("first", "stop", "then", "shown"),
    [
        pytest.param(4, 1, ["8"], 24, marks=pytest.mark.slow, id="larger"),
        pytest.param(4, 1, ["24"], 24, id="the rest is less than a batch, and all of it is one"),
        pytest.param(4, 0, ["16"], 20, marks=pytest.mark.slow, id="four images do not fill a batch, as in any epoch"),
        pytest.param(8, 0, ["2", "--grad-accum-steps", "3"], 24, id="smaller"),
    ],
)
def test_an_epoch_continued_with_other_batches_shows_every_image_once(
    photos, tmp_path, monkeypatch, capsys, caplog, first, stop, then, shown
):
    seen, real = {0: [], 1: []}, ClassificationModule.training_step

    def step(self, batch, batch_idx):
        seen[self.current_epoch] += [image.numpy().tobytes() for image in batch[0]]
        if not then_now and batch_idx == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationModule, "training_step", step)
    straight = ["--schedule.name=poly", "--schedule.decay-rate=1", "--schedule.min-lr=0", "--schedule.warmup-epochs=0"]
    more, then_now = ["--epochs", "2", *straight, "--batch-size"], False
    gmf(capsys, "train", "folder", *options(photos, tmp_path / "run", *more, first), code=143)
    then_now = True
    fit(photos, tmp_path / "run", *more, *then, resume=True)
    assert len(seen[0]) == len(set(seen[0])) == shown
    assert len(set(seen[1])) == len(seen[1])
    rows = read_metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [0, 1]
    assert all(0 <= row["val_top1"] <= 1 for row in rows)
    assert [row["lr"] for row in rows] == pytest.approx([5e-4, 0])  # by the epochs, however many steps there were
    assert f"batch_size: {first} -> {then[0]}" in caplog.text


# What has changed since


@pytest.mark.slow
def test_what_has_changed_is_named_and_the_recipe_keeps_its_history(photos, copied, capsys):
    more = ["--epochs", "3", "--batch-size", "4", "--optimizer.weight-decay", "0.5", "--save-minutes", "5"]
    result = gmf(capsys, "train", "folder", *options(photos, copied, *more), "--resume")
    assert f"continues from {copied}/checkpoints/last.ckpt in epoch 3, after step 6" in result.err
    assert "epochs: 2 -> 3, batch_size: 8 -> 4, optimizer.weight_decay: 0.05 -> 0.5\n" in result.err
    changed = {"epochs": [2, 3], "batch_size": [8, 4], "optimizer.weight_decay": [0.05, 0.5]}
    entry = {"epoch": 2, "step": 6, "changed": changed}
    assert read_history(copied / "recipe.yaml") == [entry]
    assert read_recipe(str(copied / "recipe.yaml")).batch_size == 4
    groups = torch.load(copied / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0, 0.5}  # and holds
    # Again, from where nothing has changed; then with one more.
    gmf(capsys, "train", copied / "recipe.yaml", "--resume")
    assert read_history(copied / "recipe.yaml") == [entry]
    gmf(capsys, "train", copied / "recipe.yaml", "--epochs", "4", "--seed", "5", "--resume")
    assert [part["changed"] for part in read_history(copied / "recipe.yaml")] == [changed, {"epochs": [3, 4], "seed": [0, 5]}]
    told = "epochs 2 -> 3, batch_size 8 -> 4, optimizer.weight_decay 0.05 -> 0.5 from epoch 3 on"
    told += "; epochs 3 -> 4, seed 0 -> 5 from epoch 4 on"
    opened = Run.open(copied)
    card = render_card(read_card_info(opened.folder, opened.definition.publish(opened.folder, copied.parent)), "me/it", "mit")
    assert f"Changed while it was trained: {told}." in card
    assert told in re.sub("&gt;", ">", (copied / "report.html").read_text())


@pytest.mark.parametrize("more", [["--model", "test_vit"], ["--optimizer.name", "sgd"], ["--optimizer.layer-decay", "0.5"]])
def test_what_cannot_be_continued_is_refused_in_a_line(photos, copied, capsys, more):
    before = (copied / "checkpoints" / "last.ckpt").read_bytes()
    line = last_line(gmf(capsys, "train", "folder", *options(photos, copied, "--epochs", "3", *more), "--resume", code=1))
    assert line.startswith("gmf: error: ")
    assert "continue with" in line
    assert "size mismatch" not in line
    assert (copied / "checkpoints" / "last.ckpt").read_bytes() == before


def test_the_recipe_of_a_moved_folder_means_that_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "new")
    recipe = Path("new", "recipe.yaml")
    recipe.write_text(recipe.read_text().replace(f"out: {run}", "out: old"))
    gmf(capsys, "train", recipe, "--epochs", "3", "--resume")
    assert [row["epoch"] for row in read_metrics(Path("new"))] == [0, 1, 2]
    assert not Path("old").exists()
    assert read_recipe(str(recipe)).out == "new"


def test_where_nothing_is_to_resume_it_says_so_and_stops(photos, run, tmp_path, capsys):
    for name in (run / "recipe.yaml", "folder"):
        line = last_line(gmf(capsys, "train", name, *options(photos, tmp_path / "other"), "--resume", code=1))
        assert line.startswith(f"gmf: error: {tmp_path}/other: holds no checkpoint to resume: --auto-resume begins a run")
    assert not (tmp_path / "other" / "recipe.yaml").exists()


@pytest.mark.slow
def test_auto_resume_begins_and_continues(photos, tmp_path, capsys):
    argv = ["train", "folder", *options(photos, tmp_path / "run"), "--auto-resume"]
    gmf(capsys, *argv)
    gmf(capsys, *argv, "--epochs", "2")
    assert [row["epoch"] for row in read_metrics(tmp_path / "run")] == [0, 1]


# Classes


def test_other_classes_than_the_checkpoint_has_are_refused(photos, copied, tmp_path, capsys):
    data = shutil.copytree(photos, tmp_path / "data")
    argv = ["train", "folder", *options(data, copied, "--epochs", "3"), "--resume"]
    for part in ("train", "val"):
        (data / part / "one").rename(data / part / "zzz")  # which comes behind `zero`: the labels would be exchanged
    line = last_line(gmf(capsys, *argv, code=1))
    assert (
        "last.ckpt: was trained on other classes than the data has: only the checkpoint has one; only the data has zzz" in line
    )
    for part in ("train", "val"):
        shutil.copytree(data / part / "zzz", data / part / "one")
    assert "only the data has zzz; give the data" in last_line(gmf(capsys, *argv, code=1))
    # A checkpoint of before holds no names: config.json does.
    checkpoint = torch.load(copied / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint.pop("run")["class_names"] == ["one", "zero"]
    torch.save(checkpoint, copied / "checkpoints" / "last.ckpt")
    assert "only the data has zzz; give the data" in last_line(gmf(capsys, *argv, code=1))
    assert [row["epoch"] for row in read_metrics(copied)] == [0, 1]


# Damaged checkpoints


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def poison(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["model.fc.weight"][0, 3] = float("nan")
    torch.save(checkpoint, path)


def remove(path):
    path.unlink()


DAMAGE = {
    empty: "is empty",
    truncate: "is damaged or of another kind (BadZipFile",
    flip: "is damaged: the checksum",
    poison: "holds 1 values of model.fc.weight that are not finite",
    remove: "is missing",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(copied, damage):
    last, previous = (copied / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    damage(last)
    start = find_start(copied)
    assert (start.path, start.place) == (previous, {"epoch": 1, "step": 3})
    assert start.damage.startswith(f"{last} {DAMAGE[damage]}")
    damage(previous)
    if damage is remove:
        assert find_start(copied) is None
        return
    with pytest.raises(ValueError, match=r"last\.ckpt .*; .*previous\.ckpt ") as caught:
        find_start(copied)
    words = str(caught.value)
    assert words.count(DAMAGE[damage]) == 2
    assert words.endswith(
        f"; the best model, {copied}/model.safetensors, is intact: begin a new run from it with --checkpoint {copied}, "
        "another --out"
    )
    assert "\n" not in words
    assert "weights_only" not in words
    (copied / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no model of the run is intact: begin a new run$"):
        find_start(copied)


@pytest.mark.slow
def test_a_run_with_a_damaged_checkpoint_ends_as_if_it_had_been_whole(photos, run, copied, capsys):
    last, previous = (copied / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous"))
    flip(last)
    kept = previous.read_bytes()
    result = gmf(capsys, "train", copied / "recipe.yaml", "--resume")
    assert f"does not hold: continues from {previous} in epoch 2, after step 3" in result.err
    assert differences(run, copied) == []
    assert previous.read_bytes() == kept  # and not the damaged one


# One run in a folder


@pytest.mark.slow
def test_a_folder_belongs_to_one_run_at_a_time(photos, tmp_path, capsys):
    code = (
        f"from groupmixformer.training.claim import Claim\nfrom pathlib import Path\nimport time\n"
        f"with Claim(Path({str(tmp_path)!r})):\n print('held', flush=True)\n time.sleep(100)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        line = last_line(gmf(capsys, "train", "folder", *options(photos, tmp_path), code=1))
        assert line.startswith(f"gmf: error: {tmp_path}: another run writes to it, process {other.pid} on ")
        assert not (tmp_path / "recipe.yaml").exists()
    finally:
        other.kill()
        other.wait()
    with Claim(tmp_path) as claim:  # it died with the process
        claim.check()
        shutil.rmtree(tmp_path)
        with pytest.raises(FileNotFoundError, match="was removed or replaced"):
            claim.check()
        tmp_path.mkdir()
        (tmp_path / LOCK).touch()
        with pytest.raises(FileNotFoundError, match="was removed or replaced"):
            claim.check()


def test_where_nothing_can_be_locked_a_run_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("groupmixformer.training.claim.fcntl", None)  # as on Windows
    with Claim(tmp_path) as claim:
        claim.check()
    assert "cannot be locked here" in capsys.readouterr().err


def test_a_folder_that_is_removed_meanwhile_is_no_full_disk(photos, tmp_path, monkeypatch, capsys):
    real = ClassificationModule.training_step

    def step(self, batch, batch_idx):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationModule, "training_step", step)
    line = last_line(gmf(capsys, "train", "folder", *options(photos, tmp_path / "run"), code=1))
    assert line.startswith(f"gmf: error: {tmp_path}/run: was removed or replaced while the run was writing to it")
    assert not (tmp_path / "run").exists()


def test_a_report_that_fails_does_not_fail_the_run(photos, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "report").write_text("in the place of the report's folder")
    argv = ["train", "folder", *options(photos, run), "--json"]
    result = gmf(capsys, *argv)
    assert json.loads(result.out)["report"] is None
    again = f"gmf train {run}/recipe.yaml --resume"
    assert last_line(result).endswith(f"{again} writes the report")
    (run / "report").unlink()
    gmf(capsys, *again.split()[1:])
    assert (run / "report.html").is_file()


# Processes that wait for each other


@pytest.mark.slow
def test_a_process_whose_others_never_come_ends_in_time(photos, tmp_path):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "TORCHELASTIC_RUN_ID": "x", "GMF_START_SECONDS": "3"}
    argv = [sys.executable, "-m", "groupmixformer.cli.main", "train", "folder", *options(photos, tmp_path / "run")]
    done = subprocess.run(argv, env={**os.environ, **place}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "not all processes have come within 3 s (GMF_START_SECONDS)" in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["parent", "child"])
def test_a_process_killed_at_the_start_does_not_leave_the_other_waiting(photos, tmp_path, killed):
    code = (
        "import os, sys, time\n"
        "from groupmixformer.tasks.classification.training import ClassificationModule as task\n"
        "real = task.from_recipe.__func__\n"
        "def slow(cls, recipe, world_size):\n"
        "    if os.environ.get('LOCAL_RANK') == '1':\n"
        f"        open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "        time.sleep(15)\n"
        "    return real(cls, recipe, world_size)\n"
        "task.from_recipe = classmethod(slow)\n"
        "from groupmixformer.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    (tmp_path / "start.py").write_text(code)
    argv = [sys.executable, tmp_path / "start.py", "train", "folder", *options(photos, tmp_path / "run", "--devices", "2")]
    job = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child = int((tmp_path / "pid").read_text())
    os.kill(job.pid if killed == "parent" else child, signal.SIGKILL)
    began = time.monotonic()
    job.wait(60)
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    assert time.monotonic() - began < 30
