"""What the folder of a run or of a converted checkpoint holds, read once, without Lightning.

The same class stands for a single checkpoint file, of which only the weights are known, and for a folder on a hub.
"""

import csv
import json
import platform
from collections.abc import Mapping
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .files import atomic_write, to_json, write_file

CONFIG = "config.json"  # architecture, task, class names, input of the model
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what timm and transformers look for in a folder
RECIPE = "recipe.yaml"
METRICS = "metrics.csv"
VERSIONS = "versions.json"
REPORT = "report.html"
UNREADABLE = "unreadable.txt"
EXAMPLES = "examples"
CHECKPOINT = "checkpoints/last.ckpt"


def one_line(error: Exception) -> str:
    """Return what an error says, without its line breaks."""
    return " ".join(str(error).split())


def _local(path: str | Path) -> Path:
    """Return where a checkpoint lies; one on a hub, ``hf-hub:user/name`` as timm has it, is fetched into the cache of files."""
    if not str(path).startswith("hf-hub:"):
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download

    repo_id, _, revision = str(path).removeprefix("hf-hub:").partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=[CONFIG, *WEIGHTS]))
    except Exception as error:  # what the HTTP client raises is its own
        raise OSError(f"{path}: cannot be fetched: {one_line(error)}") from error


def _read_config(config: Path) -> dict[str, Any]:
    if not config.is_file():
        return {}
    try:
        content = json.loads(config.read_text())
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        cfg, pool = content.get("pretrained_cfg", {}), content.get("global_pool", "avg")
        size = cfg.get("input_size", [3, 224, 224]) if isinstance(cfg, dict) else cfg
        if not isinstance(size, list) or len(size) != 3 or not all(isinstance(side, int) for side in size):
            raise ValueError(f"got a pretrained_cfg with input_size {size}, expected channels, height and width")
        ours = str(content.get("architecture", "groupmixformer")).startswith("groupmixformer")
        if ours and pool not in ("", "avg", "max", "avgmax", "catavgmax"):
            raise ValueError(f"got global_pool {pool}, expected avg, max, avgmax, catavgmax or nothing")
    except ValueError as error:
        raise ValueError(f"{config}: not a model configuration: {error}") from error
    return content


class RunFolder:
    """The folder of a run, of `gmf convert`, or on a hub; or a checkpoint file alone. Each file is read once, when asked for.

    Args:
        source: A path, or ``hf-hub:user/name`` or ``hf-hub:user/name@revision``.

    Attributes:
        source: As given.
        path: Where it lies on this machine; it need not exist.

    Raises:
        OSError: If it cannot be fetched from a hub.
    """

    def __init__(self, source: str | Path) -> None:
        self.source, self.path = str(source), _local(source)

    @classmethod
    def of(cls, source: "str | Path | RunFolder") -> "RunFolder":
        """Return the folder of a path, or one that is open already."""
        return source if isinstance(source, RunFolder) else cls(source)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json holds; nothing for a checkpoint file, or where there is none.

        Raises:
            ValueError: If it is not a model configuration.
        """
        return _read_config(self.path / CONFIG) if self.path.is_dir() else {}

    @property
    def task(self) -> str:
        """What the model was trained for; classification where config.json does not say."""
        return str(self.config.get("task", "classification"))

    @property
    def holds_classifier(self) -> bool:
        """Whether timm reads it; networks of other tasks are written by `save_network`."""
        return self.config.get("task") in (None, "classification")

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """Rows of metrics.csv, one for each epoch; none where there is no such file."""
        return read_metrics(self.path)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that trained it, and the machine; nothing where that is not known."""
        path = self.path / VERSIONS
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    @property
    def recipe_path(self) -> Path | None:
        """The recipe that it was trained by, if it is there."""
        path = self.path / RECIPE
        return path if path.is_file() else None

    @property
    def examples(self) -> Path:
        """Folder of a few held-out images, which need not exist."""
        return self.path / EXAMPLES

    def read_network(self, expected: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read what `save_network` wrote.

        Args:
            expected: What the network must have been trained for.

        Returns:
            The configuration and the tensors by name.

        Raises:
            FileNotFoundError: If there is no such folder, or a file is missing in it.
            ValueError: If it holds something else or cannot be read.
        """
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder, expected one of a run for {expected}")
        if expected != self.task:
            raise ValueError(f"{self.path}: holds a model for {self.task}, expected one for {expected}")
        if not isinstance(self.config.get("network"), dict) or not isinstance(self.config.get("class_names"), list):
            raise ValueError(f"{self.path / CONFIG}: expected the fields network and class_names")
        weights = self.path / WEIGHTS[0]
        if not weights.is_file():
            raise FileNotFoundError(f"{self.path}: the folder holds no {WEIGHTS[0]}")
        try:
            return self.config, safetensors.torch.load_file(weights)
        except Exception as error:  # a hostile file can make the reader raise anything
            reason = f"it is damaged or of another kind ({type(error).__name__}: {one_line(error).split('. ')[0]})"
            raise ValueError(f"{weights}: not a readable checkpoint: {reason}") from error


def save_network(network: torch.nn.Module, folder: str | Path, config: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` and ``config.json`` of a network that is not a classifier, atomically.

    Args:
        network: A detector, a segmenter or the network of another task.
        folder: Created if need be; other files in it are left alone.
        config: Its task, class_names, and under network what is needed to build it again.
    """
    folder = Path(folder)
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in network.state_dict().items()}
    with atomic_write(folder / WEIGHTS[0], folder / CONFIG) as temporary:
        safetensors.torch.save_file(tensors, temporary / WEIGHTS[0], metadata={"format": "pt"})
        (temporary / CONFIG).write_text(to_json(config, 2))


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
    write_file(folder / VERSIONS, to_json(versions, 2))
