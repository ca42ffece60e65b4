"""Fine-tuning with few labels from a checkpoint that was pre-trained without any, beside random weights, in equal steps.

    python benchmarks/pretraining.py --data ../shared/data/imagenette160 --methods simmim dino --out runs/pretraining

Pre-training on all images of train/, whose folders it does not know; then, for each length and seed, the recipe finetune on
--labels images of each class, others for each seed, from these checkpoints and from random weights, everything else equal.
Top-1 of the last epoch on val/. Given again, it continues: finished runs are read, begun ones resumed.
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from groupmixformer.cli.main import main
from groupmixformer.run_folder import REPORT, read_metrics

NETWORK = "{embed_dims: [20, 40, 80, 80], depths: [1, 1, 2, 1], mlp_ratios: [4, 4, 4, 4]}"
COMMON = ["--image-size", "64", "--workers", "0", "--threads", "1", "--device", "cpu", "--loggers", "[]"]
EPOCHS = {"simmim": 16, "dino": 10}  # of pre-training


def few_labels(data, folder, labels, seed):
    """Link to some images of each class of train/, and to val/."""
    if not (folder / "val").exists():
        for cls in sorted(path for path in (data / "train").iterdir() if path.is_dir()):
            (folder / "train" / cls.name).mkdir(parents=True, exist_ok=True)
            paths = sorted(cls.iterdir())
            for i in np.random.default_rng(seed).permutation(len(paths))[:labels]:
                link = folder / "train" / cls.name / paths[i].name
                if not link.is_symlink():
                    link.symlink_to(paths[i].resolve())
        (folder / "val").symlink_to((data / "val").resolve())
    return folder


def train(words, out):
    """Train a run unless it is there; return its command, the processor time, and losses and accuracies by epoch."""
    command, spent = ["train", *words, "--out", str(out)], out / "cpu_seconds.txt"  # those of earlier calls included
    if not (out / REPORT).is_file():
        before, begun = float(spent.read_text()) if spent.exists() else 0.0, time.process_time()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                code = main([*command, "--auto-resume"])
        finally:
            spent.write_text(f"{before + time.process_time() - begun:.1f}")
        if code:
            sys.exit(code)
    metrics = [{name: v for name, v in row.items() if name == "loss" or name.startswith("val_")} for row in read_metrics(out)]
    return {"command": shlex.join(["gmf", *command]), "cpu_seconds": float(spent.read_text()), "metrics": metrics}


def run(options):
    place, rows, begun = Path(options.out), [], {}
    starts = {"random": ["--checkpoint", "null", "--model-options", NETWORK]}
    for method in options.methods:
        words = ["pretrain", "--data", options.data, *COMMON, "--batch-size", "32", "--epochs", str(EPOCHS[method])]
        words += ["--pretrain.method", method, "--pretrain.mask-patch", "16", "--pretrain.local-crops", "0"]
        words += ["--pretrain.outputs", "1024", "--pretrain.momentum", "0.99", "--schedule.warmup-epochs", "1"]
        begun[method] = train([*words, "--model-options", NETWORK, "--seed", "0"], place / f"{method}-0")
        starts[method] = ["--checkpoint", str(place / f"{method}-0")]
    for epochs, seed, name in itertools.product(options.epochs, options.seeds, starts):
        few = few_labels(Path(options.data), place / f"labels-{options.labels}-{seed}", options.labels, seed)
        words = ["finetune", *starts[name], "--patience", "null", "--batch-size", "20", "--seed", str(seed), "--data", str(few)]
        found = train([*words, *COMMON, "--epochs", str(epochs)], place / f"{name}-{options.labels}-{seed}-{epochs}")
        rows.append({"start": name, "epochs": epochs, "seed": seed, "top1": found["metrics"][-1]["val_top1"], **found})
        print(*(rows[-1][key] for key in ("start", "epochs", "seed", "top1")), file=sys.stderr, flush=True)
        about = {"date": str(date.today()), "torch": torch.__version__, "labels": options.labels}
        Path(options.json).write_text(json.dumps(about | {"pretraining": begun, "runs": rows}, indent=1) + "\n")
    for epochs, name in itertools.product(options.epochs, starts):
        found = [100 * row["top1"] for row in rows if (row["start"], row["epochs"]) == (name, epochs)]
        print(f"{epochs:3} epochs from {name:7} {np.mean(found):.1f} % ({', '.join(f'{one:.1f}' for one in found)})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--methods", choices=tuple(EPOCHS), nargs="+", default=list(EPOCHS))
    parser.add_argument("--labels", type=int, default=20, help="of each class")
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 20], help="of fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/pretraining")
    parser.add_argument("--json", default="pretraining.json")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    run(parser.parse_args())
