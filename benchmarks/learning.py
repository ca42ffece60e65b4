"""What practitioners gain with a backbone: each table of docs/results.md by one command, over seeds.

    python benchmarks/learning.py pretraining --data ../shared/data/imagenette160
    python benchmarks/learning.py teacher --data ../shared/data/imagenette160 --start runs/cifar10
    python benchmarks/learning.py adapters --data ../shared/data/imagenette160 --start runs/cifar10
    python benchmarks/learning.py widths --data ../shared/data/imagenette160

pretraining  Fine-tuning with few labels in equal steps, from random weights and from checkpoints that were pre-trained
             without labels on all images of train/; each seed has a pre-training and labels of its own.
teacher      `mobile` from random weights, with and without a teacher: `mobile` fine-tuned from --start for longer.
adapters     Fine-tuning --start with few labels, the whole of it and by adapters, at two learning rates.
widths       A network trained with nested widths of its MLPs, cut to each, beside networks trained at that width alone.

Top-1 on val/ of the last epoch (widths: of the best, which is what a run keeps). Given again, it continues: finished runs
are read, begun ones resumed.
"""

import argparse
import contextlib
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

COMMON = ["--image-size", "64", "--workers", "0", "--threads", "1", "--device", "cpu", "--loggers", "[]", "--patience", "null"]
SMALL = "{embed_dims: [20, 40, 80, 80], depths: [1, 1, 2, 1], mlp_ratios: [4, 4, 4, 4]}"
METHODS = {"simmim": 16, "dino": 10}  # and epochs of pre-training
LENGTHS = (5, 20)  # epochs of fine-tuning
RATES = ("1e-3", "5e-3")  # for adapters
WIDTHS = (0.25, 0.5, 1)


class Runs:
    """Trained or read again from a folder; the rows of a result, which is written after each."""

    def __init__(self, options):
        self.options, self.rows = options, []
        self.place = Path(options.out or f"runs/{options.what}")

    def train(self, name, recipe, *words, seed=0):
        """Train a run unless it is there; return its command, the processor time, and losses and accuracies by epoch."""
        out = self.place / f"{name}-{seed}"
        command, spent = ["train", recipe, *COMMON, *words, "--seed", str(seed), "--out", str(out)], out / "cpu_seconds.txt"
        if not (out / REPORT).is_file():
            before, begun = float(spent.read_text()) if spent.exists() else 0.0, time.process_time()
            try:
                _call([*command, "--auto-resume"])
            finally:
                if out.exists():
                    spent.write_text(f"{before + time.process_time() - begun:.1f}")  # that of earlier calls included
        metrics = [{key: v for key, v in row.items() if key == "loss" or key.startswith("val_")} for row in read_metrics(out)]
        return out, {"command": shlex.join(["gmf", *command]), "cpu_seconds": float(spent.read_text()), "metrics": metrics}

    def add(self, name, seed, top1, found):
        self.rows.append({"name": name, "seed": seed, "top1": top1, **found})
        print(f"{name}, seed {seed}: {top1:.2%}", file=sys.stderr, flush=True)
        about = {"date": str(date.today()), "torch": torch.__version__, "experiment": self.options.what}
        path = Path(self.options.json or f"{self.options.what}.json")
        path.write_text(json.dumps(about | {"runs": self.rows}, indent=1) + "\n")

    def measure(self, name, recipe, *words, seed):
        _, found = self.train(name.replace(" ", "-"), recipe, *words, seed=seed)
        self.add(name, seed, found["metrics"][-1]["val_top1"], found)

    def few_labels(self, labels, seed):
        """Link to some images of each class of train/, and to val/."""
        data, folder = Path(self.options.data), self.place / f"labels-{labels}-{seed}"
        if not (folder / "val").exists():
            for cls in sorted(path for path in (data / "train").iterdir() if path.is_dir()):
                (folder / "train" / cls.name).mkdir(parents=True, exist_ok=True)
                paths = sorted(cls.iterdir())
                for i in np.random.default_rng(seed).permutation(len(paths))[:labels]:
                    link = folder / "train" / cls.name / paths[i].name
                    if not link.is_symlink():
                        link.symlink_to(paths[i].resolve())
            (folder / "val").symlink_to((data / "val").resolve())
        return str(folder)

    def show(self):
        print("| | top-1, by seed | mean | sd |\n|---|---|---|---|")
        for name in dict.fromkeys(row["name"] for row in self.rows):
            found = [100 * row["top1"] for row in self.rows if row["name"] == name]
            spread = f"{np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
            print(f"| {name} | {', '.join(f'{one:.1f}' for one in found)} % | {np.mean(found):.1f} % | {spread} |")


