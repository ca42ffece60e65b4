"""What the folder of a run or of a converted checkpoint holds, read once, without Lightning.

The same class stands for a single checkpoint file, of which only the weights are known, and for a folder on a hub.
"""

import csv
import platform
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import Fields, atomic_write, read_json, read_text, to_json, write_file
from .files import one_line as one_line
from .released import find_weights, variant_named
from .weights import read_tensors, write_tensors

CONFIG = "config.json"  # architecture, task, class names, input of the model
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what timm and transformers look for in a folder
RECIPE = "recipe.yaml"
METRICS = "metrics.csv"
VERSIONS = "versions.json"
REPORT = "report.html"
UNREADABLE = "unreadable.txt"
SPLIT = "split.json"  # which images were trained on and which held out, of data without parts
EXAMPLES = "examples"
MAX_SIDE = 4096  # of the images that a model is for, in pixels
MULTI_LABEL = "multi_label_classification"  # transformers' name, as problem_type in config.json: sigmoids instead of a softmax
CROP_MODES = ("center", "squash", "border")  # timm's
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos", "random")
PRETRAINING = "pretraining"  # the task whose networks timm reads as it does classifiers, of no classes
CHECKPOINT = "checkpoints/last.ckpt"
PREVIOUS = "checkpoints/previous.ckpt"  # the one before it


def _local(path: str | Path) -> Path:
    """Return where a checkpoint lies; one on a hub, ``hf-hub:user/name`` as timm has it, is fetched into the cache of files."""
    if not str(path).startswith("hf-hub:"):
        local, variant = Path(path).expanduser(), variant_named(str(path))
        return find_weights(variant) if variant and not local.exists() else local
    from huggingface_hub import snapshot_download

    repo_id, _, revision = str(path).removeprefix("hf-hub:").partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=[CONFIG, *WEIGHTS]))
    except Exception as error:  # what the HTTP client raises is its own
        raise OSError(f"{path}: cannot be fetched: {one_line(error)}") from error


def _check(fields: Fields, checks: Mapping[str, Callable[[str], Any]]) -> None:
    """Check the fields that are there; one that is null is there, and is refused: no other value takes its place in silence."""
    for name, check in checks.items():
        if name in fields:
            check(name)


def _check_colors(fields: Fields, channels: int) -> None:
    """Check mean and standard deviation of the pixels, by channel."""
    _check(fields, {"mean": fields.numbers, "std": lambda name: fields.numbers(name, low=1e-6)})
    for name in ("mean", "std"):
        if len(fields.values.get(name, (0,))) not in (1, 3, channels):
            raise ValueError(
                f"{fields.where}: {name} is {fields.values[name]}, expected a number for each of {channels} channels"
            )


def _check_config(config: Fields) -> None:
    """Check what is read of config.json, whatever the task; what a task stores for itself is its own.

    Raises:
        ValueError: If a field is not of its type, or not of a size that makes sense.
    """
    pools = ("", "avg", "max", "avgmax", "catavgmax", "ggem", "simpool")
    ours = str(config.values.get("architecture", "groupmixformer")).startswith("groupmixformer")
    checks: dict[str, Callable[[str], Any]] = {"task": config.text, "architecture": config.text}
    checks |= {"label_names": config.texts, "class_names": config.texts, "model_args": config.object}
    checks["num_classes"] = lambda name: config.integer(name, 0, 1_000_000)
    problems = ("single_label_classification", MULTI_LABEL)
    checks["problem_type"] = lambda name: config.choice(name, problems)
    checks["best_threshold"] = lambda name: config.number(name, 0, 1)
    if config.values.get("channels_first") is not None:
        checks["channels_first"] = config.flag
    checks["display_channels"] = lambda name: config.integers(name, low=0, high=4095)
    _check(config, checks | ({"global_pool": lambda name: config.choice(name, pools)} if ours else {}))
    if "adapter" in config:
        adapter = config.object("adapter")
        adapter.choice("kind", ("lora", "adaptformer", "linear_probe"))
        adapter.integer("rank", 1, 4096)
        adapter.number("alpha", 1e-4, 1e4, default=None)
        adapter.texts("targets")
        if "base" in adapter:
            base = adapter.object("base")
            _check(base, {"source": base.text, "path": base.text})
            base.text("source")
            base.text("checksum")
    if "network" in config:
        network = config.object("network")
        backbone = network.object("backbone", Fields({}, ""))
        _check_colors(network, backbone.integer("in_chans", 1, 4096, default=3))
    if "pretrained_cfg" not in config:
        return
    cfg: Fields = config.object("pretrained_cfg")
    sizes, shares = ("input_size", "min_input_size", "test_input_size"), ("crop_pct", "test_crop_pct")
    checks = {name: lambda name: cfg.integers(name, 3, 1, MAX_SIDE) for name in sizes}  # channels, height and width
    checks |= {name: lambda name: cfg.number(name, 0.01, 2) for name in shares}  # three models of timm have 1.15
    checks["num_classes"] = lambda name: cfg.integer(name, 0, 1_000_000)
    checks["fixed_input_size"] = cfg.flag
    checks["crop_mode"] = lambda name: cfg.choice(name, CROP_MODES)
    checks["interpolation"] = lambda name: cfg.choice(name, INTERPOLATIONS)
    _check(cfg, checks)
    if ours and min(cfg.values.get("input_size", (3, 32, 32))[1:]) < 32:
        raise ValueError(f"{cfg.where}: input_size is {cfg.values['input_size']}, expected height and width of at least 32")
    _check_colors(cfg, cfg.values.get("input_size", (3,))[0])


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    fields = Fields(read_json(path), str(path))
    _check_config(fields)
    return fields.values


