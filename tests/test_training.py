"""Training on one process: the order of samples, stopping and continuing, what goes wrong on the way, recipes and options."""

import contextlib
import functools
import itertools
import json
import math
import os
import resource
import shutil
import signal
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_and_resume import differences, scalars
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from groupmixformer import load_checkpoint
from groupmixformer.cli.main import main
from groupmixformer.data.images import decode
from groupmixformer.models.checkpoint import load_model
from groupmixformer.run_folder import read_metrics
from groupmixformer.tasks.classification.data import (
    ImageData,
    classification_transform,
    collate_classification,
    eval_loader,
    eval_transform,
    open_images,
)
from groupmixformer.tasks.classification.metrics import evaluate_classifier
from groupmixformer.tasks.classification.training import ClassificationModule
from groupmixformer.tasks.registry import build_task
from groupmixformer.training.loaders import EvalSampler, TrainSampler
from groupmixformer.training.recipe import Augmentation, Recipe, read_recipe
from groupmixformer.training.trainer import train

SMALL = ["--image_size", "32", "--crop_pct", "1.0", "--batch_size", "8", "--workers", "0", "--device", "cpu", "--epochs", "1"]
TINY = [*SMALL, "--model", "test_resnet"]  # where the model does not matter
CONFIG = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.2), "interpolation": "bicubic"}
STEPS = 24 // 8  # steps in an epoch of `photos`


def options(data, out, *more):
    return ["--data", str(data), "--out", str(out), *TINY, *(str(word) for word in more)]


def fit(data, out, *more, resume=False):
    """Train without the command line around it, which evaluates and reports; return the run folder."""
    return train(read_recipe("folder", options(data, out, *more)), build_task, resume)


def gmf(capsys, *argv, code=0):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def checkpoint(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def part(run, prefix):
    """Tensors of the last checkpoint that belong to a part of the task, such as `model.`."""
    state = checkpoint(run)["state_dict"]
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def before_step(monkeypatch):
    """Give a function that has something done before every training step: `act(task, images, epoch, batch_idx)`."""
    real = ClassificationModule.training_step

    def register(act):
        def training_step(self, batch, batch_idx):
            act(self, batch[0], self.current_epoch, batch_idx)
            return real(self, batch, batch_idx)

        monkeypatch.setattr(ClassificationModule, "training_step", training_step)

    return register


# The order of samples


@settings(deadline=None)
@given(
    samples=st.integers(0, 100),
    batch_size=st.integers(1, 6),
    world_size=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 500),
)
def test_batches_hold_the_same_samples_on_any_number_of_processes(samples, batch_size, world_size, seed, epoch):
    def batches(batch_size, world_size):
        parts = []
        for rank in range(world_size):
            order = TrainSampler(samples, batch_size, seed, rank, world_size)
            order.set_epoch(epoch)
            part = list(order)
            assert len(part) == len(order)
            assert {passed for passed, _ in part} <= {epoch}
            parts.append([index for _, index in part])
        steps = range(samples // (batch_size * world_size))
        assert all(len(part) == len(steps) * batch_size for part in parts)
        return [sorted(i for part in parts for i in part[step * batch_size :][:batch_size]) for step in steps]

    together = batches(batch_size, world_size)
    assert together == batches(batch_size * world_size, 1)
    assert len({i for batch in together for i in batch}) == samples // (batch_size * world_size) * batch_size * world_size


@settings(deadline=None)
@given(seed=st.integers(0, 1000), epoch=st.integers(0, 1000), skip=st.integers(0, 5))
def test_the_order_depends_on_seed_and_epoch_and_continues_after_a_skip(seed, epoch, skip):
    def order(seed, epoch):
        made = TrainSampler(50, 8, seed)
        made.set_epoch(epoch)
        return made

    whole = list(order(seed, epoch))
    assert list(order(seed, epoch)) == whole
    for other in (order(seed, epoch + 1), order(seed + 1, epoch)):
        assert [i for _, i in other] != [i for _, i in whole]
    resumed = order(seed, epoch)
    resumed.skip = skip * 8
    assert list(resumed) == whole[skip * 8 :]
    assert list(resumed) == whole  # the next pass is a whole one


def test_what_an_epoch_leaves_out_comes_in_another():
    order = TrainSampler(15, 8, seed=0)
    seen = Counter()
    for epoch in range(30):
        order.set_epoch(epoch)
        seen.update(i for _, i in order)
    assert set(seen) == set(range(15))
    assert max(seen.values()) < 30


@settings(deadline=None)
@given(samples=st.integers(0, 60), world_size=st.integers(1, 7))
def test_evaluation_covers_every_index_once(samples, world_size):
    orders = [EvalSampler(samples, rank, world_size) for rank in range(world_size)]
    parts = [list(order) for order in orders]
    assert len({len(part) for part in parts} | {len(order) for order in orders}) == 1
    assert sorted(i for part in parts for i in part if i != -1) == list(range(samples))
    assert sum(part.count(-1) for part in parts) < world_size


# Samples

HARD = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=1.0)


@pytest.fixture(scope="session")
def samples(photos):
    """Training images of `photos`, augmented with all that draws random numbers."""
    return open_images(str(photos)).train(classification_transform(HARD, CONFIG), 3)


