"""How many images a second one core prepares for training: reading, decoding and the augmentation of the published recipe.

python benchmarks/decode.py [--images ../shared/data/imagenet-sample/images]   # writes benchmarks/results/decode-DATE.json

Processor time, so that waiting for the disk and for other programs does not count; the files are in memory after one pass.
The sample's images have a shorter side of at most 256 pixels, as ImageNet is often kept. `full` are the same ones, enlarged
to their sizes in ImageNet, which the sample's index.csv names, and saved in files of 81 kB on average; ImageNet's have 110 kB.
"""

import argparse
import csv
import datetime
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
from PIL import Image, features

import groupmixformer
from groupmixformer.data.images import decode
from groupmixformer.data.shards import write_shards
from groupmixformer.data.streaming import open_stream
from groupmixformer.tasks.classification.data import FolderImages, ImageSamples, classification_transform
from groupmixformer.training.recipe import Augmentation

# Of the paper's ImageNet training; colour jitter is not used beside RandAugment.
PUBLISHED = Augmentation(scale=(0.08, 1.0), auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, random_erasing=0.25)
CONFIG = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
GPU_SPEEDS = (250, 500, 1000, 2000, 4000)  # images/s


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def enlarged(images: Path, folder: Path) -> list[Path]:
    with (images.parent / "index.csv").open(newline="") as file:
        sizes = {row["file"]: (int(row["orig_width"]), int(row["orig_height"])) for row in csv.DictReader(file)}
    for name, size in sizes.items():
        Image.open(images / name).resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=97)
    return [folder / name for name in sizes]


def stages(files: list[Path], root: Path) -> dict[str, Callable[[], Iterable[Any]]]:
    for index, file in enumerate(files):
        link = root / "folder" / f"class{index % 2}" / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())
    folder = FolderImages(root / "folder")
    transform = classification_transform(PUBLISHED, CONFIG)
    images, samples = ImageSamples(folder, transform), folder.samples
    splits = {"train": samples, "validation": samples[:1]}
    write_shards(root, splits, ["class0", "class1"], root / "shards", 50, 0, 1, lambda done, *_: done)
    stream = open_stream("wds/shards", str(root), "train", transform)
    stream.configure(training=True)
    return {
        "decode": lambda: (decode(file, file.name) for file in files),
        "folder": lambda: (images[0, index] for index in range(len(files))),
        "shards": lambda: stream,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path(__file__).parents[2] / "shared/data/imagenet-sample/images")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    load = Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "unknown"
    with tempfile.TemporaryDirectory() as scratch:
        larger = Path(scratch, "larger")
        larger.mkdir()
        sets = {"256 px": sorted(args.images.iterdir()), "full": enlarged(args.images, larger)}
        for name, files in sets.items():
            measured = stages(files, Path(scratch, name))
            seconds: dict[str, list[float]] = {stage: [] for stage in measured}
            for repeat in range(args.repeats + 1):  # the first warms up
                for stage, make in measured.items():
                    start = time.process_time()
                    count = sum(1 for _ in make())
                    if repeat:
                        seconds[stage].append((time.process_time() - start) / count)
            rows.append(
                {
                    "images": name,
                    "kilobytes": round(statistics.mean(file.stat().st_size for file in files) / 1000, 1),
                    "images_per_second": {stage: round(1 / statistics.median(times), 1) for stage, times in seconds.items()},
                    "spread": {stage: [round(1 / f(times), 1) for f in (max, min)] for stage, times in seconds.items()},
                }
            )
            print(rows[-1], flush=True)
    workers = {
        str(speed): {row["images"]: math.ceil(speed / row["images_per_second"]["shards"]) for row in rows}
        for speed in GPU_SPEEDS
    }
    print("GPU images/s   workers, " + ", ".join(row["images"] for row in rows))
    for speed, needed in workers.items():
        print(f"{speed:>12}   {', '.join(map(str, needed.values()))}")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = {
        "date": today,
        "machine": f"{cpu_name()}, one thread, load average {load} before the start",
        "versions": {
            "pillow": PIL.__version__,
            "libjpeg-turbo": features.version("libjpeg_turbo"),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "groupmixformer": groupmixformer.__version__,
        },
        "rows": rows,
        "workers": workers,
    }
    args.out.mkdir(exist_ok=True)
    (args.out / f"decode-{today}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
