"""Why is one backbone ahead of another in a detector? The same short training with one thing changed at a time.

    python benchmarks/detector_backbones.py --data ../shared/data/bccd --start 'runs/start-{model}'

RetinaNet on BCCD's blood cells by the recipe bccd at 160 px for 4 epochs, on one thread, from random weights, and from --start,
in which {model} stands for mobile or pvt_v2_b0. COCO's box AP and AP50 of each epoch; and the AP of the last one with
BatchNorm's statistics taken over all training images once more. Given again, it continues with what is not in its JSON file.
"""

import argparse
import json
import math
import re
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path

import torch
from timm.models import create_model, register_model
from torch import nn

import groupmixformer  # noqa: F401 - registers the variants
from groupmixformer.run_folder import read_metrics
from groupmixformer.tasks.backbone import Features
from groupmixformer.tasks.detection.data import CocoImages, to_tensor
from groupmixformer.tasks.detection.predict import DetectionPredictor
from groupmixformer.tasks.registry import build_task
from groupmixformer.training.recipe import read_recipe
from groupmixformer.training.trainer import train

__all__: list[str] = []  # timm adds the models


@register_model
def groupmixformer_mobile_group_norm(pretrained=False, **options):
    """`mobile` with GroupNorm in the place of each BatchNorm."""
    features = create_model("groupmixformer_mobile", **options)
    for module in list(features.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(math.gcd(8, norm.num_features), norm.num_features))
    return features


@contextmanager
def normalised_maps():
    """Let BatchNorm bring each channel of the backbone's maps to one scale before the pyramid."""
    made, maps = Features.__init__, Features.maps

    def make(self, *args, **options):
        made(self, *args, **options)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in self.body.feature_info.channels())

    Features.__init__ = make
    Features.maps = lambda self, images: [norm(one) for norm, one in zip(self.norms, maps(self, images), strict=True)]
    try:
        yield
    finally:
        Features.__init__, Features.maps = made, maps


VARIANTS = {
    "mobile": [],
    "pvt_v2_b0": ["--model=pvt_v2_b0"],
    "mobile, rate 1e-3": ["--optimizer.lr=1e-3"],
    "pvt_v2_b0, rate 1e-3": ["--model=pvt_v2_b0", "--optimizer.lr=1e-3"],
    "mobile, GroupNorm": ["--model=groupmixformer_mobile_group_norm"],
    "mobile from its start": ["--checkpoint={start}"],
    "pvt_v2_b0 from its start": ["--model=pvt_v2_b0", "--checkpoint={start}"],
    "mobile from its start, maps normalised": ["--checkpoint={start}"],
}


def measure(options, name, seed):
    begun = time.process_time()
    start = str(options.start).replace("{model}", re.split("[ ,]", name)[0])
    more = [word.format(start=start) for word in VARIANTS[name]]
    fields = ["--image-size=160", "--detector.max-size=320", "--epochs=4", "--workers=0", "--threads=1", "--device=cpu"]
    with tempfile.TemporaryDirectory() as folder, normalised_maps() if "normalised" in name else nullcontext():
        fields += [f"--data={options.data}", f"--seed={seed}", "--loggers=[]", f"--out={folder}/run", *more]
        run = train(read_recipe("bccd", fields), build_task)
        rows = read_metrics(run)
        found = {"AP": [row["val_box_AP"] for row in rows], "AP50": [row["val_box_AP50"] for row in rows]}
        found |= {"loss": [row["loss"] for row in rows], "options": [*fields[:6], *more]}
        found["AP_statistics_again"] = with_statistics(options.data, run)
    return found | {"seconds": time.process_time() - begun}


@torch.no_grad()
def with_statistics(data, run):
    """Measure a run with BatchNorm's statistics over all training images, as they are in evaluation; none without BatchNorm."""
    predictor, images = DetectionPredictor(run, torch.device("cpu")), CocoImages(data, "train", False)
    network = predictor.model.network
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return None
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for i in range(0, len(images), 2):
        batch, _ = network.transform([to_tensor(images.read(j)[0]) for j in range(i, min(i + 2, len(images)))])
        network.backbone(batch.tensors)
    network.eval()
    return predictor.evaluate(predictor.open_data(data)).result["box_AP"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--start", help="checkpoint, for the variants that begin from one")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", default="detector-backbones.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(options.json)
    result = json.loads(path.read_text()) if path.exists() else {}
    result |= {"date": str(date.today()), "torch": torch.__version__}
    for seed in options.seeds:
        for name in options.variants:
            runs = result.setdefault("runs", {}).setdefault(name, {})
            if str(seed) not in runs:
                runs[str(seed)] = measure(options, name, seed)
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{name}, seed {seed}: {runs[str(seed)]}", file=sys.stderr, flush=True)
    print("| | box AP | AP50 | BatchNorm's statistics again |\n|---|---|---|---|")
    for name, runs in result["runs"].items():
        columns = [
            [100 * run["AP"][-1] for run in runs.values()],
            [100 * run["AP50"][-1] for run in runs.values()],
            [100 * run["AP_statistics_again"] for run in runs.values() if run.get("AP_statistics_again") is not None],
        ]
        print(f"| {name} | {' | '.join(', '.join(f'{value:.1f}' for value in column) for column in columns)} |")


if __name__ == "__main__":
    main()
