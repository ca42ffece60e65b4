"""A run for a hub: a folder with weights, configuration, recipe and a card that says what is known of the model; its upload."""

import csv
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from ..files import atomic_write
from ..models.checkpoint import WEIGHTS, architecture, load_model, one_line, read_network, save_checkpoint, task_of, variant_of
from ..models.groupmixformer import GroupMixFormer

PAPER = "https://arxiv.org/abs/2311.15157"

# By task: the Hub's name of it, and the columns of metrics.csv, the one that decides which epoch is best first, each with
# the Hub's name of the metric and ours.
TASKS = {
    "classification": ("image-classification", {"val_top1": ("accuracy", "top-1 accuracy")}),
    "detection": (
        "object-detection",
        {
            "val_mask_AP": ("mean_average_precision", "mask AP (COCO, IoU 0.50 to 0.95)"),
            "val_box_AP": ("mean_average_precision", "box AP (COCO, IoU 0.50 to 0.95)"),
        },
    ),
    "segmentation": (
        "image-segmentation",
        {"val_mIoU": ("mean_iou", "mean IoU"), "val_accuracy": ("accuracy", "share of pixels right")},
    ),
}

USE = {
    "timm": """With timm; the import registers the model:

```python
import timm
import groupmixformer

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # for a PIL image
features = timm.create_model("hf-hub:{repo_id}", pretrained=True, features_only=True)
```

With groupmixformer alone, and with transformers:

```python
import groupmixformer
from transformers import pipeline

model = groupmixformer.load_checkpoint("hf-hub:{repo_id}")
classify = pipeline("image-classification", model="{repo_id}")
```
""",
    "other": """With timm, and with transformers:

```python
import timm
from transformers import pipeline

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
classify = pipeline("image-classification", model="{repo_id}")
```
""",
    "detection": """With groupmixformer and its extra `detection`:

```python
import torch
from groupmixformer.tasks.detection.training import load_detector

model, stored = load_detector("hf-hub:{repo_id}")
with torch.inference_mode():
    found = model([torch.rand(3, 480, 640)])[0]  # images of any sizes, RGB from 0 to 1
names = [stored["class_names"][label - 1] for label in found["labels"].tolist()]
```
""",
    "segmentation": """With groupmixformer and its extra `segmentation`:

```python
from PIL import Image
from groupmixformer.tasks.segmentation.training import load_segmenter, segment

model, stored = load_segmenter("hf-hub:{repo_id}")
image = Image.open("image.jpg").convert("RGB")
labels = segment(model, model.prepare(image), (image.height, image.width)).argmax(dim=0)  # of stored["class_names"]
```
""",
}


@dataclass(frozen=True)
class _Known:
    """What is known of a model.

    Attributes:
        task: classification, detection or segmentation.
        name: Of the network, or of its backbone, in timm, as the card shows it.
        ours: Whether that is a GroupMixFormer.
        classes: Their names, or none.
        facts: About the network, in words.
        recipe: The run's, with what it says of this machine left out; empty where there is none.
        best: The row of metrics.csv of the epoch that was kept; empty where there is none.
        epochs: Rows of metrics.csv.
        versions: Of the packages that trained it, and the device.
    """

    task: str
    name: str
    ours: bool
    classes: list[str]
    facts: dict[str, str]
    recipe: dict[str, Any]
    best: dict[str, float]
    epochs: int
    versions: dict[str, str]


def _public(value: Any) -> Any:
    """Leave out of a path where it lies on this machine, and of a URL what may be a password."""
    if not isinstance(value, str):
        return value
    if "://" in value:
        kind, slash, rest = value.partition("://")
        address = urlsplit(f"//{rest}")
        return f"{kind}{slash}{address.netloc.rpartition('@')[2]}{address.path}"
    kind, slash, rest = value.partition("/")
    if kind not in ("hfds", "hfids", "wds", "torch"):
        kind, slash, rest = "", "", value
    return f"{kind}{slash}{Path(rest).name}" if rest.startswith(("/", "~")) or Path(rest).is_absolute() else value


def _plain(value: Any) -> str:
    """Write numbers and lists as Markdown shows them well."""
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _of_classifier(model: Any) -> tuple[str, bool, list[str], dict[str, str]]:
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    facts = {
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M",
        "input": f"{channels} x {height} x {width}, {cfg['interpolation']}, centre crop of {cfg['crop_pct']:.4g}",
        "mean": _plain(cfg["mean"]),
        "standard deviation": _plain(cfg["std"]),
    }
    ours, name = isinstance(model, GroupMixFormer), f"`{cfg['architecture']}`"
    if ours:
        stages = architecture(model.state_dict())
        if not variant_of(stages)[1]:
            name = "GroupMixFormer of other widths and depths than the published ones"
        facts |= {
            "widths of the stages": _plain(stages["embed_dims"]),
            "blocks of the stages": _plain(stages["depths"]),
            "MLP ratios": _plain(stages["mlp_ratios"]),
        }
    return name, ours, list(cfg.get("label_names") or []), facts | {"classes": f"{model.num_classes:,}"}


