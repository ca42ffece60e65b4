"""What is known of a model, written down in the Hub's form: Markdown headed by YAML."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from ..files import printable, read_text
from ..run_folder import WEIGHTS, RunFolder
from ..tasks.registry import NetworkInfo, TaskSpec, find_task


@dataclass(frozen=True)
class CardInfo:
    """What is known of a model.

    Attributes:
        task: What it is for.
        network: What its task says of it.
        recipe: The run's, with what it says of this machine left out; empty where there is none.
        best: The row of metrics.csv of the epoch that was kept; empty where there is none.
        epochs: Rows of metrics.csv.
        versions: Of the packages that trained it, and the device.
        changes: How the recipe changed while it was trained.
    """

    task: TaskSpec
    network: NetworkInfo
    recipe: dict[str, Any]
    best: dict[str, float]
    epochs: int
    versions: dict[str, str]
    changes: str = ""


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


def _read_yaml(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(read_text(path)) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected fields of a recipe, such as data and epochs")
    return content


def read_card_info(run: RunFolder, network: NetworkInfo) -> CardInfo:
    """Gather what the folder of a run tells.

    Raises:
        ValueError: If its recipe cannot be read.
    """
    task, rows = find_task(run.task), run.metrics
    recipe = _read_yaml(run.recipe_path) if run.recipe_path else {}
    if teacher := _teacher(recipe):
        recipe["distill"]["teacher"] = _public(teacher)
    recipe |= {name: _public(recipe[name]) for name in ("data", "root", "checkpoint", "out") if name in recipe}
    of_best = run.weights.name in WEIGHTS  # and not of the last step
    monitor = next((column for column in task.hub_metrics if of_best and rows and column in rows[0]), None)
    best = max(rows, key=lambda row: row[monitor]) if monitor else {}  # of equal ones the first, as training keeps it
    packages = ("groupmixformer", "torch", "timm", "lightning", "device")
    versions = {name: run.versions[name] for name in packages if name in run.versions}
    return CardInfo(task, network, recipe, best, len(rows), versions, run.changes)


def _teacher(recipe: Mapping[str, Any]) -> str:
    """Return the teacher that a recipe names, if any."""
    distill = recipe.get("distill")
    return str(distill.get("teacher") or "") if isinstance(distill, dict) else ""


def _measured_on(known: CardInfo) -> str:
    return f"{known.recipe.get('data', 'the data')}, held-out part"


def _metadata(known: CardInfo, repo_id: str, license: str) -> str:
    """Return the card's front matter, by the Hub's rules."""
    from huggingface_hub import EvalResult, ModelCardData

    task = known.task
    found = re.fullmatch(r"hfi?ds/([\w.-]+/[\w.-]+)", str(known.recipe.get("data", "")))
    on_hub = found[1] if found and not Path(found[1]).exists() else None  # hfids/ reads folders of this machine too
    start = str(known.recipe.get("checkpoint") or "")
    results = [
        EvalResult(
            task_type=task.hub_name,
            dataset_type=on_hub or str(known.recipe.get("data", "unknown")),
            dataset_name=_measured_on(known),
            metric_type=metric,
            metric_name=f"{name}, best epoch by this data",
            metric_value=round(known.best[column], 6),
        )
        for column, (metric, name) in task.hub_metrics.items()
        if column in known.best
    ]
    return ModelCardData(
        license=license,
        library_name=task.hub_library,
        pipeline_tag=task.hub_name,
        tags=[task.hub_name, *task.hub_tags, *(["groupmixformer"] if known.network.ours else [])],
        datasets=[on_hub] if on_hub else None,
        base_model=start.removeprefix("hf-hub:").partition("@")[0] if start.startswith("hf-hub:") else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    ).to_yaml()


def markdown(text: str) -> str:
    """Return a text as Markdown that shows it as it is, in one line."""
    return re.sub(r"([!-&*+./:-@[-`{-~])", r"\\\1", printable(text))


def _code(text: str, language: str | None = None) -> str:
    """Return a text as Markdown's code, in a line, or in a block of a language."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    if language is None:
        space = " " * text.startswith("`") or " " * text.endswith("`")
        return f"{ticks}{space}{printable(text)}{space}{ticks}"
    fence = ticks.ljust(3, "`")
    return f"{fence}{language}\n{text}\n{fence}"


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---|---|"]
    cells = ([printable(cell).replace("|", r"\|") for cell in row] for row in rows.items())
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in cells])