def test_a_sample_is_the_same_wherever_it_is_made(samples):
    keys = list(itertools.product((0, 1), range(len(samples))))
    made = {key: samples[key][0] for key in keys}
    assert len({image.numpy().tobytes() for image in made.values()}) == len(keys)  # no two are alike, in no two epochs
    generator = torch.Generator().manual_seed(5)
    shuffled = [keys[i] for i in torch.randperm(len(keys), generator=generator)]
    for workers in (0, 2):
        loader = DataLoader(samples, 5, sampler=shuffled, num_workers=workers, collate_fn=collate_classification)
        again = torch.cat([images for images, _, _ in loader])
        assert torch.equal(again, torch.stack([made[key] for key in shuffled]))


def test_another_seed_augments_otherwise(samples, photos):
    other = open_images(str(photos)).train(samples.transform, 4)
    assert not torch.equal(other[0, 0][0], samples[0, 0][0])


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "rand-m10", "original", "v0"])
def test_randaugment_never_fails(photos, policy):
    images = open_images(str(photos)).train(classification_transform(Augmentation(auto_augment=policy), CONFIG), 0)
    assert all(images[epoch, 0][0].isfinite().all() for epoch in range(150))


def test_posterize_without_bits_gives_black(photos):
    transform = classification_transform(Augmentation(auto_augment="rand-m10-n1"), CONFIG)
    of_colours, _, _ = transform.args
    (operations,) = [step.ops for step in of_colours.transforms if hasattr(step, "ops")]
    (posterize,) = [operation for operation in operations if operation.name == "Posterize"]
    white = Image.new("RGB", (4, 3), "white")
    posterize.prob = 1.0
    for level, expected in ((0, 0), (10, 240)):  # timm keeps 4 bits at the full level
        posterize.magnitude = level
        assert np.unique(np.asarray(posterize(white))).tolist() == [expected]


# Stopping and continuing

LONG = [
    *("--model", "test_efficientnet", "--batch_size", "4", "--epochs", "2", "--grad-accum-steps", "2", "--ema", "0.9"),
    *("--drop_path_rate", "0.2", "--augmentation.mixup", "0.8", "--augmentation.random_erasing", "0.25"),
    *("--augmentation.auto_augment", "rand-m9-mstd0.5-inc1"),
]


@pytest.fixture(scope="session")
def odd(write_digits, tmp_path_factory):
    """28 images for training: 7 batches of 4, so that the last of an epoch is alone in its step."""
    return write_digits(tmp_path_factory.mktemp("odd"), ["zero", "one"], train=14, val=3)


@pytest.fixture(scope="session")
def undisturbed(odd, tmp_path_factory):
    return fit(odd, tmp_path_factory.mktemp("undisturbed") / "run", *LONG)


class Crash(Exception):
    pass


@pytest.mark.parametrize(
    ("how", "stops", "saved", "workers"),
    [
        (signal.SIGTERM, [(0, 0)], [(0, 2)], 0),  # in the middle of a step, which is done first
        (signal.SIGINT, [(1, 3)], [(1, 4)], 1),
        (signal.SIGUSR1, [(0, 6)], [(0, 0)], 1),  # an epoch's last step: the checkpoint is that of its end
        (signal.SIGTERM, [(0, 2), (0, 5), (1, 5), (1, 6)], [(0, 4), (0, 6), (1, 6), (1, 0)], 0),
        (Crash, [(0, 1), (0, 5), (1, 3)], [None, (0, 4), (1, 2)], 0),
    ],
    ids=["middle of a step", "Ctrl-C", "end of an epoch", "four times", "crashes"],
)
def test_a_stopped_run_ends_as_if_it_had_not_been(odd, undisturbed, before_step, tmp_path, capsys, how, stops, saved, workers):
    run, waiting = tmp_path / "a run", list(stops)

    def stop(task, images, epoch, batch_idx):
        if (epoch, batch_idx) in waiting:
            waiting.remove((epoch, batch_idx))
            if how is Crash:
                raise Crash
            os.kill(os.getpid(), how)

    before_step(stop)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    more = [*LONG, "--workers", workers, "--save_minutes", 0 if how is Crash else 10]
    argv = ["train", "folder", *options(odd, run, *more)]
    for place in saved:
        result = gmf(capsys, *argv, "--auto-resume", code=1 if how is Crash else 128 + how)
        assert {number: signal.getsignal(number) for number in before} == before
        last = run / "checkpoints" / "last.ckpt"
        if place is None:
            assert not last.exists()
        else:
            assert (checkpoint(run)["epoch"], checkpoint(run)["DataModule"]["done"]) == place
        if how is not Crash:
            assert f"{how.name} and saved: continue with gmf train '{run}/recipe.yaml' --resume" in result.err
    assert not waiting
    fit(odd, run, *more, resume=True)
    assert differences(undisturbed, run) == []