def _of_network(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[str, bool, list[str], dict[str, str]]:
    network = dict(config["network"])
    backbone = network.pop("backbone")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(statistics))
    facts = {"parameters": f"{parameters / 1e6:.2f} M"}
    settings = backbone["arguments"] | network
    facts |= {name.replace("_", " "): _plain(value) for name, value in settings.items() if value is not None}
    name = backbone["name"]
    return f"backbone `{name}`", name.startswith("groupmixformer"), config["class_names"], facts


def _read_yaml(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text()) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected fields of a recipe, such as data and epochs")
    return content


def _read_known(run: Path, task: str, about: tuple[str, bool, list[str], dict[str, str]]) -> _Known:
    recipe = _read_yaml(run / "recipe.yaml")
    recipe |= {name: _public(recipe[name]) for name in ("data", "root", "checkpoint", "out") if name in recipe}
    rows: list[dict[str, float]] = []
    if (run / "metrics.csv").is_file():
        with (run / "metrics.csv").open(newline="") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    best: dict[str, float] = {}
    if rows:
        monitor = next(column for column in TASKS[task][1] if column in rows[0])
        best = max(rows, key=lambda row: row[monitor])  # of equal ones the first, as training keeps it
    versions = run / "versions.json"
    stored = json.loads(versions.read_text()) if versions.is_file() else {}
    trained_with = {name: stored[name] for name in ("groupmixformer", "torch", "timm", "lightning", "device") if name in stored}
    return _Known(task, *about, recipe, best, len(rows), trained_with)


def _measured_on(known: _Known) -> str:
    return f"{known.recipe.get('data', 'the data')}, held-out part"


def _metadata(known: _Known, repo_id: str, license: str) -> str:
    """Return the card's front matter, by the Hub's rules."""
    from huggingface_hub import EvalResult, ModelCardData

    hub_task, columns = TASKS[known.task]
    found = re.fullmatch(r"hfi?ds/([\w.-]+/[\w.-]+)", str(known.recipe.get("data", "")))
    on_hub = found[1] if found and not Path(found[1]).exists() else None  # hfids/ reads folders of this machine too
    classifies = known.task == "classification"
    start = str(known.recipe.get("checkpoint") or "")
    results = [
        EvalResult(
            task_type=hub_task,
            dataset_type=on_hub or str(known.recipe.get("data", "unknown")),
            dataset_name=_measured_on(known),
            metric_type=metric,
            metric_name=f"{name}, best epoch by this data",
            metric_value=round(known.best[column], 6),
        )
        for column, (metric, name) in columns.items()
        if column in known.best
    ]
    return ModelCardData(
        license=license,
        library_name="timm" if classifies else "groupmixformer",
        pipeline_tag=hub_task,
        tags=[hub_task, *(["timm", "transformers"] if classifies else []), *(["groupmixformer"] if known.ours else [])],
        datasets=[on_hub] if on_hub else None,
        base_model=start.removeprefix("hf-hub:").partition("@")[0] if start.startswith("hf-hub:") else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    ).to_yaml()


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows.items()])


def _results(known: _Known) -> str:
    if not known.best:
        return "Nothing was measured for this card."
    values = {}
    for column, value in known.best.items():
        if column == "val_loss":
            values["loss (mean cross entropy, nats)"] = f"{value:.4f}"
        elif column.startswith("val_") and column != "val_images":
            name = TASKS[known.task][1].get(column, ("", column.removeprefix("val_").replace("_", " ")))[1]
            values[name] = f"{value:.2%}"
    images = f"{known.best['val_images']:,.0f} images of " if "val_images" in known.best else ""
    return (
        f"Measured on {images}{_measured_on(known)}, after epoch {known.best['epoch'] + 1:.0f} of {known.epochs}. "
        "That epoch was kept because it is the best on these same images, so the numbers lean high.\n\n"
        f"{_table(('metric', 'value'), values)}\n\n"
        "Nothing else was measured: no other data, no other size of image."
    )


def _training(known: _Known) -> str:
    if not known.recipe:
        return "How it was trained is not known to this card."
    start = known.recipe.get("checkpoint")
    lines = [
        f"Trained by `gmf train` on `{known.recipe.get('data')}`, from {f'`{start}`' if start else 'random weights'}. "
        "The recipe, which is also in `recipe.yaml`:",
        f"```yaml\n{yaml.safe_dump(known.recipe, sort_keys=False).rstrip()}\n```",
    ]
    if known.versions:
        packages = ", ".join(f"{name} {version}" for name, version in known.versions.items() if name != "device")
        lines.append(f"With {packages}, on {known.versions.get('device', 'a machine that is not known')}.")
    return "\n\n".join(lines)