def _results(known: CardInfo) -> str:
    if not known.best:
        return "Nothing was measured for this card."
    values = {}
    for column, value in known.best.items():
        if column == "val_loss":
            kind = "binary cross entropy" if "val_mAP" in known.best else "cross entropy"
            values[f"loss (mean {kind}, nats)"] = f"{value:.4f}"
        elif column.startswith("val_") and column != "val_images":
            name = known.task.hub_metrics.get(column, ("", column.removeprefix("val_").replace("_", " ")))[1]
            values[name] = f"{value:.2%}"
    images = f"{known.best['val_images']:,.0f} images of " if "val_images" in known.best else ""
    return (
        f"Measured on {images}{markdown(_measured_on(known))}, after epoch {known.best['epoch'] + 1:.0f} of {known.epochs}. "
        "That epoch was kept because it is the best on these same images, so the numbers lean high.\n\n"
        f"{_table(('metric', 'value'), values)}\n\n"
        "Nothing else was measured: no other data, no other size of image."
    )


def _training(known: CardInfo) -> str:
    if not known.recipe:
        return "How it was trained is not known to this card."
    start = _code(str(known.recipe["checkpoint"])) if known.recipe.get("checkpoint") else "random weights"
    teacher = _teacher(known.recipe)
    taught = f", with {_code(teacher)} as teacher ({known.recipe['distill'].get('kind')})" if teacher else ""
    lines = [
        f"Trained by `gmf train` on {_code(str(known.recipe.get('data')))}, from {start}{taught}. "
        "The recipe, which is also in `recipe.yaml`:",
        _code(yaml.safe_dump(known.recipe, sort_keys=False).rstrip(), "yaml"),
    ]
    if known.changes:
        lines.append(f"Changed while it was trained: {known.changes}.")
    if known.versions:
        packages = ", ".join(f"{name} {version}" for name, version in known.versions.items() if name != "device")
        lines.append(f"With {packages}, on {markdown(known.versions.get('device', 'a machine that is not known'))}.")
    return "\n\n".join(lines)


def render_card(known: CardInfo, repo_id: str, license: str) -> str:
    """Return a model card, Markdown headed by YAML.

    Args:
        known: What is known of the model.
        repo_id: Where it will be, ``user/name``.
        license: Of the weights, by the Hub's names; ``unknown`` is told as such.
    """
    network = known.network
    shown = ", ".join(map(markdown, network.class_names[:20]))
    if len(network.class_names) > 20:
        shown += f", ... ({len(network.class_names):,} in `config.json`)"
    stated = "not known" if license == "unknown" else markdown(license)
    parts = [
        f"---\n{_metadata(known, repo_id, license).rstrip()}\n---",
        f"# {repo_id.rpartition('/')[2]}",
        f"{network.about}, for {known.task.hub_name.replace('-', ' ')}.",
        "## Model",
        _table(("property", "value"), {"network": network.name, **network.facts}),
        *([f"Classes: {shown}."] if shown else []),
        "## Results",
        _results(known),
        "## Training",
        _training(known),
        "## Use",
        network.use.format(repo_id=repo_id).rstrip(),
        "## Licence",
        f"Licence of these weights: {stated}.",
    ]
    if network.ours:
        parts += [
            "## Citation",
            "```bibtex\n@article{ge2023groupmix,\n  title={Advancing Vision Transformers with Group-Mix Attention},\n"
            "  author={Ge, Chongjian and Ding, Xiaohan and Tong, Zhan and Yuan, Li and Wang, Jiangliu and Song, Yibing and "
            "Luo, Ping},\n  journal={arXiv preprint arXiv:2311.15157},\n  year={2023}\n}\n```",
        ]
    parts.append(f"Written by groupmixformer {metadata.version('groupmixformer')}.")
    return "\n\n".join(parts) + "\n"
