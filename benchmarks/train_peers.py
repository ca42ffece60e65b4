r"""Trains GroupMixFormer-mobile beside timm models of like size, each by the same recipe and budget, one after another.

    python benchmarks/train_peers.py imagenette --data ../shared/data/imagenette160 --out /tmp/peers
    python benchmarks/train_peers.py digits --out /tmp/peers
    python benchmarks/train_peers.py bccd --data ../shared/data/bccd --out /tmp/peers \
        --models groupmixformer_mobile pvt_v2_b0 --checkpoint '/tmp/peers/imagenette-{model}'

Every run is `gmf train RECIPE --model NAME`, with the further options given to this script, in which {model} stands for the
model's name. A run that is done is not done again, one that was cut off is resumed. Each row of the result holds the command,
the commit, the machine, the date, the accuracy (top-1, mask or box AP, mIoU) of the last and of the best epoch, CPU seconds
and the log of the epochs (metrics.csv).
"""

import argparse
import csv
import datetime
import json
import math
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import safetensors
import torch

MODELS = ["groupmixformer_mobile", "coat_lite_tiny", "pvt_v2_b0", "convnext_femto", "deit_tiny_patch16_224"]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def machine():
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {os.environ['OMP_NUM_THREADS']} thread"


def train(recipe, model, out, options):
    run = out / f"{recipe}-{model}"
    command = ["gmf", "train", recipe, "--model", model, *(option.replace("{model}", model) for option in options)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    argv = [sys.executable, "-m", "groupmixformer.cli.main", *command[1:], "--out", str(run), "--auto-resume", "--json"]
    result = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (run / "metrics.csv").open(newline="") as file:
        epochs = list(csv.DictReader(file))
    metric = next(name for name in ("val_top1", "val_mask_AP", "val_box_AP", "val_mIoU") if name in epochs[0])
    with safetensors.safe_open(run / "model.safetensors", "pt") as file:
        sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dictionary
    commit = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return {
        "model": model,
        "command": " ".join(command),
        "parameters": sum(math.prod(size) for name, size in sizes.items() if not name.endswith(BUFFERS)),
        "commit": subprocess.run(commit, check=True, capture_output=True, text=True).stdout.strip(),
        "machine": machine(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "metric": metric,
        "last_epoch": float(epochs[-1][metric]),
        "best_epoch": max(float(epoch[metric]) for epoch in epochs),
        "images": result["images"],
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
        "epochs": epochs,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--data", help="folder; the recipe's own data by default")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of peers-RECIPE.json")
    args, options = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # so that runs side by side do not slow each other down
    options = [*(["--data", args.data] if args.data else []), *options]
    path = args.out / f"peers-{args.recipe}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        if model in [row["model"] for row in rows]:
            continue
        rows.append(train(args.recipe, model, args.out, options))
        path.write_text(json.dumps(rows, indent=2))
        row = rows[-1]
        print(
            f"{model:26}{row['parameters'] / 1e6:6.2f} M  last {row['last_epoch']:.2%}  best {row['best_epoch']:.2%}"
            f"  {row['cpu_seconds']} CPU s",
            flush=True,
        )


if __name__ == "__main__":
    main()
