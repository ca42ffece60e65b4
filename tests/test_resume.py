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
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_and_resume import differences

from groupmixformer.cli.main import main
from groupmixformer.data.streaming import Stream
from groupmixformer.deploy.model_card import read_card_info, render_card
from groupmixformer.run import Run
from groupmixformer.run_folder import read_metrics
from groupmixformer.tasks.classification.training import ClassificationModule
from groupmixformer.tasks.registry import build_task
from groupmixformer.training.claim import LOCK, Claim
from groupmixformer.training.loaders import STOP_SIGNALS, DataModule, EvalSampler, TrainSampler, _ignore_signals
from groupmixformer.training.recipe import read_history, read_recipe
from groupmixformer.training.resume import changes, check_classes, describe, find_start
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


class Indices:
    """A training set that gives the index of each sample."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, place):
        return place[1]


def open_loaders(train, batch_size, rank=0, world_size=1, workers=0):
    """A `DataModule` in epoch 2, and the trainer's count of its batches."""
    loaders = DataModule(train, range(5), batch_size, workers, seed=3, collate=list)
    progress = SimpleNamespace(is_last_batch=False, current=SimpleNamespace(processed=0))
    loaders.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        current_epoch=2,
        fit_loop=SimpleNamespace(
            epoch_progress=SimpleNamespace(current=SimpleNamespace(processed=2)),
            epoch_loop=SimpleNamespace(batch_progress=progress),
        ),
    )
    return loaders, progress


def saved(done, samples=None, **before):
    """What a checkpoint says of the place inside an epoch, and of its run."""
    state = {"done": done} | ({} if samples is None else {"samples": samples})
    current = {"ready": done + 1, "processed": done}
    checkpoint = {"DataModule": state, "loops": {"fit_loop": {"epoch_loop.batch_progress": {"current": current}}}}
    return checkpoint, {"recipe": {"batch_size": before.pop("batch_size", 4), "workers": before.pop("workers", 0)}, **before}