def _owner(file: Path) -> Path | None:
    """Return the folder of the run that a file of weights belongs to."""
    folder = file.parent.parent if file.parent.name == Path(CHECKPOINT).parent.name else file.parent
    known = file.name in WEIGHTS if folder == file.parent else file.suffix == Path(CHECKPOINT).suffix
    return folder if known and file.is_file() and (folder / CONFIG).is_file() else None


class RunFolder:
    """The folder of a run, of `gmf convert`, or on a hub; or a checkpoint file alone. Each file is read once, when asked for.

    Args:
        source: A path, ``hf-hub:user/name`` or ``hf-hub:user/name@revision``, or the name of a variant, whose released weights
            are then those in `groupmixformer.released.weights_folder`. A file of weights in the folder of a run,
            such as ``checkpoints/last.ckpt``, is that run with these weights.
        allow_nonfinite: Read weights that hold NaN or infinite values.

    Attributes:
        source: As given.
        path: Where it lies on this machine; it need not exist.
        allow_nonfinite: As given.

    Raises:
        OSError: If it cannot be fetched from a hub.
    """

    def __init__(self, source: str | Path, allow_nonfinite: bool = False) -> None:
        self.source, self.allow_nonfinite = str(source), allow_nonfinite
        self._given = _local(source)
        self.path = _owner(self._given) or self._given

    @classmethod
    def of(cls, source: "str | Path | RunFolder", allow_nonfinite: bool = False) -> "RunFolder":
        """Return the folder of a path, or one that is open already."""
        return source if isinstance(source, RunFolder) else cls(source, allow_nonfinite)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json holds; nothing for a checkpoint file, or where there is none.

        Raises:
            ValueError: If it is not a model configuration.
        """
        return _read_config(self.path / CONFIG)

    @property
    def weights(self) -> Path:
        """The file of its weights: the one that was given, or the first of `WEIGHTS` that is in the folder.

        Raises:
            FileNotFoundError: If there is none.
        """
        if not self._given.is_dir():
            return self._given
        for name in WEIGHTS:
            if (self.path / name).is_file():
                return self.path / name
        raise FileNotFoundError(f"{self.path}: the folder holds none of {', '.join(WEIGHTS)}")

    def read_weights(self) -> dict[str, Tensor]:
        """Read the weights, by their names in the file.

        Raises:
            FileNotFoundError: If there are none.
            ValueError: If they cannot be read, are damaged or not finite.
        """
        return read_tensors(self.weights, self.allow_nonfinite)

    @property
    def task(self) -> str:
        """What the model was trained for; classification where config.json does not say."""
        return str(self.config.get("task", "classification"))

    @property
    def holds_classifier(self) -> bool:
        """Whether timm reads it, with classes or pre-trained without; networks of other tasks are written by `save_network`."""
        return self.config.get("task") in (None, "classification", PRETRAINING)

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """Rows of metrics.csv, one for each epoch; none where there is no such file."""
        return read_metrics(self.path)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that trained it, and the machine; nothing where that is not known.

        Raises:
            ValueError: If versions.json holds something else.
        """
        path = self.path / VERSIONS
        if not path.is_file():
            return {}
        fields = Fields(read_json(path), str(path))
        return {name: fields.text(name) for name in fields.values}

    @property
    def recipe_path(self) -> Path | None:
        """The recipe that it was trained by, if it is there."""
        path = self.path / RECIPE
        return path if path.is_file() else None

    @property
    def changes(self) -> str:
        """How the recipe changed while the run was trained, in words; empty where it did not.

        Raises:
            ValueError: If recipe.yaml does not say it as a run writes it.
        """
        import yaml  # of the extra that trains

        if self.recipe_path is None:
            return ""
        try:
            return "; ".join(
                ", ".join(f"{name} {old} -> {new}" for name, (old, new) in part["changed"].items())
                + f" from epoch {part['epoch'] + 1} on"
                for part in yaml.safe_load(read_text(self.recipe_path)).get("history") or []
            )
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(f"{self.recipe_path}: history is not as a run writes it ({reason}): leave it out") from error

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
        fields = Fields(self.config, str(self.path / CONFIG))
        fields.object("network")
        fields.texts("class_names")
        return self.config, self.read_weights()


def save_network(network: torch.nn.Module, folder: str | Path, config: Mapping[str, Any]) -> None:
    """Write ``model.safetensors`` and ``config.json`` of a network that is not a classifier, atomically.

    Args:
        network: A detector, a segmenter or the network of another task.
        folder: Created if need be; other files in it are left alone.
        config: Its task, class_names, and under network what is needed to build it again.
    """
    folder = Path(folder)
    with atomic_write(folder / WEIGHTS[0], folder / CONFIG) as temporary:
        write_tensors(network.state_dict(), temporary / WEIGHTS[0])
        (temporary / CONFIG).write_text(to_json(config, indent=2))


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.csv as it is now, one for each epoch: epoch, step, lr, loss, val_loss, val_top1, seconds.

    Raises:
        ValueError: If it holds something else than rows of numbers under their names.
    """
    path = folder / METRICS
    if not path.is_file():
        return []
    rows = []
    reader = csv.DictReader(read_text(path).splitlines(), restkey="more columns than names", strict=True)
    try:
        for row in reader:
            rows.append({name: _number(value, f"{path}: line {reader.line_num}: {name}") for name, value in row.items()})
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: not CSV: {error}") from error
    return rows


def _number(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is {value!r}, expected a number") from None


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
    write_file(folder / VERSIONS, to_json(versions, indent=2))
