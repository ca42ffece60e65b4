"""A data set of any task before it is trained on: what it holds, and what is wrong with it, as JSON, in lines and on a page."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..data.channels import ANY, Channels, in_colour
from ..data.classes import few
from ..data.formats import PARTS, Recognised, recognise
from ..data.samples import Samples, in_threads, spread
from ..data.sources import SPLITS
from ..data.survey import Look, describe, duplicates, look_at, look_at_sample, statistics
from ..files import short
from ..visual.data_page import render
from ..visual.page import Gallery, Shown
from .predictor import Progress
from .registry import find_task

if TYPE_CHECKING:  # which brings jsonargparse
    from ..training.recipe import Recipe

SAMPLED = 1000  # images of a part of a stream that are looked at
SHOWN = 8  # images drawn of a part, and in a batch
SIDE = 224  # at least, of duplicates


class Survey:
    """A data set that was looked through: every image is read once.

    Args:
        data: A folder or a file that `groupmixformer.data.formats.recognise` knows.
        task: Whose eyes it is seen with; the first that its format serves, by default.
        progress: Takes the parts and what is done with them, and yields them, as tqdm does.

    Attributes:
        found: What was recognised.
        base: Folder to which the files in `result` are relative.
        parts: The data sets, by the names of the parts.
        result: What was found, for JSON.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If it is of no known format, or no part can be used.
    """

    def __init__(self, data: str | Path, task: str = "", progress: Progress = lambda items, _: items) -> None:
        self.found: Recognised = recognise(data, find_task(task).name if task else "")
        self.task = find_task(task or self.found.tasks[0])
        self.parts: dict[str, Samples] = {}
        parts: dict[str, Any] = {}
        looks = {}
        self.base = self.found.path if self.found.path.is_dir() else self.found.path.parent
        order = sorted(self.found.parts, key=lambda name: [*PARTS, name].index(name))
        for name in progress(order, "looking"):
            try:
                samples = self.task.open_part(self.found.path, name)
            except ValueError as error:
                parts[name] = {"problem": str(error)}
                continue
            self.parts[name] = samples
            labels = samples.labels()
            names = [None] * len(samples) if labels is None else [samples.class_names[label] for label in labels]
            looks[name] = in_threads(self._look_at, zip(samples.files(), names, strict=True))
            parts[name] = _summary(samples) | describe(looks[name])
        if not self.parts:
            raise ValueError("; ".join(part["problem"] for part in parts.values()))
        self.result: dict[str, Any] = {
            "data": str(self.found.path),
            "format": self.found.format,
            "title": self.found.title,
            "task": self.task.name,
            "parts": parts,
            "duplicates": duplicates(looks),
        }

    def _look_at(self, item: tuple[Path, str | None]) -> Look:
        path, label = item
        return replace(look_at(path), path=path.relative_to(self.base) if path.is_relative_to(self.base) else path, label=label)

    def page(self, recipe: "Recipe") -> str:
        """Return the page, with a batch as it is augmented by a recipe."""
        plain = self.task.name == "classification"  # nothing is drawn on the images
        if (counts := {count for part in self.result["parts"].values() for count in part.get("in_chans", ())}) != {3}:
            count = min(counts, default=3)
            recipe = replace(recipe, in_chans=count, mean=[0.0] * count, std=[1.0] * count, display_channels=[])
        batch = "A batch as training sees it"
        batch += ", before mixup and cutmix" if plain and (recipe.augmentation.mixup or recipe.augmentation.cutmix) else ""
        galleries = {f"Images of {part}": Gallery(part, partial(self.drawn, part), not plain) for part in self.parts}
        galleries[batch] = Gallery(batch, lambda: [Shown(image, "") for image in self.batch(recipe)], not plain)
        heading = f"{self.found.title[0].upper()}{self.found.title[1:]}, {len(self.parts)} part{'s' * (len(self.parts) != 1)}"
        return render(self.result, heading, lambda file: in_colour(ANY.read(self.base / file, SIDE)), galleries)

    def drawn(self, part: str) -> list[Shown]:
        """Draw a few images of a part, chosen at random, with their annotations."""
        samples, shown = self.parts[part], list[Shown]()
        files = samples.files()
        for index in np.random.default_rng(0).permutation(len(samples)).tolist():
            try:
                name = ": ".join(filter(None, [samples.named(index), files[index].name]))
                shown.append(Shown(samples.drawn(index), short(name, 80)))
            except ValueError:  # which was told
                continue
            if len(shown) == SHOWN:
                break
        return shown

    def batch(self, recipe: "Recipe") -> list[Image.Image]:
        """Draw a batch of the first epoch, augmented by a recipe."""
        part = next(iter(self.parts))
        samples = self.task.open_part(self.found.path, part, recipe)
        order = np.random.default_rng(recipe.seed).permutation(len(samples))[:SHOWN].tolist()
        return [samples.drawn_sample(samples[0, index]) for index in order]

    @property
    def text(self) -> str:
        """What was found, in lines; what is wrong first."""
        lines = [self.found.text]
        groups = self.result["duplicates"]
        leaks, labels = ([group for group in groups if len(group[of]) > 1] for of in ("parts", "classes"))
        within = [group for group in groups if len(group["parts"]) == 1]
        for title, chosen in (("leak", leaks), ("several classes", labels), ("duplicates", within)):
            lines += [f"{title}: {_files(group)}" for group in chosen[:3]]
            lines += [f"{title}: {len(chosen) - 3} more groups"] if len(chosen) > 3 else []
        for name, part in self.result["parts"].items():
            lines += [f"{name:6} {line}" for line in _lines(part)]
        return "\n".join(lines)


def channel_statistics(
    data: str, task: str = "", in_chans: int | None = None, first: bool | None = None
) -> tuple[dict[str, Any], str]:
    """Compute mean and standard deviation of the channels of the training images of a data set.

    Args:
        data: A folder or a file that `groupmixformer.data.formats.recognise` knows.
        task: Whose eyes it is seen with; the first that its format serves, by default.
        in_chans: How images are read; by default as they are, image files as colour.
        first: Of arrays, as the recipe's ``channels_first``.

    Returns:
        As `groupmixformer.data.survey.statistics` has it, with the part; and the lines of a recipe.

    Raises:
        ValueError: If there is no such data set, or none of its images can be read.
    """
    found = recognise(data, find_task(task).name if task else "")
    part = "train" if "train" in found.parts else next(iter(found.parts))
    samples = find_task(task or found.tasks[0]).open_part(found.path, part)
    result = {"data": data, "part": part, **statistics(samples.files(), Channels(in_chans or 0, first))}
    lines = [f"in_chans: {result['in_chans']}"]
    lines += [f"{name}: [{', '.join(f'{value:.6g}' for value in result[name])}]" for name in ("mean", "std")]
    return result, "\n".join(lines)


def sample_stream(name: str, root: str = "data", most: int | None = None) -> tuple[dict[str, Any], str]:
    """Look at the first images of each part of a data set that is not read whole.

    Args:
        name: ``wds/NAME``, ``hfids/NAME`` or ``hfds/NAME``.
        root: Folder or URL of shards.
        most: Images of a part; `SAMPLED` by default.

    Returns:
        What was found, as `Survey.result` has it, and in lines.

    Raises:
        ValueError: If no part can be read.
    """
    from ..data.streaming import open_source

    kind, _, place = name.partition("/")
    parts: dict[str, Any] = {}
    for part, split in zip(("train", "val"), SPLITS, strict=True):
        try:
            source = open_source(f"{'wds' if kind == 'wds' else 'hfids'}/{place}", root, split)
            samples = (sample for shard in range(len(source.shards)) for sample in source.read(shard, 0))
            looks = [look_at_sample(sample, source.class_names) for sample in islice(samples, most or SAMPLED)]
        except ValueError as error:
            parts[part] = {"problem": str(error)}
            continue
        counts, total = Counter(look.label for look in looks if look.label is not None), sum(source.lengths)
        few = f"the first {len(looks):,} of {total:,} images were looked at, in stored order: no sample of the whole"
        parts[part] = {
            "images": len(looks),
            "total": total,
            "classes": [{"class": name, "count": counts[name]} for name in source.class_names],
            "counted": "images",
            "left_out": [],
            "reasons": {},
            "notes": [few] if len(looks) < total else [],
            **describe(looks),
        }
    if all("problem" in part for part in parts.values()):
        raise ValueError("; ".join(part["problem"] for part in parts.values()))
    title = "WebDataset shards" if kind == "wds" else "Hugging Face data set"
    result = {"data": name, "format": kind, "title": title, "task": "classification", "parts": parts, "duplicates": []}
    lines = [f"{part:6} {line}" for part, found in parts.items() for line in _lines(found)]
    return result, "\n".join([f"{name}: {title}, for classification", *lines])


def _summary(samples: Samples) -> dict[str, Any]:
    counts, what, problems = samples.count_classes()
    classes = [{"class": name, "count": int(count)} for name, count in zip(samples.class_names, counts, strict=False)]
    left_out = [*samples.skipped, *problems]
    return {
        "images": len(samples),
        "classes": classes,
        "counted": what,
        "left_out": left_out,
        "reasons": dict(Counter(_reason(line) for line in left_out).most_common()),
        "notes": list(samples.notes),
    }


def _reason(line: str) -> str:
    """Return a problem without its file and its numbers, so that equal ones are counted together."""
    return re.sub(r"\S*[/\\]\S*", "...", re.sub(r"\d+", "N", line.partition(": ")[2] or line))


def _files(group: Mapping[str, Any]) -> str:
    kind = "equal files" if group["equal"] else "near duplicates"
    return f"{kind}: {few([f'{file} ({part})' for part, files in group['files'].items() for file in files])}"


def _lines(part: Mapping[str, Any]) -> list[str]:
    if "problem" in part:
        return [f"cannot be used: {part['problem']}"]
    lines = [f"{part['images']:,} images, {part['bytes'] / 1e6:.1f} MB"]
    if "width" in part:
        sizes = ("min", "median", "max")
        lines[0] += ", " + ", ".join(f"{name} {part['width'][name]:.0f} x {part['height'][name]:.0f}" for name in sizes)
        lines[0] += f"; {_counted(part['channels'])}; {_counted(part['formats'])}"
    counts, names = ([row[key] for row in part["classes"]] for key in ("count", "class"))
    if len(counts) == 1:
        lines.append(f"1 class: {counts[0]:,} {part['counted']} of {names[0]}")
    elif counts:
        balance = f", {max(counts) / min(counts):.1f} : 1" if 0 < min(counts) < max(counts) else ""
        lines.append(f"{len(counts)} classes: {spread(counts, names, part['counted'])}{balance}")
        if absent := [name for count, name in zip(counts, names, strict=True) if not count]:
            lines.append(f"nothing of {few(absent)}")
    if others := [count for count in part.get("in_chans", ()) if count != 3]:
        mixed = f"not all have the same channels: {', '.join(map(str, part['in_chans']))}" if len(part["in_chans"]) > 1 else ""
        lines.append(mixed or f"train with --in-chans {others[0]}, and the mean and std that --statistics prints")
    lines += [f"{count} left out: {reason}" for reason, count in part["reasons"].items()]
    lines += [f"damaged: {entry['file']}: {entry['reason']}" for entry in part["damaged"][:5]]
    lines += [f"{len(part['damaged']) - 5} more are damaged"] if len(part["damaged"]) > 5 else []
    return [*lines, *(f"{count} images: {doubt}" for doubt, count in part["doubts"].items()), *part["notes"]]


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
