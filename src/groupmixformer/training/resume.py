"""What a run continues from: its last whole checkpoint, and what has changed since that was written."""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch

from ..data.classes import differences
from ..run_folder import CHECKPOINT, PREVIOUS, RECIPE, RunFolder, one_line
from .recipe import Recipe, fields_of, read_history, read_recipe

# Fields that do not alter what is learnt. For devices and nodes, the number of processes that there were stands.
WITHOUT_EFFECT = {
    *("out", "download", "workers", "save_minutes", "log_steps", "loggers", "max_unreadable", "max_skipped_steps"),
    *("devices", "nodes"),
}


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint of training whole, every byte of it checked.

    Raises:
        ValueError: If it is missing or damaged, with the reason.
    """
    try:
        if not path.exists():
            raise ValueError("is missing")
        if not path.stat().st_size:
            raise ValueError("is empty")
        with zipfile.ZipFile(path) as file:
            if (member := file.testzip()) is not None:
                raise ValueError(f"is damaged: the checksum of {member} does not hold")
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in checkpoint["state_dict"].items():
            if tensor.is_floating_point() and (count := int((~tensor.isfinite()).sum())):
                raise ValueError(f"holds {count} values of {name} that are not finite")
        for part in ("loops", "optimizer_states", "global_step", "counts"):
            if part not in checkpoint:
                raise ValueError(f"is no checkpoint of training: it has no {part}")
    except ValueError:
        raise
    except Exception as error:  # damage can make the readers raise anything; their advice is for other files
        reason = f"{type(error).__name__}: {one_line(error).split('. ')[0][:100]}"
        raise ValueError(f"is damaged or of another kind ({reason})") from error
    return checkpoint


@dataclass
class Start:
    """Where a run continues.

    Attributes:
        path: The checkpoint.
        checkpoint: What it holds.
        damage: What is wrong with the last checkpoint, where this is the one before it; otherwise empty.
        before: What the checkpoint says of the run, as far as it is known: recipe, processes, images, class_names, history.
    """

    path: Path
    checkpoint: dict[str, Any]
    damage: str
    before: dict[str, Any]

    @property
    def place(self) -> dict[str, int]:
        """Epoch, as metrics.csv counts them, and step."""
        epoch = self.checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        return {"epoch": int(epoch), "step": int(self.checkpoint["global_step"])}


def find_start(folder: Path) -> Start | None:
    """Return where the run in a folder continues, or None where it has no checkpoint.

    Raises:
        ValueError: If no checkpoint can be read, with the reasons, what is intact and what to do.
    """
    last, previous = folder / CHECKPOINT, folder / PREVIOUS
    if not last.exists() and not previous.exists():
        return None
    problems: list[str] = []
    for path in (last, previous):
        try:
            checkpoint = _read(path)
        except ValueError as error:
            problems.append(f"{path} {error}")
        else:
            return Start(path, checkpoint, "; ".join(problems), _before(folder, checkpoint))
    run = RunFolder(folder)
    try:
        run.read_weights()
    except (OSError, ValueError):
        remains = "no model of the run is intact: begin a new run"
    else:
        remains = f"the best model, {run.weights}, is intact: begin a new run from it with --checkpoint {folder}, another --out"
    raise ValueError(f"{'; '.join(problems)}; {remains}")


def _before(folder: Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of its run; of one that does not, what the files beside it say."""
    if "run" in checkpoint:
        return dict(checkpoint["run"])
    before: dict[str, Any] = {"processes": len(checkpoint["counts"]["losses"]), "history": []}
    config = RunFolder(folder).config
    if names := config.get("label_names") or config.get("class_names"):
        before["class_names"] = names
    path = folder / RECIPE
    if path.is_file():
        before |= {"recipe": _plain(read_recipe(str(path))), "history": read_history(path)}
    return before


def _plain(recipe: Recipe) -> dict[str, Any]:
    return dict(json.loads(json.dumps(fields_of(recipe))))


def describe(recipe: Recipe, processes: int, images: int, class_names: Sequence[str]) -> dict[str, Any]:
    """Return what a checkpoint says of its run."""
    return {"recipe": _plain(recipe), "processes": processes, "images": images, "class_names": list(class_names)}


def _values(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a description by their dotted names."""

    def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]

    fields = {name: value for name, value in run.get("recipe", {}).items() if name not in WITHOUT_EFFECT}
    return dict(flat(fields)) | {name: run[name] for name in ("processes", "images", "teacher") if name in run}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return what alters the result and differs between two descriptions: for each name, its value before and now."""
    old, new = _values(before), _values(now)
    return {name: [old[name], value] for name, value in new.items() if name in old and old[name] != value}


def check_classes(before: Mapping[str, Any], names: Sequence[str], path: Path) -> None:
    """Refuse data whose classes are not those that a checkpoint was trained on: its labels would mean others.

    Raises:
        ValueError: If they differ, with the names.
    """
    if "class_names" not in before:
        return
    old, new = ([normalize("NFC", name) for name in listed] for listed in (before["class_names"], names))
    if old != new:
        different = differences(old, new, "the checkpoint", "the data") or "the same names in another order"
        raise ValueError(
            f"{path}: was trained on other classes than the data has: {different}; give the data the checkpoint's classes in "
            f"their order, or begin a new run from its best model with --checkpoint {path.parent.parent} and another --out"
        )