def _call(command):
    with contextlib.redirect_stdout(sys.stderr):
        code = main(command)
    if code:
        sys.exit(code)


def pretraining(runs, seed):
    small = ["--model-options", SMALL]
    starts = {"random weights": ["--checkpoint", "null", *small]}
    for method, epochs in METHODS.items():
        words = ["--data", runs.options.data, *small, "--batch-size", "32", "--epochs", str(epochs)]
        words += ["--pretrain.method", method, "--pretrain.mask-patch", "16", "--pretrain.local-crops", "0"]
        words += ["--pretrain.outputs", "1024", "--pretrain.momentum", "0.99", "--schedule.warmup-epochs", "1"]
        starts[method] = ["--checkpoint", str(runs.train(method, "pretrain", *words, seed=seed)[0])]
    for epochs in LENGTHS:
        for name, start in starts.items():
            words = [*start, "--data", runs.few_labels(20, seed), "--batch-size", "20", "--epochs", str(epochs)]
            runs.measure(f"{name} {epochs} epochs", "finetune", *words, seed=seed)


def teacher(runs, seed):
    data = ["--data", runs.options.data, "--augmentation.color-jitter", "null"]
    out, found = runs.train("the-teacher", "finetune", *data, "--checkpoint", runs.options.start, "--epochs", "8")
    if seed == 0:
        runs.add("the teacher", 0, found["metrics"][-1]["val_top1"], found)
    for kind in ("none", "logits", "features"):
        words = [] if kind == "none" else ["--distill.teacher", str(out), "--distill.kind", kind]
        runs.measure(kind, "imagenette", *data, "--epochs", "4", *words, seed=seed)


def adapters(runs, seed):
    data = ["--data", runs.few_labels(50, seed), "--batch-size", "20", "--epochs", "6", "--checkpoint", runs.options.start]
    for kind in ("none", "lora", "adaptformer", "linear_probe"):
        for rate in RATES:
            runs.measure(f"{kind} {rate}", "finetune", *data, "--adapter.kind", kind, "--optimizer.lr", rate, seed=seed)


def widths(runs, seed):
    words = ["--data", runs.options.data, "--augmentation.color-jitter", "null", "--epochs", "4", "--model-options"]
    mobile = {"depths": [1, 1, 4, 1]}
    out, found = runs.train("elastic", "imagenette", *words, json.dumps(mobile), "--elastic", json.dumps(WIDTHS), seed=seed)
    cut = out.with_name(f"cut-{seed}")
    if not (cut / "widths.json").exists():
        _call(["extract", str(out), "--out", str(cut), "--json"])
    for row in json.loads((cut / "widths.json").read_text()):
        runs.add(f"cut to {row['width']:g}", seed, row["top1"], found | row)
    for width in WIDTHS:
        options = json.dumps(mobile | {"mlp_ratios": [4 * width] * 4})
        _, found = runs.train(f"alone-{width}", "imagenette", *words, options, seed=seed)
        runs.add(f"alone at {width}", seed, max(row["val_top1"] for row in found["metrics"]), found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    experiments = {run.__name__: run for run in (pretraining, teacher, adapters, widths)}
    parser.add_argument("what", choices=experiments)
    parser.add_argument("--data", required=True)
    parser.add_argument("--start", help="checkpoint to begin from, for teacher and adapters")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", help="folder of the runs, runs/WHAT by default")
    parser.add_argument("--json", help="WHAT.json by default")
    options = parser.parse_args()
    if options.what in ("teacher", "adapters") and not options.start:
        parser.error(f"{options.what} needs --start")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    runs = Runs(options)
    for seed in options.seeds:
        experiments[options.what](runs, seed)
    runs.show()