def test_an_epoch_is_handed_from_process_to_process():
    order = TrainSampler(70, 1, seed=3)
    order.set_epoch(2)
    shown, checkpoint, before = [], None, None
    for batch_size, world_size, batches in ((4, 1, 3), (3, 2, 4), (3, 2, 2), (5, 2, 1), (2, 1, None)):
        part = []
        for rank in range(world_size):
            loaders, progress = open_loaders(Indices(70), batch_size, rank, world_size)
            done = 0
            if checkpoint:
                mine = json.loads(json.dumps(checkpoint))
                loaders.move(mine, before)
                done, seen = mine["DataModule"]["done"], mine["DataModule"]["samples"]
                assert seen == len(shown)
                current = mine["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
                assert current == {"ready": done + 1, "processed": done}
                loaders.load_state_dict(mine["DataModule"])
            left = list(loaders.train_dataloader())
            assert done + len(left) == loaders.batches(world_size) == 70 // (batch_size * world_size)
            part += [index for batch in left[:batches] for index in batch]
            progress.current.processed = done + len(left[:batches])
            state = loaders.state_dict()
        shown += part
        checkpoint, before = saved(**state, batch_size=batch_size, processes=world_size)
        progress.is_last_batch = True
        assert loaders.state_dict() == {"done": 0, "samples": 0}
        loaders.trainer.current_epoch, progress.is_last_batch = 3, False  # whose samples nobody has seen
        assert loaders.state_dict()["samples"] == progress.current.processed * batch_size * world_size
    assert len(shown) == 70
    assert sorted(shown) == sorted(index for _, index in order)


def test_a_checkpoint_that_counts_no_samples():
    loaders, _ = open_loaders(Indices(50), 5)
    checkpoint, before = saved(3, batch_size=4, processes=2)
    loaders.move(checkpoint, before)
    assert checkpoint["DataModule"] == {"done": 5, "samples": 24}  # five batches of the 26 that are left
    loaders.move(saved(0)[0] | {"loops": None}, before)  # between two epochs: nothing to count


def test_a_rest_that_is_less_than_a_batch_is_one():
    loaders, _ = open_loaders(Indices(20), 8)
    checkpoint, before = saved(5, 15, batch_size=3)
    loaders.move(checkpoint, before)
    assert checkpoint["DataModule"]["done"] == 1 == loaders.batches(1) - 1
    order = TrainSampler(16, 8, seed=3)
    order.skip = 9
    assert [len(list(order)) for _ in range(2)] == [6, 16]  # an even number, as mixup needs it; then all again


def test_the_order_stays_what_it_was():
    """Runs that are continued rely on it."""
    found = []
    for labels in (None, [0, 0, 1, 1, 1], [0, 0, 1, 1]):
        order = TrainSampler(len(labels or range(5)), 1, seed=3, labels=labels)
        order.set_epoch(2)
        found.append([row[1:] for row in order])
    assert found == [
        [(4,), (1,), (2,), (0,), (3,)],
        [(0, 0), (1, 0), (3, 0), (4, 0), (1, 1)],
        [(2, 0), (3, 0), (1, 0), (0, 0)],
    ]


def test_workers_ignore_the_signals_that_stop_a_run(monkeypatch):
    ignored = {}
    monkeypatch.setattr(signal, "signal", ignored.__setitem__)
    _ignore_signals(0)
    assert ignored == dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)
    assert STOP_SIGNALS == (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.mark.parametrize(
    ("samples", "seen", "world_size", "left"),
    [(10, 8, 1, None), (10, 9, 1, 1), (10, 7, 2, 3), (10, 6, 2, None), (6, 8, 1, 0)],
)
def test_an_epoch_of_which_too_little_is_left(samples, seen, world_size, left):
    loaders, _ = open_loaders(Indices(samples), 4, world_size=world_size)
    checkpoint, before = saved(2, seen)
    if left is None:
        loaders.move(checkpoint, before)
    else:
        with pytest.raises(ValueError, match=f"^{left} images of the epoch are left for {world_size} processes: continue with"):
            loaders.move(checkpoint, before)


def test_inside_an_epoch_a_stream_is_continued_as_it_was_begun():
    stream = Stream(SimpleNamespace(class_names=["a"], lengths=[40, 7]))
    for old, new in (((4, 0, 1), (4, 1, 1)), ((4, 1, 2), (4, 0, 2)), ((4, 3, 1), (4, 3, 1))):  # one worker reads as none does
        loaders, _ = open_loaders(stream, new[0], world_size=new[2], workers=new[1])
        checkpoint, before = saved(2, batch_size=old[0], workers=old[1], processes=old[2])
        loaders.move(checkpoint, before)
        assert checkpoint["DataModule"] == {"done": 2, "samples": 2 * old[0] * old[2]}
    for new in ((5, 1, 1), (4, 2, 1), (4, 0, 2)):
        loaders, _ = open_loaders(stream, new[0], world_size=new[2], workers=new[1])
        with pytest.raises(ValueError, match="as it was begun, with batch_size 4, workers 0, processes 1: continue with these"):
            loaders.move(*saved(2, batch_size=4, workers=0, processes=1))


def test_loaders_of_streams():
    stream = Stream(SimpleNamespace(class_names=["a"], lengths=[40, 7]))
    loaders, _ = open_loaders(stream, 4, rank=1, world_size=2, workers=1)
    assert (loaders.samples, loaders.batches(2), loaders.streams) == (47, 5, True)
    loaders.load_state_dict({"done": 3, "samples": 24})
    loader = loaders.train_dataloader()
    assert (len(loader), loader.drop_last, loader.persistent_workers) == (5, True, True)
    assert (stream.training, stream.seed, stream.rank, stream.world_size) == (True, 3, 1, 2)
    assert stream._place.tolist() == [2, 3, 4]  # epoch, batches to skip, their size
    held_out = Stream(SimpleNamespace(class_names=["a"], lengths=[9]))
    loaders.held_out = held_out
    loader = loaders.val_dataloader()
    assert (len(loader), loader.drop_last, held_out.training, held_out.rank, held_out.world_size) == (2, False, False, 1, 2)


def test_each_image_is_held_out_once():
    parts = [open_loaders(Indices(9), 2, rank, 3)[0].val_dataloader() for rank in range(3)]
    assert sorted(index for part in parts for index in part.sampler) == [-1, 0, 1, 2, 3, 4]
    assert {len(part) for part in parts} == {1}
    assert list(EvalSampler(3)) == [0, 1, 2]


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


def test_what_differs_between_two_descriptions(photos, tmp_path):
    recipe = read_recipe("folder", options(photos, tmp_path))
    now = describe(recipe, 2, 24, ["one", "zero"])
    assert changes(now, now) == changes({}, now) == {}
    before = json.loads(json.dumps(now))
    before["recipe"]["optimizer"]["lr"] = 0.5
    before["recipe"] |= {"batch_size": 4, "workers": 3, "out": "elsewhere"}  # the last two alter nothing
    del before["recipe"]["seed"]  # of before there was such a field
    before |= {"processes": 1, "images": 20, "class_names": ["one"]}
    expected = {"batch_size": [4, 8], "optimizer.lr": [0.5, recipe.optimizer.lr], "processes": [1, 2], "images": [20, 24]}
    assert changes(before, now) == expected


def test_classes_in_another_order_or_form(tmp_path):
    check_classes({}, ["a"], tmp_path)
    check_classes({"class_names": ["caf\u00e9"]}, ["cafe\u0301"], tmp_path)
    with pytest.raises(ValueError, match="than the data has: the same names in another order; give the data"):
        check_classes({"class_names": ["a", "b"]}, ["b", "a"], tmp_path)


def test_a_checkpoint_that_does_not_tell_its_run(copied):
    last = copied / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    told = checkpoint.pop("run")
    torch.save(checkpoint, last)
    expected = {"processes": 1, "history": [], "class_names": ["one", "zero"], "recipe": told["recipe"]}
    assert find_start(copied).before == expected
    (copied / "recipe.yaml").unlink()
    assert find_start(copied).before == {name: value for name, value in expected.items() if name != "recipe"}


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


def strip(path):
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["counts"]
    torch.save(checkpoint, path)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def infect(path):
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"counts": Hostile(path.with_name("ran"))}, path)


def remove(path):
    path.unlink()


DAMAGE = {
    strip: "is no checkpoint of training: it has no counts",
    infect: "is damaged or of another kind (UnpicklingError",
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
    assert not last.with_name("ran").exists()
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
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model of the run is intact: begin a new run$"):
        find_start(copied)


def test_a_run_with_one_checkpoint(copied):
    (copied / "checkpoints" / "previous.ckpt").unlink()
    start = find_start(copied)
    assert (start.path.name, start.damage, start.place) == ("last.ckpt", "", {"epoch": 2, "step": 6})


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


def test_an_error_of_another_file_is_not_one_of_the_run_folder(photos, tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone.pth"
    line = last_line(gmf(capsys, "train", "folder", *options(photos, tmp_path / "run", "--checkpoint", gone), code=1))
    assert line == f"gmf: error: {gone}: no such checkpoint file or folder"

    def full(*_):
        raise OSError(28, "No space left on device")  # as TensorBoard does

    monkeypatch.setattr("groupmixformer.training.trainer._fit", full)
    line = last_line(gmf(capsys, "train", "folder", *options(photos, tmp_path / "run"), code=1))
    assert line.startswith(f"gmf: error: {tmp_path}/run/TensorBoard's events: could not be written: the disk is full; ")


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