def _card(known: _Known, repo_id: str, license: str) -> str:
    shown = ", ".join(known.classes[:20]) + (
        f", ... ({len(known.classes):,} in `config.json`)" if len(known.classes) > 20 else ""
    )
    stated = "not known" if license == "unknown" else license
    use = known.task if known.task != "classification" else "timm" if known.ours else "other"
    about = (
        f"A GroupMixFormer, a vision transformer with Group-Mix Attention ([paper]({PAPER}))"
        if known.ours and known.task == "classification"
        else f"A network over the {known.name}"
        if known.task != "classification"
        else "A model of timm"
    )
    parts = [
        f"---\n{_metadata(known, repo_id, license).rstrip()}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        f"{about}, for {TASKS[known.task][0].replace('-', ' ')}.",
        "## Model",
        _table(("property", "value"), {"network": known.name, **known.facts}),
        *([f"Classes: {shown}."] if shown else []),
        "## Results",
        _results(known),
        "## Training",
        _training(known),
        "## Use",
        USE[use].format(repo_id=repo_id).rstrip(),
        "## Licence",
        f"Licence of these weights: {stated}.",
    ]
    if known.ours:
        parts += [
            "## Citation",
            "```bibtex\n@article{ge2023groupmix,\n  title={Advancing Vision Transformers with Group-Mix Attention},\n"
            "  author={Ge, Chongjian and Ding, Xiaohan and Tong, Zhan and Yuan, Li and Wang, Jiangliu and Song, Yibing and "
            "Luo, Ping},\n  journal={arXiv preprint arXiv:2311.15157},\n  year={2023}\n}\n```",
        ]
    parts.append(f"Written by groupmixformer {metadata.version('groupmixformer')}.")
    return "\n\n".join(parts) + "\n"


def _collect(run: str | Path, folder: Path, repo_id: str, license: str) -> str:
    """Write everything but the card into a folder that is there, and return the card."""
    task = task_of(run)
    if task == "classification":
        model = load_model(run)
        known = _read_known(Path(run), task, _of_classifier(model))
        save_checkpoint(model, folder)
    else:
        known = _read_known(Path(run), task, _of_network(*read_network(run, task)))
        for name in ("config.json", WEIGHTS[0]):
            shutil.copyfile(Path(run, name), folder / name)
    if known.recipe:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(known.recipe, sort_keys=False))
    return _card(known, repo_id, license)


def model_card(run: str | Path, repo_id: str, license: str = "unknown") -> str:
    """Write down what is known of a model, in the Hub's form: Markdown headed by YAML.

    Args:
        run: Folder of a run, or what `load_model` reads; metrics and recipe are known for the folder of a run alone.
        repo_id: Where the model will be, ``user/name``.
        license: Of the weights, by the Hub's names, such as mit.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _collect(run, Path(folder), repo_id, license)


def write_folder(run: str | Path, folder: str | Path, repo_id: str, license: str = "unknown") -> list[str]:
    """Write what `push_to_hub` uploads: weights as safetensors, config.json, README.md and the recipe; no other file of a run.

    Args:
        run: As `model_card` has it.
        folder: Must be new or empty.
        repo_id: As `model_card` has it.
        license: As `model_card` has it.

    Returns:
        The names of the files.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it cannot be read, the folder holds something already, or the hub has no such names.
    """
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    folder = Path(folder)
    if "/" not in repo_id:
        raise ValueError(f"got {repo_id}, expected a user or organisation and a name, such as user/{repo_id}")
    validate_repo_id(repo_id)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: holds files already, expected a new or empty folder")
    with atomic_write(folder) as temporary:
        written = temporary / folder.name
        written.mkdir()
        (written / "README.md").write_text(_collect(run, written, repo_id, license))
    return sorted(path.name for path in folder.iterdir())


def push_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    license: str = "unknown",
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str = "Upload the model",
) -> str:
    """Upload a model with a card, so that timm, transformers and `load_checkpoint` find it as ``hf-hub:user/name``.

    Args:
        run: Folder of a run, or what `load_model` reads. Optimiser state and checkpoints of training stay here.
        repo_id: ``user/name``, which is created if need be. A file of the same name there is replaced, others stay.
        license: Of the weights, by the Hub's names, such as mit; the card says it.
        token: Of the Hub; by default that of ``hf auth login`` or of the variable HF_TOKEN.
        private: Make a new repository private.
        revision: Branch, which must exist; main by default.
        commit_message: First line of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If it cannot be read, or the hub refuses a name or the card.
        OSError: If the hub cannot be reached or refuses the upload.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "folder")
        write_folder(run, folder, repo_id, license)
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
        except ValueError as error:
            raise ValueError(f"{repo_id}: the hub refuses the upload: {one_line(error)}") from error
        except Exception as error:  # what the HTTP client raises is its own
            status = getattr(getattr(error, "response", None), "status_code", None)
            remedy = "; log in with `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
            raise OSError(f"{repo_id}: cannot be uploaded: {one_line(error)}{remedy}") from error
    return str(commit.commit_url)