def test_the_command_that_a_stopped_run_names_finishes_it(photos, before_step, tmp_path, capsys):
    def stop(task, images, epoch, batch_idx):
        if (epoch, batch_idx) == (0, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    before_step(stop)
    result = gmf(capsys, "train", "folder", *options(photos, tmp_path / "run", "--epochs", "2"), code=143)
    assert result.out == ""
    command = result.err.strip().splitlines()[-1].split("continue with gmf ")[1].split()
    assert json.loads(gmf(capsys, *command, "--json").out)["images"] == 16
    assert [row["epoch"] for row in read_metrics(tmp_path / "run")] == [0, 1]


def test_a_second_ctrl_c_stops_without_saving(photos, before_step, tmp_path, capsys):
    def interrupt(task, images, epoch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before_step(interrupt)
    gmf(capsys, "train", "folder", *options(photos, tmp_path / "run"), code=130)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_finished_run_is_only_reported_and_more_epochs_continue_it(photos, tmp_path, capsys):
    run = fit(photos, tmp_path / "run")
    kept = [run / name for name in ("metrics.csv", "model.safetensors", "checkpoints/last.ckpt")]
    before = [path.read_bytes() for path in kept]
    result = json.loads(gmf(capsys, "train", run / "recipe.yaml", "--resume", "--json").out)
    assert result["top1"] == read_metrics(run)[0]["val_top1"]
    assert [path.read_bytes() for path in kept] == before
    fit(photos, run, "--epochs", "3", resume=True)
    assert [(row["epoch"], row["step"]) for row in read_metrics(run)] == [(e, STEPS * (e + 1)) for e in range(3)]


def test_a_resumed_run_follows_the_schedule_of_its_recipe_now(photos, tmp_path):
    constant = ["--schedule.name", "constant", "--schedule.warmup_epochs", "0", "--log_steps", "1"]
    run = fit(photos, tmp_path / "run", *constant, "--optimizer.lr", "0.01")
    falling = ["--optimizer.lr", "0.002", "--schedule.min_lr", "0", "--schedule.name", "poly", "--schedule.decay_rate", "1"]
    fit(photos, run, *constant, *falling, "--epochs", "2", resume=True)
    assert [row["lr"] for row in read_metrics(run)] == [0.01, 0]
    assert scalars(run, "lr-AdamW/pg2") == pytest.approx([0.01] * 3 + [0.002 * left / 6 for left in (3, 2, 1)])


FROZEN = ["--model", "test_vit", "--optimizer.lr", "0", "--schedule.warmup_lr", "0", "--schedule.min_lr", "0"]


def test_patience_ends_a_run_for_good(photos, tmp_path):
    run = fit(photos, tmp_path / "run", *FROZEN, "--epochs", "9", "--patience", "2")  # test_vit has no BN: nothing changes
    assert [row["epoch"] for row in read_metrics(run)] == [0, 1, 2]
    fit(photos, run, *FROZEN, "--epochs", "9", "--patience", "2", resume=True)
    assert [row["epoch"] for row in read_metrics(run)] == [0, 1, 2]
    fit(photos, run, *FROZEN, "--epochs", "9", "--patience", "4", resume=True)
    assert [row["epoch"] for row in read_metrics(run)] == [0, 1, 2, 3, 4]


@contextlib.contextmanager
def disk_full(size):
    """Let no file become larger than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(photos, tmp_path, capsys):
    run = fit(photos, tmp_path / "run")
    last, model = run / "checkpoints" / "last.ckpt", run / "model.safetensors"
    before = last.read_bytes()
    resume = ["train", "folder", *options(photos, run, "--epochs", "2"), "--resume"]
    with disk_full(model.stat().st_size + 100_000):  # the model still fits, the checkpoint is thrice as large
        line = gmf(capsys, *resume, code=1).err.strip().splitlines()[-1]
    assert line == (
        f"gmf: error: {last}: could not be written: it would be larger than files may be here; intact are "
        "checkpoints/last.ckpt, model.safetensors, metrics.csv of before: continue with --resume"
    )
    assert last.read_bytes() == before
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    (last.parent / ".last.ckpt.part").mkdir()
    (last.parent / ".last.ckpt.part" / "last.ckpt").write_bytes(b"half of a checkpoint, from a machine that lost its power")
    gmf(capsys, *resume)
    assert [row["epoch"] for row in read_metrics(run)] == [0, 1]
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert not differences(fit(photos, tmp_path / "whole", "--epochs", "2"), run)


@pytest.mark.parametrize("size", [1000, pytest.param(1_000_000, marks=pytest.mark.slow)], ids=["recipe", "model"])
def test_a_full_disk_ends_a_run_in_one_line_and_leaves_no_halves(photos, tmp_path, capsys, size):
    argv = ["train", "folder", *options(photos, tmp_path / "run", "--epochs", "2")]
    with disk_full(size):
        result = gmf(capsys, *argv, code=1)
    assert "Traceback" not in result.err
    name = "recipe.yaml" if size == 1000 else "model.safetensors"
    line = result.err.strip().splitlines()[-1]
    assert line.startswith(
        f"gmf: error: {tmp_path}/run/{name}: could not be written: it would be larger than files may be here"
    )
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "model.safetensors" not in names
    assert not [name for name in names if name.endswith(".part")]
    gmf(capsys, *argv, "--auto-resume")
    assert [row["epoch"] for row in read_metrics(tmp_path / "run")] == [0, 1]


# Gradients that are not finite


def snapshot(task):
    """What a skipped step must leave alone."""
    values = {f"task.{n}": v for n, v in task.state_dict().items() if v.is_floating_point() and not n.startswith("train_loss")}
    for i, state in enumerate(task.optimizers().optimizer.state.values()):
        values |= {f"optimizer.{i}.{n}": torch.as_tensor(v) for n, v in state.items()}
    return {name: value.clone() for name, value in values.items()}


@pytest.mark.parametrize(
    "more",
    [
        ["--model", "test_efficientnet", "--grad-accum-steps", "2"],
        ["--optimizer.name", "adamw", "--grad-accum-steps", "2"],
        ["--optimizer.name", "sgd"],
        ["--optimizer.name", "muon"],
        ["--optimizer.name", "lamb"],
        ["--optimizer.name", "lion"],
    ],
    ids=lambda more: " ".join(more),
)
def test_a_step_without_finite_gradients_changes_nothing(photos, before_step, tmp_path, more):
    snapshots = []

    def poison(task, images, epoch, batch_idx):
        snapshots.append(snapshot(task))
        if (epoch, batch_idx) in {(0, 1), (1, 0)}:
            images[3, 1, 2, 2] = float("inf")

    before_step(poison)
    run = fit(photos, tmp_path / "run", "--batch_size", "4", "--epochs", "2", "--ema", "0.5", *more)
    accumulate = 2 if "--grad-accum-steps" in more else 1
    steps = snapshots[::accumulate]
    changed = [not equal(before, after) for before, after in itertools.pairwise(steps)]
    skipped = {1 // accumulate, 6 // accumulate}
    assert changed == [step not in skipped for step in range(12 // accumulate - 1)]
    rows = read_metrics(run)
    assert [row["skipped_steps"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["val_loss"]) for row in rows)
    assert all(v.isfinite().all() for v in checkpoint(run)["state_dict"].values())


@pytest.mark.parametrize("good", [{(0, 0), (1, 0)}, {(0, 0)}])
def test_too_many_skipped_steps_in_a_row_end_the_run(photos, before_step, tmp_path, capsys, good):
    steps = []

    def poison(task, images, epoch, batch_idx):
        steps.append((epoch, batch_idx))
        if (epoch, batch_idx) not in good:
            images[:] = float("nan")

    before_step(poison)
    run = tmp_path / "run"
    argv = ["train", "folder", *options(photos, run, "--epochs", "9", "--max-skipped-steps", "2")]
    line = gmf(capsys, *argv, code=1).err.strip().splitlines()[-1]
    assert steps == sorted(itertools.product(range(3), range(3)))[: 3 * len(good) + 1]  # three after the last good one
    last = run / "checkpoints" / "last.ckpt"
    assert line.startswith("gmf: error: the gradients of 3 steps in a row were not finite")
    assert f"The last checkpoint is {last}" in line
    assert checkpoint(run)["global_step"] == 3 * len(good)
    for kept in (dict(load_model(run).state_dict()), part(run, "model.")):
        assert all(value.isfinite().all() for value in kept.values())


def test_a_run_that_fails_before_its_first_checkpoint_says_so(photos, before_step, tmp_path, capsys):
    before_step(lambda task, images, epoch, batch_idx: images.fill_(float("nan")))
    result = gmf(capsys, "train", "folder", *options(photos, tmp_path / "run", "--max-skipped-steps", "0"), code=1)
    assert "There is no checkpoint yet: lower optimizer.lr" in result.err


# Bad images


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


RAMP = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (36, 1))


def unusual(folder):
    """Write images of every kind; return what each must be read as (grey without channels) and how far off it may be."""
    colours = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 77)], axis=2)
    rgb = Image.fromarray(colours)
    sixteen = (RAMP.astype(np.uint16) * 257)[:, ::-1].copy()
    Image.fromarray(sixteen).save(folder / "sixteen.png")
    Image.fromarray(sixteen).save(folder / "sixteen.tif")
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=100)
    palette = rgb.quantize(16)
    palette.save(folder / "palette.png", transparency=3)
    Image.fromarray(RAMP > 127).save(folder / "bits.png")
    Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(RAMP)]).save(folder / "alpha.png")
    frames = [Image.fromarray(np.full_like(RAMP, grey)) for grey in (90, 200)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    return {
        "sixteen.png": (RAMP[:, ::-1], 0),
        "sixteen.tif": (RAMP[:, ::-1], 0),
        "cmyk.jpg": (colours, 6),
        "palette.png": (np.asarray(palette.convert("RGB")), 0),
        "bits.png": (np.where(RAMP > 127, 255, 0), 0),
        "alpha.png": (RAMP, 0),
        "animated.gif": (np.full_like(RAMP, 90), 0),
    }


def bad(folder):
    """Write images that cannot be read; return their names."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(folder / "truncated.jpg")
    whole = (folder / "truncated.jpg").read_bytes()
    contents = {"truncated.jpg": whole[: len(whole) // 2], "empty.png": b"", "text.jpg": b"<html>not found</html>"}
    for name, content in {**contents, "bomb.png": png_header(30_000, 30_000)}.items():
        (folder / name).write_bytes(content)
    return {str(folder / name) for name in (*contents, "bomb.png")}


def test_unusual_images_are_read_as_they_look(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "data")
    expected = unusual(tmp_path / "data" / "train" / "one")
    images = open_images(str(tmp_path / "data")).train(eval_transform(CONFIG), 0)
    found = {Path(images.name(i)).name: images.read(i)[0] for i in range(len(images))}
    for name, (values, tolerance) in expected.items():
        values = np.broadcast_to(values[..., None] if values.ndim == 2 else values, (36, 40, 3)).astype(int)
        assert found[name].mode == "RGB"
        assert np.abs(np.asarray(found[name]).astype(int) - values).max() <= tolerance, name


def test_a_bad_image_always_fails_with_the_same_words(tmp_path):
    bad(tmp_path)
    for path in tmp_path.iterdir():
        for file in (lambda: path, path.read_bytes):  # noqa: B023
            words = set()
            kept = []
            for _ in range(3):
                kept.append(file())
                with pytest.raises(ValueError, match=path.name) as raised:
                    decode(kept[-1], path.name)
                words.add(str(raised.value))
            assert len(words) == 1


@pytest.fixture(scope="session")
def messy(photos, tmp_path_factory):
    """`photos` with 7 unusual and 4 bad images for training (35 in all) and 4 bad ones for validation (20 in all)."""
    root = tmp_path_factory.mktemp("messy") / "data"
    shutil.copytree(photos, root)
    unusual(root / "train" / "one")
    return root, bad(root / "train" / "zero"), bad(root / "val" / "one")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_replaced_counted_and_named(messy, tmp_path, capsys, workers):
    data, names, _ = messy
    more = ["--batch_size", "5", "--epochs", "2", "--max-unreadable", "0.12", "--workers", workers]  # 4 of 35
    run = fit(data, tmp_path / "run", *more)
    assert "4 images unreadable" in capsys.readouterr().err
    rows = read_metrics(run)
    assert [row["unreadable"] for row in rows] == [4, 4]  # every epoch meets them all: 7 batches of 5
    lines = (run / "unreadable.txt").read_text().splitlines()
    assert {line.split(": not a readable image")[0] for line in lines} == names
    assert len(lines) == 4
    assert [row["val_images"] for row in rows] == [16, 16]
    assert rows[-1]["val_top1"] == pytest.approx(round(rows[-1]["val_top1"] * 16) / 16)


def test_bad_images_in_validation_do_not_count(messy, photos, tmp_path):
    rows = []
    for data in (messy[0], photos):
        images = ImageData(open_images(str(photos)).train_source, open_images(str(data)).held_out_source, ["one", "zero"])
        task = ClassificationModule(Recipe("", model="test_resnet", image_size=32, batch_size=8), images)
        batches = list(eval_loader(task.loaders.held_out, 8))
        task.eval()
        task.log = lambda *args, **kwargs: None
        with torch.no_grad():
            for i, batch in enumerate(batches):
                task.validation_step(batch, i)
        rows.append([float(metric.compute()) for metric in (task.val_images, task.val_loss, task.top1)])
        torch.manual_seed(0)
    assert rows[0] == pytest.approx(rows[1])
    assert rows[0][0] == 16


def test_the_replacement_is_the_next_image_that_can_be_read(messy):
    images = open_images(str(messy[0])).train(eval_transform({**CONFIG, "crop_pct": 1.0}), 0)
    names = [images.name(i) for i in range(len(images))]
    for index in (names.index(name) for name in messy[1]):
        following = next(i % len(names) for i in range(index, 99) if names[i % len(names)] not in messy[1])
        image, label, problem = images[0, index]
        assert torch.equal(image, images[0, following][0])
        assert label == images[0, following][1]
        assert problem.startswith(names[index])


@pytest.mark.parametrize("workers", [0, 1])
def test_more_bad_images_than_the_limit_end_the_run(messy, tmp_path, capsys, workers):
    argv = ["train", "folder", *options(messy[0], tmp_path / "run", "--batch_size", "5", "--workers", workers)]
    line = gmf(capsys, *argv, code=1).err.strip().splitlines()[-1]
    assert line.startswith("gmf: error: ")
    assert "of 35 training images cannot be read, more than max_unreadable (0.10%) allows" in line
    assert any(name in line for name in messy[1])
    assert not (tmp_path / "run" / "checkpoints").exists()


# Recipes, optimisers and schedules


def cosine(share):
    return (1 + math.cos(math.pi * share)) / 2


PUBLISHED = {
    "data": "imagenet",
    "image_size": 224,
    "crop_pct": 0.875,  # resized to 256, cropped to 224
    "epochs": 300,
    "batch_size": 64,
    "grad_accum_steps": 1,
    "devices": 8,
    "ema": None,
    "optimizer.name": "adamw",
    "optimizer.lr": 5e-4,
    "optimizer.lr_batch": 512,
    "optimizer.weight_decay": 0.05,
    "optimizer.layer_decay": None,
    "optimizer.clip_grad": 5.0,
    "schedule.name": "cosine",
    "schedule.warmup_epochs": 20,
    "schedule.warmup_lr": 5e-7,
    "schedule.min_lr": 5e-6,
    "augmentation.scale": (0.08, 1.0),
    "augmentation.ratio": pytest.approx((3 / 4, 4 / 3)),
    "augmentation.hflip": 0.5,
    "augmentation.color_jitter": 0.4,
    "augmentation.auto_augment": "rand-m9-mstd0.5-inc1",
    "augmentation.random_erasing": 0.25,
    "augmentation.mixup": 0.8,
    "augmentation.cutmix": 1.0,
    "augmentation.label_smoothing": 0.1,
}


@pytest.mark.parametrize(
    ("variant", "drop_path"), [("mobile", 0.1), ("tiny", 0.1), ("small", 0.2), ("base", 0.5), ("large", 0.1)]
)
def test_the_recipe_is_the_published_one(variant, drop_path):
    recipe = read_recipe(f"imagenet_{variant}")
    found = {name: functools.reduce(getattr, name.split("."), recipe) for name in PUBLISHED}
    assert found == PUBLISHED
    assert recipe.model == f"groupmixformer_{variant}"
    assert recipe.drop_path_rate == drop_path
    assert recipe.precision == "bf16"


def test_the_published_recipe_makes_what_it_says():
    source = [(Image.new("RGB", (300, 260)), 0)] * 1024
    images = ImageData(source, source[:1], ["a", "b"])
    task = ClassificationModule(read_recipe("imagenet_mobile"), images, world_size=8)
    assert task.total_batch == 512
    (optimizer,), (schedule,) = task.configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.05) for p in group["params"])
        assert group["weight_decay"] in (0, 0.05)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in task.model.parameters()
    )
    rising = {step: 5e-7 + (5e-4 - 5e-7) * step / 40 for step in (0, 1, 20, 39)}  # 2 steps an epoch
    falling = {step: 5e-6 + (5e-4 - 5e-6) * cosine(step / 600) for step in (40, 41, 301, 599, 600)}
    for step, rate in {**rising, **falling}.items():
        schedule["scheduler"].step_update(step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate] * len(optimizer.param_groups))
    assert (task.mixup.mix_prob, task.mixup.switch_prob, task.mixup.label_smoothing) == (1.0, 0.5, 0.1)
    assert (task.mixup.mixup_alpha, task.mixup.cutmix_alpha) == (0.8, 1.0)
    assert task.config == {
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    of_colours, _, _ = task.loaders.train.transform.args
    erasing = of_colours.transforms[-1]
    assert (type(erasing).__name__, erasing.probability, erasing.mode) == ("RandomErasing", 0.25, "pixel")
    test = "\n".join(str(step) for step in task.loaders.held_out.transform.transforms)
    assert "Resize(size=256, interpolation=bicubic" in test
    assert "CenterCrop(size=(224, 224))" in test


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("cosine", {}, [0.1 + 0.9 * cosine(e / 4) for e in (1, 2, 3, 4)]),
        ("cosine", {"warmup_epochs": 2, "warmup_lr": 0.002}, [0.6, 0.55, 0.1 + 0.9 * cosine(3 / 4), 0.1]),
        ("cosine", {"warmup_epochs": 1.5}, [2 / 3, 0.55, 0.1 + 0.9 * cosine(3 / 4), 0.1]),
        ("poly", {"decay_rate": 2}, [0.1 + 0.9 * (1 - e / 4) ** 2 for e in (1, 2, 3, 4)]),
        ("multistep", {"milestones": [2, 3], "decay_rate": 0.5}, [1, 0.5, 0.25, 0.25]),
        ("constant", {}, [1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_follows_the_schedule(photos, tmp_path, name, more, expected):
    schedule = {"name": name, "warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 0.001, **more}
    words = [word for key, value in schedule.items() for word in (f"--schedule.{key}", value)]
    run = fit(photos, tmp_path / "run", "--epochs", "4", "--optimizer.lr", "0.01", *words)
    assert [row["lr"] * 100 for row in read_metrics(run)] == pytest.approx(expected, abs=1e-9)
    assert [row["step"] for row in read_metrics(run)] == [3, 6, 9, 12]


SGD = [
    *("--batch_size", "24", "--optimizer.name", "sgd", "--optimizer.weight_decay", "0"),
    *("--schedule.name", "constant", "--schedule.warmup_epochs", "0"),
]


@pytest.mark.parametrize("name", ["adamw", "muon", "lamb", "lion", "sgd"])
def test_every_optimiser_trains(photos, tmp_path, name):
    torch.manual_seed(0)
    run = fit(photos, tmp_path / "run", "--epochs", "3", "--optimizer.name", name, "--optimizer.lr", "0.003")
    fresh = fit(photos, tmp_path / "fresh", *FROZEN, "--model", "test_resnet", "--optimizer.weight_decay", "0")
    trained, start = part(run, "model."), part(fresh, "model.")
    assert all(value.isfinite().all() for value in trained.values())
    weights = [n for n, _ in timm.create_model("test_resnet", num_classes=2).named_parameters()]
    assert all(not torch.equal(trained[n], start[n]) for n in weights)
    losses = [row["loss"] for row in read_metrics(run)]
    assert losses[-1] < losses[0]


def test_gradients_are_clipped(photos, tmp_path):
    fresh, clipped, free = (
        part(fit(photos, tmp_path / word, *SGD, *more), "model.")
        for word, more in {
            "fresh": ["--optimizer.lr", "0"],
            "clipped": ["--optimizer.lr", "1", "--optimizer.clip_grad", "0.001"],
            "free": ["--optimizer.lr", "1", "--optimizer.clip_grad", "null"],
        }.items()
    )
    weights = [name for name, _ in timm.create_model("test_resnet", num_classes=2).named_parameters()]
    moved = [math.sqrt(sum(float((end[n] - fresh[n]).square().sum()) for n in weights)) for end in (clipped, free)]
    assert moved[0] == pytest.approx(0.001 * 1.9, rel=1e-2)  # one step of Nesterov's momentum of 0.9
    assert moved[1] > 10 * moved[0]


@pytest.mark.parametrize("variant", ["test_resnet", "groupmixformer_mobile"])
def test_layer_decay_slows_the_first_layers(photos, variant):
    recipe = Recipe(str(photos), model=variant, batch_size=8, image_size=32)
    recipe.optimizer.layer_decay, recipe.optimizer.lr = 0.5, 1.0
    recipe.schedule.warmup_epochs = 0
    task = ClassificationModule(recipe, open_images(str(photos)))
    (optimizer,), (schedule,) = task.configure_optimizers()
    schedule["scheduler"].step_update(0)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    ordered = [rates[p] for p in task.model.parameters()]
    assert rates[task.model.get_classifier().weight] == max(ordered) == 1
    assert ordered[0] == min(ordered) <= 0.5**4
    assert len(set(ordered)) >= 5


@pytest.mark.parametrize(
    ("more", "total", "rate"),
    [
        (["--optimizer.lr_batch", "64"], "total batch 8 = 8 images x 1 processes x 1 accumulated", 0.1 * 8 / 64),
        (
            ["--optimizer.lr_batch", "64", "--batch_size", "4", "--grad-accum-steps", "3"],
            "total batch 12 = 4 images x 1 processes x 3 accumulated",
            0.1 * 12 / 64,
        ),
        ([], "total batch 8", 0.1),
    ],
)
def test_the_learning_rate_grows_with_the_total_batch(photos, tmp_path, capsys, more, total, rate):
    constant = ["--optimizer.lr", "0.1", "--schedule.name", "constant", "--schedule.warmup_epochs", "0"]
    run = fit(photos, tmp_path / "run", *constant, *more)
    assert read_metrics(run)[0]["lr"] == pytest.approx(rate)
    words = capsys.readouterr().err
    assert total in words
    assert f"peak learning rate {rate:g}" in words
    assert "not synchronised" not in words  # as several processes have to be told


def test_all_rates_of_the_schedule_grow_with_the_total_batch(photos, tmp_path):
    rates = {"optimizer.lr": 0.4, "schedule.warmup_lr": 0.08, "schedule.min_lr": 0.04, "schedule.warmup_epochs": 1}
    more = [word for name, value in rates.items() for word in (f"--{name}", value)]
    run = fit(photos, tmp_path / "run", *more, "--optimizer.lr_batch", "32", "--epochs", "2", "--log_steps", "1")
    falling = [0.01 + 0.09 * cosine(step / 6) for step in (3, 4, 5)]
    assert scalars(run, "lr-AdamW/pg2") == pytest.approx([0.02, 0.02 + 0.08 / 3, 0.02 + 0.16 / 3, *falling])
    assert read_metrics(run)[-1]["lr"] == pytest.approx(0.01)


# Averaged weights, precision and memory


def test_the_averaged_weights_are_validated_and_kept(photos, tmp_path):
    run = fit(photos, tmp_path / "run", "--ema", "0.8", "--optimizer.lr", "0.01")
    kept = load_model(run)
    average, weights = part(run, "average.module."), part(run, "model.")
    assert equal(dict(kept.state_dict()), average)
    assert not equal(average, weights)
    measured = []
    for state in (average, weights):
        kept.load_state_dict(state)
        config = {**CONFIG, **{k: kept.pretrained_cfg[k] for k in CONFIG}, "crop_pct": 1.0}
        measured.append(
            evaluate_classifier(kept, eval_loader(open_images(str(photos)).held_out(eval_transform(config)))).metrics["loss"]
        )
    assert read_metrics(run)[0]["val_loss"] == pytest.approx(measured[0], rel=1e-5)
    assert read_metrics(run)[0]["val_loss"] != pytest.approx(measured[1], rel=1e-3)


PLAIN = ["--model", "mobile", "--epochs", "2", "--log_steps", "1", "--drop_path_rate", "0.1"]


@pytest.fixture(scope="session")
def plain(photos, tmp_path_factory):
    """A run of GroupMixFormer without any of the options below."""
    return fit(photos, tmp_path_factory.mktemp("plain") / "run", *PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        (["--grad_checkpointing", "true"], 1e-6),
        (["--deterministic", "true"], 0),
        pytest.param(["--strategy", "fsdp"], 1e-6, marks=pytest.mark.exhaustive),  # of one process
        pytest.param(["--precision", "bf16"], 0.05, marks=pytest.mark.exhaustive),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_losses_are_the_same_with(photos, plain, before_step, tmp_path, more, tolerance):
    settings = set()

    def look(task, images, epoch, batch_idx):
        checkpointing = any(getattr(module, "grad_checkpointing", False) for module in task.model.modules())
        settings.add((checkpointing, torch.are_deterministic_algorithms_enabled()))

    before_step(look)
    environment = dict(os.environ)
    try:
        run = fit(photos, tmp_path / "run", *PLAIN, *more)
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.clear()  # to which Lightning adds its address
        os.environ.update(environment)
    assert settings == {tuple(option in more for option in ("--grad_checkpointing", "--deterministic"))}
    losses, expected = scalars(run, "loss"), scalars(plain, "loss")
    assert len(losses) == 6
    assert losses == pytest.approx(expected, rel=tolerance, abs=tolerance)
    if tolerance == 0:
        assert differences(plain, run) == []
    if "bf16" in more:
        assert losses != expected
        assert {value.dtype for value in part(run, "model.").values() if value.is_floating_point()} == {torch.float32}
    assert load_checkpoint(run).num_classes == 2


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_compiled_model_has_the_same_losses(photos, before_step, tmp_path):  # a small one: `mobile` compiles for minutes
    compiled = []
    before_step(lambda task, images, epoch, batch_idx: compiled.append("forward" in vars(task.model)))
    runs = [fit(photos, tmp_path / word, "--compile", word, "--log_steps", "1", "--ema", "0.9") for word in ("false", "true")]
    assert compiled == [False] * STEPS + [True] * STEPS
    losses, expected = (scalars(run, "loss") for run in reversed(runs))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert part(runs[0], "").keys() == part(runs[1], "").keys()
    load_model(runs[1])


@pytest.mark.parametrize("channels_last", [True, False])
def test_other_models_train_in_either_layout(photos, before_step, tmp_path, channels_last):
    layouts = set()

    def look(task, images, epoch, batch_idx):
        weight = task.model.layer1[0].conv2.weight
        layouts.add(weight.is_contiguous(memory_format=torch.channels_last))

    before_step(look)
    run = fit(photos, tmp_path / "run", "--channels_last", str(channels_last).lower())
    assert layouts == {channels_last}
    weights = load_file(run / "model.safetensors")
    assert equal(weights, part(run, "model."))
    assert equal(weights, dict(timm.create_model(f"local-dir:{run}", pretrained=True).state_dict()))


# Classes, sizes and checkpoints to start from


def test_a_model_of_fixed_size_trains_and_is_used_at_another(photos, tmp_path, capsys):
    run = tmp_path / "run"
    result = json.loads(gmf(capsys, "train", "folder", *options(photos, run, "--model", "test_vit"), "--json").out)
    measured = json.loads(gmf(capsys, "eval", run, "--json").out)
    assert measured["top1"] == result["top1"] == read_metrics(run)[0]["val_top1"]
    assert measured["input_size"] == [3, 32, 32]
    image = next((photos / "val" / "one").iterdir())
    assert len(json.loads(gmf(capsys, "predict", run, image, "--json").out)["images"]) == 1
    resumed = fit(photos, tmp_path / "tuned", "--checkpoint", run, *FROZEN, "--optimizer.weight_decay", "0")
    assert equal(dict(load_model(resumed).state_dict()), dict(load_model(run).state_dict()))


@pytest.fixture(scope="session")
def numbered(write_digits, tmp_path_factory):
    """Classes whose folders have numbers for names: in timm's order 2 comes before 10."""
    return write_digits(tmp_path_factory.mktemp("numbered"), ["10", "2", "1"], train=8, val=4)


def test_numbered_classes_keep_their_names(numbered, tmp_path, capsys):
    images = open_images(str(numbered))
    for photos in (images.train(eval_transform(CONFIG), 0), images.held_out(eval_transform(CONFIG))):
        for i in range(len(photos)):
            assert images.class_names[photos.read(i)[1]] == Path(photos.name(i)).parent.name
    run = fit(numbered, tmp_path / "run", "--epochs", "8", "--optimizer.lr", "0.01", "--augmentation.scale", "[0.8,1.0]")
    assert load_model(run).pretrained_cfg["label_names"] == images.class_names
    result = json.loads(gmf(capsys, "eval", run, "--per-class", "--json").out)
    predicted = json.loads(gmf(capsys, "predict", run, numbered / "val", "--json").out)["images"]
    right = [row["classes"][0]["class"] == row["image"].split("/")[-2] for row in predicted]
    assert sum(right) / 12 == pytest.approx(result["top1"])
    assert result["top1"] > 0.6


@pytest.fixture(scope="session")
def resnet(photos, tmp_path_factory):
    return fit(photos, tmp_path_factory.mktemp("resnet") / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "names", "kept"),
    [
        ("resnet", ["zero", "one"], True),
        ("resnet", ["zero", "uno"], False),
        ("resnet", ["zero", "one", "two"], False),
        pytest.param("plain", ["zero", "one"], True, marks=pytest.mark.slow),
        ("plain", ["zero", "uno"], False),
    ],
    ids=str,
)
def test_finetuning_keeps_the_classifier_of_the_same_classes(write_digits, tmp_path, request, start, names, kept):
    first = request.getfixturevalue(start)
    data = write_digits(tmp_path / "data", names, train=8, val=2)
    run = fit(data, tmp_path / "run", *FROZEN[2:], "--optimizer.weight_decay", "0", "--checkpoint", first)
    before, after = dict(load_model(first).named_parameters()), load_model(run)
    classifier = {n for n, p in after.named_parameters() if any(p is q for q in after.get_classifier().parameters())}
    assert len(classifier) == 2
    differing = {n for n, p in after.named_parameters() if not torch.equal(p, before[n])}
    assert differing == (set() if kept else classifier)
    assert after.num_classes == len(names)
