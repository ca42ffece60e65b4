"""Kills a training run at random moments, resumes it until it is done, and compares it with a run that nobody disturbed.

    python tests/kill_and_resume.py --kills 30
    python tests/kill_and_resume.py --kills 6 --recipe nuclei --images 32

Prints one JSON object: kills, where the checkpoint stood at each, and what differs in a bit of the best model, last.ckpt
(weights, averaged weights, optimiser, schedule, counts) and metrics.csv but for its times.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from shapes import write_shapes
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import groupmixformer.tasks.classification.report
import groupmixformer.training.trainer  # noqa: F401 - imported once here, so that each start below takes a moment only
from groupmixformer.cli.main import main
from groupmixformer.run_folder import read_metrics

SMALL = [
    "--device",
    "cpu",
    "--model",
    "mobile",
    "--epochs",
    "3",
    "--grad-accum-steps",
    "2",
    "--ema",
    "0.9",
    "--drop_path_rate",
    "0.2",
]
OPTIONS = {
    "folder": [
        *("--image_size", "32", "--crop_pct", "1.0", "--batch_size", "8", "--augmentation.mixup", "0.8"),
        *("--augmentation.auto_augment", "rand-m9-mstd0.5-inc1", "--augmentation.random_erasing", "0.25"),
    ],
    "nuclei": [
        *("--image_size", "64", "--batch_size", "2", "--detector.sizes", "[48,56]", "--detector.max_size", "96"),
        *("--detector.fpn-channels", "16", "--detector.rois-per-image", "16", "--detector.max-detections", "10"),
    ],
    "pretrain": [
        *("--image_size", "64", "--batch_size", "8", "--pretrain.mask_patch", "16", "--pretrain.local_size", "32"),
        *("--pretrain.outputs", "64", "--ema", "null", "--pretrain.method", "dino"),
    ],
}


def make_images(root, train):
    images, labels = load_digits(return_X_y=True)
    for digit in (0, 1):
        for i, pixels in enumerate(images[labels == digit][: train + 20].reshape(-1, 8, 8)):
            folder = root / ("train" if i < train else "val") / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype(np.uint8)).save(folder / f"{i}.png")


def start(recipe, data, out, workers, save_seconds):
    """Train in a child process; return its number."""
    child = os.fork()
    if child:
        return child
    with Path(f"{out}.log").open("a") as log:  # the child's words, and never the parent's stdout
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    argv = ["train", recipe, "--data", str(data), "--out", str(out), "--workers", str(workers), *SMALL, *OPTIONS[recipe]]
    code = main([*argv, "--save_minutes", str(save_seconds / 60), "--auto-resume"])
    os._exit(code)


def leaves(value, path=""):
    """All tensors, numbers and words in a checkpoint, by their place in it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{i}")
    else:
        yield path, value


def state(run):
    """What a run left that must not depend on how often it was stopped: the best model, the last checkpoint, the table."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "DataModule", "counts")
    table = [{name: value for name, value in row.items() if name not in ("seconds", "waiting")} for row in read_metrics(run)]
    model = load_file(run / "model.safetensors")
    return dict(leaves({"best": model, "metrics.csv": table, **{part: checkpoint[part] for part in parts}}))


def differences(run, other):
    """Places where two runs differ in a bit."""
    first, second = state(run), state(other)
    same = {
        name: torch.equal(first[name], second[name]) if isinstance(first[name], torch.Tensor) else first[name] == second[name]
        for name in first.keys() & second.keys()
    }
    return sorted(first.keys() ^ second.keys()) + sorted(name for name in same if not same[name])


def scalars(run, tag):
    """What the TensorBoard log holds, in order."""
    log = EventAccumulator(str(run), size_guidance={"scalars": 0})
    log.Reload()
    return [event.value for event in log.Scalars(tag)]


def kill_and_resume(folder, kills, images=120, workers=1, seed=0, save_seconds=0.5, recipe="folder"):
    """Return what happened: kills, where they hit, and the differences to an undisturbed run."""
    torch.set_num_threads(1)
    if recipe != "nuclei":
        make_images(folder / "data", images)
    else:
        write_shapes(folder / "data", train=images, val=5)
    began = time.monotonic()
    _, status = os.waitpid(start(recipe, folder / "data", folder / "whole", workers, save_seconds=1e9), 0)
    whole = time.monotonic() - began
    assert status == 0, (folder / "whole.log").read_text()
    rng = random.Random(seed)
    hits, runs, different = [], 0, []
    while len(hits) < kills or runs == 0:
        runs += 1
        run = folder / f"killed-{runs}"
        while True:
            child = start(recipe, folder / "data", run, workers, save_seconds)
            deadline = time.monotonic() + rng.uniform(0.3, 0.45) * whole
            done = 0
            while not done and (time.monotonic() < deadline or len(hits) >= kills):
                done, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.01)
            if done:
                assert status == 0, Path(f"{run}.log").read_text()
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            last = run / "checkpoints" / "last.ckpt"
            saved = torch.load(last, weights_only=True) if last.exists() else {}  # readable after every kill
            hits.append([saved["epoch"], saved["DataModule"]["done"]] if saved else [-1, 0])
        different += differences(folder / "whole", run)
    return {
        "kills": len(hits),
        "runs": runs,
        "resumed_inside_an_epoch": sum(batches > 0 for _, batches in hits),
        "checkpoints_epoch_and_batch": hits,
        "compared": len(state(run)),
        "different": different,
        "seconds_of_the_whole_run": round(whole, 1),
        "workers": workers,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--recipe", choices=sorted(OPTIONS), default="folder", help="of which the settings are small")
    parser.add_argument("--images", type=int, default=120, help="of each of two classes, up to 150; in all for nuclei")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = kill_and_resume(Path(place), args.kills, args.images, args.workers, args.seed, recipe=args.recipe)
    print(json.dumps(result))
    sys.exit(bool(result["different"]))
