"""What the folder of a run holds."""

import csv
import json
import platform
from importlib import metadata
from pathlib import Path

import torch

from .files import write_file

CONFIG = "config.json"  # architecture, task, class names, input of the model
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what timm and transformers look for in a folder
RECIPE = "recipe.yaml"
METRICS = "metrics.csv"
VERSIONS = "versions.json"
REPORT = "report.html"
UNREADABLE = "unreadable.txt"
EXAMPLES = "examples"
CHECKPOINT = "checkpoints/last.ckpt"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.csv as it is now, one for each epoch: epoch, step, lr, loss, val_loss, val_top1, seconds."""
    path = folder / METRICS
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def write_versions(folder: Path) -> None:
    """Write versions.json: the versions of what a result depends on, and the machine."""
    packages = ("groupmixformer", "torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "pillow")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    versions = {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "device": f"{machine}, {torch.get_num_threads()} threads",
    }
    write_file(folder / VERSIONS, json.dumps(versions, indent=2))
